"""Callbacks on four devices and one core, where waiting for the wrong thing hangs.

Run as a script, by `test_host_callback.py`, in a process of its own.
"""

import functools
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from differentiating import value_beside
from jax.sharding import NamedSharding
from sharded_cases import DEVICES, SPLIT, mesh, split

from jaxmf_opt import CallbackArgs, optimize, traced

STEPS = 5
LIMIT = 3.25
ROWS = np.stack([np.linspace(0.25, 2.0, 8), np.linspace(1.0, -2.0, 8)], 1)
ROWS = ROWS.astype(np.float32)


def sharded(x: np.ndarray) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh(), SPLIT))


class MineError(Exception):
    pass


# Compiles in a third of the time of L-BFGS.
PLAIN = optax.sgd(0.02)


def minimum(c: jax.Array, callback: Any) -> jax.Array:
    def loss(y: jax.Array) -> jax.Array:
        away = y - c.astype(y.dtype)
        return jnp.sum(jnp.cosh(away)) + jnp.sum(away**4)

    return optimize(
        loss,
        jnp.zeros(c.shape),
        callback=callback,
        max_optimizer_steps=STEPS,
        optimizer=PLAIN,
    )


def first_loss(row: np.ndarray) -> float:
    row = row.astype(float)
    return float(np.sum(np.cosh(row)) + np.sum(row**4))


class Calls:
    """A NumPy callback that knows rows by the loss of their first step."""

    def __init__(self, stops: bool):
        self.stops = stops
        self.first: dict[Any, float] = {}
        self.steps: dict[float, list[int]] = {}

    def __call__(self, info: CallbackArgs) -> bool:
        assert isinstance(info.params, np.ndarray)
        assert info.params.dtype == info.grad.dtype == np.float64
        row = self.first.setdefault(info.lane, round(float(info.loss), 6))
        self.steps.setdefault(row, []).append(info.step)
        return self.stops and bool(info.loss < LIMIT)


@functools.cache
def eager(stops: bool) -> tuple[np.ndarray, dict[float, list[int]]]:
    calls = Calls(stops)

    def callback(info: CallbackArgs) -> bool:
        return calls(jax.tree.map(np.asarray, info).bind(info.lane, dict))

    results = np.stack([minimum(jnp.asarray(row), callback) for row in ROWS])
    return results, calls.steps


def grad_of(fn: Any) -> Any:
    return value_beside(jax.grad, fn)


def summed(fn: Any) -> Any:
    """A collective operation behind the solves."""
    return lambda c: fn(c) + 0 * jax.lax.psum(fn(2 * c), "i")


ON_DEVICES: dict[str, Callable[[Any], Any]] = {
    "shard_map": lambda f: jax.jit(split(jax.vmap(f))),
    "eager shard_map": lambda f: split(jax.vmap(f)),
    "shard_map of grad": lambda f: jax.jit(split(jax.vmap(grad_of(f)))),
    "sharded input": lambda f: lambda c: jax.jit(jax.vmap(f))(sharded(c)),
    "eager sharded input": lambda f: lambda c: jax.vmap(f)(sharded(c)),
}


def agrees(way: str, stops: bool, is_traced: bool) -> None:
    """With the eager solves: values, calls of each row, and their order."""
    want, steps = eager(stops)
    calls = Calls(stops)
    callback = traced(lambda info: info.loss < LIMIT) if stops else traced(no_stop)
    chosen = callback if is_traced else calls
    got = ON_DEVICES[way](lambda c: minimum(c, chosen))(ROWS)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    if not is_traced:
        assert calls.steps == steps, (calls.steps, steps)


def no_stop(_: CallbackArgs) -> None:
    pass


def rows_differ() -> None:
    """Or `agrees` would say less than it seems to."""
    counts = Counter(len(s) for s in eager(True)[1].values())
    assert len(counts) >= 3
    assert len(eager(True)[1]) == len(ROWS)


def fails(way: str, everywhere: bool) -> None:
    """The type and the message arrive, the process lives, and solves again."""
    error = MineError("the reason")

    def callback(info: CallbackArgs) -> None:
        last_row = abs(first[0] - info.loss) < 1e-6
        if info.step == (2 if everywhere else 0) and (everywhere or last_row):
            raise error

    first = [first_loss(ROWS[-1])]
    transform = {
        **ON_DEVICES,
        "shard_map and psum": lambda f: jax.jit(split(summed(jax.vmap(f)))),
    }[way]
    try:
        jax.block_until_ready(transform(lambda c: minimum(c, callback))(ROWS))
    except MineError as e:
        assert e is error
        assert way == "eager sharded input"
    except jax.errors.JaxRuntimeError as e:
        assert "MineError: the reason" in str(e)
    else:
        raise AssertionError("nothing was raised")
    first[0], error.args = np.inf, ()
    if not everywhere:
        out = transform(lambda c: minimum(c, callback))(ROWS)
        assert np.all(np.isfinite(np.asarray(out)))


def branch_of_one_device() -> None:
    """Devices that do not solve at all are not waited for, for long."""
    calls = Calls(False)

    def some(c: jax.Array) -> jax.Array:
        solve = jax.vmap(lambda c: minimum(c, calls))
        return jax.lax.cond(jax.lax.axis_index("i") == 1, solve, jnp.sin, c)

    got = jax.jit(split(some, check_vma=False))(ROWS)
    np.testing.assert_allclose(got[:2], np.sin(ROWS[:2]), rtol=1e-6)
    assert len(calls.steps) == 2


BIG = 1000


def big(way: str) -> None:
    """A million parameters, and a callback that looks at all of them."""
    centre = np.random.default_rng(0).normal(size=(BIG, BIG)).astype(np.float32)
    steps: list[int] = []

    def in_numpy(info: CallbackArgs) -> None:
        assert np.all(np.isfinite(info.params + info.grad))
        steps.append(info.step)

    def solve(c: Any) -> jax.Array:
        return optimize(
            lambda y: jnp.sum((y - jnp.asarray(c, y.dtype)) ** 2),
            jnp.zeros(c.shape),
            callback=in_numpy,
            max_optimizer_steps=3,
            optimizer=optax.sgd(0.5),
        )

    ways: dict[str, Callable[[], Any]] = {
        "shard_map": lambda: jax.jit(split(solve))(centre),
        "sharded input": lambda: jax.jit(solve)(sharded(centre)),
    }
    got = np.asarray(ways[way]())
    np.testing.assert_allclose(got, centre, atol=1e-5)
    # Under `shard_map` each device has a solve of its own.
    solves = DEVICES if way == "shard_map" else 1
    assert Counter(steps) == dict.fromkeys(range(3), solves)


CASES: dict[str, Callable[[], None]] = {
    "rows differ": rows_differ,
    **{
        f"{way}, {'traced' if t else 'host'}": functools.partial(agrees, way, True, t)
        for way in ON_DEVICES
        for t in ((False, True) if way == "shard_map" else (False,))
    },
    **{
        f"exception {'everywhere' if e else 'in one lane'}, {way}": (
            functools.partial(fails, way, e)
        )
        for way, e in (
            ("shard_map and psum", False),
            ("sharded input", True),
            ("eager sharded input", False),
        )
    },
    "branch of one device": branch_of_one_device,
    **{
        f"a million parameters, {way}": functools.partial(big, way)
        for way in ("shard_map", "sharded input")
    },
}


def main() -> None:
    """Runs all cases, or those named, and prints what went wrong with each."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if jax.device_count() != DEVICES:
        sys.exit(f"needs {DEVICES} devices, there are {jax.device_count()}")
    results: dict[str, str] = {}
    for name in sys.argv[1:] or CASES:
        print(name, file=sys.stderr, flush=True)
        try:
            CASES[name]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
