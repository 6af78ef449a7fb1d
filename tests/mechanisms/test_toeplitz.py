"""Products and solves with Toeplitz matrices, in blocks and by transforms."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.signal

from jaxmf_opt.mechanisms import _toeplitz

# (coefficients, rows): one block, blocks of several sizes, transforms.
SIZES = ((1, 1), (1, 90), (3, 2), (9, 9), (3, 200), (65, 130), (130, 300), (300, 700))
by_size = pytest.mark.parametrize(("bands", "n"), SIZES)


@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with jax.enable_x64():
        yield


def numbers(bands: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of a matrix that is well-conditioned, and a vector."""
    rng = np.random.default_rng([bands, n])
    coef = rng.uniform(-1, 1, bands) / np.arange(1, bands + 1) ** 1.5
    coef[0] = 2.0
    return coef, rng.uniform(-1, 1, n)


def dense(coef: Any, n: int) -> jax.Array:
    column = jnp.zeros(n).at[: min(coef.size, n)].set(coef[:n])
    return jnp.tril(jax.scipy.linalg.toeplitz(column))


def everywhere(n: int) -> jax.Array:
    return jnp.ones(n, bool)


class TestAgainstDenseMatrices:
    @by_size
    def test_multiply(self, bands: int, n: int):
        coef, x = numbers(bands, n)
        y = _toeplitz.multiply(jnp.array(coef), jnp.array(x))
        np.testing.assert_allclose(y, dense(coef, n) @ x, rtol=1e-12, atol=1e-13)

    @by_size
    def test_solve(self, bands: int, n: int):
        coef, x = numbers(bands, n)
        y = _toeplitz.solve(jnp.array(coef), jnp.array(x), everywhere(n))
        column = np.append(coef, np.zeros(n))[:n]
        want = scipy.linalg.solve_toeplitz((column, np.eye(1, n)[0] * coef[0]), x)
        np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize(("bands", "n"), [(3, 70), (300, 310)])
    @pytest.mark.parametrize("name", ["multiply", "solve"])
    def test_derivatives(self, name: str, bands: int, n: int):
        """Of first and second order, in forward and reverse mode."""
        coef, x = map(jnp.array, numbers(bands, n))

        def ours(coef: jax.Array, x: jax.Array) -> jax.Array:
            if name == "multiply":
                return _toeplitz.multiply(coef, x)
            return _toeplitz.solve(coef, x, everywhere(n))

        def plain(coef: jax.Array, x: jax.Array) -> jax.Array:
            matrix = dense(coef, n)
            return matrix @ x if name == "multiply" else jnp.linalg.solve(matrix, x)

        def derivatives(f: Any) -> Any:
            def scalar(coef: jax.Array, x: jax.Array) -> jax.Array:
                return jnp.sum(jnp.sin(f(coef, x)))

            gradient = jax.grad(scalar, (0, 1))
            tangents = (jnp.cos(coef), jnp.sin(x))
            return gradient(coef, x), jax.jvp(gradient, (coef, x), tangents)[1]

        got, want = (jax.jit(lambda f=f: derivatives(f))() for f in (ours, plain))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(("bands", "n"), [(3, 70)])
    def test_batches(self, bands: int, n: int):
        coefs, xs = (np.stack([a, 0.7 * a]) for a in numbers(bands, n))
        for of in (
            _toeplitz.multiply,
            lambda coef, x: _toeplitz.solve(coef, x, everywhere(n)),
        ):
            got = jax.vmap(of)(jnp.array(coefs), jnp.array(xs))
            for row, coef, x in zip(got, coefs, xs, strict=True):
                want = of(jnp.array(coef), jnp.array(x))
                np.testing.assert_allclose(row, want, rtol=1e-12, atol=1e-13)


class TestLeadingRows:
    @pytest.mark.parametrize(("bands", "rows"), [(2, 1), (70, 100), (300, 1)])
    def test_only_they_count(self, bands: int, rows: int):
        """Beyond them the solution, which grows like 30^t, would overflow."""
        coef = np.zeros(bands)
        coef[:2] = 1.0, (-30.0 if rows == 1 else -1.02)
        coef, rhs = jnp.array(coef), jnp.ones(400)
        if rows == 1:
            assert not np.isfinite(
                np.abs(scipy.signal.lfilter([1.0], coef, rhs)).max() ** 2
            )

        def loss(coef: jax.Array, rows: Any) -> jax.Array:
            return jnp.sum(_toeplitz.solve(coef, rhs, jnp.arange(400) < rows) ** 2)

        def short(coef: jax.Array) -> jax.Array:
            every = everywhere(rows)
            return jnp.sum(_toeplitz.solve(coef[:rows], rhs[:rows], every) ** 2)

        got = jax.jit(jax.value_and_grad(loss))(coef, rows)
        want = jax.value_and_grad(short)(coef)
        for a, b in zip(got, want, strict=True):
            # Transforms are accurate relative to the largest element.
            atol = 1e-14 * float(np.max(np.abs(b))) if bands > 256 else 0.0
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=atol)

    def test_the_others_are_zero(self):
        coef, x = numbers(3, 200)
        inside = jnp.arange(200) < 70
        y = _toeplitz.solve(jnp.array(coef), jnp.array(x), inside)
        assert np.all(y[70:] == 0)
        assert np.all(y[:70] != 0)


@pytest.mark.parametrize("n", [1, 2, 40])
def test_square_root(n: int):
    coef = np.random.default_rng(n).uniform(0.2, 1, n)
    root = _toeplitz.square_root(jnp.array(coef))
    np.testing.assert_allclose(np.convolve(root, root)[:n], coef, rtol=1e-12)


@pytest.mark.parametrize("is_static", [True, False], ids=["static", "traced"])
@pytest.mark.parametrize(
    ("n", "apart", "count"), [(1, 1, 1), (9, 4, 3), (9, 1, 9), (9, 3, 2), (9, 9, 1)]
)
def test_sum_of_columns(n: int, apart: int, count: int, is_static: bool):
    coef = np.random.default_rng(n).uniform(-1, 1, n)
    want = sum(np.append(np.zeros(j * apart), coef)[:n] for j in range(count))
    if is_static:
        got = _toeplitz.sum_of_columns(jnp.array(coef), apart, count)
    else:
        got = jax.jit(_toeplitz.sum_of_columns)(jnp.array(coef), apart, count)
    np.testing.assert_allclose(got, want, rtol=1e-14, atol=1e-14)
