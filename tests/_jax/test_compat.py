"""Releases of JAX that are not known yet."""

import subprocess
import sys

from processes import environment

NEWER = """
import jax
jax.__version__, jax.__version_info__ = "0.99.1", (0, 99, 1)
import jaxmf_opt
"""


def test_one_warning_on_an_untested_release():
    done = subprocess.run(
        [sys.executable, "-c", NEWER],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("Warning") == 1
    assert "has not been tested with JAX 0.99.1" in done.stderr
