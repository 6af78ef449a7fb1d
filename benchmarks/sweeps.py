"""What does a sweep cost, compared with one vmapped solve and with other ways?

All times are of whole calls, warm: what they compile has been compiled before. (A sweep
still traces its loss in each call; "tracing" is the time of one that takes no steps.)

1. Work: 64-parameter ridge regressions by gradient descent. In the first row all lanes
   take the same number of steps. In the second, 5% take 20 times as many.
2. Toeplitz: banded strategies, n = 1024, 16 bands, for momenta from 0 to 0.95.
3. Lanes: microseconds a lane for 1 to 4,096 lanes of the Toeplitz problem with n = 256:
   a sweep, the same without its tracing, a Python loop of jitted solves, one jitted and
   vmapped solve, jaxopt's L-BFGS in a vmap, and SciPy's L-BFGS-B in a pool of as many
   processes as there are cores, each of which evaluates a jitted loss.
4. Memory: the largest resident size of a process that sweeps over 100,000 lanes of 64
   parameters, by `DEFAULT_OPTIMIZER` with states, and by `ROBUST_OPTIMIZER` (each of
   whose states has 41 kB) without.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array

from jaxmf_opt import DEFAULT_OPTIMIZER, ROBUST_OPTIMIZER, solve, sweep
from jaxmf_opt.mechanisms import BandedToeplitz, workloads

from .common import least_seconds, seconds

RTOL = 1e-6
SIZE = 64


def _toeplitz(coef: Array, momentum: Array, n: int) -> Array:
    workload_coef = workloads.momentum(n, momentum)
    return BandedToeplitz(n, 16, workload_coef=workload_coef).loss(coef)


def _ridge() -> Callable[[Array, Any], Array]:
    matrix = np.random.default_rng(0).normal(size=(256, SIZE)) / 16

    def loss(x: Array, rate: Any) -> Array:
        del rate
        return 0.5 * jnp.sum((matrix @ (x - 1.0)) ** 2) + 0.05 * jnp.sum(x**2)

    return loss


def _work(lanes: int) -> None:
    """A sweep against one vmapped solve."""
    ridge, start = _ridge(), jnp.zeros(SIZE)
    rng = np.random.default_rng(0)
    rates = {
        "all alike": np.full(lanes, 0.8),
        "5% slow": np.where(rng.random(lanes) < 0.05, 0.8 / 34, 0.8),
    }
    # (Small learning rates would meet an `rtol` early.)
    options: dict[str, Any] = {"rtol": 0.0, "gtol": 1e-9, "max_optimizer_steps": 10_000}

    def one(rate: Array) -> Any:
        return solve(
            lambda x: ridge(x, None), start, optimizer=optax.sgd(rate), **options
        )

    vmapped = jax.jit(jax.vmap(one))
    for name, rate in rates.items():
        every = functools.partial(
            sweep, ridge, start, rate, optimizer=optax.sgd, **options
        )
        row(f"{lanes} ridge regressions, {name}", every, lambda r=rate: vmapped(r))


def _strategies(lanes: int) -> None:
    loss = functools.partial(_toeplitz, n=1024)
    start = BandedToeplitz(1024, 16).initial_params()
    momenta = np.linspace(0, 0.95, lanes)
    vmapped = jax.jit(jax.vmap(lambda m: solve(lambda x: loss(x, m), start, rtol=RTOL)))
    every = functools.partial(sweep, loss, start, momenta, rtol=RTOL)
    row(f"{lanes} Toeplitz strategies", every, lambda: vmapped(momenta))


def row(name: str, every: Callable[[], Any], vmapped: Callable[[], Any]) -> None:
    """Prints how long both take, and how much their results differ."""
    mine, theirs = every(), vmapped()
    ours, other = least_seconds(every, 3), least_seconds(vmapped, 3)
    steps = np.asarray(mine.stats["num_steps"])
    least = np.asarray(theirs.stats["loss"])
    gap = np.max(np.abs(np.asarray(mine.stats["loss"]) / least - 1))
    print(
        f"{name:36} {steps.min():5}-{steps.max():<5} {ours:8.2f} {other:8.2f} "
        f"{other / ours:6.2f} {gap:9.1e}",
        flush=True,
    )


def _jitted_loop(one: Callable[[Array], Any], momenta: np.ndarray) -> Any:
    jitted = jax.jit(one)
    return lambda: [jitted(m) for m in momenta]


@functools.cache
def _evaluation(n: int) -> Callable[..., Any]:
    jax.config.update("jax_enable_x64", True)
    return jax.jit(jax.value_and_grad(functools.partial(_toeplitz, n=n)))


def _scipy(start: np.ndarray, n: int, momentum: float) -> float:
    both = _evaluation(n)
    return scipy.optimize.minimize(
        lambda x: [np.asarray(a) for a in both(x, momentum)],
        start,
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-4},
    ).fun


def _ways(momenta: np.ndarray, n: int, pool: Any) -> Iterator[tuple[str, Any]]:
    start = BandedToeplitz(n, 16).initial_params()
    loss = functools.partial(_toeplitz, n=n)

    def one(momentum: Array) -> Array:
        return solve(lambda x: loss(x, momentum), start, rtol=RTOL).value

    def of_jaxopt(momentum: Array) -> Array:
        solver = jaxopt.LBFGS(loss, tol=1e-4, maxiter=250)
        return solver.run(start, momentum).params

    yield "sweep", lambda: sweep(loss, start, momenta, rtol=RTOL).value
    yield (
        "tracing",
        lambda: sweep(loss, start, momenta, rtol=RTOL, max_optimizer_steps=0).value,
    )
    yield "loop", _jitted_loop(one, momenta)
    vmapped = jax.jit(jax.vmap(one))
    yield "vmap", lambda: vmapped(momenta)
    jaxopts = jax.jit(jax.vmap(of_jaxopt))
    yield "jaxopt", lambda: jaxopts(momenta)
    of_lane = functools.partial(_scipy, np.asarray(start), n)
    chunk = -(-momenta.size // (os.cpu_count() or 1))
    yield "SciPy", lambda: list(pool.map(of_lane, momenta, chunksize=chunk))


def _lanes(n: int, counts: tuple[int, ...]) -> None:
    names = ("sweep", "less tracing", "loop", "vmap", "jaxopt", "SciPy")
    print(f"{'lanes':>6} " + " ".join(f"{name:>12}" for name in names))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        for count in counts:
            momenta = np.linspace(0, 0.95, count)
            took = {
                name: least_seconds(call, 3 if count < 2000 else 2)
                for name, call in _ways(momenta, n, pool)
            }
            took["less tracing"] = took["sweep"] - took.pop("tracing")
            cells = (f"{took[name] / count * 1e6:12.0f}" for name in names)
            print(f"{count:6} " + " ".join(cells), flush=True)


def _memory(kind: str) -> None:
    """In a process of its own."""
    optimizers = {"default": DEFAULT_OPTIMIZER, "robust": ROBUST_OPTIMIZER}
    scales = jnp.linspace(1, 100, SIZE)
    targets = np.random.default_rng(0).normal(size=100_000)
    before = _resident()
    took = seconds(
        lambda: (
            sweep(
                lambda x, target: jnp.sum(scales * jnp.cosh(x - target)),
                jnp.zeros(SIZE),
                targets,
                rtol=1e-8,
                optimizer=optimizers[kind],
                keep_states=kind == "default",
            ).value
        )
    )
    print(
        f"100,000 lanes, {kind:8} {took:6.1f} s, {_resident():5.2f} GiB "
        f"({before:.2f} before)"
    )


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    with jax.enable_x64():
        head = f"{'s of a sweep, s of one vmapped solve':36} {'steps':>11} "
        print(f"{head}{'sweep':>8} {'vmap':>8} {'ratio':>6} {'|loss|':>9}")
        _work(4096)
        _strategies(4096)
        print("\nmicroseconds a lane, n = 256")
        _lanes(256, (1, 4, 16, 64, 256, 1024, 4096))
    print()
    context = multiprocessing.get_context("spawn")
    for kind in ("default", "robust"):
        process = context.Process(target=_memory, args=(kind,))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"the process of {kind} ended with {process.exitcode}")


if __name__ == "__main__":
    main()
