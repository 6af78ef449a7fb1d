"""A small, exact, float64 L-BFGS inside larger JAX programs.

Re-creates `jax_privacy.matrix_factorization.optimization` as a functional solver: a
whole solve is one `jax.jit`-compiled, `jax.vmap`-able call.
"""

from . import callbacks, mechanisms, privacy, robust, sweeps
from ._jax.x64 import jax_enable_x64
from ._minimax import Minimax, minimax
from ._optimize import optimize
from ._solve import solve
from ._solver.adjoint import MinimumNormAdjoint
from ._solver.minimiser import LeanOptaxMinimiser
from ._solver.optimizers import DEFAULT_OPTIMIZER
from ._solver.solution import Solution
from ._solver.state import History, MinimiserState, SolverState
from ._typing import ParamT
from .callbacks import CallbackArgs, CallbackFnType, Lane, combine, traced
from .robust import ROBUST_OPTIMIZER
from .sweeps import sweep

__all__ = [
    "DEFAULT_OPTIMIZER",
    "ROBUST_OPTIMIZER",
    "CallbackArgs",
    "CallbackFnType",
    "History",
    "Lane",
    "LeanOptaxMinimiser",
    "Minimax",
    "MinimiserState",
    "MinimumNormAdjoint",
    "ParamT",
    "Solution",
    "SolverState",
    "callbacks",
    "combine",
    "jax_enable_x64",
    "mechanisms",
    "minimax",
    "optimize",
    "privacy",
    "robust",
    "solve",
    "sweep",
    "sweeps",
    "traced",
]

__version__ = "0.1.0"


def __dir__() -> list[str]:
    return __all__
