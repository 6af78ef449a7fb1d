"""The lanes of a sweep: pytrees of which some leaves have an axis over lanes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from .._jax.keys import is_key, on_host


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Arguments for many solves, on the host.

    Attributes:
      count: How many lanes there are.
      mapped: For each argument, the leaves that differ between lanes, axis 0 over the
        lanes; None in the places of the others.
      shared: Likewise the others.
    """

    count: int
    mapped: tuple[PyTree, ...]
    shared: tuple[PyTree, ...]

    def take(self, lanes: Int[np.ndarray, "*lanes"]) -> tuple[PyTree, ...]:
        """The mapped leaves of some lanes."""
        return jax.tree.map(lambda x: x[lanes], self.mapped)

    def first(self, number: int) -> PyTree:
        """All leaves of an argument for the first lane."""
        return self.argument(number, self.take(np.array(0))[number])

    def with_state(self, state: PyTree) -> "Lanes":
        """The same with one more argument, every array of which has its lanes in front.

        Args:
          state: A state of each lane, or None.
        """
        mapped = jax.tree.map(on_host, state)
        shared = jax.tree.map(lambda _: None, state)
        return Lanes(self.count, (*self.mapped, mapped), (*self.shared, shared))

    def argument(self, number: int, mapped: PyTree) -> PyTree:
        """All leaves of an argument for one lane, given the mapped ones."""
        return jax.tree.map(
            lambda m, s: s if m is None else m,
            mapped,
            self.shared[number],
            is_leaf=lambda x: x is None,
        )


def lanes_of(arguments: Sequence[tuple[str, PyTree]], in_axes: Sequence[Any]) -> Lanes:
    """Splits arguments into lanes.

    Args:
      arguments: Their names, and what they are.
      in_axes: For each argument, as in `jax.vmap`: an int or None, or a pytree of them
        whose structure is a prefix of the argument's.

    Returns:
      The lanes; `mapped` and `shared` are tuples, of an element for each argument.

    Raises:
      TypeError: If an axis is no int.
      ValueError: If an axis does not exist, no leaf is mapped, or leaves disagree about
        the number of lanes, or there are none.
    """
    names = ", ".join(f"`{name}`" for name, _ in arguments)
    mapped, shared, sizes = [], [], {}
    for (name, tree), axes in zip(arguments, in_axes, strict=True):
        every = axis_of_each_leaf(name, tree, axes)
        paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        with_lanes, without = [], []
        for (path, leaf), axis in zip(paths, every, strict=True):
            if axis is None:
                with_lanes.append(None)
                without.append(leaf)
                continue
            where = f"`{name}{jax.tree_util.keystr(path)}`"
            leaf = _lanes_in_front(where, leaf, axis)
            sizes[where] = leaf.shape[0]
            with_lanes.append(leaf)
            without.append(None)
        mapped.append(jax.tree.unflatten(treedef, with_lanes))
        shared.append(jax.tree.unflatten(treedef, without))
    if not sizes:
        raise ValueError(
            f"`in_axes` must map an array of {names}, or there are no lanes; got "
            f"{in_axes!r}."
        )
    if len(set(sizes.values())) > 1:
        raise ValueError(
            "all mapped arrays must have the same number of lanes, got "
            + ", ".join(f"{n} in {where}" for where, n in sizes.items())
            + ". Make the grid of all combinations with `jnp.meshgrid`, for example."
        )
    count = next(iter(sizes.values()))
    if not count:
        raise ValueError(
            f"a sweep must have at least one lane, got none: {next(iter(sizes))} has "
            "0 elements along its mapped axis."
        )
    return Lanes(count, tuple(mapped), tuple(shared))


def as_pair(in_axes: Any) -> tuple[Any, Any]:
    """The axes of parameters and hyperparameters; one may stand for both."""
    if isinstance(in_axes, int) or in_axes is None:
        return (in_axes, in_axes)
    if isinstance(in_axes, (tuple, list)) and len(in_axes) == 2:
        return tuple(in_axes)
    raise TypeError(
        "`in_axes` must be a pair, of an entry for `params` and one for "
        f"`hyperparams`, got {in_axes!r}."
    )


def axis_of_each_leaf(name: str, tree: PyTree, axes: Any) -> list[Any]:
    """The axis over lanes of each leaf, or None; raises as `lanes_of` does."""
    every: list[Any] = []

    def note(axis: Any, part: PyTree) -> None:
        every.extend([axis] * len(jax.tree.leaves(part)))

    try:
        jax.tree.map(note, axes, tree, is_leaf=lambda x: x is None)
    except (ValueError, TypeError) as e:
        raise ValueError(
            f"`in_axes` must have the structure of `{name}`, or of a part of it from "
            f"the top; got {axes!r} for {jax.tree.structure(tree)}."
        ) from e
    return every


def _lanes_in_front(where: str, leaf: Any, axis: Any) -> Any:
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(
            f"`in_axes` must be made of ints and None, got {axis!r} for {where}."
        )
    if not isinstance(leaf, (jax.Array, np.ndarray)):
        raise ValueError(
            f"{where} must be an array to be mapped, got {leaf!r} of type "
            f"{type(leaf).__name__}. Make an array of what differs between lanes, or "
            "map None there in `in_axes`."
        )
    is_number = jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == jnp.bool_
    if not (is_number or is_key(leaf)):
        raise TypeError(
            f"{where} must hold numbers to be mapped, got an array of dtype "
            f"{leaf.dtype}. What is no number cannot differ between lanes."
        )
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(
            f"{where} must have the axis {axis} that `in_axes` maps, got an array of "
            f"shape {leaf.shape}."
        )
    if is_key(leaf):  # random keys
        return jnp.moveaxis(leaf, int(axis), 0)
    return np.moveaxis(np.asarray(leaf), int(axis), 0)
