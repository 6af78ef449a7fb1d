"""Solutions of linear systems are right, or NaN, whatever the matrix is."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

from jaxmf_opt import optimize
from jaxmf_opt._solver.group_inverse import group_inverse
from jaxmf_opt._solver.linear_system import MatrixFree

CONDITIONS = [1.0, 1e4, 1e8, 1e12]


def orthogonal(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def regular(n: int, condition: float, rng: np.random.Generator) -> np.ndarray:
    q = orthogonal(n, rng)
    return (q * np.geomspace(1.0, 1.0 / condition, n)[None, :]) @ q.T


def of_kind(kind: str, n: int, condition: float) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, and its group inverse by what it is made of."""
    rng = np.random.default_rng([n, int(condition)])
    inner = regular(n - 1, condition, rng)
    if kind == "regular":
        inner = regular(n, condition, rng)
        return inner, np.linalg.inv(inner)
    matrix = np.zeros((n, n))
    inverse = np.zeros((n, n))
    if kind == "skewed":
        inner = regular(n, condition, rng) @ orthogonal(n, rng)
        return inner, np.linalg.inv(inner)
    matrix[1:, 1:], inverse[1:, 1:] = inner, np.linalg.inv(inner)
    if kind == "masked":
        return matrix, inverse
    basis = orthogonal(n, rng)
    if kind == "projected":  # along a direction that is not orthogonal to the range
        basis = np.eye(n) + np.outer(rng.normal(size=n), np.eye(n)[0]) / n**0.5
    back = np.linalg.inv(basis)
    return basis @ matrix @ back, basis @ inverse @ back


@functools.cache
def compiled(n: int, symmetric: bool, solver: Any = None) -> Any:
    def solve(matrix: jax.Array, b: jax.Array) -> jax.Array:
        if solver == "direct":
            return group_inverse(matrix, jnp.zeros(n), symmetric) @ b
        system = MatrixFree(lambda a, v: a @ v, symmetric, solver)
        return system.solve(system.look(matrix, jnp.zeros(n)), b)

    return jax.jit(solve)


SYMMETRIC = {"regular": True, "masked": True, "singular": True}
KINDS = [*SYMMETRIC, "skewed", "projected"]


@pytest.mark.parametrize(
    ("n", "kind", "solver"),
    [(40, kind, solver) for kind in KINDS for solver in ("direct", None)]
    + [(2, "singular", "direct"), (2, "regular", None)],
)
def test_against_the_inverse(n: int, kind: str, solver: Any):
    """To what rounding lets one know, in the units of a random vector."""
    with jax.enable_x64():
        for condition in CONDITIONS:
            matrix, inverse = of_kind(kind, n, condition)
            rng = np.random.default_rng(1)
            b = matrix @ rng.normal(size=n)
            want = inverse @ b
            program = compiled(n, kind in SYMMETRIC, solver)
            for units in np.ones(n), 10 ** rng.uniform(-8, 8, n):
                if kind in ("singular", "projected") and units[0] != 1:
                    continue  # of many solutions, the units choose the smallest
                matrix_in_units = units[:, None] * matrix * units[None, :]
                got = np.asarray(program(matrix_in_units, units * b)) * units
                if solver is None and np.isnan(got).all():
                    assert condition > 1e2 or kind == "projected"
                    continue
                error = np.linalg.norm(got - want) / np.linalg.norm(want)
                assert error < 1e-13 * n * condition, (condition, units)


@pytest.mark.parametrize("kind", ["singular", "skewed"])
def test_without_a_matrix_it_is_of_use(kind: str):
    """At a moderate condition there is a number, of a size that takes many products."""
    n = 256
    with jax.enable_x64():
        matrix, inverse = of_kind(kind, n, 1e2)
        b = matrix @ np.random.default_rng(1).normal(size=n)
        got = compiled(n, kind in SYMMETRIC)(matrix, b)
        np.testing.assert_allclose(got, inverse @ b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("spread", [0, 3, 6])
@pytest.mark.parametrize("solver", ["direct", None], ids=["direct", "matrix-free"])
def test_a_known_null_vector_in_any_units(solver: Any, spread: int):
    """What does not depend on the scale of the variables is right, or NaN."""
    n, rng = 5, np.random.default_rng(0)
    null = rng.uniform(0.5, 2.0, n)
    outside = np.eye(n) - np.outer(null, null) / (null @ null)
    root = rng.normal(size=(n, n))
    matrix = outside @ (root @ root.T + np.eye(n)) @ outside
    b = outside @ rng.normal(size=n)
    want = np.linalg.pinv(matrix, rcond=1e-10) @ b
    units = 10.0 ** np.linspace(-spread, spread, n)
    in_units, along = matrix / np.outer(units, units), units * null
    along /= np.linalg.norm(along)
    with jax.enable_x64():
        a, v, rhs = map(jnp.asarray, (in_units, along, b / units))
        if solver == "direct":
            got = group_inverse(a, v, True) @ rhs
        else:
            system = MatrixFree(lambda a, v: a @ v, True, None)
            got = system.solve(system.look(a, v), rhs)
        got = outside @ (np.asarray(got) / units)
    if solver is None and np.isnan(got).all():
        assert spread > 0
        return
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_derivatives_of_the_group_inverse():
    """Along a path of matrices of one rank, against differences."""
    with jax.enable_x64():
        _, inner = of_kind("regular", 3, 1.0)
        skew = jnp.asarray(np.random.default_rng(3).normal(size=(4, 4)))

        def at(t: jax.Array, symmetric: bool) -> jax.Array:
            turn = jax.scipy.linalg.expm(t * (skew - skew.T))
            matrix = jnp.zeros((4, 4)).at[1:, 1:].set(inner + t * jnp.eye(3))
            if not symmetric:
                matrix = matrix.at[1:, 0].set(jnp.sin(t) + 1.0)
            matrix = turn @ matrix @ turn.T
            return group_inverse(matrix, jnp.zeros(4), symmetric)

        for symmetric in True, False:
            fn = functools.partial(at, symmetric=symmetric)
            first = jax.jit(jax.jacfwd(fn))
            second = jax.jit(jax.jacfwd(jax.jacrev(fn)))
            step, t = 1e-4, jnp.asarray(0.3)
            difference = (fn(t + step) - fn(t - step)) / (2 * step)
            np.testing.assert_allclose(first(t), difference, rtol=1e-6, atol=1e-6)
            difference = (first(t + step) - first(t - step)) / (2 * step)
            np.testing.assert_allclose(second(t), difference, rtol=1e-5, atol=1e-5)


class TestUnsolved:
    def test_is_nan(self):
        solver = lx.CG(rtol=1e-10, atol=0.0, max_steps=2)
        diagonal = np.linspace(1.0, 9.0, 40)

        def minimum(c: jax.Array) -> jax.Array:
            def loss(y: jax.Array) -> jax.Array:
                x = y - c.astype(y.dtype)
                return jnp.sum(diagonal * x**2) + jnp.sum(x) ** 2

            few = {"optimizer": optax.sgd(0.01), "max_optimizer_steps": 2}
            return optimize(loss, jnp.zeros(40), linear_solver=solver, **few)

        assert np.isnan(jax.jit(jax.jacrev(minimum))(jnp.ones(40))).all()

    def test_of_many_parameters_is_nan_or_right(self, monkeypatch: pytest.MonkeyPatch):
        """With a condition at which no product will do, above the size of matrices."""
        n = 210
        monkeypatch.setattr("jaxmf_opt._solver.implicit.DIRECT_SIZE", n - 1)
        curvature = np.geomspace(1.0, 1e-14, n)
        mix = np.sin(np.arange(n))

        def minimum(c: jax.Array) -> jax.Array:
            def loss(y: jax.Array) -> jax.Array:
                x = y - c.astype(y.dtype)
                return jnp.sum(curvature * x**2) / 2 + (mix @ x) ** 2

            few = {"optimizer": optax.sgd(0.1), "max_optimizer_steps": 1}
            return optimize(loss, jnp.zeros(n), **few)

        program = jax.jit(lambda c, t: jax.jvp(minimum, (c,), (t,))[1])
        got = program(jnp.ones(n), jnp.ones(n))
        assert np.isnan(got).all() or np.allclose(got, 1.0, rtol=1e-3)


def test_curvatures_of_different_units():
    """In a float32 program, whose derivative is a float64 one."""

    weights = np.array([1.0, 1e-13])

    def minimum(c: jax.Array) -> jax.Array:
        loss = lambda y: jnp.sum(weights * (y - c.astype(y.dtype)) ** 2)  # noqa: E731
        return optimize(loss, jnp.zeros(2))

    for derivative in jax.jacfwd, jax.jacrev:
        np.testing.assert_allclose(
            jax.jit(derivative(minimum))(jnp.ones(())), [1.0, 1.0], rtol=1e-6
        )
