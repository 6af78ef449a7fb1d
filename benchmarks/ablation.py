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

    numbers = {"memory_size": 40, "max_linesearch_steps": 30, "curv_rtol": 0.2}
    numbers |= {"min_ratio": 100.0}
    memory, trials, curvature, ratio = (numbers | options).values()
    lbfgs = optax.scale_by_lbfgs(memory)
    lbfgs = part("skip_bad_pairs", robust.skip_bad_pairs, lbfgs)
    lbfgs = part("rescale_variables", robust.rescale_variables, lbfgs, ratio)
    lbfgs = part("restart_when_stuck", robust.restart_when_stuck, lbfgs)
    lbfgs = part("short_first_step", robust.short_first_step, lbfgs)

    def search(rtol: Any) -> Any:
        zoom: Any = optax.scale_by_zoom_linesearch(
            trials,
            curv_rtol=curvature,
            approx_dec_rtol=rtol,
            initial_guess_strategy="one",
        )
        zoom = part("finite_trials", robust.finite_trials, zoom)
        return part("refuse_uphill", robust.refuse_uphill, zoom, rtol)

    if without == "rounding_floor":
        return optax.chain(lbfgs, optax.scale(-1.0), search(1e-6))
    return optax.chain(lbfgs, optax.scale(-1.0), robust.rounding_floor(search))


PARTS = (
    *("skip_bad_pairs", "rescale_variables", "restart_when_stuck", "short_first_step"),
    *("finite_trials", "refuse_uphill", "rounding_floor"),
)
VARIANTS: dict[str, Peer] = {
    "ROBUST_OPTIMIZER": Peer(ours(ROBUST_OPTIMIZER)),
    **{f"without {name}": Peer(ours(_robust(name))) for name in PARTS},
    **{f"memory {m}": Peer(ours(_robust(memory_size=m))) for m in (10, 20, 60)},
    "20 trials": Peer(ours(_robust(max_linesearch_steps=20))),
    **{f"curvature {c}": Peer(ours(_robust(curv_rtol=c))) for c in (0.1, 0.3, 0.9)},
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
