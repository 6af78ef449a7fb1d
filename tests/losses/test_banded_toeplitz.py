"""The banded Toeplitz loss: upstream's numbers, with hyperparameters as arrays."""

from collections.abc import Iterator
from typing import NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
from jax_privacy.matrix_factorization import toeplitz

from jaxmf_opt import optimize
from jaxmf_opt.losses.banded_toeplitz import (
    initial_strategy,
    mean_squared_error,
    momentum_workload,
)

MAX_N, MAX_BANDS = 33, 7


class SetUp(NamedTuple):
    """Hyperparameters, and a random strategy for them."""

    n: int
    bands: int
    momentum: float
    coef: np.ndarray


def set_up(n: int, bands: int, momentum: float) -> SetUp:
    rng = np.random.default_rng([n, bands])
    return SetUp(n, bands, momentum, np.append(1.3, rng.uniform(-0.6, 0.6, bands - 1)))


SIZES = ((1, 1), (2, 2), (6, 1), (6, 6), (33, 3), (33, 7))
SET_UPS = [set_up(*size, m) for size in SIZES for m in (0.0, 0.5, 0.95)]


# Of the module, so that hypothesis may run many examples in it.
@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with jax.enable_x64():
        yield


def workload(s: SetUp) -> np.ndarray:
    """Not by `momentum_workload`, which is under test."""
    return np.array([sum(s.momentum**i for i in range(t + 1)) for t in range(s.n)])


# One compiled program for all set-ups: their sizes are operands.
@jax.jit
@jax.value_and_grad
def padded(
    coef: jax.Array, workload: jax.Array, n: jax.Array, bands: jax.Array
) -> jax.Array:
    return mean_squared_error(coef, workload, n=n, bands=bands)


def ours(
    s: SetUp, *, coef_beyond: float = 0.0, workload_beyond: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    coef = np.full(MAX_BANDS, coef_beyond)
    coef[: s.bands] = s.coef
    weights = np.full(MAX_N, workload_beyond)
    weights[: s.n] = workload(s)
    operands = (coef, weights, s.n, s.bands)
    return padded(*map(jnp.array, operands))


@jax.jit
@jax.value_and_grad
def upstream(coef: jax.Array, workload: jax.Array) -> jax.Array:
    errors = toeplitz.per_query_error(
        strategy_coef=coef, n=workload.size, workload_coef=workload, skip_checks=True
    )
    return jnp.mean(errors) * toeplitz.sensitivity_squared(coef, workload.size)


def theirs(s: SetUp) -> tuple[jax.Array, jax.Array]:
    return upstream(jnp.array(s.coef), jnp.array(workload(s)))


def dense(s: SetUp) -> float:
    """The definition, with the matrices written out."""
    zeros = np.zeros(s.n)
    column = np.append(s.coef, zeros)[: s.n]
    a = scipy.linalg.toeplitz(workload(s), zeros)
    c = scipy.linalg.toeplitz(column, zeros)
    b = scipy.linalg.solve(c.T, a.T).T
    return float(np.sum(b**2) / s.n * np.sum(c[:, 0] ** 2))


class TestAgainstReferences:
    @pytest.mark.parametrize(
        "s", SET_UPS, ids=lambda s: f"{s.n}-{s.bands}-{s.momentum}"
    )
    def test_upstream(self, s: SetUp):
        loss, grad = ours(s)
        want_loss, want_grad = theirs(s)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-10)
        # Elements of the gradient may cancel, to exactly 0 with one band.
        scale = float(want_loss / np.linalg.norm(s.coef))
        np.testing.assert_allclose(
            grad[: s.bands], want_grad, rtol=1e-10, atol=1e-10 * scale
        )

    @pytest.mark.parametrize(
        "s", SET_UPS, ids=lambda s: f"{s.n}-{s.bands}-{s.momentum}"
    )
    def test_dense_matrices(self, s: SetUp):
        np.testing.assert_allclose(ours(s)[0], dense(s), rtol=1e-10)

    def test_upstreams_own_loss_function(self):
        s = set_up(33, 7, 0.0)
        want = toeplitz.loss(jnp.array(s.coef), s.n)
        np.testing.assert_allclose(ours(s)[0], want, rtol=1e-10)

    @hypothesis.given(data=st.data(), n=st.integers(1, 12), momentum=st.floats(0, 0.99))
    def test_any_strategy(self, data: st.DataObject, n: int, momentum: float):
        bands = data.draw(st.integers(1, min(n, MAX_BANDS)))
        rest = hnp.arrays(float, bands - 1, elements=st.floats(-1, 1))
        coef = np.append(data.draw(st.floats(0.5, 2)), data.draw(rest))
        scale = data.draw(st.sampled_from([-3.0, 1e-3, 1e3]))
        loss = ours(SetUp(n, bands, momentum, coef))[0]
        want = dense(SetUp(n, bands, momentum, coef))
        np.testing.assert_allclose(loss, want, rtol=1e-9)
        scaled = ours(SetUp(n, bands, momentum, scale * coef))[0]
        np.testing.assert_allclose(scaled, loss, rtol=1e-9)


class TestClosedForms:
    @pytest.mark.parametrize("n", [1, 2, 6, 33])
    def test_independent_noise_on_the_prefix_sum(self, n: int):
        loss, grad = ours(SetUp(n, 1, 0.0, np.array([0.7])))
        np.testing.assert_allclose(loss, (n + 1) / 2, rtol=1e-14)
        np.testing.assert_allclose(grad, 0, atol=1e-12 * n)

    @pytest.mark.parametrize("c", [-0.5, 0.0, 0.4, 2.0])
    def test_two_steps_two_bands(self, c: float):
        loss, grad = ours(SetUp(2, 2, 0.0, np.array([1.0, c])))
        b, slope = 1 + (1 - c) ** 2 / 2, c - 1
        np.testing.assert_allclose(loss, b * (1 + c**2), rtol=1e-14)
        want = slope * (1 + c**2) + b * 2 * c
        np.testing.assert_allclose(grad[1], want, rtol=1e-13)

    @pytest.mark.parametrize("n", [1, 3, 7])
    def test_all_bands_of_the_square_root_factorise_into_itself(self, n: int):
        coef = np.array(initial_strategy(n, n))
        b_squared = np.sum(coef**2 * (n - np.arange(n))) / n
        loss = ours(SetUp(n, n, 0.0, coef))[0]
        np.testing.assert_allclose(loss, b_squared * np.sum(coef**2), rtol=1e-13)

    @pytest.mark.parametrize("max_bands", [1, 2, 9])
    def test_initial_strategy(self, max_bands: int):
        k = np.arange(max_bands)
        binomial = scipy.special.binom(2 * k, k) / 4.0**k
        theirs = toeplitz.optimal_max_error_strategy_coefs(max_bands)
        np.testing.assert_allclose(theirs, binomial, rtol=1e-14)
        for bands in range(1, max_bands + 1):
            got = initial_strategy(max_bands, bands)
            np.testing.assert_allclose(
                got, np.where(k < bands, binomial, 0), rtol=1e-14
            )

    @pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
    def test_momentum_workload(self, momentum: float):
        t = np.arange(20)
        want = (1 - momentum ** (t + 1)) / (1 - momentum)
        np.testing.assert_allclose(momentum_workload(20, momentum), want, rtol=1e-14)


class TestMasks:
    """What is beyond `n` and `bands` plays no part, whatever it is."""

    @pytest.mark.parametrize("beyond", [5.0, -1e300, np.inf, np.nan])
    def test_strategy_beyond_the_bands(self, beyond: float):
        s = set_up(33, 3, 0.5)
        loss, grad = ours(s, coef_beyond=beyond)
        want_loss, want_grad = ours(s)
        assert loss == want_loss
        np.testing.assert_array_equal(grad, want_grad)
        assert np.all(np.asarray(grad[s.bands :]) == 0)

    @pytest.mark.parametrize("beyond", [5.0, -1e300, np.inf, np.nan])
    def test_workload_beyond_the_steps(self, beyond: float):
        s = set_up(6, 6, 0.5)
        loss, grad = ours(s, workload_beyond=beyond)
        want_loss, want_grad = ours(s)
        assert loss == want_loss
        np.testing.assert_array_equal(grad, want_grad)
        assert np.all(np.isfinite(grad))

    def test_gradient_with_respect_to_the_workload(self):
        s = set_up(6, 3, 0.5)
        weights = momentum_workload(9, s.momentum)
        grad = jax.grad(mean_squared_error, argnums=1)(
            jnp.array(s.coef), weights, n=s.n, bands=s.bands
        )
        assert np.all(np.asarray(grad[s.n :]) == 0)
        assert np.all(np.asarray(grad[: s.n]) != 0)

    def test_a_noise_that_explodes_after_the_last_step(self):
        """In a batch, a short set-up is continued up to the longest one."""
        s = SetUp(10, 2, 0.0, np.array([1.0, 2.0]))
        loss, grad = jax.value_and_grad(mean_squared_error)(
            jnp.array(s.coef), jnp.ones(1200), n=s.n, bands=s.bands
        )
        want = theirs(s)
        np.testing.assert_allclose(loss, want[0], rtol=1e-12)
        np.testing.assert_allclose(grad, want[1], rtol=1e-12)

    @pytest.mark.parametrize(("n", "bands"), [(0, 1), (6, 0)])
    def test_impossible_sizes_are_not_finite(self, n: int, bands: int):
        s = set_up(6, 6, 0.0)
        loss = mean_squared_error(jnp.array(s.coef), jnp.ones(6), n=n, bands=bands)
        assert not np.isfinite(loss)


class TestBatches:
    def test_vmap_over_all_hyperparameters(self):
        def one(
            coef: jax.Array, n: jax.Array, bands: jax.Array, momentum: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            weights = momentum_workload(MAX_N, momentum)
            return jax.value_and_grad(mean_squared_error)(
                coef, weights, n=n, bands=bands
            )

        coefs = jnp.stack(
            [jnp.pad(jnp.array(s.coef), (0, MAX_BANDS - s.bands)) for s in SET_UPS]
        )
        sizes = (jnp.array([getattr(s, f) for s in SET_UPS]) for f in SetUp._fields[:3])
        losses, grads = jax.jit(jax.vmap(one))(coefs, *sizes)
        for s, loss, grad in zip(SET_UPS, losses, grads, strict=True):
            want_loss, want_grad = ours(s)
            np.testing.assert_allclose(loss, want_loss, rtol=1e-12)
            scale = float(loss / np.linalg.norm(s.coef))
            np.testing.assert_allclose(grad, want_grad, rtol=1e-12, atol=1e-12 * scale)

    @pytest.mark.parametrize(("n", "bands"), [(16, 4), (33, 7)])
    def test_the_optimum_is_as_low_as_upstreams(self, n: int, bands: int):
        def loss(coef: jax.Array) -> jax.Array:
            return mean_squared_error(coef, jnp.ones(n), n=n, bands=bands)

        start = initial_strategy(bands, bands)
        found = loss(optimize(loss, start))
        want = loss(toeplitz.optimize_banded_toeplitz(n, bands))
        np.testing.assert_allclose(found, want, rtol=1e-9)
        assert found < loss(start) * (1 - 1e-4)
