"""The optimistix minimiser around an optax transformation."""

# pyright: reportIncompatibleMethodOverride=false
# (OptaxMinimiser names its own state, a private class, in the types of its methods.)

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeAlias, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar
from optimistix import RESULTS

from ._custom_types import Aux, Y
from ._select import select, select_if_batched

# A tolerance: a number, or an array so that it can be batched.
Tolerance: TypeAlias = float | int | Float[Array, ""]


class MinimiserState(eqx.Module, Generic[Y, Aux]):
    """The explicit state of a `LeanOptaxMinimiser`. Every leaf is an array.

    Attributes:
      step: How many steps have been taken.
      loss: The loss at the point that the last step started from.
      grad: The gradient at that point.
      aux: What the loss returned beside its value at that point.
      update: The last step itself, the difference of two iterates. None where no
        tolerance is on: nobody asks for it, and to keep it changes how XLA rounds.
      opt_state: The state of the optax transformation.
      stopped: Whether a tolerance has been met: there is no step left to take.
      interrupted: Whether a callback has asked to stop; None if there is none to ask.
      reuses_linesearch: Whether `opt_state` ends in a line search that stores value and
        gradient at the point it accepts.
    """

    step: Int[Array, ""]
    loss: Float[Array, ""]
    grad: Y
    aux: Aux
    update: Y | None
    opt_state: PyTree
    stopped: Bool[Array, ""]
    reuses_linesearch: bool = eqx.field(static=True)
    interrupted: Bool[Array, ""] | None = None


class SolverState(NamedTuple):
    """All that a solve needs to go on.

    Attributes:
      params: The current point, float64.
      minimiser: The state of the minimiser.
    """

    params: PyTree
    minimiser: MinimiserState


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
    step whose test says stop does not move and is not counted. Where all tolerances
    are the float 0 there is no test, and outside a batch the compiled step is that of
    a plain optax loop, to the bit.

    Example:
      As a solver of optimistix::

        solver = LeanOptaxMinimiser(optax.lbfgs(), rtol=1e-8, atol=1e-8)
        solution = optimistix.minimise(fn, solver, y0)
    """

    gtol: Tolerance

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
            `atol + rtol * abs(loss)`. A step that is exactly zero (a warm-up schedule,
            a `MultiSteps` that accumulates) is no sign of convergence.
          atol: Absolute tolerance of the Cauchy criterion.
          gtol: Stop once `norm` of the gradient is at most this. All three tolerances
            are off by default; if any is on, a gradient of exactly 0 stops too.
          norm: The norm of the criteria.
          verbose: As in `optimistix.OptaxMinimiser`.
        """
        # optimistix says float, and computes with arrays just as well.
        rtol, atol = cast(float, rtol), cast(float, atol)
        optim = optax.with_extra_args_support(optim)
        super().__init__(optim, rtol, atol, norm, verbose)
        self.gtol = gtol

    def init(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: PyTree,
        options: dict[str, Any],
        f_struct: PyTree[jax.ShapeDtypeStruct],
        aux_struct: PyTree[jax.ShapeDtypeStruct],
        tags: frozenset[object],
    ) -> MinimiserState[Y, Aux]:
        """The state before the first step. Nothing is evaluated.

        With `options={"state": state}` it is that state, to go on from there.
        """
        del fn, args, tags
        if "state" in options:
            return options["state"]
        zeros = jax.tree.map(jnp.zeros_like, y)
        opt_state = jax.tree.map(jnp.asarray, self.optim.init(y))
        no_aux = not jax.tree.leaves(aux_struct)
        return MinimiserState(
            step=jnp.array(0),
            loss=jnp.array(jnp.inf, f_struct.dtype),
            grad=zeros,
            aux=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), aux_struct),
            update=zeros if self._tests else None,
            opt_state=opt_state,
            stopped=jnp.array(False),
            reuses_linesearch=no_aux and _stored(opt_state, y) is not None,
        )

    def step(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: PyTree,
        options: dict[str, Any],
        state: MinimiserState[Y, Aux],
        tags: frozenset[object],
    ) -> tuple[Y, MinimiserState[Y, Aux], Aux]:
        """Evaluates at `y`, tests, and moves unless the test says stop."""
        del options, tags
        loss, aux, grad = self._evaluate(fn, y, args, state)
        self.verbose(
            num_steps=("Step", state.step),
            loss_this_step=("Loss on this step", loss),
            y=("y", y),
        )
        step, stopped = state.step + 1, state.stopped
        if self._tests:
            stopped = stopped | self._converged(y, state, loss, grad)
            step = jnp.where(stopped, state.step, step)
        update, opt_state = self._search(fn, y, args, state, ~stopped, loss, grad)
        if not self._tests:
            stopped = stopped | self._stalled(y, loss, grad, update, opt_state)
        if self._tests:
            # If no step was made, those of the last: to decide alike if asked again.
            old, new = (state.loss, state.grad, state.update), (loss, grad, update)
            loss, grad, kept_update = select(stopped, old, new)
        else:
            kept_update = None
        new_state = MinimiserState(
            step=step,
            loss=loss,
            grad=grad,
            aux=aux,
            update=kept_update,
            opt_state=opt_state,
            stopped=stopped,
            reuses_linesearch=state.reuses_linesearch,
            interrupted=state.interrupted,
        )
        new_y = cast(Y, optax.apply_updates(cast(Any, y), cast(Any, update)))
        return new_y, new_state, aux

    def terminate(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: PyTree,
        options: dict[str, Any],
        state: MinimiserState[Y, Aux],
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], RESULTS]:
        """Whether the last step met a tolerance."""
        del fn, y, args, options, tags
        return state.stopped, RESULTS.successful

    def postprocess(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        aux: Aux,
        args: PyTree,
        options: dict[str, Any],
        state: MinimiserState[Y, Aux],
        tags: frozenset[object],
        result: RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        """Counts the steps that moved, not the one that only tested."""
        del fn, args, options, tags, result
        return y, aux, {"num_steps": state.step}

    def _stalled(
        self, y: Y, loss: Scalar, grad: Y, update: Y, opt_state: PyTree
    ) -> Bool[Array, ""]:
        """Whether it is proven that `y` will never move again. Not known in general."""
        del y, loss, grad, update, opt_state
        return jnp.array(False)

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
    ) -> tuple[Scalar, Aux, Y]:
        """Loss, aux and gradient at `y`: the stored ones if there are any."""

        def compute(_: Any) -> tuple[Bool[Array, ""], Scalar, Aux, Y]:
            (loss, aux), grad = jax.value_and_grad(fn, has_aux=True)(y, args)
            return jnp.array(False), loss, aux, grad

        stored = _stored(state.opt_state, y) if state.reuses_linesearch else None
        if stored is None:
            return compute(None)[1:]
        # A loop of at most one turn, because a batched `cond` evaluates both of its
        # branches in every step, a batched loop only where some lane needs it.
        missing = ~jnp.isfinite(stored.value)
        known = (missing, stored.value, state.aux, stored.grad)
        return jax.lax.while_loop(lambda carry: carry[0], compute, cast(Any, known))[1:]

    def _converged(
        self, y: Y, state: MinimiserState[Y, Aux], loss: Scalar, grad: Y
    ) -> Bool[Array, ""]:
        def ratio(difference: Array, of: Array) -> Array:
            scale = self.atol + self.rtol * jnp.abs(of)
            # What stays at exactly 0, a masked parameter for example, is converged.
            return jnp.where(difference == 0, 0.0, jnp.abs(difference) / scale)

        def small(difference: PyTree, of: PyTree) -> Bool[Array, ""]:
            return self.norm(jax.tree.map(ratio, difference, of)) < 1

        moved = optx.max_norm(state.update) > 0
        cauchy = small(state.update, y) & small(loss - state.loss, loss)
        return (moved & cauchy) | (self.norm(grad) <= self.gtol)

    def _search(
        self,
        fn: Callable[[Y, Any], tuple[Scalar, Aux]],
        y: Y,
        args: PyTree,
        state: MinimiserState[Y, Aux],
        active: Bool[Array, ""],
        loss: Scalar,
        grad: Y,
    ) -> tuple[Y, PyTree]:
        """The update and the new state of the optax transformation.

        A batched line search goes on until its last lane is content. A lane that has
        stopped is therefore shown a fresh optimizer on the constant function 0, at a
        point of infinite loss: its first trial is accepted.
        """
        # Where nothing is tested, only a batch can have stopped lanes.
        choose = select if self._tests else select_if_batched
        zeros = jax.tree.map(jnp.zeros_like, grad)
        shown_loss, shown_grad, shown_state = choose(
            active,
            (loss, grad, state.opt_state),
            (jnp.full_like(loss, jnp.inf), zeros, self.optim.init(y)),
        )

        def shown_fn(y: Y) -> Scalar:
            return choose(active, fn(y, args)[0], jnp.zeros_like(loss))

        update, opt_state = self.optim.update(
            shown_grad,
            shown_state,
            y,
            value=shown_loss,
            grad=shown_grad,
            value_fn=shown_fn,
        )
        return choose(active, (update, opt_state), (zeros, state.opt_state))


def _stored(
    opt_state: PyTree, y: PyTree
) -> optax.ScaleByZoomLinesearchState | optax.ScaleByBacktrackingLinesearchState | None:
    """The line search at the very end of a chain, if it keeps value and gradient.

    Only there is what it accepted what the minimiser moves to. A transformation behind
    it, or one that wraps the whole (`MultiSteps`, `inject_hyperparams`), may change the
    step, so then nothing is reused.
    """
    while type(opt_state) is tuple and opt_state:
        opt_state = opt_state[-1]
    kinds = (optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)
    if not isinstance(opt_state, kinds) or opt_state.grad is None:
        return None
    same_shapes = jax.tree.structure(opt_state.grad) == jax.tree.structure(y) and all(
        g.shape == x.shape
        for g, x in zip(
            jax.tree.leaves(opt_state.grad), jax.tree.leaves(y), strict=True
        )
    )
    return opt_state if same_shapes else None
