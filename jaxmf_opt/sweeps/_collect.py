"""Brings the lanes of a sweep to their ends, and keeps what comes out of each."""

import contextlib
import functools
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from .._jax.keys import as_key, data_struct
from .._solver.solution import Solution
from .._solver.state import SolverState
from ._checkpoints import CheckpointStore, Layout
from ._progress import ProgressBar
from ._runner import BatchRunner, Outcome
from ._schedule import Block, blocks, merge, split
from ._width import narrower_widths


class SweepInterrupted(KeyboardInterrupt):
    """Raised by Ctrl-C during a sweep; has the solution of the finished lanes.

    Attributes:
      lanes: The lanes that have ended, of those of this process, in order.
      solution: Their solution, a row for each.
    """

    def __init__(self, lanes: Int[np.ndarray, " lanes"], solution: Solution | None):
        super().__init__(f"{lanes.size} lanes have ended")
        self.lanes = lanes
        self.solution = solution

    def __reduce__(self) -> tuple[Any, Any]:
        """From what it was made of, in another process."""
        return type(self), (self.lanes, self.solution)


def solve_lanes(
    runner: BatchRunner,
    count: int,
    layout: Layout,
    store: CheckpointStore | None,
    progress_bar: ProgressBar,
    keep_states: bool,
) -> Solution:
    """Solves all lanes of this process.

    Args:
      runner: Who solves them.
      count: How many there are.
      layout: How they are put into batches.
      store: Where to keep what comes out, and where some of it may be already.
      progress_bar: What shows it.
      keep_states: Whether the solution has the states.

    Returns:
      The solution, of NumPy arrays, axis 0 over the lanes.

    Raises:
      SweepInterrupted: If the user interrupts it.
    """
    table = _Table(count, keep_states)
    widths = narrower_widths(*layout)
    remaining, states, generation = np.arange(count), None, 0
    try:
        while remaining.size:
            whole = blocks(generation, remaining, widths, layout.devices)
            plan = list(split(whole, layout.devices))
            left: dict[str, tuple[Any, SolverState]] = {}
            each = _outcomes(plan, states, runner, store, keep_states)
            with contextlib.closing(each):  # so that an exception here ends it
                for block, outcome in each:
                    progress_bar.add(outcome.solution, ~outcome.running)
                    left[block.name] = table.put(block.lanes, outcome)
            lanes, rows = zip(*(left[block.name] for block in plan), strict=True)
            remaining = np.concatenate(lanes)
            states = jax.tree.map(lambda *x: np.concatenate(x), *rows)
            generation += 1
    except KeyboardInterrupt:
        lanes, solution = table.ended()
        if solution is not None:
            width = layout.width // layout.devices * runner.mesh.size
            solution = as_arrays(solution, runner.structs(width)[1])
        raise SweepInterrupted(runner.numbers[lanes], solution) from None
    finally:
        if store is not None:
            store.write()
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
    runner: BatchRunner,
    store: CheckpointStore | None,
    keep_states: bool,
) -> Generator[tuple[Block, Outcome]]:
    """What comes out of the blocks of a generation: what is known of them first."""
    todo = []
    for block in plan:
        known = None
        if store is not None:
            structs = runner.structs(block.width * runner.mesh.size)
            parse = functools.partial(_from_record, block.lanes, structs)
            known = store.record(block.name, parse)
        if known is None:
            todo.append(block)
        else:
            yield block, known
    merged = list(merge(todo, runner.mesh.size))
    parts_of = {together.name: parts for together, parts in merged}
    running = runner.run([together for together, _ in merged], states)
    with contextlib.closing(running) as outcomes:
        for together, outcome in outcomes:
            first = 0
            for block in parts_of[together.name]:
                rows = slice(first, first := first + block.lanes.size)
                part = jax.tree.map(lambda x, rows=rows: x[rows], outcome)
                if store is not None:
                    store.add(block.name, _to_record(block, part, keep_states))
                yield block, part


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


def _to_record(
    block: Block, outcome: Outcome, keep_states: bool
) -> dict[str, np.ndarray]:
    solution, state, running = outcome
    rows = np.ones_like(running) if keep_states else running
    leaves = jax.tree.leaves((solution, jax.tree.map(lambda x: x[rows], state)))
    named = {str(i): x for i, x in enumerate(leaves)}
    return {"lanes": block.lanes, "running": running, **named}


def _from_record(
    lanes: Int[np.ndarray, " lanes"], like: PyTree, arrays: Mapping[str, np.ndarray]
) -> Outcome:
    """An outcome of its record; rows of states that were not kept are 0.

    Args:
      lanes: The lanes that it has to be of.
      like: The `jax.ShapeDtypeStruct`s of a lane.
      arrays: The record.

    Raises:
      ValueError: If it is of other lanes, or arrays are missing or of other shapes.
    """

    def array(name: str, dtype: Any, shape: tuple[int, ...], *counts: int) -> Any:
        x = arrays.get(name)
        if x is None:
            raise ValueError(f"it has no array {name!r}")
        if x.dtype != dtype or x.shape not in [(n, *shape) for n in counts]:
            raise ValueError(f"its array {name!r} is {x.dtype}{list(x.shape)}")
        return x

    count = lanes.size
    if not np.array_equal(array("lanes", lanes.dtype, (), count), lanes):
        raise ValueError("it is of other lanes")
    running = array("running", bool, (), count)

    leaves, treedef = jax.tree.flatten(like)
    num_solution = len(jax.tree.leaves(like[0]))
    rows = []
    for i, struct in enumerate(map(data_struct, leaves)):
        # Of lanes that have ended there need not be a state.
        counts = (count,) if i < num_solution else (count, int(running.sum()))
        x = array(str(i), struct.dtype, struct.shape, *counts)
        if len(x) < count:
            every = np.zeros((count, *struct.shape), x.dtype)
            every[running] = x
            x = every
        rows.append(x)
    solution, state = jax.tree.unflatten(treedef, rows)
    return Outcome(solution, state, running)
