"""When upstream's default optimizer can be known never to move again.

At a minimum the line search of `DEFAULT_OPTIMIZER` finds no decrease, tries 129 step
sizes and gives up; the next one starts 4e-13 times lower, and so on for all the steps
that are left. Nobody can observe those steps where there is no callback, so a solve may
leave them out, provided that they would not have changed a bit of the result.
"""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from jaxtyping import Array, Bool, PyTree, Scalar, Shaped

from ._custom_types import Aux, Y
from ._minimiser import LeanOptaxMinimiser, Tolerance
from ._optimizer import DEFAULT_OPTIMIZER, optimizer_key
from .robust import RobustOptimizer


def minimiser_for(
    optimizer: optax.GradientTransformation, tolerances: Sequence[Tolerance]
) -> LeanOptaxMinimiser:
    """The minimiser for an optimizer that stops where it provably stands still.

    Args:
      optimizer: An optax transformation.
      tolerances: `rtol`, `atol` and `gtol` of `LeanOptaxMinimiser`.

    Returns:
      A `LeanOptaxMinimiser`.
    """
    kind: type[Any] = LeanOptaxMinimiser
    if isinstance(optimizer, RobustOptimizer):
        kind = _RobustMinimiser
    elif is_default(optimizer):
        kind = _DefaultMinimiser
    return kind(optimizer, *tolerances)


def is_default(optimizer: optax.GradientTransformation) -> bool:
    """Whether an optimizer is `DEFAULT_OPTIMIZER`, or made in the same way."""
    return optimizer_key(optimizer) == _DEFAULT_KEY


_DEFAULT_KEY = optimizer_key(DEFAULT_OPTIMIZER)


class _DefaultMinimiser(LeanOptaxMinimiser[Y, Aux]):
    """The minimiser for `DEFAULT_OPTIMIZER`, whose constants the proof below uses."""

    def _stalled(
        self, y: Y, loss: Scalar, grad: Y, update: Y, opt_state: Any
    ) -> Bool[Array, ""]:
        """Whether no later step can move `y`.

        The step just taken, `update`, is too small to change `y`, so the next one sees
        the same loss and gradient. Its memory of one pair is (0, 0), with which L-BFGS
        makes the direction `-grad`. It starts from 1.5 times the last step size and
        only goes down. If that does not change `y` either, all its trials have the
        value that the last search found at `y`. Where this is not below `loss`, none of
        them is a sufficient decrease: the search fails, and leaves the same situation
        with a smaller step size. (Once the demanded decrease underflows, a trial may
        be accepted, but at step sizes that change nothing either.) From a gradient of
        exactly 0 no direction leads anywhere. And where all trials were non-finite the
        search leaves the step size 0, which no later one makes larger.
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


class _RobustMinimiser(LeanOptaxMinimiser[Y, Aux]):
    """The minimiser for a `RobustOptimizer`, which knows when it stands still."""

    def _stalled(
        self, y: Y, loss: Scalar, grad: Y, update: Y, opt_state: Any
    ) -> Bool[Array, ""]:
        del y, loss, grad
        return cast(RobustOptimizer, self.optim).stands_still(opt_state, update)


def _changes_nothing(y: PyTree, update: PyTree) -> Bool[Array, ""]:
    """Whether `y` plus or minus a step is `y`, with a margin for any rounding of it."""

    def same(x: Shaped[Array, "..."], u: Shaped[Array, "..."]) -> Bool[Array, ""]:
        return jnp.all((x + 4 * u == x) & (x - 4 * u == x))

    return jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(same, y, update))))
