"""Many solves in one process: nothing that they need stays behind.

`python -m benchmarks.soak` does it ten thousand times.
"""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmf_opt import optimize, sweep
from jaxmf_opt._solver.compilation import cached as compiled


def solve_anew(i: int) -> Any:
    """A solve of a fresh closure over other arrays."""
    centre = np.linspace(0.0, 1.0, 3) + i
    return optimize(
        lambda y: jnp.sum((y - centre) ** 2),
        jnp.zeros(3),
        gtol=1e-6,
        callback=(lambda info: info.step > 2) if i % 10 == 0 else lambda _: None,
    )


def live() -> tuple[int, int, int]:
    gc.collect()
    programs = jax.devices()[0].client.live_executables()
    return compiled.cache_info().currsize, len(programs), len(gc.get_objects())


def test_fresh_closures_leave_nothing_behind():
    def many(count: int) -> None:
        for i in range(count):
            np.testing.assert_allclose(solve_anew(i), np.linspace(0, 1, 3) + i, 1e-5)

    many(20)
    specs, programs, objects = live()
    many(60)
    more = live()
    assert more[:2] == (specs, programs)
    assert more[2] - objects < 30  # one for every other solve would be a leak


def test_programs_that_are_traced_anew_leave_nothing_behind():
    start = jnp.zeros(3)

    def loss(y: jax.Array, c: jax.Array) -> jax.Array:
        return jnp.sum((y - c.astype(y.dtype)) ** 2)

    def many(count: int) -> None:
        for i in range(count):
            jax.make_jaxpr(lambda c: optimize(lambda y: loss(y, c), start))(start)
            sweep(loss, start, jnp.arange(2.0) + i)

    many(1)
    *_, objects = live()
    many(3)
    *_, more = live()
    assert more - objects < 150
