"""What do a float32 program around a solve, and its derivative, cost?

* float32: a jitted float32 program around a float64 solve, over the same program with
  x64 on. (The solve is the same; the ratio should be 1.)
* gradient: a jitted value-and-gradient through a solve, over the jitted solve; for a
  solve with default arguments, and for one that rtol=1e-6 stops early.
* direct: the derivative with a matrix, over the matrix-free one, by size.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxmf_opt import optimize
from jaxmf_opt.mechanisms import BandedToeplitz, workloads

PAIRS = 9
MATRIX_FREE = lx.LSMR(rtol=1e-12, atol=0.0)
N, BANDS = 128, 16


def _seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / repeats


def _ratio(a: Callable[[], Any], b: Callable[[], Any], repeats: int = 20) -> str:
    jax.block_until_ready((a(), b()))
    pairs = [(_seconds(a, repeats), _seconds(b, repeats)) for _ in range(PAIRS)]
    ratio = statistics.median(x / y for x, y in pairs)
    first, second = (statistics.median(c) for c in zip(*pairs, strict=True))
    return f"{ratio:7.3f}   ({1e3 * first:.3f} ms / {1e3 * second:.3f} ms)"


def _error(momentum: jax.Array, rtol: float = 0.0) -> jax.Array:
    """The smallest error at a momentum."""
    workload_coef = workloads.momentum(N, momentum)
    mechanism = BandedToeplitz(N, BANDS, workload_coef=workload_coef)
    start = BandedToeplitz(N, BANDS).initial_params()
    best = optimize(mechanism.loss, start, rtol=rtol)
    return jnp.sqrt(mechanism.loss(best))


def _quartic(size: int, solver: lx.AbstractLinearSolver | None) -> Callable[..., Any]:
    def minimum(centre: jax.Array) -> jax.Array:
        def loss(y: jax.Array) -> jax.Array:
            d = y - centre
            return jnp.sum(d**4) + jnp.sum(d**2) + 0.1 * jnp.sum((d[1:] - d[:-1]) ** 2)

        y = optimize(loss, jnp.zeros(size), gtol=1e-8, linear_solver=solver)
        return jnp.sum(y**2)

    return jax.jit(jax.grad(minimum))


def main() -> None:
    solve = jax.jit(_error)
    in_float32 = functools.partial(solve, jnp.float32(0.5))
    with jax.enable_x64():
        momentum = jnp.float64(0.5)

    def in_float64() -> jax.Array:
        with jax.enable_x64():
            return solve(momentum)

    print("  float32 ", _ratio(in_float32, in_float64))
    for rtol in (0.0, 1e-6):
        error = functools.partial(_error, rtol=rtol)
        value, both = jax.jit(error), jax.jit(jax.value_and_grad(error))
        at = jnp.float32(0.5)
        ratio = _ratio(lambda: both(at), lambda: value(at))  # noqa: B023
        print(f"  gradient, rtol={rtol:g}", ratio)
    for size in (64, 128, 256):
        direct = _quartic(size, None)
        free = _quartic(size, MATRIX_FREE)
        centre = jnp.linspace(-1.0, 1.0, size)
        print(
            f"  direct, {size:4}",
            _ratio(lambda: direct(centre), lambda: free(centre), 1),  # noqa: B023
        )


if __name__ == "__main__":
    main()
