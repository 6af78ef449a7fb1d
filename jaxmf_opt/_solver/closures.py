"""What a loss closes over, as JAX sees it: arrays are operands, numbers are constants.

JAX makes constants of NumPy's scalars, and of all that a function closes over that is
itself marked as `jax.jit`: a program is then compiled for each of their values. They
are arrays to their owners, so here they are operands like any array.
"""

import functools
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
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


def with_open_constants(closed: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    """A program whose constants are its own, and not those of functions it has jitted.

    Looks into functions that are called by the program itself, or by others that are;
    not into those that a loop or a branch calls.

    Args:
      closed: A program. What it has jitted and holds arrays becomes a part of it.

    Returns:
      The program, traced again if anything has changed.
    """
    if not any(_has_own_constants(eqn) for eqn in closed.eqns):
        return closed

    def run(*operands: Any) -> list[Any]:
        return _evaluate(closed, operands)

    return jax.make_jaxpr(run)(*(v.aval for v in closed.jaxpr.invars))


def _has_own_constants(eqn: jex.JaxprEqn) -> bool:
    if eqn.primitive.name != "jit":
        return False
    inner = eqn.params["jaxpr"]
    return bool(inner.consts) or any(map(_has_own_constants, inner.eqns))


def _evaluate(closed: jex.ClosedJaxpr, operands: Sequence[Any]) -> list[Any]:
    jaxpr = closed.jaxpr
    names = [*jaxpr.constvars, *jaxpr.invars]
    values = dict(zip(names, [*closed.consts, *operands], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        args = [read(v) for v in eqn.invars]
        if _has_own_constants(eqn):
            out = _evaluate(eqn.params["jaxpr"], args)
        else:
            params = eqn.primitive.get_bind_params(eqn.params)
            with eqn.ctx.manager:
                out = eqn.primitive.bind(*args, **params)
            if not eqn.primitive.multiple_results:
                out = [out]
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


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
        # (Only then is it not marked any more: JAX keeps the trace of what is.)
        wrapped = getattr(x, "__wrapped__", x)
        changed = _changed(wrapped, parents)
        return x if changed is wrapped else changed
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
