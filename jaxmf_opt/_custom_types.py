"""Type variables that several modules share."""

from typing import TypeVar

import chex

# Upstream's name for parameters, exported for programs that use it. (The functions here
# take more than chex's ArrayTree: pytrees with None in them, for example.)
ParamT = TypeVar("ParamT", bound=chex.ArrayTree)

# optimistix's names: parameters or iterate, and what a loss returns beside its value.
Y = TypeVar("Y")
Aux = TypeVar("Aux")
