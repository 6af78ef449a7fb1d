"""The default optimizer, and when two optimizers are one."""

import contextlib
import functools
import types
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from ._keys import as_numpy

# Upstream's default. One memory pair and a patient line search suit DP-MF losses.
DEFAULT_OPTIMIZER = optax.lbfgs(
    memory_size=1, linesearch=optax.scale_by_backtracking_linesearch(128)
)

# Libraries whose functions compute what their code says and what they close over. A
# function from elsewhere may read globals that its owner rebinds.
_LIBRARIES = frozenset(
    {"optax", "jax", "jaxlib", "chex", "equinox", "functools", "jaxmf_opt"}
)

_ATOMS = (types.BuiltinFunctionType, type(jax.jit(len)), type(jnp.add))


@contextlib.contextmanager
def as_optax_expects() -> Iterator[None]:
    """The setting in which optax is traced: it mixes types and ranks of arrays.

    Whoever is stricter with code of their own (`jax_numpy_dtype_promotion`,
    `jax_numpy_rank_promotion`) still has their loss traced as they want it.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class _NotComparableError(Exception):
    """Some part of an optimizer can be compared by nothing but its traced program."""


def optimizer_key(optimizer: optax.GradientTransformation) -> Hashable | None:
    """A key that is equal for optimizers that are made in the same way.

    optax makes an optimizer of nested closures, new ones each time. They are the same
    if they have the same code, down to what they close over.

    Args:
      optimizer: An optax transformation.

    Returns:
      A hashable key, or None if the optimizer cannot be told by its parts: if a
      user's function (a schedule, for example), a tracer or a mutable object is one of
      them.
    """
    try:
        return _key(optimizer, ())
    except _NotComparableError:
        return None


def _key(part: Any, parents: tuple[int, ...]) -> Hashable:
    if id(part) in parents:
        raise _NotComparableError
    parents = (*parents, id(part))

    def keys(parts: Any) -> Hashable:
        return tuple(_key(p, parents) for p in parts)

    match part:
        case None | bool() | int() | str() | bytes():
            return (type(part), part)
        case float():  # 0.0 == -0.0, but they are not the same optimizer
            return (type(part), part.hex())
        case tuple() | list():
            return (type(part), keys(part))
        case dict():
            return (dict, keys(part.keys()), keys(part.values()))
        case functools.partial():
            return ("partial", keys((part.func, part.args, part.keywords)))
        case types.FunctionType() if _from_library(part):
            cells = [c.cell_contents for c in part.__closure__ or ()]
            defaults = (part.__defaults__, part.__kwdefaults__)
            return (part.__code__, id(part.__globals__), keys(cells), keys(defaults))
        case np.dtype() | type():
            return part
        case Tracer():
            raise _NotComparableError
        case jax.Array() | np.ndarray() | np.generic():
            with jax.ensure_compile_time_eval():
                a = as_numpy(part)
            return (type(part), part.dtype, a.shape, a.dtype, a.tobytes())
    if isinstance(part, _ATOMS) and _from_library(part):
        return part  # at module level, so there is one of it
    raise _NotComparableError


def _from_library(fn: Any) -> bool:
    return (getattr(fn, "__module__", None) or "").partition(".")[0] in _LIBRARIES
