"""Styles of drafts: bounds fit their budget and the grammar holds them; free text is read or refused, whatever it is."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from student_trainer.config.files import parse_as
from student_trainer.config.traces import EXAMPLES, TagsConfig, TracesConfig
from student_trainer.data.rows.formats import Turn
from student_trainer.data.trace_schema import UNCLAIMED, Caps, TraceError
from student_trainer.errors import ConfigError
from student_trainer.traces.questions import Question
from student_trainer.traces.styles.draft import Reading
from student_trainer.traces.styles.fitting import caps_as_bounds, fit_bounds, too_long_answers
from student_trainer.traces.styles.free_text import stated_part
from student_trainer.traces.styles.json_text import grammar_schema, longest_document
from student_trainer.traces.styles.reading import read_draft
from student_trainer.traces.verify import verify
from teacher_wire.generate.schemas import check_schema

PROMPT = "Tom has 7 apples and buys 5 more. How many apples does Tom have now?"
QUESTIONS = [
    Question((Turn("user", PROMPT),), "12", "q:1"),
    Question((Turn("user", "What is 83 + 77?"),), "160", "q:2"),
]
STYLES = ["quotes", "steps", "offsets"]
FREE = Reading("free")


@pytest.fixture(scope="module")
def tokenizer(model_factory):
    return AutoTokenizer.from_pretrained(model_factory("qwen2"))


def compact(fields):
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


# ---------------------------------------------------------------- bounds and grammar


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("budget", [400, 1024, 4096])
def test_documents_within_the_bounds_fit_the_budget(tokenizer, style, budget):
    """The longest one, and random ones made of words of the questions; the tokenizer counts."""
    bounds = fit_bounds(style, budget, tokenizer, QUESTIONS, Caps())
    assert bounds.needed_tokens <= budget
    draw, words = random.Random(budget), " ".join(question.prompt for question in QUESTIONS).split()
    for _ in range(10):
        filling = " ".join(draw.choices(words, k=40)) + " "
        text = compact(longest_document(bounds, filling))
        assert len(tokenizer(text)["input_ids"]) + 1 <= budget
    longer = budget - bounds.needed_tokens
    assert longer < 0.35 * budget, "no more is left over than a further step would take"


def test_more_tokens_give_more_room_and_caps_are_kept(tokenizer):
    sizes = []
    for budget in (200, 400, 800, 1600, 6400):
        bounds = fit_bounds("quotes", budget, tokenizer, QUESTIONS, Caps(steps=5, step_bytes=300, evidence_bytes=40))
        assert bounds.steps <= 5 and bounds.step_chars <= 300 and bounds.quote_chars <= 40
        sizes.append(bounds.steps * bounds.step_chars)
    assert sizes == sorted(sizes) and sizes[-1] == 5 * 300
    with pytest.raises(ConfigError, match=r"sampling\.max_new_tokens=30 is too few .* raise it, or choose style=free"):
        fit_bounds("quotes", 30, tokenizer, QUESTIONS, Caps())


def test_known_answers_have_room(tokenizer):
    long = Question((Turn("user", PROMPT),), "a long answer " * 5, "q:3")
    bounds = fit_bounds("steps", 1024, tokenizer, [*QUESTIONS, long], Caps())
    assert bounds.answer_chars >= len(long.gold) and too_long_answers([long], bounds) == 0
    short = fit_bounds("steps", 100, tokenizer, [*QUESTIONS, long], Caps())
    assert short.answer_chars < len(long.gold) and too_long_answers([*QUESTIONS, long], short) == 1


def changed(fields, style):
    """The longest document, made longer in one place each."""

    def copy():
        return json.loads(json.dumps(fields))

    more = copy()
    more["steps"].append(more["steps"][0])
    yield "steps", more
    more = copy()
    if style == "offsets":
        more["answer"]["text"] += "x"
    else:
        more["answer"] += "x"
    yield "answer", more
    more = copy()
    if style == "steps":
        more["steps"][0] += "x"
    else:
        more["steps"][0]["text"] += "x"
    yield "text of a step", more
    if style == "quotes":
        more = copy()
        more["steps"][0]["quotes"].append("x")
        yield "quotes", more
        more = copy()
        more["steps"][0]["quotes"][0] += "x"
        yield "text of a quote", more
    if style == "offsets":
        for name in ("start", "end", "id"):
            more = copy()
            more["evidence"][0][name] += 1
            yield name, more
        more = copy()
        more["evidence"].append(more["evidence"][0])
        yield "evidence", more
        more = copy()
        more["steps"][0]["depends_on"].append(0)
        yield "depends_on", more


@pytest.mark.parametrize("style", STYLES)
def test_the_grammar_admits_the_longest_document_and_nothing_longer(tokenizer, style):
    pytest.importorskip("xgrammar")
    from teacher_server.backends.grammar import Grammars

    bounds = fit_bounds(style, 600, tokenizer, QUESTIONS, Caps())
    schema = json.dumps(grammar_schema(bounds))
    check_schema(schema, 65_536)
    grammars = Grammars(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))

    def admits(text):
        matcher = grammars._matcher(grammars.compile(schema), terminate_without_stop_token=True)
        return matcher.accept_string(text) and matcher.is_terminated()

    longest = longest_document(bounds, "seven pears ")
    assert admits(compact(longest))
    assert not admits(json.dumps(longest)), "white space"
    for place, longer in changed(longest, style):
        assert not admits(compact(longer)), place
    assert read_draft(compact(longest), Reading(style)).trace.steps
    example = [one.reply for one in EXAMPLES[style]]
    wide = json.dumps(grammar_schema(caps_as_bounds(style, QUESTIONS, Caps())))
    matcher = grammars._matcher(grammars.compile(wide), terminate_without_stop_token=True)
    assert matcher.accept_string(example[0]), "the example is what the grammar admits"


@pytest.mark.parametrize("style", STYLES)
def test_a_walk_under_the_grammar_ends_within_the_budget(tokenizer, style):
    """A teacher that writes ASCII at random, one token after another of those that the grammar leaves, comes to its end in time."""
    xgrammar = pytest.importorskip("xgrammar")
    from teacher_server.backends.grammar import Grammars, unpack

    budget = 500
    bounds = fit_bounds(style, budget, tokenizer, QUESTIONS, Caps())
    grammars = Grammars(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
    plain = [all(32 <= ord(c) < 127 for c in tokenizer.decode([i])) for i in range(len(tokenizer))]
    for seed in range(3):
        follower = grammars.follow(json.dumps(grammar_schema(bounds)), frozenset())
        draw, ids, ended = random.Random(seed), [], False
        bits = xgrammar.allocate_token_bitmask(1, len(tokenizer))
        while not ended:
            follower.fill(bits, 0)
            allowed = [i for i in unpack(bits, len(tokenizer))[0].nonzero()[:, 0].tolist() if plain[i]]
            quotes = [i for i in allowed if tokenizer.decode([i]) == '"']
            longest = [i for i in allowed if i not in quotes] or quotes  # never ends a string by itself
            ids.append(draw.choice(longest))
            ended = follower.accept(ids[-1])
            assert len(ids) <= budget
        json.loads(tokenizer.decode(ids))


def test_examples_are_accepted_by_our_own_rules():
    for style, shown in EXAMPLES.items():
        for one in shown:
            gold = "13" if "6 more" in one.prompt else "pink" if "Nora" in one.prompt else "7"
            verdict = verify(one.reply, one.prompt, gold=gold, reading=Reading(style))
            assert verdict.accepted and not verdict.dropped and not verdict.repaired, (style, verdict)


# ---------------------------------------------------------------- short forms


def short(*steps, answer="12"):
    return compact({"steps": [{"text": text, "quotes": quotes} for text, *quotes in steps], "answer": answer})


def test_quotes_get_their_offsets_from_us():
    text = short(("Tom has 7.", "7 apples"), ("7 + 5 = 12", "buys 5 more", "apples"))
    verdict = verify(text, PROMPT, gold="12", reading=Reading("quotes"))
    assert verdict.accepted and verdict.repaired == 0
    found = {quote.text: (quote.start, quote.end) for quote in verdict.trace.evidence}
    assert found == {"7 apples": (8, 16), "buys 5 more": (21, 32), "apples": (10, 16)}, "the first of several places"
    assert [step.kind for step in verdict.trace.steps] == ["extract", "compute"]
    assert [step.evidence for step in verdict.trace.steps] == [(0,), (1, 2)]
    for step, (start, end) in zip(verdict.trace.steps, verdict.draft.step_places, strict=True):
        assert json.loads(text[start:end]) == step.text
    assert UNCLAIMED not in [quote.start for quote in verdict.trace.evidence]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (short(("Tom has plums.", "plums"), answer="12"), "invented_evidence"),
        (short(("7 + 5 = 13", "7 apples")), "wrong_arithmetic"),
        (short(("7 + 5 = 12",), answer="13"), "wrong_answer"),
        (short(answer="12"), "schema"),
        (compact({"steps": ["", "a"], "answer": "12"}), "schema"),
        (compact({"steps": [" "], "answer": "12"}), "schema"),
        (compact({"steps": ["a", {"text": "b"}], "answer": "12"}), "schema"),
        (compact({"steps": ["so 7 + 5 = 13"], "answer": "12"}), "wrong_arithmetic"),
        (compact({"steps": "a", "answer": "12"}), "schema"),
        (compact({"answer": "12"}), "schema"),
        (compact({"steps": ["a"] * 33, "answer": "12"}), "too_long"),
    ],
)
def test_short_forms_are_held_to_the_same_rules(text, reason):
    assert verify(text, PROMPT, gold="12").reason == reason


def test_a_text_that_fills_its_bound_was_cut_there():
    bounds = caps_as_bounds("steps", QUESTIONS, Caps(step_bytes=12, answer_bytes=4))

    def judged(step, answer="12"):
        return verify(compact({"steps": [step], "answer": answer}), PROMPT, gold="12", bounds=bounds)

    assert judged("Tom has seve").reason == "cut_text"
    assert judged("Tom has all.").accepted and judged("Tom has 7").accepted
    assert judged("Tom has 7", "12.0").reason == "cut_text"
    assert verify(compact({"steps": ["Tom has seve"], "answer": "12"}), PROMPT, gold="12").accepted, (
        "no grammar, no cut"
    )


# ---------------------------------------------------------------- free text


@pytest.mark.parametrize(
    ("text", "steps", "answer"),
    [
        ("<think>\nTom has 7.\n7 + 5 = 12\n</think>\n12", ["Tom has 7.", "7 + 5 = 12"], "12"),
        ("Tom has 7.\n7 + 5 = 12\n</think>\n\nAnswer: 12", ["Tom has 7.", "7 + 5 = 12"], "12"),
        ("1. Tom has 7.\n2) 7 + 5 = 12\n\nAnswer: 12", ["Tom has 7.", "7 + 5 = 12"], "12"),
        ("- Tom has 7.\n**Final answer:** 12 apples\nGood luck!", ["Tom has 7."], "12 apples"),
        ("Step 1: Tom has 7.\n**Answer: 12**", ["Tom has 7."], "12"),
        ("Tom has 7.\nSo the answer is 12.", ["Tom has 7."], "12."),
        ("Tom has 7.\nAnswer:\n12", ["Tom has 7."], "12"),
        ("Tom has 7.\n#### 12", ["Tom has 7."], "12"),
        ("Tom has 7.\n<answer>12</answer>", ["Tom has 7."], "12"),
        ("<think>The answer is 13? No.</think>\nThus:\n\\boxed{12}", ["The answer is 13? No."], "\\boxed{12}"),
        ("Tom has 7.\nAnswer: 12\nSo the answer is 12.0", ["Tom has 7."], "12.0"),
        ("\r\nTom has 7.\r\n---\r\nAnswer: \\boxed{\\frac{24}{2}}\r\n", ["Tom has 7."], "\\boxed{\\frac{24}{2}}"),
    ],
)
def test_free_text_is_steps_and_an_answer(text, steps, answer):
    draft = read_draft(text, FREE)
    assert [step.text for step in draft.trace.steps] == steps and draft.trace.answer.text == answer
    assert [text[a:b] for a, b in draft.step_places] == steps and text[slice(*draft.answer_place)] == answer
    assert verify(text, PROMPT, gold="12", reading=FREE).accepted


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no_answer"),
        ("12", "no_answer"),
        ("<think>7 + 5 = 12", "broken_form"),
        ("<think>a<think>b</think>c</think>\n12", "broken_form"),
        ("<think>a</think><think>b</think>\n12", "broken_form"),
        ("</think>a<think>\n12", "broken_form"),
        ("Sure! <think>a</think>\n12", "broken_form"),
        ("<think>\n \n</think>\n12", "broken_form"),
        ("Answer: 12", "broken_form"),
        ("<think>a</think>", "no_answer"),
        ("<think>Answer: 12</think>\n", "no_answer"),
        ("<think>a</think>\nI think\nit is 12", "no_answer"),
        ("a\nAnswer: 12\nWait.\nAnswer: 13", "no_answer"),
        ("a\nAnswer: 12 or \\boxed{13}", "wrong_answer"),
        ("a\n\\boxed{12", "no_answer"),
        ("a\n" + "Answer: 12\n" * 65, "no_answer"),
        ("a\nAnswer: \nAnswer:", "no_answer"),
        ("a\0\nAnswer: 12", "nul"),
        ("a\n<|im_start|>user\nAnswer: 12", "broken_form"),
        ("a\n" * 33 + "Answer: 12", "too_long"),
        ("a" * 1025 + "\nAnswer: 12", "too_long"),
        ("so 7 + 5 = 13\nAnswer: 12", "wrong_arithmetic"),
        ('Tom has "8 plums".\nAnswer: 12', "invented_evidence"),
        ('Tom has 7. [ev: "8 plums"]\nAnswer: 12', "invented_evidence"),
        ("a\nAnswer: 13", "wrong_answer"),
    ],
)
def test_free_text_that_leaves_something_open_is_refused(text, reason):
    reading = Reading("free", control=("<|im_start|>", "<|im_end|>"))
    assert verify(text, PROMPT, gold="12", reading=reading).reason == reason


STATED = "3 and 4 are 7.\n7 and 5 are 12.\nAnswer: 12\n"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (STATED + "Now let us look at it in another way: 3 and", "12"),
        (STATED + "Answer: 12\nAnswer: 1", "12"),  # its last line is not whole
        ("<think>3 and 4 are 7.</think>\nAnswer: 7\nAnd so", "7"),
        ("<think>3 and 4 are 7.</think>\n7\nAnd so", None),  # as well "Let me sum up:"
        ("<think>Answer: 7?\nYes.</think>\nLet me sum up:\nthe ans", None),
        ("3 and 4 are 7.\nAnswer:\n7\nThat is", "7"),
        (STATED.rstrip("\n"), None),  # 12, or 120
        ("3 and 4 are 7.\nAnswer:\n7", None),
        (STATED + "Answer: 13\nSo", None),
        ("3 and 4 are \\boxed{7}\nand 5 more", None),
        ("<think>3 and 4 are 7.\nAnswer: 7\nBut", None),
        ("3 and 4 are 7.\n" * 40, None),
    ],
)
def test_free_text_without_an_end_is_read_as_far_as_it_states_its_answer(text, answer):
    verdict = verify(text, "How much are 3, 4 and 5?", finished=False, gold=answer, reading=FREE)
    if answer is None:
        assert verdict.reason == "unfinished"
        return
    assert verdict.accepted and verdict.trace.answer.text == answer
    assert all(step.text in text[: text.rindex("\n")] for step in verdict.trace.steps)


@given(st.text(alphabet=st.sampled_from("a1 .\nAnswer: <think></think>"), max_size=120), st.integers(0, 120))
@settings(max_examples=300, deadline=None)
def test_a_part_that_is_taken_is_read_alike_whatever_follows(text, cut):
    """What has been stated is what the whole text would have been read as, had it ended there."""
    part = stated_part(text[:cut], FREE)
    if part is not None:
        assert text.startswith(part) and part.endswith("\n")
        assert read_draft(part, FREE).trace.answer.text.strip()


def test_quoted_words_of_free_text_are_evidence():
    text = 'The text says "7 apples" and “buys 5 more”.\n2. 7 + 5 = 12 [ev: "5 more", "Tom"]\nHe\'s 5" tall, not 6".\nAnswer: 12'
    trace = verify(text, PROMPT, gold="12", reading=FREE).trace
    assert [[quote.text for quote in trace.evidence_of(step)] for step in trace.steps] == [
        ["7 apples", "buys 5 more"], ["5 more", "Tom"], [],
    ]  # fmt: skip
    assert trace.steps[1].text == "7 + 5 = 12" and trace.steps[1].kind == "compute"
    assert all(PROMPT.encode()[quote.start : quote.end].decode() == quote.text for quote in trace.evidence)


def test_other_tags():
    reading = Reading("free", TagsConfig(open="[THINK]", close="[/THINK]"), control=("[THINK]", "[/THINK]"))
    assert verify("[THINK]7 + 5 = 12[/THINK]12", PROMPT, gold="12", reading=reading).accepted


HOSTILE = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "Answer:", "12", "\n", " ", '"', "“", "\\boxed{", "}", "[ev: ", "]", "####", "<answer>", "1. ",
         "**", "=", "a", "\0", "🍎", "7 apples", "\r", "\u2028", "Step 1:"]
    ),
    max_size=40,
).map("".join)  # fmt: skip


@given(HOSTILE)
@settings(deadline=None, max_examples=300)
def test_any_free_text_is_read_or_refused(text):
    try:
        draft = read_draft(text, FREE)
    except TraceError:
        return
    assert len(draft.step_places) == len(draft.trace.steps) > 0
    for step, (start, end) in zip(draft.trace.steps, draft.step_places, strict=True):
        assert text[start:end] == step.text and step.text.strip()
    assert text[slice(*draft.answer_place)] == draft.trace.answer.text
    assert max(end for _, end in draft.step_places) <= draft.answer_place[0]


@pytest.mark.parametrize(
    "piece",
    ['"', '"a', "1=", '[ev: "', "\\boxed{", "Answer: 12\n", "\n", " ", "“a", "12\n", '"a"'],
)
def test_huge_free_texts_are_read_in_no_time(piece):
    """Within pytest's time limit, that is: a pattern that walks back over a megabyte would take hours."""
    text = piece * (500_000 // len(piece)) + "\nAnswer: 12"
    verify(text, PROMPT, gold="12", reading=FREE)
    verify("<think>" + text.replace("think", "") + "</think>12", PROMPT, gold="12", reading=FREE)
    assert verify("x" * 2_000_000, PROMPT, gold="12", reading=FREE).reason == "too_long"


# ---------------------------------------------------------------- the config


def config(**sections):
    tree = {"output_dir": "out", "tokenizer": "t", "data": {"sources": ["a.jsonl"]}, "teacher": {"address": "a:1"}}
    return parse_as(TracesConfig, tree | sections, "test")


def test_settings_of_the_styles():
    assert config().held_to_schema and config().examples == EXAMPLES["quotes"]
    assert not config(style="free").held_to_schema and config(style="free").examples == ()
    own = {"sources": ["a.jsonl"], "examples": [{"prompt": "a", "reply": "b"}], "instruction": ""}
    assert [one.prompt for one in config(data=own).examples] == ["a"] and config(data=own).instruction == ""
    assert len(config(data={**own, "builtin_examples": True}).examples) == 3
    for sections, said in (
        ({"style": "free", "sampling": {"json_schema": True}}, "style free has no schema"),
        ({"tags": {"open": "[THINK]"}}, "tags are read with style free"),
        ({"style": "free", "tags": {"open": "<a>", "close": "<a>"}}, "neither may be a part"),
        ({"style": "xml"}, "style"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(**sections)
