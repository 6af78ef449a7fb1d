"""The default optimizer, and when two optimizers are one."""

import contextlib
import functools
import sys
import types
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer

from .._jax.compat import closure_to_pytree
from .._jax.keys import as_numpy

# Upstream's default. One memory pair and a patient line search suit DP-MF losses.
DEFAULT_OPTIMIZER = optax.lbfgs(
    memory_size=1, linesearch=optax.scale_by_backtracking_linesearch(128)
)

# Libraries whose functions compute what their code says and what they close over. A
# function from elsewhere may read globals that its owner rebinds.
_LIBRARIES = frozenset(
    {"optax", "jax", "jaxlib", "chex", "equinox", "functools", "jaxmf_opt", "builtins"}
)


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
      A hashable key, or None if the optimizer cannot be identified by its parts: if a
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
        case types.FunctionType() if _is_of_library(part):
            cells = list(map(_contents, part.__closure__ or ()))
            defaults = (part.__defaults__, part.__kwdefaults__)
            return (part.__code__, id(part.__globals__), keys(cells), keys(defaults))
        case np.dtype():
            return part
        case type() if _is_in_library(part, part.__name__):
            return part
        case Tracer():
            raise _NotComparableError
        case jax.Array() | np.ndarray() | np.generic():
            with jax.ensure_compile_time_eval():
                a = as_numpy(part)
            return (type(part), part.dtype, a.shape, a.dtype, a.tobytes())
        case _ if part is _EMPTY:
            return ("empty",)
    name = getattr(part, "__name__", None)
    if isinstance(name, str) and _is_in_library(part, name):
        return part  # at module level, so there is one of it
    raise _NotComparableError


_EMPTY = object()


def _contents(cell: types.CellType) -> Any:
    """What a function closes over; a variable may not be set, or not yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _is_of_library(fn: types.FunctionType) -> bool:
    """Whether a function is a library's, by its globals: a name can be copied."""
    module: Any = fn.__globals__.get("__name__")
    if not _is_library(module):
        return False
    return getattr(sys.modules.get(module), "__dict__", None) is fn.__globals__


def _is_in_library(part: Any, name: str) -> bool:
    """Whether something is what a library calls by its name."""
    module: Any = getattr(part, "__module__", None)
    places: tuple[Any, ...] = (module, "jax.numpy", "jax.lax", "builtins")
    return any(
        _is_library(place) and getattr(sys.modules.get(place), name, None) is part
        for place in places
    )


def _is_library(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _LIBRARIES


def closed_over(optimizer: Any) -> list[Any]:
    """The arrays that the functions of an optimizer close over, tracers among them."""
    found: list[Any] = []
    seen: set[int] = set()

    def visit(part: Any) -> None:
        if id(part) in seen:
            return
        seen.add(id(part))
        if isinstance(part, types.FunctionType):
            inside = [
                *map(_contents, part.__closure__ or ()),
                *(part.__defaults__ or ()),
                *(part.__kwdefaults__ or {}).values(),
            ]
        elif isinstance(part, types.MethodType):
            inside = [part.__self__, part.__func__]
        elif isinstance(part, functools.partial):
            inside = [part.func, *part.args, *part.keywords.values()]
        else:
            leaves = jax.tree.leaves(part)
            if len(leaves) == 1 and leaves[0] is part:
                if isinstance(part, (jax.Array, np.ndarray)):
                    found.append(part)
                inside = list(getattr(part, "__dict__", {}).values())
                inside.append(getattr(part, "__wrapped__", None))
            else:
                inside = leaves
        for x in inside:
            visit(x)

    visit(optimizer)
    return found


def as_pytree(optimizer: Any) -> Any:
    """An optimizer of which the arrays that it closes over are leaves.

    Returns it as it is if that cannot be: if a function closes over itself, or over a
    variable that is not set.
    """
    try:
        return closure_to_pytree(optimizer)
    except (ValueError, RecursionError):
        return optimizer
