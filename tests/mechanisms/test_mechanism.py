"""Toeplitz mechanisms of all families: errors, sensitivities, set-ups in arrays."""

import functools
import itertools
from typing import Any, NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.linalg import toeplitz as matrix_of

from jaxmf_opt.mechanisms import (
    BandedInverseToeplitz,
    BandedToeplitz,
    BufferedToeplitz,
    workloads,
)

MAX_N, MAX_SIZE = 40, 6
by_family = pytest.mark.parametrize("family", ["banded", "inverse", "buffered"])


class SetUp(NamedTuple):
    """Hyperparameters, all of which can be arrays."""

    n: Any
    bands: Any
    min_sep: Any
    participations: Any
    fixed_epochs: Any
    momentum: Any
    max_error: Any


SET_UPS = [
    SetUp(1, 1, 1, 1, False, 0.0, False),
    SetUp(12, 6, 5, 1, False, 0.0, True),
    SetUp(40, 6, 6, 7, True, 0.5, True),
    SetUp(39, 5, 2, 4, False, 0.95, False),  # columns have rows in common
]


def make(family: str, n: Any, **options: Any) -> Any:
    if family == "buffered":
        return BufferedToeplitz(n, MAX_SIZE // 2, **options)
    kind = {"banded": BandedToeplitz, "inverse": BandedInverseToeplitz}[family]
    return kind(n, max_bands=MAX_SIZE, **options)


def mechanism(family: str, s: SetUp) -> Any:
    """A mechanism whose set-up is in arrays, which are as long as the longest."""
    bands = {} if family == "buffered" else {"bands": s.bands}
    return make(
        family,
        s.n,
        workload_coef=workloads.momentum(MAX_N, s.momentum),
        min_sep=s.min_sep,
        max_participations=s.participations,
        fixed_epochs=s.fixed_epochs,
        max_error=s.max_error,
        **bands,
    )


def params(family: str, i: int) -> np.ndarray:
    """Random parameters; banded ones decrease, or their inverse does."""
    rng = np.random.default_rng(i)
    if family == "buffered":
        return rng.uniform(-4, 0, MAX_SIZE)
    if family == "banded":
        return np.sort(rng.uniform(0.1, 1, MAX_SIZE))[::-1]
    # Of (1 - a x)^{1/2}, cut: then the strategy's are positive and decrease.
    k = np.arange(1, MAX_SIZE)
    root = np.append(1.0, np.cumprod((k - 1.5) / k))
    return root * rng.uniform(0.7, 1) ** np.arange(MAX_SIZE)


@functools.cache
def all_lanes(family: str) -> tuple[Any, ...]:
    """Everything about all set-ups, from one compiled program."""

    def one(s: SetUp, p: jax.Array, direction: jax.Array) -> tuple[Any, ...]:
        m = mechanism(family, s)
        step = 1e-5 * direction
        return (
            *jax.jvp(m.loss, (p,), (direction,)),
            jax.grad(m.loss)(p) @ direction,
            (m.loss(p + step) - m.loss(p - step)) / 2e-5,
            m.per_query_error(p),
            m.sensitivity_squared(p),
            m.strategy_coef(p),
            m.noising_coef(p),
        )

    points = jnp.stack([params(family, i) for i in range(len(SET_UPS))])
    columns = SetUp(*(jnp.array(x) for x in zip(*SET_UPS, strict=True)))
    return jax.device_get(jax.jit(jax.vmap(one))(columns, points, jnp.sin(points)))


@by_family
@pytest.mark.parametrize("i", range(len(SET_UPS)))
def test_against_matrices_written_out(family: str, i: int):
    """And derivatives against differences."""
    s, lane = SET_UPS[i], [x[i] for x in all_lanes(family)]
    loss, forward, reverse, difference, errors, sensitivity_squared, *coefs = lane
    for x in (errors, *coefs):
        assert np.all(x[s.n :] == 0)
    a, c, c_inverse = (
        matrix_of(x[: s.n], np.zeros(s.n))
        for x in (np.cumsum(s.momentum ** np.arange(s.n)), *coefs)
    )
    assert_allclose(c @ c_inverse, np.eye(s.n), atol=1e-12)
    want = np.sum((a @ c_inverse) ** 2, axis=1)
    assert_allclose(errors[: s.n], want, rtol=1e-10)
    first = np.arange(s.participations) * s.min_sep
    norm = np.linalg.norm(c[:, first].sum(axis=1))
    assert_allclose(sensitivity_squared, norm**2, rtol=1e-10)
    reduce = np.max if s.max_error else np.mean
    assert_allclose(loss, reduce(errors[: s.n]) * norm**2, rtol=1e-10)
    assert_allclose(forward, reverse, rtol=1e-10, atol=1e-10 * loss)
    assert_allclose(forward, difference, rtol=1e-6, atol=1e-8 * loss)


@by_family
def test_errors_of_a_learning_rate_are_those_of_the_matrix(family: str):
    decay, rates = 0.97, np.random.default_rng(0).uniform(0.2, 1, 23)
    coef = workloads.weight_decay(rates.size, decay, 0.8)
    options = {"workload_coef": coef, "learning_rate": rates, "decay": decay}
    point = jnp.array(params(family, 1))
    for max_error, reduce in ((False, np.mean), (True, np.max)):
        m = make(family, None, max_error=max_error, **options)
        a = workloads.matrix(coef, rates, decay=decay)
        b = a @ matrix_of(m.noising_coef(point), np.zeros(rates.size))
        errors = np.sum(b**2, axis=1)
        assert_allclose(m.per_query_error(point), errors, rtol=1e-12)
        got = m.loss(point) / m.sensitivity_squared(point)
        assert_allclose(got, reduce(errors), rtol=1e-12)


def true_sensitivity_squared(
    coef: np.ndarray, min_sep: int, count: int, fixed_epochs: bool = False
) -> float:
    """The largest norm of a signed sum of columns in which an example takes part."""
    c = matrix_of(coef, np.zeros(coef.size))

    def are_allowed(gaps: list[int]) -> bool:
        return all(x == min_sep if fixed_epochs else x >= min_sep for x in gaps)

    return max(
        float(np.sum((c[:, list(chosen)] @ np.array(signs)) ** 2))
        for k in range(1, count + 1)
        for chosen in itertools.combinations(range(coef.size), k)
        if are_allowed([b - a for a, b in itertools.pairwise(chosen)])
        for signs in itertools.product((1, -1), repeat=k)
    )


@jax.jit
def sensitivity_of(
    coef: Any, min_sep: Any, participations: Any, fixed_epochs: Any
) -> jax.Array:
    m = BandedToeplitz(
        6,
        6,
        min_sep=min_sep,
        max_participations=participations,
        fixed_epochs=fixed_epochs,
    )
    return m.sensitivity_squared(coef)


class TestSensitivity:
    @pytest.mark.parametrize("fixed_epochs", [False, True])
    @hypothesis.given(
        coef=hnp.arrays(float, 6, elements=st.floats(-1, 1)),
        participation=st.sampled_from([(1, 2), (2, 3), (3, 2), (5, 2), (6, 1)]),
    )
    def test_of_any_coefficients(
        self, coef: np.ndarray, participation: tuple[int, int], fixed_epochs: bool
    ):
        """It is never too small, and exact where it says so."""
        known = *participation, fixed_epochs
        want = true_sensitivity_squared(coef, *known)
        assert sensitivity_of(coef, *known) >= want * (1 - 1e-12)
        coef = np.abs(coef)
        if not fixed_epochs:
            coef = np.sort(coef)[::-1]
        want = true_sensitivity_squared(coef, *known)
        assert_allclose(sensitivity_of(coef, *known), want, rtol=1e-12)

    def test_is_exact_where_columns_have_no_row_in_common(self):
        coef = np.array([1.0, -0.7, 0.9])

        def of(bands: Any) -> jax.Array:
            kind = functools.partial(BandedToeplitz, 8, bands, max_bands=3)
            return kind(min_sep=3, max_participations=3).sensitivity_squared(coef)

        want = true_sensitivity_squared(np.append(coef, np.zeros(5)), 3, 3)
        for got in (of(3), jax.jit(of)(3)):
            assert_allclose(got, want, rtol=1e-14)

    def test_as_many_participations_as_fit(self):
        for n, min_sep, fit in ((12, 4, 3), (13, 4, 4), (6, 9, 1)):
            m = make("banded", n, min_sep=min_sep, max_participations=None)
            assert m.max_participations == fit


class TestInPrograms:
    @by_family
    def test_of_float32_that_mix_nothing(self, family: str):
        """Dtypes and ranks are not promoted."""
        s, point = SET_UPS[2], params(family, 2)
        want = all_lanes(family)[0][2]
        with (
            jax.numpy_dtype_promotion("strict"),
            jax.numpy_rank_promotion("raise"),
            jax.enable_x64(False),
        ):
            loss = jax.jit(lambda s, p: mechanism(family, s).loss(p))
            got = loss(jax.tree.map(jnp.asarray, s), jnp.asarray(point, jnp.float32))
        assert got.dtype == jnp.float32
        assert_allclose(got, want, rtol=1e-4)

    def test_they_are_pytrees(self):
        m = BandedToeplitz(8, np.array(2), max_bands=3, min_sep=4)
        start = m.initial_params()
        got = jax.jit(lambda m: m.loss(start))(m)
        assert_allclose(got, m.loss(start), rtol=1e-14)


# One block of coefficients, a diagonal in many, more in many, and transforms.
@pytest.mark.parametrize(("n", "bands"), [(9, 9), (90, 1), (3000, 16), (400, 257)])
def test_many_digits(n: int, bands: int):
    """Against substitution in 40 digits."""
    coef = np.arange(1, bands + 1) ** -0.6
    with mpmath.workdps(40):
        exact = np.array([mpmath.mpf(x) for x in coef.tolist()])
        decoder = np.full(n, mpmath.mpf(0))
        for t in range(n):
            known = decoder[max(0, t - bands + 1) : t][::-1]
            decoder[t] = (1 - exact[1 : 1 + known.size] @ known) / exact[0]
        rows = np.array((n - np.arange(n)).tolist())
        want = float(decoder**2 @ rows / n * (exact @ exact))
    got = jax.jit(lambda p: BandedToeplitz(n, bands).loss(p))(coef)
    assert_allclose(got, want, rtol=1e-13)


@pytest.mark.parametrize(("n", "bands"), [(70, 3), (310, 300)])
def test_derivatives(n: int, bands: int):
    """Of first and second order, in blocks and by transforms, against matrices."""
    coef = jnp.arange(1.0, bands + 1) ** -2
    direction = jnp.sin(100 * coef)
    index = np.subtract.outer(np.arange(n), np.arange(n))

    def plain(coef: jax.Array) -> jax.Array:
        c = jnp.tril(jnp.pad(coef, (0, n - bands))[index])
        b = jnp.cumsum(jnp.linalg.inv(c), axis=0)
        return jnp.sum(b**2) / n * jnp.sum(coef**2)

    got, want = (
        jax.jit(lambda p, f=f: jax.jvp(jax.value_and_grad(f), (p,), (direction,)))(coef)
        for f in (BandedToeplitz(n, bands).loss, plain)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_allclose(a, b, rtol=1e-10, atol=1e-10 * float(np.max(np.abs(b))))


@pytest.mark.parametrize(("bands", "n"), [(2, 20), (300, 1)])
def test_only_n_rows_count(bands: int, n: int):
    """Beyond them the errors, which grow like 30^(2 t), would overflow."""
    coef = jnp.zeros(bands).at[:2].set(jnp.array([1.0, -30.0]))
    ones = jnp.ones(400)

    def loss(coef: jax.Array, n: Any) -> jax.Array:
        used = min(2, n) if isinstance(n, int) else jnp.minimum(2, n)
        m = BandedToeplitz(n, used, max_bands=bands, workload_coef=ones)
        return m.loss(coef)

    got = jax.jit(jax.value_and_grad(loss))(coef, n)
    want = jax.jit(jax.value_and_grad(loss), static_argnums=1)(coef, n)
    # Transforms are accurate relative to the largest number: where only the first row
    # counts, the gradient is 0, a difference of numbers as large as the loss.
    largest = max(float(np.max(np.abs(b))) for b in want)
    atol = 1e-14 * largest if bands > 256 else 0.0
    for a, b in zip(got, want, strict=True):
        assert_allclose(a, b, rtol=1e-9, atol=atol)


def test_more_parameters_than_steps():
    coef = jnp.array([1.0, 0.5, 0.4, 0.3])
    for kind in (BandedToeplitz, BandedInverseToeplitz):
        got = kind(2, 2, max_bands=4).noising_coef(coef)
        assert_allclose(got, kind(2, 2).noising_coef(coef[:2]), rtol=1e-14)
