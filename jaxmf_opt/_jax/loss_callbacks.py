"""Callbacks inside of a loss, such as `jax.pure_callback`, in a float64 region.

JAX puts the operands of a callback on a device when it is called, on a thread of XLA's
and in the setting of that thread: float64 becomes float32 there, whatever the program
around the call. So here 64-bit operands travel as 32-bit ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.interpreters.mlir as mlir
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.experimental import io_callback

from .lapack import with_fresh_caches


@functools.cache
def _callback_primitives(*, debug: bool) -> frozenset[jex.Primitive]:
    scalar = jax.ShapeDtypeStruct((), jnp.float32)

    def program(x: Any) -> Any:
        if debug:
            jax.debug.callback(lambda x: None, x)
        return io_callback(id, scalar, x), jax.pure_callback(id, scalar, x)

    closed = jax.make_jaxpr(program)(scalar)
    found = {e.primitive for e in closed.eqns if "callback" in e.params}
    return frozenset(found)


def has_callbacks(jaxpr: jex.Jaxpr, *, debug: bool = True) -> bool:
    """Whether a program contains callbacks of the user's, however deep.

    Args:
      jaxpr: The program.
      debug: Whether those of `jax.debug` count, on which no value depends.
    """
    return any(
        eqn.primitive in _callback_primitives(debug=debug)
        or any(has_callbacks(j, debug=debug) for j in jex.jaxprs_in_params(eqn.params))
        for eqn in jaxpr.eqns
    )


def with_all_bits(ctx: Any) -> Any:
    """A context of lowering in which callbacks are called with 64-bit types.

    Args:
      ctx: JAX's `LoweringRuleContext`.

    Returns:
      The same context, with other rules for callbacks.
    """
    module = ctx.module_context
    plain = module.lowering_parameters

    def rule_of(primitive: jex.Primitive) -> Callable[..., Any]:
        def rule(ctx: Any, *operands: Any, callback: Any, **params: Any) -> Any:
            results = params.get("result_avals", ())

            def send(*operands: Any) -> Any:
                coded = _Coded(callback, tuple(ctx.avals_in), tuple(results))
                if results:
                    params["result_avals"] = tuple(map(_code_of, results))
                out = primitive.bind(*map(_encode, operands), callback=coded, **params)
                return [_decode(x, like) for x, like in zip(out, results, strict=True)]

            module = with_fresh_caches(ctx.module_context, lowering_parameters=plain)
            lower = mlir.lower_fun(send, multiple_results=True)
            inner = ctx.replace(module_context=module)
            out = lower(inner, *operands)
            if inner.tokens_out is not None:
                ctx.set_tokens_out(inner.tokens_out)
            return out

        return rule

    rules = tuple((p, rule_of(p)) for p in _callback_primitives(debug=True))
    others = plain.override_lowering_rules or ()
    parameters = dataclasses.replace(plain, override_lowering_rules=(*rules, *others))
    module = with_fresh_caches(module, lowering_parameters=parameters)
    return ctx.replace(module_context=module)


def _is_wide(like: Any) -> bool:
    return jnp.issubdtype(like.dtype, jnp.number) and like.dtype.itemsize >= 8


def _code_of(like: Any) -> Any:
    """The type of the code of a value: 32-bit words along one more axis."""
    if not _is_wide(like):
        return like
    words = like.dtype.itemsize // 4
    return ShapedArray((*like.shape, words), np.dtype(np.uint32))


def _encode(x: Any) -> Any:
    if not _is_wide(x):
        return x
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        parts = jnp.stack([x.real, x.imag], axis=-1)
        return jax.lax.bitcast_convert_type(parts, jnp.uint32).reshape(*x.shape, -1)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _decode(x: Any, like: Any) -> Any:
    if not _is_wide(like):
        return x
    if jnp.issubdtype(like.dtype, jnp.complexfloating):
        words = x.reshape(*like.shape, 2, -1)
        parts = jax.lax.bitcast_convert_type(words, like.dtype.type(0).real.dtype)
        return jax.lax.complex(parts[..., 0], parts[..., 1])
    return jax.lax.bitcast_convert_type(x, like.dtype)


@dataclasses.dataclass(frozen=True)
class _Coded:
    """A callback that takes codes and returns codes.

    Attributes:
      callback: JAX's callback, of flat operands and results.
      operands: The types of its operands.
      results: The types of its results.
    """

    callback: Callable[..., Any]
    operands: tuple[Any, ...]
    results: tuple[Any, ...]

    def __call__(self, *operands: Any) -> Sequence[Any]:
        with jax.enable_x64():
            known = zip(operands, self.operands, strict=True)
            out = self.callback(*(self._decoded(x, like) for x, like in known))
            if not self.results:
                return out
            out = list(map(np.asarray, out))
            return [
                self._coded(x, like) for x, like in zip(out, self.results, strict=True)
            ]

    def _decoded(self, x: Any, like: Any) -> Any:
        if not _is_wide(like):
            return x
        words = np.ascontiguousarray(np.asarray(x))
        return jnp.asarray(words.view(like.dtype).reshape(like.shape))

    def _coded(self, x: np.ndarray, like: Any) -> np.ndarray:
        if not _is_wide(like):
            return x
        if x.dtype != like.dtype or x.shape != like.shape:
            raise RuntimeError(
                f"a callback of `loss_fn` must return an array of shape {like.shape} "
                f"and dtype {like.dtype}, as it said; got {x.shape} and {x.dtype}."
            )
        words = np.ascontiguousarray(x).reshape(-1).view(np.uint32)
        return words.reshape(_code_of(like).shape)
