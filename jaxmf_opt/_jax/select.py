"""A select that exists in batches only.

In a batch, lanes that have stopped must be masked. Outside of one there is nothing to
mask, and a select would only change how XLA fuses the program, and so its last bits.
(`jax.custom_batching.custom_vmap` cannot say this of a function that is to be
differentiated in reverse, as a zoom line search does with the loss.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.interpreters.ad as ad
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Bool, PyTree


def select(pred: Bool[Array, ""], true: PyTree, false: PyTree) -> PyTree:
    """`jax.lax.select` between two pytrees of arrays of the same types."""
    return jax.tree.map(lambda t, f: jax.lax.select(pred, t, f), true, false)


def select_if_batched(pred: Bool[Array, ""], true: PyTree, false: PyTree) -> PyTree:
    """`select` where `jax.vmap` has batched `pred`, elsewhere simply `true`."""
    return jax.tree.map(lambda t, f: _select_p.bind(pred, t, f), true, false)


def cond(
    pred: Bool[Array, ""], true_fn: Callable[[], PyTree], false_fn: Callable[[], PyTree]
) -> PyTree:
    """`jax.lax.cond`; under an explicit mesh both are run, as in a batch.

    There `jax.vmap` cannot batch a `cond` that closes over an array that is split.
    """
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return select(pred, true_fn(), false_fn())
    return jax.lax.cond(pred, true_fn, false_fn)


_select_p = jex.Primitive("select_if_batched")


@_select_p.def_impl
def _take_true(pred: Any, true: Any, false: Any) -> Any:
    del pred, false
    return jnp.asarray(true)


_select_p.def_abstract_eval(lambda pred, true, false: true)
mlir.register_lowering(_select_p, mlir.lower_fun(_take_true, multiple_results=False))


def _batch(
    size: Any,  # of `jax.export`: perhaps symbolic
    axis_name: Any,
    trace: Any,
    operands: Sequence[Any],
    dims: Sequence[int | None],
) -> tuple[Array, int | None]:
    del axis_name, trace
    if all(d is None for d in dims):
        return _select_p.bind(*operands), None
    pred, true, false = map(jnp.asarray, operands)  # literals come as numbers
    axes = tuple(dims)
    if dims[0] is not None:
        return jax.vmap(jax.lax.select, axes, axis_size=size)(pred, true, false), 0
    both = jax.vmap(lambda t, f: (t, f), axes[1:], axis_size=size)(true, false)
    return _select_p.bind(pred, *both), 0


batching.axis_primitive_batchers[_select_p] = _batch


# It is linear in the two values.
def _jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    pred, true, false = primals
    out = _select_p.bind(pred, true, false)
    if all(isinstance(t, ad.Zero) for t in tangents[1:]):
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    return out, _select_p.bind(pred, *map(ad.instantiate_zeros, tangents[1:]))


ad.primitive_jvps[_select_p] = _jvp


def _transpose(cotangent: Any, pred: Any, true: Any, false: Any) -> list[Any]:
    unknown = [ad.is_undefined_primal(x) for x in (true, false)]
    if isinstance(cotangent, ad.Zero):
        aval = cotangent.aval
        return [None, *(ad.Zero(aval) if u else None for u in unknown)]
    zero = jnp.zeros_like(cotangent)
    parts = ((cotangent, zero), (zero, cotangent))
    return [
        None,
        *(
            _select_p.bind(pred, *part) if u else None
            for part, u in zip(parts, unknown, strict=True)
        ),
    ]


ad.primitive_transposes[_select_p] = _transpose
