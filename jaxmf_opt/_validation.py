"""Bad arguments are refused at the call, by name, before anything is compiled."""

import inspect
import math
import operator
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import PyTree

from ._jax.keys import as_key
from ._jax.varying import check_unsplit, explicit_sharding
from ._jax.x64 import is_traced

# Steps, of three float64 each.
_LONGEST_HISTORY = 2**27

_NUMBERS = {1: "one argument", 2: "two arguments"}


def check_callable(name: str, fn: Any, arguments: int = 1) -> None:
    """Refuses what cannot be called with so many arguments."""
    if not callable(fn):
        raise TypeError(f"`{name}` must be callable, got {fn!r}.")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*[None] * arguments)
    except TypeError as e:
        raise TypeError(
            f"`{name}` must be callable with {_NUMBERS[arguments]}; its signature is "
            f"{signature}."
        ) from e


def check_params(params: PyTree) -> None:
    """Refuses parameters that are not a non-empty pytree of real numbers."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_sparse)
    if not leaves:
        raise ValueError(
            f"`params` must have at least one array in it, got {params!r}."
        )
    for path, leaf in leaves:
        where = "`params" + jax.tree_util.keystr(path) + "`"
        if _is_sparse(leaf):
            raise TypeError(
                f"{where} must be an array or a number, got a sparse array, whose "
                "indices cannot be optimized. Optimize its `data`, and make the sparse "
                "array of it in `loss_fn`."
            )
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float)):
            raise TypeError(
                f"{where} must be an array or a number, got {leaf!r} of type "
                f"{type(leaf).__name__}. Take what is not to be optimized out of "
                "`params`, with `equinox.partition` for example."
            )
        dtype = getattr(leaf, "dtype", None) or np.dtype(type(leaf))
        if isinstance(leaf, int) and not -(2**63) <= leaf < 2**63:
            raise ValueError(
                f"{where} must fit in 64 bits if it is an int, got {leaf}. Make it a "
                "float."
            )
        if not getattr(dtype, "isnative", True):
            raise TypeError(
                f"{where} must be in the byte order of this machine, got dtype "
                f"{dtype.str!r}. Convert it by "
                f"`x.astype({dtype.newbyteorder('=').str!r})`."
            )
        if not (jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool_):
            raise TypeError(f"{where} must hold real numbers, got dtype {dtype}.")
        if dtype.kind == "f" and dtype.itemsize > 8:
            raise TypeError(
                f"{where} must be of a dtype of JAX, got {dtype}. Convert it by "
                "`x.astype(float)`."
            )
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"{where} must be real, got dtype {dtype}. Optimize the real and "
                "imaginary parts as two leaves."
            )
        sharding = explicit_sharding(leaf) if isinstance(leaf, jax.Array) else None
        check_unsplit(where, () if sharding is None else tuple(sharding.spec))


def _is_sparse(x: Any) -> bool:
    return type(x).__module__.startswith("jax.experimental.sparse")


def check_history(history: Any, max_steps: int) -> None:
    """Refuses what is not a bool, and records that would be too long."""
    check_flag("history", history)
    if history and max_steps > _LONGEST_HISTORY:
        raise ValueError(
            "`history` must be False, or `max_optimizer_steps` at most "
            f"{_LONGEST_HISTORY}: the record of {max_steps} steps would take "
            f"{24 * max_steps / 2**30:.0f} GiB. Record with `callbacks.Recorder`, or "
            "take a smaller limit."
        )


def check_steps(max_optimizer_steps: Any) -> int:
    """The number of steps as an int; refuses what is not a whole number >= 0."""
    try:
        steps = operator.index(max_optimizer_steps)
    except TypeError as e:
        raise TypeError(
            "`max_optimizer_steps` must be an integer, got "
            f"{max_optimizer_steps!r} of type {type(max_optimizer_steps).__name__}."
        ) from e
    if not 0 <= steps < 2**63:
        raise ValueError(
            f"`max_optimizer_steps` must be at least 0 and fit in 64 bits, got {steps}."
        )
    return steps


def check_tolerance(name: str, value: Any) -> None:
    """Refuses what is not a real number >= 0. Of a traced value, sees the type only."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, int, float)):
        raise TypeError(
            f"`{name}` must be a number, got {value!r} of type {type(value).__name__}."
        )
    if jnp.shape(value) != () or jnp.iscomplexobj(value):
        raise TypeError(f"`{name}` must be a real scalar, got {value!r}.")
    if not isinstance(value, Tracer):
        number = float(value)
        if math.isnan(number) or number < 0:
            raise ValueError(f"`{name}` must be at least 0, got {number}.")


def check_untraced(what: str, *trees: Any) -> None:
    """Refuses a sweep that is called with traced values."""
    if is_traced(trees):
        raise TypeError(
            f"`sweep` is a job of ordinary Python: {what} must not be traced. Inside "
            "of a compiled program, use `jax.vmap` of `solve`."
        )


def check_positive(name: str, value: Any, *, whole: bool = False) -> None:
    """Refuses what is not a number, or a whole number, above 0."""
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"`{name}` must be {kind} above 0, got {value!r}.")


def check_path(name: str, value: Any) -> None:
    """Refuses what does not name a file or directory."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(
            f"`{name}` must be a path, got {value!r} of type {type(value).__name__}."
        )


def check_flag(name: str, value: Any) -> None:
    """Refuses what is not a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f"`{name}` must be True or False, got {value!r} of type "
            f"{type(value).__name__}."
        )


def check_optimizer(optimizer: Any, name: str = "optimizer") -> None:
    """Refuses what is not an optax transformation."""
    if isinstance(optimizer, optax.GradientTransformation):
        return
    parts: list[Callable[..., Any] | None] = [
        getattr(optimizer, method, None) for method in ("init", "update")
    ]
    if not all(map(callable, parts)):
        raise TypeError(
            f"`{name}` must be an optax gradient transformation such as "
            f"`optax.lbfgs()`, got {optimizer!r}."
        )


def check_linear_solver(linear_solver: Any) -> None:
    """Refuses what is not a solver of lineax, nor None."""
    if not (
        linear_solver is None or isinstance(linear_solver, lx.AbstractLinearSolver)
    ):
        raise TypeError(
            "`linear_solver` must be None or a solver of lineax such as "
            f"`lineax.LSMR(rtol=1e-12, atol=0.0)`, got {linear_solver!r}."
        )


def check_state(state: Any, like: PyTree, or_like: PyTree) -> PyTree:
    """Puts a state to go on from in order; refuses that of another problem.

    Args:
      state: The state of a solution, or its leaves.
      like: The `jax.ShapeDtypeStruct`s of such a state.
      or_like: The same of another kind that will do; the numbers of leaves differ.

    Returns:
      The leaves of `state` in the structure of one of the two.
    """
    if len(jax.tree.leaves(state)) == len(jax.tree.leaves(or_like)):
        like = or_like
    want, treedef = jax.tree.flatten(like)
    got = jax.tree.leaves(state)
    if len(got) == len(want):
        got = [as_key(g, w) for g, w in zip(got, want, strict=True)]

    def describe(x: Any) -> str:
        return f"{getattr(x, 'dtype', type(x).__name__)}{list(np.shape(x))}"

    if [describe(x) for x in got] != [describe(x) for x in want]:
        raise ValueError(
            "`state` must be that of a solve of the same problem, by the same kind of "
            f"optimizer: {len(want)} arrays {', '.join(map(describe, want))}; got "
            f"{len(got)}: {', '.join(map(describe, got))}."
        )
    return jax.tree.unflatten(treedef, got)
