"""Whether a point is so near to a minimum that its Hessian is that of the minimum."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

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
    mixed: Callable[[Any], Array],
    solve: Callable[[Any, Array], Array],
    point: tuple[Float[Array, " n"], Any],
    system: Any,
    slope: Float[Array, " n"],
    is_absent: Bool[Array, " n"],
    units: Float[Array, " n"],
    *,
    symmetric: bool,
    rounding: float,
    gain: Float[Array, ""],
) -> Bool[Array, ""]:
    """Whether the derivative is that of the minimum, as far as can be seen from `y`.

    A step of Newton's method leads nearer to the minimum, and so to smaller gradients:
    on a kink it does not. If it changes the linear system of the derivative, its matrix
    or its right-hand side, by so much that solutions change, they are not what they
    would be at the minimum. At a coarse minimum of a loss with a symmetry that is so:
    what would be 0 there is about as large as the gradient here, and its inverse is
    taken.

    A row of zeros has to be that of a variable that is in nothing, and not of x**4 at 0
    or of a kink: then there is no gradient at its other values either.

    Args:
      gradient: Of the variables and what the loss captures.
      product: The Hessian at such a point, times a vector.
      mixed: How the gradient at such a point moves with what the loss captures.
      solve: The solution, of a system and a right-hand side.
      point: `y`, and what the loss captures.
      system: That with the Hessian there.
      slope: The gradient there.
      is_absent: Which of its rows are 0.
      units: Of the variables, in which the other rows are alike.
      symmetric: Whether the Hessian is taken for symmetric. If the gradient is one by a
        rule of the user's, it need not be.
      rounding: Which part of a gradient may be rounding ...
      gain: ... and by how much the loss has fallen. Where a step of Newton's method
        promises no more than the square of that part of this, it need not lead to a
        smaller gradient.

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
        # (As far as a loss that computes in float32 inside can be.)
        of_w = product(point, w)
        apart = jnp.abs(v @ of_w - w @ of_v)
        most = norm(units * of_v) * norm(other) + norm(units * of_w) * norm(probe)
        is_right = apart <= eps ** (1 / 3) * most
    # What rounding leaves of a gradient is in no range.
    size = norm(units * of_v) / norm(probe)
    is_rounding = norm(units * slope) <= 500 * eps * size * norm(y / units)
    slope = jnp.where(is_rounding, 0.0, slope)

    of_m = mixed(point)

    def once(carry: _Carry, turn: Array) -> tuple[_Carry, Array]:
        b, found = carry
        x = solve(system, b)

        def look() -> _Carry:
            is_flat = jnp.abs(slope @ x) <= rounding**2 * gain
            there = y + jnp.where(is_absent, nudge, x)
            slope_there = gradient(there, captured)
            rest = jnp.where(is_absent, 0.0, units * slope_there)
            is_lower = norm(rest) <= 0.1 * norm(units * slope)
            is_free = jnp.all(~is_absent | (slope_there == 0))
            of_there = product((there, captured), v), mixed((there, captured))
            changes = (of_there[0] - of_v, of_there[1] - of_m)
            return of_m, _Found(*changes, is_flat, is_free & (is_flat | is_lower))

        def compare() -> _Carry:
            # (A derivative that is small beside the minimum may well be rounding.)
            largest = jnp.max(jnp.maximum(jnp.abs(x), jnp.abs(y)) / units)
            is_known = found.is_flat | (largest == 0)
            part = jnp.where(is_known, 0.0, size_of_v / largest)
            return jnp.where(turn == 1, part * found.of_m, found.of_v), found

        return cond(turn == 0, look, compare), x

    # (A loop of four turns, to be compiled once. What is carried varies over devices
    # as the gradient does.)
    size_of_v, zero = jnp.mean(jnp.abs(probe)), 0.0 * slope
    yes = jnp.all(zero == 0)
    first = -slope, _Found(zero, zero, yes, yes)
    (_, found), solutions = jax.lax.scan(once, first, jnp.arange(4))
    moved = jnp.abs(solutions[2:] / units[None, :])
    is_close = jnp.all(moved <= _MOST_CHANGE * size_of_v)
    return is_right & found.is_right & is_close


class _Found(NamedTuple):
    """What one step of Newton's method shows.

    Attributes:
      of_v: What it changes of the Hessian times a vector.
      of_m: What it changes of how the gradient depends on the captured values.
      is_flat: Whether it may be rounding.
      is_right: Whether the gradient is smaller there, where it has to be.
    """

    of_v: Float[Array, " n"]
    of_m: Float[Array, " n"]
    is_flat: Bool[Array, ""]
    is_right: Bool[Array, ""]


_Carry: TypeAlias = tuple[Array, _Found]
