"""Varying manual axes, and arrays under a mesh.

Inside `jax.shard_map`, JAX tracks in the type of each value over which mesh axes it
varies, and checks (`check_vma=True`, the default) that types agree. optax's loops do
not pass: they start from constants, which vary over nothing, and end with values that
vary. A region need not be checked inside, because from outside it is one operation
whose operands and results vary over the same axes; but JAX has no public switch for the
check other than `shard_map`'s own: see `compat.py`.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.sharding import AxisType
from jaxtyping import PyTree

from .compat import check_vma, disable_bwd_checks


def unchecked() -> contextlib.AbstractContextManager[Any]:
    """Switches the check off, for what is traced inside."""
    no_check = contextlib.nullcontext() if check_vma is None else check_vma(False)
    manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    if disable_bwd_checks is None or not manual:
        return no_check
    # The rule of a `jax.custom_vjp` is held to types that are no longer tracked.
    stack = contextlib.ExitStack()
    stack.enter_context(no_check)
    stack.enter_context(disable_bwd_checks(True))
    return stack


def _varying(x: Any) -> frozenset[Any]:
    return jax.typeof(x).mat.varying


def vary_alike(operands: Sequence[Any]) -> list[Any]:
    """Makes all operands vary over every axis that any of them varies over.

    The transpose of this is the sum over the axes that were added, so that cotangents
    of operands that are the same on all devices come out right.
    """
    if check_vma is None or not check_vma.value:
        return list(operands)
    axes = frozenset[Any]().union(*map(_varying, operands))

    def widen(x: Any) -> Any:
        missing = tuple(axes - _varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return [widen(x) for x in operands]


def as_operand(aval: Any, operand: Any) -> Any:
    """A result's type, varying over the axes that an operand's type varies over."""
    if check_vma is None or not check_vma.value:
        return aval
    if operand.mat.empty:
        return aval
    unsplit = jax.P(*(None for _ in aval.shape))
    sharding = jax.NamedSharding(operand.sharding.mesh, unsplit)
    return aval.update(sharding=sharding, manual_axis_type=operand.mat)


def without_axes(aval: Any) -> Any:
    """A type that varies over nothing."""
    sharding = explicit_sharding(aval)
    return ShapedArray(
        aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=sharding
    )


def explicit_sharding(x: Any) -> jax.NamedSharding | None:
    """How the type of a value says that it is split over explicit axes of a mesh.

    Under an explicit mesh all types name that mesh, those of what is made in a program
    too. What was made before it, or is no array yet, is the same on all its devices.
    """
    sharding = getattr(
        jax.typeof(x) if isinstance(x, jax.Array) else x, "sharding", None
    )
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty:
        mesh = jax.sharding.get_abstract_mesh()
        sharding = jax.NamedSharding(mesh, jax.P(*(None for _ in x.shape)))
    return sharding if AxisType.Explicit in mesh.axis_types else None


def check_unsplit(what: str, axes: Sequence[Any]) -> None:
    """Refuses what is split over explicit axes, where optax and JAX's loops fail.

    Args:
      what: What it is, for the message.
      axes: The axes over which it is split; a None among them is no axis.

    Raises:
      ValueError: If there are any.
    """
    names = [axis for axis in axes if axis is not None]
    if names:
        raise ValueError(
            f"{what} must not be split over explicit axes of a mesh, got {names}. Put "
            "the call into `jax.sharding.auto_axes(fn, out_sharding=...)`, make the "
            "mesh with `axis_types=(jax.sharding.AxisType.Auto,)`, or use "
            "`jax.shard_map`."
        )


def on_mesh(arrays: PyTree) -> PyTree:
    """The arrays; those from outside an explicit mesh as the same on all its devices.

    A loop over one of them would else end with a value of another type.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return arrays

    def placed(x: Any) -> Any:
        is_outside = isinstance(x, jax.Array) and jax.typeof(x).sharding.mesh.empty
        return jax.sharding.reshard(x, explicit_sharding(x)) if is_outside else x

    return jax.tree.map(placed, arrays)
