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
    "solution of a sweep": swept,
    "solution with random keys": noisy,
    "state": lambda: solved().state,
    "information of a callback": seen,
    "information in a program": lambda: seen(lambda f: jax.jit(f)()),
}


@pytest.mark.parametrize("what", OBJECTS)
def test_same_bits(what: str):
    want = OBJECTS[what]()
    for got in (
        pickle.loads(pickle.dumps(want)),
        pickle.loads(pickle.dumps(want, 2)),
        copy.deepcopy(want),
    ):
        assert type(got) is type(want)
        assert_same_bits(got, want)
        assert repr(got) == repr(want)


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
    used: list[Any] = [
        *(Recorder(), low, not_low, NoProgress(steps=2), TimeLimit(seconds=60.0)),
        *(Progress(leave=False), Checkpoint(tmp_path / "run.npz")),
        combine(low, Recorder(), small_gradient(gtol)),
    ]
    first = solve(loss, START, max_optimizer_steps=1, gtol=1e-9).state
    for callback in used:
        solved(callback)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        back = list(pool.map(steps_of, used, [first] * len(used)))
    for callback, (solution, same) in zip(used, back, strict=True):
        assert_same_bits(solution.state, solved(callback, first).state)
        assert type(same) is type(callback)
    assert back[1][1] is low
    # The time of a record goes on there.
    one, other = back[0][1].records
    np.testing.assert_array_equal(other.loss, used[0].records[1].loss)
    assert other.seconds[0] > one.seconds[-1]


@pytest.mark.parametrize("keep_states", [True, False])
def test_the_best_lane_in_float64(keep_states: bool):
    """Of losses that are the same in float32, or infinite."""
    losses = np.array([1 + 2e-12, 1e200, 1.0, 1 + 1e-12, np.inf])
    constant = lambda y, c: c + 0 * jnp.sum(y)  # noqa: E731
    found = sweep(constant, START, losses, keep_states=keep_states)
    assert best_lane(found) == 2
    some = jax.tree.map(lambda x: x[np.array([0, 1, 3])], found)
    assert best_lane(some) == 2
