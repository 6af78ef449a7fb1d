"""L-BFGS with a zoom line search, made robust by small optax transformations.

Each transformation remedies one weakness and can be left out on its own::

    scale_by_lbfgs            the directions
      skip_bad_pairs          ... whose memory takes no pair without curvature
      rescale_variables       ... in units in which the variables are alike
      restart_when_stuck      ... that restarts where it cannot continue
      short_first_step        ... and begins with a modest step
    scale(-1)
    scale_by_zoom_linesearch  the length
      finite_trials           ... to which nothing but a finite value is a decrease
      refuse_uphill           ... that would rather stay than climb
      rounding_floor          ... and knows which differences are rounding
"""

from ._directions import RescaledState as RescaledState
from ._directions import RestartState as RestartState
from ._directions import rescale_variables as rescale_variables
from ._directions import restart_when_stuck as restart_when_stuck
from ._directions import short_first_step as short_first_step
from ._directions import skip_bad_pairs as skip_bad_pairs
from ._lengths import finite_trials as finite_trials
from ._lengths import refuse_uphill as refuse_uphill
from ._lengths import rounding_floor as rounding_floor
from ._optimizer import ROBUST_OPTIMIZER as ROBUST_OPTIMIZER
from ._optimizer import RobustOptimizer as RobustOptimizer
from ._optimizer import robust_lbfgs as robust_lbfgs
