"""What makes optax's zoom line search robust."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from .._solver.linesearch import keeps_the_step
from ._directions import where


def finite_trials(
    search: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Shows the line search infinity where the objective is not finite.

    To optax -inf, where an objective has overflown, is the best of all decreases.

    Args:
      search: A line search.

    Returns:
      A line search with the same state.
    """

    def update(
        updates: PyTree,
        state: optax.ScaleByZoomLinesearchState,
        params: PyTree,
        *,
        value_fn: Callable[..., Array],
        **extra_args: Any,
    ) -> tuple[PyTree, optax.ScaleByZoomLinesearchState]:
        # wraps: optax looks up in the signature which extra arguments are meant for it.
        @functools.wraps(value_fn)
        def finite_value_fn(*args: Any, **kwargs: Any) -> Array:
            value = value_fn(*args, **kwargs)
            return jnp.where(jnp.isfinite(value), value, jnp.inf)

        return cast(
            Any,
            search.update(
                updates, state, params, value_fn=finite_value_fn, **extra_args
            ),
        )

    keeping = optax.GradientTransformationExtraArgs(search.init, cast(Any, update))
    return keeps_the_step(keeping, search)


def refuse_uphill(
    search: optax.GradientTransformationExtraArgs,
    rtol: float | Float[Array, ""] = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    """Does not move at all if the line search ends uphill, or not finite.

    When optax's zoom line search runs out of trials it takes the last one, whatever it
    is. Here the parameters then stay, and with them value and gradient in the state.

    Args:
      search: `optax.scale_by_zoom_linesearch`.
      rtol: How much of its size the value may grow by, which is rounding where the
        objective is flat. The `approx_dec_rtol` of the line search.

    Returns:
      A line search with the same state.
    """

    def update(
        updates: PyTree,
        state: optax.ScaleByZoomLinesearchState,
        params: PyTree,
        *,
        value: Float[Array, ""],
        grad: PyTree,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.ScaleByZoomLinesearchState]:
        step, new = search.update(
            updates, state, params, value=value, grad=grad, **extra_args
        )
        new = cast(optax.ScaleByZoomLinesearchState, new)
        finite = jnp.isfinite(new.value) & jnp.isfinite(optax.tree.norm(new.grad))
        accept = finite & (new.value <= value + rtol * jnp.abs(value))
        stay = new._replace(value=value, grad=grad)
        return where(accept, (step, new), (optax.tree.zeros_like(step), stay))

    keeping = optax.GradientTransformationExtraArgs(search.init, cast(Any, update))
    return keeps_the_step(keeping, search)


def rounding_floor(
    search: Callable[..., optax.GradientTransformationExtraArgs],
    rtol: float = 1e-6,
    ulps: float = 4.0,
) -> optax.GradientTransformationExtraArgs:
    """Raises the tolerance of a line search to the rounding error of the objective.

    An objective that began at 1e9 and is now 1e-3 often is a difference of large
    numbers, with an error of 1e-7. A tolerance relative to its value is far below that,
    and the line search then looks for the luckiest error, step by tiny step. So the
    tolerance is never below some units in the last place of the largest value so far.

    Args:
      search: Makes the line search of a relative tolerance, a traced number.
      rtol: The tolerance where rounding errors are no concern.
      ulps: The floor, in units in the last place of the largest value so far.

    Returns:
      A line search. Its state is the tuple of the largest absolute value so far and the
      state of the line search, in that order, so that what the line search stores is
      still at the end.
    """

    def init(params: PyTree) -> tuple[Float[Array, ""], PyTree]:
        state = cast(optax.ScaleByZoomLinesearchState, search(rtol).init(params))
        return jnp.zeros_like(state.value), state

    def update(
        updates: PyTree,
        state: tuple[Float[Array, ""], PyTree],
        params: PyTree,
        *,
        value: Float[Array, ""],
        **extra_args: Any,
    ) -> tuple[PyTree, tuple[Float[Array, ""], PyTree]]:
        largest, inner = state
        size = jnp.abs(value)
        largest = jnp.maximum(largest, jnp.where(jnp.isfinite(size), size, 0))
        floor = ulps * jnp.finfo(largest.dtype).eps * largest
        # Nothing is relative to 0; there the tolerance stays what it is.
        tolerance = jnp.maximum(rtol, floor / jnp.where(size > 0, size, jnp.inf))
        step, inner = search(tolerance).update(
            updates, inner, params, value=value, **extra_args
        )
        return step, (largest, inner)

    keeping = optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))
    return keeps_the_step(keeping, search(rtol))
