"""What does a lane of a large batch cost, beside the peers that can make batches?

Banded Toeplitz strategies (n = 256, 16 bands) for momenta from 0 to 0.99, in one
compiled and vmapped call, as in `benchmarks.comparison`: the least time of all
tolerances with which every lane is within 1e-8, relatively, of the least loss found.
Once with the loss of this library, once with that of jax-privacy. "without a tolerance"
is `ROBUST_OPTIMIZER` with the default tolerances of `optimize`, which are 0: a lane
goes on until it stands still.
"""

import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy.matrix_factorization import toeplitz
from jaxtyping import Array

from jaxmf_opt import DEFAULT_OPTIMIZER, ROBUST_OPTIMIZER
from jaxmf_opt.mechanisms import workloads

from .comparison import run_batch
from .peers import THEIRS, Loss, Peer, ours
from .problems import Problem, banded

LANES = (64, 1024, 16_384)


def _without_a_tolerance(
    loss: Loss, start: Any, hyperparam: Any, tol: Any, steps: int
) -> Any:
    del tol
    return ours(ROBUST_OPTIMIZER)(loss, start, hyperparam, 0.0, steps)


SOLVERS: dict[str, Peer] = {
    "ROBUST_OPTIMIZER": Peer(ours(ROBUST_OPTIMIZER, "rtol")),
    "  without a tolerance": Peer(_without_a_tolerance, has_tolerance=False),
    "DEFAULT_OPTIMIZER": Peer(ours(DEFAULT_OPTIMIZER, "rtol")),
    "optax.lbfgs in a loop": THEIRS["optax.lbfgs in a loop"],
    "jaxopt.LBFGS": THEIRS["jaxopt.LBFGS"],
}


def _of_jax_privacy() -> Problem:
    def loss(coef: Array, momentum: Any) -> Array:
        errors = toeplitz.per_query_error(
            strategy_coef=coef,
            n=256,
            workload_coef=workloads.momentum(256, momentum),
            skip_checks=True,
        )
        return jnp.mean(errors) * toeplitz.sensitivity_squared(coef)

    return banded(256, 16)._replace(name="the loss of jax-privacy", loss=loss)


def main(arguments: list[str]) -> None:
    """Prints a table for each loss; the numbers of lanes may be given."""
    counts = [int(x) for x in arguments] or LANES
    with jax.enable_x64():
        for problem in (banded(256, 16), _of_jax_privacy()):
            print(f"{problem.name:24} {'lanes':>6} {'ms':>9} {'over best peer':>14}")
            for lanes in counts:
                results = run_batch(SOLVERS, problem, lanes)
                times = {name: of.get("ms", math.nan) for name, of in results.items()}
                best = np.nanmin([times[name] for name in THEIRS if name in times])
                for name in SOLVERS:
                    ms = times[name]
                    row = f"{name:24} {lanes:6} {ms:9.1f} {ms / best:14.2f}"
                    print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
