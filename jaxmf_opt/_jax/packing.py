"""Pytrees of few arrays: all their scalars are in one.

A compiled program takes a microsecond for each array that it takes or returns, and for
each node of a pytree: most of the time of a small one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def pack(tree: PyTree) -> tuple[Float[Array, " n"], *tuple[Array, ...]]:
    """Packs a pytree of real arrays. To be compiled with 64-bit types.

    Args:
      tree: The pytree.

    Returns:
      Its scalars, as float64 (in which integers up to 2**53 are exact), and its other
      leaves.
    """
    leaves = jax.tree.leaves(tree)
    scalars = jnp.array([x.astype(jnp.float64) for x in leaves if not x.ndim])
    return scalars, *(x for x in leaves if x.ndim)


def unpack(packed: tuple[Array, ...], like: PyTree) -> PyTree:
    """What was packed.

    Args:
      packed: What `pack` has made of it.
      like: A pytree of the same structure, shapes and dtypes.

    Returns:
      The pytree.
    """
    first, *others = packed
    scalars, arrays = iter(first), iter(others)
    leaves, treedef = jax.tree.flatten(like)
    leaves = [next(arrays) if x.ndim else next(scalars).astype(x.dtype) for x in leaves]
    return jax.tree.unflatten(treedef, leaves)
