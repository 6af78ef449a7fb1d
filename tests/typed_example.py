# pyright: reportUnknownVariableType=true, reportUnknownParameterType=true
"""A program of a user, for the type checker: the public surface as it is seen there.

It is checked with the rest (`pyright`).
"""

from typing import NamedTuple, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx

import jaxmf_opt
from jaxmf_opt import (
    DEFAULT_OPTIMIZER,
    ROBUST_OPTIMIZER,
    CallbackArgs,
    LeanOptaxMinimiser,
    Solution,
    callbacks,
    combine,
    jax_enable_x64,
    optimize,
    solve,
    sweep,
    sweeps,
    traced,
)
from jaxmf_opt.mechanisms import BandedToeplitz, BufferedToeplitz, Dense, workloads


class Point(NamedTuple):
    x: jax.Array
    y: jax.Array


def loss(point: Point) -> jax.Array:
    return (point.x - 3.0) ** 2 + 10.0 * (point.y + 1.0) ** 2


def loss_and_gradient(point: Point) -> tuple[jax.Array, Point]:
    return jax.value_and_grad(loss)(point)


@traced
def small(info: CallbackArgs) -> jax.Array:
    return info.loss < 1e-9


def plain(info: CallbackArgs) -> bool:
    return info.step >= 100


@jax_enable_x64
def third(x: float) -> jax.Array:
    return jnp.asarray(x) / 3


def main() -> None:
    start = Point(jnp.array(0.0), jnp.array(0.0))

    # What goes in is what comes out.
    assert_type(optimize(loss, start), Point)
    assert_type(optimize(loss_and_gradient, start, grad=True), Point)
    assert_type(optimize(jnp.cosh, 1.0, gtol=1e-9), float)
    assert_type(third(1.0), jax.Array)

    # Options of all kinds.
    both = combine(small, plain, callbacks.NoProgress(steps=3), callbacks.Recorder())
    for optimizer in (DEFAULT_OPTIMIZER, ROBUST_OPTIMIZER, optax.adam(0.1)):
        optimize(loss, start, optimizer=optimizer, callback=both, rtol=1e-6)
    optimize(loss, start, callback=lambda info: info.step > 3, gtol=jnp.array(1e-9))
    optimize(loss, start, rtol=np.float32(1e-6), atol=np.float64(0), gtol=np.array(0.0))

    # The whole answer.
    solution = solve(loss, start, history=True)
    assert_type(solution, Solution)
    print(solution.value, solution.result == optx.RESULTS.successful)
    solve(loss, start, state=solution.state, throw=True)

    # Sweeps.
    def ridge(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum((x - 1.0) ** 2) + weight * jnp.sum(x**2)

    weights = np.linspace(0.0, 1.0, 5)
    swept = sweep(ridge, jnp.zeros(2), weights, gtol=1e-9)
    assert_type(sweeps.best_lane(swept), int)
    assert_type(sweeps.failed_lanes(swept), dict[int, str])
    print(sweeps.table(swept, weights)["loss"])

    # Mechanisms.
    momentum = workloads.momentum(16, 0.9)
    banded = BandedToeplitz(bands=4, workload_coef=momentum)
    coef = optimize(banded.loss, banded.initial_params(), rtol=1e-6)
    assert_type(banded.strategy_coef(coef), jax.Array)
    blt = BufferedToeplitz(16, num_buffers=1)
    print(blt.buffers(blt.initial_params()).buf_decay)
    dense = Dense(8)
    gram = optimize(dense.loss_and_gradient, dense.initial_params(), grad=True)
    assert_type(dense.strategy_matrix(gram), jax.Array)

    # A solver of optimistix.
    solver = LeanOptaxMinimiser[jax.Array, None](optax.lbfgs(), rtol=1e-5, atol=1e-5)
    optx.minimise(lambda y, _: jnp.sum((y - 2.0) ** 2), solver, jnp.zeros(3))
    print(jaxmf_opt.__version__)


if __name__ == "__main__":
    main()
