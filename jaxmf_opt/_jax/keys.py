"""Random keys as arrays that files and NumPy know."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


def is_key(x: Any) -> bool:
    """Whether something is an array of random keys, or stands for one."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def as_numpy(x: Any) -> np.ndarray:
    """A NumPy array; that of random keys is of their data."""
    return np.asarray(jax.random.key_data(x) if is_key(x) else x)


def data_struct(struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape and dtype of what `as_numpy` makes of an array."""
    return jax.eval_shape(jax.random.key_data, struct) if is_key(struct) else struct


def on_host(x: Any) -> Any:
    """A NumPy array; random keys stay what they are."""
    return x if is_key(x) else np.asarray(x)


def as_key(x: Any, like: Any) -> Any:
    """Makes random keys of their data where keys are wanted; else returns `x`.

    Args:
      x: An array.
      like: The `jax.ShapeDtypeStruct` of what is wanted.
    """
    if getattr(x, "dtype", None) == np.uint32 and is_key(like):
        for impl in _IMPLEMENTATIONS:
            key = jax.eval_shape(functools.partial(jax.random.key, impl=impl), 0)
            if key.dtype == like.dtype:
                return jax.random.wrap_key_data(jnp.asarray(x), impl=impl)
    return x
