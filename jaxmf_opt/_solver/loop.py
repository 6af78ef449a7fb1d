"""The loop of a solve: optimistix's, which can be interrupted, and calls back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import optimistix as optx
from jaxtyping import Array, Bool, Int

from .minimiser import all_finite


class Pause(NamedTuple):
    """When a lane of a batch interrupts its solve.

    Attributes:
      steps: After this many steps.
      keep: Or when at most this many lanes of the batch have anything left to do, so
        that others can take the places of those that have finished.
      axis_name: The mapped axis of the batch.
    """

    steps: Int[Array, ""]
    keep: Int[Array, ""]
    axis_name: str

    def is_due(
        self, on: Bool[Array, ""], steps_taken: Int[Array, ""]
    ) -> Bool[Array, ""]:
        """Whether to interrupt a solve that has, or has not, anything left to do."""
        running = jax.lax.psum(on.astype(int), self.axis_name)
        return (steps_taken >= self.steps) | (running <= self.keep)


class Loop(optx.AbstractAdjoint):
    """Runs optimistix's loop.

    In the place of an adjoint, because that is where optimistix lets one choose the
    loop. Derivatives are taken around a solve, never through it.
    """

    goes_on_from_nonfinite: bool = eqx.field(static=True)
    pause: Pause | None = None

    def apply(
        self, primal_fn: Callable, rewrite_fn: Callable, inputs: Any, tags: Any
    ) -> Any:
        """Runs `primal_fn`, which takes the loop as the last of its inputs."""
        del rewrite_fn, tags

        def while_loop(cond: Callable, body: Callable, init: Any, **_: Any) -> Any:
            steps_before = init[2].step

            def goes_on(carry: Any) -> Bool[Array, ""]:
                # A callback is told of all steps, as upstream's is. optimistix would
                # end a run that is no longer finite; all else is in the state.
                y, _, state, _, terminate, _ = carry
                on = ~terminate if self.goes_on_from_nonfinite else cond(carry)
                if self.pause is None:
                    return on
                is_due = self.pause.is_due(on, state.step - steps_before)
                if not self.goes_on_from_nonfinite:
                    # optimistix sees one step later that a point is not finite, and
                    # at once if it begins there.
                    is_due &= all_finite(y)
                return on & ~is_due

            return jax.lax.while_loop(goes_on, body, init)

        return primal_fn((*inputs, while_loop))
