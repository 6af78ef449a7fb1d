"""Mechanisms whose matrices are Toeplitz: what they have in common.

The workload `A`, the strategy `C`, its inverse and the decoder `B = A C^{-1}` are
lower-triangular Toeplitz matrices, each given by its first column.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from . import _toeplitz
from ._setup import (
    Count,
    Flag,
    Number,
    Requirements,
    Vector,
    check_decay,
    check_flag,
    check_n,
    check_participation,
    check_vector,
    steps,
)


class ToeplitzMechanism(eqx.Module):
    """A family of mechanisms, and the set-up for which one of them is to be found.

    An `equinox.Module`, so a pytree: of set-ups that differ in arrays there can be a
    batch. What was given as a Python number is a part of the program, what is an array
    is an operand.

    Attributes:
      n: Training steps.
      max_n: The length of arrays over steps.
      workload_coef: The first column of the workload, shape (max_n,), or None for that
        of prefix sums. Elements from `n` on are not looked at.
      learning_rate: That of each step, shape (max_n,), or None for 1.
      decay: By what each step multiplies the model before it updates it. It is a part
        of `workload_coef`, and only looked at if there is a `learning_rate` too.
      min_sep: Number of steps from one participation of an example to its next, at
        least.
      max_participations: How often an example takes part, at most.
      fixed_epochs: Whether participations are exactly `min_sep` steps apart.
      max_error: Whether the error is the largest of all steps, and not their mean.
      valid: Whether the set-up is possible, as far as that could not be seen when the
        mechanism was made. If it is not, every result is NaN.
    """

    n: Any
    max_n: int = eqx.field(static=True)
    workload_coef: Any
    learning_rate: Any
    decay: Any
    min_sep: Any
    max_participations: Any
    fixed_epochs: Any
    max_error: Any
    valid: Any

    def __init__(
        self,
        n: Count | None = None,
        *,
        workload_coef: Vector | None = None,
        learning_rate: Vector | None = None,
        decay: Number = 1.0,
        min_sep: Count = 1,
        max_participations: Count | None = 1,
        fixed_epochs: Flag = False,
        max_error: Flag = False,
    ):
        max_n = None
        if workload_coef is not None:
            max_n = check_vector("workload_coef", workload_coef).size
        if learning_rate is not None:
            max_n = check_vector("learning_rate", learning_rate, max_n).size
        requirements = Requirements()
        self.n, self.max_n = check_n(requirements, n, max_n)
        self.workload_coef, self.learning_rate = (
            None if x is None else x[: self.max_n]
            for x in (workload_coef, learning_rate)
        )
        checked = check_decay(requirements, decay)
        # A part of the program stays one, and what has no arrays can be hashed.
        self.decay = float(decay) if isinstance(decay, (int, float)) else checked
        self.min_sep, self.max_participations = check_participation(
            requirements, self.n, min_sep, max_participations
        )
        self.fixed_epochs = check_flag("fixed_epochs", fixed_epochs)
        self.max_error = check_flag("max_error", max_error)
        self.valid = requirements.valid

    @abc.abstractmethod
    def initial_params(self) -> Float[Array, " params"]:
        """A good starting point for the optimization."""

    def loss(self, params: Vector) -> Float[Array, ""]:
        """The expected squared error, for noise calibrated to the sensitivity.

        That is the error for noise of variance 1, the mean over the steps or the
        largest, times the squared sensitivity. Its square root times the noise
        multiplier and the clipping norm is the error of the model, in each coordinate.

        Args:
          params: The parameters of the mechanism.

        Returns:
          The loss. NaN where the set-up is impossible.

        Raises:
          TypeError: If `params` are no real numbers.
          ValueError: If there are too many or too few.
        """
        params = self._check_params(params)
        error = self._squared_error(params)
        return self._or_nan(error * self._sensitivity_squared(params))

    def per_query_error(self, params: Vector) -> Float[Array, " max_n"]:
        """The expected squared error of the model after each step, for unit noise.

        Args:
          params: The parameters of the mechanism.

        Returns:
          The errors, 0 from `n` on. NaN where the set-up is impossible.

        Raises:
          TypeError: If `params` are no real numbers.
          ValueError: If there are too many or too few.
        """
        return self._or_nan(self._errors(self._check_params(params)))

    def sensitivity_squared(self, params: Vector) -> Float[Array, ""]:
        """The squared sensitivity of the strategy, or an upper bound of it.

        It is exact for one participation, and if no more than `min_sep` strategy
        coefficients are not 0. Otherwise it depends on what is known of the steps in
        which an example takes part:

        * `fixed_epochs`: exact if no coefficient is negative. Then all columns of an
          example have products that are not negative, so it contributes most if it
          always contributes the same, and most of all from the first step on. Otherwise
          it is the sensitivity of the absolute values, which is not smaller.
        * At least `min_sep` apart: exact if the coefficients are not negative and do
          not increase (Kalinin and Lampert, https://arxiv.org/abs/2405.13763, Theorem
          2). Otherwise it is the sensitivity of the smallest such coefficients above
          the absolute values.

        Args:
          params: The parameters of the mechanism.

        Returns:
          The squared sensitivity. NaN where the set-up is impossible.

        Raises:
          TypeError: If `params` are no real numbers.
          ValueError: If there are too many or too few.
        """
        return self._or_nan(self._sensitivity_squared(self._check_params(params)))

    def strategy_coef(self, params: Vector) -> Float[Array, " max_n"]:
        """The first column of the strategy `C`.

        Args:
          params: The parameters of the mechanism.

        Returns:
          The column, 0 from `n` on. NaN where the set-up is impossible.

        Raises:
          TypeError: If `params` are no real numbers.
          ValueError: If there are too many or too few.
        """
        return self._or_nan(self._strategy_coef(self._check_params(params)))

    def noising_coef(self, params: Vector) -> Float[Array, " max_n"]:
        """The first column of `C^{-1}`, by which noise is correlated.

        Args:
          params: The parameters of the mechanism.

        Returns:
          The column, 0 from `n` on. NaN where the set-up is impossible.

        Raises:
          TypeError: If `params` are no real numbers.
          ValueError: If there are too many or too few.
        """
        return self._or_nan(self._noising_coef(self._check_params(params)))

    def streaming_matrix(self, params: Vector) -> Any:
        """The noising matrix `C^{-1}` as jax-privacy takes it, for a sensitivity of 1.

        For `jax_privacy.noise_addition.matrix_factorization_privatizer`, with the noise
        multiplier times the clipping norm as its `stddev`. It keeps as many vectors
        of noise as the family says.

        Args:
          params: The parameters of the mechanism.

        Returns:
          A `jax_privacy.matrix_factorization.streaming_matrix.StreamingMatrix`, of
          pytrees of vectors of any shape and dtype.

        Raises:
          ModuleNotFoundError: If jax-privacy is not installed.
          TypeError: If `params` are no real numbers.
          ValueError: If there are too many or too few.
        """
        params = self._check_params(params)
        return self._streaming_matrix(
            params, jnp.sqrt(self.sensitivity_squared(params))
        )

    # What a family says of itself. `params` have been checked, the results need not be
    # NaN where a set-up is impossible, and all columns are 0 from n on.

    @property
    @abc.abstractmethod
    def _num_params(self) -> int:
        """The number of parameters."""

    @abc.abstractmethod
    def _strategy_coef(self, params: Array) -> Array:
        """The first column of the strategy."""

    @abc.abstractmethod
    def _noising_coef(self, params: Array) -> Array:
        """The first column of its inverse."""

    @abc.abstractmethod
    def _streaming_matrix(self, params: Array, scale: Array) -> Any:
        """A multiple of the inverse, as jax-privacy takes it."""

    @abc.abstractmethod
    def _decoder_coef(self, params: Array) -> Array:
        """The first column of `B = A C^{-1}` for a learning rate of 1."""

    @abc.abstractmethod
    def _sensitivity_squared(self, params: Array) -> Array:
        """The squared sensitivity."""

    def _squared_error(self, params: Array) -> Array:
        """The mean or largest squared error of all steps."""
        if self.learning_rate is not None:
            return self._mean_or_largest(self._errors(params))
        decoder_coef = self._decoder_coef(params)
        # Row t of B has the entries b_0 ... b_t. So b_i is in n - i of the n rows, and
        # the last row has the largest norm.
        n = jnp.asarray(self.n, decoder_coef.dtype)
        rows = jnp.clip(n - steps(self.max_n).astype(n.dtype), 0)
        inside = self._inside.astype(n.dtype)
        return jnp.sum(decoder_coef**2 * jnp.where(self.max_error, inside, rows / n))

    def _mean_or_largest(self, errors: Array) -> Array:
        """What is optimized, of the errors of all steps."""
        mean = jnp.sum(errors) / jnp.asarray(self.n, errors.dtype)
        return jnp.where(self.max_error, jnp.max(errors), mean)

    def _errors(self, params: Array) -> Array:
        """The squared norms of the rows of `B`, 0 from n on."""
        decoder_coef = self._decoder_coef(params)
        if self.learning_rate is None:
            errors = jnp.cumsum(decoder_coef**2)
        else:
            errors = _errors_of_schedule(decoder_coef, self.learning_rate, self.decay)
        return jnp.where(self._inside, errors, 0.0)

    @property
    def _inside(self) -> Bool[Array, " max_n"]:
        """Which elements of arrays over steps count."""
        return jnp.asarray(steps(self.max_n) < self.n)

    def _workload_coef(self, dtype: Any) -> Array:
        """The first column of the workload, 0 from n on."""
        coef = self.workload_coef
        coef = jnp.ones(self.max_n, dtype) if coef is None else jnp.asarray(coef)
        coef = coef.astype(np.promote_types(coef.dtype, dtype))
        return jnp.where(self._inside, coef, 0.0)

    def _inverse(self, coef: Array) -> Array:
        """The first column of the inverse of a Toeplitz matrix, 0 from n on."""
        unit = _toeplitz.unit(self.max_n, coef.dtype)
        return _toeplitz.solve(coef, unit, self._inside)

    def _largest_sum_of_columns(self, strategy_coef: Array, is_exact: Any) -> Array:
        """The squared norm of the sum of the columns of a participation.

        Args:
          strategy_coef: The first column of the strategy, without zeros at its end.
          is_exact: Whether the sum of the first such columns is known to be the
            largest, whatever the signs and the order of the coefficients are.
        """
        count = self.max_participations
        if isinstance(count, int) and count == 1:
            return jnp.sum(strategy_coef**2)
        if is_exact is not True:
            bound = jnp.abs(strategy_coef)
            if self.fixed_epochs is not True:
                decreasing = jax.lax.cummax(bound, reverse=True)
                bound = jnp.where(self.fixed_epochs, bound, decreasing)
            is_exact = jnp.logical_or(is_exact, count == 1)
            strategy_coef = jnp.where(is_exact, strategy_coef, bound)
        column = strategy_coef[: self.max_n]
        column = jnp.pad(column, (0, self.max_n - column.size))
        column = _toeplitz.sum_of_columns(column, self.min_sep, count)
        return jnp.sum(jnp.where(self._inside, column, 0.0) ** 2)

    def _check_params(self, params: Any) -> Array:
        return jnp.asarray(check_vector("params", params, self._num_params))

    def _or_nan(self, x: Array) -> Array:
        return Requirements(self.valid).or_nan(x)


def _errors_of_schedule(coef: Array, learning_rate: Any, decay: Any) -> Array:
    """The errors where the update of step s is scaled by `learning_rate[s]`.

    If d are the coefficients of updates alone, `d_k = b_k - decay * b_{k-1}`, row t of
    the decoder is `decay` times the row above plus `learning_rate[t] * d_{t-i}`. Row
    after row that takes O(n^2) time and O(n) memory, O(n^1.5) if it is differentiated.
    """
    n, dtype = coef.size, coef.dtype
    decay = jnp.asarray(decay).astype(dtype)
    update_coef = coef - decay * jnp.append(jnp.zeros_like(coef[:1]), coef[:-1])
    # The updates of step t, d_t ... d_0 0 ... 0, begin here at n - 1 - t.
    reverse = jnp.append(update_coef[::-1], jnp.zeros_like(coef))

    def row(above: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        t, rate = xs
        update = jax.lax.dynamic_slice(reverse, (n - 1 - t,), (n,))
        this = decay * above + rate * update
        return this, jnp.sum(this**2)

    @jax.checkpoint
    def rows(above: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.lax.scan(row, above, xs)

    size = round(n**0.5)
    numbers = steps(n + -n % size).reshape(-1, size)
    rates = jnp.asarray(learning_rate).astype(dtype)
    rates = jnp.pad(rates, (0, -n % size)).reshape(-1, size)
    start = jnp.zeros_like(coef)
    return jax.lax.scan(rows, start, (numbers, rates))[1].ravel()[:n]
