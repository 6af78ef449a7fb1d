"""What does a step cost beside its evaluations, and how many evaluations are there?

* time / evaluations: a compiled solve at n = 4096, over a compiled loop of the same
  numbers of values and of values with gradients.
* zoom: evaluations with a zoom line search (memory 15), ours over upstream's, and the
  largest relative difference of the losses of all steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_privacy.matrix_factorization import optimization as upstream

import jaxmf_opt

from .common import seconds, toeplitz_problem

ZOOM = optax.lbfgs(
    memory_size=15, linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=20)
)
PAIRS, STEPS = 15, 40


def _step_over_evaluations(bands: int, **options: Any) -> float:
    loss, params = toeplitz_problem(4096, bands)
    solver = jax.jit(lambda p: jaxmf_opt.solve(loss, p, **options))
    stats = solver(params).stats
    grads = int(stats["num_grad_evaluations"])
    values = int(stats["num_loss_evaluations"]) - grads

    @jax.jit
    def evaluations(p: jax.Array) -> jax.Array:
        def both(_: Any, carry: jax.Array) -> jax.Array:
            value, grad = jax.value_and_grad(loss)(p + carry * 1e-30)
            return value + 1e-30 * jnp.sum(grad)

        def value(_: Any, carry: jax.Array) -> jax.Array:
            return loss(p + carry * 1e-30)

        first = jax.lax.fori_loop(0, grads, both, jnp.zeros((), p.dtype))
        return jax.lax.fori_loop(0, values, value, first)

    with jax.enable_x64():
        point = jnp.asarray(params, "float64")
        calls = [lambda: solver(params), lambda: evaluations(point)]
        times = [[seconds(call) for call in calls] for _ in range(PAIRS + 1)][1:]
    return float(np.divide(*np.min(times, axis=0)))


class _Counted:
    """A loss that counts its executions, and a callback that keeps the losses."""

    def __init__(self, loss: Callable[..., Any]):
        self._loss = loss
        self.count = 0
        self.losses: list[float] = []

    def _tick(self) -> None:
        self.count += 1

    def __call__(self, params: jax.Array) -> jax.Array:
        jax.debug.callback(self._tick)
        return self._loss(params)

    def callback(self, info: Any) -> None:
        self.losses.append(float(info.loss))


def _zoom(n: int, bands: int) -> str:
    loss, params = toeplitz_problem(n, bands)
    ours, theirs = _Counted(loss), _Counted(loss)
    for counted, optimize in ((ours, jaxmf_opt.optimize), (theirs, upstream.optimize)):
        end = optimize(
            counted,
            params,
            optimizer=ZOOM,
            callback=counted.callback,
            max_optimizer_steps=STEPS,
        )
        jax.block_until_ready(end)
        jax.effects_barrier()
    gap = np.max(np.abs(np.divide(ours.losses, theirs.losses) - 1))
    ratio = ours.count / theirs.count
    return f"{ours.count} / {theirs.count} = {ratio:.2f}, losses within {gap:.0e}"


def main() -> None:
    print("time / evaluations, n = 4096")
    for bands in (16, 64):
        for name, options in {
            "rtol=1e-6": {"rtol": 1e-6},
            "no tolerance": {"rtol": 0.0},
            "zoom, rtol=1e-6": {"optimizer": ZOOM, "rtol": 1e-6},
        }.items():
            ratio = _step_over_evaluations(bands, **options)
            print(f"  {bands} bands, {name:16} {ratio:.2f}")
    print(f"zoom, {STEPS} steps: evaluations, ours / upstream's")
    for n, bands in ((128, 16), (1024, 32)):
        print(f"  n = {n}, {bands} bands: {_zoom(n, bands)}")


if __name__ == "__main__":
    main()
