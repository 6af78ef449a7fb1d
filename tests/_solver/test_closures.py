"""Arrays that a loss closes over are operands, however it closes over them."""

import functools
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compilations

from jaxmf_opt import optimize, sweep

START, PLAIN = np.zeros(3), optax.sgd(0.4)


def by_helper(x: Any) -> Callable[[Any], Any]:
    @jax.jit
    def rest(y: Any) -> Any:
        return y - x

    return lambda y: jnp.sum(rest(y) ** 2)


class WithMethod(eqx.Module):
    x: Any

    @eqx.filter_jit
    def rest(self, y: Any) -> Any:
        return jax.jit(lambda y: y - self.x)(y)

    def __call__(self, y: Any) -> Any:
        return jnp.sum(self.rest(y) ** 2)


def by_attribute(x: Any) -> Callable[[Any], Any]:
    helper = types.SimpleNamespace(rest=jax.jit(lambda y: y - jnp.asarray(x)))
    return lambda y: jnp.sum(helper.rest(y) ** 2)


def with_default(x: Any) -> Callable[[Any], Any]:
    def loss(y: Any, x: Any = x) -> Any:
        return jnp.sum((y - x) ** 2)

    return loss


LOSSES: dict[str, Callable[[Any], Callable[[Any], Any]]] = {
    "closure": lambda x: lambda y: jnp.sum((y - x) ** 2),
    "jit": lambda x: jax.jit(lambda y: jnp.sum((y - x) ** 2)),
    "partial": lambda x: functools.partial(lambda x, y: jnp.sum((y - x) ** 2), x),
    "default": with_default,
    "helper": by_helper,
}
# What is not looked into before it is traced.
ARRAYS_ONLY: dict[str, Callable[[Any], Callable[[Any], Any]]] = {
    "inner jit": lambda x: lambda y: jax.jit(lambda y: jnp.sum((y - x) ** 2))(y),
    "attribute": by_attribute,
    "module": WithMethod,
}
KINDS: dict[str, Callable[[float], Any]] = {
    "NumPy scalar": np.float64,
    "0-d NumPy array": np.array,
    "NumPy array": lambda x: np.full(3, x),
    "JAX array": lambda x: jnp.full(3, x, jnp.float64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_values_compile_nothing(kind: str):
    others = ARRAYS_ONLY if kind.endswith(" array") and kind[0] != "0" else {}
    for make in [*LOSSES.values(), *others.values()]:
        with jax.enable_x64():
            losses = [make(KINDS[kind](x)) for x in (1.0, 2.0)]
        optimize(losses[0], START, optimizer=PLAIN)
        with compilations() as events:
            found = optimize(losses[1], START, optimizer=PLAIN)
        assert not events
        np.testing.assert_allclose(found, 2.0, rtol=1e-12)


def test_a_scalar_that_decides_in_python():
    """What only a NumPy scalar can do, it does."""
    scale = np.float64(2.0)

    def loss(y: Any) -> Any:
        return jnp.sum((y - 1) ** 2) if scale * 2 > 3 else jnp.sum(y**2)

    np.testing.assert_allclose(optimize(loss, START), 1.0)


def test_in_a_sweep():
    targets = np.array([1.0, 2.0])

    def loss_with(scale: Any) -> Callable[[Any, Any], Any]:
        return lambda y, target: scale * jnp.sum((y - target.astype(y.dtype)) ** 2)

    sweep(loss_with(np.float64(1.0)), START, targets)
    with compilations() as events:
        solution = sweep(loss_with(np.float64(3.0)), START, targets)
    assert not events
    np.testing.assert_allclose(solution.value[:, 0], targets, rtol=1e-12)
