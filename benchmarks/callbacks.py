"""What does a step cost, by the kind of callback, compared with jax-privacy 2.0.0?

Microseconds a step and, in brackets, the ratio to a step of upstream with a callback
that does nothing; medians over runs in turns. On two losses: one that costs nothing
with an optimizer that costs nothing, so that calling is all there is; and a banded
Toeplitz loss with the default optimizer.

* none: no callback. (The default optimizer takes all its steps, by `optax.lbfgs` with
  the same arguments but one that nobody's line search reaches.)
* traced: a traced callback that never stops.
* compiled: a Python callback, inside `jax.jit`.
* batch of 16: the same under `jax.vmap`, a step of one lane.
* eager: a Python callback outside of `jax.jit`.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax_privacy.matrix_factorization import optimization as upstream
from jax_privacy.matrix_factorization import toeplitz

import jaxmf_opt

RUNS = 7
LANES = 16


def _nothing(_: Any) -> None:
    pass


def _compiled(steps: int, solve: Callable[..., Any], *args: Any) -> float:
    """Seconds a step of a jitted solve."""
    program = jax.jit(solve)
    jax.block_until_ready(program(*args))
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    return (time.perf_counter() - start) / steps


def _between_calls(steps: int, solve: Callable[..., Any]) -> float:
    """Seconds between the calls of an eager callback, without the first ones."""
    times: list[float] = []
    jax.block_until_ready(solve(callback=lambda _: times.append(time.perf_counter())))
    skipped = steps // 4
    return (times[-1] - times[skipped]) / (len(times) - 1 - skipped)


def _measure(loss: Any, params: jax.Array, steps: int, optimizer: Any) -> None:
    options = {"max_optimizer_steps": steps, "optimizer": optimizer}
    ours = functools.partial(jaxmf_opt.optimize, loss, **options)
    batch = jnp.stack([params] * LANES)

    def solve(params: jax.Array, callback: Any) -> jax.Array:
        return jaxmf_opt.optimize(loss, params, callback=callback, **options)

    never = jaxmf_opt.traced(lambda info: info.loss < -1e300)
    kinds: dict[str, Callable[[], float]] = {
        "upstream": lambda: _between_calls(
            steps, functools.partial(upstream.optimize, loss, params, **options)
        ),
        "none": lambda: _compiled(steps, ours, params),
        "traced": lambda: _compiled(
            steps, functools.partial(solve, callback=never), params
        ),
        "compiled": lambda: _compiled(
            steps, functools.partial(solve, callback=_nothing), params
        ),
        f"batch of {LANES}": lambda: _compiled(
            steps * LANES,
            jax.vmap(functools.partial(solve, callback=_nothing)),
            batch,
        ),
        "eager": lambda: _between_calls(steps, functools.partial(ours, params)),
    }
    seconds = {kind: [run() for _ in range(1)] for kind, run in kinds.items()}
    for _ in range(RUNS - 1):
        for kind, run in kinds.items():
            seconds[kind].append(run())
    base = seconds["upstream"]
    for kind, values in seconds.items():
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        print(f"  {kind:12} {1e6 * statistics.median(values):8.1f} us   ({ratio:.3f})")


def main() -> None:
    print("nearly no loss, sgd")
    params = jnp.linspace(-1.0, 1.0, 16)
    _measure(lambda y: jnp.sum((y - 3.0) ** 2), params, 2000, optax.sgd(1e-4))
    # As the default optimizer, but not cut short without a callback.
    optimizer = optax.lbfgs(
        memory_size=1, linesearch=optax.scale_by_backtracking_linesearch(127)
    )
    start = toeplitz.optimal_max_error_strategy_coefs(16)
    for n in (128, 1024):
        print(f"Toeplitz n={n} b=16, L-BFGS")
        loss = functools.partial(toeplitz.loss, n=n, reduction_fn=jnp.mean)
        _measure(loss, start, 250, optimizer)


if __name__ == "__main__":
    main()
