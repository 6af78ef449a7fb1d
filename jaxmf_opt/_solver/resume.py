"""Where a solve begins: at a point, or in the state in which another has ended."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from .convergence import all_finite
from .linesearch import stored
from .minimiser import LeanOptaxMinimiser
from .state import Evaluations, History, Movement, SolverState
from .stationarity import evaluates_start, is_default


def start(
    optimizer: optax.GradientTransformation,
    params: PyTree,
    *,
    tests: bool,
    history: int | None = None,
    stop_if_nonfinite: bool = False,
) -> SolverState:
    """The state before the first step.

    Args:
      optimizer: The optax transformation.
      params: The starting point, of any real dtypes.
      tests: Whether tolerances are looked at.
      history: How many steps to record, if any.
      stop_if_nonfinite: Whether there is nothing to do at a point that is not finite.

    Returns:
      The point, float64, and the state.
    """
    y = as_float64(params)
    minimiser = LeanOptaxMinimiser(optimizer, rtol=float(tests))
    options = {"history": history, "stop_if_nonfinite": stop_if_nonfinite}
    loss = jax.ShapeDtypeStruct((), jnp.float64)
    state = minimiser.init(_unused, y, None, options, loss, None, frozenset())
    return SolverState(y, state)


def with_history_buffer(state: SolverState, history: int | None) -> SolverState:
    """The state, to record as many steps as `history` says, with none recorded yet."""
    table = None if history is None else History.of_no_steps(history)
    return SolverState(state.params, state.minimiser.with_history(table))


def resume_state(
    state: SolverState,
    optimizer: optax.GradientTransformation,
    *,
    tests: bool,
    is_seen: bool,
) -> SolverState:
    """A state to go on from.

    Args:
      state: The state in which a run has ended.
      optimizer: By which to go on.
      tests: Whether there are tolerances. The state may be of a run without, and the
        other way round.
      is_seen: Whether there are callbacks. They see steps that change nothing, too.

    Returns:
      The state, ready for a run that decides by itself when to stop.
    """
    old = state.minimiser
    no = jnp.array(False)
    nonfinite = no if is_seen else ~all_finite(state.params)
    # It stands still by one optimizer, of which a state shows the shapes only. No other
    # whose states look like those of the default is ever said to.
    stalled = old.stalled if is_default(optimizer) and not is_seen else no
    # A run evaluates the point at which it ends. This one begins with that evaluation.
    again = jnp.array(1)
    known = stored(old.opt_state, state.params) if old.reuses_linesearch else None
    if known is not None:
        again = jnp.where(jnp.isfinite(known.value) | evaluates_start(optimizer), 0, 1)
    again = jnp.where(old.ended & ~old.stalled, again, 0)
    evaluations = Evaluations(
        *(jnp.where(n > 0, n - again, n) for n in old.evaluations)
    )
    movement = None
    if tests:
        movement = old.movement or Movement.none(state.params, old.loss.dtype)
    parts = lambda s: (  # noqa: E731
        *(s.converged, s.stalled, s.interrupted, s.ended),
        *(s.evaluations, s.movement),
    )
    ended = stalled | nonfinite
    new_parts = (no, stalled, no, ended, evaluations, movement)
    minimiser = eqx.tree_at(parts, old, new_parts, is_leaf=lambda x: x is None)
    return SolverState(state.params, minimiser)


def matches_problem(state: SolverState, loss: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a state is that of a problem.

    Args:
      state: The state.
      loss: The loss of the problem at the last finite point of the state.

    Returns:
      Whether it is the loss that the state remembers. Two compiled programs of one
      loss may differ in its last bits, which are last bits of larger numbers if the
      loss at the minimum is a small difference: hence the loss at the start as a scale.
      (Of that, not of more than what rounding makes of it. What a line search has
      stored is gone on from, so that another problem would have the old minimum.)
    """
    of = state.minimiser
    first = jnp.where(jnp.isfinite(of.first_loss), jnp.abs(of.first_loss), 0.0)
    allowed = 1e-8 * jnp.abs(of.last_finite.loss) + 1e-12 * first + 1e-20
    is_same = jnp.abs(loss - of.last_finite.loss) <= allowed
    return jnp.isnan(of.last_finite.loss) | is_same


def as_float64(params: PyTree) -> PyTree:
    """The parameters, of any real dtypes, in float64."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)


def _unused(*_: Any) -> Any:
    raise AssertionError("the minimiser evaluates nothing before its first step")
