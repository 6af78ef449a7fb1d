"""Batched linear algebra on the CPU that cannot wait for ever.

In jaxlib 0.10 and 0.11 a batched LAPACK kernel (a `vmap` of `cholesky`, `solve`, `inv`,
`qr`) hands parts of its batch to XLA's thread pool, and waits for them. It waits on a
thread of that pool. Once as many kernels wait as there are threads, in one program or
in several, nobody is left to do the work. (jaxlib 0.12 does without the threads again.)
A kernel for a single matrix hands over nothing, so in the programs of this library a
batch becomes a loop over its matrices.

That is done when a program is lowered, behind `vmap` and all derivatives, to whatever
JAX and lineax have made of the linear algebra until then. JAX has no public way to
lower a primitive differently in one program; `override_lowering_rules` of the lowering
parameters is that way. `tests/_jax/test_lapack.py` fails when JAX moves it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.interpreters.mlir as mlir

from .compat import LAPACK_CAN_HANG

# The number of dimensions of each operand of a primitive, without those of the batch.
_RANKS = {
    "cholesky": (2,),
    "eig": (2,),
    "eigh": (2,),
    "hessenberg": (2,),
    "householder_product": (2, 1),
    "lu": (2,),
    "ormqr": (2, 1, 2),
    "qr": (2,),
    "schur": (2,),
    "svd": (2,),
    "triangular_solve": (2, 2),
    "tridiagonal": (2,),
    "tridiagonal_solve": (1, 1, 1, 2),
}

# A batch of less work, in floating-point operations, is not divided among threads; of
# matrices of size n, no kernel counts more than this times n^3.
_SMALL = 200_000
_MOST_PER_CUBE = 30


def uses_lapack(jaxpr: jex.Jaxpr) -> bool:
    """Whether a program contains linear algebra, however deep."""
    return any(
        eqn.primitive.name in _RANKS
        or any(map(uses_lapack, jex.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def evaluate_one_by_one(closed: jex.ClosedJaxpr) -> Callable[..., list[Any]]:
    """A function that evaluates a program, compiled without batched LAPACK kernels.

    Args:
      closed: A program, behind all derivatives and batching: the function cannot be
        transformed any more.

    Returns:
      The function, of the operands of the program, to be compiled.
    """
    return lambda *operands: _evaluate_p.bind(*operands, jaxpr=closed)


def compile_one_by_one(fn: Callable[..., Any]) -> jax.stages.Wrapped:
    """`jax.jit` of a function, without batched LAPACK kernels."""

    def run(*args: Any) -> Any:
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
        leaves = _evaluate_p.bind(*jax.tree.leaves(args), jaxpr=closed)
        return jax.tree.unflatten(jax.tree.structure(out), leaves)

    return jax.jit(functools.wraps(fn)(run))


def one_by_one(ctx: Any) -> Any:
    """The context of a lowering rule, for a program without batched LAPACK kernels."""
    module = ctx.module_context
    if not LAPACK_CAN_HANG or "cpu" not in module.platforms:
        return ctx
    rules = module.lowering_parameters.override_lowering_rules or ()
    if any(rule in rules for rule in _RULES):
        return ctx
    return _with_rules(ctx, (*_RULES, *rules))


def with_fresh_caches(module: Any, **changes: Any) -> Any:
    """A module's context in which nothing counts as lowered already."""
    names = (
        "cached_primitive_lowerings",
        "lowering_cache",
        "cached_call_jaxpr_lowerings",
    )
    fresh = {name: {} for name in names if hasattr(module, name)}
    return module.replace(**fresh, **changes)


def _with_rules(ctx: Any, rules: Sequence[Any]) -> Any:
    module = ctx.module_context
    parameters = dataclasses.replace(
        module.lowering_parameters, override_lowering_rules=tuple(rules) or None
    )
    module = with_fresh_caches(module, lowering_parameters=parameters)
    return ctx.replace(module_context=module)


def _rule(primitive: jex.Primitive, ranks: tuple[int, ...]) -> Callable[..., Any]:
    def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
        def all_at_once(*operands: Any) -> Any:
            return primitive.bind(*operands, **params)

        def in_turn(*operands: Any) -> Any:
            flat = [
                x.reshape(-1, *x.shape[x.ndim - rank :])
                for x, rank in zip(operands, ranks, strict=True)
            ]
            out = jax.lax.map(lambda x: all_at_once(*x), flat)
            unflat = lambda x: x.reshape(*batch, *x.shape[1:])  # noqa: E731
            return jax.tree.map(unflat, out)

        first = ctx.avals_in[0]
        batch = first.shape[: first.ndim - ranks[0]]
        size = max(
            (n for a, r in zip(ctx.avals_in, ranks, strict=True) for n in a.shape[-r:]),
            default=0,
        )
        work = math.prod(batch) * _MOST_PER_CUBE * size**3
        # (In a program to be exported the work need not be known.)
        if batch and (jax.export.is_symbolic_dim(work) or work >= _SMALL):
            return mlir.lower_fun(in_turn, primitive.multiple_results)(ctx, *operands)
        rules = ctx.module_context.lowering_parameters.override_lowering_rules
        others = [rule for rule in rules if rule[0] is not primitive]
        ctx = _with_rules(ctx, others)
        return mlir.lower_fun(all_at_once, primitive.multiple_results)(ctx, *operands)

    return lower


def _rules() -> list[tuple[jex.Primitive, Callable[..., Any]]]:
    linalg = jax.lax.linalg
    primitives = {name: getattr(linalg, f"{name}_p", None) for name in _RANKS}
    return [(p, _rule(p, _RANKS[name])) for name, p in primitives.items() if p]


_RULES = _rules()

_evaluate_p = jex.Primitive("evaluate_one_by_one")
_evaluate_p.multiple_results = True


@_evaluate_p.def_impl
def _impl(*operands: Any, jaxpr: jex.ClosedJaxpr) -> list[Any]:  # under `disable_jit`
    return jex.jaxpr_as_fun(jaxpr)(*operands)


@_evaluate_p.def_effectful_abstract_eval
def _abstract_eval(*avals: Any, jaxpr: jex.ClosedJaxpr) -> tuple[list[Any], Any]:
    del avals
    return list(jaxpr.out_avals), jaxpr.effects


def _lower(ctx: Any, *operands: Any, jaxpr: jex.ClosedJaxpr) -> Any:
    rule = mlir.lower_fun(jex.jaxpr_as_fun(jaxpr), multiple_results=True)
    return rule(one_by_one(ctx), *operands)


mlir.register_lowering(_evaluate_p, _lower)
