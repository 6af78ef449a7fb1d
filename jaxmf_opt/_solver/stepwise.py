"""A solve as a Python loop, with a callback between compiled steps.

Each array that a compiled step takes or gives costs about as much as a small step has
to spare. So it gets what it needs; what is only asked for at the end, or by a callback
that looks at the whole state, is put together here.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, PyTree

from .._jax.debugging import alarms, no_alarms, own_transfers, raise_alarm
from .._jax.x64 import jax_enable_x64
from ..callbacks._args import CallbackArgs, CallbackFnType, Lane, asks_to_stop
from .compilation import compiled
from .driver import StepOutput
from .solution import Solution
from .spec import SolveSpec, Tolerances
from .state import Evaluated, Evaluations, History, Movement, SolverState

# Above this many parameters a step costs more than to look whether its loss is finite.
_SMALL = 4096


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
    begin = program.first_state(params) if start is None else start
    y, of = begin.params, begin.minimiser
    opt_state = of.opt_state
    with own_transfers():
        counters = jnp.stack([jnp.asarray(max_steps - int(of.step)), *of.evaluations])
        before: tuple[Movement, Array] | None = None
        limits = None
        if not tolerances.off:
            before = (cast(Movement, of.movement), of.first_loss)
            limits = Tolerances(*map(jnp.asarray, tolerances))
    record = _Record(begin)
    rows: list[History] = []
    is_alarmed = alarms()
    lane, step, pending = Lane(), program.step, record.pending
    steps, output, interrupted, has_stalled = int(of.step), None, False, False
    while steps < max_steps and not interrupted:
        at = y
        y, opt_state, counters, output = step(
            at, opt_state, counters, before, captured, limits
        )
        if is_alarmed:
            raise_alarm(spec.program.loss, at, captured, (output.loss, output.grad))
        pending.append((at, output))
        if len(pending) >= record.check_every:
            record.look()
        if limits is not None:
            if output.converged:
                break
            has_stalled = bool(output.stalled)
            first = before[1] if before and steps else output.loss
            before = (cast(Movement, output.movement), first)
        steps += 1
        if output.row is not None:
            rows.append(output.row)
        info = CallbackArgs(steps - 1, output.loss, output.grad, y, opt_state)
        info.bind(lane, record.state_after, steps, at, y, opt_state, counters, output)
        interrupted = asks_to_stop(callback(info))
        if has_stalled:
            break
    else:
        with own_transfers():
            counters = counters.at[0].set(0)
        _, _, counters, output = step(y, opt_state, counters, before, captured, limits)
        pending.append((y, output))
    end = record.state_after(steps, y, y, opt_state, counters, output)
    converged = output.converged is not None and bool(output.converged)
    flags = (converged, has_stalled, interrupted, True)
    with own_transfers(), no_alarms():
        end = eqx.tree_at(
            lambda s: (
                *(s.minimiser.converged, s.minimiser.stalled),
                *(s.minimiser.interrupted, s.minimiser.ended),
            ),
            end,
            tuple(map(jnp.asarray, flags)),
        )
        if output.row is not None:
            table = _table(rows, int(of.step), max_steps)
            end = SolverState(y, end.minimiser.with_history(table))
    return program.value_and_finish(end, max_steps)


class _Record:
    """What is remembered of the steps, and the whole state made of it.

    Attributes:
      pending: Evaluated points at which nobody has looked yet. To look at one waits for
        it and costs as much as a small step, so it is done for several at a time.
      check_every: For how many.
    """

    def __init__(self, begin: SolverState):
        self._begin = begin
        self._first_loss: Any = None
        if int(begin.minimiser.step):
            self._first_loss = begin.minimiser.first_loss
        self._last_finite = begin.minimiser.last_finite
        self.pending: list[tuple[PyTree, StepOutput]] = []
        size = sum(x.size for x in jax.tree.leaves(begin.params))
        self.check_every = 16 if size <= _SMALL else 1

    def look(self) -> None:
        """Finds the last finite point."""
        for y, output in reversed(self.pending):
            if found := _if_finite(y, output):
                self._last_finite = found
                break
        if self._first_loss is None:
            self._first_loss = self.pending[0][1].loss
        self.pending.clear()

    def state_after(
        self,
        steps: int,
        at: PyTree,
        y: PyTree,
        opt_state: PyTree,
        counters: Array,
        output: StepOutput,
    ) -> SolverState:
        """The whole state after a number of steps, whenever it is asked for.

        Args:
          steps: The number.
          at: The point that was evaluated last.
          y: The point that it led to.
          opt_state: The state of the optax transformation.
          counters: The counts.
          output: What the step has returned.

        Returns:
          The state.
        """
        # (A callback may ask for the state in whatever setting.)
        with jax.enable_x64(), own_transfers():
            if self.pending:
                self.look()
            last_finite = _if_finite(at, output) or self._last_finite
            old = self._begin.minimiser
            parts: dict[str, Any] = {
                "step": jnp.asarray(steps, old.step.dtype),
                "loss": output.loss,
                "grad": output.grad,
                "movement": output.movement,
                "opt_state": opt_state,
                "first_loss": self._first_loss,
                "last_finite": last_finite,
                "evaluations": Evaluations(counters[1], counters[2]),
            }
            return SolverState(
                y,
                eqx.tree_at(
                    lambda s: [getattr(s, name) for name in parts],
                    old,
                    list(parts.values()),
                    is_leaf=lambda x: x is None,
                ),
            )


def _if_finite(y: PyTree, output: StepOutput) -> Evaluated | None:
    leaves = map(np.asarray, jax.tree.leaves(y))
    if not (math.isfinite(output.loss) and all(np.isfinite(x).all() for x in leaves)):
        return None
    return Evaluated(y, output.loss, optx.max_norm(output.grad))


def _table(rows: Sequence[History], first: int, length: int) -> History:
    """The rows of the steps from `first` on."""

    def column(*cells: Any) -> Array:
        table = np.full(length, np.nan)
        table[first : first + len(cells)] = np.asarray(jax.device_get(cells)).ravel()
        return jnp.asarray(table)

    return jax.tree.map(column, *rows) if rows else History(*3 * (column(),))
