"""Problems that no choice was made on: mechanisms of DP-MF, and larger ones of CUTEst.

    python -m benchmarks.heldout
    python -m benchmarks.heldout --cutest

Thirty mechanisms, drawn at random, by the robust optimizer and by optax's loop: all
families, 64 to 4,096 steps, 1 to 16 epochs, mean and largest errors, momenta. A solver
has solved a mechanism if a tolerance of a ladder leads to a loss within 1e-8,
relatively, of the least that was found, in at most 1,000 steps; its evaluations are
those of the cheapest such tolerance. The largest error of a dense mechanism has a kink
wherever two steps have the same error; there this library's solver is `minimax`, whose
limit of steps is one of each round.

CUTEst: the 54 unconstrained problems of sif2jax 0.0.8 with 201 to 5,000 variables, as
`benchmarks.comparison` solves the smaller ones.
"""

import sys
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxmf_opt import ROBUST_OPTIMIZER, minimax
from jaxmf_opt.mechanisms import (
    BandedInverseToeplitz,
    BandedToeplitz,
    BufferedToeplitz,
    Dense,
    NormalizedBandedToeplitz,
    workloads,
)

from . import report
from .common import progress
from .comparison import FTOL, MAX_SIZE, TOLERANCES, counted_end, run_cutest
from .peers import THEIRS, Peer, ours
from .problems import (
    Problem,
    errors_of_dense,
    of_dense,
    unconstrained_cutest,
    without_hyperparam,
)

COUNT = 30
LARGEST = 5000
# The others of the comparison solve far fewer of the smaller problems, or keep a dense
# matrix.
CUTEST_PEERS = ("optax.lbfgs in a loop", "jaxopt.LBFGS", "SciPy L-BFGS-B")


def drawn(count: int) -> Iterator[Problem]:
    """So many mechanisms."""
    rng = np.random.default_rng(0)
    kinds: list[Any] = [
        BandedToeplitz,
        NormalizedBandedToeplitz,
        BandedInverseToeplitz,
        BufferedToeplitz,
        Dense,
    ]
    for i in range(count):
        kind: Any = kinds[i % len(kinds)]
        n = int(2 ** rng.integers(6, 8 if kind is Dense else 13))
        epochs = int(2 ** rng.integers(0, 5))
        momentum = float(rng.choice([0.0, 0.5, 0.9]))
        bands = int(min(2 ** rng.integers(1, 6), n // epochs))
        options: dict[str, Any] = {
            "min_sep": n // epochs,
            "max_participations": epochs,
            "max_error": bool(rng.integers(2)),
        }
        name = f"{kind.__name__} n={n} k={epochs} momentum={momentum:g}"
        name += " max" if options["max_error"] else " mean"
        losses = None
        workload_coef = workloads.momentum(n, momentum)
        if kind is Dense:
            matrix = workloads.matrix(workload_coef)
            mechanism = Dense(n, workload_matrix=matrix, **options)
            loss, start = of_dense(mechanism)
            if options["max_error"]:
                losses = errors_of_dense(mechanism)
        else:
            options |= {"workload_coef": workload_coef, "fixed_epochs": bool(i % 2)}
            size = 1 + i % 3 if kind is BufferedToeplitz else bands
            mechanism = cast(Any, kind)(n, size, **options)
            name += f" size={size}" + (" fixed" if options["fixed_epochs"] else "")
            loss, start = mechanism.loss, mechanism.initial_params()
        yield Problem(name, without_hyperparam(loss), start, losses=losses)


def cutest() -> None:
    """Solves the larger problems of CUTEst, and prints how that went."""
    peers = {"ROBUST_OPTIMIZER": Peer(ours(ROBUST_OPTIMIZER))}
    peers |= {name: THEIRS[name] for name in CUTEST_PEERS}
    problems = [
        p for p in unconstrained_cutest(LARGEST) if jnp.size(p.start) > MAX_SIZE
    ]
    results: dict[str, dict[str, Any]] = {name: {} for name in peers}
    for problem in problems:
        cells = []
        for name, ends in run_cutest(peers, [problem]).items():
            results[name] |= ends
            end = ends[problem.name]
            cells.append(f"{name} {end['evaluations'] if end['solved'] else '-'}")
        print(f"{problem.name:<12}", *cells, flush=True)
    for name, (solved, false, evaluations) in report.of_cutest(results).items():
        print(
            f"{name}: solved {solved} of {len(problems)}, false convergence {false}, "
            f"evaluations over the least, median: {evaluations:.2f}"
        )


def main(arguments: list[str] | None = None) -> None:
    """Solves all mechanisms with both, and prints how that went."""
    jax.config.update("jax_enable_x64", True)
    if arguments == ["--cutest"]:
        cutest()
        return
    name_of_optax = "optax.lbfgs in a loop"
    peers = {
        "robust": Peer(ours(ROBUST_OPTIMIZER, "rtol")),
        "optax": THEIRS[name_of_optax],
    }
    needed: dict[str, list[float]] = {name: [] for name in peers}
    for problem in progress(list(drawn(COUNT)), "mechanisms", lambda p: p.name):
        loss = jax.jit(problem.loss)
        tried: dict[str, list[tuple[float, int]]] = {}
        for name, peer in peers.items():
            jax.clear_caches()
            tried[name] = []
            for tol in TOLERANCES:
                if problem.losses is not None and name == "robust":
                    least = minimax(problem.losses, problem.start, grad=True, rtol=tol)
                    point, evaluations = least.value, int(least.num_loss_evaluations)
                else:
                    end = counted_end(peer, problem, tol)
                    point, evaluations = jnp.asarray(end.point), end.evaluations
                reached = float(loss(point, problem.hyperparam))
                tried[name].append((reached, evaluations))
        best = min(reached for rows in tried.values() for reached, _ in rows)
        line = f"{problem.name:<62}"
        for name, rows in tried.items():
            good = [n for reached, n in rows if reached - best <= FTOL * abs(best)]
            needed[name].append(min(good, default=np.inf))
            gap = min(reached for reached, _ in rows) / best - 1
            line += f" {name} {needed[name][-1]:>6g}" + (
                "" if good else f" ({gap:.0e})"
            )
        print(line, flush=True)
    ratios = np.divide(needed["robust"], needed["optax"])
    for name, evaluations in needed.items():
        print(f"{name}: solved {np.isfinite(evaluations).sum()} of {COUNT}")
    print(f"evaluations, robust over optax, median: {np.nanmedian(ratios):.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
