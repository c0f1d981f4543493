"""Benches that are run by hand still run: each once, at sizes whose figures mean nothing."""

import sys

import pytest


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a bench with its constants made small; gives what it prints."""

    def call(bench, *arguments, **constants):
        for name, value in constants.items():
            monkeypatch.setattr(bench, name, value)
        monkeypatch.setattr(sys, "argv", [bench.__name__, *map(str, arguments)])
        bench.main()
        return capsys.readouterr().out

    return call


def test_wire(run):
    from tests.bench import wire

    assert "top-64" in run(wire, TOKENS=128, WIDTH=64)


def test_losses_of_several_teachers(run):
    from tests.bench import cross_loss

    small = {"VOCAB": 6000, "OTHER_VOCAB": 5000, "CLASSES": 2000}
    said = run(cross_loss, "--json", SHAPES={"cpu": cross_loss.Shape(24, 16, 16, 1)}, **small)
    assert "bridged, top_k" in said and "target" in said


def test_look_ups(run):
    from tests.bench import lookups

    assert "100" in run(lookups, "--rows", 100, SAMPLE=20)
