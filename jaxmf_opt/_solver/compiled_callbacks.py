"""How a callback takes part in a compiled solve.

Traced callbacks are programs of their own, like the loss. All others are called on the
host, once a step for a whole batch.
"""

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar
from optimistix import RESULTS

from .._jax.host_callback import call, close_run, open_run
from .._jax.host_runs import Listener
from .._jax.staging import hoist, inside_region, struct
from .._jax.structure import Structure
from .._typing import Aux, Y
from ..callbacks._args import (
    CallbackArgs,
    CallbackFnType,
    Lane,
    combine,
    flatten_callbacks,
    traced,
)
from .minimiser import LeanOptaxMinimiser
from .state import MinimiserState, SolverState


def callback_args(state: SolverState, step: Any) -> CallbackArgs:
    """The arguments of a callback after the step that has led to a state.

    Args:
      state: The state after the step.
      step: The number of the step.

    Returns:
      The information.
    """
    of = state.minimiser
    fields = (step, of.loss, of.grad, state.params, of.opt_state)
    return CallbackArgs.tree_unflatten(None, fields)


class HostCallbacks:
    """Callbacks that stay in Python. Equal where they are the same objects.

    Attributes:
      callbacks: Called in this order.
      treedef: The structure of the `SolverState` that is sent to the host.
    """

    def __init__(self, callbacks: Sequence[CallbackFnType], treedef: Any):
        self.callbacks = tuple(callbacks)
        self.treedef = treedef
        self._key = (tuple(map(_identity, self.callbacks)), treedef)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostCallbacks) and self._key == other._key

    def listen(self) -> Listener:
        """Who listens to one run of a solve."""
        lanes: dict[tuple[int, ...], Lane] = {}
        callback = combine(*self.callbacks)

        def listener(
            index: tuple[int, ...], leaves: Sequence[np.ndarray | np.generic]
        ) -> bool:
            state: SolverState = jax.tree.unflatten(self.treedef, leaves)
            info = callback_args(state, int(state.minimiser.step) - 1)
            lane = lanes.setdefault(index, Lane(index))
            with jax.enable_x64():  # a setting of each thread
                return callback(info.bind(lane, lambda: state))

        return listener


def _identity(callback: CallbackFnType) -> Hashable:
    if inspect.ismethod(callback):  # a new object each time that it is looked up
        return id(callback.__self__), callback.__func__
    return id(callback)


class CompiledCallbacks(NamedTuple):
    """Callbacks as a part of a compiled solve. Hashable.

    Attributes:
      programs: The traced ones, each a program `(*captured, *leaves of info) -> [stop]`
        and the number of arrays that it captures.
      host: The others, if there are any.
    """

    programs: tuple[tuple[Structure, int], ...]
    host: HostCallbacks | None

    def stop(
        self,
        run: Int[Array, ""] | None,
        captured: Sequence[Array],
        state: SolverState,
        active: Bool[Array, ""],
    ) -> Bool[Array, ""]:
        """Whether to stop after the step that led to this state."""
        info = callback_args(state, state.minimiser.step - 1)
        leaves, stop, rest = jax.tree.leaves(info), jnp.array(False), list(captured)
        for program, count in self.programs:
            mine, rest = rest[:count], rest[count:]
            # (Outside of a batch it is not called without a step, if it has effects.)
            stop = (
                stop
                | jax.lax.cond(
                    active,
                    jex.jaxpr_as_fun(program.jaxpr),
                    lambda *_: [jnp.array(False)],
                    *(*mine, *leaves),
                )[0]
            )
        if self.host is not None:
            assert run is not None
            stop = stop | call(self.host, run, jax.tree.leaves(state), active)
        return stop


def compile_callbacks(
    callback: CallbackFnType | None, state: SolverState
) -> tuple[CompiledCallbacks, list[Array]]:
    """Makes a callback ready to be compiled.

    Args:
      callback: A callback of any kind.
      state: The `jax.ShapeDtypeStruct`s of the solver's state.

    Returns:
      The callback, and the arrays that traced callbacks close over.

    Raises:
      TypeError: If a traced callback returns what is no boolean.
      ValueError: If it returns an array that is no scalar.
    """
    callbacks = flatten_callbacks(callback)
    programs: list[tuple[Structure, int]] = []
    captured: list[Array] = []
    with inside_region():
        info = callback_args(state, state.minimiser.step)
        leaves, treedef = jax.tree.flatten(info)
        for fn in callbacks:
            if isinstance(fn, traced):
                closed = jax.make_jaxpr(_checked(fn, treedef))(*map(struct, leaves))
                closed, consts = hoist(closed)
                programs.append((Structure(closed), len(consts)))
                captured += consts
    on_host = [fn for fn in callbacks if not isinstance(fn, traced)]
    host = HostCallbacks(on_host, jax.tree.structure(state)) if on_host else None
    return CompiledCallbacks(tuple(programs), host), captured


def _checked(fn: traced, treedef: Any) -> Callable[..., Bool[Array, ""]]:
    def stop(*leaves: Array) -> Bool[Array, ""]:
        out = fn(jax.tree.unflatten(treedef, leaves))
        if out is None:
            return jnp.array(False)
        dtype = getattr(out, "dtype", None)
        if not isinstance(out, bool) and dtype != jnp.bool_:
            got = f"an array of dtype {dtype}" if dtype else repr(out)
            raise TypeError(
                "a traced `callback` must return None or a boolean scalar, got "
                f"{got}. Compare it, or call `bool` in a callback that is not traced."
            )
        if jnp.shape(out) != ():
            raise ValueError(
                "a traced `callback` must return None or a boolean scalar, got an "
                f"array of shape {jnp.shape(out)}. Reduce it, with `jnp.all` or "
                "`jnp.any` for example."
            )
        return jnp.asarray(out)

    return stop


class MinimiserWithCallbacks(optx.AbstractMinimiser[Y, Aux, MinimiserState[Y, Aux]]):
    """A minimiser that calls back after each step, and stops when asked to.

    Attributes:
      rtol, atol, norm: Those of the minimiser.
      minimiser: Takes the steps.
      callbacks: What is called.
      run: The run of host callbacks, if there are any.
      captured: The arrays that traced callbacks close over.
    """

    rtol: float
    atol: float
    norm: Callable[[PyTree], Scalar] = eqx.field(static=True)
    minimiser: LeanOptaxMinimiser[Y, Aux]
    callbacks: CompiledCallbacks = eqx.field(static=True)
    run: Int[Array, ""] | None
    captured: Sequence[Array]

    def __init__(
        self,
        minimiser: LeanOptaxMinimiser[Y, Aux],
        callbacks: CompiledCallbacks,
        captured: Sequence[Array],
    ):
        """Opens the run: each solve needs a minimiser of its own.

        Args:
          minimiser: Takes the steps.
          callbacks: What is called after them.
          captured: The arrays that traced callbacks close over.
        """
        self.rtol, self.atol = minimiser.rtol, minimiser.atol
        self.norm = minimiser.norm
        self.minimiser = minimiser
        self.callbacks = callbacks
        self.run = None if callbacks.host is None else open_run(callbacks.host)
        self.captured = captured

    def init(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: PyTree,
        options: dict[str, Any],
        f_struct: PyTree[jax.ShapeDtypeStruct],
        aux_struct: PyTree[jax.ShapeDtypeStruct],
        tags: frozenset[object],
    ) -> MinimiserState[Y, Aux]:
        """As that of the minimiser."""
        return self.minimiser.init(fn, y, args, options, f_struct, aux_struct, tags)

    def step(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: PyTree,
        options: dict[str, Any],
        state: MinimiserState[Y, Aux],
        tags: frozenset[object],
    ) -> tuple[Y, MinimiserState[Y, Aux], Aux]:
        """A step, and the callback behind it."""
        new_y, new_state, aux = self.minimiser.step(fn, y, args, options, state, tags)
        moved = new_state.step > state.step
        end = SolverState(new_y, new_state.with_history(None))
        stop = self.callbacks.stop(self.run, self.captured, end, moved)
        interrupted = state.interrupted | (stop & moved)
        of = lambda s: s.interrupted  # noqa: E731
        return new_y, eqx.tree_at(of, new_state, interrupted), aux

    def terminate(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: PyTree,
        options: dict[str, Any],
        state: MinimiserState[Y, Aux],
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], RESULTS]:
        """As that of the minimiser."""
        return self.minimiser.terminate(fn, y, args, options, state, tags)

    def postprocess(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        aux: Aux,
        args: PyTree,
        options: dict[str, Any],
        state: MinimiserState[Y, Aux],
        tags: frozenset[object],
        result: RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        """As that of the minimiser."""
        return self.minimiser.postprocess(
            fn, y, aux, args, options, state, tags, result
        )

    def closed(self, tree: PyTree, state: MinimiserState[Y, Aux]) -> PyTree:
        """Closes the run that ended in a state.

        Args:
          tree: All that is known of the run.
          state: The state.

        Returns:
          `tree`, in a way that nothing of it can be used before the run is closed.
        """
        if self.callbacks.host is None:
            return tree
        assert self.run is not None
        done = close_run(self.callbacks.host, self.run, state.interrupted)

        def behind(x: Any) -> Any:
            if not eqx.is_array(x) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
                return x
            return jnp.where(done, x, jnp.zeros_like(x))

        return jax.tree.map(behind, tree)
