"""Pickling what holds arrays, so that it arrives as it was.

JAX casts a float64 array to float32 where it is unpickled in a float32 program, and
cannot pickle random keys.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .keys import as_numpy, is_key

_T = TypeVar("_T")


@dataclasses.dataclass
class _Array:
    """A JAX array on its way: its data, and the kind of random keys that it holds."""

    data: np.ndarray
    impl: Any

    def restored(self) -> jax.Array:
        with jax.enable_x64():
            x = jnp.asarray(self.data)
            return (
                x if self.impl is None else jax.random.wrap_key_data(x, impl=self.impl)
            )


def reduced(make: Callable[..., _T], fields: Sequence[Any]) -> tuple[Any, Any]:
    """What `__reduce__` returns for `make(*fields)`.

    Args:
      make: A class, or another callable that can be pickled.
      fields: Its arguments: pytrees.

    Returns:
      A function and its arguments, from which pickle makes the same.
    """
    return _make, (make, jax.tree.map(_packed, tuple(fields)))


def _packed(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    return _Array(as_numpy(x), jax.random.key_impl(x) if is_key(x) else None)


def _make(make: Callable[..., _T], fields: Any) -> _T:
    return make(
        *jax.tree.map(lambda x: x.restored() if isinstance(x, _Array) else x, fields)
    )
