"""Kind 25: right traces that were rejected. What is certainly equal is accepted, all else stays rejected."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from student_trainer.traces.answers import majority_answer, normalize_answer, same_answer
from student_trainer.traces.arithmetic import false_equation
from student_trainer.traces.verify import verify

EQUAL = [
    ("-3", "−3"), ("-3", "–3".replace("–", "\u2011")), ("-3", "－３"), ("1234", r"\boxed{1234}"), ("1234", r"The answer is \boxed{1{,}234}."),
    ("1234", "1,234"), ("1234", "1\u202f234"), ("1234", "1\u00a0234"), ("1234", "1'234"), ("1234", "1_234"), ("1234567", "1.234.567"), ("1234", r"1\,234"),
    ("1/2", "0.5"), ("1/2", r"\frac{1}{2}"), ("1/2", r"\dfrac12"), ("1/2", "½"), ("1/2", "2/4"), ("1.5", "1 1/2"), ("1.5", "1½"), ("-1/3", r"-\frac{1}{3}"),
    ("2 1/2", r"2\frac{1}{2}"), ("0.5", ".5"), ("3", "3.0"), ("3", "3."), ("3", "+3"),
    ("50%", "50 %"), ("50%", "50 percent"), ("50%", r"50\%"), ("50%", "0.5"), ("50", "50%"), ("1.5", "150%"),
    ("18", "$18"), ("18", "18 dollars"), ("18", r"\$18.00"), ("$18", "18 dollars"), ("$1,234.50", "1234.5"), ("-5", "-$5"), ("€5", "5 euros"),
    ("18", "18 eggs"), ("18 eggs", "18"), ("5 km", "5km"), ("5 km", "5.0 km"), ("1 egg", "1 eggs"), ("9 km/h", "9"), ("90°", "90 degrees"), ("90", r"90^\circ"),
    ("25 cm²", "25 cm^2"), ("25", "25 square meters"), ("7 m", "7"),
    ("4", "x = 4"), ("x=4", "x = 4"), ("4", "**4**"), ("4", "`4`"), ("4", "$4$"), ("4", r"\(4\)"), ("4", r"$x = 4$"), ("4", "**x = 4.**"), ("4", "$\\boxed{4}$"),
    ("3.14", "≈ 3.14"), ("3.14", "approximately 3.14"), ("Paris", "paris."), ("Paris", "**Paris**"), ("Paris", '"Paris"'), ("Paris", r"\text{Paris}"),
    ("Paris", "The answer is Paris."), ("Paris", "Final answer: Paris"), ("B", "(B)"), ("x^2", "x²"), ("10^2", "10²"), ("café", "cafe\u0301"), ("12", "１２"),
    ("x^2", "x^{2}"), ("1/2 kg", "0.5 kg"), ("a b", "a\u00a0b"), ("2π", r"2\pi"),
]  # fmt: skip
DIFFERENT = [
    ("3", "-3"), ("3", "−3"), ("1234", "1.234"), ("1234", "12 34"), ("1,23", "123"), ("1234", r"\boxed{1235}"), ("5", r"\boxed{5} or \boxed{6}"),
    ("1/2", "0.51"), ("1/3", "0.33"), ("1/2", "2"), ("1/2", "1:2"), ("0.5", "0.5%"), ("0.5", "5%"), ("50%", "5"), ("1", "1%"), ("50%", "50 km"),
    ("5 km", "5 m"), ("5 km", "5000 m"), ("$5", "€5"), ("$5", "5 euros"), ("5", "5 million"), ("5", "5 dozen"), ("5", "5 hundred eggs"), ("5", "5x"), ("5", "5 x"), ("5", "5e"), ("5", "5π"),
    ("5", "5k"), ("5", "5 or 6"), ("5", "5 below zero"), ("5", "5!"), ("5", "5²"), ("5", "5^2"), ("4", "x = 5"), ("y = 4", "x = 4"), ("4", "x > 4"), ("4", "x = 4 or 5"), ("4", "2x = 4"),
    ("4", "f(x) = 4"), ("17", "7"), ("17", "1"), ("3 remainder 2", "3"), ("3 r 2", "3"), ("3 less", "3"), ("10", "1e1"), ("3", "three"), ("Paris", "London"), ("Paris", "Paris, Texas"), ("B", "A"),
    ("12:30", "12"), ("2024-01-02", "2024"), ("1/0", "1"), ("", "0"), ("3", "3/1/2"), ("100", "10^2"), ("2 1/2", "21/2"), ("½", "12"), ("1½", "11/2"), ("0", "ₒ"), ("5", "٥ or so"), ("5 feet", "5 feet 3"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_what_is_certainly_equal(gold, answer):
    assert same_answer(gold, answer) and same_answer(answer, gold)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_what_is_not(gold, answer):
    assert not same_answer(gold, answer) and not same_answer(answer, gold)


@given(st.text(max_size=40) | st.sampled_from([text for pair in EQUAL + DIFFERENT for text in pair]))
@example("\\boxed{")
@example("\\frac{1}{2")
@example("½" * 10)
@example("**")
@example("x = x = 4")
@example("9" * 500)
@example("²½")
@example("1 2 /3½")
def test_a_normal_form_is_its_own(text):
    normal = normalize_answer(text)
    assert normalize_answer(normal) == normal and (normal or not text) and same_answer(text, normal)


@given(
    st.integers(-(10**9), 10**9),
    st.integers(-(10**9), 10**9),
    st.sampled_from(["{}", "${}$", r"\boxed{{{}}}", "{} eggs", "x = {}", "{:,}", "**{}**", "{}.0"]),
)
def test_numbers_are_equal_when_they_are(one, other, form):
    assert same_answer(str(one), form.format(other)) == (one == other)


def test_long_answers_are_prose():
    prose = "the cat sat on the mat " * 100
    assert same_answer(prose, prose.upper()) and not same_answer(prose, prose + "4")
    assert not same_answer("1" * 50_000, "1" * 50_001), "and cost no time"


def test_a_majority_counts_what_is_the_same():
    assert majority_answer(["18", "18 $", "17", "18 eggs"]) == ("18", 3)
    assert majority_answer(["18 $", "18 €"]) is None
    assert majority_answer(["18 $", "18 €", "18"]) == ("18", 3)
    assert majority_answer(["1", "2", "2", "1"]) is None


TRUE = ["17 / 5 = 3 remainder 2", "17 ÷ 5 = 3 R2", "17/5 = 3 r 2", "17 / 5 = 3, remainder 2", "17 / 5 = 3 with a remainder of 2", "(10 + 7) / 5 = 3 remainder 2",
        "17 / 5 = 3 and remainder 2", "17 / 5 = 3 (remainder 2)", "17 / 5 = 3 with 2 left over", "17 / 5 = 3 rounded down", "17 / 5 = 3 (integer division)",
        "7 / 2 = 3 1/2", "7 - 9 = −2", "5000 + 5000 = 10 000", "500 + 500 = 1.000", "1/3 = 0.33", "17 / 5 = 3.4", "0 - 7/2 = -3 1/2", "4 * 3 = 12 apples"]  # fmt: skip
FALSE = ["17 / 5 = 3 remainder 3", "17 / 5 = 4 remainder 2", "17 / 5 = 2 remainder 7", "17 / 5 = 3", "7 / 2 = 3 1/3", "7 - 9 = −3", "500 + 501 = 1.000", "17 / 5 = 3 R3",
         "1+1 = 3 apples", "4 * 3 = 13. The remainder is 2", "2 + 2 = 5"]  # fmt: skip


@pytest.mark.parametrize("text", TRUE)
def test_right_arithmetic_is_not_called_wrong(text):
    assert false_equation(text) == ""
    assert false_equation(f"So {text}.") == ""


@pytest.mark.parametrize("text", FALSE)
def test_wrong_arithmetic_is(text):
    assert false_equation(text) != ""


def trace(step, answer):
    fields = {
        "evidence": [],
        "steps": [{"id": 1, "kind": "compute", "text": step, "evidence": [], "depends_on": []}],
        "answer": {"text": answer},
    }
    return json.dumps(fields, ensure_ascii=False)


@pytest.mark.parametrize(
    ("step", "answer", "gold", "reason"),
    [
        ("17 / 5 = 3 remainder 2", "3", "3", None),
        ("4 - 7 = -3", "-3", "−3", None),
        ("4 - 7 = −3", "−3", "-3", None),
        ("1230 + 4 = 1234", r"\boxed{1234}", "1234", None),
        ("1230 + 4 = 1234", "1,234", r"\boxed{1234}", None),
        ("17 / 5 = 3 remainder 1", "3", "3", "wrong_arithmetic"),
        ("4 - 7 = -3", "3", "−3", "wrong_answer"),
        ("1230 + 4 = 1234", r"\boxed{1243}", "1234", "wrong_answer"),
    ],
)
def test_the_cases_themselves(step, answer, gold, reason):
    assert verify(trace(step, answer), "a prompt", gold=gold).reason == reason
    majority = normalize_answer(gold)
    expected = "minority_answer" if reason == "wrong_answer" else reason
    assert verify(trace(step, answer), "a prompt", majority=majority).reason == expected
