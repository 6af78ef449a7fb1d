"""Toeplitz mechanisms of all families: errors, sensitivities, set-ups in arrays."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.signal
from families import (
    MAX_N,
    MAX_SIZE,
    SET_UPS,
    SetUp,
    columns,
    mechanism,
    params,
    upstream,
)

from jaxmf_opt import optimize
from jaxmf_opt.mechanisms import (
    BandedInverseToeplitz,
    BandedToeplitz,
    BufferedToeplitz,
    workloads,
)

pytestmark = pytest.mark.mixes  # upstream's code

FAMILIES = ("banded", "inverse", "buffered")
by_family = pytest.mark.parametrize("family", FAMILIES)
RATES = np.random.default_rng(0).uniform(0.2, 1, MAX_N)


# Of the module, so that hypothesis may run many examples in it.
@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with jax.enable_x64():
        yield


@functools.cache
def all_lanes(family: str) -> tuple[Any, ...]:
    """Everything about all set-ups, from one compiled program."""

    def one(s: SetUp, p: jax.Array) -> tuple[Any, ...]:
        m = mechanism(family, s)
        return (
            *jax.value_and_grad(m.loss)(p),
            m.per_query_error(p),
            m.sensitivity_squared(p),
            m.strategy_coef(p),
            m.noising_coef(p),
        )

    points = jnp.stack([params(family, i) for i in range(len(SET_UPS))])
    return jax.device_get(jax.jit(jax.vmap(one))(columns(SET_UPS), points))


@by_family
@pytest.mark.parametrize("i", range(len(SET_UPS)))
def test_values_and_gradients_are_upstreams(family: str, i: int):
    loss, grad = (x[i] for x in all_lanes(family)[:2])
    point = jnp.array(params(family, i))
    want_loss, want_grad = jax.jit(jax.value_and_grad(upstream(family, SET_UPS[i])))(
        point
    )
    np.testing.assert_allclose(loss, want_loss, rtol=1e-10)
    # Elements of the gradient may cancel, to exactly 0 with one band.
    atol = 1e-10 * float(np.max(np.abs(want_grad)) + want_loss / np.max(np.abs(point)))
    np.testing.assert_allclose(grad, want_grad, rtol=1e-10, atol=atol)


@by_family
@pytest.mark.parametrize("i", range(len(SET_UPS)))
def test_definitions(family: str, i: int):
    """With the matrices written out."""
    s = SET_UPS[i]
    _, _, errors, sensitivity_squared, strategy, noising = (
        x[i] for x in all_lanes(family)
    )
    for x in (errors, strategy, noising):
        assert np.all(x[s.n :] == 0)
    zeros = np.zeros(s.n)
    c, c_inverse = (scipy.linalg.toeplitz(x[: s.n], zeros) for x in (strategy, noising))
    np.testing.assert_allclose(c @ c_inverse, np.eye(s.n), atol=1e-12)
    a = np.cumsum(s.momentum ** np.arange(s.n))
    b = scipy.linalg.toeplitz(a, zeros) @ c_inverse
    np.testing.assert_allclose(errors[: s.n], np.sum(b**2, axis=1), rtol=1e-10)
    first = np.arange(s.participations) * s.min_sep
    norm = np.linalg.norm(c[:, first].sum(axis=1))
    np.testing.assert_allclose(sensitivity_squared, norm**2, rtol=1e-10)


@by_family
def test_a_sweep_in_one_program(family: str):
    """100 mixed set-ups equal 100 single solves.

    Of banded strategies, to the end. Others move on for long in flat valleys, where a
    last bit makes another path: of them, some steps.
    """
    steps, rtol = (250, 1e-12) if family == "banded" else (8, 1e-8)
    if family == "buffered":
        grid = itertools.product((12, 40), (0,), (3, 6, 12, 11, 7), (1, 2))
    else:
        grid = itertools.product((12, 40), (1, 2, 3, 5, 6), (6, 12), (1, 2))
    setups = [
        SetUp(n, bands, min_sep, count, momentum, bool((n + bands + count) % 3))
        for (n, bands, min_sep, count), momentum in itertools.product(
            grid,
            (0.0, 0.6, 0.9) if family != "buffered" else (0.0, 0.2, 0.4, 0.6, 0.8, 0.9),
        )
        if min_sep * (count - 1) < n
    ][:100]
    assert len(setups) == 100
    many = columns(setups)

    def best(s: SetUp) -> tuple[jax.Array, jax.Array]:
        m = mechanism(family, s)
        start = m.initial_params()
        found = optimize(m.loss, start, rtol=1e-9, max_optimizer_steps=steps)
        return m.loss(start), m.loss(found)

    before, losses = jax.jit(jax.vmap(best))(many)
    assert np.all(np.isfinite(losses))
    assert np.all(losses <= before)
    single = jax.jit(best)
    want = [single(jax.tree.map(lambda x, i=i: x[i], many))[1] for i in range(100)]
    np.testing.assert_allclose(losses, want, rtol=rtol)


class TestLearningRates:
    @by_family
    @pytest.mark.parametrize("decay", [1.0, 0.97])
    def test_errors_are_those_of_the_matrix(self, family: str, decay: float):
        n = 23
        coef = workloads.weight_decay(n, decay, 0.8)
        options = {"workload_coef": coef, "learning_rate": RATES[:n], "decay": decay}
        m = make(family, n, **options)
        point = jnp.array(params(family, 1))
        a = workloads.matrix(coef, RATES[:n], decay=decay)
        b = a @ scipy.linalg.toeplitz(m.noising_coef(point), np.zeros(n))
        errors = np.sum(b**2, axis=1)
        np.testing.assert_allclose(m.per_query_error(point), errors, rtol=1e-12)
        for max_error, want in ((False, errors.mean()), (True, errors.max())):
            m = make(family, n, max_error=max_error, **options)
            got = m.loss(point) / m.sensitivity_squared(point)
            np.testing.assert_allclose(got, want, rtol=1e-12)

    def test_of_one_is_none(self):
        point = jnp.array(params("banded", 1))
        plain = BandedToeplitz(23, MAX_SIZE)
        ones = BandedToeplitz(23, MAX_SIZE, learning_rate=jnp.ones(23))
        for a, b in zip(
            jax.value_and_grad(plain.loss)(point),
            jax.value_and_grad(ones.loss)(point),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)

    def test_what_is_beyond_n_is_not_looked_at(self):
        point = jnp.array(params("banded", 1))
        rates = jnp.array(RATES).at[20:].set(jnp.inf)
        short = BandedToeplitz(20, MAX_SIZE, learning_rate=RATES[:20])
        long = jax.jit(
            lambda n: BandedToeplitz(
                n, MAX_SIZE, learning_rate=jnp.where(jnp.isinf(rates), 1e3, rates)
            ).loss(point)
        )
        np.testing.assert_allclose(long(20), short.loss(point), rtol=1e-12)


def make(family: str, n: int, size: int = MAX_SIZE, **options: Any) -> Any:
    if family == "buffered":
        return BufferedToeplitz(n, size // 2, **options)
    kind = {"banded": BandedToeplitz, "inverse": BandedInverseToeplitz}[family]
    return kind(n, size, **options)


def patterns(n: int, min_sep: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to take part."""
    for k in range(1, count + 1):
        for chosen in itertools.combinations(range(n), k):
            if all(b - a >= min_sep for a, b in itertools.pairwise(chosen)):
                yield chosen


def true_sensitivity_squared(coef: np.ndarray, min_sep: int, count: int) -> float:
    """The largest norm of a signed sum of columns in which an example takes part."""
    n = coef.size
    c = scipy.linalg.toeplitz(coef, np.zeros(n))
    return max(
        float(np.sum((c[:, list(chosen)] @ np.array(signs)) ** 2))
        for chosen in patterns(n, min_sep, count)
        for signs in itertools.product((1, -1), repeat=len(chosen))
    )


COEFS = hnp.arrays(float, 6, elements=st.floats(-1, 1))
PARTICIPATION = st.sampled_from([(1, 2), (2, 3), (3, 2), (5, 2), (6, 1)])


@jax.jit
def sensitivity_of(
    coef: jax.Array, min_sep: jax.Array, participations: jax.Array
) -> jax.Array:
    m = BandedToeplitz(6, 6, min_sep=min_sep, max_participations=participations)
    return m.sensitivity_squared(coef)


class TestSensitivity:
    @hypothesis.given(coef=COEFS, participation=PARTICIPATION)
    def test_is_never_too_small(self, coef: np.ndarray, participation: tuple[int, int]):
        got = sensitivity_of(coef, *participation)
        assert got >= true_sensitivity_squared(coef, *participation) * (1 - 1e-12)

    @hypothesis.given(coef=COEFS, participation=PARTICIPATION)
    def test_is_exact_where_coefficients_decrease(
        self, coef: np.ndarray, participation: tuple[int, int]
    ):
        coef = np.sort(np.abs(coef))[::-1]
        got = sensitivity_of(coef, *participation)
        want = true_sensitivity_squared(coef, *participation)
        np.testing.assert_allclose(got, want, rtol=1e-12)

    @pytest.mark.parametrize("is_static", [True, False])
    def test_is_exact_where_columns_have_no_row_in_common(self, is_static: bool):
        coef = np.array([1.0, -0.7, 0.9])
        bands = 3 if is_static else jnp.array(3)

        def of(bands: Any) -> jax.Array:
            kind = functools.partial(BandedToeplitz, 8, bands, max_bands=3)
            return kind(min_sep=3, max_participations=3).sensitivity_squared(coef)

        got = of(bands) if is_static else jax.jit(of)(bands)
        full = np.append(coef, np.zeros(5))
        want = true_sensitivity_squared(full, 3, 3)
        np.testing.assert_allclose(got, want, rtol=1e-14)
        np.testing.assert_allclose(want, 2 * np.sum(coef**2) + 1.49, rtol=1e-14)

    @by_family
    def test_as_many_participations_as_fit(self, family: str):
        point = jnp.array(params(family, 0))
        for n, min_sep, fit in ((12, 4, 3), (13, 4, 4), (3, 9, 1)):
            n = max(n, MAX_SIZE)
            fit = -(-n // min_sep)
            got = make(family, n, min_sep=min_sep, max_participations=None)
            want = make(family, n, min_sep=min_sep, max_participations=fit)
            assert got.max_participations == fit
            assert got.loss(point) == want.loss(point)


class TestInPrograms:
    @by_family
    def test_in_a_float32_program(self, family: str):
        with jax.enable_x64():
            m = make(family, 24, size=2)
            want = optimize(m.loss, m.initial_params(), rtol=1e-9)
        with jax.enable_x64(False):

            def best(momentum: jax.Array) -> jax.Array:
                coef = workloads.momentum(24, momentum)
                m = make(family, 24, size=2, workload_coef=coef)
                return optimize(m.loss, m.initial_params(), rtol=1e-9)

            got = jax.vmap(jax.jit(best))(jnp.zeros(2))
        assert got.dtype == jnp.float32
        with jax.enable_x64():
            for row in got:
                np.testing.assert_allclose(
                    m.loss(row.astype(float)), m.loss(want), rtol=1e-6
                )

    @by_family
    def test_strict_promotion(self, family: str):
        """Of dtypes, and of ranks outside of vmap."""
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            for x64 in (False, True):
                with jax.enable_x64(x64):
                    s = jax.tree.map(jnp.asarray, SET_UPS[2])
                    loss = jax.jit(lambda s, p: mechanism(family, s).loss(p))
                    point = jnp.asarray(params(family, 2), float)
                    assert np.isfinite(loss(s, point))

    @by_family
    def test_the_optimum_by_the_momentum(self, family: str):
        """Its derivative, which is implicit, against differences of optima."""

        def error(momentum: jax.Array, p: jax.Array) -> jax.Array:
            coef = workloads.momentum(24, momentum)
            return make(family, 24, size=2, workload_coef=coef).loss(p)

        def best(momentum: jax.Array) -> jax.Array:
            start = make(family, 24, size=2).initial_params()
            p = optimize(lambda p: error(momentum, p), start, gtol=1e-9)
            return error(momentum, p)

        value, got = jax.jit(jax.value_and_grad(best))(0.5)
        h = 1e-4
        want = (best(jnp.array(0.5 + h)) - best(jnp.array(0.5 - h))) / (2 * h)
        assert np.isfinite(value)
        np.testing.assert_allclose(got, want, rtol=1e-6)

    def test_it_is_a_pytree(self):
        m = BandedToeplitz(
            workload_coef=jnp.ones(8), bands=jnp.array(2), max_bands=3, min_sep=4
        )
        again = jax.jit(lambda m: m)(m)
        point = jnp.array([1.0, 0.5, 0.25])
        np.testing.assert_allclose(again.loss(point), m.loss(point), rtol=1e-14)


class TestAtLargeSizes:
    @pytest.mark.parametrize(("n", "bands"), [(3000, 16), (1500, 300)])
    def test_many_digits(self, n: int, bands: int):
        """In blocks, and by transforms, against substitution in 40 digits."""
        coef = np.arange(1, bands + 1) ** -0.6
        with mpmath.workdps(40):
            exact = np.array([mpmath.mpf(x) for x in coef.tolist()])
            decoder = np.full(n, mpmath.mpf(0))
            for t in range(n):
                known = decoder[max(0, t - bands + 1) : t][::-1]
                decoder[t] = (1 - exact[1 : 1 + known.size] @ known) / exact[0]
            rows = np.array((n - np.arange(n)).tolist())
            want = float(decoder**2 @ rows / n * (exact @ exact))
        got = BandedToeplitz(n, bands).loss(jnp.array(coef))
        np.testing.assert_allclose(got, want, rtol=1e-13)

    def test_a_million_steps(self):
        n, bands = 1_000_000, 64
        point = BandedToeplitz(n, bands).initial_params()
        decoder = np.array(scipy.signal.lfilter([1.0], np.asarray(point), np.ones(n)))
        want = np.sum(decoder**2 * (n - np.arange(n))) / n * np.sum(point**2)
        value, grad = jax.jit(jax.value_and_grad(BandedToeplitz(n, bands).loss))(point)
        np.testing.assert_allclose(value, want, rtol=1e-12)
        # The loss does not depend on the scale.
        assert abs(grad @ point) < 1e-10 * np.linalg.norm(grad) * np.linalg.norm(point)
        noising = BandedInverseToeplitz(n, bands)
        assert np.isfinite(noising.loss(noising.initial_params()))
