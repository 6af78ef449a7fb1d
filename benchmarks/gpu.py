"""Is it right on a GPU, and what is a GPU good for?

    python -m benchmarks.gpu [--cpu] [--seconds 420]

First what a program computes there is compared, in float64, with the CPU of the same
machine or with a closed form: values, derivatives, callbacks, sweeps, mechanisms. Then
come times of warm calls in milliseconds, and the CPU's over the GPU's:

* batches of a Toeplitz strategy (n = 256, 16 bands, momenta from 0 to 0.95): a sweep, a
  jitted and vmapped solve, and jaxopt's L-BFGS in a vmap;
* ten steps of a dense strategy, for 512 and 1,024 training steps.

What would not be done after the given seconds is left out, and is said to be. With
`--cpu` a second device of the CPU takes the part of the GPU. The exit status is 1 if
something is not right.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
from jaxtyping import Array, PyTree

from jaxmf_opt import CallbackArgs, optimize, solve, sweep, traced
from jaxmf_opt.mechanisms import (
    BandedInverseToeplitz,
    BandedToeplitz,
    BufferedToeplitz,
    Dense,
    workloads,
)

from .common import seconds

N, BANDS, RTOL = 256, 16, 1e-6
LANES = (64, 1024, 8192, 65_536)
DENSE = (512, 1024)


# What is to be right.


class Check(NamedTuple):
    """Something to compute.

    Attributes:
      call: Computes it.
      tolerance: By how much its numbers may be off, relatively to the largest of them.
      expected: What it should be, if not what the CPU makes of it.
    """

    call: Callable[[], PyTree]
    tolerance: float
    expected: PyTree = None


def _toeplitz(coef: Array, momentum: Array | float) -> Array:
    workload_coef = workloads.momentum(N, momentum)
    return BandedToeplitz(N, BANDS, workload_coef=workload_coef).loss(coef)


def _start() -> Array:
    return BandedToeplitz(N, BANDS).initial_params()


def _root(c: Array | float) -> Array:
    """The real root of y^3 + y = c: a minimum, and a function of `c`."""
    loss = lambda y: y**4 / 4 + y**2 / 2 - c * y  # noqa: E731
    return optimize(loss, jnp.zeros(()), gtol=1e-13)


def _losses_seen(program: str) -> list[float]:
    """The losses that a callback is handed, in an eager call or a compiled one."""
    losses: list[float] = []

    def callback(info: CallbackArgs) -> None:
        losses.append(float(info.loss))

    def run(start: Array) -> Array:
        loss = functools.partial(_toeplitz, momentum=0.9)
        return optimize(loss, start, callback=callback, max_optimizer_steps=12)

    run = jax.jit(run) if program == "compiled" else run
    jax.block_until_ready(run(_start()))
    return losses


def _stopped_by_a_traced_callback() -> PyTree:
    enough = traced(lambda info: info.loss < 12.0)
    loss = functools.partial(_toeplitz, momentum=0.9)
    solution = jax.jit(lambda x: solve(loss, x, rtol=0.0, callback=enough))(_start())
    return solution.stats["loss"], solution.stats["num_steps"]


def _swept() -> PyTree:
    momenta = np.linspace(0, 0.95, 24)
    solution = sweep(_toeplitz, _start(), momenta, rtol=1e-10, batch_size=8)
    return solution.stats["loss"]


def _mechanisms() -> Iterator[tuple[str, Any]]:
    epochs: dict[str, Any] = {"min_sep": 64, "max_participations": 4}
    yield "banded Toeplitz", BandedToeplitz(N, BANDS, min_sep=64, max_participations=4)
    yield "banded inverse", BandedInverseToeplitz(N, 8, **epochs)
    yield "buffered (BLT)", BufferedToeplitz(N, 3, **epochs)
    yield "dense", Dense(64, min_sep=16, max_participations=4)


def _loss_and_gradient(mechanism: Any, params: Array) -> tuple[Array, Array]:
    if isinstance(mechanism, Dense):
        return mechanism.loss_and_gradient(params)
    return jax.value_and_grad(lambda x: mechanism.loss(x))(params)


def _evaluated(mechanism: Any) -> PyTree:
    both = jax.jit(functools.partial(_loss_and_gradient, mechanism))
    return both(mechanism.initial_params())


def _optimised(mechanism: Any, steps: int = 100) -> Array:
    both = functools.partial(_loss_and_gradient, mechanism)
    limits: dict[str, Any] = {"rtol": 1e-10, "max_optimizer_steps": steps}
    start = mechanism.initial_params()
    return solve(both, start, grad=True, **limits).stats["loss"]


def checks() -> Iterator[tuple[str, Check]]:
    """All that is to be right."""
    banded = functools.partial(_toeplitz, momentum=0.9)
    # For c = 2 the root is 1, and its derivatives are those of an inverse function.
    yield (
        "value",
        Check(lambda: solve(banded, _start(), rtol=1e-10).stats["loss"], 1e-9),
    )
    yield "closed form", Check(lambda: jax.jit(_root)(2.0), 1e-12, 1.0)
    yield "grad", Check(lambda: jax.jit(jax.grad(_root))(2.0), 1e-11, 1 / 4)
    yield "jacfwd", Check(lambda: jax.jacfwd(_root)(2.0), 1e-11, 1 / 4)
    yield "hessian", Check(lambda: jax.jit(jax.hessian(_root))(2.0), 1e-10, -3 / 32)
    cs = np.array([2.0, 10.0, 30.0, 68.0])  # of the roots 1, 2, 3 and 4
    slopes = 1 / (3 * np.arange(1.0, 5.0) ** 2 + 1)
    batch = jax.vmap(jax.value_and_grad(_root))
    # (The loss, -184, has no digits left that would tell the last root to 1e-9.)
    yield "vmap of grad", Check(lambda: batch(cs), 1e-8, (np.arange(1.0, 5.0), slopes))
    scanned = jax.grad(lambda c: jnp.sum(jax.lax.map(_root, c)))
    yield "grad of map", Check(lambda: jax.jit(scanned)(cs), 1e-8, slopes)
    for program in ("eager", "compiled"):
        call = functools.partial(_losses_seen, program)
        yield f"host callback, {program}", Check(call, 1e-9)
    yield "traced callback", Check(_stopped_by_a_traced_callback, 1e-9)
    yield "sweep", Check(_swept, 1e-9)
    for name, mechanism in _mechanisms():
        evaluated = functools.partial(_evaluated, mechanism)
        yield f"{name}: loss and gradient", Check(evaluated, 1e-10)
        optimised = functools.partial(_optimised, mechanism)
        yield f"{name}: optimised", Check(optimised, 1e-6)


def _error(got: PyTree, want: PyTree) -> float:
    """The largest difference, relatively to the largest number of the array."""
    gots, wants = jax.tree.leaves(got), jax.tree.leaves(want)
    if len(gots) != len(wants):
        return np.inf

    def off(x: Any, y: Any) -> float:
        x, y = np.asarray(x, "float64"), np.asarray(y, "float64")
        if x.shape != y.shape or not np.all(np.isfinite(x)):
            return np.inf
        return float(np.max(np.abs(x - y)) / max(float(np.max(np.abs(y))), 1e-300))

    return max(map(off, gots, wants))


def check_all(device: Any, cpu: Any) -> bool:
    """Whether all is right on a device, each check by itself."""
    good = True
    for name, check in checks():
        try:
            with jax.default_device(device):
                got = jax.device_get(check.call())
            want = check.expected
            if want is None:
                with jax.default_device(cpu):
                    want = jax.device_get(check.call())
            error = _error(got, want)
            right = error <= check.tolerance
            said = f"{error:.0e} off, {check.tolerance:.0e} allowed"
        except Exception as exception:
            right, said = False, f"{type(exception).__name__}: {exception}"
        good &= right
        print(f"{'right' if right else 'WRONG':6} {name:34} {said}", flush=True)
    return good


# What is to be fast.


def _sweeping(momenta: Array) -> PyTree:
    return sweep(_toeplitz, _start(), momenta, rtol=RTOL).stats["loss"]


@jax.jit
def _vmapped(momenta: Array) -> PyTree:
    start = _start()

    def one(momentum: Array) -> Array:
        loss = functools.partial(_toeplitz, momentum=momentum)
        return solve(loss, start, rtol=RTOL).stats["loss"]

    return jax.vmap(one)(momenta)


@jax.jit
def _of_jaxopt(momenta: Array) -> PyTree:
    start = _start()
    solver = jaxopt.LBFGS(_toeplitz, tol=1e-4, maxiter=250)
    return jax.vmap(lambda m: solver.run(start, m).state.value)(momenta)


class Row(NamedTuple):
    """Something to time.

    Attributes:
      kind: What rows of several sizes have in common.
      size: The size.
      call: What is timed.
    """

    kind: str
    size: int
    call: Callable[[], PyTree]


def _rows() -> Iterator[Row]:
    for n in DENSE:
        dense = jax.jit(functools.partial(_optimised, Dense(n), 10))
        yield Row("dense strategy, 10 steps", n, dense)
    ways = {"sweep": _sweeping, "vmap": _vmapped, "jaxopt": _of_jaxopt}
    for lanes in LANES:
        for name, way in ways.items():
            momenta = np.linspace(0, 0.95, lanes)
            yield Row(f"Toeplitz, {name}", lanes, functools.partial(way, momenta))


class Clock:
    """Times calls as long as there is time.

    Attributes:
      end: When there is none left, as `time.monotonic` has it.
    """

    def __init__(self, end: float):
        self.end = end
        self._last: dict[tuple[str, str], tuple[int, float, float]] = {}

    def ms(self, where: str, row: Row) -> float | None:
        """Milliseconds of a warm call, or None if it would take too long.

        Args:
          where: On which device.
          row: What is timed. How long it will take is foretold by what the last row of
            its kind took to compile and to run, and by what there is to do of both.
        """
        size, compiling, warm = self._last.get((where, row.kind), (row.size, 0.0, 0.0))
        growth = (row.size / size) ** (3 if "dense" in row.kind else 1)
        if compiling + 3 * growth * warm > (self.end - time.monotonic()) / 2:
            return None
        first = seconds(row.call)
        warm = min(seconds(row.call) for _ in range(2))
        self._last[where, row.kind] = row.size, max(first - warm, 0.0), warm
        return 1e3 * warm


def time_all(device: Any, cpu: Any, clock: Clock) -> None:
    """Prints a table of times."""
    head = f"{'':24} {'size':>6} {'ms there':>10} {'ms on CPU':>10} {'CPU / there':>11}"
    print(head, flush=True)
    for row in _rows():
        times: list[float | None] = []
        for where, on in (("there", device), ("CPU", cpu)):
            try:
                with jax.default_device(on):
                    times.append(clock.ms(where, row))
            except Exception as exception:  # too little memory, for example
                print(f"{row.kind} {row.size}, {where}: {type(exception).__name__}")
                times.append(None)
        there, here = times
        cells = [f"{t:10.1f}" if t else f"{'left out':>10}" for t in times]
        ratio = f"{here / there:11.2f}" if here and there else f"{'-':>11}"
        print(f"{row.kind:24} {row.size:6} {' '.join(cells)} {ratio}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Checks, then times; 1 if something is not right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="without a GPU")
    parser.add_argument("--seconds", type=float, default=420.0, help="for all of it")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    if options.cpu:
        jax.config.update("jax_num_cpu_devices", 2)
        jax.config.update("jax_platforms", "cpu")
    cpu, *others = jax.devices("cpu")
    device = others[0] if options.cpu else jax.devices()[0]
    if device.platform == "cpu" and not options.cpu:
        print("JAX sees no GPU here. `--cpu` runs it without one.", file=sys.stderr)
        return 2
    print(f"JAX {jax.__version__} on {device.device_kind}, and on a CPU")
    with jax.enable_x64():
        good = check_all(device, cpu)
        print(f"({time.monotonic() - begin:.0f} s)", flush=True)
        time_all(device, cpu, Clock(begin + options.seconds))
    print(f"{time.monotonic() - begin:.0f} s in all")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
