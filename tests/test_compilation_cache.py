"""A second process finds the solve of the first in JAX's persistent cache."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmf_opt import solve, traced


def run() -> dict[str, Any]:
    """Solves in all ways, and counts what JAX looked for and found."""
    counts = {"cache_hits": 0, "cache_misses": 0}

    def listen(event: str, **_: Any) -> None:
        name = event.rpartition("/")[2]
        if name in counts:
            counts[name] += 1

    weights = np.linspace(1.0, 2.0, 5)

    def one(c: Any, **options: Any) -> Any:
        loss = lambda y: jnp.sum(weights * jnp.cosh(y - jnp.asarray(c, y.dtype)))  # noqa: E731
        return solve(loss, np.zeros(5), max_optimizer_steps=20, **options).value

    jax.monitoring.register_event_listener(listen)
    stop = lambda info: info.step > 3  # noqa: E731
    values = [
        one(0.5),
        jax.jit(jax.vmap(one))(jnp.arange(3.0)),
        one(0.5, callback=stop),  # between compiled steps
        one(0.5, callback=traced(stop)),
    ]
    return {"values": [np.asarray(x).tolist() for x in values], **counts}


def test_nothing_is_compiled_again(tmp_path: Path):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
    }

    def process() -> dict[str, Any]:
        command = [sys.executable, __file__]
        out = subprocess.run(command, env=environment, check=True, capture_output=True)
        return json.loads(out.stdout)

    first, second = process(), process()
    assert first["cache_misses"] > 0
    assert second["cache_misses"] == 0
    assert second["cache_hits"] == first["cache_hits"] + first["cache_misses"]
    assert second["values"] == first["values"]


if __name__ == "__main__":
    print(json.dumps(run()))
