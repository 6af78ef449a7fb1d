"""Type variables that several modules share."""

from typing import TypeVar

import chex

# Upstream's name for the parameters: a pytree of arrays, the same in and out.
ParamT = TypeVar("ParamT", bound=chex.ArrayTree)

# optimistix's names: the iterate, and what the loss returns beside its value.
Y = TypeVar("Y")
Aux = TypeVar("Aux")
