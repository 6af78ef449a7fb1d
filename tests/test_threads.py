"""Many threads that solve at once, each its own problem."""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmf_opt import CallbackArgs, optimize, solve, sweep, traced

THREADS, EACH = 4, 2
PLAIN = optax.sgd(0.4)


def centre(thread: int, number: int) -> np.ndarray:
    return np.linspace(-1.0, 1.0, 3) * (thread + 1) + number


def loss(y: jax.Array, c: Any) -> jax.Array:
    c = jnp.asarray(c, y.dtype)
    return jnp.sum((y - c) ** 2)


def eager(c: np.ndarray) -> Any:
    return optimize(lambda y: loss(y, c), jnp.zeros(3), gtol=1e-9, optimizer=PLAIN)


def with_callback(c: np.ndarray) -> Any:
    """Every thread's callback runs on it, and hears of its own solve."""
    here, steps = threading.get_ident(), []

    def callback(info: CallbackArgs) -> Any:
        assert threading.get_ident() == here
        steps.append(int(info.step))
        return jnp.max(jnp.abs(info.grad)) < 1e-9

    y = optimize(lambda y: loss(y, c), jnp.zeros(3), callback=callback)
    assert steps == list(range(len(steps)))
    return y


@traced
def small(info: CallbackArgs) -> jax.Array:
    return jnp.max(jnp.abs(info.grad)) < 1e-9


def with_traced_callback(c: np.ndarray) -> Any:
    return optimize(lambda y: loss(y, c), jnp.zeros(3), callback=small)


@jax.jit
def jitted(c: jax.Array) -> jax.Array:
    return optimize(lambda y: loss(y, c), jnp.zeros(3), gtol=1e-9, optimizer=PLAIN)


def differentiated(c: np.ndarray) -> Any:
    """The minimum moves as the centre does."""
    jacobian = jax.jacrev(jitted)(jnp.asarray(c, float))
    np.testing.assert_allclose(jacobian, np.eye(3), atol=1e-6)
    return jitted(jnp.asarray(c, float))


def in_a_sweep(c: np.ndarray) -> Any:
    both = np.stack([c, c + 1])
    value = sweep(loss, jnp.zeros(3), both, gtol=1e-9, optimizer=PLAIN).value
    np.testing.assert_allclose(value[1] - value[0], 1.0, atol=1e-5)
    return value[0]


def going_on(c: np.ndarray) -> Any:
    first = solve(lambda y: loss(y, c), jnp.zeros(3), max_optimizer_steps=2)
    return solve(lambda y: loss(y, c), jnp.zeros(3), state=first.state, gtol=1e-9).value


WAYS: list[Callable[[np.ndarray], Any]] = [
    *(eager, with_callback, with_traced_callback, differentiated, in_a_sweep),
    going_on,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_right_answers(way: Callable[[np.ndarray], Any]):
    together = threading.Barrier(THREADS)

    def work(thread: int) -> list[np.ndarray]:
        # Half of the threads are float64 programs: the setting is each thread's own.
        with jax.enable_x64(thread % 2 == 0):
            together.wait(60)
            return [np.asarray(way(centre(thread, i))) for i in range(EACH)]

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(work, range(THREADS), timeout=240))
    for thread, of_thread in enumerate(results):
        want_dtype = np.float64 if thread % 2 == 0 else np.float32
        for number, got in enumerate(of_thread):
            assert got.dtype == want_dtype
            want = centre(thread, number)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
