"""The two ways to run a solve: as one loop, or step by step from Python.

Both are pure functions of a specification and of arrays; `compilation.py` has them
compiled. They are to be called, or traced, with 64-bit types.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree
from optimistix import RESULTS

from .._jax.varying import on_mesh
from .compiled_callbacks import MinimiserWithCallbacks
from .loop import Loop, Pause
from .minimiser import LeanOptaxMinimiser, all_finite
from .resume import as_float64, matches_problem, start, with_history_buffer
from .solution import Solution
from .spec import SolveSpec, Tolerances
from .state import Evaluations, History, MinimiserState, Movement, SolverState
from .stationarity import StoppingMinimiser, stalled_at_minimum

# optimistix has it jitted, with the loss as a static argument: JAX then keeps the last
# thousands of them, and a megabyte for each. Here it is a part of a program already.
_optimistix_minimise = inspect.unwrap(optx.minimise)


class StepOutput(NamedTuple):
    """What a step returns, beside the point and the optimizer's state.

    Attributes:
      loss: The loss where the step started.
      grad: The gradient there.
      movement: The last step, if tolerances are looked at.
      converged: Whether a tolerance was met, so that no step was made; likewise.
      stalled: Whether no later step can move the point; likewise.
      row: What is recorded of the step, of length 1, if anything is.
    """

    loss: Float[Array, ""]
    grad: PyTree
    movement: Movement | None
    converged: Bool[Array, ""] | None
    stalled: Bool[Array, ""] | None
    row: History | None


def solve(spec: SolveSpec, *operands: Any) -> Solution:
    """The same as `solve_in_float64`, with the value in the caller's dtypes.

    `judge_stall` is left to the caller, who may not need it.
    """
    return _cast(spec, _run(spec, *operands))


def solve_in_float64(
    spec: SolveSpec,
    params: PyTree,
    captured: Sequence[Array],
    max_steps: Int[Array, ""] | int,
    tolerances: Tolerances,
    callback_consts: Sequence[Array] = (),
    start: SolverState | None = None,
) -> Solution:
    """The whole solve. To be called, or traced, with 64-bit types.

    Args:
      spec: What to solve, and how.
      params: The starting point, of any real dtypes.
      captured: What the loss closes over.
      max_steps: The limit of steps.
      tolerances: When to stop before it.
      callback_consts: What traced callbacks close over.
      start: Where to go on, instead of at `params`.

    Returns:
      The solution.
    """
    solution = _run(
        spec, params, captured, max_steps, tolerances, callback_consts, start
    )
    return judge_stall(spec, solution, captured)


def _run(
    spec: SolveSpec,
    params: PyTree,
    captured: Sequence[Array],
    max_steps: Int[Array, ""] | int,
    tolerances: Tolerances,
    callback_consts: Sequence[Array] = (),
    start: SolverState | None = None,
) -> Solution:
    params, captured, start = on_mesh((params, captured, start))
    limit = jnp.asarray(max_steps)
    if start is None:
        y, begin = params, None
    else:
        y, begin = with_history_buffer(start, spec.history)
    minimiser, solution = _minimise(
        spec, as_float64(y), begin, captured, limit, tolerances, callback_consts
    )
    end = keep_state_alive(solution.value, solution.state)
    whole = finish(spec, end, limit)
    if isinstance(minimiser, MinimiserWithCallbacks):
        return minimiser.closed(whole, solution.state)
    return whole


def advance(
    spec: SolveSpec,
    state: SolverState,
    captured: Sequence[Array],
    max_steps: Int[Array, ""] | int,
    tolerances: Tolerances,
    callback_consts: Sequence[Array],
    pause: Pause,
) -> tuple[Solution, SolverState, Bool[Array, ""]]:
    """A part of a solve: some of the steps that the whole would take, to the bit.

    Args:
      spec: What to solve, and how.
      state: Where to go on, with what has been recorded.
      captured: What the loss closes over.
      max_steps: The limit of steps of the whole solve.
      tolerances: When to stop before it.
      callback_consts: What traced callbacks close over; none may be on the host.
      pause: When to interrupt it.

    Returns:
      What `solve` returns, which counts if this was the last part; where to go on,
      with what has been recorded; and whether there is anything left to do.
    """
    limit = jnp.asarray(max_steps)
    _, of = _minimise(spec, *state, captured, limit, tolerances, callback_consts, pause)
    end = SolverState(of.value, of.state)
    # (optimistix says so of a loop that somebody else has ended.)
    running = of.result == RESULTS.nonlinear_max_steps_reached
    if spec.callbacks is not None:
        running = ~end.minimiser.ended
    solution = _cast(spec, finish(spec, keep_state_alive(*end), limit))
    return judge_stall(spec, solution, captured), end, running


def _minimise(
    spec: SolveSpec,
    y: PyTree,
    state: MinimiserState | None,
    captured: Sequence[Array],
    limit: Int[Array, ""],
    tolerances: Tolerances,
    callback_consts: Sequence[Array],
    pause: Pause | None = None,
) -> tuple[LeanOptaxMinimiser, optx.Solution]:
    """The loop itself."""
    tolerances = _tolerances(spec, tolerances)
    if spec.callbacks is None:
        minimiser = StoppingMinimiser(spec.optimizer, tolerances)
    else:
        minimiser = MinimiserWithCallbacks(
            spec.optimizer,
            tolerances,
            spec.callbacks,
            callback_consts,
            stops=spec.tests,
        )
    options: dict[str, Any] = {"limit": limit, "history": spec.history}
    if state is not None:
        options["state"] = state
    solution = _optimistix_minimise(
        spec.program.loss,
        minimiser,
        y,
        captured,
        options=options,
        max_steps=None,
        adjoint=Loop(spec.callbacks is not None, pause),
        throw=False,
    )
    return minimiser, solution


def nan_unless_matching(
    spec: SolveSpec, state: SolverState, captured: Sequence[Array]
) -> SolverState:
    """The state; with points of NaN if it is that of another problem."""
    last = state.minimiser.last_finite
    is_mine = matches_problem(state, spec.program.loss(last.params, captured))

    def mine(x: Array) -> Array:
        return jnp.where(is_mine, x, jnp.nan)

    last = jax.tree.map(mine, last)
    minimiser = eqx.tree_at(lambda s: s.last_finite, state.minimiser, last)
    return SolverState(jax.tree.map(mine, state.params), minimiser)


def judge_stall(
    spec: SolveSpec, solution: Solution, captured: Sequence[Array]
) -> Solution:
    """The solution, `successful` if it stands still where there is a minimum.

    That takes evaluations of the loss, which have to be compiled; the value does
    not depend on them.

    Args:
      spec: What to solve, and how.
      solution: One whose stall is called `stagnation`.
      captured: What the loss closes over.

    Returns:
      The solution.
    """
    at_minimum = stalled_at_minimum(
        lambda y: spec.program.loss(y, captured), solution.state
    )
    stagnant = solution.result == RESULTS.stagnation
    result = RESULTS.where(stagnant & at_minimum, RESULTS.successful, solution.result)
    return eqx.tree_at(lambda s: s.result, solution, result)


def finish(spec: SolveSpec, end: SolverState, limit: Int[Array, ""]) -> Solution:
    """The solution of a run, but for `judge_stall`.

    Args:
      spec: What to solve, and how.
      end: Where it has ended, with what has been recorded.
      limit: The limit of steps.

    Returns:
      The solution, with a float64 value.
    """
    state = end.minimiser
    last = state.last_finite
    finite = jnp.isfinite(state.loss) & jnp.isfinite(last.grad_norm)
    finite &= all_finite(end.params)
    success = state.interrupted | state.converged | (last.grad_norm == 0)
    at_limit: Any = RESULTS.nonlinear_max_steps_reached
    stagnant: Any = RESULTS.stagnation
    result = RESULTS.where(state.stalled, stagnant, at_limit)
    result = RESULTS.where(success, RESULTS.successful, result)
    result = RESULTS.where(finite, result, RESULTS.nonfinite)
    most = jnp.iinfo(spec.int_dtype).max
    counts = {
        "num_steps": state.step,
        "max_steps": limit,
        "num_loss_evaluations": state.evaluations.loss,
        "num_grad_evaluations": state.evaluations.grad,
    }
    floats: dict[str, PyTree] = {"loss": last.loss, "grad_norm": last.grad_norm}
    if state.history is not None:
        floats["history"] = state.history
    stats = {k: jnp.minimum(n, most).astype(spec.int_dtype) for k, n in counts.items()}
    stats |= jax.tree.map(lambda x: _in_range(spec, x), floats)
    end = SolverState(end.params, state.with_history(None))
    return Solution(last.params, result, None, stats, end, last.loss)


def _in_range(spec: SolveSpec, x: Array) -> Array:
    """In the caller's dtype; a finite number stays one."""
    most = jnp.asarray(jnp.finfo(spec.float_dtype).max, x.dtype)
    x = jnp.where(jnp.isfinite(x), jnp.clip(x, -most, most), x)
    return x.astype(spec.float_dtype)


def first_state(spec: SolveSpec, params: PyTree) -> SolverState:
    """The float64 point and the state before the first step."""
    return start(spec.optimizer, params, tests=spec.tests)


def step(
    spec: SolveSpec,
    y: PyTree,
    opt_state: PyTree,
    counters: Int[Array, "3"],
    before: tuple[Movement, Float[Array, ""]] | None,
    captured: Sequence[Array],
    tolerances: Tolerances | None,
) -> tuple[PyTree, PyTree, Int[Array, "3"], StepOutput]:
    """One step, of no more arrays than it takes: each of them costs at a call.

    Args:
      spec: What to solve, and how.
      y: The point.
      opt_state: The state of the optax transformation.
      counters: How many steps may be taken (0: `y` is evaluated and not moved), and
        how often loss and gradient have been computed.
      before: The last step, and the loss where the solve started; None if no
        tolerances are looked at.
      captured: What the loss closes over.
      tolerances: When to stop, or None.

    Returns:
      The new `y`, `opt_state` and `counters`, and what else a step returns.
    """
    state = first_state(spec, y).minimiser
    of_last: Any = before or (None, state.first_loss)
    row = None
    if spec.history is not None:
        row = History.of_no_steps(1)
    parts = lambda s: (  # noqa: E731
        s.opt_state,
        s.evaluations,
        s.history,
        s.movement,
        s.first_loss,
    )
    new_parts = (opt_state, Evaluations(*counters[1:]), row, *of_last)
    state = eqx.tree_at(parts, state, new_parts, is_leaf=lambda x: x is None)
    limits = _tolerances(spec, tolerances or Tolerances())
    minimiser = StoppingMinimiser(spec.optimizer, limits, stops=spec.tests)
    y, state, _ = minimiser.step(
        lambda y, captured: (spec.program.loss(y, captured), None),
        y,
        captured,
        {"limit": counters[0]},
        state,
        frozenset(),
    )
    counters = jnp.stack([counters[0] - state.step, *state.evaluations])
    ways = (state.converged, state.stalled) if spec.tests else (None, None)
    output = StepOutput(state.loss, state.grad, state.movement, *ways, state.history)
    return y, state.opt_state, counters, output


def value_and_finish(
    spec: SolveSpec, end: SolverState, limit: Int[Array, ""] | int
) -> Solution:
    """The same as `finish`, with the value in the caller's dtypes."""
    return _cast(spec, finish(spec, end, jnp.asarray(limit)))


def loss(spec: SolveSpec, y: PyTree, captured: Sequence[Array]) -> Float[Array, ""]:
    """The loss at a float64 point."""
    return spec.program.loss(y, captured)


def in_dtypes(spec: SolveSpec, y: PyTree) -> PyTree:
    """The point in the dtypes of the caller's parameters."""
    leaves, treedef = jax.tree.flatten(y)
    cast = [x.astype(d) for x, d in zip(leaves, spec.dtypes, strict=True)]
    return jax.tree.unflatten(treedef, cast)


def _cast(spec: SolveSpec, solution: Solution) -> Solution:
    value = in_dtypes(spec, solution.value)
    return eqx.tree_at(lambda s: s.value, solution, value)


def _tolerances(spec: SolveSpec, tolerances: Tolerances) -> Tolerances:
    if not spec.tests:
        return Tolerances()
    return Tolerances(*map(jnp.float64, tolerances))


def keep_state_alive(y: PyTree, state: MinimiserState) -> SolverState:
    """Both, in a way that keeps all of `state` in a program that uses the result.

    XLA drops from a loop what its caller does not use, and then fuses and rounds the
    rest differently. Near a minimum rounding decides how long a line search takes, and
    which of the equally good points it ends at. Nobody should get other bits, or six
    times the evaluations, for not having looked at the state.
    """
    never = state.step < 0
    leaves = [x for x in jax.tree.leaves(state) if x.size]
    numbers = [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
    witness = sum(x.ravel()[0].astype(jnp.float64) for x in numbers)

    def pin(y: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.where(never, witness, x), y)

    last = lambda s: s.last_finite.params  # noqa: E731
    return SolverState(pin(y), eqx.tree_at(last, state, pin(last(state))))
