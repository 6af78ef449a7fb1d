"""The solve of one lane of a sweep, part by part, as pure functions of its arrays."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Bool, Int, PyTree

from .._solver.compiled_callbacks import CompiledCallbacks
from .._solver.driver import advance
from .._solver.loop import Pause
from .._solver.objective import trace
from .._solver.resume import matches_problem, resume_state, start, with_history_buffer
from .._solver.solution import Solution
from .._solver.spec import SolveSpec, Tolerances
from .._solver.state import SolverState
from ._batch import AXIS


class LaneSetting(NamedTuple):
    """What all lanes of a sweep have in common.

    Attributes:
      loss_fn: The loss, of parameters and a hyperparameter.
      grad: Whether it returns its gradient too.
      optimizer: The optax transformation, or a function of the hyperparameter.
      tolerances: The tolerances, or functions of the hyperparameter.
      max_steps: The limit of steps.
      callbacks: The callbacks that are compiled. There is one, perhaps an empty one,
        wherever a callback sees each step.
      callback_consts: The arrays that they close over.
      params: The `jax.ShapeDtypeStruct`s of the parameters, float64.
      dtypes: The dtypes that leaves of the parameters get in the end.
      int_dtype: The dtype that counts get in the end.
      float_dtype: The dtype that losses and norms get in the end.
      tests: Whether tolerances are looked at.
      history: How many steps to record, if any.
    """

    loss_fn: Callable[..., Any]
    grad: bool
    optimizer: Any
    tolerances: tuple[Any, Any, Any]
    max_steps: int
    callbacks: CompiledCallbacks | None
    callback_consts: Sequence[Array]
    params: PyTree
    dtypes: Sequence[Any]
    int_dtype: Any
    float_dtype: Any
    tests: bool
    history: int | None

    def first(self, params: PyTree, hyperparam: PyTree) -> SolverState:
        """The state before the first step."""
        optimizer = of_lane(self.optimizer, hyperparam)
        return start(
            optimizer,
            params,
            tests=self.tests,
            history=self.history,
            stop_if_nonfinite=self.callbacks is None,
        )

    def resume_state(
        self, state: SolverState, hyperparam: PyTree
    ) -> tuple[SolverState, Bool[Array, ""]]:
        """A state of an earlier run, made ready; and whether it is of this problem."""
        spec, captured = self._spec(hyperparam)
        last = state.minimiser.last_finite
        is_mine = matches_problem(state, spec.program.loss(last.params, captured))
        is_seen = self.callbacks is not None
        ready = resume_state(state, spec.optimizer, tests=self.tests, is_seen=is_seen)
        return with_history_buffer(ready, self.history), is_mine

    def advance(
        self,
        state: SolverState,
        hyperparam: PyTree,
        is_real: Bool[Array, ""],
        steps: Int[Array, ""],
        keep: Int[Array, ""],
    ) -> tuple[Solution, SolverState, Bool[Array, ""]]:
        """Takes a part of the steps.

        Args:
          state: Where the lane is.
          hyperparam: Its hyperparameter.
          is_real: Whether it is one, and not there to fill up its batch.
          steps: How many steps to take at most, and
          keep: of how many lanes of the batch all but that many have to end first.

        Returns:
          The solution, without a state, which counts if the lane has ended; where the
          lane is now; whether it has anything left to do.
        """
        spec, captured = self._spec(hyperparam)
        ended = lambda s: s.minimiser.ended  # noqa: E731
        solution, end, running = advance(
            spec,
            eqx.tree_at(ended, state, ended(state) | ~is_real),
            captured,
            self.max_steps,
            Tolerances(*(of_lane(t, hyperparam) for t in self.tolerances)),
            self.callback_consts,
            Pause(steps, keep, AXIS),
        )
        solution = eqx.tree_at(lambda s: s.state, solution, None)
        return solution, end, running & is_real

    def value_and_grad(
        self, params: PyTree, hyperparam: PyTree
    ) -> tuple[Array, PyTree]:
        """What is evaluated at each step."""
        spec, captured = self._spec(hyperparam)
        return jax.value_and_grad(spec.program.loss)(params, captured)

    def _spec(self, hyperparam: PyTree) -> tuple[SolveSpec, list[Array]]:
        loss_fn = functools.partial(_call, self.loss_fn, hyperparam)
        objective = trace(loss_fn, self.params, grad=self.grad)
        spec = SolveSpec(
            objective.program,
            of_lane(self.optimizer, hyperparam),
            tuple(self.dtypes),
            self.int_dtype,
            self.float_dtype,
            tests=self.tests,
            history=self.history,
            callbacks=self.callbacks,
        )
        return spec, objective.captured


def _call(loss_fn: Callable[..., Any], hyperparam: PyTree, params: PyTree) -> Any:
    return loss_fn(params, hyperparam)


def of_lane(option: Any, hyperparam: PyTree) -> Any:
    """An option of a lane: itself, or what a function makes of its hyperparameter."""
    return option(hyperparam) if is_function(option) else option


def is_function(option: Any) -> bool:
    """Whether an option is a function of the hyperparameter."""
    return callable(option) and not isinstance(
        option, (optax.GradientTransformation, jax.Array)
    )
