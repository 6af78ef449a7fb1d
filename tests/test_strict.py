"""Solves in programs that forbid to mix types and ranks of arrays, as all tests do.

optax and optimistix mix them, and must not be asked not to; the user's loss must.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.dtypes import TypePromotionError

from jaxmf_opt import (
    DEFAULT_OPTIMIZER,
    ROBUST_OPTIMIZER,
    LeanOptaxMinimiser,
    solve,
)

OPTIMIZERS = {
    "default": DEFAULT_OPTIMIZER,
    "robust": ROBUST_OPTIMIZER,
}


def run(center: Any, **options: Any) -> Any:
    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum((x - jnp.asarray(center, x.dtype)) ** 2)

    options = {"max_optimizer_steps": 30, "rtol": 1e-6, **options}
    return solve(loss, jnp.zeros(3), **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_the_same_steps(name: str):
    strictly = run(0.5, optimizer=OPTIMIZERS[name])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        freely = run(0.5, optimizer=OPTIMIZERS[name])
    jax.tree.map(np.testing.assert_array_equal, strictly, freely)


def test_the_loss_is_held_to_it():
    with pytest.raises(TypePromotionError, match="float64"):
        solve(lambda x: jnp.sum(x * jnp.ones(3, jnp.bfloat16)), jnp.zeros(3))
    with pytest.raises(ValueError, match="rank_promotion"):
        solve(lambda x: jnp.sum(x * jnp.ones((2, 3))), jnp.zeros(3))


def test_the_loss_is_held_to_it_in_a_line_search():
    """Where the minimiser is used by itself, optax calls the loss."""
    solver = LeanOptaxMinimiser(optax.lbfgs(), rtol=1e-6)
    y = jnp.zeros(3)
    f = jax.ShapeDtypeStruct((), y.dtype)

    def loss(y: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sum(y * jnp.ones((2, 3))), None

    state = solver.init(loss, y, None, {}, f, None, frozenset())
    with pytest.raises(ValueError, match="rank_promotion"):
        solver.step(loss, y, None, {}, state, frozenset())
