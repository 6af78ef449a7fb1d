"""A line search for the weak Wolfe conditions, which can be met on kinks, too."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._solver.linesearch import register_linesearch
from .._validation import check_positive


class _Search(NamedTuple):
    """The state of one search: a bracket, and the next step to try.

    Attributes:
      trials: How many steps have been tried.
      step: The next one.
      low: The longest step so far that decreases enough, or 0; with the value, the
        slope and the gradient there. It is where the search ends.
      low_value: See `low`.
      low_slope: See `low`.
      low_grad: See `low`.
      high: The shortest step so far that does not decrease enough, or infinity.
      high_value: The value there.
      done: Whether `low` fulfils both conditions, or nothing is left to try.
    """

    trials: Int[Array, ""]
    step: Float[Array, ""]
    low: Float[Array, ""]
    low_value: Float[Array, ""]
    low_slope: Float[Array, ""]
    low_grad: PyTree
    high: Float[Array, ""]
    high_value: Float[Array, ""]
    done: Bool[Array, ""]


class SearchProgress(NamedTuple):
    """The state of the line search between steps: how long since it made progress.

    Attributes:
      largest: The largest absolute value.
      lowest: The value that a lower one has to undercut visibly to be progress.
      least_slope: The same of the norm of the gradient.
      steepest: The largest norm of the gradient.
      tiny: The number of last steps that have changed no variable by more than
        rounding.
      idle: The number of steps since the last progress.
      is_waiting: Whether these were so many that one step is refused.
      is_exhausted: Whether these were too many, and no step is taken any more.
    """

    largest: Float[Array, ""]
    lowest: Float[Array, ""]
    least_slope: Float[Array, ""]
    steepest: Float[Array, ""]
    tiny: Int[Array, ""]
    idle: Int[Array, ""]
    is_waiting: Bool[Array, ""]
    is_exhausted: Bool[Array, ""]


_State: TypeAlias = tuple[SearchProgress, optax.ScaleByZoomLinesearchState]


def scale_by_weak_wolfe_linesearch(
    max_linesearch_steps: int = 40,
    slope_rtol: float = 1e-4,
    curv_rtol: float = 0.9,
    ulps: float = 4.0,
    patience: int = 10,
) -> optax.GradientTransformationExtraArgs:
    """Scales an update by a line search for a weak Wolfe point.

    That is a step which decreases the value by a part of what the slope at the start
    promises, and behind which the slope is less steep. The slope may well have become
    positive: on a kink it jumps from steep to rising, and nothing in between can be
    found, which a search for a strong Wolfe point (optax's zoom) looks for in vain.

    The first step is 1. It is doubled until it decreases too little, and then the
    bracket shrinks to a trial inside: the minimum of the parabola through the value and
    slope of its lower end and the value of its upper end, but not in the outer quarters
    of the bracket. (Lewis and Overton, "Nonsmooth optimization via quasi-Newton
    methods", Math. Program. 141, 2013, who halve the bracket.)

    From a value of infinity nothing is known of the start. It is evaluated then, and no
    step is taken.

    What is not finite is no decrease. Where no step fulfils both conditions, the
    longest that was found to decrease enough is taken, and none if there was none: the
    value never rises by more than rounding. The search also ends where a step is too
    short to change the parameters.

    At a minimum on a kink the gradient stays large, and steps that change the value by
    nothing but rounding can be found for ever. So after `patience` steps in which
    neither the value nor the gradient has become visibly smaller, one step is refused,
    so that an optimizer can restart; and after as many again, all are. All are at once
    where the slope promises nothing but rounding either, as at a minimum without kinks:
    no restart would lead further down. There the gradient, too, is nothing but rounding
    once two steps are, in every variable, and the next update as well; no step more is
    taken then.

    Args:
      max_linesearch_steps: The number of trials.
      slope_rtol: Which part of the promised decrease is enough.
      curv_rtol: Which part of the slope at the start is steep.
      ulps: How much the value may rise, in units in the last place of the largest value
        so far: so much may be rounding. (A sum of squares that began at 1e9 and is now
        1e-3 often is a difference of large numbers, with an error of 1e-7. Without this
        the search would look for the luckiest error, trial by trial.)
      patience: The number of steps without progress after which one is refused, and
        after twice as many all. Progress is a value that is lower than any before by
        more than `ulps` of its own, or a gradient whose norm is lower by half.

    Returns:
      A transformation whose update needs `value`, `grad` and `value_fn`, for the end of
      a chain or as `linesearch` of `optax.lbfgs`. Its state is the tuple of a
      `SearchProgress` and the state of optax's zoom line search, with value and
      gradient at the accepted point, so that `optax.value_and_grad_from_state` need not
      evaluate it again.

    Raises:
      ValueError: If a number is impossible.

    Example:
      >>> import optax
      >>> from jaxmf_opt import optimize
      >>> optimizer = optax.lbfgs(linesearch=scale_by_weak_wolfe_linesearch())
      >>> optimize(lambda y: abs(y - 1) + y**2, 3.0, optimizer=optimizer).round(4)
      Array(0.5, dtype=float32)
    """
    check_positive("max_linesearch_steps", max_linesearch_steps, whole=True)
    check_positive("patience", patience, whole=True)
    if not 0 < slope_rtol < curv_rtol < 1:
        raise ValueError(
            "It takes 0 < `slope_rtol` < `curv_rtol` < 1, got "
            f"{slope_rtol!r} and {curv_rtol!r}."
        )

    def init(params: PyTree) -> _State:
        dtype = jnp.result_type(*jax.tree.leaves(params))
        unknown = jnp.array(jnp.inf, dtype)
        info = optax.ZoomLinesearchInfo(jnp.array(0), unknown, unknown)
        grad = optax.tree.zeros_like(params)
        no = jnp.array(False)
        zero, none = jnp.zeros((), dtype), jnp.array(0)
        progress = SearchProgress(zero, unknown, unknown, zero, none, none, no, no)
        return progress, optax.ScaleByZoomLinesearchState(
            jnp.ones((), dtype), cast(Any, unknown), cast(Any, grad), info
        )

    def update(
        updates: PyTree,
        state: _State,
        params: PyTree,
        *,
        value: Float[Array, ""],
        grad: PyTree,
        value_fn: Callable[..., Array],
        **extra_args: Any,
    ) -> tuple[PyTree, _State]:
        names = inspect.signature(value_fn).parameters
        known = {k: v for k, v in extra_args.items() if k in names}
        both = jax.value_and_grad(lambda y: value_fn(y, **known))
        value = jnp.asarray(value)
        dtype = value.dtype

        def slope_of(grad: PyTree) -> Float[Array, ""]:
            return jnp.asarray(optax.tree.vdot(updates, grad), dtype)

        # Nothing is known of the start: the one trial is the start itself.
        is_unknown = jnp.isposinf(value)
        slope = slope_of(grad)
        rounding = ulps * float(jnp.finfo(dtype).eps)
        norm = optax.tree.norm(grad).astype(dtype)

        def is_tiny(update: PyTree) -> Bool[Array, ""]:
            return _are_below(16 * rounding, update, params)

        progress = _seen(
            state[0], value, norm, slope, is_tiny(updates), rounding, patience
        )
        progress = jax.tree.map(
            lambda old, new: jnp.where(is_unknown, old, new), state[0], progress
        )
        slack = rounding * progress.largest
        waited = progress.is_waiting | progress.is_exhausted

        def bound(step: Array) -> Array:
            return value + slope_rtol * step * slope + slack

        def trial(s: _Search) -> _Search:
            there = jax.tree.map(
                lambda p, u: p + s.step.astype(u.dtype) * u, params, updates
            )
            new_value, new_grad = both(there)
            new_slope = slope_of(new_grad)
            finite = jnp.isfinite(new_value) & jnp.isfinite(new_slope)
            moves = _differ(there, params)
            decreases = moves & finite & (new_value <= bound(s.step))
            decreases |= is_unknown
            grad = jax.tree.map(
                lambda x, y: jnp.where(decreases, x, y), new_grad, s.low_grad
            )
            low = jnp.where(decreases, s.step, s.low)
            low_value = jnp.where(decreases, new_value, s.low_value)
            low_slope = jnp.where(decreases, new_slope, s.low_slope)
            high = jnp.where(decreases, s.high, s.step)
            high_value = jnp.where(decreases, s.high_value, new_value)
            inside = _inside(low, low_value, low_slope, high, high_value)
            return _Search(
                trials=s.trials + 1,
                step=jnp.where(jnp.isfinite(high), inside, 2 * s.step),
                low=low,
                low_value=low_value,
                low_slope=low_slope,
                low_grad=grad,
                high=high,
                high_value=high_value,
                done=~moves
                | is_unknown
                | (decreases & (new_slope >= curv_rtol * slope)),
            )

        zero, infinite = jnp.zeros_like(value), jnp.full_like(value, jnp.inf)
        search = _Search(
            trials=jnp.array(0),
            step=jnp.where(is_unknown, zero, jnp.ones_like(value)),
            low=zero,
            low_value=value,
            low_slope=slope,
            low_grad=grad,
            high=infinite,
            high_value=infinite,
            # (NaN is no descent.)
            done=~is_unknown & (~(slope < 0) | ~jnp.isfinite(value) | waited),
        )
        end = jax.lax.while_loop(
            lambda s: ~s.done & (s.trials < max_linesearch_steps), trial, search
        )
        info = optax.ZoomLinesearchInfo(
            end.trials,
            cast(Any, jnp.maximum(end.low_value - bound(end.low), 0)),
            cast(Any, jnp.maximum(curv_rtol * slope - end.low_slope, 0)),
        )
        new_state = optax.ScaleByZoomLinesearchState(
            cast(Any, end.low), cast(Any, end.low_value), end.low_grad, info
        )
        taken = optax.tree.scale(end.low, updates)
        tiny = jnp.where(is_tiny(taken) & ~is_unknown, progress.tiny + 1, 0)
        return taken, (progress._replace(tiny=tiny), new_state)

    return register_linesearch(
        optax.GradientTransformationExtraArgs(init, cast(Any, update))
    )


def _seen(
    before: SearchProgress,
    value: Array,
    norm: Array,
    slope: Array,
    is_tiny: Array,
    rounding: float,
    patience: int,
) -> SearchProgress:
    """The progress with one value, the norm of the gradient there, and an update."""
    size = jnp.abs(value)
    is_lower = value < before.lowest - rounding * size
    is_flatter = norm < 0.5 * before.least_slope
    idle = jnp.where(is_lower | is_flatter, 0, before.idle + 1)
    steepest = jnp.maximum(before.steepest, jnp.where(jnp.isfinite(norm), norm, 0))
    promises = -slope > rounding * size
    limit = jnp.where(promises, 2 * patience, patience)
    # (In small units an update along the gradient is tiny from the start. Behind a
    # steep wall one is, too, but the search makes the step longer.)
    is_rounding = is_tiny & (before.tiny >= 2) & ~promises
    is_rounding &= norm <= rounding**0.5 * steepest
    return SearchProgress(
        jnp.maximum(before.largest, jnp.where(jnp.isfinite(size), size, 0)),
        jnp.where(is_lower, value, before.lowest),
        jnp.where(is_flatter, norm, before.least_slope),
        steepest,
        before.tiny,
        idle,
        idle == patience,
        before.is_exhausted | is_rounding | (idle >= limit),
    )


def _are_below(part: float, updates: PyTree, params: PyTree) -> Bool[Array, ""]:
    """Whether every update is no more than a part of its variable."""
    below = jax.tree.map(
        lambda u, p: jnp.all(jnp.abs(u) <= part * jnp.abs(p)), updates, params
    )
    return jnp.all(jnp.stack(jax.tree.leaves(below)))


def _differ(a: PyTree, b: PyTree) -> Bool[Array, ""]:
    differ = jax.tree.map(lambda x, y: jnp.any(x != y), a, b)
    return jnp.any(jnp.stack(jax.tree.leaves(differ)))


def _inside(low: Array, value: Array, slope: Array, high: Array, other: Array) -> Array:
    """A step inside of a bracket, not in its outer quarters."""
    width = high - low
    curvature = other - value - slope * width
    lowest = low - slope * width**2 / (2 * curvature)
    lowest = jnp.clip(lowest, low + width / 4, high - width / 4)
    usable = (curvature > 0) & jnp.isfinite(lowest)
    return jnp.where(usable, lowest, low + width / 2)
