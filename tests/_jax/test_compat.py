"""Releases of JAX that are not known yet, and what need not be installed."""

import subprocess
import sys

from processes import environment

NEWER = """
import sys
import jax
jax.__version__, jax.__version_info__ = "0.99.1", (0, 99, 1)
for extra in "dp_accounting", "jax_privacy", "matplotlib", "pandas", "tqdm":
    sys.modules[extra] = None
import jaxmf_opt.callbacks, jaxmf_opt.mechanisms, jaxmf_opt.privacy, jaxmf_opt.sweeps
"""


def test_one_warning_on_an_untested_release():
    """And without any extra."""
    done = subprocess.run(
        [sys.executable, "-c", NEWER],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("Warning") == 1
    assert "has not been tested with JAX 0.99.1" in done.stderr
