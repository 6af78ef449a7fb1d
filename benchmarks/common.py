"""What several benchmarks need."""

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax_privacy.matrix_factorization import toeplitz

T = TypeVar("T")


def toeplitz_problem(n: int, bands: int) -> tuple[Callable[..., Any], jax.Array]:
    """jax-privacy's loss, and where its users start."""
    loss = functools.partial(toeplitz.loss, n=n, reduction_fn=jnp.mean)
    return loss, toeplitz.optimal_max_error_strategy_coefs(bands)


def seconds(call: Callable[[], Any]) -> float:
    """The time until the result of a call is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def least_seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """The least time of some calls, after one that does not count: it compiles."""
    seconds(call)
    return min(seconds(call) for _ in range(repeats))


def timed(
    call: Callable[[], T], repeats: int = 5, enough: float = 0.5
) -> tuple[T, float]:
    """The result and the least time of a call that is compiled already.

    One that takes `enough` seconds is not repeated.
    """
    results: list[T] = []
    took = seconds(lambda: results.append(jax.block_until_ready(call())))
    return results[0], took if took >= enough else least_seconds(call, repeats)


def progress(
    items: Sequence[T], what: str, name: Callable[[T], str] = str
) -> Iterator[T]:
    """Goes through items, and says on standard error which one it is at."""
    for number, item in enumerate(items, 1):
        text = f"{what} {number}/{len(items)}: {name(item)}"
        print(f"\r{text:70}", end="", file=sys.stderr, flush=True)
        yield item
    print(f"\r{'':70}\r", end="", file=sys.stderr, flush=True)
