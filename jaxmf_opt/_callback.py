"""What a callback is told about a step, and which callbacks there are."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Float, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class CallbackArgs:
    """Information passed to the callback after each optimization step.

    A dataclass with the fields of its namesake in jax-privacy, and a pytree.

    Attributes:
      step: The number of this step, from 0.
      loss: The loss at the parameters *before* the step: a float64 scalar.
      grad: The gradient at the parameters before the step: float64 arrays in the
        structure of `params`.
      params: The parameters *after* the step, as float64 arrays.
      state: The state of the optax optimizer after the step, so that
        `optax.tree.get(info.state, "learning_rate")` works.
    """

    step: int
    loss: Float[Array, ""]
    grad: PyTree | None
    params: PyTree
    state: Any


CallbackFnType: TypeAlias = Callable[[CallbackArgs], bool | None]


def no_callback(_: CallbackArgs) -> None:
    """The default callback. A solve that has it runs as one compiled program."""
