"""Banded Toeplitz strategies whose columns are scaled to one norm.

References:
  McKenna, Scaling up the Banded Matrix Factorization Mechanism for Differentially
  Private ML, https://arxiv.org/abs/2405.15913.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from . import _streaming, _toeplitz
from ._setup import Count, Flag, Requirements, Static, Vector, steps
from .banded_toeplitz import BandedToeplitz


class NormalizedBandedToeplitz(BandedToeplitz):
    """Banded Toeplitz strategies whose columns are scaled to norm 1.

    The last `bands - 1` columns of a banded Toeplitz strategy are cut off at the end of
    training, so they have smaller norms than the others: there is more noise than
    their sensitivity asks for. Here they are scaled up. With the same parameters the
    error is smaller than that of `BandedToeplitz`, at the same sensitivity, and
    training keeps as much noise. The mechanism can be amplified by sampling in the same
    way.

    No example may take part twice within `bands` steps. `strategy_coef` and
    `noising_coef` are those of the Toeplitz strategy: the noising matrix is its
    inverse, whose row `t` is multiplied by the norm of its column `t`, `column_norms`.

    Example:
      >>> from jaxmf_opt import ROBUST_OPTIMIZER, solve
      >>> training = dict(min_sep=5, max_participations=4)
      >>> mechanism = NormalizedBandedToeplitz(20, bands=4, **training)
      >>> start = mechanism.initial_params()
      >>> solution = solve(
      ...     mechanism.loss, start, optimizer=ROBUST_OPTIMIZER, rtol=1e-6
      ... )
      >>> without = BandedToeplitz(20, bands=4, **training)
      >>> bool(solution.stats["loss"] < 0.99 * without.loss(solution.value))
      True
    """

    def __init__(
        self,
        n: Count | None = None,
        bands: Count | None = None,
        *,
        max_bands: Static | None = None,
        workload_coef: Vector | None = None,
        min_sep: Count = 1,
        max_participations: Count | None = 1,
        fixed_epochs: Flag = False,
        max_error: Flag = False,
    ):
        """Describes the mechanism that is wanted.

        Args:
          n: Training steps, by default as many as there are in `workload_coef`. An
            array only if `workload_coef` is given.
          bands: The number of bands, at most `n` and by default `max_bands`; and at
            most `min_sep`, unless there is one participation.
          max_bands: The number of parameters, by default `bands`.
          workload_coef: The first column of the workload, shape (max_n,), by default
            that of prefix sums: see `workloads`. Elements from `n` on are not looked
            at.
          min_sep: Number of steps from one participation of an example to its next, at
            least.
          max_participations: How often an example takes part, at most; None for as
            often as fits.
          fixed_epochs: Whether participations are exactly `min_sep` steps apart. The
            sensitivity is the same.
          max_error: Whether the error is the largest of all steps, and not their mean.

        Raises:
          TypeError: If an argument is of the wrong type.
          ValueError: If an argument is impossible. Where one is traced this cannot be
            seen, and every result of the mechanism is NaN.
        """
        super().__init__(
            n,
            bands,
            max_bands=max_bands,
            workload_coef=workload_coef,
            min_sep=min_sep,
            max_participations=max_participations,
            fixed_epochs=fixed_epochs,
            max_error=max_error,
        )
        requirements = Requirements(self.valid)
        requirements.add(
            (self.bands <= self.min_sep) | (self.max_participations == 1),
            f"`bands` must be at most `min_sep`, {self.min_sep}; got {self.bands}.",
        )
        self.valid = requirements.valid

    def column_norms(self, params: Vector) -> Float[Array, " max_n"]:
        """The norms of the columns of the Toeplitz strategy, which are scaled to 1.

        Args:
          params: The parameters of the mechanism.

        Returns:
          The norms, 0 from `n` on. NaN where the set-up is impossible.

        Raises:
          TypeError: If `params` are no real numbers.
          ValueError: If there are too many or too few.
        """
        return self._or_nan(self._column_norms(self._check_params(params)))

    def _column_norms(self, params: Array) -> Array:
        squares = jnp.cumsum(self._cut(params) ** 2)
        rows = jnp.clip(self.n - steps(self.max_n), 1, self.max_bands)
        return jnp.where(self._inside, jnp.sqrt(squares[rows - 1]), 0.0)

    def _squared_error(self, params: Array) -> Array:
        return self._mean_or_largest(self._errors(params))

    def _errors(self, params: Array) -> Array:
        """The squared norms of the rows of `B = A D C^{-1}`, 0 from n on.

        `D` are the norms of the columns of the Toeplitz strategy `C`. They are all the
        same, but for the last ones, so all rows are multiples of those of `A C^{-1}`,
        but for the last ones, from which something is to be subtracted.
        """
        norms = self._column_norms(params)
        decoder_coef = self._decoder_coef(params)
        errors = norms[0] ** 2 * jnp.cumsum(decoder_coef**2)
        count = min(self.max_bands, self.max_n) - 1
        last = jnp.asarray(self.n) - 1 - steps(count)
        exist, safe = last >= 0, jnp.maximum(last, 0)
        lacking = jnp.where(exist, norms[0] - norms[safe], 0.0)
        workload_coef = self._workload_coef(params.dtype)
        apart = last[:, None] - last[None, :]
        less = jnp.where(apart >= 0, workload_coef[jnp.abs(apart)], 0.0) * lacking
        rows = norms[0] * _rows(decoder_coef, last)
        rows -= _toeplitz.matmul(less, _rows(self._noising_coef(params), last))
        # (What does not exist is written nowhere.)
        index = jnp.where(exist, last, self.max_n)
        errors = errors.at[index].set(jnp.sum(rows**2, axis=1), mode="drop")
        return jnp.where(self._inside, errors, 0.0)

    def _sensitivity_squared(self, params: Array) -> Array:
        # Columns have norm 1, and no row in common.
        return jnp.asarray(self.max_participations, params.dtype)

    def _streaming_matrix(self, params: Array, scale: Array) -> Any:
        unscaled = super()._streaming_matrix(params, scale)
        # (No noise is not to be taken for noise.)
        factors = jnp.where(self._inside, self._column_norms(params), jnp.nan)
        return _streaming.with_rows_scaled(unscaled, factors)


def _rows(coef: Array, rows: Array) -> Array:
    """Some rows of the Toeplitz matrix with a first column."""
    index = rows[:, None] - steps(coef.size)[None, :]
    return jnp.where(index >= 0, coef[jnp.abs(index)], 0.0)
