"""Which solver is best at what? One table, of this library and of all its neighbours.

CUTEst: the 126 unconstrained problems of sif2jax 0.0.8 with up to 200 variables, 1,000
steps each. Each solver stops by a criterion of its own, at 1e-5: the largest element of
the gradient (this library, jax-privacy by a callback, SciPy), its norm (optax, jaxopt),
or the Cauchy criterion (optimistix). `ROBUST_OPTIMIZER` was chosen with sight of these
problems; `benchmarks.heldout` has others.

* solved: the largest element of the gradient is at most 1e-5 max(1, |f|), or the loss
  is within 1e-8, relatively, of the least that any solver of the run has found.
* false convergence: on how many of the others a solver says that it has converged.
  (jax-privacy does not say.)
* evaluations: executions of the loss, over the least that any solver needed; the median
  of all problems, an unsolved one counting as infinite.

DP-MF: seven mechanisms of all families, 1,000 steps each. A mechanism is solved by a
solver if a tolerance of a ladder leads to a loss within 1e-8, relatively, of the least
that was found. Numbers are those of the fastest such tolerance.

* evaluations: as above.
* cold, warm: seconds of a first call, compilation included, and of a later one, over
  those of the fastest solver; medians as above.
* 64 lanes: milliseconds for 64 momenta of a banded Toeplitz strategy (n = 256, 16
  bands), every lane of them solved, in one vmapped call (SciPy: one after the other).
* derivative: how far the derivative of a ratio of coefficients with respect to the
  momentum is, relatively, from one by linear algebra on the Hessian; milliseconds of
  it. By reverse mode, or by forward mode if that raises or is NaN.

`python -m benchmarks.comparison` takes half an hour to an hour and writes a JSON file
and pictures into `out/`; `--quick` takes the first three problems of each kind. `--show
FILE` prints the table of such a file; that in `README.md` here is of
`benchmarks/comparison.json`.
"""

import argparse
import functools
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from . import profiles, report
from .common import least_seconds, progress, seconds, timed
from .flags import COMPILE_QUICKLY, known
from .peers import OURS, THEIRS, Loss, Peer, ours
from .problems import Problem, banded, mechanisms, unconstrained_cutest

MAX_SIZE, MAX_STEPS, GTOL, FTOL = 200, 1000, 1e-5, 1e-8
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
PATIENCE = 10.0  # seconds, after which no smaller tolerance is tried
LANES = 64
PACKAGES = ("jax", "optax", "optimistix", "jaxopt", "scipy", "jax-privacy", "sif2jax")


@functools.cache
def quickly() -> dict[str, Any]:
    """To compile in a third of the time, with other roundings.

    They are enough to solve one of so many problems or not.
    """
    return known(COMPILE_QUICKLY)


class End(NamedTuple):
    """How a solver has ended."""

    point: np.ndarray
    says: bool | None
    evaluations: int


def call_of(peer: Peer, loss: Loss, steps: int, **options: Any) -> Callable[..., Any]:
    """A solver as a function of start, hyperparameter and tolerance."""

    def call(start: Any, hyperparam: Any, tol: Any) -> Any:
        return peer.solve(loss, start, hyperparam, tol, steps)

    return jax.jit(call, **options) if peer.compiled else call


def counted_end(peer: Peer, problem: Problem, tol: float, **options: Any) -> End:
    """The end of a solve, and how many evaluations it took."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    def counted(y: Any, hyperparam: Any) -> Any:
        jax.debug.callback(tick)
        return problem.loss(y, hyperparam)

    call = call_of(peer, counted, MAX_STEPS, **options)
    point, says = call(problem.start, problem.hyperparam, tol)
    point = np.asarray(point)
    jax.effects_barrier()
    return End(point, None if says is None else bool(says), count)


def attempt(call: Callable[[], Any]) -> Any:
    """What a call returns, or the name of what it raises."""
    try:
        return call()
    except Exception as e:
        return type(e).__name__


# CUTEst.


def run_cutest(peers: Mapping[str, Peer], problems: list[Problem]) -> dict[str, Any]:
    """For each solver and problem: solved, what it says, evaluations."""
    results: dict[str, dict[str, Any]] = {name: {} for name in peers}
    for problem in progress(problems, "CUTEst", lambda p: p.name):
        both = jax.jit(jax.value_and_grad(problem.loss), compiler_options=quickly())
        ends, at_end = {}, {}
        for name, peer in peers.items():
            options = {"compiler_options": quickly()} if peer.compiled else {}
            end = attempt(
                functools.partial(counted_end, peer, problem, GTOL, **options)
            )
            if isinstance(end, str):
                results[name][problem.name] = {"solved": False, "raised": end}
                continue
            loss, grad = both(jnp.asarray(end.point), problem.hyperparam)
            ends[name], at_end[name] = end, (float(loss), np.asarray(grad))
        best = np.nanmin([loss for loss, _ in at_end.values()])
        for name, end in ends.items():
            loss, grad = at_end[name]
            small = np.abs(grad).max() <= GTOL * max(1.0, abs(loss))
            results[name][problem.name] = {
                "solved": bool(small or loss - best <= FTOL * abs(best)),
                "says": end.says,
                "evaluations": end.evaluations,
            }
        jax.clear_caches()
    return results


# Mechanisms of DP-MF.


def run_mechanisms(
    peers: Mapping[str, Peer], problems: list[Problem]
) -> dict[str, Any]:
    """For each solver and problem: tolerance, evaluations, cold and warm seconds."""
    results: dict[str, dict[str, Any]] = {name: {} for name in peers}
    for problem in progress(problems, "mechanisms", lambda p: p.name):
        loss = jax.jit(problem.loss)
        tried: dict[str, list[dict[str, Any]]] = {}
        for name, peer in peers.items():
            jax.clear_caches()
            call = functools.partial(
                call_of(peer, problem.loss, MAX_STEPS),
                *(problem.start, problem.hyperparam),
            )
            cold = seconds(functools.partial(call, 1e-6))
            tried[name] = []
            for tol in TOLERANCES:
                (point, _), took = timed(functools.partial(call, tol))
                reached = float(loss(jnp.asarray(point), problem.hyperparam))
                row = {"tol": tol, "loss": reached, "cold": cold, "warm": took}
                tried[name].append(row)
                if took > PATIENCE:
                    break
        best = min(row["loss"] for rows in tried.values() for row in rows)
        for name, rows in tried.items():
            good = [row for row in rows if row["loss"] - best <= FTOL * abs(best)]
            gap = min(row["loss"] for row in rows) / best - 1
            result = {"solved": bool(good), "gap": gap}
            if good:
                result |= min(good, key=lambda row: row["warm"])
                end = counted_end(peers[name], problem, result["tol"])
                result["evaluations"] = end.evaluations
            results[name][problem.name] = result
    return results


def run_batch(
    peers: Mapping[str, Peer], problem: Problem, lanes: int
) -> dict[str, Any]:
    """For each solver: the milliseconds of a batch, every lane of which is solved."""
    momenta = jnp.linspace(0.0, 0.99, lanes)
    losses = jax.jit(jax.vmap(problem.loss))
    both = jax.jit(jax.vmap(jax.value_and_grad(problem.loss), (None, 0)))
    evaluation = least_seconds(lambda: both(problem.start, momenta))
    tried: dict[str, Any] = {}
    for name, peer in progress(list(peers.items()), "lanes", lambda p: p[0]):

        def every(momenta: Any, tol: Any, peer: Peer = peer) -> Any:
            def one(momentum: Any) -> Any:
                return peer.solve(problem.loss, problem.start, momentum, tol, 250)[0]

            if peer.traceable:
                return jax.vmap(one)(momenta)
            return jnp.stack([one(m) for m in momenta])

        call = jax.jit(every) if peer.compiled else every
        # Compiles it, and hardly more by this tolerance.
        attempt(functools.partial(seconds, functools.partial(call, momenta, 1e3)))
        tried[name] = []
        # One is enough where it is not seen, by a traced solver in Python for example.
        blind = not peer.has_tolerance or (peer.traceable and not peer.compiled)
        for tol in TOLERANCES[-1:] if blind else TOLERANCES:
            batch = functools.partial(call, momenta, tol)
            enough = 5.0 if peer.compiled else 0.0
            outcome = attempt(functools.partial(timed, batch, 3, enough))
            if isinstance(outcome, str):
                tried[name] = outcome
                break
            points, took = outcome
            reached = np.asarray(losses(points, momenta))
            tried[name].append((took, tol, reached))
    reached = [r[2] for rows in tried.values() if isinstance(rows, list) for r in rows]
    best = np.min(reached, axis=0)
    results: dict[str, Any] = {"one value and gradient": {"ms": 1e3 * evaluation}}
    for name, rows in tried.items():
        if isinstance(rows, str):
            results[name] = {"raised": rows}
            continue
        good = [row for row in rows if np.all(row[2] - best <= FTOL * np.abs(best))]
        took, tol, _ = min(good, default=(math.nan, math.nan, None), key=lambda r: r[0])
        worst = min(float(np.max(row[2] / best - 1)) for row in rows)
        results[name] = {"ms": 1e3 * took, "tol": tol, "gap": worst}
    return results


def ratio_of(point: Array) -> Array:
    """A function of coefficients that does not depend on their scale."""
    return point[4] / point[0]


def reference_derivative(problem: Problem, point: Array) -> float:
    """By the implicit function theorem, with the first coefficient held at 1.

    The loss does not depend on the scale of the coefficients, so its Hessian in the
    others is regular, and linear algebra does the rest.
    """
    rest = np.asarray(point[1:] / point[0])

    def loss(rest: Array, momentum: Any) -> Array:
        return problem.loss(jnp.concatenate([jnp.ones(1), rest]), momentum)

    gradient, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    for _ in range(5):  # Newton's method, so that the point is exact
        step = np.linalg.solve(
            hessian(rest, problem.hyperparam), gradient(rest, problem.hyperparam)
        )
        rest = rest - step
    mixed = jax.jacfwd(jax.grad(loss), 1)(rest, problem.hyperparam)
    return float(-np.linalg.solve(hessian(rest, problem.hyperparam), mixed)[3])


def run_derivative(peers: Mapping[str, Peer]) -> dict[str, Any]:
    """For each solver: the error of a derivative, and milliseconds of it."""
    problem = banded(128, 16)
    point, _ = call_of(peers["ROBUST_OPTIMIZER"], problem.loss, 250)(
        problem.start, problem.hyperparam, 1e-8
    )
    exact = reference_derivative(problem, point)
    results = {}
    for name, peer in progress(list(peers.items()), "derivatives", lambda p: p[0]):

        def ratio(momentum: Any, peer: Peer = peer) -> Any:
            point, _ = peer.solve(problem.loss, problem.start, momentum, 1e-8, 250)
            return ratio_of(jnp.asarray(point))

        for mode, transform in (("reverse", jax.grad), ("forward", jax.jacfwd)):
            of = transform(ratio)
            call = functools.partial(
                jax.jit(of) if peer.compiled else of, problem.hyperparam
            )
            derivative = attempt(call)
            if isinstance(derivative, str):
                results[name] = {"raised": derivative}
                continue
            error = abs(float(derivative) / exact - 1)
            # What is not compiled as a whole compiles its parts at every call.
            took = least_seconds(call, 3) if peer.compiled else seconds(call)
            results[name] = {"error": error, "ms": 1e3 * took, "mode": mode}
            if math.isfinite(error):
                break
    return results


# The whole.


def measure(quick: bool) -> dict[str, Any]:
    """All results, as they are written into the JSON file."""
    few = slice(3 if quick else None)
    by_gradient = {name: Peer(ours(optimizer)) for name, optimizer in OURS.items()}
    by_rtol = {name: Peer(ours(o, "rtol")) for name, o in OURS.items()}
    cpu = jax.devices("cpu")[0]
    versions = {name: metadata.version(name) for name in PACKAGES}
    results: dict[str, Any] = {"versions": versions, "cores": os.cpu_count()}
    results["python"] = platform.python_version()
    with jax.enable_x64(), jax.default_device(cpu):
        peers = by_rtol | THEIRS
        results["mechanisms"] = run_mechanisms(peers, list(mechanisms())[few])
        results["batch"] = run_batch(peers, banded(256, 16), LANES)
        results["derivative"] = run_derivative(peers)
        problems = list(unconstrained_cutest(MAX_SIZE))[few]
        results["cutest"] = run_cutest(by_gradient | THEIRS, problems)
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--show", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args(arguments)
    if options.show:
        print(report.table(json.loads(options.show.read_text())))
        return
    results = measure(options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, separators=(",", ":"))
    (options.out / "comparison.json").write_text(text)
    profiles.draw(
        {
            "CUTEst: evaluations": report.ratios(results["cutest"], "evaluations"),
            "DP-MF: time of a warm call": report.ratios(results["mechanisms"], "warm"),
        },
        options.out / "comparison.png",
    )
    print(report.table(results), end="\n\n")
    print(*report.details(results), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
