"""The loss as a pure function, with all that it captures."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmf_opt import optimize

SGD = optax.sgd(0.1)


def rule_closes_over(centre: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """A loss that knows `centre` in its derivative rule only."""

    @jax.custom_vjp
    def loss(y: jax.Array) -> jax.Array:
        return jnp.sum(y**2)

    loss.defvjp(
        lambda y: (loss(y), y), lambda y, ct: (ct * 2 * (y - centre.astype(y.dtype)),)
    )
    return loss


def minimum(centre: jax.Array) -> jax.Array:
    return optimize(rule_closes_over(centre), jnp.zeros(2), optimizer=SGD)


def test_what_a_derivative_rule_closes_over_is_captured():
    np.testing.assert_allclose(minimum(jnp.array(2.0)), [2.0, 2.0], rtol=1e-6)
    for derivative in (jax.jacfwd(minimum), jax.jit(jax.jacrev(minimum))):
        np.testing.assert_allclose(derivative(2.0), [1.0, 1.0], rtol=1e-6)
    batch = jax.vmap(minimum)(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(batch, [[1.0, 1.0], [2.0, 2.0]], rtol=1e-6)


def test_a_traced_value_that_cannot_be_captured_is_an_error():
    """In the derivative rule of a derivative rule; never a derivative without it."""

    def minimum(centre: jax.Array) -> jax.Array:
        @jax.custom_jvp
        def inner(y: jax.Array) -> jax.Array:
            return y

        inner.defjvp(lambda p, t: (inner(*p), centre * t[0]))

        @jax.custom_jvp
        def loss(y: jax.Array) -> jax.Array:
            return jnp.sum((y - centre) ** 2)

        loss.defjvp(lambda p, t: (loss(*p), 2 * (inner(p[0]) - centre) @ t[0]))
        return optimize(loss, jnp.zeros(2), optimizer=SGD)

    np.testing.assert_allclose(minimum(jnp.array(1.0)), [1.0, 1.0], rtol=1e-6)
    for derivative in (jax.jacfwd, jax.jacrev):
        with pytest.raises(TypeError, match=r"traced value|tracer"):
            derivative(minimum)(1.0)
        with pytest.raises(TypeError, match=r"traced value|tracer"):
            jax.jit(derivative(minimum))(1.0)


def test_a_minimum_that_does_not_depend_has_a_zero_derivative():
    def minimum(_: jax.Array) -> jax.Array:
        return optimize(lambda y: jnp.sum((y - 1.0) ** 2), jnp.zeros(2), optimizer=SGD)

    np.testing.assert_array_equal(jax.jacrev(minimum)(1.0), [0.0, 0.0])


def test_a_zoom_line_search_uses_the_users_gradient():
    """It is handed a function to differentiate; the true slope here is 0."""

    def loss_and_grad(y: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat = jax.lax.stop_gradient(y)
        return jnp.sum((flat - 1.0) ** 2), 2 * (y - 1.0)

    y = optimize(
        loss_and_grad,
        jnp.zeros(2),
        grad=True,
        optimizer=optax.lbfgs(memory_size=3),
        max_optimizer_steps=20,
    )
    np.testing.assert_allclose(y, [1.0, 1.0], rtol=1e-6)
