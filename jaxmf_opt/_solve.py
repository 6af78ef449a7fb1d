"""One call, checked, sent the way it has to go."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array

from ._jax.debugging import alarms, no_alarms, own_transfers, raise_alarm
from ._jax.fork import check_process
from ._jax.staging import inside_region
from ._jax.x64 import caller_dtype, float64_struct, is_traced
from ._solver.compilation import compiled
from ._solver.compiled_callbacks import CompiledCallbacks, compile_callbacks
from ._solver.implicit import solve_in_program
from ._solver.objective import trace
from ._solver.optimizers import DEFAULT_OPTIMIZER, closed_over
from ._solver.resume import matches_problem, resume_state, start
from ._solver.solution import Solution, statuses, throw_failure
from ._solver.spec import SolveSpec, Tolerances
from ._solver.state import SolverState
from ._solver.stepwise import solve_stepwise
from ._typing import PyTree, Tolerance
from ._validation import (
    check_callable,
    check_flag,
    check_history,
    check_linear_solver,
    check_optimizer,
    check_params,
    check_state,
    check_steps,
    check_tolerance,
)
from .callbacks._args import CallbackFnType, flatten_callbacks, traced


def solve(
    loss_fn: Callable[..., Any],
    params: PyTree,
    args: PyTree = ...,
    *,
    has_aux: bool = False,
    max_optimizer_steps: int = 250,
    grad: bool = False,
    callback: CallbackFnType | None = None,
    optimizer: optax.GradientTransformation = DEFAULT_OPTIMIZER,
    rtol: Tolerance = 1e-8,
    atol: Tolerance = 0.0,
    gtol: Tolerance = 0.0,
    linear_solver: lx.AbstractLinearSolver[Any] | None = None,
    state: SolverState | Sequence[Array | np.ndarray] | None = None,
    history: bool = False,
    throw: bool = False,
) -> Solution:
    """Minimises a loss, and returns an `optimistix.Solution`.

    Under `jax.jit`, the whole solution can be returned. Under `jax.vmap`, every lane
    has its own: one that fails takes nothing from the others.

    Args:
      loss_fn: As in `optimize`, like all the arguments down to `linear_solver`; called
        as `loss_fn(params, args)` if there are `args`.
      params: The starting point.
      args: What the loss takes beside its parameters, a pytree: data, for example.
        Arrays and numbers in it are operands, so that other values of them compile
        nothing again, and the solution has derivatives with respect to them.
      has_aux: Whether `loss_fn` returns a pair of the loss and something else (with
        `grad`, a pair of that pair and the gradient, as `jax.value_and_grad` does).
      max_optimizer_steps: The limit of steps. To reach it is a status, no exception.
      grad: Whether `loss_fn` returns its gradient too.
      callback: Called after each step.
      optimizer: An optax transformation.
      rtol: Relative tolerance of the Cauchy criterion. The default is about the square
        root of the precision of float64: the loss is flat at its minimum, so that a
        smaller step does not change it. With all three tolerances at 0 the solve takes
        the steps of `optimize`.
      atol: Absolute tolerance of the Cauchy criterion.
      gtol: Tolerance for the max-norm of the gradient.
      linear_solver: For the linear system of the derivative.
      state: Where to go on: the `state` of a solution of the same problem, or what a
        `callbacks.Checkpoint` has kept of it. `params` then gives dtypes only. The
        steps that follow are those that the earlier run would have taken, to the bit.
        Whether to stop is decided again, by this call's tolerances and callback; a
        state of a run with tolerances will do without, and the other way round.
      history: Whether to record each step.
      throw: Whether to raise if the result is no success. (Inside a compiled program
        that takes a call to the host.)

    Returns:
      An `optimistix.Solution`:

      * `value`: the last point whose loss is finite (it is the last point, unless the
        result is `nonfinite`), with the structure and dtypes of `params`. NaN if there
        is none; without a step, `params`.
      * `result`: an `optimistix.RESULTS`. `successful`: a tolerance was met, a callback
        asked to stop, the gradient is exactly zero, or the line search of
        `DEFAULT_OPTIMIZER` can move nothing any more where the gradient is as small as
        rounding lets one expect. `stagnation`: it can move nothing, and the gradient is
        larger. `nonlinear_max_steps_reached`. `nonfinite`: the loss, its gradient or
        the parameters are not finite at the end.
      * `stats`: `num_steps`, `max_steps`; `loss` and `grad_norm` (the max-norm of the
        gradient) at `value`; `num_loss_evaluations`, with or without a gradient, and
        `num_grad_evaluations` (-1 if the optimizer evaluates the loss in a way of its
        own); with `history`, a `History` of arrays of length `max_optimizer_steps`:
        `loss` and `grad_norm` where each step started, and `step_size`, the max-norm
        of what it added to the parameters, NaN for steps that this run has not taken.
        All are integers and floats of the caller's setting of `jax_enable_x64`, in
        which an integer that is too large is -1 and a float inf; `Solution.loss` is
        float64.
      * `state`: a `SolverState`, to go on from. Its floats are float64.
      * `aux`: with `has_aux`, what `loss_fn` returns beside the loss at `value`.

      Derivatives are those of the minimum: `value` has one, and so have the loss there
      (`loss`, and in `stats`) and `aux`. All else is constant to JAX.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument has an impossible value, or if `state` is that of
        another problem: if `loss_fn` has another value where the state has been. (If
        values are traced this cannot be raised; the solution is NaN then, and its
        result `nonfinite`.)
      RuntimeError: If the process was forked off one that had used JAX.
      equinox.EquinoxRuntimeError: With `throw`, if the result is no success.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda x: jnp.sum(jnp.cosh(x - 1.0))
      >>> first = solve(loss, jnp.zeros(2), max_optimizer_steps=3)
      >>> first.stats["num_steps"]
      Array(3, dtype=int32)
      >>> solve(loss, jnp.zeros(2), rtol=1e-6, state=first.state).value
      Array([1., 1.], dtype=float32)
    """
    check_flag("has_aux", has_aux)
    if args is not ... or has_aux:  # else `minimise` sees the loss itself
        check_callable("loss_fn", loss_fn, arguments=1 if args is ... else 2)
        check_flag("grad", grad)
    loss = loss_fn
    if args is not ...:
        with jax.enable_x64():
            operands = jax.tree.map(_as_operand, args)
        loss = lambda params: loss_fn(params, operands)  # noqa: E731
    solution = minimise(
        _without_aux(loss, grad=grad) if has_aux else loss,
        params,
        max_optimizer_steps=max_optimizer_steps,
        grad=grad,
        callback=callback,
        optimizer=optimizer,
        rtol=rtol,
        atol=atol,
        gtol=gtol,
        linear_solver=linear_solver,
        state=state,
        history=history,
        throw=throw,
    )
    if not has_aux:
        return solution
    # In the types of the value: 64-bit ones are there if the caller has brought them.
    bits = any(x.dtype == jnp.float64 for x in jax.tree.leaves(solution.value))
    with jax.enable_x64() if bits else contextlib.nullcontext():
        result = loss_fn(solution.value, *(() if args is ... else (args,)))
    return dataclasses.replace(solution, aux=(result[0] if grad else result)[1])


def _as_operand(x: Any) -> Any:
    """A number, or an array of NumPy, as one of JAX, which is no part of a program."""
    is_given = isinstance(x, (bool, int, float, complex, np.ndarray, np.generic))
    return jnp.asarray(x) if is_given else x


def _without_aux(loss_fn: Callable[..., Any], *, grad: bool) -> Callable[..., Any]:
    """A loss that returns nothing else (but its gradient)."""

    def loss(params: PyTree) -> Any:
        result = loss_fn(params)
        with_aux = result
        if grad and isinstance(result, tuple) and len(result) == 2:
            with_aux = result[0]
        if not (isinstance(with_aux, tuple) and len(with_aux) == 2):
            wanted = "((loss, aux), gradient)" if grad else "(loss, aux)"
            raise TypeError(
                f"`loss_fn` must return {wanted}, as `has_aux` is True"
                + (" and so is `grad`" if grad else "")
                + f"; got {result!r}."
            )
        return (with_aux[0], result[1]) if grad else with_aux[0]

    return loss


def minimise(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *,
    max_optimizer_steps: int,
    grad: bool,
    callback: CallbackFnType | None,
    optimizer: optax.GradientTransformation,
    rtol: Tolerance,
    atol: Tolerance,
    gtol: Tolerance,
    linear_solver: lx.AbstractLinearSolver[Any] | None,
    state: SolverState | Sequence[Array | np.ndarray] | None = None,
    history: bool = False,
    throw: bool = False,
    only_value: bool = False,
) -> Solution:
    """As `solve`; with `only_value` a stall is `stagnation`, wherever it is."""
    check_process()
    check_callable("loss_fn", loss_fn)
    check_params(params)
    max_steps = check_steps(max_optimizer_steps)
    check_flag("grad", grad)
    if callback is not None:
        check_callable("callback", callback)
    check_optimizer(optimizer)
    check_linear_solver(linear_solver)
    check_history(history, max_steps)
    check_flag("throw", throw)
    tolerances = Tolerances(rtol, atol, gtol)
    for name, value in tolerances._asdict().items():
        check_tolerance(name, value)

    structs = jax.tree.map(float64_struct, params)
    objective = trace(loss_fn, structs, grad=grad)
    captured = objective.captured
    tests = not tolerances.off

    def state_structs(tests: bool = tests) -> SolverState:
        with inside_region():
            of_state = functools.partial(start, optimizer, tests=tests)
            return jax.eval_shape(of_state, structs)

    callbacks = flatten_callbacks(callback)
    first = None
    if state is not None:
        first = check_state(state, state_structs(), state_structs(not tests))
        with inside_region(), no_alarms():
            first = resume_state(first, optimizer, tests=tests, is_seen=bool(callbacks))
    arrays = (params, captured, tolerances, closed_over(optimizer), first)
    in_program = is_traced(arrays)
    of_program = [isinstance(c, traced) for c in callbacks]
    in_loop, callback_consts = None, []
    if any(of_program) or (callbacks and in_program):
        in_loop, callback_consts = compile_callbacks(callback, state_structs())
    # What traced callbacks close over may be traced, too.
    in_program = in_program or is_traced(callback_consts)
    stepwise = not (in_program or all(of_program))
    spec = SolveSpec(
        objective.program,
        optimizer,
        tuple(caller_dtype(x, in_program=in_program) for x in jax.tree.leaves(params)),
        jnp.result_type(int),
        jnp.result_type(float),
        tests=tests,
        history=max_steps if history else None,
        callbacks=CompiledCallbacks((), None) if stepwise else in_loop,
    )
    if first is not None and not in_program:
        with jax.enable_x64():
            _check_problem(spec, captured, first)
    operands = (params, captured, max_steps, tolerances)
    if in_program or not (stepwise or spec.cacheable):
        solution = solve_in_program(
            spec, *operands, linear_solver, callback_consts, first
        )
    else:
        if stepwise:
            # (There is one, as there is nothing else that goes step by step.)
            python = cast(CallbackFnType, callback)
            solution = solve_stepwise(spec, *operands, python, first)
        else:
            with jax.enable_x64():
                solution = compiled(spec).solve(*operands, callback_consts, first)
        if not only_value:
            solution = _judged(spec, captured, solution)
    if alarms() and not is_traced(solution):
        of, end = solution.stats, solution.state
        results = (solution.value, of["loss"], of["grad_norm"], end.minimiser.loss)
        with jax.enable_x64():
            raise_alarm(results, spec.program.loss, end.params, captured)
    return throw_failure(solution) if throw else solution


def _judged(spec: SolveSpec, captured: Sequence[Array], solution: Solution) -> Solution:
    """The solution, whose stall is judged; nothing is compiled if there is none."""
    with jax.enable_x64():
        if not is_traced(solution):
            with own_transfers():
                if statuses(solution.result) != "stagnation":
                    return solution
        return compiled(spec).judge_stall(solution, captured)


def _check_problem(spec: SolveSpec, captured: Sequence[Array], state: Any) -> None:
    """Refuses the state of another problem."""
    loss = compiled(spec).loss
    last = state.minimiser.last_finite
    there = loss(last.params, captured)
    if not matches_problem(state, there):
        raise ValueError(
            "`state` must be that of a solve of the same problem; its last loss is "
            f"{float(last.loss):.12g}, and `loss_fn` is {float(there):.12g} at the "
            "same point. To start again from there, give its point as `params`."
        )
