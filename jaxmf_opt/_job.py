"""The main job: the best mechanism of each family for each training set-up.

All set-ups of a family whose arrays have the same sizes are lanes of one jitted,
vmapped solve.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
from jaxtyping import Array

from ._optimizer import DEFAULT_OPTIMIZER
from ._solve import solve
from .losses import (
    BandedInverseToeplitz,
    BandedToeplitz,
    BufferedToeplitz,
    Dense,
    workloads,
)
from .robust import ROBUST_OPTIMIZER


class SetUp(NamedTuple):
    """A training, and the size of a mechanism for it.

    Attributes:
      n: Training steps.
      epochs: How often each example takes part, `n // epochs` steps apart.
      momentum: Momentum of the training algorithm.
      size: Bands, buffers, or for a matrix its rows.
    """

    n: Any
    epochs: Any
    momentum: Any
    size: Any


class Outcome(NamedTuple):
    """An optimized mechanism.

    Attributes:
      mechanism: What training needs of it, by name.
      optimizer_steps: Steps taken by the optimizer.
      converged: Whether a tolerance was met.
      error_independent: Root of the expected squared error of independent noise.
      error_before: The same of the starting point.
      error_after: The same of the optimized mechanism.
    """

    mechanism: Any
    optimizer_steps: Any
    converged: Any
    error_independent: Any
    error_before: Any
    error_after: Any


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of mechanisms as the job offers it.

    Attributes:
      sizes: What its sizes are.
      optimizer: The optimizer that suits it.
      make: Makes a mechanism of a set-up, whose members may be traced, of the static
        sizes of arrays, and of a workload and other options.
      static: The part of a set-up that may not be traced.
      needed: What training needs, of a mechanism and its parameters.
      kept: How many vectors of noise, as large as the model, training keeps.
    """

    sizes: str
    optimizer: optax.GradientTransformationExtraArgs
    make: Callable[..., Any]
    static: Callable[[SetUp], Any]
    needed: Callable[[Any, Array], dict[str, Array]]
    kept: Callable[[SetUp], int]


def _make_banded(kind: Any) -> Callable[..., Any]:
    def make(s: SetUp, most: SetUp, workload_coef: Array, **options: Any) -> Any:
        bands = {"bands": s.size, "max_bands": most.size}
        return kind(s.n, **bands, workload_coef=workload_coef, **options)

    return make


def _make_buffered(
    s: SetUp, most: SetUp, workload_coef: Array, **options: Any
) -> BufferedToeplitz:
    return BufferedToeplitz(s.n, most.size, workload_coef=workload_coef, **options)


def _make_dense(s: SetUp, most: SetUp, workload_coef: Array, **options: Any) -> Dense:
    matrix = workloads.matrix(workload_coef)
    return Dense(s.n, workload_matrix=matrix, **options)


FAMILIES = {
    "banded-toeplitz": Family(
        sizes="bands",
        optimizer=DEFAULT_OPTIMIZER,
        make=_make_banded(BandedToeplitz),
        static=lambda s: None,
        needed=lambda m, p: {
            "strategy_coef": (c := m.strategy_coef(p)[: p.size]) / jnp.linalg.norm(c)
        },
        kept=lambda s: s.size - 1,
    ),
    "banded-inverse-toeplitz": Family(
        sizes="bands",
        optimizer=ROBUST_OPTIMIZER,
        make=_make_banded(BandedInverseToeplitz),
        static=lambda s: None,
        needed=lambda m, p: {"noising_coef": m.noising_coef(p)[: p.size] / p[0]},
        kept=lambda s: s.size - 1,
    ),
    "blt": Family(
        sizes="buffers",
        optimizer=ROBUST_OPTIMIZER,
        make=_make_buffered,
        static=lambda s: s.size,
        needed=lambda m, p: m.buffers(p)._asdict(),
        kept=lambda s: s.size,
    ),
    "dense": Family(
        sizes="rows",
        optimizer=optax.lbfgs(memory_size=10),
        make=_make_dense,
        # One after the other: steps are long, and no lane waits for another.
        static=lambda s: s,
        needed=lambda m, p: {"strategy_matrix": m.strategy_matrix(p)},
        kept=lambda s: s.n - 1,
    ),
}


def run(
    family: Family, setups: Sequence[SetUp], **options: Any
) -> Iterator[tuple[list[int], Outcome]]:
    """Optimizes mechanisms, those whose arrays have the same sizes in one program.

    Args:
      family: The family.
      setups: The set-ups.
      **options: Those of `solve`, and `max_error`: whether the error is the largest of
        all steps, and not their mean.

    Yields:
      For each program: which of the set-ups were its lanes, and what came out, with a
      leading axis.
    """
    for key in dict.fromkeys(map(family.static, setups)):
        lanes = [i for i, s in enumerate(setups) if family.static(s) == key]
        columns = SetUp(*map(np.array, zip(*(setups[i] for i in lanes), strict=True)))
        most = SetUp(*(column.max().item() for column in columns))
        optimized = functools.partial(_optimized, family, most=most, **options)
        if len(lanes) == 1:
            outcome = jax.tree.map(lambda x: x[None], optimized(most))
        else:
            outcome = jax.jit(jax.vmap(optimized))(columns)
        yield lanes, jax.device_get(outcome)


def _optimized(
    family: Family, s: SetUp, *, most: SetUp, max_error: bool, **options: Any
) -> Outcome:
    participation = {
        "min_sep": s.n // s.epochs,
        "max_participations": 1 if most.epochs == 1 else s.epochs,
    }
    workload_coef = workloads.momentum(most.n, s.momentum)
    described = {"max_error": max_error, **participation}
    mechanism = family.make(s, most, workload_coef, **described)
    independent = BandedToeplitz(s.n, 1, workload_coef=workload_coef, **described)
    start = mechanism.initial_params()
    if isinstance(mechanism, Dense):
        loss_fn, has_grad = mechanism.loss_and_gradient, True

        def loss(params: Array) -> Array:
            return loss_fn(params)[0] * mechanism.sensitivity_squared(params)

    else:
        loss_fn = loss = mechanism.loss
        has_grad = False
    solution = solve(
        loss_fn, start, grad=has_grad, optimizer=family.optimizer, **options
    )
    return Outcome(
        mechanism=family.needed(mechanism, solution.value),
        optimizer_steps=solution.stats["num_steps"],
        converged=solution.result == optx.RESULTS.successful,
        error_independent=jnp.sqrt(independent.loss(jnp.ones(1))),
        error_before=jnp.sqrt(loss(start)),
        error_after=jnp.sqrt(loss(solution.value)),
    )
