"""Brings the lanes of a sweep to their ends, and keeps what comes out of each."""

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from .._keys import as_key
from .._solution import Solution
from .._state import SolverState
from ._crew import Crew, Outcome
from ._journal import Journal
from ._meter import Meter
from ._schedule import Block, blocks
from ._width import narrower_widths


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C during a sweep.

    Attributes:
      lanes: The lanes that have ended, of those of this process, in order.
      solution: Their solution, a row for each.
    """

    def __init__(self, lanes: Int[np.ndarray, " lanes"], solution: Solution | None):
        super().__init__(f"{lanes.size} lanes have ended")
        self.lanes = lanes
        self.solution = solution


def solve_lanes(
    crew: Crew,
    count: int,
    width: int,
    journal: Journal | None,
    meter: Meter,
    keep_states: bool,
) -> Solution:
    """Solves all lanes of this process.

    Args:
      crew: Who solves them.
      count: How many there are.
      width: The width of a batch.
      journal: Where to keep what comes out, and where some of it may be already.
      meter: To be told of it.
      keep_states: Whether the solution has the states.

    Returns:
      The solution, of NumPy arrays, axis 0 over the lanes.

    Raises:
      SweepInterrupted: If the user interrupts it.
    """
    table = _Table(count, keep_states)
    widths = narrower_widths(width, crew.mesh.size)
    remaining, states, generation = np.arange(count), None, 0
    try:
        while remaining.size:
            plan = list(blocks(generation, remaining, widths, crew.mesh.size))
            left: dict[str, tuple[Any, SolverState]] = {}
            each = _outcomes(plan, states, crew, journal, keep_states)
            with contextlib.closing(each):  # so that an exception here ends it
                for block, outcome in each:
                    meter.add(outcome.solution, ~outcome.running)
                    left[block.name] = table.put(block.lanes, outcome)
            lanes, rows = zip(*(left[block.name] for block in plan), strict=True)
            remaining = np.concatenate(lanes)
            states = jax.tree.map(lambda *x: np.concatenate(x), *rows)
            generation += 1
    except KeyboardInterrupt:
        lanes, solution = table.ended()
        if solution is not None:
            solution = as_arrays(solution, crew.structs(width)[1])
        raise SweepInterrupted(crew.numbers[lanes], solution) from None
    finally:
        if journal is not None:
            journal.write()
    return table.whole


def as_arrays(solution: Solution, state: SolverState) -> Solution:
    """Makes JAX's arrays of NumPy's, and random keys of their data.

    Args:
      solution: The solution, with states or without.
      state: The `jax.ShapeDtypeStruct`s of a state.
    """
    arrays = jax.tree.map(jnp.asarray, solution)
    if arrays.state is None:
        return arrays
    like = SolverState(state.params, state.minimiser.with_history(None))
    keyed = jax.tree.map(as_key, arrays.state, like)
    return eqx.tree_at(lambda s: s.state, arrays, keyed)


def _outcomes(
    plan: Sequence[Block],
    states: SolverState | None,
    crew: Crew,
    journal: Journal | None,
    keep_states: bool,
) -> Generator[tuple[Block, Outcome]]:
    """What comes out of the blocks of a generation: what is known of them first."""
    todo = []
    for block in plan:
        arrays = None if journal is None else journal.record(block.name)
        if arrays is None:
            todo.append(block)
        else:
            yield block, _from_record(arrays, crew.structs(block.width))
    with contextlib.closing(crew.run(todo, states)) as outcomes:
        for block, outcome in outcomes:
            if journal is not None:
                journal.add(block.name, _to_record(outcome, keep_states))
            yield block, outcome


class _Table:
    """Solutions by lane."""

    def __init__(self, count: int, keep_states: bool):
        self._has_ended = np.zeros(count, bool)
        self._keep_states = keep_states
        self.whole: Any = None

    def put(self, lanes: Any, outcome: Outcome) -> tuple[Any, SolverState]:
        """Keeps what came out of lanes that have ended; returns the others."""
        solution, state, running = outcome
        if self._keep_states:
            of_lane = SolverState(state.params, state.minimiser.with_history(None))
            solution = eqx.tree_at(
                lambda s: s.state, solution, of_lane, is_leaf=lambda x: x is None
            )
        if self.whole is None:
            count = self._has_ended.size
            self.whole = jax.tree.map(
                lambda x: np.empty((count, *x.shape[1:]), x.dtype), solution
            )
        ended = lanes[~running]

        def write(whole: np.ndarray, rows: np.ndarray) -> None:
            whole[ended] = rows[~running]

        jax.tree.map(write, self.whole, solution)
        self._has_ended[ended] = True
        return lanes[running], jax.tree.map(lambda x: x[running], state)

    def ended(self) -> tuple[Any, Any]:
        """The lanes that have ended, and their solution."""
        rows = lambda x: x[self._has_ended]  # noqa: E731
        return np.flatnonzero(self._has_ended), jax.tree.map(rows, self.whole)


def _to_record(outcome: Outcome, keep_states: bool) -> dict[str, np.ndarray]:
    solution, state, running = outcome
    rows = np.ones_like(running) if keep_states else running
    leaves = jax.tree.leaves((solution, jax.tree.map(lambda x: x[rows], state)))
    return {"running": running} | {str(i): x for i, x in enumerate(leaves)}


def _from_record(arrays: Mapping[str, np.ndarray], like: PyTree) -> Outcome:
    """An outcome of its record; rows of states that were not kept are 0."""
    running = arrays["running"]

    def filled(i: int, like: jax.ShapeDtypeStruct) -> np.ndarray:
        x = arrays[str(i)]
        if len(x) == len(running):
            return x
        every = np.zeros((len(running), *x.shape[1:]), x.dtype)
        every[running] = x
        return every

    leaves, treedef = jax.tree.flatten(like)
    rows = [filled(i, x) for i, x in enumerate(leaves)]
    solution, state = jax.tree.unflatten(treedef, rows)
    return Outcome(solution, state, running)
