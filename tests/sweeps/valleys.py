"""A sweep that takes a moment, whose lanes take different numbers of steps."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxmf_opt import Solution, sweep

WEIGHTS = np.array([1.0, 1.5, 2.0])


def with_weights(weights: Any) -> Callable[[Any, Any], Any]:
    return lambda y, c: c * jnp.sum(weights * (y - 1) ** 2) + jnp.sum((y - 1) ** 4)


def curvatures(lanes: int) -> np.ndarray:
    """In an order that is no order."""
    return np.random.default_rng(0).permutation(np.geomspace(1.0, 20.0, lanes))


def valleys(hyperparams: np.ndarray, **changes: Any) -> Solution:
    arguments: dict[str, Any] = {
        "loss_fn": with_weights(WEIGHTS),
        "params": np.array([0.5, -0.5, 0.25]),
        "hyperparams": hyperparams,
        "max_optimizer_steps": 999,
        "optimizer": optax.sgd(0.01),
        "gtol": 1e-3,
    }
    return sweep(**(arguments | changes))
