"""The loop of a solve: optimistix's, which can be interrupted, and calls back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Int

from .state import MinimiserState


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
        # (Not by `psum`, which JAX 0.12 cannot lower in a loop under an explicit mesh.)
        running = jnp.sum(jax.lax.all_gather(on, self.axis_name).astype(int))
        return (steps_taken >= self.steps) | (running <= self.keep)


class Loop(optx.AbstractAdjoint):
    """Runs optimistix's loop until the state of the minimiser says that it has ended.

    In the place of an adjoint, because that is where optimistix lets one choose the
    loop. Derivatives are taken around a solve, never through it.
    """

    pause: Pause | None = None

    def apply(
        self, primal_fn: Callable, rewrite_fn: Callable, inputs: Any, tags: Any
    ) -> Any:
        """Runs `primal_fn`, which takes the loop as the last of its inputs."""
        del rewrite_fn, tags

        def while_loop(cond: Callable, body: Callable, init: Any, **_: Any) -> Any:
            del cond  # which would end a run that is no longer finite, too
            steps_before = _state(init).step

            def goes_on(carry: Any) -> Bool[Array, ""]:
                state = _state(carry)
                if self.pause is None:
                    return ~state.ended
                steps_taken = state.step - steps_before
                return ~(state.ended | self.pause.is_due(~state.ended, steps_taken))

            return jax.lax.while_loop(goes_on, body, init)

        return primal_fn((*inputs, while_loop))


def _state(carry: Any) -> MinimiserState:
    """The state of the minimiser in what optimistix's loop carries."""
    (state,) = (x for x in carry if isinstance(x, MinimiserState))
    return state
