"""Lower-triangular Toeplitz matrices: products and solves, fast at any size.

Such a matrix is given by its first column, and the product of two of them is the
truncated product of power series. With few coefficients the arithmetic is that of
dense matrices, in blocks, and each element has the accuracy of substitution. With many
it is done by the fast Fourier transform, accurate relative to the largest element.

A solve is JAX's `custom_linear_solve`, so that it can be differentiated in both modes,
to any order, and its derivative is one more solve with the transpose.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# Up to here blocks are about as fast as transforms, and more accurate where elements
# differ in size (`python -m benchmarks.mechanisms`).
_MANY = 256
# Blocks of a banded matrix have at least this size; their matrices its square.
_BLOCK = 16


def multiply(coef: Float[Array, " b"], x: Float[Array, " n"]) -> Float[Array, " n"]:
    """The product of a Toeplitz matrix and a vector.

    Args:
      coef: The first column, without the zeros at its end.
      x: The vector, or the first column of another Toeplitz matrix.

    Returns:
      The vector, or the first column of the product. float64 if one of them is.
    """
    dtype = np.promote_types(coef.dtype, x.dtype)
    coef, x = coef[: x.size].astype(dtype), x.astype(dtype)
    return (_multiply_by_fft if coef.size > _MANY else _multiply_in_blocks)(coef, x)


def solve(
    coef: Float[Array, " b"], rhs: Float[Array, " n"], inside: Bool[Array, " n"]
) -> Float[Array, " n"]:
    """Solves a linear system with a Toeplitz matrix in its leading rows.

    Args:
      coef: The first column of the matrix, without the zeros at its end.
      rhs: The right-hand side.
      inside: True in the leading rows, which count. The others are 0 in the result.
        They are not merely ignored: where a solution grows they would overflow, and
        the derivative of the others would be 0 * inf.

    Returns:
      The solution, float64 if an argument is.
    """
    dtype = np.promote_types(coef.dtype, rhs.dtype)
    coef = coef[: rhs.size].astype(dtype)
    substitute = _solve_by_fft if coef.size > _MANY else _solve_in_blocks

    def keep(x: Array) -> Array:
        return jnp.where(inside, x, 0.0)

    def matvec(x: Array) -> Array:
        return jnp.where(inside, multiply(coef, keep(x)), x)

    def forward(_: object, b: Array) -> Array:
        return jnp.where(inside, substitute(coef, keep(b), inside), b)

    def backward(_: object, b: Array) -> Array:
        # In reverse order of rows and columns, a Toeplitz matrix is its transpose.
        x = substitute(coef, keep(b)[::-1], inside[::-1])[::-1]
        return jnp.where(inside, x, b)

    rhs = keep(rhs.astype(dtype))
    return keep(jax.lax.custom_linear_solve(matvec, rhs, forward, backward))


def unit(n: int, dtype: Any) -> Float[Array, " n"]:
    """The first column of the identity."""
    return jnp.zeros(n, dtype).at[0].set(1.0)


def square_root(coef: Float[Array, " n"]) -> Float[Array, " n"]:
    """The first column of the square root of a Toeplitz matrix.

    Args:
      coef: Its first column, whose first element is positive.
    """
    first = jnp.sqrt(coef[0])

    def term(so_far: tuple[Array, Array], xs: tuple[Array, Array]) -> Any:
        root, latest_first = so_far
        k, c = xs
        x = (c - root[1:] @ latest_first[:-1]) / (2 * first)
        return (root.at[k].set(x), jnp.roll(latest_first, 1).at[0].set(x)), None

    root = jnp.zeros_like(coef).at[0].set(first)
    terms = (jnp.arange(1, coef.size), coef[1:])
    return jax.lax.scan(term, (root, jnp.zeros_like(coef)), terms)[0][0]


def sum_of_columns(
    coef: Float[Array, " n"], apart: Any, count: Any
) -> Float[Array, " n"]:
    """The sum of the columns 0, `apart`, `2 * apart`, ... of a Toeplitz matrix.

    By doubling: a sum of 2m columns is that of m and the same further down.

    Args:
      coef: The first column.
      apart: The distance of the columns, possibly traced.
      count: Their number, possibly traced.
    """
    most = count if isinstance(count, int) else coef.size
    distance = jnp.clip(apart, 0, coef.size)
    total = jnp.zeros_like(coef)
    for bit in range(int(most).bit_length()):
        is_set = (count >> bit) & 1 == 1
        total = jnp.where(is_set, coef + _shifted(total, distance), total)
        coef = coef + _shifted(coef, distance)
        distance = jnp.minimum(2 * distance, coef.size)
    return total


def _shifted(x: Array, by: Array) -> Array:
    padded = jnp.append(jnp.zeros_like(x), x)
    return jax.lax.dynamic_slice(padded, (x.size - by,), (x.size,))


def matrix(coef: Float[Array, " n"]) -> Float[Array, "n n"]:
    """The matrix with a first column."""
    return _part(coef, coef.size, coef.size)


def _part(coef: Array, rows: int, columns: int, first: int = 0) -> Array:
    """The matrix with `coef[first + i - j]` in row i and column j, or 0."""
    index = first + np.arange(rows)[:, None] - np.arange(columns)
    there = (index >= 0) & (index < coef.size)
    return jnp.where(there, coef[np.where(there, index, 0)], 0.0)


def _blocks(coef: Array, x: Array) -> tuple[Array, Array, Array]:
    """A banded matrix and a vector, both in blocks.

    Returns:
      The diagonal block of the matrix; what is left of it, without the zero columns;
      the vector, a block a row.
    """
    size = max(_BLOCK, 1 << (coef.size - 1).bit_length())
    size = min(size, x.size)
    width = coef.size - 1
    blocks = jnp.pad(x, (0, -x.size % size)).reshape(-1, size)
    return _part(coef, size, size), _part(coef, size, width, width), blocks


matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _multiply_in_blocks(coef: Array, x: Array) -> Array:
    diagonal, left, blocks = _blocks(coef, x)
    y = matmul(blocks, diagonal.T)
    if len(blocks) > 1 and left.size:
        before = blocks[:-1, -left.shape[1] :]
        y = y.at[1:].add(matmul(before, left.T))
    return y.ravel()[: x.size]


def _solve_in_blocks(coef: Array, rhs: Array, inside: Array) -> Array:
    diagonal, left, blocks = _blocks(coef, rhs)
    size = len(diagonal)
    inverse = _part(_inverse_by_rows(coef, size), size, size)
    blocks = matmul(blocks, inverse.T)
    inside = jnp.pad(inside, (0, blocks.size - inside.size)).reshape(blocks.shape)
    if len(blocks) == 1 or not left.size:
        return jnp.where(inside, blocks, 0.0).ravel()[: rhs.size]
    left = matmul(inverse, left)

    def block(last: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        x, keep = xs
        x = jnp.where(keep, x - matmul(left, last), 0.0)
        return x[-last.size :], x

    start = jnp.zeros(left.shape[1], rhs.dtype)
    return jax.lax.scan(block, start, (blocks, inside))[1].ravel()[: rhs.size]


def _inverse_by_rows(coef: Array, size: int) -> Array:
    """The leading coefficients of the inverse power series, one after the other."""

    def row(before: Array, rhs: Array) -> tuple[Array, Array]:
        x = (rhs - matmul(coef[1:], before)) / coef[0]
        return jnp.append(x, before)[: before.size], x

    start = jnp.zeros(coef.size - 1, coef.dtype)
    return jax.lax.scan(row, start, unit(size, coef.dtype))[1]


def _multiply_by_fft(coef: Array, x: Array) -> Array:
    return _cyclic(coef, x, coef.size + x.size - 1)[: x.size]


def _cyclic(x: Array, y: Array, length: int) -> Array:
    """The cyclic convolution of a length that is at least the one given."""
    from scipy.fft import next_fast_len  # which takes long to import

    length = int(next_fast_len(length, real=True) or length)
    return jnp.fft.irfft(jnp.fft.rfft(x, length) * jnp.fft.rfft(y, length), length)


def _solve_by_fft(coef: Array, rhs: Array, inside: Array) -> Array:
    """The inverse power series by Newton's iteration, times the right-hand side.

    Each iteration doubles the number of terms: Kung, On computing reciprocals of power
    series, https://doi.org/10.1007/BF01436917.
    """
    # As many terms count as there are rows that do, wherever those are.
    keep = jnp.arange(rhs.size) < jnp.sum(inside, dtype=int)
    inverse = 1 / coef[:1]
    while inverse.size < rhs.size:
        known, size = inverse.size, min(2 * inverse.size, rhs.size)
        # What wraps around falls on the terms that are known.
        error = _cyclic(coef[:size], inverse, size)[known:size]
        more = -_multiply_by_fft(inverse[: size - known], error)
        inverse = jnp.append(inverse, jnp.where(keep[known:size], more, 0.0))
    return jnp.where(inside, _multiply_by_fft(inverse, rhs), 0.0)
