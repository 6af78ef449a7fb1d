"""L-BFGS with all the remedies together."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from ._directions import scale_by_robust_lbfgs
from ._linesearch import SearchProgress, scale_by_weak_wolfe_linesearch


class RobustOptimizer(optax.GradientTransformationExtraArgs):
    """The optax transformation that `robust_lbfgs` returns."""

    @property
    def evaluates_start(self) -> bool:
        """True: the line search does from an infinite value, and nothing else changes.

        (Directions are along the gradient until there is a pair.)
        """
        return True

    def stands_still(self, state: PyTree, update: PyTree) -> Bool[Array, ""]:
        """Whether an update that has led to a state will repeat itself for ever.

        That is so where the line search has refused to move along the direction of a
        fresh state. The parameters have not moved, so the next direction is that of a
        fresh state again, and so is all that follows. (Not where one step was refused
        for a restart.) It is also so where the line search has given up.

        Args:
          state: The state after the update.
          update: The update.

        Returns:
          A boolean scalar.
        """
        step = jnp.asarray(optax.tree.norm(update, ord=jnp.inf))
        progress: SearchProgress = state[-1][0]
        in_vain = state[0].is_fresh & ~progress.is_waiting
        return (in_vain | progress.is_exhausted) & (step == 0)


def robust_lbfgs(
    memory_size: int = 40, max_linesearch_steps: int = 40, curv_rtol: float = 0.9
) -> RobustOptimizer:
    """L-BFGS for losses that are steep, badly scaled or kinked.

    Args:
      memory_size: The number of pairs that L-BFGS keeps.
      max_linesearch_steps: The number of trials of a line search.
      curv_rtol: To which part of itself a line search has to reduce the slope. Smaller
        is fewer and better steps, and more evaluations in each.

    Returns:
      A transformation whose update needs `value`, `grad` and `value_fn`. Its state ends
      in the state of the line search, with value and gradient at the accepted point.

    Raises:
      ValueError: If a number is impossible.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import optimize
      >>> valley = lambda y: 1e4 * (y[1] - y[0] ** 2) ** 2 + (1 - y[0]) ** 2
      >>> start = jnp.array([-1.2, 1.0])
      >>> optimize(valley, start, optimizer=robust_lbfgs(memory_size=5), gtol=1e-8)
      Array([1., 1.], dtype=float32)
    """
    directions = scale_by_robust_lbfgs(memory_size)
    search = scale_by_weak_wolfe_linesearch(max_linesearch_steps, curv_rtol=curv_rtol)
    return RobustOptimizer(*optax.chain(directions, optax.scale(-1.0), search))


ROBUST_OPTIMIZER = robust_lbfgs()
