"""Programs by what they compute: compile each structure once.

JAX keys its compilation caches on function objects, so a fresh closure is compiled
again even if it computes the same thing. Here a program is its jaxpr, and two jaxprs
are the same program when they have the same equations over the same types. Arrays are
operands, so they never count; everything that cannot be compared by value (a host
function, say) counts by identity.
"""

import functools
import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, Tracer

from .lapack import evaluate_one_by_one

# Compiled programs that are kept, each of them a few megabytes.
CACHE_SIZE = 128

# Derivative rules are functions, recreated by each trace. In a program that is only
# evaluated they are never called: these equations are what their jaxpr computes.
_EVALUATED_ONLY = {
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
    "x64_region": ("jaxpr",),
}


class Structure:
    """A hashable stand-in for a closed jaxpr: equal where the programs are equal.

    Attributes:
      jaxpr: The program.
      has_custom_rules: Whether some equation has a derivative rule of its own. Such
        programs compare equal if they *evaluate* alike; compare their derivatives too
        before differentiating one in place of the other.
      has_custom_vjp: Whether one of those rules is for reverse mode alone.
    """

    __slots__ = (
        "_contexts",
        "_hash",
        "_key",
        "has_custom_rules",
        "has_custom_vjp",
        "jaxpr",
    )

    def __init__(self, jaxpr: jex.ClosedJaxpr):
        self.jaxpr = jaxpr
        self.has_custom_rules = False
        self.has_custom_vjp = False
        self._contexts: dict[int, tuple[Any, Hashable]] = {}
        self._key = self._closed(jaxpr)
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self._key == other._key

    def _closed(self, closed: jex.ClosedJaxpr) -> Hashable:
        consts = tuple(self._value(c) for c in closed.consts)
        return ("closed", self._open(closed.jaxpr), consts)

    def _open(self, jaxpr: jex.Jaxpr) -> Hashable:
        numbers: dict[Any, int] = {}

        def atom(v: Any) -> Hashable:
            if isinstance(v, jex.Literal):
                return ("literal", self._value(v.val), _type(v.aval))
            return numbers.setdefault(v, len(numbers))

        def binder(v: Any) -> Hashable:
            return (atom(v), _type(v.aval))

        head = tuple(map(binder, (*jaxpr.constvars, *jaxpr.invars)))
        eqns = tuple(
            (
                e.primitive,
                self._context(e.ctx),
                tuple(map(atom, e.invars)),
                self._params(e),
                tuple(map(binder, e.outvars)),
            )
            for e in jaxpr.eqns
        )
        return (len(jaxpr.constvars), head, eqns, tuple(map(atom, jaxpr.outvars)))

    def _params(self, eqn: jex.JaxprEqn) -> Hashable:
        name, names = eqn.primitive.name, sorted(eqn.params)
        if name in _EVALUATED_ONLY:
            names = _EVALUATED_ONLY[name]
            # (A region of float64 may have a rule or not.)
            self.has_custom_rules |= eqn.params.get("rule", self) is not None
            self.has_custom_vjp |= name == "custom_vjp_call"
        return tuple((n, self._value(eqn.params[n])) for n in names)

    def _context(self, context: Any) -> Hashable:
        """The settings in which an equation was traced: it is lowered in them, too."""
        if id(context) in self._contexts:
            return self._contexts[id(context)][1]
        names = getattr(type(context), "__slots__", None) or getattr(
            context, "__dict__", ()
        )
        settings = tuple(
            (n, self._value(getattr(context, n, None)))
            for n in names
            if not n.startswith("__")
        )
        # (With the context itself, so that its id stays taken.)
        self._contexts[id(context)] = context, settings
        return settings

    def _value(self, v: Any) -> Hashable:
        if isinstance(v, jex.ClosedJaxpr):
            return self._closed(v)
        if isinstance(v, jex.Jaxpr):
            return self._open(v)
        if isinstance(v, (tuple, list)):
            return (type(v), *map(self._value, v))
        if isinstance(v, dict):
            return ("dict", *((k, self._value(x)) for k, x in v.items()))
        if isinstance(v, jex.DebugInfo):
            return None  # names and source lines
        # 0.0 == -0.0 and nan != nan, but not here.
        if isinstance(v, float):
            return (type(v), np.float64(v).tobytes())
        if isinstance(v, complex):
            return (type(v), np.complex128(v).tobytes())
        if isinstance(v, (np.ndarray, np.generic)) or _is_plain_array(v):
            a = np.asarray(v)
            return ("array", a.shape, a.dtype, hashlib.sha256(a.tobytes()).digest())
        try:
            hash(v)
        except TypeError:
            return _ByIdentity(v)
        return (type(v), v)


class _ByIdentity:
    """Equal to itself alone; keeps its object alive, so that the id stays taken."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.value is other.value


def _is_plain_array(v: Any) -> bool:
    concrete = isinstance(v, jax.Array) and not isinstance(v, Tracer)
    return (
        concrete
        and v.is_fully_addressable
        and not jnp.issubdtype(v.dtype, jax.dtypes.extended)
    )


def _type(aval: Any) -> Hashable:
    if isinstance(aval, ShapedArray):
        return aval  # shape, dtype, weak type, sharding: compared by value
    return str(aval)


def compiled(jaxpr: jex.ClosedJaxpr) -> Callable[..., list[jax.Array]]:
    """The compiled form of a program, shared by all programs of its structure.

    Args:
      jaxpr: A program without array constants. It is evaluated, not differentiated.

    Returns:
      A `jax.jit`-compiled function of the program's operands.
    """
    return _compile(Structure(jaxpr))


@functools.lru_cache(maxsize=CACHE_SIZE)
def _compile(structure: Structure) -> Callable[..., list[jax.Array]]:
    return jax.jit(evaluate_one_by_one(structure.jaxpr))
