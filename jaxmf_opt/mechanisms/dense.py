"""Strategies that are any matrix, found by their Gram matrix.

References:
  Denisov, McMahan, Rush, Smith and Guha Thakurta, Improved Differential Privacy for SGD
  via Optimal Private Linear Operators on Adaptive Streams,
  https://arxiv.org/abs/2202.08312.

  Choquette-Choo, McMahan, Rush and Guha Thakurta, Multi-Epoch Matrix Factorization
  Mechanisms for Private Machine Learning, https://arxiv.org/abs/2211.06530.

  Choquette-Choo et al., (Amplified) Banded Matrix Factorization: A unified approach to
  private training, https://arxiv.org/abs/2306.08153.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import _linalg, _streaming, _toeplitz
from ._fixed_order import FixedOrder
from ._setup import (
    Count,
    Flag,
    Matrix,
    Requirements,
    check_bands,
    check_flag,
    check_matrix,
    check_n,
    check_participation,
    known,
    steps,
)


class Dense(eqx.Module):
    """Dense lower-triangular strategies.

    The parameters are the Gram matrix `X = C^T C` of the strategy, in which the problem
    is convex. Optimize them by `loss_and_gradient` and `grad=True`. The gradient is
    projected: by steps along it the squared sensitivity stays what it is at
    `initial_params`, which is 1. It takes O(n^3) time.

    Three ways in which examples take part:

    * once: `max_participations=1`;
    * in epochs of a fixed order, exactly `min_sep` steps apart, with
      `n = min_sep * max_participations`;
    * at least `min_sep` steps apart, with `equal_norm` and `bands <= min_sep`.

    An `equinox.Module`, so a pytree: of set-ups that differ in arrays there can be a
    batch. What was given as a Python number is a part of the program, what is an array
    is an operand.

    Attributes:
      n: Training steps.
      max_n: The size of matrices over steps.
      workload_matrix: The lower-triangular workload, shape (max_n, max_n), or None for
        prefix sums. Rows and columns from `n` on are not looked at.
      bands: The number of bands of the strategy.
      equal_norm: Whether all columns of the strategy have the same norm.
      min_sep: Number of steps from one participation of an example to its next.
      max_participations: How often an example takes part, at most.
      max_error: Whether the error is the largest of all steps, and not their mean.
      valid: Whether the set-up is possible, as far as that could not be seen when the
        mechanism was made. If it is not, every result is NaN.

    Example:
      >>> from jaxmf_opt import optimize
      >>> mechanism = Dense(16, min_sep=4, max_participations=4)
      >>> start = mechanism.initial_params()
      >>> gram = optimize(mechanism.loss_and_gradient, start, grad=True, gtol=1e-3)
      >>> mechanism.strategy_matrix(gram).shape
      (16, 16)
    """

    n: Any
    max_n: int = eqx.field(static=True)
    workload_matrix: Any
    bands: Any
    equal_norm: Any
    min_sep: Any
    max_participations: Any
    max_error: Any
    valid: Any

    def __init__(
        self,
        n: Count | None = None,
        *,
        bands: Count | None = None,
        equal_norm: Flag = False,
        workload_matrix: Matrix | None = None,
        min_sep: Count = 1,
        max_participations: Count | None = 1,
        max_error: Flag = False,
    ):
        """Describes the mechanism that is wanted.

        Args:
          n: Training steps, by default as many as `workload_matrix` has. An array only
            if that is given.
          bands: The number of bands of the strategy, at most and by default `n`.
          equal_norm: Whether all columns of the strategy have the same norm.
          workload_matrix: The lower-triangular workload, shape (max_n, max_n), by
            default prefix sums: see `workloads.matrix`. Rows and columns from `n` on
            are not looked at.
          min_sep: Number of steps from one participation of an example to its next.
          max_participations: How often an example takes part, at most; None for as
            often as fits.
          max_error: Whether the error is the largest of all steps, and not their mean.

        Raises:
          TypeError: If an argument is of the wrong type.
          ValueError: If an argument is impossible. Where one is traced this cannot be
            seen, and every result of the mechanism is NaN.
        """
        max_n = None
        if workload_matrix is not None:
            max_n = len(check_matrix("workload_matrix", workload_matrix))
        requirements = Requirements()
        self.n, self.max_n = check_n(requirements, n, max_n)
        if workload_matrix is not None:
            workload_matrix = workload_matrix[: self.max_n, : self.max_n]
        self.workload_matrix = workload_matrix
        if bands is None:
            self.bands = self.n
        else:
            self.bands, _ = check_bands(requirements, bands, self.max_n, self.n)
        self.min_sep, self.max_participations = check_participation(
            requirements, self.n, min_sep, max_participations
        )
        self.equal_norm = check_flag("equal_norm", equal_norm)
        self.max_error = check_flag("max_error", max_error)
        min_sep, count = self.min_sep, self.max_participations
        requirements.add(
            (count == 1)
            | (min_sep * count == self.n)
            | (self.equal_norm & (self.bands <= min_sep)),
            "`max_participations` times `min_sep` must be `n`, unless `equal_norm` is "
            f"True and `bands` at most `min_sep`; got {count} times {min_sep} for "
            f"{self.n} steps, {self.bands} bands and equal_norm={self.equal_norm}.",
        )
        self.valid = requirements.valid

    def initial_params(self) -> Float[Array, "max_n max_n"]:
        """A good starting point: a banded square root of the workload.

        The strategy has the coefficients of the square root of a Toeplitz workload with
        the first column of this one (https://arxiv.org/abs/2405.13763), as many as
        there are bands and steps until an example takes part again. Its columns have
        one norm, by which the sensitivity is 1. Independent noise, where the workload
        has no such root.
        """
        workload = self.workload_matrix
        column = jnp.ones(self.max_n) if workload is None else workload[:, 0]
        bands = jnp.minimum(self.bands, self._order.period)
        root = _toeplitz.square_root(jnp.asarray(column))
        root = jnp.where(steps(self.max_n) < bands, root, 0.0)
        inside = self._order.both_inside
        strategy = jnp.where(inside, _toeplitz.matrix(root), 0.0)
        strategy /= jnp.linalg.norm(strategy, axis=0, keepdims=True)
        gram = _toeplitz.matmul(strategy.T, strategy)
        eye = jnp.eye(self.max_n, dtype=gram.dtype)
        is_root = jnp.all(jnp.isfinite(gram) | ~inside)
        gram = jnp.where(is_root & inside, gram, eye)
        # Rounding must not bring in what the gradient keeps out.
        gram = jnp.where(jnp.asarray(eye, bool), 1.0, gram)
        return self._or_nan(gram / self._count(gram.dtype))

    def loss_and_gradient(
        self, params: Matrix
    ) -> tuple[Float[Array, ""], Float[Array, "max_n max_n"]]:
        """The expected squared error for unit noise, and its projected gradient.

        Args:
          params: A Gram matrix with the diagonal and the zeros that the set-up wants,
            as those that are reached from `initial_params` by steps in the span of the
            gradients.

        Returns:
          The loss, the mean over the steps or the largest, which is what `loss` of
          another family is as the sensitivity is 1; and the gradient for
          `optimize(..., grad=True)`. NaN where the set-up is impossible, or `params`
          are not positive definite.

        Raises:
          TypeError: If `params` are no real numbers.
          ValueError: If they have the wrong shape.
        """
        errors, pull_back = self.errors_and_pull_back(params)
        # The derivative of the largest error, shared by those that are as large.
        largest = (errors == jnp.max(errors)).astype(errors.dtype)
        mean = self._order.inside.astype(errors.dtype)
        weights = jnp.where(self.max_error, largest, mean)
        n = jnp.asarray(self.n, errors.dtype)
        weights /= jnp.where(self.max_error, jnp.sum(largest), n)
        return self._or_nan(jnp.sum(errors * weights)), pull_back(weights)

    def errors_and_pull_back(
        self, params: Matrix
    ) -> tuple[
        Float[Array, " max_n"],
        Callable[[Float[Array, " max_n"]], Float[Array, "max_n max_n"]],
    ]:
        """The errors of all steps, and the projected gradient of any weighted sum.

        For `minimax(..., grad=True)`, which finds the least largest error: that has
        kinks, as at its minimum all steps have the same error, and a solver that goes
        by `loss_and_gradient` comes within some percent of it.

        Args:
          params: As in `loss_and_gradient`.

        Returns:
          `per_query_error(params)`, and a function that takes weights of the steps and
          returns the projected gradient of the weighted sum.

        Raises:
          TypeError: If `params` are no real numbers.
          ValueError: If they have the wrong shape.
        """
        workload, factor = self._workload_and_factor(params)
        half = _linalg.solve(factor, workload.T)

        def pull_back(weights: Float[Array, " max_n"]) -> Float[Array, "max_n max_n"]:
            whole = _linalg.solve(factor, half, transposed=True)
            gradient = -_toeplitz.matmul(whole * weights[None, :], whole.T)
            return self._or_nan(self._project(gradient))

        return self._or_nan(jnp.sum(half**2, axis=0)), pull_back

    def per_query_error(self, params: Matrix) -> Float[Array, " max_n"]:
        """The expected squared error of the model after each step, for unit noise.

        Args:
          params: The Gram matrix of the strategy.

        Returns:
          The errors, 0 from `n` on. NaN where the set-up is impossible, or `params` are
          not positive definite.

        Raises:
          TypeError: If `params` are no real numbers.
          ValueError: If they have the wrong shape.
        """
        return self.errors_and_pull_back(params)[0]

    def sensitivity_squared(self, params: Matrix) -> Float[Array, ""]:
        """The squared sensitivity of any strategy, or an upper bound of it.

        For participations exactly `min_sep` steps apart; with `equal_norm` and
        `bands <= min_sep`, for those at least so. The contribution of an example may be
        any vector. It is exact if columns in which the same example takes part are
        orthogonal or have products that are not negative
        (https://arxiv.org/abs/2306.08153, equation 5 and algorithms 3 and 4).

        Args:
          params: The Gram matrix of the strategy.

        Returns:
          The squared sensitivity. NaN where the set-up is impossible.

        Raises:
          TypeError: If `params` are no real numbers.
          ValueError: If they have the wrong shape.
        """
        params = self._check_params(params)
        order = self._order
        gram = jnp.where(order.both_inside, jnp.abs(params), 0.0)
        in_order = jnp.where(order.together, gram, 0.0)
        fixed = jnp.max(order.sums(jnp.sum(in_order, axis=1)))
        if self.equal_norm is False:
            return self._or_nan(fixed)
        at_least = jnp.logical_and(self.equal_norm, self.bands <= self.min_sep)
        # Without products of two participations that is the sum over a diagonal.
        far = jnp.abs(order.apart) >= self.min_sep
        orthogonal = ~jnp.any(far & (gram != 0))
        largest_sum = functools.partial(
            _linalg.largest_sum, min_sep=self.min_sep, count=self.max_participations
        )
        rows = jax.vmap(largest_sum)(gram)
        rows = jnp.where(orthogonal, jnp.diag(gram), rows)
        return self._or_nan(jnp.where(at_least, largest_sum(rows), fixed))

    def strategy_matrix(self, params: Matrix) -> Float[Array, "max_n max_n"]:
        """The lower-triangular strategy `C` with `X = C^T C`.

        Args:
          params: The Gram matrix of the strategy.

        Returns:
          The strategy; the rows and columns from `n` on are those of a diagonal matrix.
          NaN where the set-up is impossible, or `params` are not positive definite.

        Raises:
          TypeError: If `params` are no real numbers.
          ValueError: If they have the wrong shape.
        """
        gram = self._gram(params)
        return self._or_nan(_linalg.cholesky(gram[::-1, ::-1]).T[::-1, ::-1])

    def noising_matrix(self, params: Matrix) -> Float[Array, "max_n max_n"]:
        """The inverse of the strategy, by which noise is correlated.

        Args:
          params: The Gram matrix of the strategy.

        Returns:
          The lower-triangular inverse; otherwise as `strategy_matrix`.

        Raises:
          TypeError: If `params` are no real numbers.
          ValueError: If they have the wrong shape.
        """
        strategy = self.strategy_matrix(params)
        eye = jnp.eye(self.max_n, dtype=strategy.dtype)
        return _linalg.solve(strategy, eye)

    def streaming_matrix(self, params: Matrix) -> Any:
        """The noising matrix `C^{-1}` as jax-privacy takes it, for a sensitivity of 1.

        For `jax_privacy.noise_addition.matrix_factorization_privatizer`, with the noise
        multiplier times the clipping norm as its `stddev`. It keeps `bands - 1` vectors
        of noise; `max_n - 1` where `bands` is traced. After `n` steps the noise is NaN.

        Args:
          params: The Gram matrix of the strategy.

        Returns:
          A `jax_privacy.matrix_factorization.streaming_matrix.StreamingMatrix`, of
          pytrees of vectors of any shape and dtype.

        Raises:
          ModuleNotFoundError: If jax-privacy is not installed.
          TypeError: If `params` are no real numbers.
          ValueError: If they have the wrong shape.
        """
        n = known(self.n, self.max_n)
        return _streaming.by_substitution(
            self.strategy_matrix(params)[:n, :n],
            known(self.bands, n),
            jnp.sqrt(self.sensitivity_squared(params)),
        )

    @property
    def _order(self) -> FixedOrder:
        return FixedOrder(self.n, self.max_n, self.min_sep, self.max_participations)

    def _count(self, dtype: Any) -> Array:
        return jnp.asarray(self.max_participations, dtype)

    def _workload_and_factor(self, params: Matrix) -> tuple[Array, Array]:
        gram = self._gram(params)
        workload = self.workload_matrix
        workload = jnp.tri(self.max_n) if workload is None else jnp.asarray(workload)
        dtype = np.promote_types(workload.dtype, gram.dtype)
        workload = jnp.where(self._order.both_inside, workload, 0.0).astype(dtype)
        return workload, _linalg.cholesky(gram.astype(dtype))

    def _gram(self, params: Matrix) -> Array:
        """The parameters; beyond the steps, those of the identity."""
        gram = self._check_params(params)
        eye = jnp.eye(self.max_n, dtype=gram.dtype)
        return jnp.where(self._order.both_inside, gram, eye)

    def _project(self, gradient: Array) -> Array:
        """The part of a gradient along which nothing changes that must not."""
        order = self._order
        free = ~order.together & (jnp.abs(order.apart) < self.bands)
        free &= order.both_inside
        # The squared norms of the columns of an example have a constant sum.
        diagonal = jnp.where(order.inside, jnp.diag(gradient), 0.0)
        diagonal -= order.sums(diagonal) / self._count(diagonal.dtype)
        moves = order.inside & jnp.logical_not(self.equal_norm)
        diagonal = jnp.where(moves, diagonal, 0.0)
        return jnp.where(free, gradient, 0.0) + jnp.diag(diagonal)

    def _check_params(self, params: Any) -> Array:
        return jnp.asarray(check_matrix("params", params, self.max_n))

    def _or_nan(self, x: Array) -> Array:
        return Requirements(self.valid).or_nan(x)
