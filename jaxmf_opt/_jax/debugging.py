"""What `jax_debug_nans`, `jax_debug_infs` and `jax.transfer_guard` mean for a solve.

The first two look at all that a compiled program returns. A solve returns NaN where
nothing is known yet (rows of a history, the loss before the first step) and infinity
where a line search starts. So its programs run without the alarm; it is raised behind
them if the loss, its gradient or the parameters are not finite. The guard is for
transfers that nobody has asked for; that of a limit or a tolerance is no such one.
"""

import contextlib
from collections.abc import Callable, Iterator
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
    results: PyTree, loss: Callable[..., Any] | None = None, *at: PyTree
) -> None:
    """Raises JAX's alarm if results of a solve are not finite.

    Args:
      results: What has come out.
      loss: The loss, if it is known. It is evaluated again, for JAX to find the
        operation.
      *at: Its arguments: the last point, and what it captures.

    Raises:
      FloatingPointError: If they are not finite, in a way that is asked for.
    """
    with no_alarms():
        leaves = [np.asarray(x) for x in jax.tree.leaves(results)]
    nans = _config.jax_debug_nans and any(np.isnan(x).any() for x in leaves)
    infs = _config.jax_debug_infs and any(np.isinf(x).any() for x in leaves)
    if not (nans or infs):
        return
    if loss is not None:
        jax.jit(jax.value_and_grad(loss))(*at)
    kind = "nan" if nans else "inf"
    raise FloatingPointError(
        f"invalid value ({kind}) in the loss, its gradient or the parameters of a solve"
    )
