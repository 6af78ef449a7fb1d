"""The main job: the best mechanism of each family for each training set-up.

All set-ups of a family whose arrays have the same sizes are lanes of one sweep.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array

from .._solver.solution import Solution
from ..mechanisms import (
    BandedInverseToeplitz,
    BandedToeplitz,
    BufferedToeplitz,
    Dense,
    NormalizedBandedToeplitz,
    workloads,
)
from ..robust import ROBUST_OPTIMIZER
from ..sweeps import sweep


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
      params: The parameters.
      optimizer_steps: Steps taken by the optimizer.
      converged: Whether a tolerance was met.
      error_independent: Root of the expected squared error of independent noise.
      error_before: The same of the starting point.
      error_after: The same of the optimized mechanism.
    """

    mechanism: Any
    params: Any
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
      make: Makes a mechanism of a set-up, whose members may be traced, of the static
        sizes of arrays, and of a workload and other options.
      static: The part of a set-up that may not be traced.
      needed: What training needs, of a mechanism and its parameters.
      kept: How many vectors of noise, as large as the model, training keeps, of a size
        and of what training needs.
      is_matrix: Whether parameters are matrices over steps, and the loss comes with its
        gradient.
      grows: Whether the optimum of one size is the start for the next larger one, which
        need not be of use.
      can_be_amplified: Whether sampling amplifies its privacy, with as many bands as an
        epoch has steps at most.
      starts_in_closed_form: Whether where it starts is a mechanism of the literature.
      batch_size: As in `sweep`.
    """

    sizes: str
    make: Callable[..., Any]
    static: Callable[[SetUp], Any]
    needed: Callable[[Any, Array], dict[str, Array]]
    kept: Callable[[int, dict[str, Array]], int]
    is_matrix: bool = False
    grows: bool = False
    can_be_amplified: bool = False
    starts_in_closed_form: bool = False
    batch_size: int | None = None

    @property
    def has_fixed_order(self) -> bool:
        """Whether several epochs have to be of one length and one order."""
        return self.is_matrix and not self.can_be_amplified


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
    del s  # of which all have the same number of rows
    del options["fixed_epochs"]  # which are what it is for
    matrix = workloads.matrix(workload_coef)
    return Dense(most.n, workload_matrix=matrix, **options)


def _make_banded_matrix(*, equal_norm: bool) -> Callable[..., Any]:
    def make(s: SetUp, most: SetUp, workload_coef: Array, **options: Any) -> Dense:
        banded = {"bands": s.size, "equal_norm": equal_norm}
        return _make_dense(s, most, workload_coef, **banded, **options)

    return make


def _strategy_of_norm_1(m: Any, params: Array) -> dict[str, Array]:
    coef = m.strategy_coef(params)[: params.size]
    return {"strategy_coef": coef / jnp.linalg.norm(coef)}


_family_of_matrices = functools.partial(
    Family,
    static=lambda s: s.n,
    needed=lambda m, p: {"strategy_matrix": m.strategy_matrix(p)},
    kept=lambda size, parts: size - 1,
    is_matrix=True,
    # Steps are long, so no lane should wait for another.
    batch_size=1,
)

FAMILIES = {
    "banded-toeplitz": Family(
        sizes="bands",
        make=_make_banded(BandedToeplitz),
        static=lambda s: None,
        needed=_strategy_of_norm_1,
        kept=lambda size, parts: size - 1,
        can_be_amplified=True,
        starts_in_closed_form=True,
    ),
    "normalized-banded-toeplitz": Family(
        sizes="bands",
        make=_make_banded(NormalizedBandedToeplitz),
        static=lambda s: None,
        needed=_strategy_of_norm_1,
        kept=lambda size, parts: size - 1,
        can_be_amplified=True,
        starts_in_closed_form=True,
    ),
    "banded-inverse-toeplitz": Family(
        sizes="bands",
        make=_make_banded(BandedInverseToeplitz),
        static=lambda s: None,
        needed=lambda m, p: {"noising_coef": m.noising_coef(p)[: p.size] / p[0]},
        kept=lambda size, parts: size - 1,
        starts_in_closed_form=True,
    ),
    "blt": Family(
        sizes="buffers",
        make=_make_buffered,
        static=lambda s: s.size,
        needed=lambda m, p: m.buffers(p)._asdict(),
        kept=lambda size, parts: int(np.count_nonzero(parts["output_scale"])),
        grows=True,
    ),
    "column-normalized-banded": _family_of_matrices(
        sizes="bands",
        make=_make_banded_matrix(equal_norm=True),
        can_be_amplified=True,
    ),
    "banded": _family_of_matrices(
        sizes="bands", make=_make_banded_matrix(equal_norm=False)
    ),
    "dense": _family_of_matrices(sizes="rows", make=_make_dense),
}


def run(
    family: Family,
    setups: Sequence[SetUp],
    directory: Path,
    **options: Any,
) -> Iterator[tuple[list[int], list[Outcome]]]:
    """Optimizes mechanisms, those whose arrays have the same sizes in one sweep.

    Args:
      family: The family.
      setups: The set-ups.
      directory: Where sweeps keep what they have finished.
      **options: Those of `sweep`, and `max_error`: whether the error is the largest of
        all steps, and not their mean.

    Yields:
      For each sweep: which of the set-ups were its lanes, and what came out.
    """
    if family.grows:
        yield from _grown(family, setups, directory, **options)
        return
    for number, key in enumerate(dict.fromkeys(map(family.static, setups))):
        lanes = [i for i, s in enumerate(setups) if family.static(s) == key]
        of_lanes = [setups[i] for i in lanes]
        here = directory / str(number)
        yield lanes, _optimized(family, of_lanes, here, **options)


# By how much the loss has to be smaller for one size more to be of use.
_WORTH = 1e-7


def _grown(
    family: Family,
    setups: Sequence[SetUp],
    directory: Path,
    **options: Any,
) -> Iterator[tuple[list[int], list[Outcome]]]:
    """Optimizes mechanisms of increasing size, each from the one before.

    What is not smaller than the one before takes its place.
    """
    trainings = list(dict.fromkeys(s[:3] for s in setups))
    best: dict[Any, Outcome] = {}
    growing = trainings
    for size in range(1, max(s.size for s in setups) + 1):
        if growing:
            of_size = [SetUp(*training, size) for training in growing]
            fewer = np.stack([best[t].params for t in growing]) if best else None
            here = directory / str(size)
            found = _optimized(family, of_size, here, fewer, **options)
            still_growing = []
            for training, outcome in zip(growing, found, strict=True):
                if training in best:
                    before = best[training]
                    steps = before.optimizer_steps + outcome.optimizer_steps
                    outcome = outcome._replace(optimizer_steps=steps)
                    if not outcome.error_after < before.error_after * (1 - _WORTH):
                        continue
                best[training] = outcome
                still_growing.append(training)
            growing = still_growing
        lanes = [i for i, s in enumerate(setups) if s.size == size]
        if lanes:
            yield lanes, [best[setups[i][:3]] for i in lanes]


def _optimized(
    family: Family,
    setups: Sequence[SetUp],
    directory: Path,
    fewer: np.ndarray | None = None,
    *,
    max_error: bool,
    **options: Any,
) -> list[Outcome]:
    """Optimizes the mechanisms of set-ups in one sweep."""
    columns = SetUp(*map(np.array, zip(*setups, strict=True)))
    most = SetUp(*(column.max().item() for column in columns))
    training = functools.partial(_Training, family, most, max_error)
    if fewer is None:
        start = jax.jit(jax.vmap(lambda s: training(s).start()))(columns)
    else:
        start = jax.jit(jax.vmap(lambda s, x: training(s).start(x)))(columns, fewer)
    solution = sweep(
        lambda params, s: training(s).loss_fn(params),
        start,
        columns,
        in_axes=0,
        grad=family.is_matrix,
        optimizer=ROBUST_OPTIMIZER,
        batch_size=family.batch_size,
        checkpoint_dir=directory,
        keep_states=False,
        **options,
    )
    outcome = jax.vmap(lambda s, start, end: training(s).outcome(start, end))
    together = jax.device_get(jax.jit(outcome)(columns, start, solution))
    return [jax.tree.map(lambda x, i=i: x[i], together) for i in range(len(setups))]


def found(
    family: Family,
    s: SetUp,
    outcome: Outcome,
    *,
    max_error: bool,
    sampled: bool = False,
) -> tuple[Any, np.ndarray]:
    """An optimized mechanism by itself, and its parameters.

    Args:
      family: The family.
      s: The set-up.
      outcome: What came out.
      max_error: Whether the largest error was optimized.
      sampled: Whether examples are sampled, so that one participation counts.
    """
    params = outcome.params
    if family.sizes == "bands" and not family.is_matrix:
        params = params[: s.size]
    elif family.grows:  # to what was of use
        s = s._replace(size=params.size // 2)
    s = s._replace(epochs=1 if sampled else s.epochs)
    return _make(family.make, s, s, max_error), params


def _make(make: Callable[..., Any], s: SetUp, most: SetUp, max_error: bool) -> Any:
    """The mechanism of a set-up."""
    return make(
        s,
        most,
        workloads.momentum(most.n, s.momentum),
        max_error=max_error,
        min_sep=s.n // s.epochs,
        max_participations=1 if most.epochs == 1 else s.epochs,
        fixed_epochs=True,
    )


class _Training:
    """A set-up with its mechanism."""

    def __init__(self, family: Family, most: SetUp, max_error: bool, s: SetUp):
        one_band = s._replace(size=1), most._replace(size=1)
        self._needed = family.needed
        self._mechanism = _make(family.make, s, most, max_error)
        self._independent = _make(_make_banded(BandedToeplitz), *one_band, max_error)

    def start(self, *fewer: Array) -> Array:
        return self._mechanism.initial_params(*fewer)

    def loss_fn(self, params: Array) -> Any:
        """What is optimized."""
        if isinstance(self._mechanism, Dense):
            return self._mechanism.loss_and_gradient(params)
        return self._mechanism.loss(params)

    def outcome(self, start: Array, solution: Solution) -> Outcome:
        return Outcome(
            mechanism=self._needed(self._mechanism, solution.value),
            params=solution.value,
            optimizer_steps=solution.stats["num_steps"],
            converged=solution.result == optx.RESULTS.successful,
            error_independent=jnp.sqrt(self._independent.loss(jnp.ones(1))),
            error_before=self._error(start),
            error_after=self._error(solution.value),
        )

    def _error(self, params: Array) -> Array:
        loss = self.loss_fn(params)
        if isinstance(self._mechanism, Dense):  # which is optimized for sensitivity 1
            loss = loss[0] * self._mechanism.sensitivity_squared(params)
        return jnp.sqrt(loss)
