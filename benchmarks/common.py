"""What several benchmarks need."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax_privacy.matrix_factorization import toeplitz


def toeplitz_problem(n: int, bands: int) -> tuple[Callable[..., Any], jax.Array]:
    """jax-privacy's loss, and where its users start."""
    loss = functools.partial(toeplitz.loss, n=n, reduction_fn=jnp.mean)
    return loss, toeplitz.optimal_max_error_strategy_coefs(bands)


def seconds(call: Callable[[], Any]) -> float:
    """The time until the result of a call is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
