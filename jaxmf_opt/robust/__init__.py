"""L-BFGS for losses that are steep, badly scaled or kinked, of optax transformations.

Each transformation remedies one weakness and can be left out on its own::

    scale_by_lbfgs            the directions
      skip_bad_pairs          ... whose memory takes no pair without curvature
      rescale_variables       ... in units in which the variables are alike
      restart_when_stuck      ... that restarts where it cannot continue
      short_first_step        ... and begins with a modest step
    scale(-1)
    scale_by_weak_wolfe_linesearch  the length, which may end on a kink
"""

from ._directions import (
    RescaledState,
    RestartState,
    rescale_variables,
    restart_when_stuck,
    short_first_step,
    skip_bad_pairs,
)
from ._linesearch import (
    SearchProgress,
    scale_by_weak_wolfe_linesearch,
)
from ._optimizer import ROBUST_OPTIMIZER, RobustOptimizer, robust_lbfgs

__all__ = [
    "ROBUST_OPTIMIZER",
    "RescaledState",
    "RestartState",
    "RobustOptimizer",
    "SearchProgress",
    "rescale_variables",
    "restart_when_stuck",
    "robust_lbfgs",
    "scale_by_weak_wolfe_linesearch",
    "short_first_step",
    "skip_bad_pairs",
]


def __dir__() -> list[str]:
    return __all__
