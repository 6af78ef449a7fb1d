"""The main job: the best mechanism of each family for each training set-up.

All set-ups of a family whose arrays have the same sizes are lanes of one sweep.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array

from .._minimax import MAX_ROUNDS, Dual, is_close, rtol_of_round
from .._solver.solution import Solution
from ..mechanisms import BandedToeplitz, Dense
from ..robust import ROBUST_OPTIMIZER
from ..sweeps import sweep
from .families import Family, SetUp, make_banded, make_mechanism


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
    options |= {
        "in_axes": 0,
        "grad": family.is_matrix,
        "optimizer": ROBUST_OPTIMIZER,
        "batch_size": family.batch_size,
        "keep_states": False,
    }
    if family.is_matrix and max_error:
        end = _least_largest(training, columns, start, directory, **options)
    else:
        loss_fn = lambda params, s: training(s).loss_fn(params)  # noqa: E731
        end = _End.of(
            sweep(loss_fn, start, columns, checkpoint_dir=directory, **options)
        )
    outcome = jax.vmap(lambda s, start, end: training(s).outcome(start, end))
    together = jax.device_get(jax.jit(outcome)(columns, start, end))
    return [jax.tree.map(lambda x, i=i: x[i], together) for i in range(len(setups))]


class _End(NamedTuple):
    """How the optimizations of a sweep have ended."""

    params: Any
    num_steps: Any
    converged: Any

    @classmethod
    def of(cls, solution: Solution) -> "_End":
        converged = solution.result == optx.RESULTS.successful
        return cls(solution.value, solution.stats["num_steps"], converged)


def _least_largest(
    training: Callable[[SetUp], "_Training"],
    columns: SetUp,
    start: Array,
    directory: Path,
    *,
    rtol: float,
    **options: Any,
) -> _End:
    """The matrices of the least largest error, by `minimax` of which rounds are sweeps.

    Args:
      training: Makes one of a set-up.
      columns: The set-ups.
      start: Their starting points.
      directory: Where the sweeps keep what they have finished.
      rtol: The gap to be reached, over the largest error.
      **options: Those of `sweep`.

    Returns:
      The matrices, the steps of all rounds, and whether the gap was reached.
    """

    def errors(s: SetUp, params: Array) -> tuple[Array, Callable[[Array], Array]]:
        return training(s).mechanism.errors_and_pull_back(params)

    def smooth(params: Array, hyperparams: tuple[SetUp, Dual]) -> tuple[Array, Array]:
        s, dual = hyperparams
        of_steps, pull_back = errors(s, params)
        return dual.loss(of_steps), pull_back(dual.weights(of_steps))

    @jax.jit
    @jax.vmap
    def begin(s: SetUp, params: Array) -> Dual:
        return Dual.first(errors(s, params)[0])

    @jax.jit
    @jax.vmap
    def look(
        s: SetUp, dual: Dual, params: Array, result: optx.RESULTS
    ) -> tuple[Dual, Array, Array]:
        of_steps, _ = errors(s, params)
        return dual.next(of_steps, result), dual.gap(of_steps), jnp.max(of_steps)

    none = np.zeros(len(start), int)
    end = _End(np.array(start), none, none.astype(bool))
    dual, gap, largest = begin(columns, start), 1.0, 1.0
    # The set-ups for which there is something to do.
    left, of_left = np.arange(len(start)), columns
    for number in range(MAX_ROUNDS if options["max_optimizer_steps"] else 1):
        rtol_here = float(np.max(rtol_of_round(gap, largest)))
        solution = sweep(
            smooth,
            end.params[left],
            (of_left, dual),
            rtol=rtol_here,
            checkpoint_dir=directory / str(number),
            **options,
        )
        of_round = _End.of(solution)
        end.params[left] = of_round.params
        end.num_steps[left] += of_round.num_steps
        dual, gap, largest = look(of_left, dual, solution.value, solution.result)
        reached = is_close(gap, largest, rtol_here, rtol)
        end.converged[left] = of_round.converged & reached
        on = np.flatnonzero(~end.converged[left] & np.isfinite(gap))
        if not on.size:
            break
        left, of_left, dual, gap, largest = jax.tree.map(
            lambda x: x[on],  # noqa: B023
            (left, of_left, dual, gap, largest),
        )
    return end


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
    return make_mechanism(family.make, s, s, max_error), params


class _Training:
    """A set-up with its mechanism."""

    def __init__(self, family: Family, most: SetUp, max_error: bool, s: SetUp):
        one_band = s._replace(size=1), most._replace(size=1)
        self._needed = family.needed
        self.mechanism = make_mechanism(family.make, s, most, max_error)
        self._independent = make_mechanism(
            make_banded(BandedToeplitz), *one_band, max_error
        )

    def start(self, *fewer: Array) -> Array:
        return self.mechanism.initial_params(*fewer)

    def loss_fn(self, params: Array) -> Any:
        """What is optimized."""
        if isinstance(self.mechanism, Dense):
            return self.mechanism.loss_and_gradient(params)
        return self.mechanism.loss(params)

    def outcome(self, start: Array, end: _End) -> Outcome:
        return Outcome(
            mechanism=self._needed(self.mechanism, end.params),
            params=end.params,
            optimizer_steps=end.num_steps,
            converged=end.converged,
            error_independent=jnp.sqrt(self._independent.loss(jnp.ones(1))),
            error_before=self._error(start),
            error_after=self._error(end.params),
        )

    def _error(self, params: Array) -> Array:
        loss = self.loss_fn(params)
        if isinstance(self.mechanism, Dense):  # which is optimized for sensitivity 1
            loss = loss[0] * self.mechanism.sensitivity_squared(params)
        return jnp.sqrt(loss)
