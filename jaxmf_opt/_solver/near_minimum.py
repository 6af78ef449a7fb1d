"""Whether a point is so near to a minimum that its Hessian is that of the minimum."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._jax.select import cond
from .linear_system import random_vectors

# By this part of them a step may change the solutions of linear systems.
_MOST_CHANGE = 0.03


def is_near_minimum(
    gradient: Callable[[Array, Any], Array],
    product: Callable[[Any, Array], Array],
    solve: Callable[[Any, Array], Array],
    point: tuple[Float[Array, " n"], Any],
    system: Any,
    slope: Float[Array, " n"],
    is_absent: Bool[Array, " n"],
    units: Float[Array, " n"],
    *,
    symmetric: bool,
    is_flat: Bool[Array, ""],
) -> Bool[Array, ""]:
    """Whether the derivative is that of the minimum, as far as can be seen from `y`.

    A step of Newton's method leads nearer to the minimum, and so to smaller gradients:
    on a kink it does not. If it changes the Hessian by so much that the solutions of
    linear systems change, they are not what they would be at the minimum. At a coarse
    minimum of a loss with a symmetry that is so: what would be 0 there is about as
    large as the gradient here, and its inverse is taken.

    A row of zeros has to be that of a variable that is in nothing, and not of x**4 at 0
    or of a kink: then there is no gradient at its other values either.

    Args:
      gradient: Of the variables and what the loss captures.
      product: The Hessian at such a point, times a vector.
      solve: The solution, of a system and a right-hand side.
      point: `y`, and what the loss captures.
      system: That with the Hessian there.
      slope: The gradient there.
      is_absent: Which of its rows are 0.
      units: Of the variables, in which the other rows are alike.
      symmetric: Whether the Hessian is taken for symmetric. If the gradient is one by a
        rule of the user's, it need not be.
      is_flat: Whether the gradient is so small that a step may change nothing of it
        but rounding.

    Returns:
      Whether it is so.
    """
    y, captured = point
    probe, nudge, other = random_vectors(3, y.size, y.dtype)
    # (Every variable is to be seen.)
    probe += jnp.sign(probe)
    v, w = (jnp.where(is_absent, 0.0, units * x) for x in (probe, other))
    nudge = 1e-3 * nudge * jnp.where(y == 0, 1.0, y)
    of_v = product(point, v)
    norm, eps = jnp.linalg.norm, float(jnp.finfo(y.dtype).eps)
    is_right = jnp.array(True)
    if symmetric:
        of_w = product(point, w)
        apart = jnp.abs(v @ of_w - w @ of_v)
        most = norm(units * of_v) * norm(other) + norm(units * of_w) * norm(probe)
        is_right = apart <= eps**0.5 * most
    # What rounding leaves of a gradient is in no range.
    size = norm(units * of_v) / norm(probe)
    is_rounding = norm(units * slope) <= 500 * eps * size * norm(y / units)
    slope = jnp.where(is_rounding, 0.0, slope)
    is_flat = is_flat | is_rounding

    def once(b: Array, is_first: Array) -> tuple[Array, tuple[Array, Array]]:
        x = solve(system, b)

        def look() -> tuple[Array, Array]:
            there = y + jnp.where(is_absent, nudge, x)
            slope_there = gradient(there, captured)
            rest = jnp.where(is_absent, 0.0, units * slope_there)
            is_lower = norm(rest) <= 0.1 * norm(units * slope)
            is_free = jnp.all(~is_absent | (slope_there == 0))
            change = product((there, captured), v) - of_v
            return change, is_free & (is_flat | is_lower)

        def done() -> tuple[Array, Array]:
            return b, jnp.all(b == b)  # (that varies over devices as the other does)

        change, is_free = cond(is_first, look, done)
        return change, (x, is_free)

    # (A loop of two turns, to be compiled once.)
    _, ((_, moved), is_free) = jax.lax.scan(once, -slope, jnp.array([True, False]))
    most = _MOST_CHANGE * jnp.mean(jnp.abs(probe))
    return is_right & jnp.all(is_free) & jnp.all(jnp.abs(moved / units) <= most)
