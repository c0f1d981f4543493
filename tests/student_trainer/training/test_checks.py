"""Findings before step 0: `train` stops at the first bad one with its error, `all_findings` shows every one of the same."""

import io

import pytest
from rich.console import Console

from student_trainer.errors import ConfigError, RunError
from student_trainer.findings import Finding, Findings
from student_trainer.training.checks import all_findings, check_folder
from student_trainer.training.run import train
from teacher_wire.core.errors import LimitError


def quiet():
    return Console(file=io.StringIO(), width=300)


# ---------------------------------------------------------------- Finding and Findings


def test_a_finding_says_its_error_in_two_parts():
    found = Finding.bad("run.output_dir", "it is full", "make room", kind=RunError)
    assert (found.ok, found.what, found.fix, str(found.error)) == (
        False,
        "it is full",
        "make room",
        "it is full; make room",
    )
    with pytest.raises(RunError, match="it is full; make room"):
        found.require()
    Finding.good("run.output_dir", "it has room").require()


def test_findings_that_stop_make_no_further_check():
    made = []

    def checks():
        for number in range(3):
            made.append(number)
            yield Finding.good("a", "fine") if number != 1 else Finding.bad("b", "wrong")

    findings = Findings()
    with pytest.raises(ConfigError, match="wrong"):
        findings.add(checks())
    assert made == [0, 1] and [found.ok for found in findings.all] == [True, False]


def test_findings_that_do_not_stop_make_all_and_take_errors_of_the_user_alone():
    findings = Findings(stops=False)
    error = LimitError("too long", field="tokens", value=3, limit=2)

    def raises(what):
        raise what

    assert not findings.add([Finding.good("a", "fine"), Finding.bad("b", "wrong"), Finding.bad("c", "as well")])
    assert findings.attempt("d", lambda: raises(error), "loaded") is None
    assert findings.attempt("e", lambda: 7, "loaded") == 7
    assert [(found.setting, found.ok) for found in findings.all] == [
        ("a", True), ("b", False), ("c", False), ("d", False), ("e", True),
    ]  # fmt: skip
    assert findings.all[3].error is error and findings.all[3].what == str(error)
    with pytest.raises(ZeroDivisionError):  # a fault of ours is no finding
        findings.attempt("f", lambda: 1 // 0, "loaded")


def test_advice_is_told_and_hinders_nothing():
    told = []
    findings = Findings(on_advice=told.append)
    assert findings.add([Finding.good("a", "fine"), Finding.good("b", "legal", "rarely meant")])
    assert told == ["rarely meant"]


# ---------------------------------------------------------------- of a run


def bad(findings):
    return [found for found in findings if not found.ok]


def test_a_run_without_faults_has_only_good_findings(config_of):
    config = config_of()
    findings = all_findings(config, quiet())
    assert findings and not bad(findings)
    settings = {found.setting for found in findings}
    assert settings >= {
        "model.dtype", "loss.output", "run", "run.output_dir", "run.cache_dir", "model.path", "data", "teacher",
        "labels.transport", "data.max_tokens", "train.batch_size", "train.eval_batch_size", "cache.max_gb",
    }  # fmt: skip
    assert all(found.what and found.error is None for found in findings)
    assert not config.run.output_dir.exists(), "looking leaves nothing"


def test_several_faults_are_found_at_once(config_of):
    """Each with the error by which a run with this fault alone ends."""
    faults = {
        "loss.output": {"labels": {"transport": "top_k"}, "loss": {"output": {"temperature": 2.0}}},
        "labels.k": {"labels": {"transport": "top_k", "k": 100_000}},
        "train.report_to": {"train": {"report_to": "nobody"}},
    }
    together: dict[str, dict] = {}
    for sections in faults.values():
        for name, section in sections.items():
            together[name] = together.get(name, {}) | section
    findings = {found.setting: found for found in bad(all_findings(config_of(**together), quiet()))}
    assert findings.keys() == faults.keys()
    for setting, sections in faults.items():
        with pytest.raises(ConfigError) as ended:
            train(config_of(**sections), console=quiet())
        assert str(ended.value) == findings[setting].what + (
            f": {findings[setting].fix}" if findings[setting].fix else ""
        ), setting


def test_requests_that_are_too_large_are_all_named(config_of):
    sections = {"feed": {"window_mb": 1}, "labels": {"transport": "full"}, "train": {"batch_size": 200}}
    found = bad(all_findings(config_of(**sections), quiet()))
    assert [finding.setting for finding in found] == ["train.batch_size"]
    with pytest.raises(ConfigError) as ended:
        train(config_of(**sections), console=quiet())
    assert str(found[0].error) == str(ended.value) and "feed.window_mb" in found[0].what


def test_what_hangs_on_a_missing_part_is_not_checked(config_of, server):
    config = config_of(teacher={"wait_s": 0.2})
    server.stop()
    found = bad(all_findings(config, quiet()))
    assert [finding.setting for finding in found] == ["teacher"]
    found = bad(all_findings(config_of(model={"path": "/nowhere"}), quiet()))
    assert [finding.setting for finding in found] == ["model.path"]


def test_a_folder_of_another_run_is_found_by_both(config_of):
    config = config_of()
    config.run.output_dir.mkdir()
    (config.run.output_dir / "letter.txt").write_text("mine")
    (found,) = bad(check_folder(config, False))
    assert (found.setting, found.fix) == ("run.output_dir", "choose another folder")
    assert [str(one.error) for one in bad(all_findings(config, quiet()))] == [str(found.error)]
    with pytest.raises(ConfigError) as ended:
        train(config, console=quiet())
    assert str(ended.value) == str(found.error)
