from __future__ import annotations

import json
import math
import statistics
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from student_trainer.errors import RunError
from student_trainer.evaluation.report import (
    METRICS,
    CurvePoint,
    Results,
    as_markdown,
    paired,
    print_table,
    reading,
)
from student_trainer.evaluation.report_folder import write_report


def results(**gkd: float) -> Results:
    sft = {"nll_per_byte": [1.30, 1.31, 1.29], "kl_to_teacher": [0.9, 0.92, 0.88], "acc1": [0.4] * 3, "acc3": [0.6] * 3}
    arm = {name: [v + gkd.get(name, 0.0) + 0.001 * i for i, v in enumerate(vs)] for name, vs in sft.items()}
    return Results({"sft": sft, "gkd_hidden": arm}, {"nll_per_byte": 1.0, "acc1": 0.5}, 200, [0, 1, 2], 61.5)


def curves(seeds: int = 3) -> list[CurvePoint]:
    return [
        CurvePoint(arm, seed, step, metric, 3 / (step + 1) + 0.01 * seed)
        for arm in ("sft", "gkd_hidden")
        for seed in range(seeds)
        for step in range(0, 50, 10)
        for metric in ("loss", "nll_per_byte", "kl_to_teacher")
    ]


# freedom -> the quantile of t at 0.975: as printed in tables, and as this module's own bisection gave it before scipy took its place.
QUANTILES = {
    1: (12.706205, 12.706204736605287),
    2: (4.302653, 4.302652729908004),
    3: (3.182446, 3.182446305407211),
    4: (2.776445, 2.7764451052062213),
    9: (2.262157, 2.2621571628842503),
    120: (1.979930, None),
}


@pytest.mark.parametrize("freedom", QUANTILES)
def test_intervals_have_the_quantiles_of_the_printed_table_and_those_they_had(freedom: int) -> None:
    count = freedom + 1
    values = [float(i) for i in range(count)]
    printed, before = QUANTILES[freedom]
    interval = paired(values, [0.0] * count)
    assert interval["low"] is not None and interval["high"] is not None
    per_quantile = statistics.stdev(values) / math.sqrt(count)
    assert (interval["high"] - interval["low"]) / 2 / per_quantile == pytest.approx(printed, abs=1e-6)
    if before is not None:
        assert interval["high"] == pytest.approx(interval["mean"] + before * per_quantile, rel=1e-10)


def test_paired_interval_against_a_value_by_hand() -> None:
    # differences 1, 2, 3: mean 2, sd 1, half-width 4.302653 / sqrt(3) = 2.484138
    interval = paired([2, 4, 6], [1, 2, 3])
    assert interval == pytest.approx({"mean": 2.0, "low": -0.484138, "high": 4.484138}, abs=1e-6)
    assert paired([1.5], [1.0]) == {"mean": 0.5, "low": None, "high": None}
    assert paired([1, 2], [2, 3]) == {"mean": -1.0, "low": -1.0, "high": -1.0}
    for arm, base in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(RunError, match="as many on both sides"):
            paired(arm, base)


def test_report_json_has_exactly_the_agreed_form(tmp_path: Path) -> None:
    write_report(tmp_path / "demo", results(nll_per_byte=-0.1), curves())
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert set(report) == {"arms", "paired", "teacher", "steps", "seeds", "seconds"}
    assert set(report["arms"]) == {"sft", "gkd_hidden"} and set(report["paired"]) == {"gkd_hidden"}
    for metrics in report["arms"].values():
        assert set(metrics) == set(METRICS) and all(len(values) == 3 for values in metrics.values())
    for interval in report["paired"]["gkd_hidden"].values():
        assert set(interval) == {"mean", "low", "high"}
    assert report["paired"]["gkd_hidden"]["nll_per_byte"]["mean"] == pytest.approx(-0.099)
    assert (report["steps"], report["seeds"], report["seconds"]) == (200, [0, 1, 2], 61.5)
    assert report["teacher"] == {"nll_per_byte": 1.0, "acc1": 0.5}


def test_files_are_whole_and_plots_are_linked(tmp_path: Path) -> None:
    write_report(tmp_path, results(), curves())
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.md", "loss.png", "heldout.png"}
    for name in ("loss.png", "heldout.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in (
            tmp_path / "report.md"
        ).read_text()


def test_a_report_without_curves_or_with_one_seed_is_still_a_report(tmp_path: Path) -> None:
    one = Results({"sft": {"acc1": [0.5]}, "gkd": {"acc1": [0.6]}}, {}, 10, [7], 1.0)
    write_report(tmp_path, one, [p for p in curves(1) if p.metric == "loss" and p.arm == "sft"])
    assert "one seed" in (tmp_path / "report.md").read_text() and (tmp_path / "loss.png").exists()
    assert not (tmp_path / "heldout.png").exists()
    assert json.loads((tmp_path / "report.json").read_text())["paired"]["gkd"]["acc1"]["low"] is None


def test_every_seed_is_printed() -> None:
    text = as_markdown(results(nll_per_byte=-0.1))
    assert all(f"| {arm} | {seed} |" in text for arm in ("sft", "gkd_hidden") for seed in (0, 1, 2))
    assert "1.3000 ± 0.0100" in text


def test_the_reading_claims_only_what_the_interval_allows() -> None:
    assert "is better than sft in held-out NLL by 0.099 nats/byte, 7.6%" in reading(results(nll_per_byte=-0.1))
    assert "is worse than sft" in reading(results(nll_per_byte=0.1))
    assert "shows no certain difference to sft" in reading(results(nll_per_byte=-0.001))
    assert "KL to the teacher is 0.50 of sft's" in reading(results(kl_to_teacher=-0.451))


def test_table_on_a_console_shows_all_arms_and_differences() -> None:
    stream = StringIO()
    print_table(results(nll_per_byte=-0.1), Console(file=stream, width=120))
    shown = stream.getvalue()
    assert all(text in shown for text in ("sft", "gkd_hidden", "teacher", "-0.0990", "[-0.1015, -0.0965]", "nats/byte"))


def test_results_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RunError, match="base arm 'sft' is not among the arms: gkd"):
        Results({"gkd": {"acc1": [1.0]}}, {}, 1, [0], 1.0)
    with pytest.raises(RunError, match="each of seeds"):
        Results({"sft": {"acc1": [1.0]}}, {}, 1, [0, 1], 1.0)
    with pytest.raises(RunError, match="finite"):
        Results({"sft": {"acc1": [math.nan]}}, {}, 1, [0], 1.0)
    with pytest.raises(RunError, match="unknown metric 'bleu'"):
        Results({"sft": {"bleu": [1.0]}}, {}, 1, [0], 1.0)
    with pytest.raises(RunError, match="gkd has the metrics"):
        Results({"sft": {"acc1": [1.0]}, "gkd": {"acc3": [1.0]}}, {}, 1, [0], 1.0)
