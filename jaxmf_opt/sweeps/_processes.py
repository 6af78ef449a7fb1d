"""Which lanes of a sweep are whose, where several processes share a mesh.

Each process solves the lanes of its devices by itself. They meet once, at the end.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import PyTree


def lanes_by_process(mesh: Mesh, count: int) -> list[np.ndarray]:
    """The lanes of each process, by their numbers.

    Args:
      mesh: The devices, in the order in which they take lanes.
      count: How many lanes there are.

    Returns:
      The part of each process; of this one alone if all devices are its own.
    """
    lanes = np.arange(count).reshape(mesh.size, -1)
    owners = np.array([d.process_index for d in mesh.devices.flat])
    if (owners == jax.process_index()).all():
        return [np.arange(count)]
    return [lanes[owners == p].ravel() for p in range(jax.process_count())]


def own_devices(mesh: Mesh) -> list[Any]:
    """The devices of this process, of those of the mesh."""
    mine = jax.process_index()
    return [d for d in mesh.devices.flat if d.process_index == mine]


def gather(tree: PyTree, parts: list[np.ndarray]) -> PyTree:
    """Brings the lanes of all processes together, in their order, in each of them.

    Args:
      tree: NumPy arrays, axis 0 over the lanes of this process.
      parts: The lanes of each.

    Returns:
      Arrays of all lanes.
    """
    if len(parts) == 1:
        return tree
    most = max(map(len, parts))
    count = sum(map(len, parts))

    def whole(x: np.ndarray) -> np.ndarray:
        filled = np.zeros((most, *x.shape[1:]), x.dtype)
        filled[: len(x)] = x
        every = multihost_utils.process_allgather(filled)
        out = np.zeros((count, *x.shape[1:]), x.dtype)
        for lanes, of_process in zip(parts, every, strict=True):
            out[lanes] = of_process[: len(lanes)]
        return out

    return jax.tree.map(whole, tree)
