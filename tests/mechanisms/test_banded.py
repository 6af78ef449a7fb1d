"""The two banded families: closed forms of their starts, and their optima."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax_privacy.matrix_factorization import toeplitz
from numpy.testing import assert_allclose

from jaxmf_opt import ROBUST_OPTIMIZER, optimize
from jaxmf_opt.mechanisms import BandedInverseToeplitz, BandedToeplitz, workloads

pytestmark = pytest.mark.mixes  # upstream's code

# The family, and the power of the workload that its coefficients start from.
of_families = pytest.mark.parametrize(
    ("family", "power"), [(BandedToeplitz, -0.5), (BandedInverseToeplitz, 0.5)]
)


def binomial(power: float, size: int) -> np.ndarray:
    """The coefficients of `(1 - x)^power`."""
    k = np.arange(size)
    return scipy.special.binom(power, k) * (-1.0) ** k


class TestStart:
    def test_of_prefix_sums(self):
        strategy = BandedToeplitz(20, 5).initial_params()
        assert_allclose(strategy, [1, 1 / 2, 3 / 8, 5 / 16, 35 / 128])
        noising = BandedInverseToeplitz(20, 5).initial_params()
        assert_allclose(noising, [1, -1 / 2, -1 / 8, -1 / 16, -5 / 128])
        want = toeplitz.optimal_max_error_noising_coefs(5)
        assert_allclose(noising, want, rtol=1e-14)

    @of_families
    def test_of_momentum_and_decay(self, family: Any, power: float):
        """arXiv 2405.13763 and 2505.12128: both factors have a root of their own."""
        decay, momentum = 0.99, 0.8
        coef = workloads.weight_decay(20, decay, momentum)
        start = family(bands=9, workload_coef=coef).initial_params()
        k, root = np.arange(9), binomial(power, 9)
        want = np.convolve(decay**k * root, momentum**k * root)[:9]
        assert_allclose(start, want, rtol=1e-12, atol=1e-14)

    @of_families
    def test_is_cut_at_the_bands(self, family: Any, power: float):
        start = jax.jit(lambda b: family(20, b, max_bands=5).initial_params())
        want = np.append(binomial(power, 3), [0, 0])
        assert_allclose(start(3), want)

    @pytest.mark.parametrize("n", [1, 400])
    def test_its_largest_error_with_all_bands(self, n: int):
        """The square root factorisation: then B = C, and both have one norm."""
        m = BandedToeplitz(n, n, max_error=True)
        want = np.sum(binomial(-0.5, n) ** 2) ** 2
        assert_allclose(jax.jit(lambda: m.loss(m.initial_params()))(), want, rtol=1e-12)


class TestOptimum:
    def test_is_as_low_as_upstreams(self):
        m = BandedToeplitz(33, 7)
        want = m.loss(toeplitz.optimize_banded_toeplitz(33, 7))
        start = m.initial_params()
        found = m.loss(optimize(m.loss, start))
        assert found <= want * (1 + 1e-12)
        assert found < m.loss(start) * (1 - 1e-4)

    def test_of_an_inverse_is_below_that_of_as_few_bands(self):
        """And below the closed form."""
        m = BandedInverseToeplitz(
            48, 3, min_sep=16, max_participations=3, fixed_epochs=True
        )
        start = m.initial_params()
        found = optimize(m.loss, start, optimizer=ROBUST_OPTIMIZER, rtol=1e-6)
        assert m.loss(found) < m.loss(start) * (1 - 1e-3)
        # Its columns have no row in common, so epochs multiply its loss.
        loss = BandedToeplitz(48, 3).loss
        assert m.loss(found) < 3 * loss(optimize(loss, jnp.ones(3), rtol=1e-6))
