"""Calls from a compiled loop to the host, one a step for a whole batch.

`jax.pure_callback` and `jax.experimental.io_callback` will not do here. Before they
call, they put the operands on a device and wait for it, which hangs when the thread
they wait for is their own (on one core, or with large arrays on a few). They truncate
float64 where the program around is float32. And a loop with an IO effect cannot be
batched. So this is a primitive of its own. It hands NumPy arrays over, calls once for
all lanes of a batch, says which of them are active, and takes back whether each should
stop. A loop whose condition depends on that answer calls in order.
"""

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jaxtyping import Array, Bool, Int

from .compat import callback_op_sharding
from .host_runs import Host, Runs


def open_run(host: Host) -> Int[Array, ""]:
    """Opens a run, and returns its number, an int32."""
    return _call_p.bind(host=host, kind=_open)


def call(
    host: Host, run: Int[Array, ""], operands: Sequence[Array], active: Bool[Array, ""]
) -> Bool[Array, ""]:
    """Calls the run's listener for each active lane.

    Args:
      host: Who opened the run.
      run: Its number.
      operands: The listener's arguments; they arrive as NumPy arrays, with all bits.
      active: Whether this lane takes part.

    Returns:
      Whether the lane should stop.
    """
    operands = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in operands
    ]
    return _call_p.bind(run, *operands, active, host=host, kind=_tell)


def close_run(host: Host, run: Int[Array, ""], last: Array) -> Bool[Array, ""]:
    """Closes a run, raises what its listener has raised, and returns True.

    Args:
      host: Who opened the run.
      run: Its number.
      last: A boolean scalar that is known when the run is over.

    Returns:
      True for each lane. (Use it, or JAX drops the call.)
    """
    return _call_p.bind(run, last, host=host, kind=_close)


def calls_host(jaxpr: jex.Jaxpr) -> bool:
    """Whether a program contains calls to the host, however deep."""
    return any(
        eqn.primitive is _call_p
        or any(map(calls_host, jex.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


class OriginalExceptions(contextlib.AbstractContextManager[None]):
    """Turns the text that XLA makes of an exception into the exception it was.

    (Not written as a generator: that cannot raise `StopIteration`.)
    """

    def __exit__(self, kind: Any, e: BaseException | None, traceback: Any) -> None:
        if not isinstance(e, jax.errors.JaxRuntimeError):
            return
        numbers = _NUMBER.findall(str(e))  # the last: the user's text stands before it
        failure = _runs.failure_of(int(numbers[-1])) if numbers else None
        if failure is not None:
            raise failure from None


_runs = Runs()
_NUMBER = re.compile(r"\[run (\d+)\]")


def _open(host: Host, shape: tuple[int, ...], devices: int) -> np.ndarray:
    del shape
    return np.asarray(_runs.open(host, devices), np.int32)


def _tell(
    host: Host,
    shape: tuple[int, ...],
    devices: int,
    run: np.ndarray,
    *operands: np.ndarray,
) -> np.ndarray:
    del host, devices
    return _runs[run.item()].tell(shape, operands[:-1], operands[-1])


def _close(
    host: Host, shape: tuple[int, ...], devices: int, run: np.ndarray, last: np.ndarray
) -> np.ndarray:
    del host, devices, last
    _runs.close(run.item())
    return np.ones(shape, bool)


_call_p = jex.Primitive("call_host")


@_call_p.def_impl
def _impl(*operands: Any, **params: Any) -> Any:
    with jax.disable_jit(False):
        return jax.jit(lambda *operands: _call_p.bind(*operands, **params))(*operands)


@_call_p.def_abstract_eval
def _abstract_eval(*avals: Any, kind: Any, **_: Any) -> Any:
    if kind is _open:
        return ShapedArray((), np.dtype(np.int32))
    return avals[-1].update(dtype=np.dtype(bool))


def _lower(ctx: Any, *operands: Any, host: Host, kind: Any) -> Any:
    shape = ctx.avals_out[0].shape
    # Under `shard_map` each device has a run of its own; else there is one for all.
    mesh = getattr(ctx.module_context.axis_context, "mesh", None)
    devices = 1 if mesh is None else mesh.size

    def on_host(*raw: Any) -> tuple[np.ndarray]:
        return (kind(host, shape, devices, *map(np.asarray, raw)),)

    sharding = None
    if callback_op_sharding is not None and kind is not _close:
        # On one device for all, but under `shard_map` on each for itself. The end is on
        # every device in any case, so that all fail together.
        sharding = callback_op_sharding(
            ctx.module_context.axis_context, None, ctx.avals_out
        )
    out, _, _ = mlir.emit_python_callback(
        ctx,
        on_host,
        None,
        list(operands),
        ctx.avals_in,
        ctx.avals_out,
        has_side_effect=kind is not _close,
        returns_token=False,
        sharding=sharding,
    )
    return out


mlir.register_lowering(_call_p, _lower)


# The last operand has a value for each lane; of the others, what is the same for all
# stays one.
def _batch(
    axis_data: Any, operands: Sequence[Any], dims: Sequence[int | None], **params: Any
) -> tuple[Any, int | None]:
    if all(d is None for d in dims):
        return _call_p.bind(*operands, **params), None

    def to_front(x: Any, dim: int | None) -> Any:
        return x[None] if dim is None else jnp.moveaxis(x, dim, 0)

    *others, last = map(to_front, map(jnp.asarray, operands), dims)
    last = jnp.broadcast_to(last, (axis_data.size, *last.shape[1:]))
    return _call_p.bind(*others, last, **params), 0


batching.fancy_primitive_batchers[_call_p] = _batch
