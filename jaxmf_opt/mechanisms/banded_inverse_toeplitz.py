"""Toeplitz strategies whose inverse is banded (BandInvMF, BISR).

References:
  Kalinin, McKenna, Upadhyay and Lampert, Back to Square Roots: An Optimal Bound on the
  Matrix Factorization Error for Multi-Epoch Differentially Private SGD,
  https://arxiv.org/abs/2505.12128.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from . import _streaming, _toeplitz
from ._bands import BandedMechanism


class BandedInverseToeplitz(BandedMechanism):
    """Toeplitz strategies whose inverse, the noising matrix, is banded.

    The parameters are the leading coefficients of the inverse of the strategy, one for
    each band; the others are 0. Noise is correlated by that inverse: training keeps the
    independent noise of the last `bands - 1` steps. Neither error nor sensitivity
    depends on the scale of the parameters.

    Example:
      >>> from jaxmf_opt import ROBUST_OPTIMIZER, optimize
      >>> mechanism = BandedInverseToeplitz(100, bands=4)
      >>> start = mechanism.initial_params()
      >>> coef = optimize(
      ...     mechanism.loss, start, optimizer=ROBUST_OPTIMIZER, rtol=1e-6
      ... )
      >>> bool(mechanism.loss(coef) < mechanism.loss(start))
      True
    """

    # Inherited, which type checkers do not see of a dataclass.
    __init__ = BandedMechanism.__init__

    def initial_params(self) -> Float[Array, " max_bands"]:
        """A good starting point: the inverse root of the workload, cut at `bands`.

        That is the banded inverse square root factorisation (BISR) of
        https://arxiv.org/abs/2505.12128. For prefix sums it has the coefficients of
        `(1 - x)^{1/2}`.
        """
        root = self._root_of_workload()
        unit = _toeplitz.unit(root.size, root.dtype)
        inverse = _toeplitz.solve(root, unit, jnp.ones(root.size, bool))
        return self._or_nan(self._cut(inverse))

    def _strategy_coef(self, params: Array) -> Array:
        return self._inverse(self._cut(params))

    def _noising_coef(self, params: Array) -> Array:
        return self._padded(self._cut(params))

    def _streaming_matrix(self, params: Array, scale: Array) -> Any:
        return _streaming.by_recursion(scale * self._of_bands(params), params[:0])

    def _decoder_coef(self, params: Array) -> Array:
        coef = self._cut(params)
        if self.workload_coef is not None:
            return _toeplitz.multiply(coef, self._workload_coef(coef.dtype))
        return jnp.where(self._inside, jnp.cumsum(self._padded(coef)), 0.0)

    def _sensitivity_squared(self, params: Array) -> Array:
        return self._largest_sum_of_columns(self._strategy_coef(params), False)
