"""How many problems does it solve that are not DP-MF?

The 126 unconstrained CUTEst problems of sif2jax 0.0.8 with up to 200 variables, 1,000
steps each. Solved: the largest element of the gradient is at most 1e-5 max(1, |f|), or
the loss is within 1e-8, relatively, of the least that any solver of the run found.

* solved: how many problems.
* lied: on how many of the others `result` says successful.
* evaluations: of loss and gradient (values of the backtracking search have none).

`python -m benchmarks.cutest --ablation` leaves out each part of `ROBUST_OPTIMIZER` in
turn, and varies its numbers, on the problems that are not solved by all variants.
Programs are compiled without optimisation, in a third of the time, which changes
roundings only. That is enough to solve one of these problems or not.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import scipy.optimize
import sif2jax
from jax.flatten_util import ravel_pytree

import jaxmf_opt
from jaxmf_opt import robust

MAX_SIZE, MAX_STEPS, GTOL, FTOL = 200, 1000, 1e-5, 1e-8
FAST = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


class Problem(NamedTuple):
    """A loss of one vector, and where to start."""

    name: str
    loss: Callable[[jax.Array], jax.Array]
    start: jax.Array


class End(NamedTuple):
    """Where a solver has ended, what it says of it, and what that took."""

    point: np.ndarray
    success: bool
    steps: int
    evaluations: int


Solver = Callable[[Problem], End]


def _problems() -> Iterator[Problem]:
    for problem in sif2jax.unconstrained_minimisation_problems:
        start, unravel = ravel_pytree(problem.y0)
        if start.size > MAX_SIZE:
            continue

        def loss(y: Any, problem: Any = problem, unravel: Any = unravel) -> Any:
            return problem.objective(unravel(y), problem.args)

        yield Problem(problem.name, loss, jnp.asarray(start, float))


def _ours(optimizer: Any) -> Solver:
    def solver(problem: Problem) -> End:
        solution = jax.jit(
            lambda y: jaxmf_opt.solve(
                problem.loss,
                y,
                optimizer=optimizer,
                max_optimizer_steps=MAX_STEPS,
                gtol=GTOL,
            ),
            compiler_options=FAST,
        )(problem.start)
        return End(
            np.asarray(solution.value),
            bool(solution.result == optx.RESULTS.successful),
            int(solution.stats["num_steps"]),
            int(solution.stats["num_loss_evaluations"]),
        )

    return solver


def _scipy(problem: Problem, method: str = "L-BFGS-B") -> End:
    both = jax.jit(jax.value_and_grad(problem.loss), compiler_options=FAST)

    def numbers(y: Any) -> tuple[float, np.ndarray]:
        loss, grad = both(y)
        return float(loss), np.array(grad)

    options = {"maxiter": MAX_STEPS, "gtol": GTOL}
    if method == "L-BFGS-B":
        options |= {"maxfun": 20000, "ftol": 0}
    with np.errstate(all="ignore"):
        end = scipy.optimize.minimize(
            numbers,
            np.asarray(problem.start),
            jac=True,
            method=method,
            options=options,
        )
    return End(end.x, bool(end.success), int(end.nit), int(end.nfev))


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
SOLVERS: dict[str, Solver] = {
    "DEFAULT_OPTIMIZER": _ours(jaxmf_opt.DEFAULT_OPTIMIZER),
    "optax.lbfgs, zoom, memory 10": _ours(optax.lbfgs(memory_size=10)),
    "ROBUST_OPTIMIZER": _ours(jaxmf_opt.ROBUST_OPTIMIZER),
    "SciPy L-BFGS-B": _scipy,
    "SciPy BFGS": lambda problem: _scipy(problem, "BFGS"),
}
ABLATION: dict[str, Solver] = {
    "ROBUST_OPTIMIZER": SOLVERS["ROBUST_OPTIMIZER"],
    **{f"without {name}": _ours(_robust(name)) for name in PARTS},
    **{f"memory {m}": _ours(_robust(memory_size=m)) for m in (10, 20, 60)},
    "20 trials": _ours(_robust(max_linesearch_steps=20)),
    **{f"curvature {c}": _ours(_robust(curv_rtol=c)) for c in (0.1, 0.3, 0.9)},
    "units always": _ours(_robust(min_ratio=1.0)),
    **{name: SOLVERS[name] for name in ("SciPy L-BFGS-B", "SciPy BFGS")},
}


HARD = frozenset(
    (
        *("COATING", "DJTL", "DMN15102LS", "DMN15103LS", "HEART6LS", "LUKSAN11LS"),
        *("MARATOSB", "MGH10LS", "MGH10SLS", "NELSONLS", "PENALTY3", "RAT42LS"),
    )
)


def _run(solvers: dict[str, Solver], problems: list[Problem]) -> None:
    totals = {name: [0, 0, 0, 0] for name in solvers}
    unsolved: dict[str, list[str]] = {name: [] for name in solvers}
    for i, problem in enumerate(problems):
        print(f"\r{i + 1:4}/{len(problems)} {problem.name:12}", end="", file=sys.stderr)
        both = jax.jit(jax.value_and_grad(problem.loss), compiler_options=FAST)
        ends = {name: solver(problem) for name, solver in solvers.items()}
        at_end = {name: both(jnp.asarray(end.point)) for name, end in ends.items()}
        best = np.nanmin([float(loss) for loss, _ in at_end.values()])
        for name, end in ends.items():
            loss, grad = map(np.asarray, at_end[name])
            small = np.abs(grad).max() <= GTOL * max(1.0, abs(loss))
            solved = small or loss - best <= FTOL * abs(best)
            row = (solved, end.success and not solved, end.steps, end.evaluations)
            totals[name] = [a + int(b) for a, b in zip(totals[name], row, strict=True)]
            if not solved:
                unsolved[name].append(problem.name)
        jax.clear_caches()
    print(f"\r{len(problems)} problems{'':20}", file=sys.stderr)
    print(
        f"{'':30} {'solved':>6} {'lied':>5} {'steps':>7} {'evaluations':>11}  unsolved"
    )
    for name, (solved, lied, steps, evaluations) in totals.items():
        names = " ".join(unsolved[name]) if len(unsolved[name]) < 10 else ""
        print(f"{name:30} {solved:6} {lied:5} {steps:7} {evaluations:11}  {names}")


def main() -> None:
    with jax.enable_x64():
        problems = list(_problems())
        if "--ablation" in sys.argv:
            _run(ABLATION, [p for p in problems if p.name in HARD])
        else:
            _run(SOLVERS, problems)


if __name__ == "__main__":
    main()
