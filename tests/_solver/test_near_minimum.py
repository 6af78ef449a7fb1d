"""The derivative at a point that is not quite a minimum, or is none: right, or NaN."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from jaxmf_opt import optimize
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
