"""What a callback is told about a step, and which callbacks there are."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Float, PyTree


class Lane:
    """One solve of those that a callback sees: a key for what it keeps about each.

    Every solve has its own, and each lane of a batched one. Lanes compare by identity
    and live as long as the solve runs, so they suit a `weakref.WeakKeyDictionary`.

    Attributes:
      index: Where the lane is in its batch; () outside of one. On each device of a
        `jax.shard_map` it counts from 0.
    """

    def __init__(self, index: tuple[int, ...] = ()):
        self.index = index

    def __repr__(self) -> str:
        return f"Lane({self.index})"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "loss", "grad", "params", "state"],
    meta_fields=[],
)
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

    @property
    def lane(self) -> Lane | None:
        """The solve that this is a step of. Not a field: it belongs to no pytree."""
        return getattr(self, "_lane", None)

    def of_lane(self, lane: Lane) -> "CallbackArgs":
        """Returns this, with its lane set."""
        self._lane = lane
        return self


CallbackFnType: TypeAlias = Callable[[CallbackArgs], bool | None]


def no_callback(_: CallbackArgs) -> None:
    """The default callback. A solve that has it runs as one compiled program."""


class traced:  # noqa: N801, a decorator
    """Marks a callback that is compiled into the solve.

    It is traced by JAX as the loss is: it sees `CallbackArgs` of traced float64 values,
    and works under every transformation, for each lane by itself, at no call to the
    host. What it prints, it prints by `jax.debug.print` (in a batch, also for lanes
    that have stopped while others go on).

    Example:
      As a decorator::

        @traced
        def small_gradient(info: CallbackArgs):
            return jnp.max(jnp.abs(info.grad)) < 1e-6

        jax.vmap(lambda c: optimize(lambda y: loss(y, c), y0, callback=small_gradient))
    """

    def __init__(self, fn: Callable[[CallbackArgs], Any]):
        """Marks `fn`.

        Args:
          fn: Takes `CallbackArgs`, returns None or a boolean scalar: whether to stop
            after this step.

        Raises:
          TypeError: If `fn` is not callable.
        """
        if not callable(fn):
            raise TypeError(f"traced: `fn` must be callable, got {fn!r}.")
        self.fn = fn
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, info: CallbackArgs) -> Any:
        """Calls `fn`, as it is."""
        return self.fn(info)


class combine:  # noqa: N801, reads as a function
    """Several callbacks as one. All are called at each step; any of them stops.

    Callbacks that are marked as `traced` are compiled into the solve, provided that
    the solve is compiled: if none of the others is plain Python, or within `jax.jit`.
    """

    def __init__(self, *callbacks: CallbackFnType):
        """Puts callbacks together.

        Args:
          *callbacks: Called in this order.

        Raises:
          TypeError: If one is not callable.
        """
        for callback in callbacks:
            if not callable(callback):
                raise TypeError(
                    f"combine: `callbacks` must be callable, got {callback!r}."
                )
        self.callbacks = callbacks

    def __call__(self, info: CallbackArgs) -> bool:
        """Calls all, and returns whether any result is true."""
        stop = False
        for callback in self.callbacks:
            stop = bool(callback(info)) or stop
        return stop


def parts(callback: CallbackFnType) -> list[CallbackFnType]:
    """The callbacks that a callback is combined of, without those that do nothing."""
    if isinstance(callback, combine):
        return [part for c in callback.callbacks for part in parts(c)]
    return [] if callback is no_callback else [callback]
