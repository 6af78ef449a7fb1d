"""Workloads and schedules: their definitions, upstream's, optax's, published ones."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_privacy.matrix_factorization import streaming_matrix
from numpy.testing import assert_allclose, assert_array_equal

from jaxmf_opt.mechanisms import workloads

N = 12
# What SGD keeps of the model, and of the last update.
FACTORS = {
    "plain": (1.0, 0.0),
    "momentum": (1.0, 0.9),
    "momentum above decay": (0.5, 0.9),
    "equal": (0.9, 0.9),
    "nearly equal": (0.9, 0.9 - 1e-9),
    "powers that underflow": (1e-10, 1e-300),
}
of_factors = pytest.mark.parametrize(
    ("decay", "momentum"), FACTORS.values(), ids=FACTORS
)


def weights(decay: Any, momentum: Any) -> np.ndarray:
    """The definition."""
    terms = [[decay ** (t - i) * momentum**i for i in range(t + 1)] for t in range(N)]
    return np.array([sum(x) for x in terms])


class TestWorkloads:
    def test_prefix_sum_and_momentum(self):
        assert_array_equal(workloads.prefix_sum(40), np.ones(40))
        want = (1 - 0.95 ** np.arange(1, N + 1)) / (1 - 0.95)
        assert_allclose(workloads.momentum(N, 0.95), want, rtol=1e-13)

    @of_factors
    def test_weight_decay(self, decay: float, momentum: float):
        got = workloads.weight_decay(N, decay, momentum)
        assert_allclose(got, weights(decay, momentum), rtol=1e-13)

    @of_factors
    def test_derivatives(self, decay: float, momentum: float):
        """In both modes, against complex steps of the definition."""
        h = 1e-200
        of_decay = weights(decay + h * 1j, momentum)
        of_momentum = weights(decay, momentum + h * 1j)
        for jacobian in (jax.jacfwd, jax.jacrev):
            coef = functools.partial(workloads.weight_decay, N)
            got = jax.jit(jacobian(coef, (0, 1)))(decay, momentum)
            assert_allclose(got[0], np.imag(of_decay) / h, rtol=1e-12)
            assert_allclose(got[1], np.imag(of_momentum) / h, rtol=1e-12)


class TestSchedules:
    def test_published_cooldown(self):
        """That of StackOverflow in google-research/federated, for 2000 rounds."""
        got = np.array(workloads.linear_cooldown(2000))
        want = np.append(np.ones(1500), np.linspace(1.0, 0.05, 500))
        assert_allclose(got, want, rtol=1e-12)
        assert_allclose((got**2).sum(), 1675.5673847695411, rtol=1e-12)

    @pytest.mark.parametrize(
        ("n", "fraction", "cooling", "final"),
        [
            (12, 0.0, 0, 0.2),
            (12, 0.1, 1, 0.2),  # 1.2, rounded down: only the last step
            (7, 1.0, 7, 3.0),
            (7, 0.3, 2, 0.0),
            (10, 0.7, 7, 0.2),
            (9, 1 - 2 / 9, 7, 0.2),  # a little less than 7
            (1, 1.0, 1, 0.2),
        ],
    )
    def test_cooldown(self, n: int, fraction: float, cooling: int, final: float):
        got = workloads.linear_cooldown(12, n, fraction=fraction, final=final)
        # np.linspace would give a single step the learning rate 1.
        cooled = np.linspace(1.0, final, cooling) if cooling != 1 else [final]
        want = np.concatenate([np.ones(n - cooling), cooled, np.full(12 - n, final)])
        assert_allclose(got, want, rtol=1e-14, atol=1e-15)

    @pytest.mark.parametrize("n", [2, 7, 12])
    def test_exponential_decay_is_optaxs(self, n: int):
        for final in (0.05, 2.0):
            theirs = optax.exponential_decay(1.0, n - 1, final, end_value=final)
            got = workloads.exponential_decay(12, n, final=final)
            assert_allclose(got, theirs(jnp.arange(12)), rtol=1e-13)
            assert workloads.exponential_decay(1, final=final).item() == 1


COOLDOWN = np.append(np.ones(5), np.linspace(1, 0.05, N - 5))


@jax.jit
def matrix(decay: Any, momentum: Any, rates: Any) -> jax.Array:
    coef = workloads.weight_decay(N, decay, momentum)
    return workloads.matrix(coef, rates, decay=decay)


class TestMatrix:
    @of_factors
    def test_is_a_simulated_training(self, decay: float, momentum: float):
        """Whose gradients are the unit vectors."""
        for rates in (COOLDOWN, np.random.default_rng(0).uniform(-1, 2, N)):
            model, update, models = np.zeros(N), np.zeros(N), []
            for rate, gradient in zip(rates, np.eye(N), strict=True):
                update = momentum * update + gradient
                model = decay * model + rate * update
                models.append(model)
            got = matrix(decay, momentum, rates)
            assert_allclose(got, models, rtol=1e-9, atol=1e-13)

    def test_is_upstreams(self):
        theirs = streaming_matrix.momentum_sgd_matrix(0.9, jnp.asarray(COOLDOWN))
        got = matrix(1.0, 0.9, COOLDOWN)
        assert_allclose(got, theirs.materialize(N), rtol=1e-12, atol=1e-14)

    def test_without_a_learning_rate(self):
        """It is that of a learning rate of 1; the decay is in the coefficients."""
        coef = workloads.weight_decay(N, 0.97, 0.6)
        got = workloads.matrix(coef)
        want = matrix(0.97, 0.6, np.ones(N))
        assert_allclose(got, want, rtol=1e-12, atol=1e-14)
        assert_array_equal(workloads.matrix(coef, decay=0.5), got)
