"""Processes of their own, for tests that need other settings than the suite has."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def environment(devices: int = 1, **settings: str) -> dict[str, str]:
    """The environment of a process on CPUs.

    Args:
      devices: How many devices it has.
      **settings: Other variables.

    Returns:
      All variables. The flags of XLA are those of this process, and one more.
    """
    of_xla = os.environ.get("XLA_FLAGS", "")
    of_devices = f"--xla_force_host_platform_device_count={devices}"
    return {
        **os.environ,
        "XLA_FLAGS": f"{of_xla} {of_devices}".strip(),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "0",
        # For the modules beside the tests; the package is the one of this checkout.
        "PYTHONPATH": os.pathsep.join(
            map(str, (TESTS.parent, TESTS, TESTS / "sweeps", TESTS / "_jax"))
        ),
        **settings,
    }


def report_of(
    *command: str,
    devices: int = 1,
    warnings: str = "error::UserWarning",
    timeout: float = 300,
    **settings: str,
) -> Any:
    """What a Python process prints, as JSON.

    Args:
      *command: Its script, or other arguments of Python.
      devices: How many devices it has.
      warnings: What it does about warnings.
      timeout: After how many seconds it is killed.
      **settings: Other variables of its environment.
    """
    done = subprocess.run(
        [sys.executable, "-W", warnings, *command],
        cwd=TESTS.parent,
        env=environment(devices, **settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)
