"""BLTs: published numbers, closed forms, limits, and the optimum."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax_privacy.matrix_factorization import buffered_toeplitz

from jaxmf_opt import ROBUST_OPTIMIZER, optimize, solve
from jaxmf_opt.mechanisms import BufferedToeplitz, workloads

pytestmark = pytest.mark.mixes  # upstream's code


@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with jax.enable_x64():
        yield


def optimized(m: BufferedToeplitz) -> jax.Array:
    return solve(
        m.loss, m.initial_params(), gtol=1e-9, optimizer=ROBUST_OPTIMIZER
    ).value


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
        np.testing.assert_allclose(
            found.output_scale, [0.0122853238, 0.1878393665], rtol=1e-7
        )
        np.testing.assert_allclose(
            found.buf_decay, [0.9999528892, 0.9857068667], rtol=1e-7
        )

    def test_the_sensitivity_of_a_test_of_federated_compute(self):
        """`fcp/confidentialcompute/python/accounting_test.py`: zCDP of 3.17226586."""
        point = params_of(
            [
                *(0.9999999999921251, 0.9944453083640997),
                *(0.8985923474607591, 0.4912001418098778),
            ],
            [
                *(0.0070314825502323835, 0.10613806907600574),
                *(0.1898159060327625, 0.1966594748073734),
            ],
        )
        m = BufferedToeplitz(100, 4, min_sep=50, max_participations=2)
        half = m.sensitivity_squared(point) / 2
        assert round(float(half), 8) == 3.17226586

    @pytest.mark.parametrize(
        ("n", "buffers", "limit"),
        [(100, 2, 1.03), (10_000, 3, 1.03), (10**6, 5, 1.05), (10**7, 6, 1.06)],
    )
    def test_near_the_lower_bound(self, n: int, buffers: int, limit: float):
        """`test_optimize_single_participation_near_optimal` of jax-privacy.

        The bound is that of https://arxiv.org/abs/2404.16706, equation 2.8.
        """
        m = BufferedToeplitz(n, buffers, max_error=True)
        # Few digits are wanted: the default optimizer, which compiles sooner, will do.
        root = np.sqrt(m.loss(optimize(m.loss, m.initial_params(), rtol=1e-6)))
        assert root <= limit * (1 + np.log(n) / np.pi)


class TestClosedForms:
    @pytest.mark.parametrize("n", [1, 2, 17, 3000])
    @pytest.mark.parametrize("max_error", [False, True])
    def test_equal_sums_over_steps(self, n: int, max_error: bool):
        """Also where decays are next to 1 or to each other."""
        closed = BufferedToeplitz(n, 3, max_error=max_error)
        summed = BufferedToeplitz(
            n, 3, max_error=max_error, workload_coef=workloads.prefix_sum(n)
        )
        for point in (
            closed.initial_params(),
            jnp.array([-25.0, -30.0, -1.0, -28.0, 0.0, 1.0]),
            jnp.array([-3.0, 2.5, -3.0, -40.0, -40.0, 0.0]),
        ):
            got = jax.value_and_grad(closed.loss)(point)
            want = jax.value_and_grad(summed.loss)(point)
            np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
            scale = 1e-12 * float(want[0])
            np.testing.assert_allclose(got[1], want[1], rtol=1e-10, atol=scale)
            coef = closed.strategy_coef(point)
            np.testing.assert_allclose(
                closed.sensitivity_squared(point), np.sum(coef**2), rtol=1e-12
            )

    def test_do_not_grow_with_n(self):
        text = str(jax.make_jaxpr(BufferedToeplitz(10**8, 2).loss)(jnp.zeros(4)))
        assert "100000000]" not in text

    def test_against_many_digits(self):
        """At 100,000 steps, where jax-privacy's numbers have 9 digits."""
        n, buffers = 100_000, 4
        m = BufferedToeplitz(n, buffers)
        point = m.initial_params()
        with mpmath.workdps(60):
            gaps = [mpmath.exp(mpmath.mpf(float(x))) for x in point]
            rates = [mpmath.fsum(gaps[: i + 1]) for i in range(2 * buffers)]
            poles = [mpmath.mpf(1)] + [mpmath.exp(-r) for r in rates[1::2]]
            decays = [mpmath.exp(-r) for r in rates[::2]]

            def weights(at: list[Any], zeros: list[Any]) -> list[Any]:
                return [
                    mpmath.fprod(p - z for z in zeros)
                    / mpmath.fprod(p - q for q in at if q != p)
                    for p in at
                ]

            def pairs(at: list[Any], w: list[Any], sums: Any) -> Any:
                return mpmath.fsum(
                    a * b * sums(p * q)
                    for a, p in zip(w, at, strict=True)
                    for b, q in zip(w, at, strict=True)
                )

            def geometric(r: Any, count: int) -> Any:
                return count if r == 1 else (1 - r**count) / (1 - r)

            def mean(r: Any) -> Any:
                if r == 1:
                    return mpmath.mpf(n + 1) / 2
                return (n - r * geometric(r, n)) / (1 - r) / n

            error = pairs(poles, weights(poles, decays), mean)
            of_strategy = weights(decays, poles[1:])
            sensitivity = 1 + pairs(decays, of_strategy, lambda r: geometric(r, n - 1))
            want = float(error * sensitivity)
        np.testing.assert_allclose(m.loss(point), want, rtol=1e-13)


class TestParameters:
    def test_any_give_a_strategy_that_decreases(self):
        points = np.random.default_rng(0).uniform(-12, 3, (50, 6))
        m = BufferedToeplitz(60, 3)
        coefs = jax.vmap(m.strategy_coef)(points)
        buffers = jax.vmap(m.buffers)(points)
        assert np.all(buffers.output_scale > 0)
        assert np.all(buffers.inv_output_scale < 0)
        assert np.all(np.diff(coefs) <= 0)
        assert np.all(coefs >= 0)

    def test_buffers_are_those_of_upstream(self):
        m = BufferedToeplitz(1000, 3)
        ours = m.buffers(m.initial_params())
        theirs = buffered_toeplitz.BufferedToeplitz.build(
            ours.buf_decay, ours.output_scale
        ).inverse()
        np.testing.assert_allclose(ours.inv_buf_decay, theirs.buf_decay, rtol=1e-12)
        np.testing.assert_allclose(
            ours.inv_output_scale, theirs.output_scale, rtol=1e-10
        )


@pytest.mark.parametrize(("participations", "error"), [(1, "max"), (3, "mean")])
def test_the_optimum_is_as_low_as_upstreams(participations: int, error: str):
    n, buffers = 60, 2
    options: Any = {
        "min_sep": n // participations,
        "max_participations": participations,
    }
    loss_fn = buffered_toeplitz.LossFn.build_min_sep(n, error=error, **options)
    blt, _ = buffered_toeplitz.optimize_loss(loss_fn, buffers)
    m = BufferedToeplitz(n, buffers, max_error=error == "max", **options)
    want = m.loss(params_of(blt.buf_decay.tolist(), blt.output_scale.tolist()))
    assert m.loss(optimized(m)) <= want * (1 + 1e-12)
