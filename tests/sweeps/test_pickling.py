"""What arrives in another process is what was sent."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bits import assert_same_bits

from jaxmf_opt import CallbackArgs, Lane, Solution, combine, solve, sweep, traced
from jaxmf_opt.callbacks import (
    Checkpoint,
    NoProgress,
    Progress,
    Recorder,
    TimeLimit,
    small_gradient,
)
from jaxmf_opt.sweeps import SweepInterrupted, best_lane

START = np.array([0.5, 2.0], np.float32)


def loss(y: jax.Array) -> jax.Array:
    return jnp.sum(jnp.cosh(y)) + jnp.sum(y**4) / 3


def solved(callback: Any = lambda _: None, state: Any = None) -> Solution:
    return solve(
        loss, START, callback=callback, state=state, max_optimizer_steps=6, gtol=1e-9
    )


@traced
def low(info: CallbackArgs) -> Any:
    return info.loss < 2.5


def not_low(info: CallbackArgs) -> Any:
    return info.loss < 2.2


def noisy() -> Solution:
    """Has random keys and bfloat16 arrays in its state."""
    optimizer = optax.chain(
        optax.add_noise(0.1, 0.5, jax.random.key(0, impl="rbg")),
        optax.adam(0.1, mu_dtype=jnp.bfloat16),
    )
    return solve(loss, START, optimizer=optimizer, max_optimizer_steps=3, history=True)


def seen(call: Callable[..., Any] = lambda f: f()) -> CallbackArgs:
    infos: list[CallbackArgs] = []
    call(lambda: solved(infos.append).value)
    return infos[2]


def swept(**options: Any) -> Solution:
    return sweep(lambda y, c: loss(y - c), START, np.arange(3.0), gtol=1e-3, **options)


OBJECTS: dict[str, Callable[[], Any]] = {
    "solution": lambda: solved(),
    "solution of a batch": lambda: jax.vmap(lambda y: solve(loss, y))(START[:, None]),
    "solution of a sweep": lambda: swept(keep_states=False),
    "solution with random keys": noisy,
    "state": lambda: solved().state,
    "information of a callback": seen,
    "information in a program": lambda: seen(lambda f: jax.jit(f)()),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "old pickle": lambda x: pickle.loads(pickle.dumps(x, 2)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("what", OBJECTS)
def test_same_bits(what: str, x64: bool):
    del x64
    want = OBJECTS[what]()
    for how, copied in COPIES.items():
        got = copied(want)
        assert type(got) is type(want), how
        assert jax.tree.structure(got) == jax.tree.structure(want), how
        assert_same_bits(got, want)
        assert repr(got) == repr(want), how


def test_interrupted_sweep():
    """An exception that cannot be unpickled breaks a pool of processes."""
    want = SweepInterrupted(np.arange(2), swept())
    got = pickle.loads(pickle.dumps(want))
    assert str(got) == str(want)
    np.testing.assert_array_equal(got.lanes, want.lanes)
    assert_same_bits(got.solution, want.solution)


def test_lanes_stay_apart():
    lanes = [Lane((1,)), Lane((1,))]
    one, other, again = pickle.loads(pickle.dumps([*lanes, lanes[0]]))
    assert one is again is not other
    assert one.index == (1,)


def steps_of(callback: Any, state: Any) -> tuple[Any, Any]:
    """In the worker: what comes of a callback, and the callback itself."""
    return solved(callback, state), callback


def test_in_a_spawned_process(tmp_path: Path):
    """Callbacks that have been used already, in a float32 program there."""
    with jax.enable_x64():
        gtol = jnp.array(1e-3)
    used = {
        "plain": not_low,
        "traced": traced(not_low),
        "traced as a decorator": low,
        "small gradient": small_gradient(gtol),
        "no progress": NoProgress(steps=2),
        "time limit": TimeLimit(seconds=60.0),
        "progress": Progress(leave=False),
        "recorder": Recorder(),
        "checkpoint": Checkpoint(tmp_path / "run.npz"),
        "combined": combine(low, Recorder(), small_gradient(1e-3)),
    }
    first = solve(loss, START, max_optimizer_steps=1, gtol=1e-9).state
    for callback in used.values():
        solved(callback)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        came = {
            name: pool.submit(steps_of, callback, first)
            for name, callback in used.items()
        }
        back = {name: future.result(120) for name, future in came.items()}
    for name, callback in used.items():
        assert_same_bits(back[name][0].state, solved(callback, first).state)
        assert type(back[name][1]) is type(callback)
    assert back["traced as a decorator"][1] is low
    mine, theirs = used["recorder"].records, back["recorder"][1].records
    assert len(mine) == len(theirs) == 2
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(one.loss, other.loss)
    assert theirs[1].seconds[0] > theirs[0].seconds[-1]


def test_the_best_lane_in_float64(x64: bool):
    """Losses that are the same in float32, or infinite; with states or without."""
    del x64
    losses = np.array([1 + 2e-12, 1e200, 1.0, 1 + 1e-12, np.inf])

    def constant(y: jax.Array, c: jax.Array) -> jax.Array:
        return c + 0 * jnp.sum(y)

    with jax.enable_x64():
        losses = jnp.asarray(losses)
    for keep_states in (True, False):
        found = sweep(constant, START, losses, keep_states=keep_states)
        assert best_lane(found) == 2
        assert found.loss.dtype == np.float64
        some = jax.tree.map(lambda x: x[np.array([0, 1, 3])], found)
        assert best_lane(some) == 2
    batch = jax.vmap(lambda c: solve(lambda y: constant(y, c), START))(losses)
    assert best_lane(batch) == 2
