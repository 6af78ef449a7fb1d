"""Programs are equal where they compute the same thing, and only there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmf_opt import optimize
from jaxmf_opt._jax.structure import Structure


def structure(fn: Callable[[jax.Array], Any]) -> Structure:
    return Structure(jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((3,), jnp.float32)))


def scan_with(factor: float) -> Callable[[jax.Array], Any]:
    return lambda x: jax.lax.scan(lambda c, y: (c + factor * y, c), 0.0, x)[1]


def cond_with(factor: float) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jax.lax.cond(x[0] > 0, lambda x: x * factor, jnp.sin, x)


@jax.custom_jvp
def softsign(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.abs(x))


softsign.defjvp(lambda p, t: (softsign(*p), t[0] / (1 + jnp.abs(p[0])) ** 2))

EQUAL = {
    "cond": (cond_with(2.0), cond_with(2.0)),
    "custom rule": (lambda x: softsign(x), lambda x: softsign(x)),
    "nan": (lambda x: x + jnp.nan, lambda x: x + jnp.nan),
}
DIFFERENT = {
    "literal": (lambda x: x * 2, lambda x: x * 3),
    "sign of zero": (lambda x: x * 0.0, lambda x: x * -0.0),
    "operation": (lambda x: jnp.sin(x), lambda x: jnp.cos(x)),
    "order": (lambda x: x - x.sum(), lambda x: x.sum() - x),
    "scan": (scan_with(2.0), scan_with(3.0)),
    "cond": (cond_with(2.0), cond_with(3.0)),
    "axis": (lambda x: jnp.cumsum(x), lambda x: jax.lax.cumsum(x, reverse=True)),
    "dtype": (lambda x: x.astype(jnp.int32), lambda x: x.astype(jnp.int8)),
    "constants": (lambda x: x * np.arange(3.0), lambda x: x * np.arange(3.0)[::-1]),
    "outputs": (lambda x: (x, -x), lambda x: (-x, x)),
    "host function": (
        lambda x: jax.pure_callback(lambda y: y, x, x),
        lambda x: jax.pure_callback(lambda y: -y, x, x),
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_programs(name: str):
    a, b = map(structure, EQUAL[name])
    assert a == b
    assert hash(a) == hash(b)


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_programs(name: str):
    a, b = map(structure, DIFFERENT[name])
    assert a != b


def test_settings_of_equations_count():
    """Random numbers are others under another setting, by the same equations."""

    def loss(x: jax.Array) -> jax.Array:
        target = jax.random.uniform(jax.random.key(0), (3,), jnp.float64)
        return jnp.sum((x - target) ** 2)

    found = []
    for setting in True, False, True:
        with jax.threefry_partitionable(setting):
            found.append(optimize(loss, jnp.zeros(3)))
            with jax.enable_x64():
                want = jax.random.uniform(jax.random.key(0), (3,), jnp.float64)
        np.testing.assert_allclose(found[-1], want, rtol=1e-6)
    assert not np.allclose(found[0], found[1])


def test_the_sign_of_a_complex_zero_counts():
    def angle(zero: complex) -> Callable[[jax.Array], jax.Array]:
        return lambda x: jnp.angle(
            jnp.complex64(-1) + (x * 0).astype(jnp.complex64) + jnp.complex64(zero)
        )

    assert structure(angle(complex(0, 0.0))) != structure(angle(complex(0, -0.0)))
