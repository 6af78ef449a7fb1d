"""Noise multipliers, by dp-accounting called directly."""

import logging
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from scipy.special import log_ndtr

from jaxmf_opt.privacy import Budget

SMALL: dict[str, Any] = {
    "examples": 1000,
    "batch_size": 100,
    "epochs": 4,
    "epsilon": 2.0,
    "delta": 1e-5,
}


def epsilon_of(budget: Budget, noise_multiplier: float, bands: int | None) -> float:
    event: Any = dp_accounting.GaussianDpEvent(noise_multiplier)
    if bands is not None:
        probability = budget.batch_size / (budget.examples // bands)
        event = dp_accounting.PoissonSampledDpEvent(probability, event)
        event = dp_accounting.SelfComposedDpEvent(event, -(-budget.steps // bands))
    return pld.PLDAccountant().compose(event).get_epsilon(budget.delta)


# One part for each step, and parts that do not take the same number of turns.
@pytest.mark.parametrize(("epsilon", "bands"), [(0.3, None), (0.3, 3), (2.0, 10)])
def test_the_budget_is_met_and_used(epsilon: float, bands: int | None):
    level = logging.getLogger("absl").level
    budget = Budget(**{**SMALL, "epsilon": epsilon})
    noise_multiplier = budget.noise_multiplier(bands)
    # dp-accounting is not made silent for ever.
    assert logging.getLogger("absl").level == level
    assert epsilon_of(budget, noise_multiplier, bands) <= epsilon * (1 + 1e-4)
    assert epsilon_of(budget, noise_multiplier * (1 - 1e-3), bands) > epsilon


def test_of_an_example_of_the_literature():
    """arXiv 2306.08153 has the formulas; the numbers are of PLD accounting."""
    budget = Budget(100_000, 512, 20, 8.0, 1e-6)
    assert (budget.steps_per_epoch, budget.steps) == (195, 3900)
    assert round(budget.noise_multiplier(), 4) == 0.6529
    assert round(budget.noise_multiplier(195), 4) == 2.92


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"examples": 0}, "`examples` must be a whole number above 0, got 0."),
        ({"batch_size": 1001}, "`batch_size` must be at most `examples`, 1000"),
        ({"epsilon": 0.0}, "`epsilon` must be a number above 0"),
        ({"epsilon": float("inf")}, "`epsilon` must be between 1e-05 and 100000"),
        ({"epsilon": 1e-6}, "`epsilon` must be between .* got 1e-06"),
        ({"delta": 1.0}, "`delta` must be below 1"),
    ],
)
def test_impossible_budgets(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Budget(**{**SMALL, **wrong})


def test_more_bands_than_sampling_allows():
    with pytest.raises(ValueError, match="`bands` must be at most 10, the number"):
        Budget(**SMALL).noise_multiplier(11)


@pytest.mark.parametrize("epsilon", [1e-5, 1e5])
@pytest.mark.parametrize("delta", [1e-100, 1e-4])
def test_budgets_of_all_sizes(epsilon: float, delta: float):
    """By the formula of Balle and Wang, https://arxiv.org/abs/1805.06530."""
    budget = Budget(**{**SMALL, "epsilon": epsilon, "delta": delta})
    sigma = budget.noise_multiplier()
    half, shift = 1 / (2 * sigma), epsilon * sigma
    above, below = log_ndtr(half - shift), epsilon + log_ndtr(-half - shift)
    of_sigma = above + np.log1p(-np.exp(below - above))
    np.testing.assert_allclose(of_sigma - np.log(delta), 0.0, atol=3e-6)
    message = "neither too large, nor below" if epsilon > 1 else "at least 0.01"
    with pytest.raises(ValueError, match=message):
        budget.noise_multiplier(1)


@pytest.mark.parametrize(("epsilon", "rtol"), [(0.01, 1e-3), (0.1, 2e-5)])
def test_where_every_batch_is_certain_nothing_is_amplified(epsilon: float, rtol: float):
    budget = Budget(**{**SMALL, "epsilon": epsilon})
    one = dp_accounting.get_sigma_gaussian(epsilon, budget.delta)
    want = budget.epochs**0.5 * one
    np.testing.assert_allclose(budget.noise_multiplier(10), want, rtol=rtol)


def test_a_delta_that_protects_nobody():
    with pytest.warns(UserWarning, match="1 over the number of examples, 0.001"):
        Budget(**{**SMALL, "delta": 1e-3})
