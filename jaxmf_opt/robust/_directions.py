"""What makes the directions of `optax.scale_by_lbfgs` robust."""

from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

T = TypeVar("T")


class RescaledState(NamedTuple):
    """The state of `rescale_variables`.

    Attributes:
      lbfgs: The state of the wrapped L-BFGS, in the units of the parameters.
      curvature: For each variable an estimate of its second derivative, up to a common
        factor.
    """

    lbfgs: Any  # of optax, whose fields have wider types than one can compute with
    curvature: PyTree


class RestartState(NamedTuple):
    """The state of `restart_when_stuck`.

    Attributes:
      lbfgs: The state of the wrapped L-BFGS.
      is_fresh: Whether the last update was that of a fresh state.
    """

    lbfgs: Any
    is_fresh: Bool[Array, ""]


def skip_bad_pairs(lbfgs: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps pairs of no or negative curvature out of the memory.

    A step `s` that changes the gradient by `y` with `s'y <= 0` (or nan) makes the
    approximate Hessian indefinite, and the directions uphill. The memory, the scale
    included, is then left as it was. If it was empty, it stays so.

    Only the sign is tested: in a narrow valley a sound pair may have a cosine of 1e-12.

    Args:
      lbfgs: `optax.scale_by_lbfgs`.

    Returns:
      A transformation with the same state.
    """

    def update(
        updates: PyTree, state: Any, params: PyTree
    ) -> tuple[PyTree, optax.ScaleByLBFGSState]:
        step = optax.tree.sub(params, state.params)
        change = optax.tree.sub(updates, state.updates)
        accept = (_dot(step, change) > 0) | (state.count == 0)
        # The inner transformation always writes the newest pair, so it is shown the
        # last good one again, to be written where it already is.
        known = state.count > 1
        shown = where(known, _replay(state, updates, params), lbfgs.init(params))
        direction, new = lbfgs.update(updates, where(accept, state, shown), params)
        new = cast(optax.ScaleByLBFGSState, new)
        # The replay is exact up to rounding; what is kept is exact.
        kept = new._replace(
            diff_params_memory=state.diff_params_memory,
            diff_updates_memory=state.diff_updates_memory,
            weights_memory=state.weights_memory,
        )
        return direction, where(accept | ~known, new, kept)

    return optax.GradientTransformation(lbfgs.init, cast(Any, update))


def rescale_variables(
    lbfgs: optax.GradientTransformation,
    min_ratio: float = 1e2,
    max_ratio: float = 1e10,
) -> optax.GradientTransformation:
    """Runs L-BFGS in units in which the variables have about the same curvature.

    `optax.scale_by_lbfgs` starts each direction from a multiple of the identity, which
    is far off where the variables differ by orders of magnitude. Here it starts from a
    diagonal matrix: the diagonal of the BFGS update of a diagonal matrix, from each
    pair of positive curvature (Gilbert and Lemarechal, 1989, "Some numerical
    experiments with variable-storage quasi-Newton algorithms").

    As long as the units would be nearly alike they are all 1: there the diagonal says
    more about the last few steps than of the variables, and to follow it costs steps.

    The units are powers of two, so that to change them rounds nothing.

    Args:
      lbfgs: `optax.scale_by_lbfgs`, wrapped by `skip_bad_pairs` or not.
      min_ratio: By how much the units of two variables have to differ to be used.
      max_ratio: By how much the units of two variables may differ.

    Returns:
      A transformation whose state is a `RescaledState`.
    """

    def init(params: PyTree) -> RescaledState:
        ones = jax.tree.map(jnp.ones_like, params)
        return RescaledState(cast(Any, lbfgs.init(params)), ones)

    def update(
        updates: PyTree, state: RescaledState, params: PyTree
    ) -> tuple[PyTree, RescaledState]:
        old = state.lbfgs
        step = optax.tree.sub(params, old.params)
        change = optax.tree.sub(updates, old.updates)
        curvature = _diagonal_bfgs(state.curvature, step, change, max_ratio)
        usable = (old.count > 0) & (_dot(step, change) > 0) & _all_positive(curvature)
        curvature = where(usable, curvature, state.curvature)
        units = _units(curvature, min_ratio)
        shown = old._replace(
            params=_over(old.params, units),
            updates=_times(old.updates, units),
            diff_params_memory=_over(old.diff_params_memory, units),
            diff_updates_memory=_times(old.diff_updates_memory, units),
        )
        direction, new = lbfgs.update(
            _times(updates, units), shown, _over(params, units)
        )
        new = cast(optax.ScaleByLBFGSState, new)
        new = new._replace(
            params=params,
            updates=updates,
            diff_params_memory=_times(new.diff_params_memory, units),
            diff_updates_memory=_over(new.diff_updates_memory, units),
        )
        return _times(direction, units), RescaledState(new, curvature)

    return optax.GradientTransformation(cast(Any, init), cast(Any, update))


def restart_when_stuck(
    lbfgs: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Forgets everything where the direction or the last step is of no use.

    That is where the direction does not descend (or is nan), and where the parameters
    have not moved since the last update: the line search found no decrease.
    The update is then that of a fresh state, along the gradient.

    Only the sign of the slope is tested: in a narrow valley a sound direction may be
    nearly orthogonal to the gradient.

    Args:
      lbfgs: `optax.scale_by_lbfgs`, wrapped or not.

    Returns:
      A transformation whose state is a `RestartState`.
    """

    def init(params: PyTree) -> RestartState:
        return RestartState(lbfgs.init(params), jnp.array(True))

    def update(
        updates: PyTree, state: RestartState, params: PyTree
    ) -> tuple[PyTree, RestartState]:
        direction, new = lbfgs.update(updates, state.lbfgs, params)
        last = _innermost(state)
        step = optax.tree.sub(params, last.params)
        stayed = (last.count > 0) & (optax.tree.norm(step, ord=jnp.inf) == 0)
        # Not `<= 0`: a nan is no descent either.
        no_descent = ~(_dot(direction, updates) > 0)
        restarts = stayed | no_descent
        direction, new = jax.lax.cond(
            restarts,
            lambda: cast(Any, lbfgs.update(updates, lbfgs.init(params), params)),
            lambda: (direction, new),
        )
        return direction, RestartState(new, restarts | (last.count == 0))

    return optax.GradientTransformation(cast(Any, init), cast(Any, update))


def short_first_step(
    lbfgs: optax.GradientTransformation, fraction: float = 0.1
) -> optax.GradientTransformation:
    """Limits the first step after a (re)start to a fraction of the parameters' size.

    The first direction of `optax.scale_by_lbfgs` has length 1 (or less), whatever the
    units of the problem. Too short a step costs a few trials, since the line search
    doubles it; one too long can end in another valley (Hager and Zhang, 2006, start
    CG_DESCENT in this way).

    Args:
      lbfgs: `optax.scale_by_lbfgs`, wrapped or not.
      fraction: The largest change of a variable over the largest variable. At the
        origin, where there is no size to go by, nothing is limited.

    Returns:
      A transformation with the same state.
    """

    def update(updates: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        direction, new = lbfgs.update(updates, cast(Any, state), params)
        allowed = fraction * optax.tree.norm(params, ord=jnp.inf)
        length = optax.tree.norm(direction, ord=jnp.inf)
        first = _innermost(new).count == 1
        shorten = first & (allowed > 0) & (length > allowed)
        factor = jnp.where(shorten, allowed / length, 1.0)
        return optax.tree.scale(factor, direction), cast(Any, new)

    return optax.GradientTransformation(lbfgs.init, cast(Any, update))


def _innermost(state: Any) -> Any:
    """The state of `optax.scale_by_lbfgs` itself."""
    while not isinstance(state, optax.ScaleByLBFGSState):
        state = state.lbfgs
    return state


def _replay(state: Any, updates: PyTree, params: PyTree) -> Any:
    """The state of which the next update writes the newest pair of memory again."""
    memory_size = jnp.shape(state.weights_memory)[0]
    newest = (state.count - 2) % memory_size
    step, change = jax.tree.map(
        lambda memory: memory[newest],
        (state.diff_params_memory, state.diff_updates_memory),
    )
    return state._replace(
        count=state.count - 1,
        params=optax.tree.sub(params, step),
        updates=optax.tree.sub(updates, change),
    )


def _diagonal_bfgs(
    curvature: PyTree, step: PyTree, change: PyTree, max_ratio: float
) -> PyTree:
    """The diagonal of the BFGS update of a diagonal matrix, scaled to fit the pair."""
    slope = _dot(step, change)
    fit = _dot(change, _over(change, curvature)) / slope
    along = _dot(step, _times(step, curvature))

    def updated(c: Array, s: Array, y: Array) -> Array:
        new = fit * (c - (c * s) ** 2 / along) + y**2 / slope
        # Positive but for rounding, which this outlives.
        return jnp.maximum(new, 1e-10 * fit * c)

    new = jax.tree.map(updated, curvature, step, change)
    least = optax.tree.norm(new, ord=jnp.inf) / max_ratio**2
    return jax.tree.map(lambda c: jnp.maximum(c, least), new)


def _units(curvature: PyTree, min_ratio: float) -> PyTree:
    """The lengths over which variables of these curvatures do the same, or all 1."""
    units = jax.tree.map(lambda c: jnp.exp2(jnp.round(-jnp.log2(c) / 2)), curvature)
    largest = optax.tree.norm(units, ord=jnp.inf)
    smallest = 1 / optax.tree.norm(jax.tree.map(jnp.reciprocal, units), ord=jnp.inf)
    alike = largest < min_ratio * smallest
    return jax.tree.map(lambda u: jnp.where(alike, 1, u), units)


def _all_positive(tree: PyTree) -> Bool[Array, ""]:
    leaves = [jnp.all(jnp.isfinite(x) & (x > 0)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))


def where(condition: Bool[Array, ""], true: T, false: T) -> T:
    return jax.tree.map(lambda t, f: jnp.where(condition, t, f), true, false)


def _dot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    return optax.tree.real(optax.tree.vdot(a, b))


def _times(tree: PyTree, factors: PyTree) -> PyTree:
    return jax.tree.map(jnp.multiply, tree, factors)


def _over(tree: PyTree, factors: PyTree) -> PyTree:
    return jax.tree.map(jnp.divide, tree, factors)
