"""What a loss closes over, as JAX sees it: arrays are operands, numbers are constants.

JAX makes constants of NumPy's scalars, and of all that a function closes over that is
itself marked as `jax.jit`: a program is then compiled for each of their values. They
are arrays to their owners, so here they are operands like any array.
"""

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_JITTED = type(jax.jit(len))


def with_operands(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes the same, whose arrays JAX sees as arrays.

    Looks into what functions close over, their defaults and `functools.partial`; not at
    globals or attributes. Python's numbers, and NumPy's integers, which may be sizes,
    stay what they are.

    Args:
      fn: A function.

    Returns:
      A copy of it, or `fn` itself if there is nothing to change.
    """
    return _changed(fn, ())


def _changed(x: Any, parents: tuple[int, ...]) -> Any:
    if id(x) in parents:
        return x
    parents = (*parents, id(x))
    match x:
        case np.floating():
            return jnp.asarray(x)
        case np.ndarray() if x.ndim == 0 and np.issubdtype(x.dtype, np.floating):
            return jnp.asarray(x)
        case functools.partial():
            parts = [x.func, *x.args, *x.keywords.values()]
            func, *rest = new = [_changed(part, parents) for part in parts]
            if _are_same(parts, new):
                return x
            args, values = rest[: len(x.args)], rest[len(x.args) :]
            return functools.partial(
                func, *args, **dict(zip(x.keywords, values, strict=True))
            )
        case types.FunctionType():
            return _function(x, parents)
    if isinstance(x, _JITTED):
        return _changed(getattr(x, "__wrapped__", x), parents)
    return x


def _function(fn: types.FunctionType, parents: tuple[int, ...]) -> types.FunctionType:
    """A copy of a function that shares the variables which are not changed."""
    cells = []
    for cell in fn.__closure__ or ():
        try:
            old = cell.cell_contents
        except ValueError:  # a variable that is not set
            cells.append(cell)
            continue
        new = _changed(old, parents)
        cells.append(cell if new is old else types.CellType(new))
    defaults = tuple(_changed(x, parents) for x in fn.__defaults__ or ())
    keywords = {k: _changed(x, parents) for k, x in (fn.__kwdefaults__ or {}).items()}
    if (
        _are_same(cells, fn.__closure__ or ())
        and _are_same(defaults, fn.__defaults__ or ())
        and _are_same(keywords.values(), (fn.__kwdefaults__ or {}).values())
    ):
        return fn
    copy = types.FunctionType(
        fn.__code__, fn.__globals__, fn.__name__, defaults or None, tuple(cells)
    )
    copy.__kwdefaults__ = keywords or None
    copy.__qualname__ = fn.__qualname__
    copy.__dict__.update(fn.__dict__)
    return copy


def _are_same(old: Iterable[Any], new: Iterable[Any]) -> bool:
    return all(x is y for x, y in zip(old, new, strict=True))
