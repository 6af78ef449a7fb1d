"""Functions of a minimum, by transformations inside of each other.

A nesting makes a function of a vector to a vector of another such function, so that
they can be put inside of each other in any order. Those without a derivative can also
be computed by plain Python loops, which is what their values are compared with.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Map = Callable[[Any], Any]
Rng = np.random.Generator


class Traced:
    """Control flow and batches by JAX."""

    jit = staticmethod(jax.jit)
    scan = staticmethod(jax.lax.scan)
    map = staticmethod(jax.lax.map)
    fori = staticmethod(jax.lax.fori_loop)
    while_loop = staticmethod(jax.lax.while_loop)
    cond = staticmethod(jax.lax.cond)
    switch = staticmethod(jax.lax.switch)
    checkpoint = staticmethod(jax.checkpoint)
    vmap = staticmethod(jax.vmap)


class Plain:
    """The same by Python."""

    @staticmethod
    def jit(f: Map) -> Map:
        return f

    checkpoint = jit

    @staticmethod
    def scan(step: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
        ys = []
        for x in xs:
            carry, y = step(carry, x)
            ys.append(y)
        return carry, jnp.stack(ys)

    @staticmethod
    def map(f: Map, xs: Any) -> Any:
        return jnp.stack([f(x) for x in xs])

    @staticmethod
    def fori(low: int, high: int, step: Any, carry: Any) -> Any:
        for i in range(low, high):
            carry = step(jnp.asarray(i), carry)
        return carry

    @staticmethod
    def while_loop(goes_on: Any, step: Any, carry: Any) -> Any:
        while goes_on(carry):
            carry = step(carry)
        return carry

    @staticmethod
    def cond(is_true: Any, yes: Any, no: Any, *args: Any) -> Any:
        return yes(*args) if is_true else no(*args)

    @staticmethod
    def switch(i: Any, branches: Any, *args: Any) -> Any:
        return branches[min(max(int(i), 0), len(branches) - 1)](*args)

    @staticmethod
    def vmap(f: Any, in_axes: Any = 0, out_axes: int = 0) -> Any:
        def fn(*args: Any) -> Any:
            axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
            sizes = [
                x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None
            ]
            out = []
            for i in range(sizes[0]):
                rows = [
                    x if a is None else jnp.take(x, i, axis=a)
                    for x, a in zip(args, axes, strict=True)
                ]
                out.append(f(*rows))
            return jnp.stack(out, axis=out_axes)

        return fn


@dataclasses.dataclass(frozen=True)
class Nesting:
    """A function of functions.

    Attributes:
      name: What it is.
      make: Takes a function and `Traced` or `Plain`; a derivative has no `Plain`.
      order: How many derivatives it takes.
      reverse: Whether it differentiates in reverse mode at all.
      forward: Whether what is inside is differentiated in forward mode.
      no_reverse: Whether JAX cannot differentiate it in reverse mode.
      no_forward: Whether JAX cannot differentiate it in forward mode.
      cost: How many solves it makes of one.
    """

    name: str
    make: Callable[[Map, Any], Map]
    order: int = 0
    reverse: bool = False
    forward: bool = False
    no_reverse: bool = False
    no_forward: bool = False
    cost: int = 1


def lanes(c: Any) -> Any:
    """Three vectors that depend on one."""
    return jnp.stack([c, -c / 2, c / 4 + 0.25])


def mixed(y: Any) -> Any:
    """One vector of three."""
    return y[0] / 2 + jnp.sin(y[1]) / 4 + y[2] * y[0] / 4


def weights(c: Any) -> Any:
    """Another weight for each element."""
    return jnp.asarray(np.cos(1 + np.arange(c.shape[0])), c.dtype)


def scalar(f: Map) -> Map:
    """A number that is not linear in the result."""
    return lambda c: weights(c) @ jnp.sin(f(c))


def _vmap(rng: Rng) -> Nesting:
    axis, out, shared = (int(rng.integers(2)) for _ in range(3))
    out_axis = out if rng.random() < 0.8 else -1 - out

    def make(f: Map, via: Any) -> Map:
        def fn(c: Any) -> Any:
            rows = jnp.moveaxis(lanes(c), 0, axis)
            if shared:
                both = lambda x, s: f(x + s / 8)  # noqa: E731
                y = via.vmap(both, in_axes=(axis, None), out_axes=out_axis)(rows, c)
            else:
                y = via.vmap(f, in_axes=axis, out_axes=out_axis)(rows)
            return mixed(jnp.moveaxis(y, out_axis, 0))

        return fn

    name = f"vmap({axis}, {out_axis}{', shared' if shared else ''})"
    return Nesting(name, make, cost=3)


def _scan_over_xs(f: Map, via: Any) -> Map:
    def step(total: Any, x: Any) -> tuple[Any, Any]:
        y = f(x)
        return total + y, y

    return lambda c: mixed(via.scan(step, jnp.zeros_like(c), lanes(c))[1])


def _trajectory(f: Map, via: Any) -> Map:
    def step(x: Any, row: Any) -> tuple[Any, Any]:
        y = f(jnp.sin(x) / 2 + row / 2)
        return y, y

    return lambda c: mixed(via.scan(step, c, lanes(c))[1])


def _trajectory_of_solves_that_shift(f: Map, via: Any) -> Map:
    def step(total: Any, x: Any) -> tuple[Any, Any]:
        y = f(x + jnp.tanh(total) / 4)
        return total + y, y

    return lambda c: via.scan(step, jnp.zeros_like(c), lanes(c))[0] / 4


def _fori(f: Map, via: Any) -> Map:
    return lambda c: via.fori(0, 3, lambda i, x: f(jnp.sin(x) / 2 + c / 4), c)


def _while(f: Map, via: Any) -> Map:
    def step(carry: Any) -> Any:
        return carry[0] + 1, f(jnp.sin(carry[1]) / 2 + c_of(carry) / 4), carry[2]

    c_of = lambda carry: carry[2]  # noqa: E731
    return lambda c: via.while_loop(lambda carry: carry[0] < 2, step, (0, c, c))[1]


def _cond(f: Map, via: Any) -> Map:
    return lambda c: via.cond(c[0] > 0, f, lambda c: jnp.sin(f(c / 2)), c)


def _switch(f: Map, via: Any) -> Map:
    def fn(c: Any) -> Any:
        branches = [jnp.sin, f, lambda c: f(c / 2) / 2]
        return via.switch((4 * c[0]).astype(int), branches, c)

    return fn


def _custom_vjp(f: Map, _: Any) -> Map:
    rule = jax.custom_vjp(lambda c: f(c))
    rule.defvjp(lambda c: jax.vjp(f, c), lambda pull, ct: pull(ct))
    return lambda c: rule(jnp.sin(c))


def _custom_jvp(f: Map, _: Any) -> Map:
    rule = jax.custom_jvp(lambda c: f(c))
    rule.defjvp(lambda c, t: jax.jvp(f, c, t))
    return lambda c: rule(jnp.sin(c))


def _linearized(f: Map) -> Map:
    def fn(c: Any) -> Any:
        y, push = jax.linearize(f, c)
        return y / 2 + push(jnp.cos(c)) / 4

    return fn


def _pulled_back(f: Map) -> Map:
    def fn(c: Any) -> Any:
        y, pull = jax.vjp(f, c)
        return pull(jnp.cos(y))[0] + pull(weights(c))[0] / 2

    return fn


def _derivative(name: str, make: Callable[[Map], Map], **settings: Any) -> Nesting:
    return Nesting(name, lambda f, _: make(f), **settings)


NESTINGS: list[Callable[[Rng], Nesting]] = [
    lambda _: Nesting("jit", lambda f, via: via.jit(f)),
    _vmap,
    lambda _: Nesting("scan over xs", _scan_over_xs, cost=3),
    lambda _: Nesting("trajectory", _trajectory, cost=3),
    lambda _: Nesting("sum in the carry", _trajectory_of_solves_that_shift, cost=3),
    lambda _: Nesting(
        "map", lambda f, via: lambda c: mixed(via.map(f, lanes(c))), cost=3
    ),
    lambda _: Nesting("fori_loop", _fori, cost=3),
    lambda _: Nesting("while_loop", _while, no_reverse=True, cost=2),
    lambda _: Nesting("cond", _cond),
    lambda _: Nesting("switch", _switch),
    lambda _: Nesting("checkpoint", lambda f, via: via.checkpoint(f)),
    lambda _: Nesting("custom_vjp", _custom_vjp, no_forward=True),
    lambda _: Nesting("custom_jvp", _custom_jvp),
]

DERIVATIVES: list[Nesting] = [
    _derivative("grad", lambda f: jax.grad(scalar(f)), order=1, reverse=True),
    _derivative(
        "value_and_grad",
        lambda f: lambda c: sum(jax.value_and_grad(scalar(f))(c)),
        order=1,
        reverse=True,
    ),
    _derivative("vjp", _pulled_back, order=1, reverse=True),
    _derivative(
        "jacrev",
        lambda f: lambda c: jax.jacrev(f)(c) @ weights(c),
        order=1,
        reverse=True,
    ),
    _derivative(
        "jacfwd",
        lambda f: lambda c: jax.jacfwd(f)(c) @ weights(c),
        order=1,
        forward=True,
    ),
    _derivative(
        "jvp",
        lambda f: lambda c: jax.jvp(f, (c,), (jnp.cos(c),))[1],
        order=1,
        forward=True,
    ),
    _derivative("linearize", _linearized, order=1, forward=True),
    _derivative(
        "hessian",
        lambda f: lambda c: jax.hessian(scalar(f))(c) @ weights(c),
        order=2,
        reverse=True,
    ),
    _derivative(
        "jacrev of jacrev",
        lambda f: lambda c: jax.jacrev(jax.jacrev(scalar(f)))(c) @ weights(c),
        order=2,
        reverse=True,
    ),
    _derivative(
        "jacfwd of jacfwd",
        lambda f: lambda c: jax.jacfwd(jax.jacfwd(scalar(f)))(c) @ weights(c),
        order=2,
        forward=True,
    ),
    _derivative(
        "jvp of grad",
        lambda f: lambda c: jax.jvp(jax.grad(scalar(f)), (c,), (jnp.cos(c),))[1],
        order=2,
        reverse=True,
    ),
]


def draw(rng: Rng, max_order: int, *, values_only: bool = False) -> list[Nesting]:
    """One to three nestings, from the inside to the outside, that JAX can take."""
    depth = int(rng.choice([1, 2, 3], p=[0.35, 0.4, 0.25]))
    max_order = min(max_order, int(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2])))
    chosen: list[Nesting] = []
    order, cost, no_reverse, no_forward = 0, 1, False, False
    while len(chosen) < max(depth, 1):
        if not values_only and rng.random() < 0.45:
            new = DERIVATIVES[rng.integers(len(DERIVATIVES))]
        else:
            new = NESTINGS[rng.integers(len(NESTINGS))](rng)
        if values_only and new.name.startswith("custom"):
            continue
        if order + new.order > max_order or cost * new.cost > 9:
            depth -= 1
            continue
        if (new.reverse and no_reverse) or (new.forward and no_forward):
            continue
        if new.order and no_forward:
            no_forward = False
        if new.no_forward and no_reverse:
            continue  # its own rule differentiates in reverse
        no_reverse |= new.no_reverse
        no_forward |= new.no_forward
        order, cost = order + new.order, cost * new.cost
        chosen.append(new)
    if chosen[-1].name != "jit" and rng.random() < 0.65:  # which takes less time
        chosen.append(NESTINGS[0](rng))
    return chosen


def nested(f: Map, nestings: list[Nesting], via: Any) -> Map:
    """The function, inside of all nestings."""
    for nesting in nestings:
        f = nesting.make(f, via)
    return f
