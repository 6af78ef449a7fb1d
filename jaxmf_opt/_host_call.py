"""Calls from a compiled loop to the host, one a step for a whole batch.

`jax.pure_callback` and `jax.experimental.io_callback` will not do here. Before they
call, they put the operands on a device and wait for it, which hangs when the thread
they wait for is their own (on one core, or with large arrays on a few). They truncate
float64 where the program around is float32. And a loop with an IO effect cannot be
batched. So this is a primitive of its own. It hands NumPy arrays over, calls once for
all lanes of a batch, says which of them are active, and takes back whether each should
stop. A loop whose condition depends on that answer calls in order.

A loop on the host's side is a *run*: opened before the loop, closed behind it. What a
call raises ends its run, and is raised when that is closed: on all devices, since one
that goes on alone would wait for the others in vain.

JAX has no public way to say where a call is made if a program runs on many devices:
`jax._src.callback._callback_op_sharding` says it. `tests/test_host_call.py` fails when
JAX moves it.
"""

import collections
import contextlib
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.extend.core as jex
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jaxtyping import Array, Bool, Int

try:
    from jax._src.callback import _callback_op_sharding
except ImportError:  # a JAX that has moved it: one device only
    _callback_op_sharding = None

# Called with the index of a lane in its batch and with what is known about it.
Listener = Callable[[tuple[int, ...], Sequence[np.ndarray | np.generic]], bool]


@runtime_checkable
class Host(Protocol):
    """Who is called. Hashable: equal hosts share compiled programs."""

    def listen(self) -> Listener:
        """Opens a run, and returns who listens to it."""
        ...


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
      operands: What the listener is told; arrives as NumPy arrays, with all bits.
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


@contextlib.contextmanager
def original_exceptions() -> Iterator[None]:
    """Turns the text that XLA makes of an exception into the exception it was."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        numbers = _NUMBER.findall(str(e))  # the last: the user's text stands before it
        failure = _runs.failure_of(int(numbers[-1])) if numbers else None
        if failure is None:
            raise
        raise failure from None


class _Team:
    """The runs of one solve on all the devices of a `jax.shard_map`.

    When one fails, all must: a device that went on to a collective operation would wait
    for the failed one, and XLA then aborts the process. So each waits for the others
    at its end, until all have closed or one has failed.
    """

    # Seconds without any sign of the others after which a run goes on alone. A device
    # may have taken another branch; and a step, or a Python callback, may take long.
    PATIENCE_BEFORE_OPEN = 2.0
    PATIENCE = 60.0

    def __init__(self, size: int):
        self.size = size
        self.failure: BaseException | None = None
        self._changed = threading.Condition()
        self._threads: set[int] = set()  # one for each device: it will wait in `close`
        self._closed = self._calling = 0
        self._sealed = False

    def join(self) -> bool:
        """Adds a run, unless this device has one here or it is too late."""
        with self._changed:
            thread = threading.get_ident()
            if self.is_closed_to_others or thread in self._threads:
                return False
            self._threads.add(thread)
            self._changed.notify_all()
            return True

    @property
    def is_closed_to_others(self) -> bool:
        return self._sealed or len(self._threads) == self.size

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """While a listener is called, everybody has patience."""
        with self._changed:
            self._calling += 1
        try:
            yield
        finally:
            with self._changed:
                self._calling -= 1
                self._changed.notify_all()

    def fail(self, failure: BaseException) -> None:
        with self._changed:
            self.failure = self.failure or failure
            self._changed.notify_all()

    def close(self) -> None:
        """Waits for the other runs: for their end, or after a failure their start."""
        with self._changed:
            self._closed += 1
            self._changed.notify_all()
            while not self._sealed:
                opened = len(self._threads)
                known = self._closed if self.failure is None else opened
                if known == self.size:
                    break
                patience = self.PATIENCE
                if known == opened:  # all but those that have not come
                    patience = self.PATIENCE_BEFORE_OPEN
                if not self._changed.wait(patience) and not self._calling:
                    break
            self._sealed = True
            self._changed.notify_all()


class _Run:
    """One loop, as the host sees it."""

    def __init__(self, listener: Listener, team: _Team):
        self.team = team
        self._listener = listener

    def tell(
        self, shape: tuple[int, ...], operands: Sequence[np.ndarray], active: np.ndarray
    ) -> np.ndarray:
        """Calls the listener for the active lanes of a batch of this shape."""
        # XLA takes its buffers back after the call; what is kept must not change.
        lanes = [
            np.broadcast_to(x.copy(), shape + x.shape[len(shape) :]) for x in operands
        ]
        stop = np.zeros(shape, bool)
        with self.team.calling():
            for index in np.ndindex(shape):
                if self.team.failure is None and active[index]:
                    try:
                        stop[index] = self._listener(index, [x[index] for x in lanes])
                    except BaseException as e:  # KeyboardInterrupt too
                        self.team.fail(e)
        return stop if self.team.failure is None else np.ones(shape, bool)


class _Runs:
    """All loops that are being run, and how the last ones failed."""

    def __init__(self):
        self._lock = threading.Lock()
        self._numbers = itertools.cycle(range(1, 2**31))
        self._open: dict[int, _Run] = {}
        self._teams: dict[Host, list[_Team]] = {}
        self._failures: collections.OrderedDict[int, BaseException]
        self._failures = collections.OrderedDict()

    def open(self, host: Host, devices: int) -> int:
        run = _Run(host.listen(), self._team(host, devices))
        with self._lock:
            number = next(self._numbers)
            self._open[number] = run
        return number

    def _team(self, host: Host, devices: int) -> _Team:
        with self._lock:
            waiting = self._teams.pop(host, [])
            for team in waiting:
                if team.size == devices and team.join():
                    break
            else:
                team = _Team(devices)
                team.join()
                waiting.append(team)
            waiting = [t for t in waiting if not t.is_closed_to_others]
            if waiting:
                self._teams[host] = waiting
            return team

    def __getitem__(self, number: int) -> _Run:
        return self._open[number]

    def close(self, number: int) -> None:
        """Raises the run's failure. Where many devices share it, each closes it."""
        run = self._open.get(number)
        if run is not None:
            run.team.close()
        with self._lock:
            run = self._open.pop(number, None)
            if run is not None and run.team.failure is not None:
                self._failures[number] = run.team.failure
                if len(self._failures) > 8:
                    self._failures.popitem(last=False)
            failure = self._failures.get(number)
        if failure is not None:
            raise RuntimeError(
                f"`callback` raised {type(failure).__name__}: {failure} [run {number}]"
            ) from failure

    def failure_of(self, number: int) -> BaseException | None:
        with self._lock:
            return self._failures.pop(number, None)


_runs = _Runs()
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
    if _callback_op_sharding is not None and kind is not _close:
        # On one device for all, but under `shard_map` on each for itself. The end is on
        # every device in any case, so that all fail together.
        sharding = _callback_op_sharding(
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
