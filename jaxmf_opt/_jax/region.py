"""Float64 regions that every JAX transformation respects.

`with jax.enable_x64()` switches the precision of what is *traced* inside it. JAX runs
most of its rules later, though: `vmap(jit(f))` batches, `grad(jit(f))` differentiates
and `jit(f)` lowers a float64 jaxpr after the context has been left, and those rules
then build float32 constants and int32 indices next to float64 operands.

A region therefore is *one primitive* that holds its float64 program as a jaxpr, and
whose every rule switches the precision on again before it touches that jaxpr. To the
program around it a region is a single opaque operation on arrays.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.interpreters.ad as ad
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.numpy as jnp
from jax.experimental import jet
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jaxtyping import Array

from .compat import expand_jaxpr
from .debugging import alarms, no_alarms
from .host_callback import OriginalExceptions, calls_host
from .lapack import one_by_one, with_fresh_caches
from .loss_callbacks import has_callbacks, with_all_bits
from .region_rule import BatchedRule, Rule
from .staging import as_arrays, inside_region, restage, stage, struct
from .structure import compiled
from .varying import as_operand, check_unsplit, vary_alike, without_axes


def x64_region(
    fn: Callable[..., Any],
    *args: Any,
    may_close: bool = True,
    tangent: Callable[..., Any] | None = None,
) -> Any:
    """Evaluates `fn(*args)` as a float64 region.

    Args:
      fn: A traceable function of pytrees of arrays, which returns a pytree of arrays.
        It may close over arrays and over tracers of the program around it: those
        become operands of the region, so that they are batched and differentiated
        like the arguments.
      *args: Pytrees of arrays or Python scalars. NumPy float64 stays float64.
      may_close: Whether `fn` may close over tracers. Where derivatives are taken with
        respect to known operands only, one that is not among them is refused: its
        part of the derivative would silently be missing.
      tangent: The derivative, in the place of that of `fn`: a hashable function of
        `args`, of `fn(*args)`, and of tangents in the structure of `args`, None where
        they are zero. It returns tangents in the structure of `fn(*args)`, None where
        they are zero, and is a region itself. (A `jax.custom_jvp` would not do: JAX's
        partial evaluation, by which `jax.lax.scan` is differentiated in reverse,
        replaces it by its body and forgets its rule.) With respect to what `fn` closes
        over it is zero. If `tangent` has a method `look`, JAX's alarms are off while
        the region is evaluated eagerly, and `look` is called with what `fn` has
        returned where one is on. If `tangent` has a method `transpose`, it is that of
        `fn` where this is linear: a function of `args`, None in the place of linear
        ones, and of cotangents of what `fn` returns, which returns cotangents of the
        linear ones. (The transpose of the program of `fn` would not have this rule.)

    Returns:
      What `fn(*args)` returns when all of JAX runs with 64-bit types.

    Raises:
      TypeError: If `fn` closes over a tracer and must not.
    """
    jaxpr, operands, out_tree = stage(fn, args, may_close)
    rule = None
    if tangent is not None:
        in_tree = jax.tree.structure(args)
        rule = Rule(tangent, len(operands) - in_tree.num_leaves, in_tree, out_tree)
    return jax.tree.unflatten(out_tree, _bind(*operands, jaxpr=jaxpr, rule=rule))


def _bind(*operands: Any, jaxpr: jex.ClosedJaxpr, rule: Any = None) -> list[Any]:
    return region_p.bind(*vary_alike(operands), jaxpr=jaxpr, rule=rule)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, ad.Zero)


region_p = jex.Primitive("x64_region")
region_p.multiple_results = True


# Eager evaluation, as happens under an eager `vmap` or `grad`. Compiled programs are
# shared between regions of the same structure: the jaxpr is a new object at each call.
@region_p.def_impl
def _impl(
    *args: Any, jaxpr: jex.ClosedJaxpr, rule: Rule | BatchedRule | None
) -> list[Array]:
    look = None if rule is None else rule.look
    if look is None or not alarms():
        return _run(args, jaxpr)
    # JAX would raise its alarm also for what is not known in a solve.
    with no_alarms():
        out = _run(args, jaxpr)
    look(out)
    return out


def _run(args: Sequence[Any], jaxpr: jex.ClosedJaxpr) -> list[Array]:
    with inside_region():
        run = compiled(jaxpr)
        if not calls_host(jaxpr.jaxpr):
            return run(*as_arrays(args, jaxpr.in_avals))
        with OriginalExceptions():
            return jax.block_until_ready(run(*as_arrays(args, jaxpr.in_avals)))


@region_p.def_effectful_abstract_eval
def _abstract_eval(
    *avals: Any, jaxpr: jex.ClosedJaxpr, rule: Any
) -> tuple[list[Any], Any]:
    del rule
    out = jaxpr.out_avals
    return [as_operand(o, avals[0]) if avals else o for o in out], jaxpr.effects


# Lowering rules trace JAX functions of their own (`argmax`, scatters, random numbers):
# without the switch those would be float32 inside a float64 module.
def _lower(ctx: Any, *args: Any, jaxpr: jex.ClosedJaxpr, rule: Any) -> Any:
    del rule
    inner = ctx.replace(
        avals_in=[without_axes(a) for a in ctx.avals_in],
        avals_out=[without_axes(a) for a in ctx.avals_out],
    )
    if ctx.dim_var_values:
        inner = _with_int64_dimensions(inner)
    inner = one_by_one(inner)
    with inside_region():
        if has_callbacks(jaxpr.jaxpr):
            inner = with_all_bits(inner)
        rule = mlir.lower_fun(jex.jaxpr_as_fun(jaxpr), multiple_results=True)
        out = rule(inner, *args)
    if inner.tokens_out is not None:  # of what is ordered, `jax.debug.print` perhaps
        ctx.set_tokens_out(inner.tokens_out)
    return out


def _with_int64_dimensions(ctx: Any) -> Any:
    """For `jax.export` with symbolic shapes: sizes are int32 outside, int64 inside.

    Functions that were lowered outside take int32 sizes, so they are not reused here.
    """
    int64 = ir.RankedTensorType.get((), ir.IntegerType.get_signless(64))
    return ctx.replace(
        module_context=with_fresh_caches(ctx.module_context),
        dim_var_values=[stablehlo.convert(int64, v) for v in ctx.dim_var_values],
    )


mlir.register_lowering(region_p, _lower)


# Some functions of JAX 0.12 (`jnp.interp`, for example) are primitives of a higher
# level, which it expands after all transformations; in a region with the switch on.
def _to_lojax(*args: Any, jaxpr: jex.ClosedJaxpr, rule: Any) -> list[Any]:
    if expand_jaxpr is None:
        raise NotImplementedError(
            "jaxmf_opt does not know how this release of JAX expands the primitives "
            "of a higher level that `loss_fn` uses. Install one that is known to work."
        )
    with inside_region():
        expanded = expand_jaxpr(jaxpr)
    return region_p.bind(*args, jaxpr=expanded, rule=rule)


region_p.to_lojax = _to_lojax


# The tangents are a region of their own, so that a linearisation can keep the primal
# results and postpone (or transpose) the rest.
def _jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    jaxpr: jex.ClosedJaxpr,
    rule: Rule | BatchedRule | None,
) -> tuple[list[Any], list[Any]]:
    primals = as_arrays(primals, jaxpr.in_avals)
    # (A tangent may be a Python number.)
    tangents = [t if _is_zero(t) else as_arrays([t])[0] for t in tangents]
    if rule is not None:
        dots = [None if _is_zero(t) else t for t in tangents]
        out = _bind(*primals, jaxpr=jaxpr, rule=rule)
        dots = rule.jvp(primals, out, dots)
        return out, [
            ad.Zero(jax.typeof(o).to_tangent_aval()) if d is None else d
            for o, d in zip(out, dots, strict=True)
        ]
    fn = jex.jaxpr_as_fun(jaxpr)
    out = _bind(*primals, jaxpr=jaxpr)
    moving = [not _is_zero(t) for t in tangents]
    inexact = [jnp.issubdtype(o.dtype, jnp.inexact) for o in out]

    def tangents_out(*operands: Array) -> list[Array]:
        values, dots = operands[: len(primals)], operands[len(primals) :]
        moved = [x for x, m in zip(values, moving, strict=True) if m]

        def of_moved(*moved: Array) -> list[Array]:
            it = iter(moved)
            full = [next(it) if m else x for x, m in zip(values, moving, strict=True)]
            return [o for o, f in zip(fn(*full), inexact, strict=True) if f]

        # A float32 program may hand over a float32 tangent for a float64 primal.
        cast = [t.astype(x.dtype) for x, t in zip(moved, dots, strict=True)]
        return jax.jvp(of_moved, tuple(moved), tuple(cast))[1]

    operands = [*primals, *(t for t in tangents if not _is_zero(t))]
    linear = restage(tangents_out, [jax.typeof(x) for x in operands])
    it = iter(_bind(*operands, jaxpr=linear))
    return out, [
        next(it) if f else ad.Zero(jax.typeof(o).to_tangent_aval())
        for o, f in zip(out, inexact, strict=True)
    ]


ad.primitive_jvps[region_p] = _jvp


def _transpose(
    cotangents: Sequence[Any], *args: Any, jaxpr: jex.ClosedJaxpr, rule: Any
) -> list[Any]:
    linear = [ad.is_undefined_primal(x) for x in args]
    known = as_arrays([x for x in args if not ad.is_undefined_primal(x)])
    if rule is not None and rule.transposes:
        it = iter(known)
        operands = [None if lin else next(it) for lin in linear]
        cts = [
            ad.instantiate_zeros(ct).astype(a.dtype)
            for ct, a in zip(cotangents, jaxpr.out_avals, strict=True)
        ]
        it = iter(rule.transpose(operands, cts))
        return [next(it) if lin else None for lin in linear]
    # What is linear is its own derivative.
    fn = jex.jaxpr_as_fun(jaxpr)
    unknown = [struct(x.aval) for x in args if ad.is_undefined_primal(x)]
    arriving = [not _is_zero(ct) for ct in cotangents]

    def pull_back(*operands: Array) -> Any:
        values, cts = operands[: len(known)], operands[len(known) :]

        def of_unknown(*unknown: Array) -> list[Array]:
            u, k = iter(unknown), iter(values)
            out = fn(*(next(u) if lin else next(k) for lin in linear))
            return [o for o, a in zip(out, arriving, strict=True) if a]

        outs = jax.eval_shape(of_unknown, *unknown)
        cast = [ct.astype(o.dtype) for o, ct in zip(outs, cts, strict=True)]
        return jax.linear_transpose(of_unknown, *unknown)(cast)

    operands = [*known, *(ct for ct in cotangents if not _is_zero(ct))]
    pulled = restage(pull_back, [jax.typeof(x) for x in operands])
    it = iter(_bind(*operands, jaxpr=pulled))
    return [next(it) if lin else None for lin in linear]


ad.primitive_transposes[region_p] = _transpose


# The whole program is batched at once. (Batching by a generic rule over its equations
# would run outside the 64-bit setting.)
def _batch(
    axis_data: Any,
    args: Sequence[Any],
    dims: Sequence[Any],
    *,
    jaxpr: jex.ClosedJaxpr,
    rule: Rule | BatchedRule | None,
) -> tuple[list[Any], list[Any]]:
    if all(d is None for d in dims):  # as in the primal part of `jacfwd`
        out = _bind(*args, jaxpr=jaxpr, rule=rule)
        return out, [None] * len(out)
    check_unsplit("What is batched by `jax.vmap`", axis_data.explicit_mesh_axis or ())

    def evaluate(*args: Any) -> list[Any]:
        # (Of a function that is made from a jaxpr by `functools.partial`, JAX prints
        # all of that to name it, and needs more time than for the rest.)
        return jex.jaxpr_as_fun(jaxpr)(*args)

    batched = jax.vmap(
        evaluate,
        in_axes=tuple(dims),
        axis_size=axis_data.size,
        axis_name=axis_data.name,
        spmd_axis_name=axis_data.spmd_name,
    )
    args = as_arrays(args, jaxpr.in_avals)
    closed = restage(batched, [jax.typeof(x) for x in args])
    if rule is not None:
        axis = (axis_data.size, axis_data.name, axis_data.spmd_name)
        rule = BatchedRule(rule, tuple(dims), axis)
    out = _bind(*args, jaxpr=closed, rule=rule)
    return out, [0] * len(out)


batching.fancy_primitive_batchers[region_p] = _batch


def _jet(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "jaxmf_opt has no rule for `jax.experimental.jet`. Nest `jax.jvp` or "
        "`jax.jacfwd` for derivatives of higher order."
    )


jet.jet_rules[region_p] = _jet
