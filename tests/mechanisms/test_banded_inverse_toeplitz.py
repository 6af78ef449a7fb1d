"""Strategies with a banded inverse: closed forms of the start, and the optimum."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax_privacy.matrix_factorization import toeplitz

from jaxmf_opt import ROBUST_OPTIMIZER, optimize
from jaxmf_opt.mechanisms import BandedInverseToeplitz, BandedToeplitz, workloads


@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with jax.enable_x64():
        yield


class TestStart:
    def test_of_prefix_sums(self):
        start = BandedInverseToeplitz(20, 5).initial_params()
        np.testing.assert_allclose(start, [1, -1 / 2, -1 / 8, -1 / 16, -5 / 128])
        want = toeplitz.optimal_max_error_noising_coefs(5)
        np.testing.assert_allclose(start, want, rtol=1e-14)

    def test_of_momentum_and_decay(self):
        """Kalinin et al., arXiv 2505.12128: both factors have a root of their own."""
        decay, momentum = 0.99, 0.8
        coef = workloads.weight_decay(20, decay, momentum)
        start = BandedInverseToeplitz(bands=9, workload_coef=coef).initial_params()
        k = np.arange(9)
        r = scipy.special.binom(0.5, k) * (-1.0) ** k
        want = np.convolve(decay**k * r, momentum**k * r)[:9]
        np.testing.assert_allclose(start, want, rtol=1e-12, atol=1e-14)

    def test_is_cut_at_the_bands(self):
        start = jax.jit(
            lambda b: BandedInverseToeplitz(20, b, max_bands=4).initial_params()
        )
        np.testing.assert_allclose(start(2), [1, -1 / 2, 0, 0])


def test_one_family_is_the_other_inverted():
    """With all bands both have all Toeplitz strategies."""
    n = 12
    options: Any = {"min_sep": 4, "max_participations": 3}
    strategy, noising = BandedToeplitz(n, n), BandedInverseToeplitz(n, n)
    params = strategy.initial_params()
    inverted = strategy.noising_coef(params)
    np.testing.assert_allclose(noising.loss(inverted), strategy.loss(params))
    strategy = BandedToeplitz(n, n, **options)
    noising = BandedInverseToeplitz(n, n, **options)
    np.testing.assert_allclose(noising.loss(inverted), strategy.loss(params))


@pytest.mark.parametrize("participations", [1, 3])
def test_the_optimum_is_below_the_closed_form(participations: int):
    """And below that of banded strategies, with as few bands."""
    n, bands = 48, 3
    m = BandedInverseToeplitz(
        n, bands, min_sep=n // participations, max_participations=participations
    )
    start = m.initial_params()
    found = optimize(m.loss, start, optimizer=ROBUST_OPTIMIZER, rtol=1e-6)
    assert m.loss(found) < m.loss(start) * (1 - 1e-3)
    banded = participations * BandedToeplitz(n, bands).loss(
        optimize(BandedToeplitz(n, bands).loss, jnp.ones(bands), rtol=1e-6)
    )
    assert m.loss(found) < banded
