"""When upstream's default optimizer can be known never to move again.

At a minimum the line search of `DEFAULT_OPTIMIZER` finds no decrease, tries 129 step
sizes and gives up; the next one starts 4e-13 times lower, and so on for all the steps
that are left. Nobody can observe those steps where there is no callback, so a solve may
leave them out, provided that they would not have changed a bit of the result.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Int, PyTree, Scalar, Shaped

from .convergence import looks_flat, size_of_loss
from .optimizers import DEFAULT_OPTIMIZER, optimizer_key
from .state import SolverState


@runtime_checkable
class KnowsItsEnds(Protocol):
    """An optimizer that tells how it begins and ends, as that of `robust_lbfgs`.

    Attributes:
      evaluates_start: Whether an update from a loss of infinity and a gradient of 0
        evaluates the point, and moves nothing. A program then has the gradient once.
    """

    @property
    def evaluates_start(self) -> bool: ...

    def stands_still(self, state: PyTree, update: PyTree) -> Bool[Array, ""]:
        """Whether an update that has led to a state will repeat itself for ever."""
        ...


def evaluates_start(optimizer: optax.GradientTransformation) -> bool:
    """Whether an optimizer evaluates the point from which it starts."""
    return isinstance(optimizer, KnowsItsEnds) and optimizer.evaluates_start


# So many steps along the gradient are tried, each 100 times as short as the last one:
# where one of them leads past a minimum, the next is at least 1% of the way there.
_LENGTHS = 8


def is_default(optimizer: optax.GradientTransformation) -> bool:
    """Whether an optimizer is `DEFAULT_OPTIMIZER`, or made in the same way."""
    return optimizer_key(optimizer) == _DEFAULT_KEY


_DEFAULT_KEY = optimizer_key(DEFAULT_OPTIMIZER)


def default_stands_still(
    y: PyTree, loss: Scalar, grad: PyTree, update: PyTree, opt_state: Any
) -> Bool[Array, ""]:
    """Whether no later step of `DEFAULT_OPTIMIZER` can move `y`.

    The step just taken, `update`, is too small to change `y`, so the next one sees the
    same loss and gradient. Its memory of one pair is (0, 0), with which L-BFGS makes
    the direction `-grad`. It starts from 1.5 times the last step size and only goes
    down. If that does not change `y` either, all its trials have the value that the
    last search found at `y`. Where this is not below `loss`, none of them is a
    sufficient decrease: the search fails, and leaves the same situation with a smaller
    step size. (Once the demanded decrease underflows, a trial may be accepted, but at
    step sizes that change nothing either.) From a gradient of exactly 0 no direction
    leads anywhere. And where all trials were non-finite the search leaves the step
    size 0, which no later one makes larger.
    """
    linesearch: optax.ScaleByBacktrackingLinesearchState = opt_state[-1]
    next_size = 1.5 * linesearch.learning_rate
    demanded = 1e-4 * next_size * optax.tree.norm(grad, squared=True)
    next_update = jax.tree.map(lambda g: next_size * g, grad)
    search_fails = (
        _changes_nothing(y, next_update)
        & (linesearch.value >= loss)
        & (demanded > 1e-280)
    )
    stationary = optx.max_norm(grad) == 0
    no_size = (linesearch.learning_rate == 0) & jnp.isfinite(optx.max_norm(grad))
    never_moves = search_fails | stationary | no_size
    return _changes_nothing(y, update) & never_moves


def stalled_at_minimum(
    loss_fn: Callable[[PyTree], Scalar], end: SolverState
) -> tuple[Bool[Array, ""], Int[Array, ""]]:
    """Whether an optimizer stands still where it should: at a minimum.

    There the gradient is small, and nowhere along it is the loss visibly smaller. An
    optimizer also stands still where its last step was too long: it then tries steps
    that are too short to change anything. Here the steps are of all lengths, from the
    size of the parameters down to their rounding; once for parameters of one unit, and
    once for each in its own.

    Args:
      loss_fn: The loss.
      end: Where the solve has ended.

    Returns:
      Whether it does, and how often the loss was evaluated to find that out: never if
      it does not stand still.
    """
    y, state = end.params, end.minimiser
    is_flat = looks_flat(y, state.loss, state.grad, state.first_loss) & state.stalled
    flat, unravel = ravel_pytree(y)
    slope, _ = ravel_pytree(state.grad)
    size = jnp.linalg.norm(flat)
    size = jnp.where(size > 0, size, 1.0)

    def normed(direction: Array) -> Array:
        norm = jnp.linalg.norm(direction)
        return jnp.where(norm > 0, direction / norm, 0.0)

    relative = jnp.abs(flat) / size
    directions = jnp.stack([normed(slope), relative * normed(relative * slope)])
    eps = float(jnp.finfo(state.loss.dtype).eps)
    noise = eps**0.75 * size_of_loss(state.loss, state.first_loss)

    def goes_on(carry: tuple[Array, Array]) -> Array:
        trial, found = carry
        return is_flat & ~found & (trial < 2 * _LENGTHS)

    def probe(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        trial, _ = carry
        length = size * 100.0 ** -(trial // 2).astype(flat.dtype)
        step = length * directions[trial % 2]
        return trial + 1, loss_fn(unravel(flat - step)) < state.loss - noise

    start = (jnp.array(0), jnp.array(False))
    trials, found = jax.lax.while_loop(goes_on, probe, start)
    return is_flat & ~found, trials


def _changes_nothing(y: PyTree, update: PyTree) -> Bool[Array, ""]:
    """Whether `y` plus or minus a step is `y`, with a margin for any rounding of it."""

    def same(x: Shaped[Array, "..."], u: Shaped[Array, "..."]) -> Bool[Array, ""]:
        return jnp.all((x + 4 * u == x) & (x - 4 * u == x))

    return jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(same, y, update))))
