"""Programs of regions: traced with 64-bit types, with no constants left in them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.core import Tracer, eval_jaxpr
from jaxtyping import Array

from .varying import explicit_sharding, unchecked


@contextlib.contextmanager
def inside_region() -> Iterator[None]:
    """The setting in which a region is traced, and in which its rules work."""
    with jax.enable_x64(), unchecked():
        yield


def stage(
    fn: Callable[..., Any], args: Any, may_close: bool
) -> tuple[jex.ClosedJaxpr, list, Any]:
    """Traces `fn` to a jaxpr without constants, and the operands to call it with."""
    leaves, in_tree = jax.tree.flatten(args)
    out_tree = None

    def flat_fn(*leaves: Array) -> list[Array]:
        nonlocal out_tree
        out, out_tree = jax.tree.flatten(fn(*jax.tree.unflatten(in_tree, leaves)))
        return [jnp.asarray(x) for x in out]

    with inside_region():
        leaves = [jnp.asarray(x) for x in leaves]
        closed = jax.make_jaxpr(flat_fn)(*map(struct, leaves))
        hidden = [c for c in closed.consts if isinstance(c, Tracer)]
        if hidden and not may_close:
            raise TypeError(
                "`loss_fn` uses a traced value of the program around it in a place "
                "where it cannot be differentiated, such as the derivative rule of a "
                "derivative rule (`jax.custom_jvp`, `jax.custom_vjp`): "
                f"{hidden[0].aval}. Make it an argument of the function that has the "
                "rule."
            )
        # What `fn` closed over, tracers too, must be visible to the rules below.
        closed, consts = hoist(closed)
    return closed, consts + leaves, out_tree


def hoist(
    closed: jex.ClosedJaxpr, after: int = 0
) -> tuple[jex.ClosedJaxpr, list[Array]]:
    """Makes operands of a program's constants. To be called inside a region.

    Args:
      closed: A program.
      after: How many of its operands stay in front of the constants.

    Returns:
      The program with the constants as operands, and the constants.
    """
    consts = [jnp.asarray(c) for c in closed.consts]
    if not consts:
        return closed, consts
    jaxpr, last = closed.jaxpr, after + len(consts)

    def explicit(*operands: Array) -> list[Array]:
        rest = (*operands[:after], *operands[last:])
        return eval_jaxpr(jaxpr, operands[after:last], *rest)

    types = [struct(v.aval) for v in jaxpr.invars]
    types[after:after] = map(struct, consts)
    hoisted = jax.make_jaxpr(explicit)(*types)
    if hoisted.consts:
        raise AssertionError("hoisted constants reappeared while tracing")
    return hoisted, consts


def restage(fn: Callable[..., Any], avals: Sequence[Any]) -> jex.ClosedJaxpr:
    """Traces a function made from a region's jaxpr: it closes over no arrays."""
    with inside_region():
        return jax.make_jaxpr(fn)(*map(struct, avals))


def as_arrays(operands: Sequence[Any], avals: Sequence[Any] = ()) -> list[Any]:
    """Makes arrays of the literals and NumPy arrays that stand in the place of some.

    Args:
      operands: The operands.
      avals: Their types, where they are known. In a float32 program, JAX may hold a
        NumPy array of float64 and say that it is float32.
    """
    with inside_region():
        dtypes = [a.dtype for a in avals] or [None] * len(operands)
        return [
            x if isinstance(x, jax.Array) else jnp.asarray(x, d)
            for x, d in zip(operands, dtypes, strict=True)
        ]


def struct(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of an array, a tracer or an abstract value, and nothing else."""
    return jax.ShapeDtypeStruct(
        x.shape,
        x.dtype,
        weak_type=getattr(x, "weak_type", False),
        sharding=explicit_sharding(x),
    )
