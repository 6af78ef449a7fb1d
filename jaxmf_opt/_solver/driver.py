"""The two ways to run a solve: as one loop, or step by step from Python.

Both are pure functions of a specification and of arrays; `compilation.py` has them
compiled. They are to be called, or traced, with 64-bit types.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree
from optimistix import RESULTS

from .._jax.packing import pack, unpack
from .._jax.varying import on_mesh
from .compiled_callbacks import MinimiserWithCallbacks
from .convergence import all_finite
from .loop import Loop, Pause
from .minimiser import LeanOptaxMinimiser
from .resume import as_float64, matches_problem, start, with_history_buffer
from .solution import Solution
from .spec import SolveSpec, Tolerances
from .state import Evaluations, MinimiserState, SolverState
from .stationarity import stalled_at_minimum

# optimistix has it jitted, with the loss as a static argument: JAX then keeps the last
# thousands of them, and a megabyte for each. Here it is a part of a program already.
_optimistix_minimise = inspect.unwrap(optx.minimise)


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
    solution = _cast(spec, finish(spec, keep_state_alive(*end), limit))
    return judge_stall(spec, solution, captured), end, ~end.minimiser.ended


def _minimise(
    spec: SolveSpec,
    y: PyTree,
    state: MinimiserState | None,
    captured: Sequence[Array],
    limit: Int[Array, ""],
    tolerances: Tolerances,
    callback_consts: Sequence[Array],
    pause: Pause | None = None,
) -> tuple[LeanOptaxMinimiser | MinimiserWithCallbacks, optx.Solution]:
    """The loop itself."""
    minimiser = _minimiser(spec, tolerances)
    if spec.callbacks is not None:
        minimiser = MinimiserWithCallbacks(minimiser, spec.callbacks, callback_consts)
    options = _options(spec, limit)
    if state is not None:
        options["state"] = state
    solution = _optimistix_minimise(
        spec.program.loss,
        minimiser,
        y,
        captured,
        options=options,
        max_steps=None,
        adjoint=Loop(pause),
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
    at_minimum, trials = stalled_at_minimum(
        lambda y: spec.program.loss(y, captured), solution.state
    )
    stagnant = solution.result == RESULTS.stagnation
    result = RESULTS.where(stagnant & at_minimum, RESULTS.successful, solution.result)
    none = jnp.zeros_like(trials)
    evaluations = solution.state.minimiser.evaluations.plus(
        none, Evaluations(trials, none)
    )
    return eqx.tree_at(
        lambda s: (s.result, s.stats["num_loss_evaluations"]),
        solution,
        (result, _count(spec, evaluations.loss)),
    )


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
    counts = {
        "num_steps": state.step,
        "max_steps": limit,
        "num_loss_evaluations": state.evaluations.loss,
        "num_grad_evaluations": state.evaluations.grad,
    }
    floats: dict[str, PyTree] = {"loss": last.loss, "grad_norm": last.grad_norm}
    if state.history is not None:
        floats["history"] = state.history
    stats = {k: _count(spec, n) for k, n in counts.items()}
    stats |= jax.tree.map(lambda x: x.astype(spec.float_dtype), floats)
    end = SolverState(end.params, state.with_history(None))
    # (A starting point that is all that there is would be a number, and wrong, if steps
    # were asked for.)
    nowhere = jnp.isnan(last.loss) & (limit > 0)
    value = jax.tree.map(lambda x: jnp.where(nowhere, jnp.nan, x), last.params)
    return Solution(value, result, None, stats, end, last.loss)


def _count(spec: SolveSpec, n: Int[Array, ""]) -> Int[Array, ""]:
    """In the caller's dtype, or -1 if it has no such number."""
    fits = n <= jnp.iinfo(spec.int_dtype).max
    return jnp.where(fits, n, -1).astype(spec.int_dtype)


class StepState(NamedTuple):
    """A `SolverState` between compiled steps: what callbacks see, and the rest."""

    params: PyTree
    loss: Float[Array, ""]
    grad: PyTree
    opt_state: PyTree
    rest: tuple[Array, ...]


def packed(spec: SolveSpec, state: SolverState) -> StepState:
    """A state as `step` takes it."""
    del spec
    of = state.minimiser
    return StepState(state.params, of.loss, of.grad, of.opt_state, pack(_rest(of)))


def _rest(state: MinimiserState) -> MinimiserState:
    """A state without what a `StepState` has by itself."""
    return eqx.tree_at(_seen, state, (None, None, None))


def _seen(state: MinimiserState) -> tuple[Any, Any, Any]:
    return state.loss, state.grad, state.opt_state


def unpacked(spec: SolveSpec, state: StepState) -> SolverState:
    """The whole of a state."""
    params, *seen, rest = state
    like = jax.eval_shape(functools.partial(_start, spec), params).minimiser
    minimiser = unpack(rest, _rest(like))
    is_none = lambda x: x is None  # noqa: E731
    minimiser = eqx.tree_at(_seen, minimiser, tuple(seen), is_leaf=is_none)
    return SolverState(params, minimiser)


def _start(spec: SolveSpec, params: PyTree) -> SolverState:
    return start(spec.optimizer, params, tests=spec.tests, history=spec.history)


def first_state(spec: SolveSpec, params: PyTree) -> StepState:
    """The float64 point and the state before the first step."""
    return packed(spec, _start(spec, params))


def interrupted(spec: SolveSpec, state: StepState) -> StepState:
    """The state, in which a callback has asked to stop."""
    params, minimiser = unpacked(spec, state)
    minimiser = eqx.tree_at(lambda s: s.interrupted, minimiser, jnp.array(True))
    return packed(spec, SolverState(params, minimiser))


def step(
    spec: SolveSpec,
    state: StepState,
    captured: Sequence[Array],
    limit: Int[Array, ""],
    tolerances: Tolerances | None,
) -> tuple[StepState, tuple[Array, Array] | None]:
    """One step of a solve whose callbacks are called from Python.

    Args:
      spec: What to solve, and how.
      state: Where the solve is.
      captured: What the loss closes over.
      limit: The limit of steps.
      tolerances: When to stop before it, or None.

    Returns:
      Where the solve is then. If there was a reason to stop it has not moved. With
      tolerances, also how many steps were taken, and whether the solve has ended.
    """
    params, minimiser = unpacked(spec, state)
    y, minimiser, _ = _minimiser(spec, tolerances or Tolerances()).step(
        lambda y, captured: (spec.program.loss(y, captured), None),
        params,
        captured,
        _options(spec, limit),
        minimiser,
        frozenset(),
    )
    status = None if tolerances is None else (minimiser.step, minimiser.ended)
    return packed(spec, SolverState(y, minimiser)), status


def _minimiser(spec: SolveSpec, tolerances: Tolerances) -> LeanOptaxMinimiser:
    if not spec.tests:
        return LeanOptaxMinimiser(spec.optimizer)
    return LeanOptaxMinimiser(spec.optimizer, *map(jnp.float64, tolerances))


def _options(spec: SolveSpec, limit: Int[Array, ""]) -> dict[str, Any]:
    """The options of the minimiser.

    Without tolerances a callback sees all steps, as upstream's does: those that change
    nothing, and those from points that are not finite.
    """
    return {
        "limit": limit,
        "history": spec.history,
        "stop_if_stalled": spec.tests or not spec.is_seen,
        "stop_if_nonfinite": not spec.is_seen,
    }


def value_and_finish(
    spec: SolveSpec, end: StepState, limit: Int[Array, ""] | int
) -> Solution:
    """The same as `finish`, with the value in the caller's dtypes."""
    return _cast(spec, finish(spec, unpacked(spec, end), jnp.asarray(limit)))


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
    # (To take the first element of a scalar would be four more operations.)
    first = [x.ravel()[0] if x.ndim else x for x in numbers]
    witness = sum(x.astype(jnp.float64) for x in first)

    def pin(y: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.where(never, witness, x), y)

    last = lambda s: s.last_finite.params  # noqa: E731
    return SolverState(pin(y), eqx.tree_at(last, state, pin(last(state))))
