"""The arguments of a callback, and the kinds of callbacks."""

import dataclasses
import functools
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._jax.pickling import reduced


class Lane:
    """Which solve of a batch called the callback; a key for what is kept for each.

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


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass
class CallbackArgs:
    """Information passed to the callback after each optimization step.

    A dataclass with the fields of its namesake in jax-privacy, and a pytree. Inside of
    compiled programs the arrays are NumPy's, or traced in a callback that is `traced`.

    Attributes:
      step: The number of this step, from 0.
      loss: The loss at the parameters *before* the step: a float64 scalar.
      grad: The gradient at the parameters before the step: float64 arrays in the
        structure of `params`.
      params: The parameters *after* the step, as float64 arrays.
      state: The state of the optax optimizer after the step, so that
        `optax.tree.get(info.state, "learning_rate")` works.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import optimize
      >>> def callback(info: CallbackArgs):
      ...     print(info.step, f"{info.loss:.3f}", f"{info.params:.3f}")
      >>> y = optimize(lambda y: (y - 3.0) ** 2, 1.0, callback=callback,
      ...              max_optimizer_steps=2)
      0 4.000 2.000
      1 1.000 3.000
    """

    step: int
    loss: Float[Array, ""]
    grad: PyTree
    params: PyTree
    state: Any

    # What a solve adds for callbacks that keep something. No fields: they do not belong
    # to the pytree, and a `CallbackArgs` made elsewhere has none of them.

    @property
    def lane(self) -> Lane:
        """The solve that this is a step of. Not on the traced side."""
        return self._of_solve("_lane")

    @property
    def solver_state(self) -> PyTree:
        """All of the state, from which `solve(..., state=...)` goes on.

        Not on the traced side.
        """
        make, args = self._of_solve("_solver_state")
        return make(*args)

    def _of_solve(self, name: str) -> Any:
        if not hasattr(self, name):
            raise AttributeError(
                f"CallbackArgs has no `{name[1:]}` here: a solve gives it to callbacks "
                "that run in Python, and copies lose it."
            )
        return getattr(self, name)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
        """The fields, as the children of a pytree."""
        names = [field.name for field in dataclasses.fields(self)]
        return [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in names], None

    def __reduce__(self) -> tuple[Any, Any]:
        """The fields; what belongs to a solve stays with it."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return reduced(_callback_args, fields)

    @classmethod
    def tree_unflatten(cls, _: None, children: Iterable[Any]) -> "CallbackArgs":
        """From fields of any type: those of a pytree may be shapes or tracers."""
        self = object.__new__(cls)
        for field, child in zip(dataclasses.fields(cls), children, strict=True):
            setattr(self, field.name, child)
        return self

    def bind(
        self, lane: Lane, make_state: Callable[..., PyTree], *args: Any
    ) -> "CallbackArgs":
        """Returns this, with its lane and with what makes the whole state set."""
        self._lane, self._solver_state = lane, (make_state, args)
        return self


def _callback_args(*fields: Any) -> CallbackArgs:
    return CallbackArgs.tree_unflatten(None, fields)


CallbackFnType: TypeAlias = Callable[[CallbackArgs], bool | None]


class traced:  # noqa: N801, a decorator
    """Marks a callback that is compiled into the solve.

    It is traced by JAX as the loss is: it sees `CallbackArgs` of traced float64 values,
    and works under every transformation, for each lane by itself, at no call to the
    host. What it prints, it prints by `jax.debug.print` (in a batch, also for lanes
    that have stopped while others go on).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import optimize
      >>> @traced
      ... def low_enough(info):
      ...     return info.loss < 1e-3
      >>> def closest(c):
      ...     loss = lambda y: jnp.cosh(y - c)
      ...     return optimize(loss, 0.0, callback=low_enough)
      >>> jax.vmap(closest)(jnp.array([1.0, 2.0]))
      Array([1., 2.], dtype=float32)
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

    def __reduce__(self) -> str | tuple[Any, Any]:
        """By its name if it has taken the place of a module's function."""
        name = getattr(self.fn, "__qualname__", "")
        module = sys.modules.get(getattr(self.fn, "__module__", ""))
        try:
            is_global = operator.attrgetter(name)(module) is self
        except AttributeError:
            is_global = False
        return name if is_global else (traced, (self.fn,))


class combine:  # noqa: N801, reads as a function
    """Several callbacks as one. All are called at each step; any of them stops.

    Callbacks that are marked as `traced` are compiled into the solve, provided that
    the solve is compiled: if none of the others is plain Python, or within `jax.jit`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import callbacks, optimize
      >>> recorder = callbacks.Recorder()
      >>> stop = callbacks.small_gradient(1e-6)
      >>> y = optimize(jnp.cosh, 1.0, callback=combine(recorder, stop))
      >>> bool(recorder.records[0].grad_norm[-1] < 1e-3)
      True
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
            stop = asks_to_stop(callback(info)) or stop
        return stop


def asks_to_stop(answer: Any) -> bool:
    """Whether what a callback in Python has returned is truthy.

    Raises:
      ValueError: If it is an array of several elements, which is neither.
    """
    if isinstance(answer, (jax.Array, np.ndarray)) and answer.size != 1:
        raise ValueError(
            "`callback` must return None or something truthy or falsy, got an array of "
            f"shape {answer.shape}. Reduce it, with `.all()` or `.any()` for example."
        )
    return bool(answer)


def flatten_callbacks(callback: CallbackFnType | None) -> list[CallbackFnType]:
    """The callbacks that a callback is combined of."""
    if isinstance(callback, combine):
        return [part for c in callback.callbacks for part in flatten_callbacks(c)]
    return [] if callback is None else [callback]
