"""Workloads that people train with.

Row `t` of a workload matrix `A` says how much of the gradients of each step is in the
model after step `t`. Of SGD with a constant learning rate it is a lower-triangular
Toeplitz matrix, given by its first column, `workload_coef`: `prefix_sum`, `momentum`,
`weight_decay`. A learning rate that changes scales the steps of such a training: the
schedules `linear_cooldown` and `exponential_decay`. `matrix` has both in it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import _toeplitz
from ._setup import (
    Count,
    Number,
    Requirements,
    Static,
    Vector,
    check_decay,
    check_n,
    check_number,
    check_static_count,
    check_vector,
)

__all__ = [
    "exponential_decay",
    "linear_cooldown",
    "matrix",
    "momentum",
    "prefix_sum",
    "weight_decay",
]


def prefix_sum(n: Static) -> Float[Array, " n"]:
    """The workload of plain SGD: the model is the sum of all gradients so far.

    From Kairouz et al., https://arxiv.org/abs/2103.00039.

    Args:
      n: The number of steps.

    Returns:
      The first column of the workload: ones.

    Raises:
      TypeError: If `n` is not a whole number.
      ValueError: If it is less than 1.

    Example:
      >>> prefix_sum(3)
      Array([1., 1., 1.], dtype=float32)
    """
    return jnp.ones(check_static_count("n", n))


def momentum(n: Static, momentum: Number) -> Float[Array, " n"]:
    """The workload of SGD with heavy-ball momentum: `w_t = sum_{i <= t} momentum^i`.

    From Denisov et al., https://arxiv.org/abs/2202.08312.

    Args:
      n: The number of steps.
      momentum: At least 0 and less than 1; may be traced. 0 gives prefix sums.

    Returns:
      The first column of the workload. NaN where a traced `momentum` is impossible.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If an argument is impossible.

    Example:
      >>> momentum(4, 0.5)
      Array([1.   , 1.5  , 1.75 , 1.875], dtype=float32)
    """
    return weight_decay(n, 1.0, momentum)


def weight_decay(
    n: Static, decay: Number, momentum: Number = 0.0
) -> Float[Array, " n"]:
    """The workload of SGD whose model decays: `w_t = sum_i decay^{t-i} momentum^i`.

    Each step multiplies the model by `decay` before it is updated. From Kalinin and
    Lampert, https://arxiv.org/abs/2405.13763, section 3.

    Args:
      n: The number of steps.
      decay: More than 0 and at most 1, which is no decay; may be traced.
      momentum: At least 0 and less than 1; may be traced.

    Returns:
      The first column of the workload. NaN where a traced number is impossible.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If an argument is impossible.

    Example:
      >>> weight_decay(3, 0.5)
      Array([1.  , 0.5 , 0.25], dtype=float32)
    """
    n = check_static_count("n", n)
    requirements = Requirements()
    kept = check_decay(requirements, decay)
    carried = check_number("momentum", momentum)
    requirements.add(
        (carried >= 0) & (carried < 1),
        f"`momentum` must be at least 0 and less than 1, got {momentum}.",
    )

    def step(last: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        coef, power = last
        power = carried * power
        return (kept * coef + power, power), coef

    one = jnp.ones_like(kept)
    coef = jax.lax.scan(step, (one, one), None, length=n)[1]
    return requirements.or_nan(coef)


def linear_cooldown(
    max_n: Static,
    n: Count | None = None,
    *,
    fraction: Number = 0.25,
    final: Number = 0.05,
) -> Float[Array, " max_n"]:
    """A learning rate of 1 that goes down linearly at the end of training.

    By default to a twentieth over the last quarter: Choquette-Choo et al., Multi-Epoch
    Matrix Factorization Mechanisms for Private Machine Learning,
    https://arxiv.org/abs/2211.06530, appendix on StackOverflow.

    Args:
      max_n: The length of the result.
      n: Training steps, by default `max_n`.
      fraction: The part of the steps, rounded down, that cools down: in [0, 1]. The
        first of them still has the learning rate 1, the last one `final`.
      final: The last learning rate.

    Returns:
      A learning rate for each step, `final` from `n` on. NaN where a traced number is
      impossible.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If an argument is impossible.

    Example:
      >>> linear_cooldown(4, fraction=0.5, final=0.5)
      Array([1. , 1. , 1. , 0.5], dtype=float32)
    """
    requirements, n, last = _check_schedule(max_n, n, final)
    share = check_number("fraction", fraction)
    requirements.add(
        (share >= 0) & (share <= 1),
        f"`fraction` must be at least 0 and at most 1, got {fraction}.",
    )
    total = jnp.asarray(n, last.dtype)
    # (0.58 * 50 is a little less than 29.)
    rounding = 4 * float(jnp.finfo(last.dtype).eps)
    cooling = jnp.floor(share * total * (1 + rounding))
    into = jnp.arange(max_n, dtype=last.dtype) - (total - cooling)
    # A single step that cools down is the last one.
    part = jnp.where(cooling > 1, into / jnp.maximum(cooling - 1, 1), into + 1)
    return requirements.or_nan(1 + jnp.clip(part, 0, 1) * (last - 1))


def exponential_decay(
    max_n: Static, n: Count | None = None, *, final: Number = 0.05
) -> Float[Array, " max_n"]:
    """A learning rate that goes down exponentially, from 1 to `final`.

    As `optax.exponential_decay` over all steps.

    Args:
      max_n: The length of the result.
      n: Training steps, by default `max_n`.
      final: The learning rate of the last step, more than 0.

    Returns:
      A learning rate for each step, `final` from `n` on. NaN where a traced number is
      impossible.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If an argument is impossible.

    Example:
      >>> exponential_decay(3, final=0.25)
      Array([1.  , 0.5 , 0.25], dtype=float32)
    """
    requirements, n, last = _check_schedule(max_n, n, final)
    requirements.add(last > 0, f"`final` must be more than 0, got {final}.")
    most = jnp.maximum(jnp.asarray(n, last.dtype) - 1, 1)
    part = jnp.arange(max_n, dtype=last.dtype) / most
    return requirements.or_nan(jnp.exp(jnp.clip(part, 0, 1) * jnp.log(last)))


def matrix(
    workload_coef: Vector,
    learning_rate: Vector | None = None,
    *,
    decay: Number = 1.0,
) -> Float[Array, "n n"]:
    """A workload as a matrix.

    With a learning rate, the update of step s, momentum included, is scaled by
    `learning_rate[s]`: without decay,
    `A[t, i] = sum_{i <= s <= t} learning_rate[s] (w_{s-i} - w_{s-i-1})`. From Denisov
    et al., https://arxiv.org/abs/2202.08312, in whose code the learning rate comes
    after the momentum.

    Args:
      workload_coef: The first column for a constant learning rate, shape (n,).
      learning_rate: One for each step, shape (n,); 1 by default.
      decay: The decay of the model, if it is one of `weight_decay`.

    Returns:
      The lower-triangular workload matrix. NaN where a traced `decay` is impossible.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If an argument is impossible.

    Example:
      >>> matrix(prefix_sum(3), linear_cooldown(3, fraction=1.0, final=0.5))
      Array([[1.  , 0.  , 0.  ],
             [1.  , 0.75, 0.  ],
             [1.  , 0.75, 0.5 ]], dtype=float32)
    """
    coef = jnp.asarray(check_vector("workload_coef", workload_coef))
    requirements = Requirements()
    kept = check_decay(requirements, decay).astype(coef.dtype)
    if learning_rate is None:
        return requirements.or_nan(_toeplitz.matrix(coef))
    rates = jnp.asarray(check_vector("learning_rate", learning_rate, coef.size))
    updates = coef - kept * jnp.append(jnp.zeros_like(coef[:1]), coef[:-1])
    updates = rates.astype(coef.dtype)[:, None] * _toeplitz.matrix(updates)

    def row(above: Array, update: Array) -> tuple[Array, Array]:
        this = kept * above + update
        return this, this

    start = jnp.zeros_like(coef)
    return requirements.or_nan(jax.lax.scan(row, start, updates)[1])


def _check_schedule(
    max_n: Static, n: Count | None, final: Number
) -> tuple[Requirements, Any, Array]:
    """What learning rates have in common: their length, and the last of them."""
    requirements = Requirements()
    n, _ = check_n(requirements, n, check_static_count("max_n", max_n))
    last = check_number("final", final)
    requirements.add(jnp.isfinite(last), f"`final` must be finite, got {final}.")
    return requirements, n, last


def __dir__() -> list[str]:
    return __all__
