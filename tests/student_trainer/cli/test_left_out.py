"""What a command's process does not import, and who still can."""

import importlib.util
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from student_trainer.cli import main
main.app = lambda **_: None
main.main()
import transformers.generation.candidate_generator as candidates
assert "sklearn" not in sys.modules and not candidates.is_sklearn_available()
from sklearn.metrics import roc_curve
main.main()
assert [type(finder).__name__ for finder in sys.meta_path].count("_Finder") == 1
import importlib.util
assert importlib.util.find_spec("sklearn") is not None
"""


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_scikit_learn_is_left_out_and_can_be_had():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_a_library_changes_nothing_for_others():
    script = "import sys, student_trainer.api\nfrom transformers.utils import is_sklearn_available\nassert is_sklearn_available()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
