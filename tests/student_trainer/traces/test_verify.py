"""Traces: what is written is read back, every planted fault has its reason, and spans are exact bytes of the prompt."""

import json
import unicodedata

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.data.rows.formats import Turn
from student_trainer.data.trace_schema import (
    DRAFT_SCHEMA,
    KINDS,
    REASONS,
    TRACE_SCHEMA,
    Answer,
    Caps,
    Evidence,
    Sampling,
    Step,
    Trace,
    TraceError,
    dump,
    first_problem,
    parse,
    prompt_sha256,
    to_fields,
)
from student_trainer.data.trace_spans import find_span
from student_trainer.traces.answers import majority_answer, normalize_answer
from student_trainer.traces.arithmetic import false_equation
from student_trainer.traces.questions import Question
from student_trainer.traces.styles.fitting import caps_as_bounds
from student_trainer.traces.styles.json_text import grammar_schema
from student_trainer.traces.verify import verify

PROMPT = "Fünf Äpfel 🍎 und\r\n七個梨: 5 + 7 = ? Fünf!"
QUESTION = Question((Turn("user", PROMPT),), "12", "test:1")
# Anything a prompt may hold: CJK, emoji with joiners, combining marks, Hangul jamo, line ends.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
TRICKY = st.lists(
    st.sampled_from(["a", "e\u0301", "é", "中", "文", "👩\u200d👩\u200d👧", "\r\n", "\n", " ", "\u3000", "각", "\u1100\u1161\u11a8"]),
    max_size=12,
).map("".join)  # fmt: skip


def span(prompt, text):
    start = prompt.encode().index(text.encode())
    return start, start + len(text.encode())


def draft(**changes):
    evidence = [
        {"id": i, "start": span(PROMPT, text)[0], "end": span(PROMPT, text)[1], "text": text}
        for i, text in enumerate(("Fünf Äpfel 🍎", "七個梨"))
    ]
    steps = [
        {"id": 1, "kind": "extract", "text": "five apples", "evidence": [0], "depends_on": []},
        {"id": 2, "kind": "extract", "text": "seven pears", "evidence": [1], "depends_on": []},
        {"id": 3, "kind": "compute", "text": "5 + 7 = 12", "evidence": [], "depends_on": [1, 2]},
    ]
    return {"evidence": evidence, "steps": steps, "answer": {"text": "12"}} | changes


def edited(part, index, **changes):
    items = draft()[part]
    items[index] |= changes
    return draft(**{part: items})


def judged(fields, **options):
    return verify(json.dumps(fields, ensure_ascii=False), PROMPT, **{"gold": "12", **options})


def test_a_right_trace_is_accepted_and_completed():
    verdict = judged(draft())
    assert verdict.accepted and not (verdict.repaired or verdict.dropped)
    trace = verdict.trace
    assert trace.prompt_sha256 == prompt_sha256(PROMPT) and trace.answer.normalized == "12"
    assert parse(dump(trace)) == trace
    jsonschema.Draft202012Validator(TRACE_SCHEMA).validate(json.loads(dump(trace)))
    jsonschema.Draft202012Validator(grammar_schema(caps_as_bounds("offsets", [QUESTION], Caps()))).validate(draft())
    assert [quote.text for quote in trace.evidence_of(trace.steps[0])] == ["Fünf Äpfel 🍎"]
    assert verify(f"```json\n{json.dumps(draft())}\n```", PROMPT, gold="12").trace == trace


FAULTS = {
    "wrong answer": (draft(answer={"text": "13"}), "wrong_answer"),
    "invented evidence": (
        draft(evidence=[q | {"text": "six plums"} for q in draft()["evidence"]]), "invented_evidence"),
    "evidence that no step uses": (
        draft(evidence=[q | {"text": "six plums"} for q in draft()["evidence"]],
              steps=[s | {"evidence": []} for s in draft()["steps"]]), "invented_evidence"),
    "cycle": (edited("steps", 0, depends_on=[3]), "cyclic_dependency"),
    "self": (edited("steps", 0, depends_on=[1]), "cyclic_dependency"),
    "forward": (draft(steps=[draft()["steps"][0] | {"depends_on": [2]}, draft()["steps"][1]]), "bad_reference"),
    "unknown step": (edited("steps", 2, depends_on=[9]), "bad_reference"),
    "falling ids": (draft(steps=[s | {"depends_on": []} for s in reversed(draft()["steps"])]), "bad_reference"),
    "same step twice": (draft(steps=[draft()["steps"][0]] * 2), "bad_reference"),
    "same evidence twice": (draft(evidence=[draft()["evidence"][0]] * 2), "bad_reference"),
    "false arithmetic": (edited("steps", 2, text="5 + 7 = 13"), "wrong_arithmetic"),
    "long step": (edited("steps", 0, text="x" * 2000), "too_long"),
    "long answer": (draft(answer={"text": "1" * 2000}), "wrong_answer"),
    "many steps": (draft(steps=[draft()["steps"][0] | {"id": i} for i in range(99)]), "too_long"),
    "no steps": (draft(steps=[]), "schema"),
    "unknown key": (draft(thought="hm"), "schema"),
    "missing key": ({k: v for k, v in draft().items() if k != "answer"}, "schema"),
    "unknown kind": (edited("steps", 0, kind="guess"), "schema"),
    "bool as a number": (edited("steps", 0, id=True), "schema"),
    "negative offset": (edited("evidence", 0, start=-1), "schema"),
    "empty answer": (draft(answer={"text": ""}), "schema"),
    "other prompt": (draft(prompt_sha256="0" * 64), "wrong_prompt"),
    "NUL": (edited("steps", 0, text="a\0b"), "nul"),
    "half a pair": (draft(answer={"text": "\ud83c"}), "broken_json"),
}  # fmt: skip
TEXT_FAULTS = {
    "cut off": (json.dumps(draft())[:-3], "broken_json"),
    "two values": (json.dumps(draft()) * 2, "broken_json"),
    "no JSON": ("The answer is 12.", "broken_json"),
    "NaN": (json.dumps(draft()).replace('"12"', "NaN"), "broken_json"),
    "key twice": ('{"answer":{"text":"12"},"answer":{"text":"12"}}', "broken_json"),
    "deep": ("[" * 100_000, "broken_json"),
    "endless number": ("9" * 10_000, "broken_json"),
    "raw NUL": (json.dumps(draft()) + "\0", "nul"),
    "huge": (" " * (1 << 21), "too_long"),
    "empty": ("", "broken_json"),
    "list": ("[]", "schema"),
}


@pytest.mark.parametrize(("fields", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_rejected_with_its_reason(fields, reason):
    verdict = verify(json.dumps(fields), PROMPT, gold="12", caps=Caps(answer_bytes=1000))
    assert (verdict.reason, verdict.trace) == (reason, None), verdict
    assert verdict.detail and reason in REASONS


@pytest.mark.parametrize(("text", "reason"), TEXT_FAULTS.values(), ids=TEXT_FAULTS)
def test_a_broken_text_is_rejected_with_its_reason(text, reason):
    assert verify(text, PROMPT).reason == reason


def test_caps_majority_and_the_end_decide_too():
    assert judged(draft(), caps=Caps(answer_bytes=1)).reason == "too_long"
    assert judged(draft(), caps=Caps(evidence_bytes=9)).reason == "too_long"
    assert judged(draft(), caps=Caps(evidence=1)).reason == "too_long"
    assert judged(draft(), finished=False).reason == "unfinished"
    assert judged(draft(), gold=None, majority="13").reason == "minority_answer"
    assert judged(draft(), gold=None, majority="12").accepted
    assert judged(draft(), gold=" 12.0. ").accepted


def test_one_lost_quote_of_two_is_left_out_and_counted():
    verdict = judged(edited("evidence", 1, text="six plums"))
    assert verdict.accepted and verdict.dropped == 1 and not verdict.repaired
    assert [step.evidence for step in verdict.trace.steps] == [(0,), (), ()]


@pytest.mark.parametrize(
    ("start", "expected"), [(0, "Fünf"), (3, "Fünf"), (40, "!"), (10**9, "!")], ids=["right", "near", "far", "absurd"]
)
def test_of_several_places_the_nearest_is_taken(start, expected):
    first, end = find_span(PROMPT, "Fünf", start, start + 5)
    assert PROMPT.encode()[first:end].decode() == "Fünf"
    assert (PROMPT.encode()[end:] == b"!") == (expected == "!")


@pytest.mark.parametrize(
    ("prompt", "text", "found"),
    [
        ("a\r\nb", "a\nb", "a\r\nb"),
        ("naïve  text", "nai\u0308ve text", "naïve  text"),
        ("x nai\u0308ve", "naïve", "nai\u0308ve"),
        ("\u1100\u1161\u11a8 b", "각", "\u1100\u1161\u11a8"),
        ("각", "\u1100\u1161\u11a8", "각"),
        ("中\u3000文", "中 文", "中\u3000文"),
        ("e\u0301", "e", None),  # not half of a character
        ("👩\u200d👧", "👧", "👧"),
        ("abc", " ", None),
        ("a  q\u0301", "a q", None),  # would end inside a character
        ("abc", "abd", None),
    ],
)
def test_folding_finds_whole_characters_or_nothing(prompt, text, found):
    where = find_span(prompt, text, 0, 0)
    if text == "e":  # exact bytes do stand there: an exact quote is a quote
        found = "e"
    assert (where and prompt.encode()[slice(*where)].decode()) == found


@given(TRICKY, TRICKY, TRICKY, st.integers(-5, 80), st.integers(-5, 80))
def test_a_quote_is_always_found_and_exact(before, quote, after, start, end):
    prompt = before + quote + after
    if quote:
        found = prompt.encode()[slice(*find_span(prompt, quote, start, end))]
        assert found.decode() == quote


@given(TRICKY, TRICKY, TRICKY)
def test_a_folded_quote_is_found_in_whole_pieces(before, quote, after):
    prompt = before + quote + after
    folded = " ".join(unicodedata.normalize("NFC", quote).split())
    where = find_span(prompt, folded, 0, 0) if folded else None
    if where is not None:
        assert " ".join(unicodedata.normalize("NFC", prompt.encode()[slice(*where)].decode()).split()) == folded
    elif folded:  # only where the quote's border lies inside a piece of the prompt
        assert unicodedata.normalize("NFC", prompt) != "".join(
            unicodedata.normalize("NFC", p) for p in (before, quote, after)
        )


IDS = st.integers(0, 10**6)
TRACES = st.builds(
    Trace,
    steps=st.lists(
        st.builds(
            Step, IDS, st.sampled_from(KINDS), TEXT.filter(bool), st.lists(IDS, max_size=3).map(tuple),
            st.lists(IDS, max_size=3).map(tuple), st.floats(0, 1),
        ), min_size=1, max_size=4,
    ).map(tuple),
    evidence=st.lists(st.builds(Evidence, IDS, IDS, IDS, TEXT.filter(bool)), max_size=3).map(tuple),
    answer=st.builds(Answer, TEXT.filter(bool), TEXT.filter(bool), st.floats(0, 1)),
    prompt_sha256=TEXT.map(prompt_sha256),
    teacher_id=TEXT,
    teacher_revision=TEXT,
    sampling=st.builds(Sampling, st.integers(1, 64), st.integers(1, 64), st.floats(0, 4), st.integers(0, 2**63)),
)  # fmt: skip


@given(TRACES)
@settings(deadline=None)
def test_what_is_written_is_read_back(trace):
    text = dump(trace)
    assert parse(text) == trace
    jsonschema.Draft202012Validator(TRACE_SCHEMA).validate(json.loads(text))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLACES = st.sampled_from(
    [("steps",), ("steps", 0), ("steps", 0, "kind"), ("steps", 0, "evidence"), ("steps", 0, "id"), ("evidence",),
     ("evidence", 0, "start"), ("answer",), ("answer", "text"), ("sampling",), ("prompt_sha256",), ("extra",)]
)  # fmt: skip


@given(PLACES, JSON)
@settings(deadline=None)
def test_our_validator_agrees_with_jsonschema(place, value):
    fields = json.loads(json.dumps(to_fields(judged(draft()).trace)))
    node = fields
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    for schema in (TRACE_SCHEMA, DRAFT_SCHEMA):
        expected = jsonschema.Draft202012Validator(schema).is_valid(fields)
        assert (first_problem(fields, schema) == "") == expected


@pytest.mark.parametrize("place", [("evidence", 0, "start"), ("steps", 0, "id"), ("sampling", "seed")])
def test_ours_is_the_stricter_where_jsonschema_takes_a_float_for_an_integer(place):
    """Why it is not jsonschema itself: 3.0 is an integer there, and here an offset to cut bytes at."""
    fields = to_fields(judged(draft()).trace)
    node = fields
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = float(node[place[-1]])
    assert jsonschema.Draft202012Validator(TRACE_SCHEMA).is_valid(fields)
    assert "must be of type integer, not float" in first_problem(fields, TRACE_SCHEMA)


@given(st.text(max_size=200) | JSON.map(json.dumps))
def test_no_text_gets_past_without_a_verdict(text):
    verdict = verify(text, PROMPT)
    assert not verdict.accepted and verdict.reason in REASONS


def test_parse_refuses_what_is_not_stored_form():
    with pytest.raises(TraceError, match="lacks trace_version"):
        parse(json.dumps(draft()))


@pytest.mark.parametrize(
    ("text", "normal"),
    [("  Paris. ", "paris"), ("1,234.50", "1234.5"), ("-0.0", "0"), ("+007", "7"), ("Cafe\u0301", "café"), (".", "."),
     ("a\r\n b", "a b"), ("1e9", "1e9"), ("12.", "12"), ("1,23", "1,23")],
)  # fmt: skip
def test_answers_in_one_spelling(text, normal):
    assert normalize_answer(text) == normal
    assert normalize_answer(normal) == normal


def test_a_majority_needs_a_winner():
    assert majority_answer([]) is None
    assert majority_answer(["a", "b"]) is None
    assert majority_answer(["a", "b", "a"]) == ("a", 2)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("4+7=11", ""), ("4+7=12", "4+7=12"), ("so 12 * (3 + 4) = 40", "12 * (3 + 4) = 40"), ("1/3 = 0.33", ""),
        ("1/3=0.34", "1/3=0.34"), ("2x + 3 = 7", ""), ("half of 20 + 4 = 12", ""), ("1,234 + 1 = 1235", ""),
        ("7 × 8 − 1 = 55", ""), ("a: 1+1=3", "1+1=3"), ("1/0=3", ""), ("(" * 5000 + "1+1=3", ""), ("3 - -5 = 8", ""),
        ("then 9 = 8", ""), ("2+2 = 5%", ""), ("1+1=2=3-0=4", "3-0=4"), ("1 4+7 = 12", ""),
    ],
)  # fmt: skip
def test_equations_are_evaluated_again(text, found):
    assert false_equation(text) == found


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from("+-*"), st.integers(-2, 2))
def test_true_equations_pass_and_false_ones_do_not(a, b, operator, off):
    value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    assert bool(false_equation(f"So {a} {operator} {b} = {value + off}")) == (off != 0)
