"""What holds to the last bit, in programs as users have them.

The suite has XLA compile quickly, and two programs that do the same then round
differently more often. Where bits are compared, XLA is to optimize.
"""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_bits():
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "optimization" not in flag and "fus" not in flag]
    files = [str(p) for p in TESTS.rglob("test_*.py") if "mark.bits" in p.read_text()]
    options = ("-q", "-n0", "--optimized", "-m", "bits")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=TESTS.parent,
        env=os.environ | {"XLA_FLAGS": " ".join(kept)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
