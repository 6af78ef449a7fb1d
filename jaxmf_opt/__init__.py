"""A small, exact, float64 L-BFGS inside larger JAX programs.

Re-creates `jax_privacy.matrix_factorization.optimization` as a functional solver: a
whole solve is one `jax.jit`-compiled, `jax.vmap`-able call.
"""

from . import callbacks as callbacks
from . import mechanisms as mechanisms
from . import privacy as privacy
from . import robust as robust
from . import sweeps as sweeps
from ._jax.x64 import jax_enable_x64 as jax_enable_x64
from ._optimize import optimize as optimize
from ._solve import solve as solve
from ._solver.adjoint import MinimumNormAdjoint as MinimumNormAdjoint
from ._solver.minimiser import LeanOptaxMinimiser as LeanOptaxMinimiser
from ._solver.optimizers import DEFAULT_OPTIMIZER as DEFAULT_OPTIMIZER
from ._solver.solution import Solution as Solution
from ._solver.state import History as History
from ._solver.state import MinimiserState as MinimiserState
from ._solver.state import SolverState as SolverState
from ._typing import ParamT as ParamT
from .callbacks import CallbackArgs as CallbackArgs
from .callbacks import CallbackFnType as CallbackFnType
from .callbacks import Lane as Lane
from .callbacks import combine as combine
from .callbacks import traced as traced
from .robust import ROBUST_OPTIMIZER as ROBUST_OPTIMIZER
from .sweeps import sweep as sweep

__version__ = "0.1.0"
