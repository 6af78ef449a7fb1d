"""Linear algebra of matrices over steps, and what one example adds up to."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, Float

from .._jax.region import x64_region


# In a batch, these kernels can wait for ever where the user has made the program. In a
# region, which leaves the dtypes of its operands alone, they cannot: see `_jax.lapack`.
def cholesky(x: Array) -> Array:
    return x64_region(jnp.linalg.cholesky, x)


def solve(factor: Array, rhs: Array, *, transposed: bool = False) -> Array:
    """Solves a system with a lower-triangular matrix, or with its transpose."""

    def solved(factor: Array, rhs: Array) -> Array:
        return jsl.solve_triangular(factor, rhs, lower=True, trans=int(transposed))

    return x64_region(solved, factor, rhs)


def largest_sum(x: Float[Array, " n"], min_sep: Any, count: Any) -> Float[Array, ""]:
    """The largest sum of elements that one example can take part in.

    By dynamic programming: https://arxiv.org/abs/2306.08153, algorithm 3.

    Args:
      x: What is summed, not negative.
      min_sep: How many elements apart they are at least.
      count: How many they are at most.
    """

    def one_more(_: Any, best: Array) -> Array:
        # best[i] is that of the elements from i on.
        later = jnp.append(best, jnp.zeros_like(best))
        later = jax.lax.dynamic_slice(later, (jnp.clip(min_sep, 0, x.size),), (x.size,))
        return jax.lax.cummax(x + later, reverse=True)

    count = jnp.minimum(count, x.size)
    return jax.lax.fori_loop(0, count, one_more, jnp.zeros_like(x))[0]
