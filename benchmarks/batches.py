"""What does a batch cost, compared with the solvers of others?

64 workloads, n = 256, 16 bands, one compiled program (SciPy: a loop over the lanes).
Compilation is not counted. Each solver is run with several tolerances; shown are those
whose loss is in every lane within 1e-9, relatively, of the best that any of them found.

* ms: the minimum of some runs.
* / floor: the time over that of (steps of the slowest lane) x (one batched value and
  gradient). optimistix's BFGS and LBFGS count every trial as a step.
* ours / best: ratio to the fastest of the others.

The last row is a solve without tolerances. It has to end with the bits of one that
takes all its steps, so it searches on where there is nothing left to be found.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optimistix as optx
import scipy.optimize
from jaxtyping import Array

from jaxmf_opt import solve
from jaxmf_opt.losses import BandedToeplitz, workloads

from .common import seconds

N, BANDS, LANES, REPEATS = 256, 16, 64, 5
GAP = 1e-9
TOLERANCES = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)


def _loss(coef: Array, workload: Array) -> Array:
    return BandedToeplitz(N, BANDS, workload_coef=workload).loss(coef)


class Row(NamedTuple):
    """A solver with a tolerance, and how it did."""

    name: str
    seconds: float
    losses: np.ndarray
    steps: int


def _least_seconds(call: Callable[[], Any]) -> float:
    seconds(call)
    return min(seconds(call) for _ in range(REPEATS))


def _batched(one: Callable[[Array], tuple[Array, Any]], coefs: Array) -> Any:
    program = jax.jit(jax.vmap(one))
    return lambda: program(coefs)


def _ours(start: Array, **options: Any) -> Callable[[Array], tuple[Array, Any]]:
    def one(workload: Array) -> tuple[Array, Any]:
        solution = solve(lambda coef: _loss(coef, workload), start, **options)
        return solution.value, solution.stats["num_steps"]

    return one


def _solvers(start: Array, coefs: Array) -> Iterator[tuple[str, Any]]:
    for tol in TOLERANCES:
        yield f"jaxmf_opt {tol:.0e}", _batched(_ours(start, rtol=tol), coefs)
    for tol in TOLERANCES:
        solver = jaxopt.LBFGS(_loss, tol=tol, maxiter=250, implicit_diff=True)

        def of_jaxopt(workload: Array, solver: Any = solver) -> tuple[Array, Any]:
            end = solver.run(start, workload)
            return end.params, end.state.iter_num

        yield f"jaxopt.LBFGS {tol:.0e}", _batched(of_jaxopt, coefs)
    for kind in (optx.BFGS, optx.LBFGS):
        for tol in TOLERANCES:
            solver = kind(rtol=tol, atol=tol)

            def of_optx(workload: Array, solver: Any = solver) -> tuple[Array, Any]:
                end = optx.minimise(
                    _loss, solver, start, workload, max_steps=1000, throw=False
                )
                return end.value, end.stats["num_steps"]

            name = f"optimistix.{kind.__name__} {tol:.0e}"
            yield name, _batched(of_optx, coefs)
    both = jax.jit(jax.value_and_grad(_loss))
    for tol in TOLERANCES[2:]:

        def of_scipy(tol: float = tol) -> tuple[np.ndarray, np.ndarray]:
            ends = [
                scipy.optimize.minimize(
                    lambda x, w: [np.asarray(a) for a in both(x, w)],
                    np.asarray(start),
                    args=(workload,),
                    jac=True,
                    method="L-BFGS-B",
                    options={"ftol": 1e-15, "gtol": tol},
                )
                for workload in coefs
            ]
            return np.stack([e.x for e in ends]), np.array([e.nit for e in ends])

        yield f"SciPy L-BFGS-B {tol:.0e}", of_scipy
    yield "jaxmf_opt, no tolerance", _batched(_ours(start), coefs)


def main() -> None:
    with jax.enable_x64():
        momenta = jnp.linspace(0.0, 0.99, LANES)
        coefs = jax.vmap(lambda m: workloads.momentum(N, m))(momenta)
        start = BandedToeplitz(N, BANDS).initial_params()
        starts = jnp.tile(start, (LANES, 1))
        both = jax.jit(jax.vmap(jax.value_and_grad(_loss)))
        evaluation = _least_seconds(lambda: both(starts, coefs))
        losses = jax.jit(jax.vmap(_loss))
        rows = []
        for name, call in _solvers(start, coefs):
            value, steps = call()
            reached = np.asarray(losses(jnp.asarray(value), coefs))
            rows.append(Row(name, _least_seconds(call), reached, int(np.max(steps))))
    best = np.min([row.losses for row in rows], axis=0)
    good = [row for row in rows if np.max(row.losses / best - 1) <= GAP]
    print(f"one batched value and gradient: {evaluation * 1e3:.2f} ms")
    print(f"{'':28} {'ms':>8} {'steps':>6} {'/ floor':>8}")
    fastest: dict[str, Row] = {}
    for row in good:
        floor = row.steps * evaluation
        print(
            f"{row.name:28} {row.seconds * 1e3:8.1f} {row.steps:6} "
            f"{row.seconds / floor:8.2f}"
        )
        solver = row.name.rpartition(" ")[0]
        kept = fastest.setdefault(solver, row)
        fastest[solver] = min(kept, row, key=lambda r: r.seconds)
    ours = fastest.pop("jaxmf_opt")
    del fastest["jaxmf_opt, no"]
    theirs = min(fastest.values(), key=lambda r: r.seconds)
    ratio = ours.seconds / theirs.seconds
    print(f"ours / best: {ratio:.2f}  ({ours.name} / {theirs.name})")


if __name__ == "__main__":
    main()
