"""The explicit state of a solve: pytrees whose leaves are all arrays."""

from typing import Any, Generic, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._jax.pickling import reduced
from .._typing import Aux, Y


class Evaluations(NamedTuple):
    """How often something has been computed.

    Attributes:
      loss: How often the loss was, with or without its gradient. -1 if that cannot be
        known, because the optimizer calls the loss in a way of its own.
      grad: How often its gradient was; -1 as above.
    """

    loss: Int[Array, ""]
    grad: Int[Array, ""]

    def plus(self, both: Int[Array, ""], more: "Evaluations") -> "Evaluations":
        """The sum of these, some of both, and some more, as far as all are known."""

        def add(n: Array, more: Array) -> Array:
            return jnp.where((n < 0) | (more < 0), -1, n + both + more).astype(n.dtype)

        return Evaluations(add(self.loss, more.loss), add(self.grad, more.grad))


class Evaluated(NamedTuple):
    """A point that has been evaluated.

    Attributes:
      params: The point.
      loss: The loss there; NaN if no point has been evaluated yet.
      grad_norm: The norm of the gradient there.
    """

    params: PyTree
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]


class History(NamedTuple):
    """Losses, gradient norms and step sizes of all steps; NaN for steps not taken.

    Attributes:
      loss: The loss where the step started.
      grad_norm: The max-norm of the gradient there.
      step_size: The max-norm of the step, of what was added to the parameters.
    """

    loss: Float[Array, " steps"]
    grad_norm: Float[Array, " steps"]
    step_size: Float[Array, " steps"]

    @classmethod
    def of_no_steps(cls, length: int) -> "History":
        """A history with nothing in it yet."""
        return cls(*(jnp.full(length, jnp.nan) for _ in cls._fields))


class Movement(NamedTuple):
    """The last step, for the tests of tolerances.

    Attributes:
      update: The step itself, the difference of two iterates.
      loss: The loss where it started.
      grad: The gradient there.
    """

    update: PyTree
    loss: Float[Array, ""]
    grad: PyTree

    @classmethod
    def none(cls, y: PyTree, dtype: jnp.dtype) -> "Movement":
        """Before the first step: no test is passed by it."""
        zeros = jax.tree.map(jnp.zeros_like, y)
        return cls(zeros, jnp.array(jnp.inf, dtype), zeros)


class Move(NamedTuple):
    """Where a step leads, if one is made.

    Attributes:
      y: The new point.
      update: The step.
      opt_state: The new state of the optax transformation.
      stalled: Whether no later step can move the point.
      evaluations: What the step has taken.
    """

    y: PyTree
    update: PyTree
    opt_state: PyTree
    stalled: Bool[Array, ""]
    evaluations: Evaluations


class MinimiserState(eqx.Module, Generic[Y, Aux]):
    """The explicit state of a `LeanOptaxMinimiser`. Every leaf is an array.

    Attributes:
      step: How many steps have been taken.
      loss: The loss at the last point that was evaluated: the one that the last step
        started from or, once the run has ended, the one that it led to.
      grad: The gradient at that point.
      aux: What the loss returned beside its value at that point.
      movement: The last step. None where no tolerance is on: nobody asks for it, and
        to keep it changes how XLA rounds.
      opt_state: The state of the optax transformation.
      converged: Whether a tolerance has been met.
      stalled: Whether it is proven that no step can move the point any more.
      interrupted: Whether a callback has asked to stop. What the last step led to is
        still evaluated.
      ended: Whether nothing is left to do.
      first_loss: The loss at the starting point; NaN before it is evaluated.
      last_finite: The last point whose loss is finite.
      evaluations: How often loss and gradient have been computed.
      history: What is recorded of each step, if anything is.
      reuses_linesearch: Whether `opt_state` ends in a line search that stores value and
        gradient at the point it accepts, and the optimizer moves there.
    """

    step: Int[Array, ""]
    loss: Float[Array, ""]
    grad: Y
    aux: Aux
    movement: Movement | None
    opt_state: PyTree
    converged: Bool[Array, ""]
    stalled: Bool[Array, ""]
    interrupted: Bool[Array, ""]
    ended: Bool[Array, ""]
    first_loss: Float[Array, ""]
    last_finite: Evaluated
    evaluations: Evaluations
    history: History | None
    reuses_linesearch: bool = eqx.field(static=True)

    def with_history(self, history: History | None) -> "MinimiserState[Y, Aux]":
        """The state with another history."""
        of = lambda s: s.history  # noqa: E731
        return eqx.tree_at(of, self, history, is_leaf=lambda x: x is None)


class SolverState(NamedTuple):
    """The state of a solve, from which another call resumes it.

    Attributes:
      params: The current point, float64.
      minimiser: The state of the minimiser.
    """

    params: PyTree
    minimiser: MinimiserState

    def __reduce__(self) -> tuple[Any, Any]:
        """All arrays as they are, also in a float32 program."""
        return reduced(type(self), self)
