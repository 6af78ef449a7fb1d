"""Options of XLA, of which each release of jaxlib knows others.

One that it does not know ends the process without a word if it is in `XLA_FLAGS`, so a
child process is asked before any is set.
"""

import os
import subprocess
import sys

# For programs that run once: nearly all of their time goes into compiling them.
COMPILE_QUICKLY: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
}


def known(options: dict[str, bool | int]) -> dict[str, bool | int]:
    """Those of the options that the installed jaxlib knows."""
    return {name: x for name, x in options.items() if _is_known(as_flag(name, x))}


def as_flag(name: str, value: bool | int) -> str:
    """An option in the form of `XLA_FLAGS`."""
    return f"--{name}={value}".lower()


def _is_known(flag: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        check=False,
    )
    return done.returncode == 0
