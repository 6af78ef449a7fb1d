"""Types that several modules share."""

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import chex
import numpy as np
from jaxtyping import Array, Float

if TYPE_CHECKING:
    # jaxtyping's says nothing to type checkers, which then call a whole function
    # unknown: this one is for the signatures of the public interface.
    PyTree: TypeAlias = Any
else:
    from jaxtyping import PyTree as PyTree

# Upstream's name for parameters, exported for programs that use it. (The functions here
# take more than chex's ArrayTree: pytrees with None in them, for example.)
ParamT = TypeVar("ParamT", bound=chex.ArrayTree)

# optimistix's names: parameters or iterate, and what a loss returns beside its value.
Y = TypeVar("Y")
Aux = TypeVar("Aux")

# A tolerance: a number, or an array so that it can be batched.
Tolerance: TypeAlias = float | int | np.number | Float[Array | np.ndarray, ""]
