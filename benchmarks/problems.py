"""Losses that several benchmarks minimise."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import sif2jax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from jaxmf_opt import DEFAULT_OPTIMIZER, ROBUST_OPTIMIZER
from jaxmf_opt.mechanisms import (
    BandedInverseToeplitz,
    BandedToeplitz,
    BufferedToeplitz,
    Dense,
    workloads,
)


class Problem(NamedTuple):
    """A loss of a vector and a hyperparameter, and where to start.

    Attributes:
      name: What it is called.
      loss: The loss.
      start: A vector, float64.
      hyperparam: A number, which not all losses look at.
      optimizer: That of this library which its README recommends.
      losses: Where the loss is the largest of several, these and their pull back, as
        `jaxmf_opt.minimax` takes them; else None.
    """

    name: str
    loss: Callable[[Any, Any], Any]
    start: Array
    hyperparam: Any = 0.0
    optimizer: Any = ROBUST_OPTIMIZER
    losses: Callable[[Any], Any] | None = None


def unconstrained_cutest(max_size: int) -> Iterator[Problem]:
    """The unconstrained CUTEst problems of sif2jax with so many variables at most."""
    for problem in sif2jax.unconstrained_minimisation_problems:
        start, unravel = ravel_pytree(problem.y0)
        if start.size > max_size:
            continue

        def loss(y: Any, _: Any, problem: Any = problem, unravel: Any = unravel) -> Any:
            return problem.objective(unravel(y), problem.args)

        yield Problem(problem.name, loss, jnp.asarray(start, float))


def mechanisms() -> Iterator[Problem]:
    """Mechanisms of DP-MF of all families, at sizes that people train with."""
    for n, bands in ((128, 16), (1024, 32), (4096, 64)):
        yield banded(n, bands)
    epochs: dict[str, Any] = {"max_participations": 4}
    inverse = BandedInverseToeplitz(512, 8, min_sep=128, **epochs)
    largest = BufferedToeplitz(1000, 3, max_error=True)
    mean = BufferedToeplitz(1000, 3, min_sep=250, **epochs)
    for name, mechanism in {
        "banded inverse n=512 b=8 k=4": inverse,
        "BLT max n=1000 d=3": largest,
        "BLT mean n=1000 d=3 k=4": mean,
    }.items():
        yield Problem(
            name, without_hyperparam(mechanism.loss), mechanism.initial_params()
        )
    loss, start = of_dense(Dense(64, min_sep=16, **epochs))
    loss = without_hyperparam(loss)
    yield Problem("dense n=64 k=4", loss, start, optimizer=DEFAULT_OPTIMIZER)


def of_dense(mechanism: Dense) -> tuple[Callable[[Any], Any], Array]:
    """The loss of a dense mechanism, of a vector, and where to start."""
    start, unravel = ravel_pytree(mechanism.initial_params())

    def both(y: Array) -> tuple[Array, Array]:
        loss, grad = mechanism.loss_and_gradient(unravel(y))
        return loss, ravel_pytree(grad)[0]

    return _with_gradient(both), start


def errors_of_dense(mechanism: Dense) -> Callable[[Any], Any]:
    """The errors of its steps and their pull back, of a vector."""
    _, unravel = ravel_pytree(mechanism.initial_params())

    def errors(y: Array) -> tuple[Array, Callable[[Array], Array]]:
        of_steps, pull_back = mechanism.errors_and_pull_back(unravel(y))
        return of_steps, lambda weights: ravel_pytree(pull_back(weights))[0]

    return errors


def banded(n: int, bands: int, momentum: float = 0.9) -> Problem:
    """A banded Toeplitz strategy; its hyperparameter is the momentum."""

    def loss(coef: Array, momentum: Any) -> Array:
        workload_coef = workloads.momentum(n, momentum)
        return BandedToeplitz(n, bands, workload_coef=workload_coef).loss(coef)

    start = BandedToeplitz(n, bands).initial_params()
    name = f"banded Toeplitz n={n} b={bands}"
    return Problem(name, loss, start, momentum, DEFAULT_OPTIMIZER)


def without_hyperparam(loss: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """A loss that does not look at its hyperparameter."""

    def of_both(y: Any, _: Any) -> Any:
        return loss(y)

    return of_both


def _with_gradient(both: Callable[[Any], tuple[Any, Any]]) -> Callable[[Any], Any]:
    """A loss whose gradient is given: every solver gets it by `jax.grad`."""

    @jax.custom_vjp
    def loss(y: Any) -> Any:
        return both(y)[0]

    loss.defvjp(both, lambda grad, cotangent: (cotangent * grad,))
    return functools.wraps(both)(loss)
