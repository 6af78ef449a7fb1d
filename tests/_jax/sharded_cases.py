"""What `test_varying.py` checks on several devices: a script with a process of its own.

JAX fixes the number of devices of a process when it first uses one. Printed is, as
JSON, for each case how far off it is, or why it failed.
"""

import functools
import itertools
import json
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from jaxmf_opt import DEFAULT_OPTIMIZER, optimize
from jaxmf_opt._jax.region import x64_region

Array = jax.Array
Function = Callable[..., Any]
Case = Callable[[], float]

DEVICES = 4
SPLIT, WHOLE = PartitionSpec("i"), PartitionSpec()
ROWS = np.arange(24, dtype=np.float32).reshape(8, 3) / 8
WEIGHTS = np.cos(np.arange(24, dtype=np.float32)).reshape(8, 3)

# Operations of compiled programs that involve another device, or the host.
COMMUNICATION = re.compile(
    r"\b(?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+|infeed"
    r"|outfeed|send|recv)(?:-start)?\(|custom_call_target=\"[^\"]*callback[^\"]*\""
)


@functools.cache
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((DEVICES,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))


def split(fn: Function, check_vma: bool = True, *replicated: Any) -> Function:
    """`fn` of a block of rows on each device, and of what is the same on all."""
    return jax.shard_map(
        fn,
        mesh=mesh(),
        in_specs=(SPLIT, *(WHOLE for _ in replicated)),
        out_specs=SPLIT,
        check_vma=check_vma,
    )


# Compiles in a third of the time of L-BFGS.
PLAIN = optax.sgd(0.05)


def minimum(c: Array, optimizer: Any = PLAIN) -> Array:
    """Something like `sin(c)`, as the minimum of a loss."""
    centre = jnp.sin(c)

    def loss(x: Array) -> Array:
        difference = x - centre.astype(x.dtype)
        weights = jnp.arange(1.0, difference.size + 1).reshape(x.shape)
        return jnp.sum(weights * difference**2) + jnp.sum(difference**4)

    return optimize(loss, jnp.zeros(c.shape), optimizer=optimizer)


def by_lbfgs(c: Array) -> Array:
    return minimum(c, DEFAULT_OPTIMIZER)


def scaled(c: Array, w: Array) -> Array:
    return jax.vmap(lambda c: minimum(c * w))(c)


def weighed(fn: Function) -> Function:
    def total(*args: Array) -> Array:
        out = fn(*args)
        return jnp.sum(out * WEIGHTS.astype(out.dtype))

    return total


def off(got: Any, want: Any) -> float:
    got, want = np.asarray(got), np.asarray(want)
    if got.dtype != np.float32 or got.shape != want.shape:
        raise AssertionError(f"got {got.dtype}{got.shape}, want float32{want.shape}")
    return float(np.max(np.abs(got - want)))


def compiled_alone(fn: Function, *args: Any) -> Any:
    """Compiles `fn`, which must keep its devices and the host apart, and calls it."""
    program = jax.jit(fn).lower(*args).compile()
    found = COMMUNICATION.findall(program.as_text() or "")
    if found:
        raise AssertionError(f"the compiled program communicates: {found}")
    return program(*args)


# The first and the third take JAX's `check_vma`.


def value(check_vma: bool) -> float:
    fn = split(jax.vmap(by_lbfgs), check_vma)
    return off(compiled_alone(fn, ROWS), np.sin(ROWS))


def grad_of_sharded() -> float:
    grad = jax.grad(weighed(split(jax.vmap(minimum), True)))
    return off(compiled_alone(grad, ROWS), np.cos(ROWS) * WEIGHTS)


def grad_of_replicated(check_vma: bool) -> float:
    w = np.float32(0.5)
    grad = jax.grad(weighed(split(scaled, check_vma, w)), argnums=1)
    want = np.sum(ROWS * np.cos(ROWS * w) * WEIGHTS)
    return off(jax.jit(grad)(ROWS, w), want)


def eager_grad_of_both() -> float:
    w = np.array([0.5, 1, 0.25], np.float32)
    grad = jax.grad(weighed(split(scaled, True, w)), argnums=(0, 1))
    want = np.cos(ROWS * w) * WEIGHTS
    got = grad(ROWS, w)
    return max(off(got[0], want * w), off(got[1], np.sum(ROWS * want, axis=0)))


# These, with the check only, which is where they are hard.


def value_inside_vmap() -> float:
    many = jax.vmap(split(minimum, True))
    return off(jax.jit(many)(np.stack([ROWS, -ROWS]))[1], -np.sin(ROWS))


def value_of_captured_block() -> float:
    """The starting point varies over the devices too, the loss captures both kinds."""

    def block(c: Array, w: Array) -> Array:
        return optimize(lambda x: jnp.sum((x - (w * c).astype(x.dtype)) ** 2), c)

    w = np.float32(2)
    return off(jax.jit(split(block, True, w))(ROWS, w), 2 * ROWS)


@jax.custom_vjp
def distance(x: Array, c: Array) -> Array:
    return jnp.sum((x - c) ** 2)


distance.defvjp(
    lambda x, c: (distance(x, c), x - c), lambda d, ct: (2 * d * ct, -2 * d * ct)
)


def custom_vjp_of_captured_block() -> float:
    """Plain JAX takes it if the point varies, too; here it need not."""

    def block(c: Array) -> Array:
        return optimize(lambda x: distance(x, c.astype(x.dtype)), jnp.zeros((2, 3)))

    return off(jax.jit(split(block, True))(ROWS), ROWS)


def tangent_of_sharded() -> float:
    fn = split(jax.vmap(minimum), True)
    tangent = jax.jit(lambda c, d: jax.jvp(fn, (c,), (d,))[1])(ROWS, WEIGHTS)
    return off(tangent, np.cos(ROWS) * WEIGHTS)


def grad_inside() -> float:
    """Differentiated by each device on its own."""
    inner = jax.vmap(jax.grad(lambda c: jnp.sum(by_lbfgs(c))))
    return off(jax.jit(split(inner, True))(ROWS), np.cos(ROWS))


# And these know of no `check_vma`.


def communication_is_seen() -> float:
    """That `compiled_alone` would find something, if there were something."""

    def across(c: Array) -> Array:
        return c + jax.lax.psum(c, "i")

    def from_host(c: Array) -> Array:
        return jax.pure_callback(lambda c: c, c, c, vmap_method="sequential")

    for fn in (across, from_host):
        try:
            compiled_alone(split(fn, False), ROWS)
        except AssertionError:
            continue
        raise AssertionError(f"{fn.__name__} was not noticed")
    # LAPACK is a custom call too.
    compiled_alone(split(lambda c: jnp.linalg.cholesky(c @ c.T) @ c, False), ROWS)
    return 0.0


# Regions that have nothing to do with solving: `c` varies over the devices, `m` is the
# same on all. Carries start from constants, which vary over nothing.
REGIONS: dict[str, Function] = {
    "scan": lambda c, m: jax.lax.scan(
        lambda s, x: (jnp.sin(s) + x, s), jnp.zeros(3), c @ m
    )[1],
    "cholesky": lambda c, m: c @ jnp.linalg.cholesky(m) + jnp.linalg.inv(m)[:1],
    "scatter at argmax": lambda c, m: c.at[0, jnp.argmax(c[0])].multiply(3) @ m,
    "cond": lambda c, m: jax.lax.cond(c[0, 0] > 1, jnp.sin, jnp.cos, c @ m),
}
MATRIX = np.array([[4, 1, 0.5], [1, 3, 0.25], [0.5, 0.25, 2]], np.float32)


def blockwise(fn: Function) -> Function:
    """What `shard_map` computes, without it."""

    def whole(c: Array, m: Array) -> Array:
        blocks = c.reshape(DEVICES, -1, *c.shape[1:])
        return jnp.stack([fn(b, m) for b in blocks]).reshape(c.shape)

    return whole


def in_float32_program(fn: Function) -> Function:
    def exact(c: Array, m: Array) -> Array:
        out = fn(c.astype(jnp.float64), m.astype(jnp.float64))
        return out.astype(jnp.float32)

    return functools.partial(x64_region, exact)


def with_grads(fn: Function) -> Function:
    def all_of_it(c: Array, m: Array) -> tuple[Array, tuple[Array, Array]]:
        return fn(c, m), jax.grad(weighed(fn), argnums=(0, 1))(c, m)

    return all_of_it


def region(fn: Function) -> float:
    with jax.enable_x64():
        wide = (jnp.asarray(x, jnp.float64) for x in (ROWS, MATRIX))
        want = jax.tree.map(np.asarray, jax.jit(with_grads(blockwise(fn)))(*wide))
    got = jax.jit(with_grads(split(in_float32_program(fn), True, MATRIX)))(ROWS, MATRIX)
    scales = [max(1.0, float(np.max(np.abs(w)))) for w in jax.tree.leaves(want)]
    errors = map(off, jax.tree.leaves(got), jax.tree.leaves(want))
    return max(e / s for e, s in zip(errors, scales, strict=True))


BOTH_WAYS: tuple[Callable[[bool], float], ...] = (
    value,
    grad_of_replicated,
)
ONCE: tuple[Callable[[], float], ...] = (
    grad_of_sharded,
    eager_grad_of_both,
    value_inside_vmap,
    value_of_captured_block,
    custom_vjp_of_captured_block,
    tangent_of_sharded,
    grad_inside,
    communication_is_seen,
)
CASES: dict[str, Case] = {
    **{
        f"{case.__name__}-check_vma={check_vma}": functools.partial(case, check_vma)
        for case, check_vma in itertools.product(BOTH_WAYS, (False, True))
    },
    **{case.__name__: case for case in ONCE},
    **{f"region-{name}": functools.partial(region, fn) for name, fn in REGIONS.items()},
}


def main() -> None:
    if jax.device_count() != DEVICES:
        sys.exit(f"needs {DEVICES} devices, there are {jax.device_count()}")
    results: dict[str, float | str] = {}
    for name, case in CASES.items():
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
