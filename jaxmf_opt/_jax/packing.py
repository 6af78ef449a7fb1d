"""Pytrees of few arrays: all their scalars are in one.

A compiled program takes microseconds for each array that it returns, which is most of
the time of a small one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scalars", "others"],
    meta_fields=["dtypes", "treedef"],
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """What `pack` makes of a pytree.

    Attributes:
      scalars: Its scalars, as float64 (in which integers up to 2**53 are exact).
      others: Its other leaves.
      dtypes: For each leaf the dtype if it is a scalar, else None.
      treedef: The structure.
    """

    scalars: Float[Array, " n"]
    others: list[Array]
    dtypes: tuple[Any, ...]
    treedef: Any


def pack(tree: PyTree) -> Packed:
    """Packs a pytree of real arrays. To be compiled with 64-bit types."""
    leaves, treedef = jax.tree.flatten(tree)
    scalars = jnp.array([x.astype(jnp.float64) for x in leaves if not x.ndim])
    others = [x for x in leaves if x.ndim]
    dtypes = tuple(None if x.ndim else x.dtype for x in leaves)
    return Packed(scalars, others, dtypes, treedef)


def unpack(packed: Packed) -> PyTree:
    """What was packed."""
    scalars, others = iter(packed.scalars), iter(packed.others)
    leaves = [
        next(others) if dtype is None else next(scalars).astype(dtype)
        for dtype in packed.dtypes
    ]
    return jax.tree.unflatten(packed.treedef, leaves)
