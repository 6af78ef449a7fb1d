"""A solve as a Python loop, with a callback between compiled steps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._jax.debugging import alarms, no_alarms, own_transfers, raise_alarm
from .._jax.x64 import jax_enable_x64
from ..callbacks._args import CallbackArgs, CallbackFnType, Lane, asks_to_stop
from .compilation import compiled
from .driver import StepState
from .resume import with_history_buffer
from .solution import Solution
from .spec import SolveSpec, Tolerances
from .state import SolverState
from .stationarity import evaluates_start


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
        if start is None:
            steps, is_over, state = 0, False, program.first_state(params)
            if evaluates_start(spec.optimizer):  # and does no more
                state, _ = program.step(state, captured, limit, limits)
        else:
            begin = with_history_buffer(start, spec.history)
            steps, is_over = int(begin.minimiser.step), bool(begin.minimiser.ended)
            state = program.packed(begin)
    lane, is_alarmed, interrupted = Lane(), alarms(), False

    def seen(state: StepState) -> SolverState:
        with jax.enable_x64(), no_alarms():  # it may be asked for late
            whole = program.unpacked(state)
        # (Not the history, which is not complete.)
        return SolverState(whole.params, whole.minimiser.with_history(None))

    while not is_over:
        at = state.params
        state, status = program.step(state, captured, limit, limits)
        params, loss, grad, opt_state, _ = state
        if is_alarmed:
            raise_alarm((loss, grad), spec.program.loss, at, captured)
        # (To look at an array waits for it. Without tolerances there is no need to.)
        is_over = interrupted or steps >= max_steps
        stays = is_over
        if status is not None:
            num_steps, ended = status
            is_over = bool(ended)
            stays = is_over and int(num_steps) == steps
        if stays:
            break
        info = CallbackArgs(steps, loss, grad, params, opt_state)
        steps += 1
        interrupted = asks_to_stop(callback(info.bind(lane, seen, state)))
        if interrupted:
            # What the step has led to is still evaluated.
            state = program.interrupted(state)
    return program.value_and_finish(state, max_steps)
