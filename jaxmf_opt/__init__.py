"""A small, exact, float64 L-BFGS inside larger JAX programs.

Re-creates `jax_privacy.matrix_factorization.optimization` as a functional solver: a
whole solve is one `jax.jit`-compiled, `jax.vmap`-able call.
"""

from . import callbacks as callbacks
from . import losses as losses
from . import robust as robust
from . import sweeps as sweeps
from ._callback import CallbackArgs as CallbackArgs
from ._callback import CallbackFnType as CallbackFnType
from ._callback import Lane as Lane
from ._callback import combine as combine
from ._callback import traced as traced
from ._custom_types import ParamT as ParamT
from ._minimiser import LeanOptaxMinimiser as LeanOptaxMinimiser
from ._optimize import optimize as optimize
from ._optimizer import DEFAULT_OPTIMIZER as DEFAULT_OPTIMIZER
from ._solution import Solution as Solution
from ._solve import solve as solve
from ._state import History as History
from ._state import MinimiserState as MinimiserState
from ._state import SolverState as SolverState
from ._x64 import jax_enable_x64 as jax_enable_x64
from .robust import ROBUST_OPTIMIZER as ROBUST_OPTIMIZER
from .sweeps import sweep as sweep

__version__ = "0.1.0"
