"""The two banded families: closed forms of their starts, and their optima."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax_privacy.matrix_factorization import optimization, streaming_matrix, toeplitz
from numpy.testing import assert_allclose
from scipy.linalg import toeplitz as lower_triangular

from jaxmf_opt import ROBUST_OPTIMIZER, optimize
from jaxmf_opt.mechanisms import (
    BandedInverseToeplitz,
    BandedToeplitz,
    NormalizedBandedToeplitz,
    workloads,
)

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


class TestNormalized:
    """Columns scaled to one norm."""

    @pytest.mark.parametrize(
        ("n", "bands", "max_error"), [(12, 5, False), (12, 12, True), (3, 2, False)]
    )
    def test_against_matrices_written_out(self, n: int, bands: int, max_error: bool):
        """Also where set-ups are arrays, and there are more parameters than steps."""
        rng = np.random.default_rng(n + bands)
        coef, workload_coef = rng.uniform(0.2, 1, 14), rng.uniform(0.2, 1, 13)
        direction = rng.normal(size=14)

        @jax.jit
        def results(n: Any, bands: Any, coef: Any) -> Any:
            m = NormalizedBandedToeplitz(
                n, bands, max_bands=14, workload_coef=workload_coef, max_error=max_error
            )
            slope = jax.jvp(m.loss, (coef,), (direction,))[1]
            return m.loss(coef), m.per_query_error(coef), slope

        loss, errors, slope = results(n, bands, coef)
        cut = np.append(coef[: min(bands, n)], np.zeros(13))[:n]
        c = lower_triangular(cut, np.zeros(n))
        c /= np.linalg.norm(c, axis=0)
        a = lower_triangular(workload_coef[:n], np.zeros(n))
        want = np.sum((a @ np.linalg.inv(c)) ** 2, axis=1)
        assert_allclose(errors, np.append(want, np.zeros(13 - n)), rtol=1e-11)
        assert_allclose(loss, want.max() if max_error else want.mean(), rtol=1e-11)
        step = 1e-6 * direction
        ends = [results(n, bands, coef + s * step)[0] for s in (1, -1)]
        assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-6)

    def test_its_optimum_is_below_that_of_jax_privacy(self):
        """By its example `normalized-banded-toeplitz`, of 3 epochs of 8 steps."""
        n, bands, epochs = 24, 8, 3
        m = NormalizedBandedToeplitz(n, bands, min_sep=8, max_participations=epochs)
        start = m.initial_params()
        got = m.loss(optimize(m.loss, start, optimizer=ROBUST_OPTIMIZER, rtol=1e-9))

        def theirs(coef: Any) -> Any:
            noising = toeplitz.inverse_as_streaming_matrix(
                coef, column_normalize_for_n=n
            )
            decoder = streaming_matrix.multiply_streaming_matrices(
                streaming_matrix.prefix_sum(), noising
            )
            return jnp.mean(decoder.row_norms_squared(n))

        want = epochs * theirs(optimization.optimize(theirs, start))
        assert got <= want * (1 + 1e-9)

    def test_bands_must_not_meet(self):
        with pytest.raises(ValueError, match="`bands` must be at most `min_sep`, 3;"):
            NormalizedBandedToeplitz(12, 4, min_sep=3, max_participations=2)

        def loss(bands: Any) -> Any:
            m = NormalizedBandedToeplitz(
                12, bands, max_bands=4, min_sep=3, max_participations=2
            )
            return m.loss(m.initial_params())

        losses = jax.jit(jax.vmap(loss))(jnp.array([3, 4]))
        assert np.isfinite(losses[0]) and np.isnan(losses[1])
