"""Values that come out beside a derivative."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def value_beside(derivative: Callable[..., Any], fn: Any) -> Any:
    """`fn`, evaluated while JAX differentiates its sum.

    Args:
      derivative: `jax.grad` or `jax.hessian`.
      fn: A function of an array to an array.

    Returns:
      A function that returns what `fn` does.
    """

    def total(x: jax.Array) -> Any:
        y = fn(x)
        return jnp.sum(y), y

    return lambda x: derivative(total, has_aux=True)(x)[1]
