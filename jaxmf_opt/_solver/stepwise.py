"""A solve as a Python loop, with a callback between compiled steps."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._jax.debugging import alarms, no_alarms, own_transfers, raise_alarm
from .._jax.x64 import jax_enable_x64
from ..callbacks._args import CallbackArgs, CallbackFnType, Lane, asks_to_stop
from .compilation import compiled
from .resume import with_history_buffer
from .solution import Solution
from .spec import SolveSpec, Tolerances
from .state import SolverState


@jax_enable_x64
def solve_stepwise(
    spec: SolveSpec,
    params: PyTree,
    captured: Sequence[Array],
    max_steps: int,
    tolerances: Tolerances,
    callback: CallbackFnType,
    start: SolverState | None,
) -> Solution:
    """The solve, with the callback on the calling thread.

    Args:
      spec: What to solve, and how.
      params: The starting point.
      captured: What the loss closes over.
      max_steps: The limit of steps.
      tolerances: When to stop before it.
      callback: Called after each step.
      start: Where to go on, instead of at `params`.

    Returns:
      The solution, its value in the caller's dtypes.
    """
    program = compiled(spec)
    with own_transfers(), no_alarms():
        limit = jnp.asarray(max_steps)
        limits = None if tolerances.off else Tolerances(*map(jnp.asarray, tolerances))
        yes = jnp.asarray(True)
        if start is not None:
            state = with_history_buffer(start, spec.history)
        else:
            state = program.first_state(params)
    lane, is_alarmed = Lane(), alarms()
    steps, interrupted = int(state.minimiser.step), False
    is_over = bool(state.minimiser.ended)
    while not is_over:
        at = state.params
        state = program.step(state, captured, limit, limits)
        of = state.minimiser
        if is_alarmed:
            raise_alarm((of.loss, of.grad), spec.program.loss, at, captured)
        # (To look at an array waits for it. Without tolerances there is no need to.)
        is_over = interrupted or steps == max_steps
        if limits is not None:
            is_over = bool(of.ended)
        if is_over and int(of.step) == steps:
            break
        info = CallbackArgs(steps, of.loss, of.grad, state.params, of.opt_state)
        steps += 1
        interrupted = asks_to_stop(callback(info.bind(lane, _seen, state)))
        if interrupted:
            # What the step has led to is still evaluated.
            minimiser = eqx.tree_at(lambda s: s.interrupted, of, yes)
            state = SolverState(state.params, minimiser)
    return program.value_and_finish(state, max_steps)


def _seen(state: SolverState) -> SolverState:
    """What a callback sees of a state: not the history, which is not complete."""
    return SolverState(state.params, state.minimiser.with_history(None))
