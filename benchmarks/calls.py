"""What does a call cost, compared with jax-privacy 2.0.0?

Ratios are ours / upstream's, each measured in pairs in one run: medians over the pairs.

* cold: the first call in a fresh process (JAX itself is warmed up before).
* cold, cached: the same, where an earlier process has filled JAX's persistent cache.
* repeated: the same call again, eager, with the same loss function.
* other array: again, with a fresh closure over another array.
* jitted: our solve under `jax.jit`, compiled before, against upstream's repeated call.
* evaluations: how often the loss was executed.
"""

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax_privacy.matrix_factorization import optimization as upstream
from jax_privacy.matrix_factorization import toeplitz

import jaxmf_opt

from .common import seconds, toeplitz_problem

PROBLEMS = {"Toeplitz n=128 b=16": (128, 16), "Toeplitz n=1024 b=32": (1024, 32)}
OPTIMIZE = {"ours": jaxmf_opt.optimize, "upstream": upstream.optimize}
PAIRS = 5


def _cold(who: str, n: int, bands: int) -> float:
    """The first call, in this process."""
    loss, params = toeplitz_problem(n, bands)
    return seconds(lambda: OPTIMIZE[who](loss, params))


def _cold_in_fresh_process(who: str, n: int, bands: int, cache: str = "") -> float:
    command = [sys.executable, "-m", "benchmarks.calls", who, str(n), str(bands)]
    environment = dict(os.environ)
    if cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    out = subprocess.run(
        command, capture_output=True, check=True, text=True, env=environment
    )
    return json.loads(out.stdout)


def _ratio(call: Callable[[str], float]) -> str:
    pairs = [(call("ours"), call("upstream")) for _ in range(PAIRS)]
    ratio = statistics.median(a / b for a, b in pairs)
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return f"{ratio:8.4f}   ({ours:.4f} s / {theirs:.4f} s)"


def _evaluations(who: str, n: int, bands: int, **options: Any) -> int:
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    loss, params = toeplitz_problem(n, bands)

    def counted(coef: jax.Array) -> jax.Array:
        jax.debug.callback(tick)
        return loss(coef)

    jax.block_until_ready(OPTIMIZE[who](counted, params, **options))
    jax.effects_barrier()
    return count


def _measure(n: int, bands: int) -> None:
    loss, params = toeplitz_problem(n, bands)
    scales = itertools.count(1.0, 0.1)
    jitted = jax.jit(functools.partial(jaxmf_opt.optimize, loss))

    def cold(who: str) -> float:
        return _cold_in_fresh_process(who, n, bands)

    def repeated(who: str) -> float:
        return seconds(lambda: OPTIMIZE[who](loss, params))

    def other_array(who: str) -> float:
        weights = jnp.full(n, next(scales))

        def weighted(coef: jax.Array) -> jax.Array:
            error = toeplitz.per_query_error(strategy_coef=coef, n=n)
            return jnp.mean(weights * error) * jnp.sum(coef**2)

        return seconds(lambda: OPTIMIZE[who](weighted, params))

    def warm(who: str) -> float:
        return seconds(lambda: jitted(params)) if who == "ours" else repeated(who)

    print("  cold        ", _ratio(cold))
    with tempfile.TemporaryDirectory() as cache:

        def cached(who: str) -> float:
            return _cold_in_fresh_process(who, n, bands, cache)

        for who in OPTIMIZE:
            cached(who)
        print("  cold, cached", _ratio(cached))
    for name, call in {
        "repeated": repeated,
        "other array": other_array,
        "jitted": warm,
    }.items():
        call("ours")
        print(f"  {name:12}", _ratio(call))
    print(
        f"  evaluations: upstream {_evaluations('upstream', n, bands)}, "
        f"ours {_evaluations('ours', n, bands)}, "
        f"ours with rtol=1e-6 {_evaluations('ours', n, bands, rtol=1e-6)}"
    )


def main() -> None:
    for name, (n, bands) in PROBLEMS.items():
        print(name)
        _measure(n, bands)


if __name__ == "__main__":
    if len(sys.argv) > 1:  # the child of `_cold_in_fresh_process`
        jax.block_until_ready(jax.jit(jnp.sin)(1.0))
        print(json.dumps(_cold(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
