"""Functions that run with 64-bit types, whatever the setting around them."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .region import x64_region
from .varying import explicit_sharding

_P = ParamSpec("_P")
_R = TypeVar("_R")


def jax_enable_x64(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a function run with 64-bit JAX types, whatever the setting around it.

    In ordinary Python the setting is switched on for the duration of each call, in the
    calling thread only, and restored when the call returns or raises. Arguments and
    results may be anything; they are handed on untouched.

    In a program that JAX traces, the call is a float64 region, which any transformation
    may be applied to. Arguments and results may then be anything that is not an array,
    pytrees of arrays, or both. Arrays that `fn` returns keep their 64-bit dtypes: cast
    them inside of `fn` if the program around it is to compute with them.

    Args:
      fn: Any Python callable.

    Returns:
      A function with the signature, name and docstring of `fn`.

    Raises:
      TypeError: If `fn` is not callable.

    Example:
      >>> import jax.numpy as jnp
      >>> @jax_enable_x64
      ... def third(x):
      ...     return jnp.asarray(x, float) / 3
      >>> third(1.0)
      Array(0.33333333, dtype=float64)
    """
    if not callable(fn):
        raise TypeError(f"jax_enable_x64: `fn` must be callable, got {fn!r}.")

    @functools.wraps(fn)
    def in_x64(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if is_traced(args, kwargs):
            return _call_in_region(fn, args, kwargs)
        with jax.enable_x64():
            return fn(*args, **kwargs)

    return in_x64


def is_traced(*trees: Any) -> bool:
    """Whether a call with these arguments is part of the tracing of a program."""
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(trees)):
        return True
    # As every new array under `jit`. (To make this one, nothing is sent to a device.)
    return isinstance(jax.lax.iota("int32", 1), Tracer)


def float64_struct(x: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array or a number, and float64."""
    x = x if hasattr(x, "shape") else np.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, "float64", sharding=explicit_sharding(x))


def caller_dtype(x: Any, *, in_program: bool) -> Any:
    """The dtype that a result gets for an argument `x`, in the caller's setting."""
    dtype = getattr(x, "dtype", None)
    if dtype is None:  # a Python number: the float that JAX makes of one outside
        return jnp.result_type(float)
    # A NumPy float64 array stays what it is, but does not enter a float32 program.
    return jax.dtypes.canonicalize_dtype(dtype) if in_program else dtype


def _call_in_region(fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`fn(*args, **kwargs)` as a region; what is not an array passes it by."""
    arrays, others = eqx.partition((args, kwargs), eqx.is_array)
    static_out = None

    def of_arrays(arrays: Any) -> Any:
        nonlocal static_out
        args, kwargs = eqx.combine(arrays, others)
        out, static_out = eqx.partition(fn(*args, **kwargs), eqx.is_array)
        return out

    return eqx.combine(x64_region(of_arrays, arrays), static_out)
