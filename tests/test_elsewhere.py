"""Tests that need settings of a whole process run here, in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# What the tests with a marker need, and where they are. The suite has XLA compile
# quickly, and two programs that do the same then round differently more often: where
# bits are compared, XLA is to optimize. Annotations are checked where everything public
# is called; to check them everywhere takes a third more time.
MARKED = {
    "bits": ("--optimized", "test_upstream.py"),
    "annotated": (
        "--jaxtyping-packages=jaxmf_opt,beartype.beartype",
        "test_docstrings.py",
    ),
}


@pytest.mark.parametrize("marker", MARKED)
def test_marked(marker: str):
    option, *files = MARKED[marker]
    paths = [str(TESTS / name) for name in files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", option, "-m", marker, *paths],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
