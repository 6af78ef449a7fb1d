"""Workloads and schedules: their definitions, upstream's, optax's, published ones."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_privacy.matrix_factorization import streaming_matrix

from jaxmf_opt.mechanisms import workloads

N = 12


@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with jax.enable_x64():
        yield


class Factors(NamedTuple):
    """What SGD keeps of the model and of the last update."""

    decay: float
    momentum: float


FACTORS = {
    "plain": Factors(1.0, 0.0),
    "momentum": Factors(1.0, 0.9),
    "decay": Factors(0.8, 0.0),
    "both": Factors(0.97, 0.6),
    "momentum above decay": Factors(0.5, 0.9),
    "equal": Factors(0.9, 0.9),
    "nearly equal": Factors(0.9, 0.9 - 1e-9),
    "tiny": Factors(1e-3, 1e-5),
    "close to 1": Factors(1.0, 1 - 1e-9),
}
of_factors = pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)

SCHEDULES: dict[str, Callable[..., jax.Array]] = {
    "linear": workloads.linear_cooldown,
    "exponential": workloads.exponential_decay,
}
of_schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def weights(factors: Factors, n: int = N) -> np.ndarray:
    """The definition. Unlike the function it takes a negative momentum too."""
    decay, momentum = factors
    terms = [[decay ** (t - i) * momentum**i for i in range(t + 1)] for t in range(n)]
    return np.array([sum(x) for x in terms])


class TestWorkloads:
    @pytest.mark.parametrize("n", [1, 2, 40])
    def test_prefix_sum(self, n: int):
        np.testing.assert_array_equal(workloads.prefix_sum(n), np.ones(n))

    @pytest.mark.parametrize("momentum", [0.0, 0.3, 0.95])
    def test_momentum(self, momentum: float):
        k = np.arange(N) + 1
        want = (1 - momentum**k) / (1 - momentum)
        got = workloads.momentum(N, momentum)
        np.testing.assert_allclose(got, want, rtol=1e-13)

    @of_factors
    def test_weight_decay(self, factors: Factors):
        got = workloads.weight_decay(N, *factors)
        np.testing.assert_allclose(got, weights(factors), rtol=1e-13)

    @pytest.mark.parametrize("name", ["both", "momentum above decay", "tiny", "decay"])
    def test_closed_form(self, name: str):
        a, b = FACTORS[name]
        k = np.arange(N) + 1
        got = workloads.weight_decay(N, a, b)
        np.testing.assert_allclose(got, (a**k - b**k) / (a - b), rtol=1e-12)

    def test_equal_factors(self):
        k = np.arange(N)
        got = workloads.weight_decay(N, 0.9, 0.9)
        np.testing.assert_allclose(got, (k + 1) * 0.9**k, rtol=1e-13)

    def test_factors_can_be_exchanged(self):
        got = workloads.weight_decay(N, 0.4, 0.7)
        want = workloads.weight_decay(N, 0.7, 0.4)
        np.testing.assert_allclose(got, want, rtol=1e-14)

    def test_powers_may_underflow(self):
        got = workloads.weight_decay(N, 1e-10, 1e-300)
        want = 1e-10 ** np.arange(N)
        np.testing.assert_allclose(got, want, rtol=1e-12)


def differences(
    fn: Callable[[Factors], np.ndarray], at: Factors
) -> tuple[np.ndarray, np.ndarray]:
    """Central differences, with respect to both factors."""
    step = 1e-5
    of_decay, of_momentum = (
        (fn(Factors(*(np.array(at) + d))) - fn(Factors(*(np.array(at) - d))))
        / (2 * step)
        for d in (np.array([step, 0]), np.array([0, step]))
    )
    return of_decay, of_momentum


@jax.jit
def jacobians(decay: jax.Array, momentum: jax.Array) -> dict[str, Any]:
    def coef(decay: jax.Array, momentum: jax.Array) -> jax.Array:
        return workloads.weight_decay(N, decay, momentum)

    modes = {"forward": jax.jacfwd, "reverse": jax.jacrev}
    found = {k: jac(coef, (0, 1))(decay, momentum) for k, jac in modes.items()}
    found["second"] = jax.jacfwd(jax.jacrev(coef, (0, 1)), (0, 1))(decay, momentum)
    found["of momentum alone"] = jax.jacrev(workloads.momentum, 1)(N, momentum)
    return found


DIFFERENTIATED = {
    k: FACTORS[k]
    for k in ("plain", "momentum", "decay", "both", "momentum above decay", "equal")
}
of_differentiated = pytest.mark.parametrize(
    "factors", DIFFERENTIATED.values(), ids=DIFFERENTIATED
)


class TestDerivatives:
    @of_differentiated
    @pytest.mark.parametrize("mode", ["forward", "reverse"])
    def test_first(self, factors: Factors, mode: str):
        got = jacobians(*map(jnp.asarray, factors))[mode]
        for g, want in zip(got, differences(weights, factors), strict=True):
            np.testing.assert_allclose(g, want, rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("momentum", [0.0, 0.5])
    def test_of_momentum(self, momentum: float):
        got = jacobians(jnp.asarray(1.0), jnp.asarray(momentum))["of momentum alone"]
        want = differences(weights, Factors(1.0, momentum))[1]
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)

    @of_differentiated
    def test_second(self, factors: Factors):
        got = jacobians(*map(jnp.asarray, factors))["second"]
        for i, row in enumerate(got):
            first = lambda at, i=i: differences(weights, at)[i]  # noqa: E731
            for g, want in zip(row, differences(first, factors), strict=True):
                np.testing.assert_allclose(g, want, rtol=1e-4, atol=1e-3)


class TestLinearCooldown:
    def test_published_schedule(self):
        """That of StackOverflow in google-research/federated, for 2000 rounds."""
        got = np.array(workloads.linear_cooldown(2000))
        want = np.append(np.ones(1500), np.linspace(1.0, 0.05, 500))
        np.testing.assert_allclose(got, want, rtol=1e-12)
        np.testing.assert_allclose(
            got[[1500, 1501, 1999]], [1.0, 0.9980961923847695, 0.05], rtol=1e-12
        )
        np.testing.assert_allclose(got.sum(), 1762.5, rtol=1e-12)
        np.testing.assert_allclose((got**2).sum(), 1675.5673847695411, rtol=1e-12)

    @pytest.mark.parametrize(
        ("max_n", "n", "fraction", "cooling"),
        [
            (12, 12, 0.0, 0),
            (12, 12, 1.0, 12),
            (12, 12, 0.5, 6),
            (12, 12, 0.1, 1),  # 1.2, rounded down: only the last step
            (12, 12, 0.08, 0),
            (1, 1, 0.0, 0),
            (1, 1, 1.0, 1),
            (2, 2, 1.0, 2),
            (12, 7, 0.0, 0),
            (12, 7, 1.0, 7),
            (12, 7, 0.3, 2),
            (12, 7, 0.2, 1),
            (12, 1, 1.0, 1),
        ],
    )
    def test_cooling_steps(self, max_n: int, n: int, fraction: float, cooling: int):
        got = workloads.linear_cooldown(max_n, n, fraction=fraction, final=0.2)
        # np.linspace would give a single step the learning rate 1.
        cooled = np.linspace(1.0, 0.2, cooling) if cooling != 1 else [0.2]
        want = np.concatenate([np.ones(n - cooling), cooled, np.full(max_n - n, 0.2)])
        np.testing.assert_allclose(got, want, rtol=1e-14)

    def test_final_may_be_zero_or_larger(self):
        for final in (0.0, 3.0):
            got = workloads.linear_cooldown(5, fraction=0.8, final=final)
            want = np.append(1.0, np.linspace(1.0, final, 4))
            np.testing.assert_allclose(got, want, rtol=1e-14, atol=1e-15)


class TestExponentialDecay:
    @pytest.mark.parametrize("final", [0.05, 0.5, 1.0, 2.0])
    @pytest.mark.parametrize(("max_n", "n"), [(12, 12), (12, 7), (2, 2)])
    def test_optax(self, max_n: int, n: int, final: float):
        theirs = optax.exponential_decay(1.0, n - 1, final, end_value=final)
        want = theirs(jnp.arange(max_n))
        got = workloads.exponential_decay(max_n, n, final=final)
        np.testing.assert_allclose(got, want, rtol=1e-13)
        np.testing.assert_allclose(got[n - 1 :], final, rtol=1e-13)

    def test_one_step(self):
        np.testing.assert_allclose(workloads.exponential_decay(1, final=0.3), [1.0])


class TestSchedules:
    @of_schedules
    def test_defaults(self, schedule: Callable[..., jax.Array]):
        np.testing.assert_array_equal(schedule(N), schedule(N, N, final=0.05))

    @of_schedules
    def test_traced_equals_static(self, schedule: Callable[..., jax.Array]):
        ns, finals = jnp.array([1, 2, 7, N]), jnp.array([0.05, 0.5, 1.0, 0.1])
        lanes = jax.jit(jax.vmap(lambda n, x: schedule(N, n, final=x)))(ns, finals)
        for n, final, lane in zip(ns.tolist(), finals.tolist(), lanes, strict=True):
            want = schedule(N, n, final=final)
            np.testing.assert_allclose(lane, want, rtol=1e-14)

    def test_traced_fraction(self):
        fractions = jnp.array([0.0, 0.1, 0.25, 1.0])
        lanes = jax.vmap(lambda x: workloads.linear_cooldown(N, fraction=x))(fractions)
        for fraction, lane in zip(fractions.tolist(), lanes, strict=True):
            want = workloads.linear_cooldown(N, fraction=fraction)
            np.testing.assert_allclose(lane, want, rtol=1e-14)

    @of_schedules
    def test_derivative_with_respect_to_final(self, schedule: Callable[..., jax.Array]):
        def of_final(final: Any) -> jax.Array:
            return schedule(N, 9, final=final)

        got = jax.jacrev(of_final)(0.3)
        want = (of_final(0.3 + 1e-5) - of_final(0.3 - 1e-5)) / 2e-5
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-10)
        assert np.count_nonzero(got) >= N - 9


def simulated(factors: Factors, rates: np.ndarray) -> np.ndarray:
    """The models of a training, whose gradients are the unit vectors."""
    n = rates.size
    model, update, models = np.zeros(n), np.zeros(n), []
    for rate, gradient in zip(rates, np.eye(n), strict=True):
        update = factors.momentum * update + gradient
        model = factors.decay * model + rate * update
        models.append(model)
    return np.stack(models)


RATES = {
    "constant": np.ones(N),
    "linear cooldown": np.append(np.ones(5), np.linspace(1, 0.05, N - 5)),
    "warmup": np.linspace(0.1, 1.0, N),
    "any": np.random.default_rng(0).uniform(-1, 2, N),
}
of_rates = pytest.mark.parametrize("rates", RATES.values(), ids=RATES)


@jax.jit
def matrix(decay: jax.Array, momentum: jax.Array, rates: jax.Array) -> jax.Array:
    coef = workloads.weight_decay(N, decay, momentum)
    return workloads.matrix(coef, rates, decay=decay)


def matrix_of(factors: Factors, rates: np.ndarray) -> jax.Array:
    return matrix(*map(jnp.asarray, (*factors, rates)))


class TestMatrix:
    @of_factors
    @of_rates
    def test_simulation(self, factors: Factors, rates: np.ndarray):
        got = matrix_of(factors, rates)
        np.testing.assert_allclose(
            got, simulated(factors, rates), rtol=1e-9, atol=1e-13
        )

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("name", ["constant", "linear cooldown", "warmup"])
    def test_upstream(self, momentum: float, name: str):
        rates = jnp.asarray(RATES[name])
        theirs = streaming_matrix.momentum_sgd_matrix(momentum, rates)
        got = matrix_of(Factors(1.0, momentum), RATES[name])
        np.testing.assert_allclose(got, theirs.materialize(N), rtol=1e-12, atol=1e-14)

    @of_factors
    def test_without_a_learning_rate(self, factors: Factors):
        """It is Toeplitz, and that of a learning rate of 1; the decay is in it."""
        coef = workloads.weight_decay(N, *factors)
        got = workloads.matrix(coef)
        np.testing.assert_array_equal(got[:, 0], coef)
        np.testing.assert_allclose(
            got, simulated(factors, np.ones(N)), rtol=1e-12, atol=1e-14
        )
        np.testing.assert_array_equal(workloads.matrix(coef, decay=0.5), got)

    def test_any_coefficients(self):
        """The formula of the docstring."""
        rng = np.random.default_rng(1)
        coef, rates = rng.normal(size=(2, N))
        before = np.append(0, coef)
        want = np.zeros((N, N))
        for t in range(N):
            for i in range(t + 1):
                want[t, i] = sum(
                    rates[s] * (coef[s - i] - before[s - i]) for s in range(i, t + 1)
                )
        np.testing.assert_allclose(workloads.matrix(coef, rates), want, rtol=1e-11)

    def test_one_step(self):
        got = workloads.matrix(np.array([3.0]), np.array([0.5]), decay=0.9)
        np.testing.assert_array_equal(got, [[1.5]])


class Lanes(NamedTuple):
    """A function of a traced value, one possible value, and impossible ones."""

    fn: Callable[[Any], jax.Array]
    possible: Any
    impossible: tuple[Any, ...]


LANES = {
    "momentum": Lanes(
        lambda x: workloads.momentum(5, x), 0.9, (1.0, 1.5, -0.1, np.nan, np.inf)
    ),
    "decay": Lanes(
        lambda x: workloads.weight_decay(5, x, 0.5), 1.0, (0.0, -0.5, 1.1, np.nan)
    ),
    "momentum of decay": Lanes(
        lambda x: workloads.weight_decay(5, 0.9, x), 0.0, (1.0, -1e-9, np.nan)
    ),
    "linear n": Lanes(
        lambda x: workloads.linear_cooldown(5, x), 5, (0, -1, 6, 2**31 - 1, 2**40)
    ),
    "linear fraction": Lanes(
        lambda x: workloads.linear_cooldown(5, fraction=x), 0.4, (-0.1, 1.1, np.nan)
    ),
    "exponential n": Lanes(
        lambda x: workloads.exponential_decay(5, x), 1, (0, -(2**31), 6)
    ),
    "exponential final": Lanes(
        lambda x: workloads.exponential_decay(5, final=x), 2.0, (0.0, -0.1, np.nan)
    ),
    "matrix": Lanes(
        lambda x: workloads.matrix(np.ones(3), np.ones(3), decay=x), 1.0, (0.0, 2.0)
    ),
    "matrix, no learning rate": Lanes(
        lambda x: workloads.matrix(np.ones(3), decay=x), 1.0, (0.0, 2.0)
    ),
}


@pytest.mark.parametrize("name", LANES)
def test_impossible_traced_values_are_nan_in_their_lane(name: str):
    fn, possible, impossible = LANES[name]
    lanes = jax.jit(jax.vmap(fn))(jnp.array([possible, *impossible]))
    np.testing.assert_allclose(lanes[0], fn(possible), rtol=1e-14)
    assert np.all(np.isfinite(lanes[0]))
    assert np.all(np.isnan(lanes[1:]))


FOR_DTYPES: dict[str, Callable[[], jax.Array]] = {
    "prefix sum": lambda: workloads.prefix_sum(3),
    "momentum": lambda: workloads.momentum(3, np.float64(0.5)),
    "weight decay": lambda: workloads.weight_decay(3, 1, 0),
    "linear": lambda: workloads.linear_cooldown(3, 2),
    "exponential": lambda: workloads.exponential_decay(3, np.int64(2)),
    "matrix": lambda: workloads.matrix(workloads.prefix_sum(3)),
    "matrix, learning rate": lambda: workloads.matrix(
        workloads.prefix_sum(3), np.ones(3), decay=0.5
    ),
}


@pytest.mark.parametrize("name", FOR_DTYPES)
def test_dtypes(name: str):
    in_double = FOR_DTYPES[name]()
    assert in_double.dtype == jnp.float64
    with jax.enable_x64(False):
        in_single = FOR_DTYPES[name]()
        assert in_single.dtype == jnp.float32
        np.testing.assert_allclose(in_single, in_double, rtol=1e-6)
