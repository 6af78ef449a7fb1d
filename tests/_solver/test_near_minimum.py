"""The derivative at a point that is not quite a minimum, or is none: right, or NaN."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
import scipy.optimize

from jaxmf_opt import ROBUST_OPTIMIZER, optimize
from jaxmf_opt._solver import implicit


def stay(loss: Callable[..., Any], start: jax.Array, c: jax.Array) -> jax.Array:
    """A solve that ends where it starts."""
    options: Any = {"optimizer": optax.set_to_zero(), "max_optimizer_steps": 1}
    return optimize(lambda y: loss(y, c.astype(y.dtype)), start, **options)


def of_scale(y: jax.Array, c: jax.Array) -> jax.Array:
    """A loss that does not depend on the length of `y`."""
    length = y @ y
    return y @ (c * y) / length + y.sum() ** 2 / length + 0.1 * (y**4).sum() / length**2


SYMMETRIES: dict[str, Any] = {
    "scale": of_scale,
    "two scales": lambda y, c: of_scale(y[:3], c[:3]) + 100 * of_scale(y[3:], c[3:]),
    "scale and others": lambda y, c: (
        of_scale(y[:3], c[:3]) + jnp.sum(jnp.cosh(y[3:] - c[3:]))
    ),
    "rotation": lambda y, c: jnp.sum(
        (y.reshape(3, 2) @ y.reshape(3, 2).T - jnp.diag(c[:3]) - 0.1 * c[3:].sum()) ** 2
    ),
    "none": lambda y, c: (
        jnp.sum(100 * (y[1:] - y[:-1] ** 2) ** 2) + jnp.sum((y - c) ** 2)
    ),
}


@pytest.mark.parametrize(
    ("name", "direct"),
    [*((name, True) for name in SYMMETRIES), ("rotation", False)],
)
def test_near_a_minimum_the_derivative_is_right_or_nan(
    name: str, direct: bool, monkeypatch: pytest.MonkeyPatch
):
    """However near that is: of a symmetry a coarse minimum shows nothing but rounding.

    The reference is the pseudo-inverse at a minimum to which Newton's method has led.
    """
    monkeypatch.setattr(implicit, "DIRECT_SIZE", 6 if direct else 0)
    loss, rng = SYMMETRIES[name], np.random.default_rng(0)

    with jax.enable_x64():
        c = jnp.asarray(rng.uniform(1, 3, 6))
        hessian, mixed = (jax.jit(jax.jacfwd(jax.grad(loss), i)) for i in (0, 1))
        fun = jax.jit(jax.value_and_grad(loss))
        y = scipy.optimize.minimize(fun, rng.normal(size=6), (c,), jac=True).x
        inverse = lambda y: np.linalg.pinv(hessian(y, c), rcond=1e-6)  # noqa: E731
        for _ in range(20):
            y = y - inverse(y) @ fun(y, c)[1]
        want = np.asarray(-inverse(y) @ mixed(y, c))
        distances = np.r_[0.0, 10.0 ** np.arange(-12, 0)]
        starts = y[None] + np.outer(distances, rng.normal(size=6))
        derivative = jax.jacfwd(functools.partial(stay, loss), 1)
        got = jax.jit(jax.vmap(derivative, (0, None)))(starts, c)
    error = np.linalg.norm(np.asarray(got) - want, axis=(1, 2)) / np.linalg.norm(want)
    assert error[0] < 1e-6
    is_right = error < 0.3
    assert np.all(is_right | np.isnan(error)), error


@pytest.mark.parametrize(
    ("loss", "want"),
    [
        (lambda y, c: jnp.sum((y - c) ** 4), np.nan),
        (lambda y, c: jnp.sum(jnp.abs(y - c)), np.nan),
        (lambda y, c: (y[0] - c[0]) ** 2 + jnp.abs(y[1] - c[1]) ** 3, np.nan),
        (lambda y, c: (y[0] - c[0]) ** 2 + 0 * c[1], [[1, 0], [0, 0]]),
        (lambda y, c: jnp.sum(jax.nn.relu(y - c - 1) ** 2), 0),
    ],
    ids=["quartic", "kink", "partly cubic", "absent", "flat"],
)
def test_a_minimum_that_is_met_exactly(loss: Any, want: Any):
    """A row of zeros is that of a variable that is in nothing, or is not believed."""
    c = jnp.array([0.0, 0.5])
    got = jax.jacrev(functools.partial(stay, loss, c))(c)
    np.testing.assert_array_equal(got, np.broadcast_to(want, (2, 2)))


def test_on_a_kink_at_which_the_gradient_is_not_zero():
    """Nothing of the Hessian shows it: that is the same on both sides."""

    def lasso(c: jax.Array) -> jax.Array:
        a = np.linspace(-1.0, 1.0, 12).reshape(4, 3) ** 3 + np.eye(4, 3)

        def loss(y: jax.Array) -> jax.Array:
            misfit = jnp.sum((a @ y - c.astype(y.dtype)) ** 2)
            return misfit + 0.8 * jnp.sum(jnp.abs(y))

        return optimize(loss, jnp.ones(3), optimizer=ROBUST_OPTIMIZER)

    c = jnp.array([1.0, 0.1, -0.2, 0.0])
    assert np.any(np.abs(lasso(c)) < 1e-6)
    assert np.isnan(jax.jacfwd(lasso)(c)).all()

    def narrow(y: jax.Array, c: jax.Array) -> jax.Array:
        """A step of Newton's method is next to nothing here."""
        return jnp.sum(jnp.abs(y - c) + 5e5 * (y - 1) ** 2)

    c = jnp.array([1 + 1e-6])
    assert np.isnan(jax.jacfwd(functools.partial(stay, narrow, c))(c)).all()


@pytest.mark.parametrize("most", [np.inf, np.finfo(np.float32).max])
def test_bounds_as_large_as_there_are_numbers(most: float):
    def minimum(data: jax.Array) -> jax.Array:
        def loss(y: jax.Array) -> jax.Array:
            c, bound = data.astype(y.dtype)
            return (jnp.minimum(y, bound) - c) ** 2

        return optimize(loss, jnp.asarray(0.0))

    got = jax.grad(minimum)(jnp.array([2.0, most]))
    np.testing.assert_allclose(got, [1, 0], atol=1e-6)


@pytest.mark.parametrize(("n", "i"), [(7, 0), (20, 11), (300, 299)])
def test_one_variable_among_many_that_is_far_from_its_minimum(n: int, i: int):
    def loss(y: jax.Array, c: jax.Array) -> jax.Array:
        others = jnp.sum(y**2) - y[i] ** 2
        return others / 2 + jnp.cosh(y[i]) - c[0] * y[i]

    start = jnp.zeros(n).at[i].set(1.0)
    got = jax.jacrev(functools.partial(stay, loss, start))(jnp.zeros(1))
    assert np.isnan(got).all()


# Losses of y[0] whose Hessian is nearly the same everywhere, and whose minimum is at 1
# for c = (1, 1); and how it moves with c there.
MOVED_BY_DATA: dict[str, tuple[Any, Any]] = {
    "factor": (lambda y, c: c[0] * (y[0] - 1) ** 2, [0, 0]),
    "factor, high up": (lambda y, c: 1e12 + c[0] * (y[0] - 1) ** 2, [0, 0]),
    "product": (lambda y, c: (y[0] - 1) ** 2 / 2 + (c[0] * c[1] - 1) * y[0] ** 2, -2),
    "ratio": (
        lambda y, c: (y[0] - 1) ** 2 / 2 + jnp.log(c[0] / c[1]) * y[0] ** 3 / 3,
        [-1, 1],
    ),
    "difference": (
        lambda y, c: (y[0] - 1) ** 2 / 2 + (c[0] - c[1]) * y[0] ** 3 / 3,
        [-1, 1],
    ),
    "weights": (
        lambda y, c: jnp.sum(c / jnp.sum(c) * (y[0] - jnp.array([0, 2.0])) ** 2),
        [-0.5, 0.5],
    ),
    "cosh": (lambda y, c: c[0] * jnp.cosh(y[0] - 1), [0, 0]),
}


@pytest.mark.parametrize("name", MOVED_BY_DATA)
def test_the_right_hand_side_is_that_of_the_minimum_too(name: str):
    """From wherever, and however what is captured hangs together."""
    loss, want = MOVED_BY_DATA[name]
    with jax.enable_x64():
        starts = np.r_[1.0, 1 + 1e-9, np.linspace(-0.5, 2.5, 60)][:, None]
        derivative = jax.jacrev(functools.partial(stay, loss), 1)
        got = jax.jit(jax.vmap(derivative, (0, None)))(starts, jnp.ones(2))[:, 0]
    np.testing.assert_allclose(got[:2], np.broadcast_to(want, (2, 2)), atol=1e-6)
    error = np.max(np.abs(np.asarray(got) - want), axis=1)
    assert np.all((error < 0.15) | np.isnan(error)), error


@pytest.mark.parametrize("solver", [None, lx.GMRES(1e-10, 1e-10)])
def test_a_rule_for_a_gradient_that_is_none(solver: Any):
    """Its Jacobian is not symmetric, which only `grad=True` lets one expect."""
    scale, hessian = jnp.array([1.0, 0.5]), np.array([[2.0, 1.0], [1.0, 3.0]])

    @jax.custom_vjp
    def scaled_back(y: jax.Array) -> jax.Array:
        return y

    scaled_back.defvjp(
        lambda y: (y, None), lambda _, ct: (scale.astype(ct.dtype) * ct,)
    )

    def minimum(c: jax.Array) -> jax.Array:
        def loss(y: jax.Array) -> jax.Array:
            y = scaled_back(y)
            return y @ hessian @ y / 2 - c.astype(y.dtype) @ y

        options: Any = {"optimizer": optax.sgd(0.3), "linear_solver": solver}
        return optimize(loss, jnp.zeros(2), **options)

    c = jnp.array([1.0, 2.0])
    want = np.linalg.inv(hessian)
    np.testing.assert_allclose(minimum(c), want @ c, rtol=1e-5)
    assert np.isnan(jax.jacrev(minimum)(c)).all()


def test_a_solve_that_starts_where_all_is_rounding():
    """The minimum is at 0, next to which each gradient is as large as any other."""
    rng = np.random.default_rng(0)
    x, noise = 1e3 * rng.normal(size=(50, 4)), 1e3 * rng.normal(size=50)
    b = noise - x @ np.linalg.lstsq(x, noise)[0]

    def minimum(c: jax.Array) -> jax.Array:
        def loss(y: jax.Array) -> jax.Array:
            return jnp.sum((x @ y - b - c * x[:, 0]) ** 2)

        start = np.linalg.lstsq(x, b)[0]
        assert 0 < np.max(np.abs(start)) < 1e-14
        return optimize(loss, jnp.asarray(start), optimizer=ROBUST_OPTIMIZER)

    with jax.enable_x64():
        got = jax.jacfwd(minimum)(0.0)
    np.testing.assert_allclose(got, [1, 0, 0, 0], atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_a_solve_that_has_not_ended(steps: int):
    def minimum(c: jax.Array) -> jax.Array:
        def loss(y: jax.Array) -> jax.Array:
            return jnp.sum(jnp.cosh(y)) - c.astype(y.dtype) @ y

        options: Any = {"optimizer": optax.sgd(0.25), "max_optimizer_steps": steps}
        return optimize(loss, jnp.zeros(2), **options)

    c = np.array([0.75, -2.0])
    got = jax.jit(jax.jacrev(minimum))(jnp.asarray(c))
    want = np.diag(1 / np.hypot(1, c))
    if steps < 30:
        want = np.full((2, 2), np.nan)
    np.testing.assert_allclose(got, want, rtol=1e-3)
