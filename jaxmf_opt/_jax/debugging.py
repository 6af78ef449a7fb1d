"""What `jax_debug_nans`, `jax_debug_infs` and `jax.transfer_guard` mean for a solve.

The first two look at all that a compiled program returns. A solve returns NaN where
nothing is known yet (rows of a history, the loss before the first step) and infinity
where a line search starts. So its programs run without the alarm; it is raised behind
them if the loss, its gradient or the parameters are not finite. The guard is for
transfers that nobody has asked for; that of a limit or a tolerance is no such one.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

_config: Any = jax.config  # its attributes have no types


def alarms() -> bool:
    """Whether JAX is to raise where numbers are not finite."""
    return bool(_config.jax_debug_nans or _config.jax_debug_infs)


def guarded() -> bool:
    """Whether JAX is to log or refuse transfers from the host."""
    return _config.jax_transfer_guard_host_to_device not in (None, "allow")


@contextlib.contextmanager
def no_alarms() -> Iterator[None]:
    """Neither alarm, in this thread."""
    with jax.debug_nans(False), jax.debug_infs(False):
        yield


def own_transfers() -> contextlib.AbstractContextManager[Any]:
    """For what the library sends to a device: counts, flags and tolerances."""
    return jax.transfer_guard_host_to_device("allow")


def undisturbed(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled program that neither raises an alarm nor meets the guard."""

    def sent(x: Any) -> Any:
        return jax.device_put(x) if isinstance(x, (bool, int, float)) else x

    def run(*args: Any) -> Any:
        with no_alarms():
            return fn(*jax.tree.map(sent, args) if guarded() else args)

    return run


def raise_alarm(
    loss: Callable[..., Any], y: PyTree, captured: Sequence[Any], results: PyTree
) -> None:
    """Raises JAX's alarm if results of a solve are not finite.

    Args:
      loss: The loss, of a point and of what it captures. It is evaluated again, for JAX
        to find the operation.
      y: The last point.
      captured: What the loss captures.
      results: What has come out.

    Raises:
      FloatingPointError: If it is not finite, in a way that is asked for.
    """
    if kind := _kind_of_alarm(results):
        jax.jit(jax.value_and_grad(loss))(y, captured)
        raise _error(kind)


def raise_if_alarmed(results: PyTree) -> None:
    """Raises JAX's alarm if results of a solve are not finite.

    Args:
      results: What has come out.

    Raises:
      FloatingPointError: If it is not finite, in a way that is asked for.
    """
    if kind := _kind_of_alarm(results):
        raise _error(kind)


def _error(kind: str) -> FloatingPointError:
    return FloatingPointError(
        f"invalid value ({kind}) in the loss, its gradient or the parameters of a solve"
    )


def _kind_of_alarm(results: PyTree) -> str | None:
    with no_alarms():
        leaves = [np.asarray(x) for x in jax.tree.leaves(results)]
    if _config.jax_debug_nans and any(np.isnan(x).any() for x in leaves):
        return "nan"
    if _config.jax_debug_infs and any(np.isinf(x).any() for x in leaves):
        return "inf"
    return None
