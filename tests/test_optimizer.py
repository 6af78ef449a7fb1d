"""When two optimizers are one."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxmf_opt import DEFAULT_OPTIMIZER
from jaxmf_opt._optimizer import optimizer_key


def schedule(count: jax.typing.ArrayLike) -> jax.Array:
    return 0.1 / (1 + jnp.asarray(count))


MAKERS = {
    "default": lambda: optax.lbfgs(
        memory_size=1, linesearch=optax.scale_by_backtracking_linesearch(128)
    ),
    "memory": lambda: optax.lbfgs(memory_size=2),
    "patience": lambda: optax.lbfgs(
        memory_size=1, linesearch=optax.scale_by_backtracking_linesearch(64)
    ),
    "zoom": lambda: optax.lbfgs(
        memory_size=2, linesearch=optax.scale_by_zoom_linesearch(9)
    ),
    "adam": lambda: optax.adam(1e-2),
    "other rate": lambda: optax.adam(1e-3),
    "array rate": lambda: optax.adam(jnp.array(1e-3)),
    "other array rate": lambda: optax.adam(jnp.array(1e-2)),
    "optax schedule": lambda: optax.sgd(optax.linear_schedule(0.0, 1.0, 5)),
    "other schedule": lambda: optax.sgd(optax.linear_schedule(0.0, 1.0, 6)),
    "noise": lambda: optax.add_noise(0.1, 0.5, jax.random.key(1)),
    "other noise": lambda: optax.add_noise(0.1, 0.5, jax.random.key(2)),
    "masked": lambda: optax.masked(optax.sgd(0.1), {"a": True, "b": False}),
    "mask swapped": lambda: optax.masked(optax.sgd(0.1), {"a": False, "b": True}),
}


def test_same_making_same_key():
    for name, make in MAKERS.items():
        key = optimizer_key(make())
        assert key is not None, name
        assert key == optimizer_key(make()), name
        assert hash(key) == hash(optimizer_key(make())), name


def test_other_making_other_key():
    keys = [optimizer_key(make()) for make in MAKERS.values()]
    assert len(set(keys)) == len(keys)


def test_default_is_upstreams():
    optimization = pytest.importorskip("jax_privacy.matrix_factorization.optimization")
    assert optimizer_key(DEFAULT_OPTIMIZER) == optimizer_key(MAKERS["default"]())
    assert optimizer_key(DEFAULT_OPTIMIZER) == optimizer_key(
        optimization.DEFAULT_OPTIMIZER
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(schedule),
        optax.sgd(lambda step: 0.1),
        optax.chain(optax.sgd(0.1), optax.stateless(lambda u, p: u)),
    ],
)
def test_users_functions_cannot_be_told(optimizer: optax.GradientTransformation):
    # They may read globals that are rebound later.
    assert optimizer_key(optimizer) is None


def test_tracers_cannot_be_told():
    keys = []

    @jax.jit
    def trace(rate: jax.Array) -> jax.Array:
        keys.append(optimizer_key(optax.sgd(rate)))
        return rate

    trace(1.0)
    assert keys == [None]
