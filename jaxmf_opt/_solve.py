"""One call, checked, sent the way it has to go."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
from jaxtyping import Array, PyTree

from ._callback import (
    CallbackArgs,
    CallbackFnType,
    Lane,
    no_callback,
    parts,
    traced,
)
from ._checks import (
    check_callable,
    check_flag,
    check_linear_solver,
    check_optimizer,
    check_params,
    check_state,
    check_steps,
    check_tolerance,
)
from ._implicit import solve_in_program
from ._minimiser import SolverState, Tolerance
from ._objective import trace
from ._optimizer import DEFAULT_OPTIMIZER
from ._run import Memory, Recipe, Tolerances, compiled, start
from ._watch import watch
from ._x64 import inside_region, is_traced, jax_enable_x64


def solve(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *,
    max_optimizer_steps: int = 250,
    grad: bool = False,
    callback: CallbackFnType = no_callback,
    optimizer: optax.GradientTransformation = DEFAULT_OPTIMIZER,
    rtol: Tolerance = 0.0,
    atol: Tolerance = 0.0,
    gtol: Tolerance = 0.0,
    linear_solver: lx.AbstractLinearSolver | None = None,
    state: SolverState | Sequence[Array | np.ndarray] | None = None,
) -> optx.Solution:
    """Minimises a loss, and returns all there is to know about the run.

    Args:
      loss_fn: As in `optimize`, like all the arguments here.
      params: The starting point.
      max_optimizer_steps: The limit of steps.
      grad: Whether `loss_fn` returns its gradient too.
      callback: Called after each step.
      optimizer: An optax transformation.
      rtol: Relative tolerance of the Cauchy criterion.
      atol: Absolute tolerance of the Cauchy criterion.
      gtol: Tolerance for the max-norm of the gradient.
      linear_solver: For the linear system of the derivative.
      state: Where to go on: the `state` of a solution of the same problem, or what a
        `callbacks.Checkpoint` has kept of it. `params` then gives dtypes only.

    Returns:
      An `optimistix.Solution`. Its `value` has the structure and dtypes of `params`,
      its `stats` are `num_steps` and `max_steps`, its `state` is a `MinimiserState`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument has an impossible value.
    """
    check_callable("loss_fn", loss_fn)
    check_params(params)
    max_steps = check_steps(max_optimizer_steps)
    check_flag("grad", grad)
    check_callable("callback", callback)
    check_optimizer(optimizer)
    check_linear_solver(linear_solver)
    tolerances = Tolerances(rtol, atol, gtol)
    for name, value in tolerances._asdict().items():
        check_tolerance(name, value)

    structs = jax.tree.map(_float64_struct, params)
    objective = trace(loss_fn, structs, grad=grad)
    captured = objective.captured
    tests = not tolerances.off

    def state_structs() -> SolverState:
        with inside_region():
            of_state = functools.partial(start, optimizer, tests=tests)
            return jax.eval_shape(of_state, structs)

    callbacks = parts(callback)
    first = None
    if state is not None:
        first = check_state(state, state_structs())
        if tests or callbacks:
            # Whether to stop is decided anew, by this call's tolerances and callback.
            stopped = lambda s: s.minimiser.stopped  # noqa: E731
            first = eqx.tree_at(stopped, first, jnp.array(False))
    arrays = (params, captured, tolerances, eqxi.closure_to_pytree(optimizer), first)
    in_program = is_traced(arrays)
    of_program = [isinstance(c, traced) for c in callbacks]
    watcher, watched = None, []
    if any(of_program) or (callbacks and in_program):
        watcher, watched = watch(callback, state_structs())
    # What traced callbacks close over may be traced, too.
    in_program = in_program or is_traced(watched)
    stepwise = not (in_program or all(of_program))
    recipe = Recipe(
        objective.program,
        optimizer,
        [_caller_dtype(x, in_program) for x in jax.tree.leaves(params)],
        jnp.result_type(int),
        tests=tests,
        watch=None if stepwise else watcher,
    )
    if stepwise:
        return _solve_stepwise(
            recipe, captured, params, max_steps, tolerances, callback, first
        )
    operands = (params, captured, max_steps, tolerances)
    if in_program or not recipe.cacheable:
        return solve_in_program(recipe, *operands, linear_solver, watched, first)
    with jax.enable_x64():
        return compiled(recipe).solve(*operands, watched, first)


@jax_enable_x64
def _solve_stepwise(
    recipe: Recipe,
    captured: Sequence[Array],
    params: PyTree,
    max_steps: int,
    tolerances: Tolerances,
    callback: CallbackFnType,
    first: SolverState | None,
) -> optx.Solution:
    """The solve as a Python loop, with the callback called between compiled steps."""
    program = compiled(recipe)
    begin = program.start(params) if first is None else first
    y, opt_state = begin.params, begin.minimiser.opt_state
    memory, limits = None, None
    if not tolerances.off:
        old = begin.minimiser
        memory = Memory(old.loss, old.grad, old.update)
        limits = Tolerances(*map(jnp.asarray, tolerances))
    told, steps, stopped = None, int(begin.minimiser.step), None
    result = optx.RESULTS.nonlinear_max_steps_reached
    lane, step = Lane(), program.step
    for i in range(steps, max_steps):
        y, opt_state, told, stopped = step(y, opt_state, memory, captured, limits)
        if limits is not None:
            memory = told
            if stopped:
                result = optx.RESULTS.successful
                break
        steps = i + 1
        info = CallbackArgs(i, told.loss, told.grad, y, opt_state)
        info.told_by(lane, _state_after, begin, steps, y, opt_state, told)
        if callback(info):
            result = optx.RESULTS.successful
            break
    end = begin if told is None else _state_after(begin, steps, y, opt_state, told)
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(y)):
        result = optx.RESULTS.nonfinite
    if stopped is not None:
        end = eqx.tree_at(lambda s: s.minimiser.stopped, end, stopped)
    return optx.Solution(
        value=program.in_dtypes(end.params),
        result=result,
        aux=None,
        stats=recipe.stats(end.minimiser, jnp.asarray(max_steps)),
        state=end,
    )


def _state_after(
    begin: SolverState, step: int, y: PyTree, opt_state: PyTree, memory: Memory
) -> SolverState:
    """The whole state after a number of steps."""
    minimiser = memory.put_into(begin.minimiser)
    with jax.enable_x64():  # a callback may ask for the state in whatever setting
        step_array = jnp.asarray(step, minimiser.step.dtype)
    changed = lambda s: (s.step, s.opt_state)  # noqa: E731
    return SolverState(y, eqx.tree_at(changed, minimiser, (step_array, opt_state)))


def _float64_struct(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), "float64")


def _caller_dtype(x: Any, in_program: bool) -> Any:
    dtype = getattr(x, "dtype", None)
    if dtype is None:  # a Python number: the float that JAX makes of one outside
        return jnp.result_type(float)
    # A NumPy float64 array stays what it is, but does not enter a float32 program.
    return jax.dtypes.canonicalize_dtype(dtype) if in_program else dtype
