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

from ._directions import RescaledState as RescaledState
from ._directions import RestartState as RestartState
from ._directions import rescale_variables as rescale_variables
from ._directions import restart_when_stuck as restart_when_stuck
from ._directions import short_first_step as short_first_step
from ._directions import skip_bad_pairs as skip_bad_pairs
from ._linesearch import SearchProgress as SearchProgress
from ._linesearch import (
    scale_by_weak_wolfe_linesearch as scale_by_weak_wolfe_linesearch,
)
from ._optimizer import ROBUST_OPTIMIZER as ROBUST_OPTIMIZER
from ._optimizer import RobustOptimizer as RobustOptimizer
from ._optimizer import robust_lbfgs as robust_lbfgs
