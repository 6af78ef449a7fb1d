"""Buffered linear Toeplitz strategies (BLT): their noise takes a few buffers.

References:
  Dvijotham, McMahan, Pillutla, Steinke and Thakurta, Efficient and Near-Optimal Noise
  Generation for Streaming Differential Privacy, https://arxiv.org/abs/2404.16706.

  McMahan, Xu and Zhang, A Hassle-free Algorithm for Strong Differential Privacy in
  Federated Learning Systems, https://arxiv.org/abs/2408.08868.

  McMahan and Pillutla, An Inversion Theorem for Buffered Linear Toeplitz (BLT) Matrices
  and Applications to Streaming Differential Privacy, https://arxiv.org/abs/2504.21413.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import _streaming, _toeplitz
from ._mechanism import ToeplitzMechanism
from ._setup import (
    Count,
    Flag,
    Number,
    Static,
    Vector,
    check_static_count,
    check_vector,
)


class Buffers(NamedTuple):
    """The decay rates and scales of a BLT, by which training correlates its noise.

    The strategy has the coefficients `c_0 = 1` and
    `c_t = sum_i output_scale[i] * buf_decay[i] ** (t - 1)`.
    Its inverse has coefficients of the same form.

    Attributes:
      buf_decay: The decay of each buffer of the strategy, decreasing, in (0, 1); shape
        (num_buffers,).
      output_scale: The weights of the buffers, positive.
      inv_buf_decay: The same of the inverse; the decays of both interlace.
      inv_output_scale: The weights of the buffers of the inverse, negative.
    """

    buf_decay: Float[Array, " num_buffers"]
    output_scale: Float[Array, " num_buffers"]
    inv_buf_decay: Float[Array, " num_buffers"]
    inv_output_scale: Float[Array, " num_buffers"]


class BufferedToeplitz(ToeplitzMechanism):
    """Buffered linear Toeplitz (BLT): strategies that are sums of a few exponentials.

    Noise is correlated with as many buffers of the size of the model as there are
    exponentials, however long the training is.

    The parameters are the logarithms of the gaps between the decay rates
    `-log(buf_decay)` and `-log(inv_buf_decay)`, which interlace:
    `1 > buf_decay[0] > inv_buf_decay[0] > buf_decay[1] > ... > 0`. Shape
    (2 * num_buffers,). So any real parameters give a strategy with positive, decreasing
    coefficients, whose sensitivity is exact, and an inverse with negative weights
    (McMahan and Pillutla, https://arxiv.org/abs/2504.21413, Theorems 1 and 2): there is
    nothing to be constrained. The decoder is a positive combination of exponentials
    too, and nothing cancels where decays are close to each other or to 1.

    For prefix sums and one participation the loss takes a time that does not depend on
    `n`.

    Attributes:
      num_buffers: The number of buffers.

    Example:
      >>> from jaxmf_opt import ROBUST_OPTIMIZER, optimize
      >>> mechanism = BufferedToeplitz(1000, num_buffers=2)
      >>> params = optimize(
      ...     mechanism.loss,
      ...     mechanism.initial_params(),
      ...     optimizer=ROBUST_OPTIMIZER,
      ...     rtol=1e-6,
      ... )
      >>> mechanism.buffers(params).buf_decay.shape
      (2,)
    """

    num_buffers: int = eqx.field(static=True)

    def __init__(
        self,
        n: Count | None = None,
        num_buffers: Static = 3,
        *,
        workload_coef: Vector | None = None,
        learning_rate: Vector | None = None,
        decay: Number = 1.0,
        min_sep: Count = 1,
        max_participations: Count | None = 1,
        fixed_epochs: Flag = False,
        max_error: Flag = False,
    ):
        """Describes the mechanism that is wanted.

        Args:
          n: Training steps, by default as many as there are in `workload_coef`. An
            array only if `workload_coef` or `learning_rate` is given.
          num_buffers: The number of buffers.
          workload_coef: The first column of the workload, shape (max_n,), by default
            that of prefix sums: see `workloads`. Elements from `n` on are not looked
            at.
          learning_rate: That of each step, shape (max_n,), by default 1: see
            `workloads.linear_cooldown`. Errors then take O(n^2) time.
          decay: By what each step multiplies the model before it updates it. It is a
            part of `workload_coef`, and has to be given with a `learning_rate`.
          min_sep: Number of steps from one participation of an example to its next, at
            least.
          max_participations: How often an example takes part, at most; None for as
            often as fits.
          fixed_epochs: Whether participations are exactly `min_sep` steps apart, as in
            epochs of a fixed order. The sensitivity is the same.
          max_error: Whether the error is the largest of all steps, and not their mean.

        Raises:
          TypeError: If an argument is of the wrong type.
          ValueError: If an argument is impossible. Where one is traced this cannot be
            seen, and every result of the mechanism is NaN.
        """
        super().__init__(
            n,
            workload_coef=workload_coef,
            learning_rate=learning_rate,
            decay=decay,
            min_sep=min_sep,
            max_participations=max_participations,
            fixed_epochs=fixed_epochs,
            max_error=max_error,
        )
        self.num_buffers = check_static_count("num_buffers", num_buffers)

    def initial_params(self, fewer: Vector | None = None) -> Float[Array, " params"]:
        """A good starting point.

        By default, decay rates in a geometric sequence, about 1 / n to 1: the rational
        approximations of `(1 - x)^{-1/2}` from which BLTs come have such rates
        (https://arxiv.org/abs/2404.16706, Proposition 4.5). From there, buffers can end
        with the decay of another or a weight of 0, where others would have been of use.

        From the optimum with one buffer fewer, those rates and a pair of new ones, of
        strategy and inverse, where the loss is smallest: of many pairs, among them some
        so close to each other that nothing changes. So more buffers are never worse.

        Args:
          fewer: The parameters of the mechanism with one buffer fewer.

        Returns:
          The parameters. NaN where the set-up is impossible.

        Raises:
          TypeError: If `fewer` are no real numbers.
          ValueError: If there are too many or too few.
        """
        n = jnp.asarray(self.n, float)
        if fewer is None:
            rates = (1 / (n + 1)) ** jnp.linspace(1.0, 0.0, 2 * self.num_buffers)
            return self._or_nan(jnp.log(jnp.diff(rates, prepend=0.0)))
        fewer = jnp.asarray(check_vector("fewer", fewer, self._num_params - 2))
        n = n.astype(fewer.dtype)
        rates = jnp.cumsum(jnp.exp(fewer))
        first = (100 * n) ** jnp.linspace(-1.0, 0.0, 60, dtype=n.dtype) * 10
        ratio = jnp.array([1e-9, 1e-3, 1e-2, 0.1, 0.5], n.dtype)
        pairs = jnp.stack(jnp.broadcast_arrays(first, first * (1 + ratio[:, None])), -1)

        def with_pair(pair: Array) -> tuple[Array, Array]:
            together = jnp.sort(jnp.concatenate([rates, pair]))
            params = jnp.log(jnp.diff(together, prepend=0.0))
            return params, self.loss(params)

        candidates, losses = jax.lax.map(with_pair, pairs.reshape(-1, 2))
        return self._or_nan(candidates[jnp.nanargmin(losses)])

    def buffers(self, params: Vector) -> Buffers:
        """The decays and weights of the buffers.

        Args:
          params: The parameters of the mechanism.

        Raises:
          TypeError: If `params` are no real numbers.
          ValueError: If there are too many or too few.
        """
        rates = _Rates(self._check_params(params))
        return Buffers(
            buf_decay=self._or_nan(jnp.exp(-rates.strategy)),
            output_scale=self._or_nan(rates.strategy_weights()),
            inv_buf_decay=self._or_nan(jnp.exp(-rates.inverse)),
            inv_output_scale=self._or_nan(rates.inverse_weights()),
        )

    @property
    def _num_params(self) -> int:
        return 2 * self.num_buffers

    def _strategy_coef(self, params: Array) -> Array:
        rates = _Rates(params)
        return self._one_and_sum(rates.strategy_weights(), rates.strategy)

    def _noising_coef(self, params: Array) -> Array:
        rates = _Rates(params)
        return self._one_and_sum(rates.inverse_weights(), rates.inverse)

    def _streaming_matrix(self, params: Array, scale: Array) -> Any:
        of = self.buffers(params)
        return _streaming.by_buffers(of.inv_buf_decay, of.inv_output_scale, scale)

    def _one_and_sum(self, weights: Array, rates: Array) -> Array:
        later = _exponentials(weights, rates, self.max_n)[:-1]
        coef = jnp.append(jnp.ones(1, later.dtype), later)
        return jnp.where(self._inside, coef, 0.0)

    def _decoder_coef(self, params: Array) -> Array:
        rates = _Rates(params)
        weights = rates.decoder_weights()
        coef = _exponentials(weights, rates.decoder, self.max_n)
        if self.workload_coef is not None:
            # A = A_0 D, where A_0 are the prefix sums: everything stays positive.
            workload_coef = self._workload_coef(coef.dtype)
            first = jnp.zeros_like(workload_coef[:1])
            updates = jnp.diff(workload_coef, prepend=first)
            coef = _toeplitz.multiply(updates, coef)
        return jnp.where(self._inside, coef, 0.0)

    def _squared_error(self, params: Array) -> Array:
        if self.workload_coef is not None or self.learning_rate is not None:
            return super()._squared_error(params)
        rates = _Rates(params)
        pairs = rates.decoder[:, None] + rates.decoder[None, :]
        n = jnp.asarray(self.n, params.dtype)
        sums = jnp.where(
            self.max_error, _geometric_sum(pairs, n), _mean_geometric_sum(pairs, n)
        )
        weights = rates.decoder_weights()
        return weights @ sums @ weights

    def _sensitivity_squared(self, params: Array) -> Array:
        if isinstance(self.max_participations, int) and self.max_participations == 1:
            rates = _Rates(params)
            pairs = rates.strategy[:, None] + rates.strategy[None, :]
            n = jnp.asarray(self.n, params.dtype)
            weights = rates.strategy_weights()
            return 1 + weights @ _geometric_sum(pairs, n - 1) @ weights
        # The coefficients are positive and decrease.
        return self._largest_sum_of_columns(self._strategy_coef(params), True)


class _Rates:
    """The decay rates of the buffers, and the weights that follow from them.

    The generating functions of strategy, inverse and decoder are ratios of products of
    factors `1 - exp(-rate) x`. In increasing order, and beginning with the rate 0 of
    prefix sums, the rates are those of decoder, strategy, inverse, strategy, ...

    Attributes:
      strategy: The decay rates of the strategy, increasing.
      inverse: Those of its inverse.
      decoder: The same and 0.
    """

    def __init__(self, log_gaps: Array):
        gaps = jnp.exp(log_gaps)
        rates = jnp.append(jnp.zeros(1, gaps.dtype), jnp.cumsum(gaps))
        self.strategy, self.inverse, self.decoder = rates[1::2], rates[2::2], rates[::2]
        # Differences of decays, from sums of gaps: exact where rates nearly coincide.
        i, j = np.indices((rates.size, rates.size))
        low, high = np.minimum(i, j)[..., None], np.maximum(i, j)[..., None]
        k = np.arange(gaps.size)
        between = ((low <= k) & (k < high)).astype(gaps.dtype)
        apart = _toeplitz.matmul(between, gaps)
        larger = jnp.exp(-jnp.minimum(rates[:, None], rates[None, :]))
        sign = np.sign(j - i).astype(gaps.dtype)
        self._differences = sign * larger * -jnp.expm1(-apart)

    def strategy_weights(self) -> Array:
        return self._weights(slice(1, None, 2), slice(2, None, 2))

    def inverse_weights(self) -> Array:
        return self._weights(slice(2, None, 2), slice(1, None, 2))

    def decoder_weights(self) -> Array:
        return self._weights(slice(0, None, 2), slice(1, None, 2))

    def _weights(self, poles: slice, zeros: slice) -> Array:
        """The weights of the partial fractions of a ratio of products."""
        numerators = jnp.prod(self._differences[poles, zeros], axis=1)
        others = self._differences[poles, poles]
        others = jnp.where(np.eye(len(others), dtype=bool), 1.0, others)
        return numerators / jnp.prod(others, axis=1)


def _exponentials(weights: Array, rates: Array, n: int) -> Array:
    """`sum_i weights[i] * exp(-rates[i] * t)` for t < n, as a product of matrices."""
    size = max(1, round(n**0.5))
    within = jnp.arange(size, dtype=rates.dtype)[None, :] * rates[:, None]
    begins = jnp.arange(0, n, size, dtype=rates.dtype)[:, None] * rates[None, :]
    product = _toeplitz.matmul(jnp.exp(-begins) * weights[None, :], jnp.exp(-within))
    return product.ravel()[:n]


def _geometric_sum(rate: Array, n: Array) -> Array:
    """`sum_{t < n} exp(-rate * t)`, with all digits at any rate >= 0."""
    rate = _limited(rate)
    return n * _phi_1(n * rate) / _phi_1(rate)


def _mean_geometric_sum(rate: Array, n: Array) -> Array:
    """`sum_{t < n} (1 - t / n) exp(-rate * t)`, with all digits at any rate >= 0."""
    rate = _limited(rate)
    # Both terms are positive, so no digits cancel.
    terms = n * _phi_2(n * rate) + _phi_2(-rate)
    return jnp.exp(-rate) * terms / _phi_1(rate) ** 2


def _limited(rate: Array) -> Array:
    """A rate whose exponential does not overflow; the larger ones are as good as it."""
    return jnp.minimum(rate, math.log(jnp.finfo(rate.dtype).max) / 2)


# The functions phi of exponential integrators, at -x.


def _phi_1(x: Array) -> Array:
    """`(1 - exp(-x)) / x`, which is 1 at 0."""
    return _by_series(x, 1, lambda x: -jnp.expm1(-x) / x)


def _phi_2(x: Array) -> Array:
    """`(exp(-x) - 1 + x) / x^2`, which is 1/2 at 0."""
    return _by_series(x, 2, lambda x: (jnp.expm1(-x) + x) / x**2)


def _by_series(x: Array, first: int, formula: Callable[[Array], Array]) -> Array:
    """A function, by `sum_k (-x)^k / (k + first)!` where |x| < 1."""
    is_small = jnp.abs(x) < 1
    small, large = jnp.where(is_small, x, 0.0), jnp.where(is_small, 1.0, x)
    series = jnp.zeros_like(x)
    for k in reversed(range(18)):
        series = 1 / math.factorial(k + first) - small * series
    return jnp.where(is_small, series, formula(large))
