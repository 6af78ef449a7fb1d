"""Banded Toeplitz strategies for DP matrix factorisation (DP-BandMF).

Training for `n` steps releases the partial sums `A G` of the gradients `G`, where `A`
is the lower-triangular Toeplitz *workload* with first column `workload_coef`. The
mechanism factorises `A = B C` and adds the noise `B Z`, i.e. the correlated noise
`C^{-1} Z` to the gradients. Here the *strategy* `C` is a lower-triangular Toeplitz
matrix with first column `strategy_coef`, zero from entry `bands` on. Its sensitivity is
the norm of a column as long as no example takes part twice within `bands` steps.

References:
  McKenna, Scaling up the Banded Matrix Factorization Mechanism for Differentially
  Private ML, https://arxiv.org/abs/2405.15913.

  Choquette-Choo et al., (Amplified) Banded Matrix Factorization,
  https://arxiv.org/abs/2306.08153.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Count = int | Int[Array, ""]


def momentum_workload(n: int, momentum: float | Float[Array, ""]) -> Float[Array, " n"]:
    """The workload of SGD with heavy-ball momentum: `w_t = sum_{i <= t} momentum^i`.

    Entry `t` is how much of a gradient has reached the model `t` steps later, in units
    of the learning rate. Momentum 0 gives the prefix sum, all ones. From Denisov et
    al., https://arxiv.org/abs/2202.08312, section 2.

    Args:
      n: The number of steps.
      momentum: In [0, 1); may be traced.

    Returns:
      The first column of the workload matrix, shape (n,).
    """
    return jnp.cumsum(jnp.asarray(momentum, float) ** jnp.arange(n))


def initial_strategy(max_bands: int, bands: Count) -> Float[Array, " max_bands"]:
    """A good starting point: the square root of the prefix sum, cut at `bands`.

    The coefficients of `(1 - x)^{-1/2}`, which are optimal for the maximal error of
    prefix sums with all bands: Fichtenberger, Henzinger and Upadhyay,
    https://arxiv.org/abs/2202.11205.

    Args:
      max_bands: The length of the result.
      bands: The number of bands, at most `max_bands`; may be traced.

    Returns:
      Strategy coefficients, shape (max_bands,), zero from `bands` on.
    """
    k = jnp.arange(1, max_bands)
    coef = jnp.cumprod(jnp.concatenate([jnp.ones(1), 1 - 0.5 / k]))
    return jnp.where(jnp.arange(max_bands) < bands, coef, 0.0)


def mean_squared_error(
    strategy_coef: Float[Array, " max_bands"],
    workload_coef: Float[Array, " max_n"],
    *,
    n: Count,
    bands: Count,
) -> Float[Array, ""]:
    """The mean over training of the expected squared error, at sensitivity 1.

    That is `|B|_F^2 |C e_1|^2 / n` for unit noise: the loss to minimise. It does not
    depend on the scale of `strategy_coef`.

    Args:
      strategy_coef: Strategy coefficients; those from `bands` on are not looked at.
      workload_coef: Workload coefficients; those from `n` on are not looked at.
      n: The number of training steps, at most `max_n`; may be traced.
      bands: The number of bands, at most `max_bands`; may be traced.

    Returns:
      The loss, a scalar. With `n < 1` or `bands < 1` it is not finite.
    """
    (max_bands,), (max_n,) = strategy_coef.shape, workload_coef.shape
    # Inside a solve the strategy is float64, and the workload what the caller has.
    dtype = jnp.promote_types(strategy_coef.dtype, workload_coef.dtype)
    strategy_coef = strategy_coef.astype(dtype)
    workload_coef = workload_coef.astype(dtype)
    used = jnp.arange(max_bands) < jnp.minimum(bands, n)
    strategy_coef = jnp.where(used, strategy_coef, 0.0)
    b = _solve_banded(strategy_coef, workload_coef, n)
    # Row t of B has the entries b_0 ... b_t, so b_i is in n - i of its n rows.
    rows = jnp.clip(n - jnp.arange(max_n), 0)
    return jnp.sum(b**2 * rows) / n * jnp.sum(strategy_coef**2)


def _solve_banded(
    coef: Float[Array, " bands"], rhs: Float[Array, " max_n"], n: Count
) -> Float[Array, " max_n"]:
    """Solves `C x = rhs` for the first `n` rows of a banded Toeplitz matrix `C`.

    The rows from `n` on are 0. They are not merely ignored: where a solution grows they
    would overflow, and the derivative of the others would be 0 * inf.
    """
    inside = jnp.arange(rhs.size) < n

    def row(last: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        r, keep = xs
        x = jnp.where(keep, (r - coef[1:] @ last) / coef[0], 0.0)
        return jnp.concatenate([x[None], last])[: last.size], x

    start = jnp.zeros(coef.size - 1, rhs.dtype)
    return jax.lax.scan(row, start, (jnp.where(inside, rhs, 0.0), inside))[1]
