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
    is_absent: Bool[Array, " n"],
    units: Float[Array, " n"],
) -> Bool[Array, ""]:
    """Whether the derivative is that of the minimum, as far as can be seen from `y`.

    A step of Newton's method leads nearer to the minimum. If it changes the Hessian by
    so much that the solutions of linear systems change, they are not what they would be
    at the minimum. At a coarse minimum of a loss with a symmetry that is so: what would
    be 0 there is about as large as the gradient here, and its inverse is taken.

    A row of zeros has to be that of a variable that is in nothing, and not of x**4 at 0
    or of a kink: then there is no gradient at its other values either.

    Args:
      gradient: Of the variables and what the loss captures.
      product: The Hessian at such a point, times a vector.
      solve: The solution, of a system and a right-hand side.
      point: `y`, and what the loss captures.
      system: That with the Hessian there.
      is_absent: Which of its rows are 0.
      units: Of the variables, in which the other rows are alike.

    Returns:
      Whether it is so.
    """
    y, captured = point
    probe, nudge = random_vectors(2, y.size, y.dtype)
    v = jnp.where(is_absent, 0.0, units * probe)
    nudge = 1e-3 * nudge * jnp.where(y == 0, 1.0, y)
    of_v, slope = product(point, v), gradient(*point)
    # What rounding leaves of a gradient is in no range.
    norm = jnp.linalg.norm
    size = norm(units * of_v) / norm(probe)
    rounding = 500 * jnp.finfo(y.dtype).eps * size * norm(y / units)
    slope = jnp.where(norm(units * slope) > rounding, slope, 0.0)

    def once(b: Array, is_first: Array) -> tuple[Array, tuple[Array, Array]]:
        x = solve(system, b)

        def look() -> tuple[Array, Array]:
            there = y + jnp.where(is_absent, nudge, x)
            is_free = jnp.all(~is_absent | (gradient(there, captured) == 0))
            return product((there, captured), v) - of_v, is_free

        def done() -> tuple[Array, Array]:
            return b, jnp.all(b == b)  # (that varies over devices as the other does)

        change, is_free = cond(is_first, look, done)
        return change, (x, is_free)

    # (A loop of two turns, to be compiled once.)
    _, ((_, moved), is_free) = jax.lax.scan(once, -slope, jnp.array([True, False]))
    return jnp.all(is_free) & (norm(moved / units) <= _MOST_CHANGE * norm(probe))
