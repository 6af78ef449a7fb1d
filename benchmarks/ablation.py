"""Which parts of `ROBUST_OPTIMIZER` matter?

Each part is replaced in turn, and the numbers are varied, on the unconstrained CUTEst
problems that are not solved by all these variants. `benchmarks.comparison` says
what that is.

* solved, said: how many problems are solved, and how many others wrongly said to be.
* evaluations: of the loss, with or without a gradient, on all problems together.
"""

from typing import Any

import jax
import optax

from jaxmf_opt import ROBUST_OPTIMIZER, robust

from .comparison import MAX_SIZE, run_cutest
from .peers import L_BFGS_B, Peer, ours, scipy_with
from .problems import unconstrained_cutest


def _robust(
    memory: int = 40,
    trials: int = 40,
    curvature: float = 0.9,
    ulps: float = 4.0,
    directions: Any = None,
    linesearch: Any = None,
    **options: float,
) -> optax.GradientTransformation:
    """`robust.robust_lbfgs`, with other numbers and parts."""
    directions = directions or robust.scale_by_robust_lbfgs(memory, **options)
    linesearch = linesearch or robust.scale_by_weak_wolfe_linesearch(
        trials, curv_rtol=curvature, ulps=ulps
    )
    return optax.chain(directions, optax.scale(-1.0), linesearch)


_ZOOM = optax.scale_by_zoom_linesearch(30, initial_guess_strategy="one")
OPTIONS: dict[str, dict[str, Any]] = {
    "directions of optax": {"directions": optax.scale_by_lbfgs(40)},
    "a zoom line search": {"linesearch": _ZOOM},
    **{f"memory {m}": {"memory": m} for m in (10, 20, 60)},
    "20 trials": {"trials": 20},
    **{f"curvature {c}": {"curvature": c} for c in (0.2, 0.5)},
    "no slack": {"ulps": 0.0},
    "first step of 1%": {"first_step": 0.01},
    "first step of any length": {"first_step": float("inf")},
    "units always": {"min_ratio": 1.0},
    "units never": {"min_ratio": float("inf")},
}
VARIANTS: dict[str, Peer] = {
    "ROBUST_OPTIMIZER": Peer(ours(ROBUST_OPTIMIZER)),
    **{name: Peer(ours(_robust(**options))) for name, options in OPTIONS.items()},
    "SciPy L-BFGS-B": L_BFGS_B,
    "SciPy BFGS": Peer(scipy_with("BFGS"), compiled=False, traceable=False),
}

HARD = frozenset(
    (
        *("COATING", "DJTL", "DMN15102LS", "DMN15103LS", "HEART6LS", "LUKSAN11LS"),
        *("MARATOSB", "MGH10LS", "MGH10SLS", "NELSONLS", "PENALTY3", "RAT42LS"),
    )
)


def main() -> None:
    with jax.enable_x64():
        problems = [p for p in unconstrained_cutest(MAX_SIZE) if p.name in HARD]
        results = run_cutest(VARIANTS, problems)
    print(
        f"{len(problems)} problems{'':19} {'solved':>6} {'said':>5} {'evaluations':>11}"
    )
    for name, of in results.items():
        solved = sum(r["solved"] for r in of.values())
        said = sum(r.get("says", False) and not r["solved"] for r in of.values())
        evaluations = sum(r.get("evaluations", 0) for r in of.values())
        unsolved = " ".join(p for p, r in of.items() if not r["solved"])
        print(f"{name:30} {solved:6} {said:5} {evaluations:11}  {unsolved}")


if __name__ == "__main__":
    main()
