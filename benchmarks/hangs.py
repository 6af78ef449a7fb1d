"""Do programs of batched linear algebra come back, each of 1,000 times?

In jaxlib 0.10 and 0.11 a batched LAPACK kernel can wait for ever (`_jax/lapack.py` has
the reason). Each program runs in a process of its own, on one core and on two; one from
which nothing is heard for two minutes counts as hung, and is ended. The first row, in
plain JAX, is the smallest program that hangs; ours must not.

    python -m benchmarks.hangs [--calls 1000]
"""

import argparse
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from jaxmf_opt import optimize, sweep
from jaxmf_opt.mechanisms import Dense

PATIENCE = 120.0


def _inverses(y: jax.Array, t: jax.Array) -> jax.Array:
    """A sum of the elements of an inverse, and a distance."""
    matrix = 10.6 * jnp.eye(y.shape[0]) + 0.1 * y
    return jnp.sum((y - t) ** 2) + jnp.sum(jnp.linalg.inv(matrix))


def _plain() -> Callable[[], Any]:
    def two(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        return solve_triangular(a, b), solve_triangular(a + 1, b)

    both = jax.jit(jax.vmap(two))
    a = 10 * jnp.eye(256) + jnp.ones((3, 256, 256)) / 256
    return lambda: both(a, a)


def _sweep() -> Callable[[], Any]:
    start, targets = jnp.zeros((48, 48)), jnp.linspace(0.1, 0.2, 8)
    return lambda: sweep(
        _inverses, start, targets, rtol=0.0, max_optimizer_steps=6, batch_size=8
    )


def _callback() -> Callable[[], Any]:
    start, seen = jnp.zeros((64, 64)), []

    def end(t: jax.Array) -> jax.Array:
        return optimize(
            lambda y: _inverses(y, t),
            start,
            max_optimizer_steps=2,
            callback=lambda info: seen.append(info.step),
        )

    ends = jax.jit(jax.vmap(end))
    return lambda: ends(jnp.linspace(0.1, 0.2, 8))


def _gradient() -> Callable[[], Any]:
    start = jnp.zeros((8, 8))

    def norm(t: jax.Array) -> jax.Array:
        best = optimize(lambda y: _inverses(y, t), start, max_optimizer_steps=2)
        return jnp.sum(best**2)

    gradients = jax.jit(jax.vmap(jax.grad(norm)))
    return lambda: gradients(jnp.linspace(0.1, 0.2, 8))


def _dense() -> Callable[[], Any]:
    mechanism = Dense(256)

    def scaled(gram: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, gradient = mechanism.loss_and_gradient(gram)
        return scale * loss, scale * gradient

    start, scales = mechanism.initial_params(), jnp.linspace(1.0, 2.0, 3)
    return lambda: sweep(
        scaled, start, scales, grad=True, max_optimizer_steps=1, batch_size=3
    )


PROGRAMS = {
    "plain JAX: two triangular solves, 3 lanes": _plain,
    "sweep of inverses, 48 x 48, 8 lanes": _sweep,
    "jit(vmap), Python callback, 64 x 64, 8 lanes": _callback,
    "jit(vmap(grad)), inverses of 8 x 8, 8 lanes": _gradient,
    "sweep of dense mechanisms, n = 256, 3 lanes": _dense,
}


def _call(name: str, calls: int) -> None:
    """Says after each call that it has come back; in a process of its own."""
    call = PROGRAMS[name]()
    for _ in range(calls):
        jax.block_until_ready(call())
        print(flush=True)


def _come_back(name: str, calls: int, cores: set[int]) -> tuple[int, bool]:
    """How many calls come back, and whether the process hangs."""
    command = [sys.executable, "-m", "benchmarks.hangs", "--one", name]
    process = subprocess.Popen(
        [*command, "--calls", str(calls)],
        stdout=subprocess.PIPE,
        env=os.environ | {"JAX_ENABLE_X64": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    heard: queue.Queue[bytes] = queue.Queue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            heard.put(line)
        heard.put(b"")

    threading.Thread(target=listen, daemon=True).start()
    done, hangs = 0, False
    try:
        while heard.get(timeout=PATIENCE):
            done += 1
    except queue.Empty:
        hangs = True
    finally:
        process.kill()
        process.wait()
    return done, hangs


def main(calls: int = 1000) -> None:
    usable = sorted(os.sched_getaffinity(0))
    for name in PROGRAMS:
        for cores in (1, 2):
            begin = time.perf_counter()
            done, hangs = _come_back(name, calls, set(usable[:cores]))
            said = "HANGS" if hangs else "ends" if done == calls else "FAILS"
            took = time.perf_counter() - begin
            print(
                f"{name:46} {cores} core(s): {done:5} of {calls} calls, {said}, "
                f"{took:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        _call(given.one, given.calls)
    else:
        main(given.calls)
