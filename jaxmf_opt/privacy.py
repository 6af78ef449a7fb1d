"""From a privacy budget to the noise that a training needs, by dp-accounting.

Nothing here is an accountant: https://pypi.org/project/dp-accounting, Google's own, is
asked for all privacy.
"""

import contextlib
import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ._validation import check_positive

__all__ = ["Budget"]


# Beyond, the noise multiplier of dp-accounting 0.6 is off: `delta` is exceeded by up to
# 50 times at an `epsilon` of 1e-12, and by 3% at 1e10.
_LEAST_EPSILON, _LARGEST_EPSILON = 1e-5, 1e5
_LEAST_SAMPLED_EPSILON = 0.01


@dataclasses.dataclass(frozen=True)
class Budget:
    """A training set-up and its privacy budget, (epsilon, delta)-DP for each example.

    Attributes:
      examples: The size of the data set.
      batch_size: Examples in a batch, in the mean where they are sampled.
      epochs: How often each example takes part, in the mean where they are sampled.
      epsilon: The privacy budget, between 1e-5 and 1e5.
      delta: The probability that it does not hold, between 0 and 1. It should be well
        below 1 over the number of examples.

    Raises:
      ValueError: If a number is impossible.

    Example:
      >>> budget = Budget(
      ...     examples=60_000, batch_size=600, epochs=5, epsilon=1.0, delta=1e-6
      ... )
      >>> budget.steps, budget.steps_per_epoch
      (500, 100)
      >>> round(budget.noise_multiplier(), 4)
      4.2247
      >>> round(budget.noise_multiplier(bands=4), 4)  # amplified
      2.174
    """

    examples: int
    batch_size: int
    epochs: int
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        """Refuses what is impossible."""
        for name in ("examples", "batch_size", "epochs"):
            check_positive(name, getattr(self, name), whole=True)
        if self.batch_size > self.examples:
            raise ValueError(
                f"`batch_size` must be at most `examples`, {self.examples}; got "
                f"{self.batch_size}."
            )
        check_positive("epsilon", self.epsilon)
        check_positive("delta", self.delta)
        if not _LEAST_EPSILON <= self.epsilon <= _LARGEST_EPSILON:
            raise ValueError(
                f"`epsilon` must be between {_LEAST_EPSILON:g} and "
                f"{_LARGEST_EPSILON:g}, where dp-accounting's noise multipliers are "
                f"exact; got {self.epsilon}."
            )
        if not self.delta < 1:
            raise ValueError(f"`delta` must be below 1, got {self.delta}.")
        if self.delta >= 1 / self.examples:
            warnings.warn(
                f"`delta` is {self.delta:g}. At 1 over the number of examples, "
                f"{1 / self.examples:.1g}, or above, a mechanism that publishes an "
                "example at random is private: take a smaller one.",
                stacklevel=3,
            )

    @property
    def steps_per_epoch(self) -> int:
        """Training steps in each epoch; what does not fill a batch is left out."""
        return self.examples // self.batch_size

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.epochs * self.steps_per_epoch

    def noise_multiplier(self, bands: int | None = None) -> float:
        """The standard deviation of the noise over clipping norm and sensitivity.

        Args:
          bands: None for batches in a fixed order, where nothing is amplified: any
            mechanism is one Gaussian mechanism, of the sensitivity for `epochs`
            participations, `steps_per_epoch` steps apart. A number of bands for a
            strategy with so many, and cyclic Poisson sampling: the data set is divided
            into so many parts, which take turns; each step draws each example of its
            part with the same probability. The sensitivity is then that for one
            participation (Choquette-Choo et al., https://arxiv.org/abs/2306.08153,
            Theorem 4 and Algorithm 2). With 1 band that is DP-SGD.

        Returns:
          The noise multiplier. It is as small as the budget allows, up to 1e-5 of it;
          up to 1e-3 where batches are sampled and `epsilon` is below 0.1.

        Raises:
          ModuleNotFoundError: If dp-accounting is not installed.
          ValueError: If there are more bands than sampling allows, or if dp-accounting
            finds no noise multiplier: where batches are sampled, it does not if
            `epsilon` is too large, or below 0.01 or about `log(1 / delta) / 1000`.
        """
        accounting = _dp_accounting()
        if bands is None:
            return float(accounting.get_sigma_gaussian(self.epsilon, self.delta))
        check_positive("bands", bands, whole=True)
        if bands > self.steps_per_epoch:
            raise ValueError(
                f"`bands` must be at most {self.steps_per_epoch}, the number of steps "
                "in an epoch: the data set is divided into so many parts, each of a "
                f"batch at least. Got {bands}."
            )
        check_sampled(self)
        probability = self.batch_size / (self.examples // bands)
        rounds = -(-self.steps // bands)

        def event(noise_multiplier: float) -> Any:
            gaussian = accounting.GaussianDpEvent(noise_multiplier)
            sampled = accounting.PoissonSampledDpEvent(probability, gaussian)
            return accounting.SelfComposedDpEvent(sampled, rounds)

        with _quiet():
            return _calibrated(accounting, event, self.epsilon, self.delta)


def check_sampled(budget: Budget) -> None:
    """Refuses a budget that is too small where batches are sampled."""
    if budget.epsilon < _LEAST_SAMPLED_EPSILON:
        raise ValueError(
            f"`epsilon` must be at least {_LEAST_SAMPLED_EPSILON} where batches are "
            "sampled: below, dp-accounting finds noise that is several percent too "
            f"large, or none. Got {budget.epsilon}."
        )


def _calibrated(
    accounting: Any, event: Callable[[float], Any], epsilon: float, delta: float
) -> float:
    """The noise multiplier by privacy loss distributions, which are tight.

    They take long, and all memory where there is little noise. So Renyi differential
    privacy, an upper bound, says first about how much it is.
    """

    def calibrate(accountant: Any, low: float, guess: float, tol: float) -> float:
        bracket = accounting.LowerEndpointAndGuess(low, guess)
        return accounting.calibrate_dp_mechanism(
            accountant, event, epsilon, delta, bracket_interval=bracket, tol=tol
        )

    not_found = accounting.mechanism_calibration.NoBracketIntervalFoundError
    with contextlib.suppress(not_found):
        above = calibrate(accounting.rdp.RdpAccountant, 0.02, 1.0, 1e-4)
        for part in (0.8, 0.5, 0.25):
            with contextlib.suppress(not_found):
                low = part * above
                return calibrate(
                    accounting.pld.PLDAccountant, low, above * 1.001, 1e-5 * low
                )
    raise ValueError(
        "`epsilon` must be one for which dp-accounting finds a noise multiplier above "
        "0.02 where batches are sampled: neither too large, nor below about "
        f"log(1 / delta) / 1000 = {-math.log(delta) / 1e3:.2g}; got {epsilon:g}."
    )


def _dp_accounting() -> Any:
    try:
        import dp_accounting
        from dp_accounting import pld as pld
        from dp_accounting import rdp as rdp
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            "A privacy budget needs dp-accounting: pip install 'jaxmf_opt[privacy]'"
        ) from e
    return dp_accounting


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of orders that the bound leaves out."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def __dir__() -> list[str]:
    return __all__
