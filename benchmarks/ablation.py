"""Which parts of `ROBUST_OPTIMIZER` matter?

Each part is left out in turn, and the numbers are varied, on the unconstrained CUTEst
problems that are not solved by all these variants. `benchmarks.comparison` says
what that is.

* solved, said: how many problems are solved, and how many others wrongly said to be.
* evaluations: of the loss, with or without a gradient, on all problems together.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxmf_opt import ROBUST_OPTIMIZER, robust

from .comparison import MAX_SIZE, run_cutest
from .peers import L_BFGS_B, Peer, ours, scipy_with
from .problems import unconstrained_cutest


def _robust(without: str = "", **options: Any) -> optax.GradientTransformation:
    """`robust.robust_lbfgs`, written out with one of its parts left out."""

    def part(name: str, wrap: Callable[..., Any], inner: Any, *more: Any) -> Any:
        return inner if name == without else wrap(inner, *more)

    numbers = {"memory_size": 40, "trials": 40, "curv_rtol": 0.9, "ulps": 4.0}
    numbers |= {"fraction": 0.1, "min_ratio": 100.0}
    memory, trials, curvature, ulps, fraction, ratio = (numbers | options).values()
    lbfgs = optax.scale_by_lbfgs(memory)
    lbfgs = part("skip_bad_pairs", robust.skip_bad_pairs, lbfgs)
    lbfgs = part("rescale_variables", robust.rescale_variables, lbfgs, ratio)
    lbfgs = part("restart_when_stuck", robust.restart_when_stuck, lbfgs)
    lbfgs = part("short_first_step", robust.short_first_step, lbfgs, fraction)
    search = robust.scale_by_weak_wolfe_linesearch(
        trials, curv_rtol=curvature, ulps=ulps
    )
    return optax.chain(lbfgs, optax.scale(-1.0), search)


def _by_zoom() -> optax.GradientTransformation:
    """With optax's own line search."""
    lbfgs = robust.skip_bad_pairs(optax.scale_by_lbfgs(40))
    lbfgs = robust.restart_when_stuck(robust.rescale_variables(lbfgs))
    zoom = optax.scale_by_zoom_linesearch(30, initial_guess_strategy="one")
    return optax.chain(robust.short_first_step(lbfgs), optax.scale(-1.0), zoom)


PARTS = ("skip_bad_pairs", "rescale_variables", "restart_when_stuck")
VARIANTS: dict[str, Peer] = {
    "ROBUST_OPTIMIZER": Peer(ours(ROBUST_OPTIMIZER)),
    **{f"without {name}": Peer(ours(_robust(name))) for name in PARTS},
    "without short_first_step": Peer(ours(_robust("short_first_step"))),
    "with a zoom line search": Peer(ours(_by_zoom())),
    **{f"memory {m}": Peer(ours(_robust(memory_size=m))) for m in (10, 20, 60)},
    "20 trials": Peer(ours(_robust(trials=20))),
    **{f"curvature {c}": Peer(ours(_robust(curv_rtol=c))) for c in (0.2, 0.5)},
    "no slack": Peer(ours(_robust(ulps=0.0))),
    "first step of 1%": Peer(ours(_robust(fraction=0.01))),
    "units always": Peer(ours(_robust(min_ratio=1.0))),
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
