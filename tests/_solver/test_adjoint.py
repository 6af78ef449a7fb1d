"""The derivative of the minimum for minimisers of optimistix."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest

from jaxmf_opt import LeanOptaxMinimiser, MinimumNormAdjoint, optimize
from jaxmf_opt._solver import implicit

SOLVERS: dict[str, Any] = {
    "ours": LeanOptaxMinimiser(optax.lbfgs(), rtol=1e-6, atol=1e-6),
    "BFGS": optx.BFGS(rtol=1e-6, atol=1e-6),
}
ADJOINT = MinimumNormAdjoint()
CONDITIONS = (1e1, 1e3, 1e5, 1e7, 1e9, np.inf)


def minimum(loss: Any, start: Any, args: Any, solver: Any = SOLVERS["BFGS"]) -> Any:
    return optx.minimise(loss, solver, start, args, adjoint=ADJOINT).value


def quadratic(n: int, condition: float, seed: int = 0) -> Any:
    """A positive definite matrix, or one with a null vector."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(n, n)))[0]
    values = np.geomspace(1.0, 1 / min(condition, 1e9), n)
    values[-1] = 1 / condition
    return (vectors * values) @ vectors.T


@pytest.mark.parametrize(
    ("solver", "transform", "x64"),
    [("ours", jax.jacrev, False), ("BFGS", jax.jacfwd, True)],
    indirect=["x64"],
)
def test_is_that_of_linear_algebra(solver: str, transform: Any, x64: bool):
    """Of a loss of a tree, with respect to a tree, under `jit` and `vmap`."""
    matrix = quadratic(3, 10.0)

    def point(target: Any) -> Any:
        def loss(y: Any, target: Any) -> Any:
            flat = jnp.concatenate([y["a"], y["b"][None]]) - target["x"]
            return flat @ jnp.asarray(matrix, flat.dtype) @ flat + y["b"] * target["z"]

        start = {"a": jnp.zeros(2), "b": jnp.zeros(())}
        y = minimum(loss, start, target, SOLVERS[solver])
        return jnp.concatenate([y["a"], y["b"][None]])

    target = {"x": jnp.arange(6.0).reshape(2, 3), "z": jnp.array([0.5, 1.0])}
    got = jax.jit(jax.vmap(transform(point)))(target)
    rtol = 1e-9 if x64 else 1e-4
    np.testing.assert_allclose(got["x"], [np.eye(3)] * 2, rtol=0, atol=rtol)
    want = -np.linalg.inv(2 * matrix)[:, 2]
    np.testing.assert_allclose(got["z"], [want] * 2, rtol=rtol, atol=rtol)
    assert got["z"].dtype == (jnp.float64 if x64 else jnp.float32)


@pytest.mark.parametrize(
    ("direct", "x64"), [(True, False), (False, True)], indirect=["x64"]
)
def test_is_the_smallest_where_the_scale_is_free(
    direct: bool, x64: bool, monkeypatch: pytest.MonkeyPatch
):
    """A loss of the direction of `y` alone, and of none of the last element."""
    n = 25
    monkeypatch.setattr(implicit, "DIRECT_SIZE", n if direct else 0)

    def loss(y: Any, target: Any) -> Any:
        y = y[:-1]
        return 1 - (y @ target) / jnp.sqrt((y @ y) * (target @ target))

    target = jnp.linspace(0.5, 1.5, n - 1)
    move = jnp.cos(jnp.arange(n - 1.0))
    start = jnp.append(target + 0.1 * move, 3.0)
    solver = SOLVERS["ours"]
    y, dot = jax.jvp(lambda t: minimum(loss, start, t, solver), (target,), (move,))
    # The minimum is along the target, with the length that it happens to have.
    y, target, move = (np.asarray(x, float) for x in (y[:-1], target, move))
    unit = target / np.linalg.norm(target)
    want = np.linalg.norm(y) * (move - unit * (unit @ move)) / np.linalg.norm(target)
    np.testing.assert_allclose(dot[:-1], want, rtol=0, atol=1e-7 if x64 else 2e-3)
    assert dot[-1] == 0


@pytest.mark.parametrize(
    ("direct", "x64"),
    [(True, False), (True, True), (False, False)],
    indirect=["x64"],
)
def test_is_right_or_nan(direct: bool, x64: bool, monkeypatch: pytest.MonkeyPatch):
    """Of matrices of all conditions; NaN where float32 cannot tell."""
    monkeypatch.setattr(implicit, "DIRECT_SIZE", 6 if direct else 0)
    anywhere = np.random.default_rng(1).normal(size=6)

    def loss(y: Any, args: Any) -> Any:
        matrix, rhs, c = args
        return y @ matrix @ y / 2 - c * (rhs @ y)

    @jax.jit
    @jax.jacfwd
    def derivative(c: Any, matrix: Any, rhs: Any) -> Any:
        options: Any = {"max_steps": 3, "adjoint": ADJOINT, "throw": False}
        solver = LeanOptaxMinimiser(optax.sgd(0.1))
        return optx.minimise(
            loss, solver, jnp.zeros(6), (matrix, rhs, c), **options
        ).value

    for seed, condition in itertools.product(range(3), CONDITIONS):
        matrix = jnp.asarray(quadratic(6, condition, seed), float)
        exact = np.asarray(matrix, np.float64)
        inverse = np.linalg.pinv(exact, rcond=1e-13, hermitian=True)
        # Of a singular one in the range, or there would be no minimum.
        rhs = exact @ (want := inverse @ anywhere)
        got = derivative(jnp.array(1.0), matrix, jnp.asarray(rhs, float))
        is_finite = np.isfinite(got).all()
        if x64 or condition <= 1e3:
            assert is_finite, condition
        if condition > 1e7:
            assert is_finite == x64, condition
        if is_finite:
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            allowed = 50 * float(jnp.finfo(got.dtype).eps) * min(condition, 1e10)
            assert error <= min(allowed, 0.02), condition


@pytest.mark.parametrize("curvature", [1e-2, 1e-4, 1e-6, 1e-7])
def test_of_a_loss_that_is_soft_along_its_minimum(curvature: float):
    """Which is not one that does not depend on the scale, though float32 shows both."""
    u = jnp.ones(2) / 2**0.5
    hessian = jnp.eye(2) - (1 - curvature) * jnp.outer(u, u)

    def loss(y: Any, c: Any) -> Any:
        away = y - jnp.ones(2)
        return away @ hessian @ away / 2 - c * curvature * (away @ u)

    dot = jax.jacfwd(lambda c: minimum(loss, jnp.ones(2), c))(jnp.array(0.0))
    assert np.allclose(dot, u, rtol=2e-3) or np.isnan(dot).all()
    assert curvature < 1e-4 or np.isfinite(dot).all()


def test_agrees_with_optimize():
    def loss(y: Any, c: Any) -> Any:
        return jnp.sum(jnp.cosh(y - c * jnp.arange(4.0, dtype=y.dtype))) + jnp.sum(y**4)

    def ours(c: Any) -> Any:
        return jnp.sum(minimum(loss, jnp.zeros(4), c) ** 2)

    def exact(c: Any) -> Any:
        return jnp.sum(
            optimize(lambda y: loss(y, c.astype(y.dtype)), jnp.zeros(4)) ** 2
        )

    c = jnp.array(0.5)
    second = [jax.jit(jax.jacrev(jax.jacrev(f)))(c) for f in (ours, exact)]
    np.testing.assert_allclose(*second, rtol=1e-3)


def test_takes_a_solver_of_lineax_and_looks_at_its_answer():
    def of(steps: int) -> Any:
        solver = lx.CG(rtol=1e-5, atol=1e-5, max_steps=steps)
        loss = lambda y, c: jnp.sum((jnp.arange(9.0) + 1) * (y - c) ** 2)  # noqa: E731
        return jax.jacfwd(
            lambda c: (
                optx.minimise(
                    loss,
                    SOLVERS["BFGS"],
                    jnp.zeros(9),
                    c,
                    adjoint=MinimumNormAdjoint(solver),
                ).value
            )
        )(jnp.array(2.0))

    np.testing.assert_allclose(of(50), np.ones(9), rtol=1e-3)
    assert np.isnan(of(1)).all()


def test_least_squares_too():
    fit = lambda y, c: y**2 - c  # noqa: E731
    solver = optx.LevenbergMarquardt(rtol=1e-6, atol=1e-6)
    got = jax.grad(
        lambda c: (
            optx.least_squares(fit, solver, jnp.array(1.0), c, adjoint=ADJOINT).value
        )
    )(jnp.array(4.0))
    np.testing.assert_allclose(got, 0.25, rtol=1e-5)


def test_is_refused_where_systems_are_of_another_kind():
    with pytest.raises(ValueError, match=r"root_find.*ImplicitAdjoint"):
        optx.root_find(
            lambda y, _: y**2 - 2,
            optx.Newton(rtol=1e-5, atol=1e-5),
            jnp.array(1.0),
            adjoint=ADJOINT,
        )


@pytest.mark.parametrize(
    ("dtype", "direct", "x64"),
    [
        (jnp.float32, True, True),
        (jnp.bfloat16, True, True),
        (jnp.bfloat16, False, False),
    ],
    indirect=["x64"],
)
def test_parameters_of_any_precision(
    dtype: Any, direct: bool, x64: bool, monkeypatch: pytest.MonkeyPatch
):
    """By our minimiser; the derivative is right, or NaN in half precision."""
    del x64
    monkeypatch.setattr(implicit, "DIRECT_SIZE", 3 if direct else 0)

    def found(c: Any) -> Any:
        loss = lambda y, c: jnp.sum((y - c.astype(y.dtype)) ** 2)  # noqa: E731
        solver = LeanOptaxMinimiser(optax.lbfgs(), rtol=1e-2, atol=1e-2)
        return minimum(loss, jnp.zeros(3, dtype), c, solver)

    y, dot = jax.jvp(found, (jnp.array(1.5),), (jnp.array(1.0),))
    assert y.dtype == dot.dtype == dtype
    np.testing.assert_allclose(y.astype(float), 1.5, rtol=1e-2)
    if direct or dtype == jnp.float32 or np.isfinite(dot).all():
        np.testing.assert_allclose(dot.astype(float), 1.0, rtol=1e-2)


@pytest.mark.mixes
def test_leaves_of_two_precisions_are_as_exact_as_the_coarser():
    """A singular Hessian that only rounding makes regular gives NaN."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 3)) @ rng.normal(size=(3, 5))

    def of(matrix: Any) -> Any:
        def loss(y: Any, c: Any) -> Any:
            single, double = y
            rest = jnp.asarray(matrix[:, :3], jnp.float32) @ single
            rest = rest.astype(float) + jnp.asarray(matrix[:, 3:]) @ double
            return jnp.sum((rest - c * jnp.arange(6.0)) ** 2)

        start = jnp.zeros(3, jnp.float32), jnp.zeros(2)
        solver = LeanOptaxMinimiser(optax.sgd(0.01))
        options: Any = {"max_steps": 3, "adjoint": ADJOINT, "throw": False}
        value = lambda c: optx.minimise(loss, solver, start, c, **options).value  # noqa: E731
        dot = jax.jvp(value, (jnp.array(1.0),), (jnp.array(1.0),))[1]
        return np.concatenate([np.asarray(x, float) for x in dot])

    with jax.enable_x64():
        assert np.isnan(of(rows)).all()
        regular = rows + 3 * np.eye(6, 5)
        want = np.linalg.lstsq(regular, np.arange(6.0))[0]
        np.testing.assert_allclose(of(regular), want, rtol=1e-3)
