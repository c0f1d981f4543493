"""The page of a report: its figures are the outcome's, nothing in it comes from elsewhere, and no text of a stranger is more than text."""

from __future__ import annotations

import json
import re
import statistics
from html.parser import HTMLParser

import pytest

from student_trainer.comparison.reporting import write_page
from student_trainer.errors import DataError, RunError
from student_trainer.evaluation.outcome import Budget, Outcome, RunOutcome, Sample
from student_trainer.evaluation.page import html
from student_trainer.evaluation.page.answers import read_evaluation
from student_trainer.evaluation.page.content import ANSWER_CHARS, report_of
from student_trainer.evaluation.page.html import as_html
from student_trainer.evaluation.page.markdown import as_markdown
from student_trainer.evaluation.page.text import seen
from student_trainer.evaluation.report import paired
from tests.student_trainer.evaluation.pages import EVALUATED, HOSTILE, SAMPLES, comparison, pages, run

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, and the text and value of every <data> by what it is of."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: dict[str, tuple[str, float]] = {}
        self.texts: list[str] = []
        self._open: list[str] = []
        self._data: str | None = None
        self.feed(page)
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "data":
            self._data = dict(attributes)["data-of"]
            self.figures[self._data] = ("", float(dict(attributes)["value"]))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._data = None if tag == "data" else self._data

    def handle_data(self, text):
        if "style" in self._open or "script" in self._open:
            return
        self.texts.append(text)
        if self._data is not None:
            said, value = self.figures[self._data]
            self.figures[self._data] = (said + text, value)


@pytest.fixture(scope="module")
def every():
    return pages()


def test_every_figure_of_the_page_is_the_outcomes_and_reads_as_it(tmp_path):
    outcome = comparison()
    (tmp_path / "comparison.json").write_text(outcome.model_dump_json())
    (tmp_path / "evaluation.json").write_text(json.dumps({"format": 1, "models": [m.model_dump() for m in EVALUATED]}))
    page_file, markdown_file = write_page([tmp_path], [], tmp_path / "out" / "page.html")
    figures = Page(page_file.read_text()).figures
    kept = json.loads((tmp_path / "comparison.json").read_text())
    values = {}
    for one in kept["arms"]:
        for metric, value in one["metrics"].items():
            values.setdefault((one["name"], metric), []).append(value)
    metrics = ("nll_per_byte", "kl_to_teacher", "acc1", "acc3")
    for (arm, metric), found in values.items():
        if metric in metrics:
            assert figures.pop(f"mean/{arm}/{metric}")[1] == pytest.approx(statistics.fmean(found), rel=1e-15)
            for seed, value in enumerate(found):
                text, shown = figures.pop(f"seed/{arm}/{metric}/{seed}")
                assert shown == value and float(text) == pytest.approx(value, abs=5.1e-5)
            if arm != "sft":
                text, shown = figures.pop(f"difference/{arm}/{metric}")
                assert shown == paired(found, values["sft", metric])["mean"] and float(text) == pytest.approx(
                    shown, abs=5.1e-5
                )
    for metric in metrics:
        assert figures.pop(f"teacher/teacher/{metric}")[1] == ({"kl_to_teacher": 0.0} | {m: values["sft", f"teacher_{m}"][0] for m in metrics if f"teacher_{m}" in kept["arms"][0]["metrics"]})[metric]  # fmt: skip
    for arm in ("sft", "gkd", "gkd+sft", "article", "all"):
        costs = [one["cost"] for one in kept["arms"] if arm in (one["name"], "all")]
        for name in ("train_s", "wall_s", "gpu_hours", "teacher_tokens", "disk_tokens", "label_bytes"):
            assert figures.pop(f"cost/{arm}/{name}")[1] == pytest.approx(sum(cost[name] for cost in costs), rel=1e-12)
    assert figures.pop("tasks/after/ceval-valid") == ("0.4702", 0.4702)
    left = {name.split("/")[0] + "/" + name.split("/")[-1] for name in figures}
    assert left <= {"cost/tokens_per_s", "mean/train_s", "metrics/acc1", "metrics/avg_response_len", "tasks/ceval-valid",
                    "speed/decode_tokens_per_s", "speed/peak_memory_bytes"}  # fmt: skip
    markdown = markdown_file.read_text()
    assert (
        "| gkd | " + f"{statistics.fmean(values['gkd', 'nll_per_byte']):.4f} ± " in markdown
        and "0.4702 ± 0.0131" in markdown
    )


def test_the_page_asks_nobody_and_its_policy_lets_only_its_own_script_run(every):
    for name, page in every.items():
        parsed = Page(page)
        policy = next(a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
        assert not [
            a for _, a in parsed.tags if {"src", "href", "style", "action", "data", "poster", "srcset"} & set(a)
        ], name
        assert not [key for _, a in parsed.tags for key in a if key.startswith("on")], name
        assert [tag for tag, _ in parsed.tags].count("script") == [tag for tag, _ in parsed.tags].count("style") == 1
        inner = (
            re.search(r"<script>(.*)</script>", page, re.S).group(1),
            re.search(r"<style>(.*?)</style>", page, re.S).group(1),
        )
        assert all(html._digest(text) in policy for text in inner) and not re.search(
            r"url\(|@import|https?:", " ".join(inner)
        )
        assert len(page.encode()) < 200_000, name


def test_hostile_text_is_shown_and_is_nothing_but_text(every):
    page = every["hostile"]
    assert "<script>alert" not in page and "<img" not in page and "\u202e" not in page and "49" not in Page(page).texts
    assert sum(seen(HOSTILE) in text for text in Page(page).texts) >= 3
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5 and "&lt;b&gt;name&lt;/b&gt;" in page
    assert f"{1_000_000 - ANSWER_CHARS:,} more characters are not shown" in page, "a cut is told"
    markdown = as_markdown(report_of([comparison(title="a|b <script>alert(1)</script>")], EVALUATED, SAMPLES))
    outside = re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.S | re.M)
    assert "<script>" not in outside and r"a\|b &lt;script&gt;" in outside
    tables = [line for line in outside.splitlines() if line.startswith("|")]
    assert tables and all(re.match(r"^\|( [^|]* \|)+$", line.replace(r"\|", "")) for line in tables)
    fenced = as_markdown(report_of([comparison()], [], [Sample(prompt="```\n# not a heading\n```", answers={})]))
    assert "\n````\n```\n# not a heading\n```\n````\n" in fenced


def test_states_without_figures_say_so(every):
    said = {name: " ".join(Page(page).texts) for name, page in every.items()}
    assert "No run has a held-out figure" in said["aborted"] and "No curve" in said["aborted"]
    assert "Not all runs are done" in said["aborted"] and "0 of 1 run done" in said["aborted"]
    assert "Paired difference" not in said["one-run"] and "One seed." in said["one-run"]
    assert "gkd, seed 1: failed" in said["failed"] and "1 of 2 seeds" in said["failed"] and "NaN" not in said["failed"]
    assert all("nan" not in page.lower().split("<script>")[0].replace("nano", "") for page in every.values())


def test_a_gap_in_a_log_is_a_gap_in_its_line():
    curve = [{"step": s, "loss": None if s == 30 else 1.0 / s} for s in range(10, 70, 10)]
    outcome = Outcome(
        base="a", seeds=[0], arms=[RunOutcome(name="a", seed=0, state="done", curve=curve)], budget=Budget()
    )
    page = as_html(report_of([outcome]))
    assert page.count("<polyline") == 2 and "A gap is a value that is not finite." in page


def test_many_points_and_runs_stay_small_and_what_is_too_large_is_refused(monkeypatch):
    curve = [{"step": s, "loss": 1.0 + 1.0 / s} for s in range(1, 2_001)]
    runs = [run(f"arm{i % 50}", i // 50, curve=curve if i == 0 else curve[:3]) for i in range(450)]
    report = report_of([comparison(arms=runs, seeds=list(range(9)), base="arm0")], [], SAMPLES * 40)
    page = as_html(report)
    assert len(page.encode()) < html.MOST_BYTES and "One in 9 log entries is drawn." in page
    assert "50 more runs are not shown." in page and "96 more samples" in page and "more curves are not drawn" in page
    monkeypatch.setattr(html, "MOST_BYTES", 10_000)
    with pytest.raises(DataError, match="report on fewer runs"):
        as_html(report)


def test_answers_are_read_from_evaluate_and_infer(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"format": 1, "models": [{"name": "before", "metrics": {"acc1": 0.5}}],
        "samples": [{"prompt": "p", "source": "f:1", "answers": {"before": "a"}}]}))  # fmt: skip
    models, samples = read_evaluation(tmp_path)
    assert models[0].metrics == {"acc1": 0.5} and samples[0].answers == {"before": "a"}
    rows = [
        {
            "messages": [{"role": "user", "content": "q"}],
            "answers": {"x": {"text": "1", "tokens": 1}, "y": {"text": "2"}},
        },
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "3"},
            ]
        },
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_evaluation(file)[1]
    assert (first.prompt, first.answers) == ("q", {"x": "1", "y": "2"})
    assert (second.prompt, second.answers) == ("system: s\n\nuser: q", {"answer": "3"})
    file.write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"answers.jsonl:1: is no row of answers"):
        read_evaluation(file)
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(DataError, match=r"evaluation.json: is no evaluation.json: models: Field required"):
        read_evaluation(tmp_path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_evaluation(tmp_path / "none.json")


def test_a_disk_that_refuses_is_told_in_a_line(tmp_path):
    (tmp_path / "comparison.json").write_text(comparison().model_dump_json())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--out .*page.html: cannot be written: Not a directory|File exists"):
        write_page([tmp_path], [], tmp_path / "file" / "page.html")


def test_the_figures_of_an_evaluation_are_called_as_evaluate_calls_them():
    markdown = as_markdown(report_of([comparison()], evaluated=EVALUATED)).replace("\\", "")
    assert "avg_response_len, tokens" in markdown and "decode, tok/s" in markdown and "| ceval-valid tasks" in markdown
    assert "decode_tokens_per_s" not in markdown
