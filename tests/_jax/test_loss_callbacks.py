"""What a loss hands over to the host arrives with all its bits, and comes back so."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmf_opt import optimize

THIRD = 1 / 3


def seen_by(wrap: Callable[[Any], Any], operand: Any) -> tuple[Any, list[Any]]:
    """The minimum, and what the host has seen on the way."""
    seen: list[Any] = []

    def on_host(x: Any) -> np.ndarray:
        seen.append(x)
        return np.asarray(x) ** 2

    @jax.custom_jvp
    def square(x: jax.Array) -> jax.Array:
        return jax.pure_callback(on_host, x, x, vmap_method="sequential")

    square.defjvp(lambda p, t: (square(p[0]), 2 * p[0] * t[0]))

    def minimum(c: jax.Array) -> jax.Array:
        def loss(y: jax.Array) -> jax.Array:
            jax.debug.callback(lambda x: seen.append(x), y - THIRD)
            return square(y - THIRD - c.astype(y.dtype))

        return optimize(
            loss, jnp.zeros_like(c), max_optimizer_steps=5, optimizer=optax.sgd(0.5)
        )

    value = wrap(minimum)(operand)
    jax.effects_barrier()
    return value, seen


WAYS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "call": (lambda f: f, np.float32(1.0)),
    "jit": (jax.jit, np.float32(1.0)),
    "jit of vmap": (lambda f: jax.jit(jax.vmap(f)), np.ones(2, np.float32)),
    "jit of grad": (lambda f: jax.jit(jax.value_and_grad(f)), np.float32(1.0)),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_bits(way: str, x64: bool):
    wrap, operand = WAYS[way]
    value, seen = seen_by(wrap, jnp.asarray(operand))
    assert {x.dtype for x in seen} == {np.dtype(np.float64)}
    assert any(float(x) == -THIRD for x in seen)
    value = value[0] if way == "jit of grad" else value
    np.testing.assert_allclose(value, THIRD + 1, rtol=1e-7)


def test_complex_numbers_and_integers():
    seen: list[Any] = []

    def on_host(z: Any, n: Any) -> tuple[Any, Any]:
        seen.append((z.dtype, n.dtype))
        return np.asarray(z) * 2, np.asarray(n) + 1

    def loss(y: jax.Array) -> jax.Array:
        z = jax.lax.complex(jnp.float64(THIRD), jnp.float64(1.0))
        n = jnp.int64(2**40)
        types = jax.eval_shape(lambda: (z, n))
        z, n = jax.pure_callback(on_host, types, z, n)
        goal = z.real - 2 * THIRD + (n - 2**40).astype(y.dtype)
        return (y - goal) ** 2

    assert (
        float(jax.jit(lambda: optimize(loss, jnp.zeros(()), max_optimizer_steps=5))())
        == 1.0
    )
    assert {(str(z), str(n)) for z, n in seen} == {("complex128", "int64")}


def test_an_ordered_print(capfd: pytest.CaptureFixture[str]):
    def loss(y: jax.Array) -> jax.Array:
        jax.debug.print("at {}", y, ordered=True)
        return (y - 1.0) ** 2

    jax.jit(lambda: optimize(loss, jnp.zeros(()), max_optimizer_steps=1))()
    jax.effects_barrier()
    assert capfd.readouterr().out.startswith("at 0.0\nat 1.0\n")
