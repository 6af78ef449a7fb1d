"""What stays behind of ten thousand eager solves?

1. 10,000 solves, each of a fresh closure over another array: they share one program.
2. 400 solves of losses that differ in a Python number, which is a part of the program:
   each is compiled. The last 128 programs are kept; JAX keeps what it has traced for
   the last 2,048 calls of each kind.

Printed are solves, seconds, resident memory, memory maps (Linux gives 65,530 to a
process), specs and XLA programs that are kept, and Python objects.
"""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmf_opt import optimize
from jaxmf_opt._solver.compilation import cached as compiled


def _alike(i: int) -> Any:
    centre = np.linspace(0, 1, 8) + i
    return optimize(lambda y: jnp.sum((y - centre) ** 2), jnp.zeros(8), gtol=1e-6)


def _different(i: int) -> Any:
    weight = 1.0 + i
    return optimize(
        lambda y: jnp.sum((y - 1) ** 2) + 1e-3 * weight * jnp.sum(y**4),
        jnp.zeros(8),
        gtol=1e-6,
    )


def _run(solve: Callable[[int], Any], count: int) -> None:
    print(
        f"{'':8} {'s':>6} {'MiB':>6} {'maps':>6} {'kept':>5} {'XLA':>5} {'objects':>8}"
    )
    begin = time.perf_counter()
    client = jax.devices()[0].client
    for i in range(count):
        solve(i)
        if (i + 1) % (count // 8):
            continue
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        maps = len(Path("/proc/self/maps").read_text().splitlines())
        print(
            f"{i + 1:8} {time.perf_counter() - begin:6.1f} {pages / 256:6.0f} {maps:6} "
            f"{compiled.cache_info().currsize:5} {len(client.live_executables()):5} "
            f"{len(gc.get_objects()):8}",
            flush=True,
        )


def main() -> None:
    print("fresh closures over other arrays")
    _run(_alike, 10_000)
    print("losses that differ in a number")
    _run(_different, 400)


if __name__ == "__main__":
    main()
