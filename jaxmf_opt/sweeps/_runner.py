"""Solves the lanes of a sweep, block by block, several blocks at a time."""

import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int, PyTree

from .._jax.debugging import alarms
from .._jax.keys import as_key, as_numpy, on_host
from .._solver.compiled_callbacks import callback_args
from .._solver.solution import Solution
from .._solver.state import SolverState
from ..callbacks._args import CallbackFnType, Lane, asks_to_stop
from ._batch import BatchProgram
from ._lane import LaneSetting
from ._lanes import Lanes
from ._schedule import Block

# A batch is interrupted about as often, in seconds, to see whether it shall go on.
_PART = 0.5


class Outcome(NamedTuple):
    """What came out of a block.

    Attributes:
      solution: The solutions, without states, as NumPy arrays. They count for lanes
        that have ended.
      state: The `SolverState`s, also by lane, with data in the place of random keys.
      running: Which lanes have anything left to do.
    """

    solution: Solution
    state: SolverState
    running: Bool[np.ndarray, " lanes"]


class CallbackStopIterationError(Exception):
    """A `StopIteration` of a callback, which generators do not let through."""

    def __init__(self, original: StopIteration):
        super().__init__(original)
        self.original = original


class BatchRunner:
    """The programs of a sweep, and the threads that run them.

    Attributes:
      mesh: The devices over which a batch is split.
      numbers: The numbers of its lanes in the whole sweep.
    """

    def __init__(
        self,
        setting: LaneSetting,
        lanes: Lanes,
        numbers: Int[np.ndarray, " lanes"],
        mesh: Mesh,
        callback: CallbackFnType | None,
        workers: int,
    ):
        """Compiles nothing yet.

        Args:
          setting: What all lanes have in common.
          lanes: Their parameters, hyperparameters, and states to go on from, or None.
          numbers: Their numbers in the sweep, of which this may be a part only.
          mesh: The devices over which a batch is split.
          callback: StepOutput of each step, on the calling thread.
          workers: How many blocks are solved at a time, without a callback.
        """
        self.mesh, self.numbers = mesh, numbers
        self._setting, self._lanes = setting, lanes
        self._callback, self._workers = callback, workers
        self._programs: dict[int, tuple[BatchProgram, BatchProgram]] = {}
        self._lane_objects: dict[int, Lane] = {}
        self._stop = threading.Event()

    def programs(self, width: int) -> tuple[BatchProgram, BatchProgram]:
        """The first state of a batch, and a part of its solves, for a width."""
        if width not in self._programs:
            self._programs[width] = self._compile(width)
        return self._programs[width]

    def structs(self, width: int) -> tuple[Solution, SolverState]:
        """What comes out of a lane: its solution without a state, and its state."""
        return self.programs(width)[1].structs[:2]

    def run(
        self, blocks: Sequence[Block], states: SolverState | None
    ) -> Generator[tuple[Block, Outcome]]:
        """Solves blocks, and yields each when it is done.

        Args:
          blocks: The blocks of a generation.
          states: Where its lanes are, a row for each; None is the beginning.
        """
        for width in {block.width for block in blocks}:
            self.programs(width)

        def solve(block: Block) -> Outcome:
            with jax.enable_x64():  # a setting of each thread
                return self._solve(block, states)

        if self._callback is not None or self._workers == 1:
            for block in blocks:
                yield block, solve(block)
            return
        executor = ThreadPoolExecutor(self._workers)
        try:
            waiting = iter(blocks)
            running: dict[Any, Block] = {}
            while True:
                for block in waiting:
                    running[executor.submit(solve, block)] = block
                    if len(running) > self._workers:  # one is ready to be begun
                        break
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            self._stop.set()
            executor.shutdown(cancel_futures=True)
            self._stop.clear()

    def _compile(self, width: int) -> tuple[BatchProgram, BatchProgram]:
        lanes, setting = self._lanes, self._setting
        some = lanes.take(np.zeros(width, int))

        def begin(mapped: PyTree, _: None) -> Any:
            params, hyperparam, state = map(lanes.argument, range(3), mapped)
            if state is None:
                return setting.first(params, hyperparam), jnp.array(True)
            return setting.resume_state(state, hyperparam)

        def advance(mapped: PyTree, shared: PyTree) -> Any:
            mapped_hyperparam, state, is_real = mapped
            hyperparam = lanes.argument(1, mapped_hyperparam)
            return setting.advance(state, hyperparam, is_real, *shared)

        first = BatchProgram(begin, some, None, self.mesh)
        states = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((width, *s.shape), s.dtype),
            first.structs[0],
        )
        is_real = np.zeros(width, bool)
        limits = (np.int64(0), np.int64(0))
        mapped = (some[1], states, is_real)
        return first, BatchProgram(advance, mapped, limits, self.mesh)

    def _solve(self, block: Block, states: SolverState | None) -> Outcome:
        begin, advance = self.programs(block.width)
        count = block.lanes.size
        filled = np.minimum(np.arange(block.width), count - 1)
        mapped = self._lanes.take(block.lanes[filled])
        if states is None:
            state, is_mine = begin(mapped, None)
            foreign = self.numbers[block.lanes[~np.asarray(is_mine)[:count]]]
            if foreign.size:
                raise ValueError(
                    "`state` must be that of a sweep of the same problems; `loss_fn` "
                    "has another value than it says at the points of lanes "
                    f"{', '.join(map(str, foreign[:5]))}{', ...' * (foreign.size > 5)}."
                )
        else:
            rows = jax.tree.map(lambda x: x[block.rows][filled], states)
            state = jax.tree.map(as_key, rows, begin.structs[0])
        is_real = np.arange(block.width) < count
        steps = 1 if self._callback is not None else 16
        while True:
            started, before = time.monotonic(), state.minimiser.step
            limits = (np.int64(steps), np.int64(block.keep))
            part = advance((mapped[1], state, is_real), limits)
            solution, state, running = part
            running = np.asarray(running)
            if self._callback is not None:
                state = self._tell(block, before, state)
            else:
                seconds = max(time.monotonic() - started, 1e-6)
                steps = max(1, int(steps * min(2.0, _PART / seconds)))
            left = running.reshape(self.mesh.size, -1).sum(1)
            if self._stop.is_set() or (left <= block.keep).all():
                break
        rows = lambda x: as_numpy(x)[:count]  # noqa: E731
        solution, state = jax.tree.map(rows, (solution, state))
        if alarms():
            self._raise_alarm(block, solution, state, running[:count])
        for lane in block.lanes[~running[:count]]:
            self._lane_objects.pop(int(lane), None)
        return Outcome(solution, state, running[:count])

    def _raise_alarm(
        self, block: Block, solution: Solution, state: SolverState, running: np.ndarray
    ) -> None:
        """Raises JAX's alarm for the first lane whose solve is not finite."""
        # (With a tolerance, one that is not finite where it starts makes no step.)
        started = (state.minimiser.step > 0) | ~running
        for name in ("nan", "inf"):
            if not getattr(jax.config, f"jax_debug_{name}s"):
                continue
            is_bad = getattr(np, f"is{name}")(state.minimiser.loss) & started
            is_bad |= getattr(np, f"is{name}")(solution.stats["grad_norm"]) & started
            if is_bad.any():
                lane = self.numbers[block.lanes[is_bad]][0]
                raise FloatingPointError(
                    f"invalid value ({name}) in the loss or the gradient of lane {lane}"
                )

    def _tell(self, block: Block, before: Any, state: SolverState) -> SolverState:
        """Tells the callback of the steps that were taken; lets it stop lanes."""
        assert self._callback is not None
        moved = np.asarray(state.minimiser.step) > np.asarray(before)
        interrupted = np.array(state.minimiser.interrupted)
        seen = SolverState(state.params, state.minimiser.with_history(None))
        leaves, treedef = jax.tree.flatten(seen)
        arrays = [on_host(x) for x in leaves]
        for row, lane in enumerate(map(int, block.lanes)):
            if not moved[row]:
                continue
            of_lane: SolverState = jax.tree.unflatten(treedef, [x[row] for x in arrays])
            info = callback_args(of_lane, int(of_lane.minimiser.step) - 1)
            key = self._lane_objects.setdefault(lane, Lane((int(self.numbers[lane]),)))
            args = info.bind(key, lambda of_lane=of_lane: of_lane)
            try:
                interrupted[row] |= asks_to_stop(self._callback(args))
            except StopIteration as e:
                raise CallbackStopIterationError(e) from e
        flags = lambda s: s.minimiser.interrupted  # noqa: E731
        return eqx.tree_at(flags, state, interrupted)
