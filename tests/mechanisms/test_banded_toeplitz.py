"""Banded Toeplitz strategies: closed forms of the start, and the optimum."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax_privacy.matrix_factorization import toeplitz

from jaxmf_opt import optimize
from jaxmf_opt.mechanisms import BandedToeplitz, workloads

pytestmark = pytest.mark.mixes  # upstream's code


@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with jax.enable_x64():
        yield


def root_coef(n: int) -> np.ndarray:
    """Of `(1 - x)^{-1/2}`: Fichtenberger et al., arXiv 2202.11205."""
    k = np.arange(n)
    return scipy.special.binom(2 * k, k) / 4.0**k


class TestStart:
    def test_of_prefix_sums(self):
        start = BandedToeplitz(20, 5).initial_params()
        np.testing.assert_allclose(start, [1, 1 / 2, 3 / 8, 5 / 16, 35 / 128])

    def test_of_momentum_and_decay(self):
        """Kalinin and Lampert, arXiv 2405.13763, section 3.1."""
        decay, momentum = 0.99, 0.8
        coef = workloads.weight_decay(20, decay, momentum)
        start = BandedToeplitz(bands=9, workload_coef=coef).initial_params()
        k = np.arange(9)
        r = root_coef(9)
        want = np.convolve(decay**k * r, momentum**k * r)[:9]
        np.testing.assert_allclose(start, want, rtol=1e-13)

    def test_is_cut_at_the_bands(self):
        start = jax.jit(lambda b: BandedToeplitz(20, b, max_bands=5).initial_params())
        np.testing.assert_allclose(start(3), [1, 1 / 2, 3 / 8, 0, 0])

    @pytest.mark.parametrize("n", [1, 2, 100, 400])
    def test_its_largest_error_with_all_bands(self, n: int):
        """The square root factorisation: then B = C, and both have one norm."""
        m = BandedToeplitz(n, n, max_error=True)
        want = np.sum(root_coef(n) ** 2) ** 2
        np.testing.assert_allclose(m.loss(m.initial_params()), want, rtol=1e-12)


class TestOptimum:
    @pytest.mark.parametrize("max_error", [False, True])
    def test_is_as_low_as_upstreams(self, max_error: bool):
        n, bands = 33, 7
        m = BandedToeplitz(n, bands, max_error=max_error)
        reduction = jnp.max if max_error else jnp.mean
        want = m.loss(
            toeplitz.optimize_banded_toeplitz(n, bands, reduction_fn=reduction)
        )
        start = m.initial_params()
        found = m.loss(optimize(m.loss, start))
        assert found <= want * (1 + 1e-12)
        assert found < m.loss(start) * (1 - 1e-4)

    def test_epochs_multiply_it(self):
        """Where columns of an example have no row in common."""
        once = BandedToeplitz(32, 4)
        often = BandedToeplitz(32, 4, min_sep=8, max_participations=4)
        params = once.initial_params()
        np.testing.assert_allclose(often.loss(params), 4 * once.loss(params))
