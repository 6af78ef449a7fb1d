"""BLTs: published numbers, closed forms, limits, and the optimum."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax_privacy.matrix_factorization import buffered_toeplitz
from numpy.testing import assert_allclose

from jaxmf_opt import ROBUST_OPTIMIZER, solve
from jaxmf_opt.mechanisms import BufferedToeplitz, workloads

pytestmark = pytest.mark.mixes  # upstream's code


def optimized(m: BufferedToeplitz, fewer: Any = None) -> jax.Array:
    start = m.initial_params(fewer)
    return solve(m.loss, start, gtol=1e-9, optimizer=ROBUST_OPTIMIZER).value


def params_of(buf_decay: list[float], output_scale: list[float]) -> jax.Array:
    """Our parameters of a strategy, by upstream's inverse of it."""
    blt = buffered_toeplitz.BufferedToeplitz.build(buf_decay, output_scale)
    rates = -jnp.log(jnp.stack([blt.buf_decay, blt.inverse().buf_decay], axis=1))
    return jnp.log(jnp.diff(rates.ravel(), prepend=0.0))


class TestPublishedNumbers:
    def test_the_optimum_of_a_test_of_jax_privacy(self):
        """`test_optimize_single_participation_golden`, 2 buffers; it allows 1e-5."""
        m = BufferedToeplitz(100_000, 2, max_error=True)
        found = m.buffers(optimized(m))
        scale, decay = [0.0122853238, 0.1878393665], [0.9999528892, 0.9857068667]
        assert_allclose(found.output_scale, scale, rtol=1e-7)
        assert_allclose(found.buf_decay, decay, rtol=1e-7)

    def test_the_sensitivity_of_a_test_of_federated_compute(self):
        """`fcp/confidentialcompute/python/accounting_test.py`: zCDP of 3.17226586."""
        decays = 0.9999999999921251, 0.9944453083640997, 0.8985923474607591
        scales = 0.0070314825502323835, 0.10613806907600574, 0.1898159060327625
        point = params_of([*decays, 0.4912001418098778], [*scales, 0.1966594748073734])
        m = BufferedToeplitz(100, 4, min_sep=50, max_participations=2)
        assert round(float(m.sensitivity_squared(point) / 2), 8) == 3.17226586


class TestClosedForms:
    @pytest.mark.parametrize(("n", "max_error"), [(1, True), (17, True), (3000, False)])
    def test_equal_sums_over_steps(self, n: int, max_error: bool):
        """Also where decays are next to 1, to 0 or to each other."""
        closed = BufferedToeplitz(n, 3, max_error=max_error)
        summed = BufferedToeplitz(
            n, 3, max_error=max_error, workload_coef=workloads.prefix_sum(n)
        )
        losses = [jax.jit(jax.value_and_grad(m.loss)) for m in (closed, summed)]
        points = np.random.default_rng(n).uniform(-40, 5, (40, 6))
        points[::2] /= 10
        points[::3, -1] = 40  # a decay of exactly 0
        for point in (
            closed.initial_params(),
            jnp.array([-25.0, -30.0, -1.0, -28.0, 0.0, 1.0]),
            jnp.array([-3.0, 2.5, -3.0, -40.0, -40.0, 0.0]),
            *map(jnp.array, points),
        ):
            got, want = (value_and_grad(point) for value_and_grad in losses)
            assert_allclose(got[0], want[0], rtol=1e-12)
            scale = 1e-12 * float(want[0])
            assert_allclose(got[1], want[1], rtol=1e-10, atol=scale)
            want = np.sum(closed.strategy_coef(point) ** 2)
            assert_allclose(closed.sensitivity_squared(point), want, rtol=1e-12)

    def test_do_not_grow_with_n(self):
        text = str(jax.make_jaxpr(BufferedToeplitz(10**8, 2).loss)(jnp.zeros(4)))
        assert "100000000]" not in text

    def test_weights_have_all_digits(self):
        """Those of partial fractions; jax-privacy's have 9 digits here."""
        m = BufferedToeplitz(100_000, 4)
        point = m.initial_params()
        with mpmath.workdps(60):
            gaps = [mpmath.exp(mpmath.mpf(float(x))) for x in point]
            decays = [mpmath.exp(-r) for r in itertools.accumulate(gaps)]
            poles, zeros = decays[::2], decays[1::2]
            want = [
                mpmath.fprod(p - z for z in zeros)
                / mpmath.fprod(p - q for q in poles if q != p)
                for p in poles
            ]
        got = m.buffers(point).output_scale
        assert_allclose(got, np.array(want, float), rtol=1e-13)


class TestParameters:
    def test_any_give_a_strategy_that_decreases(self):
        points = np.random.default_rng(0).uniform(-12, 3, (50, 6))
        m = BufferedToeplitz(60, 3)
        coefs = jax.vmap(m.strategy_coef)(points)
        buffers = jax.vmap(m.buffers)(points)
        assert np.all(buffers.output_scale > 0)
        assert np.all(buffers.inv_output_scale < 0)
        assert np.all(coefs >= 0) and np.all(np.diff(coefs) <= 0)

    def test_buffers_are_those_of_upstream(self):
        m = BufferedToeplitz(1000, 3)
        ours = m.buffers(m.initial_params())
        build = buffered_toeplitz.BufferedToeplitz.build
        theirs = build(ours.buf_decay, ours.output_scale).inverse()
        assert_allclose(ours.inv_buf_decay, theirs.buf_decay, rtol=1e-12)
        assert_allclose(ours.inv_output_scale, theirs.output_scale, rtol=1e-10)


class TestOptimum:
    def test_is_as_low_as_upstreams(self):
        """The second buffer is of use, though upstream's is not; a third is not."""
        options: Any = {"min_sep": 16, "max_participations": 4}
        # From `LossFn.build_min_sep` and `optimize_loss` of jax-privacy 2.0.0.
        decay = [0.8648898339576704, 0.8648178308189994]
        scale = [0.26111235445321945, 0.2598548725165137]
        want = BufferedToeplitz(64, 2, **options).loss(params_of(decay, scale))
        one, two, three = (BufferedToeplitz(64, d, **options) for d in (1, 2, 3))
        of_one = optimized(one)
        of_two = optimized(two, of_one)
        assert one.loss(of_one) > two.loss(of_two) * (1 + 1e-5)
        assert two.loss(of_two) <= want * (1 + 1e-12)
        of_three = three.initial_params(of_two)
        assert_allclose(three.loss(of_three), two.loss(of_two), rtol=1e-9)

    def test_a_buffer_more_is_never_worse(self):
        """From whatever point it is added to."""

        @jax.jit
        def losses(point: jax.Array) -> tuple[jax.Array, jax.Array]:
            m, more = (BufferedToeplitz(60, d, min_sep=20) for d in (2, 3))
            return m.loss(point), more.loss(more.initial_params(point))

        for point in np.random.default_rng(0).uniform(-12, 1, (10, 4)):
            before, after = losses(point)
            assert after <= before * (1 + 1e-8)
