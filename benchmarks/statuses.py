"""How often a solve says that it has converged where it has not: never, is the claim.

    python -m benchmarks.statuses [--cutest]

A thousand fits (exponentials, peaks, growth curves, likelihoods, steep and flat losses;
random data, starts and units), each with `rtol` and with `gtol`, by the default and by
the robust optimizer. Every end that is called successful is checked in ways that know
nothing of the tests in the solver. It is right if

* the gradient, computed again, is at most `gtol`, or
* the robust optimizer, which goes on from there for 3,000 steps, brings the loss down
  by no more than 100 `rtol`, relatively to the loss or, where that goes to 0, to 1 or
  the loss at the start if that is smaller, or
* it is on a plateau: by gradient and Hessian, no change of the parameters by as much as
  their size brings the loss down by more than 100 `rtol` either.

Else it is false. With `--cutest` the same is asked of the unconstrained problems of
CUTEst with up to 50 variables.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optimistix import RESULTS

from jaxmf_opt import DEFAULT_OPTIMIZER, ROBUST_OPTIMIZER, solve
from jaxmf_opt.sweeps import sweep

from .common import progress

LANES, POINTS = 100, 30
RTOL, GTOL = 1e-6, 1e-6
OPTIMIZERS = {"default": DEFAULT_OPTIMIZER, "robust": ROBUST_OPTIMIZER}


class Data(NamedTuple):
    """A random problem.

    Attributes:
      x: Where something was observed, POINTS numbers in [0, 4].
      z: Standard normal numbers, as many.
      u: Uniform numbers, as many.
      unit: The unit of the parameters, relatively to the model's own.
    """

    x: Any
    z: Any
    u: Any
    unit: Any


Model = Callable[[Any, Data], Any]


def residuals(curve: Callable[[Any, Any], Any], truth: tuple[float, ...]) -> Model:
    """Least squares for a curve, with noise of 5%."""

    def loss(y: Any, d: Data) -> Any:
        observed = curve(jnp.array(truth), d.x)
        return jnp.mean((curve(y, d.x) - observed * (1 + 0.05 * d.z)) ** 2)

    return loss


def logistic(y: Any, d: Data) -> Any:
    score = y[0] + y[1] * d.x
    label = d.u < jax.nn.sigmoid(d.x - 2)
    return jnp.mean(jnp.logaddexp(0.0, score) - label * score)


def poisson(y: Any, d: Data) -> Any:
    rate = y[0] + y[1] * d.x
    count = jnp.round(jnp.exp(0.3 + 0.5 * d.x) + d.z)
    return jnp.mean(jnp.exp(rate) - jnp.maximum(count, 0) * rate)


def weibull(y: Any, d: Data) -> Any:
    shape, scale = jnp.exp(y[0]), jnp.exp(y[1])
    lifetime = 3 * (-jnp.log(d.u + 1e-3)) ** 0.5
    ratio = lifetime / scale
    return -jnp.mean(
        jnp.log(shape / scale) + (shape - 1) * jnp.log(ratio) - ratio**shape
    )


def steep(y: Any, d: Data) -> Any:
    return jnp.exp(100 * y[0] * d.u[0]) - y[0] + (y[1] - d.z[0]) ** 2


def valley(y: Any, d: Data) -> Any:
    bend = 10 ** (4 * d.u[0])
    return bend * (y[1] - y[0] ** 2) ** 2 + (1 - y[0]) ** 2


def flat(y: Any, d: Data) -> Any:
    return (y[0] - d.z[0]) ** 4 + 1e-6 * (y[1] - d.z[1]) ** 2 + y[0] ** 2


MODELS: dict[str, Model] = {
    "decay": residuals(lambda y, x: y[0] * jnp.exp(-y[1] * x), (2.0, 0.7)),
    "growth": residuals(lambda y, x: y[0] * jnp.exp(y[1] * x**2), (0.5, 0.9)),
    "peak": residuals(lambda y, x: y[0] * jnp.exp(-((x - y[1]) ** 2)), (3.0, 1.8)),
    "rational": residuals(lambda y, x: y[0] * x / (y[1] + x), (4.0, 0.6)),
    "logistic": logistic,
    "poisson": poisson,
    "weibull": weibull,
    "steep": steep,
    "valley": valley,
    "flat": flat,
}


def problems(seed: int, lanes: int) -> tuple[Data, np.ndarray]:
    """Random data and starts."""
    rng = np.random.default_rng(seed)
    data = Data(
        np.sort(rng.uniform(0, 4, (lanes, POINTS))),
        rng.normal(size=(lanes, POINTS)),
        rng.uniform(size=(lanes, POINTS)),
        10.0 ** rng.integers(-6, 7, lanes)[:, None],
    )
    return data, rng.normal(size=(lanes, 2)) * data.unit


class Verdict(NamedTuple):
    """What is to be said of some solves.

    Attributes:
      successful: Which are called successful.
      false: Which of these are not.
    """

    successful: np.ndarray
    false: np.ndarray


def judge(
    model: Model, data: Data, start: Any, optimizer: Any, **tolerance: Any
) -> Verdict:
    """Solves problems, and looks whether what is called successful is."""

    def loss(y: Any, d: Data) -> Any:
        return model(y / d.unit, d)

    solution = sweep(
        loss,
        start,
        data,
        in_axes=0,
        optimizer=optimizer,
        max_optimizer_steps=500,
        **{"rtol": 0.0, **tolerance},
    )
    further = sweep(
        loss,
        solution.value,
        data,
        in_axes=0,
        rtol=0.0,
        optimizer=ROBUST_OPTIMIZER,
        max_optimizer_steps=3000,
    )
    successful = np.asarray(solution.result == RESULTS.successful)
    end, slope = jax.jit(jax.vmap(jax.value_and_grad(loss)))(solution.value, data)
    first = jax.jit(jax.vmap(loss))(start, data)
    curvatures = jax.jit(
        jax.vmap(lambda *x: jnp.linalg.eigvalsh(jax.hessian(loss)(*x)))
    )(solution.value, data)
    right = _is_right(
        *map(np.asarray, (solution.value, end, slope, curvatures)),
        least=np.asarray(further.loss),
        first=np.asarray(first),
        gtol=tolerance.get("gtol", 0.0),
    )
    return Verdict(successful, successful & ~right)


def _is_right(
    y: np.ndarray,
    end: np.ndarray,
    slope: np.ndarray,
    curvatures: np.ndarray,
    *,
    least: np.ndarray,
    first: np.ndarray,
    gtol: float,
) -> np.ndarray:
    """Whether ends are minima, as said above; axis 0 is that of the problems."""
    least = np.fmin(least, end)
    allowed = 100 * RTOL * np.maximum(np.abs(least), np.minimum(np.abs(first), 1.0))
    downwards = np.maximum(-np.min(curvatures, axis=1), 0.0)
    size = np.linalg.norm(y, axis=1)
    within = np.linalg.norm(slope, axis=1) * size + downwards * size**2 / 2
    plateau = within <= np.maximum(100 * RTOL * np.abs(end), allowed)
    is_gtol_met = np.max(np.abs(slope), axis=1) <= gtol
    return (end - least <= allowed) | plateau | is_gtol_met


def judge_cutest(problem: Any) -> list[Verdict]:
    """The same of one problem: by each optimizer, with `rtol` and with `gtol`."""

    def loss(y: Any) -> Any:
        return problem.loss(y, problem.hyperparam)

    @jax.jit
    def least(y: Any) -> Any:
        further = solve(
            loss, y, rtol=0.0, optimizer=ROBUST_OPTIMIZER, max_optimizer_steps=3000
        )
        return further.stats["loss"]

    @jax.jit
    def look(y: Any) -> tuple[Any, Any, Any, Any]:
        curvatures = jnp.linalg.eigvalsh(jax.hessian(loss)(y))
        return y, *jax.value_and_grad(loss)(y), curvatures

    verdicts = []
    for optimizer in OPTIMIZERS.values():

        @jax.jit
        def end(rtol: Any, gtol: Any, optimizer: Any = optimizer) -> Any:
            ended = solve(
                loss,
                problem.start,
                optimizer=optimizer,
                rtol=rtol,
                gtol=gtol,
                max_optimizer_steps=500,
            )
            return ended.value, ended.result == RESULTS.successful

        for rtol, gtol in ((RTOL, 0.0), (0.0, GTOL)):
            y, successful = end(rtol, gtol)
            successful = np.asarray(successful)[None]
            right = np.array([True])
            if successful[0]:
                right = _is_right(
                    *(np.asarray(x)[None] for x in look(y)),
                    least=np.asarray(least(y))[None],
                    first=np.asarray(loss(problem.start))[None],
                    gtol=gtol,
                )
            verdicts.append(Verdict(successful, successful & ~right))
    return verdicts


def cutest() -> None:
    # Not for the tests of this file: sif2jax switches x64 on for the whole process.
    from .problems import unconstrained_cutest

    every = list(unconstrained_cutest(50))
    ways = [(o, t) for o in OPTIMIZERS for t in ("rtol", "gtol")]
    successful, false = np.zeros(len(ways), int), np.zeros(len(ways), int)
    for problem in progress(every, "problem", lambda p: p.name):
        verdicts = judge_cutest(problem)
        successful += [int(v.successful[0]) for v in verdicts]
        false += [int(v.false[0]) for v in verdicts]
        for (optimizer, tolerance), verdict in zip(ways, verdicts, strict=True):
            if verdict.false[0]:
                print(f"FALSE: {problem.name}, {optimizer}, {tolerance}", flush=True)
        jax.clear_caches()
    for way, count, wrong in zip(ways, successful, false, strict=True):
        counts = f"{count:4} of {len(every)} successful, {wrong} of them falsely"
        print("{:8} {:5}".format(*way), counts, flush=True)


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    print(f"{'model':10} {'tolerance':10} {'optimizer':10} successful  false")
    total = np.zeros(3, int)
    for seed, (name, model) in enumerate(MODELS.items()):
        data, start = problems(seed, LANES)
        for which, optimizer in OPTIMIZERS.items():
            for tolerance, value in (("rtol", RTOL), ("gtol", GTOL)):
                of = judge(model, data, start, optimizer, **{tolerance: value})
                successful, false = of.successful.sum(), of.false.sum()
                total += [LANES, successful, false]
                print(
                    f"{name:10} {tolerance:10} {which:10} {successful:4} of {LANES}"
                    f" {false:6}",
                    flush=True,
                )
    print(f"{total[1]} of {total[0]} successful, {total[2]} of them falsely")


if __name__ == "__main__":
    if sys.argv[1:] == ["--cutest"]:
        jax.config.update("jax_enable_x64", True)
        cutest()
    else:
        main()
