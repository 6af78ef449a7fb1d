"""The optimistix minimiser around an optax transformation."""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar
from optimistix import RESULTS

from .._jax.select import cond, select, select_if_batched
from .._typing import Aux, Tolerance, Y
from .._validation import check_callable, check_optimizer, check_tolerance
from .convergence import all_finite, meets_tolerance
from .linesearch import count_trials, ends_with_linesearch, stored, without_trials
from .optimizers import as_optax_expects, as_pytree
from .state import Evaluated, Evaluations, History, MinimiserState, Move, Movement
from .stationarity import (
    KnowsItsEnds,
    default_stands_still,
    evaluates_start,
    is_default,
)

# A MinimiserState. OptaxMinimiser names a private class in the types of its methods.
State: TypeAlias = Any


class LeanOptaxMinimiser(optx.OptaxMinimiser[Y, Aux]):
    """An `optimistix.OptaxMinimiser` that evaluates each point once.

    It takes the steps of `optimistix.OptaxMinimiser`, and of a plain optax loop, with
    three differences:

    * Loss and gradient are part of the state. If the line search has stored them at the
      point that it accepted (optax's zoom line search does, and its backtracking one
      with `store_grad=True`), they are not computed again.
    * Whether to stop is decided from the loss and gradient at the new point, *before*
      its line search: at a minimum, line searches are long and lead nowhere.
    * In a batch (under `jax.vmap`), a lane that has stopped takes part in the line
      searches of the others with a constant function, which ends its own at once.

    A step consists of the evaluation at the current point, the test, and the move. A
    step whose test says stop does not move and is not counted. Nor is the first one of
    `ROBUST_OPTIMIZER`, in which its line search evaluates the start. Where all
    tolerances are the float 0 there is no test, and outside a batch the compiled step
    is that of a plain optax loop, to the bit.

    Example:
      As a solver of optimistix:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optimistix as optx
      >>> solver = LeanOptaxMinimiser(optax.lbfgs(), rtol=1e-5, atol=1e-5)
      >>> fn = lambda y, shift: jnp.sum((y - shift) ** 2)
      >>> optx.minimise(fn, solver, jnp.zeros(2), args=2.0).value
      Array([2., 2.], dtype=float32)
    """

    gtol: Tolerance
    _moves_as_searched: bool = eqx.field(static=True)
    _is_default: bool = eqx.field(static=True)
    _evaluates_start: bool = eqx.field(static=True)

    def __init__(
        self,
        optim: optax.GradientTransformation,
        rtol: Tolerance = 0.0,
        atol: Tolerance = 0.0,
        gtol: Tolerance = 0.0,
        norm: Callable[[PyTree], Scalar] = optx.max_norm,
        verbose: bool | Callable[..., None] = False,
    ):
        """Wraps an optax transformation.

        Args:
          optim: Any optax transformation, with or without a line search. Arrays that
            its functions close over (learning rates, for example) become leaves of this
            minimiser, which is a pytree.
          rtol: Relative tolerance of the Cauchy criterion: stop once a step is smaller
            than `atol + rtol * abs(y)` and has changed the loss by less than
            `atol + rtol * abs(loss)`. A small step alone is no sign of convergence: the
            gradient has to be small, too, relatively to loss and parameters and to the
            curvature that the step has met.
          atol: Absolute tolerance of the Cauchy criterion.
          gtol: Stop once `norm` of the gradient is at most this. All three tolerances
            are off by default; if any is on, a gradient of exactly 0 stops too.
          norm: The norm of the criteria.
          verbose: As in `optimistix.OptaxMinimiser`.

        Raises:
          TypeError: If an argument is of the wrong kind.
          ValueError: If a tolerance is negative or NaN.
        """
        check_optimizer(optim, "optim")
        for name, tolerance in (("rtol", rtol), ("atol", atol), ("gtol", gtol)):
            check_tolerance(name, tolerance)
        check_callable("norm", norm)
        # optimistix says float, and computes with arrays just as well.
        rtol, atol = cast(float, rtol), cast(float, atol)
        optim = optax.with_extra_args_support(optim)
        super().__init__(optax.identity(), rtol, atol, norm, verbose)
        self.optim = as_pytree(optim)
        self.gtol = gtol
        self._moves_as_searched = ends_with_linesearch(optim)
        self._is_default = is_default(optim)
        self._evaluates_start = not verbose and evaluates_start(optim)

    def init(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: PyTree,
        options: dict[str, Any],
        f_struct: PyTree[jax.ShapeDtypeStruct],
        aux_struct: PyTree[jax.ShapeDtypeStruct],
        tags: frozenset[object],
    ) -> State:
        """The state before the first step. Nothing is evaluated.

        Args:
          fn: The loss.
          y: The starting point.
          args: What the loss takes beside it.
          options: May have five entries. "state": the state to go on from, with what
            it records, instead of a new one. "limit": the number of steps to take at
            most; the point that the last of them leads to is then evaluated, too.
            "history": how many steps to record. "stop_if_stalled": whether to stop
            where the optimizer provably stands still. "stop_if_nonfinite": whether to
            stop behind a step from a point that is not finite.
          f_struct: The shape and dtype of the loss.
          aux_struct: Those of what it returns beside its value.
          tags: Unused.

        Returns:
          The state.
        """
        del fn, args, tags
        if "state" in options:
            return options["state"]
        dtype = f_struct.dtype
        history = None
        if options.get("history") is not None:
            history = History.of_no_steps(options["history"])
        zeros = jax.tree.map(jnp.zeros_like, y)
        with as_optax_expects():
            opt_state = jax.tree.map(jnp.asarray, self.optim.init(y))
        no_aux = not jax.tree.leaves(aux_struct)
        unknown, no = jnp.array(jnp.nan, dtype), jnp.array(False)
        ended = ~all_finite(y) if options.get("stop_if_nonfinite") else no
        none = jnp.array(0, int)
        return MinimiserState(
            step=none,
            loss=jnp.array(jnp.inf, dtype),
            grad=zeros,
            aux=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), aux_struct),
            movement=Movement.none(y, dtype) if self._tests else None,
            opt_state=opt_state,
            converged=no,
            stalled=no,
            interrupted=no,
            ended=ended,
            first_loss=unknown,
            last_finite=Evaluated(y, unknown, unknown),
            evaluations=Evaluations(none, none),
            history=history,
            reuses_linesearch=(
                no_aux and self._moves_as_searched and stored(opt_state, y) is not None
            ),
        )

    def step(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: PyTree,
        options: dict[str, Any],
        state: State,
        tags: frozenset[object],
    ) -> tuple[Y, State, Aux]:
        """Evaluates at `y`, tests, and moves unless there is a reason not to."""
        del tags
        loss, aux, grad, fresh, is_known = self._evaluate(fn, y, args, state)
        self.verbose(
            num_steps=("Step", state.step),
            loss_this_step=("Loss on this step", loss),
            y=("y", y),
        )
        here = Evaluated(y, loss, self.norm(grad).astype(loss.dtype))
        is_finite = jnp.isfinite(loss) & all_finite(y)

        converged = state.converged
        if self._tests:
            tolerances = (self.rtol, self.atol, self.gtol)
            met = meets_tolerance(tolerances, self.norm, y, state, loss, grad)
            converged = converged | (is_known & met)
        ended = converged | state.stalled | state.interrupted
        if options.get("limit") is not None:
            ended = ended | (is_known & (state.step >= options["limit"]))
        is_last = ended
        if options.get("stop_if_nonfinite"):
            is_last = ended | ~all_finite(y)

        def move() -> Move:
            stop = options.get("stop_if_stalled", False)
            return self._move(fn, y, args, state, ~ended, loss, grad, stop)

        def stay() -> Move:
            zeros = jax.tree.map(jnp.zeros_like, grad)
            none = Evaluations(jnp.array(0), jnp.array(0))
            return Move(y, zeros, state.opt_state, jnp.array(False), none)

        if self._tests or options.get("limit") is not None:
            # (Two computations of their own. In a batch both are run, see `_move`.)
            to = cond(ended, stay, move)
        else:
            to = move()
        stalled, moves = is_known & to.stalled, is_known & ~ended

        history, movement = state.history, None
        if history is not None and history.loss.size:
            row = History(loss, optx.max_norm(grad), optx.max_norm(to.update))
            index = jnp.where(moves, state.step, history.loss.size)
            write = lambda h, x: h.at[index].set(x, mode="drop")  # noqa: E731
            history = jax.tree.map(write, history, row)
        if state.movement is not None:
            # If no step is made, the last: to decide alike if asked again.
            new = Movement(to.update, loss, grad)
            movement = select(ended, state.movement, new)
        new_state = MinimiserState(
            step=jnp.where(moves, state.step + 1, state.step),
            loss=loss,
            grad=grad,
            aux=aux,
            movement=movement,
            opt_state=to.opt_state,
            converged=converged,
            stalled=state.stalled | stalled,
            interrupted=state.interrupted,
            # (What has stalled is still where it was evaluated.)
            ended=is_last | stalled,
            first_loss=jnp.where(is_known & (state.step == 0), loss, state.first_loss),
            last_finite=select(is_finite, here, state.last_finite),
            evaluations=state.evaluations.plus(fresh, to.evaluations),
            history=history,
            reuses_linesearch=state.reuses_linesearch,
        )
        return to.y, new_state, aux

    def terminate(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: PyTree,
        options: dict[str, Any],
        state: State,
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], RESULTS]:
        """Whether nothing is left to do."""
        del fn, y, args, options, tags
        return state.ended, RESULTS.successful

    def postprocess(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        aux: Aux,
        args: PyTree,
        options: dict[str, Any],
        state: State,
        tags: frozenset[object],
        result: RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        """Counts the steps that moved, not the one that only tested."""
        del fn, args, options, tags, result
        return y, aux, {"num_steps": state.step}

    @property
    def _tests(self) -> bool:
        """Whether some tolerance may be other than 0."""
        tolerances = (self.rtol, self.atol, self.gtol)
        return any(isinstance(t, jax.Array) or t != 0 for t in tolerances)

    def _evaluate(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: PyTree,
        state: MinimiserState[Y, Aux],
    ) -> tuple[Scalar, Aux, Y, Int[Array, ""], Bool[Array, ""]]:
        """Loss, aux and gradient at `y`, how often they were computed, and if at all.

        They are the stored ones if there are any. Of an optimizer that evaluates the
        start, they are not known in the first turn, which does nothing else.
        """
        yes = jnp.array(True)

        def evaluate(at: Y) -> tuple[Scalar, Aux, Y]:
            (loss, aux), grad = jax.value_and_grad(fn, has_aux=True)(at, args)
            return loss, aux, grad

        found = stored(state.opt_state, y) if state.reuses_linesearch else None
        if found is None:
            return *evaluate(y), jnp.array(1), yes
        known = cast(Any, (found.value, state.aux, found.grad))
        if self._evaluates_start:
            return *known, jnp.array(0), state.evaluations.loss > 0

        def compute(carry: Any) -> tuple[Bool[Array, ""], Scalar, Aux, Y]:
            # XLA must not see that no turn of the loop depends on the one before: in a
            # batch it would move the evaluation out, and so make it always.
            at, _ = jax.lax.optimization_barrier((y, carry[0]))
            return jnp.array(False), *evaluate(at)

        # A loop of at most one turn, because a batched `cond` evaluates both of its
        # branches in every step, a batched loop only where some lane needs it.
        missing = ~jnp.isfinite(found.value)
        evaluated = jax.lax.while_loop(
            lambda carry: carry[0], compute, (missing, *known)
        )
        return *evaluated[1:], missing.astype(int), yes

    def _move(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: PyTree,
        state: MinimiserState[Y, Aux],
        active: Bool[Array, ""],
        loss: Scalar,
        grad: Y,
        stop_if_stalled: bool,
    ) -> Move:
        """A step of the optax transformation.

        A batched line search goes on until its last lane is content. A lane that has
        ended is therefore shown a fresh optimizer on the constant function 0, at a
        point of infinite loss: its first trial is accepted.
        """
        zeros = jax.tree.map(jnp.zeros_like, grad)
        with as_optax_expects():
            fresh = self.optim.init(y)
        shown_loss, shown_grad, shown_state = select_if_batched(
            active,
            (loss, grad, state.opt_state),
            (jnp.full_like(loss, jnp.inf), zeros, fresh),
        )
        is_searching = False

        def shown_fn(trial: Y) -> Scalar:
            nonlocal is_searching
            is_searching = True
            trial = _in_dtypes_of(y, trial)
            return select_if_batched(active, fn(trial, args)[0], jnp.zeros_like(loss))

        with as_optax_expects():
            update, opt_state = self.optim.update(
                shown_grad,
                without_trials(shown_state),
                y,
                value=shown_loss,
                grad=shown_grad,
                value_fn=shown_fn,
            )
        # (With parameters in float32 in a float64 program, optax returns both.)
        update = _in_dtypes_of(zeros, update)
        opt_state = _in_dtypes_of(shown_state, opt_state)
        opt_state, evaluations = count_trials(
            shown_state, opt_state, is_searching=is_searching
        )
        update, opt_state = select_if_batched(
            active, (update, opt_state), (zeros, state.opt_state)
        )
        new_y = cast(Y, optax.apply_updates(cast(Any, y), cast(Any, update)))
        stalled = jnp.array(False)
        if stop_if_stalled and isinstance(self.optim, KnowsItsEnds):
            stalled = self.optim.stands_still(opt_state, update)
        elif stop_if_stalled and self._is_default:
            stalled = default_stands_still(y, loss, grad, update, opt_state)
        return Move(new_y, update, opt_state, stalled, evaluations)


def _in_dtypes_of(like: PyTree, tree: PyTree) -> Any:
    """The arrays of a tree in the dtypes of those of another."""

    def cast(x: Any, like: Any) -> Any:
        is_other = eqx.is_inexact_array(x) and x.dtype != like.dtype
        return x.astype(like.dtype) if is_other else x

    return jax.tree.map(cast, tree, like)
