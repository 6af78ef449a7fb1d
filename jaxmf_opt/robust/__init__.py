"""L-BFGS for losses that are steep, badly scaled or kinked, of optax transformations.

`ROBUST_OPTIMIZER` is a chain of two, each of which can be used on its own::

    scale_by_robust_lbfgs           the directions
    scale(-1)
    scale_by_weak_wolfe_linesearch  the length, which may end on a kink
"""

from ._directions import RobustLBFGSState, scale_by_robust_lbfgs
from ._linesearch import SearchProgress, scale_by_weak_wolfe_linesearch
from ._optimizer import ROBUST_OPTIMIZER, RobustOptimizer, robust_lbfgs

__all__ = [
    "ROBUST_OPTIMIZER",
    "RobustLBFGSState",
    "RobustOptimizer",
    "SearchProgress",
    "robust_lbfgs",
    "scale_by_robust_lbfgs",
    "scale_by_weak_wolfe_linesearch",
]


def __dir__() -> list[str]:
    return __all__
