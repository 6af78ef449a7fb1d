"""Whether a point is a minimum, as far as tolerances and rounding let one say."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from jaxtyping import Array, Bool, PyTree, Scalar

from .state import MinimiserState, Movement


def meets_tolerance(
    tolerances: tuple[Any, Any, Any],
    norm: Callable[[PyTree], Scalar],
    y: PyTree,
    state: MinimiserState,
    loss: Scalar,
    grad: PyTree,
) -> Bool[Array, ""]:
    """Whether a point meets the tolerances of a `LeanOptaxMinimiser`.

    Args:
      tolerances: `rtol`, `atol` and `gtol`.
      norm: Of the elements of a step or a gradient.
      y: The point.
      state: The state before it was evaluated, with the step that led there.
      loss: The loss there.
      grad: The gradient there.

    Returns:
      Whether it does.
    """
    rtol, atol, gtol = tolerances
    last, first_loss = cast(Movement, state.movement), state.first_loss

    def ratio(difference: Array, of: Array) -> Array:
        scale = atol + rtol * jnp.abs(of)
        # What stays at exactly 0, a masked parameter for example, is converged.
        return jnp.where(difference == 0, 0.0, jnp.abs(difference) / scale)

    def small(difference: PyTree, of: PyTree) -> Bool[Array, ""]:
        return norm(jax.tree.map(ratio, difference, of)) < 1

    eps = float(jnp.finfo(loss.dtype).eps)
    # (A loss that goes to 0 halves for ever; not so on the scale of its start.)
    scale = jnp.maximum(jnp.abs(loss), eps * size_of_loss(loss, first_loss))
    cauchy = small(last.update, y) & small(loss - last.loss, scale)
    slope = relative_gradient(y, loss, grad, first_loss)
    is_minimum = cauchy & _is_close(rtol, atol, y, last, grad)
    is_minimum &= slope <= jnp.maximum(eps ** (1 / 3), rtol)
    # A step that jumps into the minimum is not small, and is the last that moves.
    slope = jnp.maximum(slope, optx.max_norm(grad) / jnp.maximum(jnp.abs(loss), 1))
    tiny = min(64 * eps, eps**0.5)
    is_minimum |= slope <= jnp.where((rtol > 0) | (atol > 0), tiny, 0)
    return is_minimum | (norm(grad) <= gtol)


def _is_close(
    rtol: Any, atol: Any, y: PyTree, last: Movement, grad: PyTree
) -> Bool[Array, ""]:
    """Whether the gradient says that the minimum is close.

    A step may be small because a line search has failed, because an optimizer turns
    around or because its schedule says so. But the gradient over the curvature is no
    more than the distance to the minimum of a quadratic function. The curvature is that
    which the last step has met. A step that has not moved says nothing.
    """
    change = jax.tree.map(jnp.subtract, grad, last.grad)
    squared_change, squared_grad = _squared_norm(change), _squared_norm(grad)
    curvature = squared_change / _dot(last.update, change)
    distance = jnp.sqrt(squared_grad) / curvature
    size = jnp.sqrt(_squared_norm(y))
    eps = float(jnp.finfo(size.dtype).eps)
    # (An array, because a number may be symbolic in `jax.export`.)
    elements = jnp.asarray(sum(x.size for x in jax.tree.leaves(y)), size.dtype)
    allowed = jnp.maximum(rtol, eps**0.5) * size + atol * jnp.sqrt(elements)
    # The change of a gradient must be more than its rounding.
    is_curved = (curvature > 0) & (squared_change > eps * squared_grad)
    return (is_curved & (distance <= allowed)) | (squared_grad == 0)


def relative_gradient(
    y: PyTree, loss: Scalar, grad: PyTree, first_loss: Scalar
) -> Scalar:
    """The size of a gradient, relatively to loss and parameters.

    See Dennis and Schnabel, Numerical Methods for Unconstrained Optimization (1983),
    section 7.2; from there is also that a minimum shows by the cube root of the
    precision. What is large is relative to itself, what is small to 1, or to the size
    that loss and parameters have at all. Small parameters have a small unit if the loss
    has changed on the way to them; else they are small by chance, near a start at 0.

    Args:
      y: The point.
      loss: The loss there.
      grad: The gradient there.
      first_loss: The loss where the solve started.

    Returns:
      A number without a unit.
    """

    def relative(g: Array, x: Array) -> Array:
        return jnp.abs(g) * jnp.maximum(jnp.abs(x), jnp.where(of_y > 0, of_y, 1.0))

    rounding = float(jnp.finfo(loss.dtype).eps) ** 0.5 * jnp.abs(loss)
    has_changed = jnp.abs(loss - first_loss) > rounding
    of_y = jnp.where(has_changed, jnp.minimum(optx.max_norm(y), 1.0), 1.0)
    slope = optx.max_norm(jax.tree.map(relative, grad, y))
    return slope / size_of_loss(loss, first_loss)


def looks_flat(
    y: PyTree, loss: Scalar, grad: PyTree, first_loss: Scalar
) -> Bool[Array, ""]:
    """Whether a gradient is as small as at a minimum: see `relative_gradient`."""
    steepness = relative_gradient(y, loss, grad, first_loss)
    return steepness <= float(jnp.finfo(steepness.dtype).eps) ** (1 / 3)


def size_of_loss(loss: Scalar, first_loss: Scalar) -> Scalar:
    """What a difference of losses is small against: the loss, at the start at least.

    Where that is not known, this is the start.
    """
    first = jnp.abs(jnp.where(jnp.isfinite(first_loss), first_loss, loss))
    return jnp.maximum(jnp.abs(loss), jnp.minimum(first, 1.0))


def gain_of_loss(loss: Scalar, first_loss: Scalar) -> Scalar:
    """What has been gained since the start, but no more than the size of the loss.

    A constant that is added to the loss changes it by no more than its rounding, which
    it is at least.
    """
    gain = jnp.where(jnp.isfinite(first_loss), jnp.abs(first_loss - loss), 0.0)
    size = size_of_loss(loss, first_loss)
    return jnp.clip(gain, float(jnp.finfo(size.dtype).eps) * size, size)


def _dot(a: PyTree, b: PyTree) -> Scalar:
    return optax.tree.real(optax.tree.vdot(a, b))


def _squared_norm(a: PyTree) -> Scalar:
    return _dot(a, a)


def all_finite(y: PyTree) -> Bool[Array, ""]:
    """Whether every element of every leaf is a finite number."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(y)]))
