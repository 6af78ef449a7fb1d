"""Banded Toeplitz strategies (DP-BandMF).

References:
  McKenna, Scaling up the Banded Matrix Factorization Mechanism for Differentially
  Private ML, https://arxiv.org/abs/2405.15913.

  Choquette-Choo et al., (Amplified) Banded Matrix Factorization: A unified approach to
  private training, https://arxiv.org/abs/2306.08153.
"""

from typing import Any

from jaxtyping import Array, Float

from . import _streaming, _toeplitz
from ._bands import BandedMechanism


class BandedToeplitz(BandedMechanism):
    """Banded Toeplitz strategies (DP-BandMF).

    The parameters are the leading coefficients of the strategy, one for each band; the
    others are 0. Noise is correlated by the inverse: for that, training keeps the
    correlated noise of the last `bands - 1` steps. Neither error nor sensitivity
    depends on the scale of the parameters.

    Where no example takes part twice within `bands` steps, the sensitivity is
    exact, and the mechanism can be amplified by sampling.

    Example:
      >>> from jaxmf_opt import optimize
      >>> mechanism = BandedToeplitz(100, bands=4, min_sep=25, max_participations=4)
      >>> start = mechanism.initial_params()
      >>> coef = optimize(mechanism.loss, start, rtol=1e-6)
      >>> bool(mechanism.loss(coef) < mechanism.loss(start))
      True
      >>> mechanism.strategy_coef(coef).shape
      (100,)
    """

    # Inherited, which type checkers do not see of a dataclass.
    __init__ = BandedMechanism.__init__

    def initial_params(self) -> Float[Array, " max_bands"]:
        """A good starting point: the square root of the workload, cut at `bands`.

        That is the banded square root factorisation of Kalinin and Lampert,
        https://arxiv.org/abs/2405.13763. For prefix sums it has the coefficients of
        `(1 - x)^{-1/2}`, by which Toeplitz strategies with all bands have the smallest
        maximal error: Fichtenberger, Henzinger and Upadhyay,
        https://arxiv.org/abs/2202.11205.
        """
        return self._or_nan(self._cut(self._root_of_workload()))

    def _strategy_coef(self, params: Array) -> Array:
        return self._padded(self._cut(params))

    def _noising_coef(self, params: Array) -> Array:
        return self._inverse(self._cut(params))

    def _streaming_matrix(self, params: Array, scale: Array) -> Any:
        coef = self._of_bands(params) / params[0]
        return _streaming.by_recursion((scale / params[0])[None], coef[1:])

    def _decoder_coef(self, params: Array) -> Array:
        workload_coef = self._workload_coef(params.dtype)
        return _toeplitz.solve(self._cut(params), workload_coef, self._inside)

    def _sensitivity_squared(self, params: Array) -> Array:
        no_common_row: Any = self.bands <= self.min_sep
        return self._largest_sum_of_columns(self._cut(params), no_common_row)
