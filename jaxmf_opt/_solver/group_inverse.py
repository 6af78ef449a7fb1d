"""The inverse of a matrix on its range.

The matrix `A` of the derivative of a minimum may be singular: the Hessian of a loss
that does not depend on the scale of its parameters is, and so is the Jacobian of a
gradient that is masked or projected. What is wanted is the group inverse `A#`, of which

    A A# = A# A    and    A A# A = A.

For a symmetric matrix that is the pseudo-inverse: `A# b` is the solution of smallest
norm. For others it is the solution that an iteration can move to, whose steps are
combinations of gradients. See Meyer, The role of the group generalized inverse in the
theory of finite Markov chains, https://doi.org/10.1137/1017044.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._jax.region import x64_region

# As many columns of A are computed at the same time.
_COLUMNS = 256

# Singular values below this part of the largest one count as 0, after rows and columns
# have been scaled to the same size. The rounding error of a Hessian is about that.
RCOND = 1e-13

# Up to this condition a matrix, scaled like that, is regular, and simply inverted.
_REGULAR = 1e10

# A matrix in float32 whose condition is above this may be singular but for rounding, or
# in half precision.
_REGULAR_IN_FLOAT32, _REGULAR_IN_HALF = 1e4, 4.0


def as_matrix(
    product: Callable[[Array], Array], n: int, dtype: Any = float
) -> Float[Array, "n n"]:
    """The matrix of a linear function, some columns at a time."""
    eye = jnp.eye(n, dtype=dtype)
    if n <= _COLUMNS:
        return jax.vmap(product, out_axes=1)(eye)
    return jax.lax.map(product, eye, batch_size=_COLUMNS).T


def group_inverse(
    matrix: Float[Array, "n n"], null: Float[Array, " n"], symmetric: bool
) -> Float[Array, "n n"]:
    """The group inverse of a matrix, differentiable as long as its rank is constant.

    Rows and columns are scaled before it is decided what is singular, so the result
    does not depend on the units of the variables unless the matrix is singular.

    Args:
      matrix: The matrix.
      null: A unit vector that is known to be in the null space, from both sides, if
        rounding or an inexact minimum do not let one see it; or zeros.
      symmetric: Whether the matrix is symmetric.

    Returns:
      Its group inverse, in the dtype of the matrix; NaN if the matrix is not finite, or
      not in float64 and so ill-conditioned that it cannot be told from a singular one.
    """
    inverse = functools.partial(_group_inverse, symmetric=symmetric)
    return x64_region(
        inverse, matrix, null, may_close=False, tangent=_tangent_of_group_inverse
    )


def _group_inverse(
    matrix: Float[Array, "n n"], null: Float[Array, " n"], *, symmetric: bool
) -> Float[Array, "n n"]:
    dtype = matrix.dtype
    matrix, null = matrix.astype(float), null.astype(float)
    # Without the barrier XLA's CPU backend fuses an FFT's transposed output into the
    # factorisation, and then fails on its layout.
    matrix = jax.lax.optimization_barrier(matrix)
    # A variable that is in nothing is singular by itself.
    absent = _rows_of_zeros(matrix)
    null = unit(jnp.where(absent, 0.0, null))
    matrix = without_null(without_null(matrix, null).T, null).T
    matrix = matrix + jnp.diag(jnp.where(absent, 1.0, 0.0))
    rows, columns = _equilibrate(matrix)
    if symmetric:
        rows = columns = jnp.exp2(jnp.round(jnp.log2(rows * columns) / 2))
    scaled = rows[:, None] * matrix * columns[None, :]
    # What is known to be null is made regular, in units in which all rows are alike: in
    # others it would outweigh the rows of some variables.
    along = unit(null / columns)
    regular = scaled + jnp.tensordot(along, along, axes=0)
    inverse = _inverse(regular, definite=symmetric)
    condition = _norm_1(regular) * _norm_1(inverse)
    in_units = columns[:, None] * inverse * rows[None, :]
    if dtype == jnp.float64:
        inverse = jax.lax.cond(
            condition <= _REGULAR,
            lambda: in_units,
            lambda: _inverse_on_range(scaled, rows, columns, symmetric),
        )
    else:
        is_float32 = dtype == jnp.float32
        limit = _REGULAR_IN_FLOAT32 if is_float32 else _REGULAR_IN_HALF
        inverse = jnp.where(condition <= limit, in_units, jnp.nan)
    inverse = without_null(without_null(inverse, null).T, null).T
    return jnp.where(absent[:, None] | absent[None, :], 0.0, inverse).astype(dtype)


def rows_of(
    matrix: Float[Array, "n n"],
) -> tuple[Bool[Array, " n"], Float[Array, " n"]]:
    """Which rows and columns are 0, and factors that make the other columns alike."""
    return _rows_of_zeros(matrix), _equilibrate(matrix)[1]


def _rows_of_zeros(matrix: Float[Array, "n n"]) -> Bool[Array, " n"]:
    return jnp.all(matrix == 0, axis=0) & jnp.all(matrix == 0, axis=1)


def _inverse_on_range(
    scaled: Float[Array, "n n"],
    rows: Float[Array, " n"],
    columns: Float[Array, " n"],
    symmetric: bool,
) -> Float[Array, "n n"]:
    """The group inverse of a matrix of which scaled rows and columns are given."""
    if symmetric:
        values, left = jnp.linalg.eigh((scaled + scaled.T) / 2)
        right = left
    else:
        left, values, right = jnp.linalg.svd(scaled)
        right = right.T
    size = jnp.abs(values)
    n = values.size
    kept = size > max(RCOND, n * np.finfo(float).eps) * jnp.max(size)
    reciprocal = jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)
    inverse = (right * reciprocal[None, :]) @ left.T
    inverse = columns[:, None] * inverse * rows[None, :]
    inverse = jnp.where(jnp.all(jnp.isfinite(values)), inverse, jnp.nan)
    # That is an inverse on the range. It has to be projected, from both sides, onto the
    # range and along the null space; which both are nothing new if there is none.
    right_null = jnp.where(kept[None, :], 0.0, columns[:, None] * right)
    left_null = jnp.where(kept[None, :], 0.0, rows[:, None] * left)
    right_null, left_null = map(_unit_columns, (right_null, left_null))
    overlap = left_null.T @ right_null + jnp.diag(jnp.where(kept, 1.0, 0.0))
    outside = right_null @ _inverse(overlap, definite=symmetric) @ left_null.T
    inverse = inverse - outside @ inverse
    return inverse - inverse @ outside


def _inverse(x: Float[Array, "n n"], *, definite: bool) -> Float[Array, "n n"]:
    """The inverse; not finite if there is none, or if `x` is not positive definite."""
    if not definite:
        return jnp.linalg.inv(x)
    factor = jnp.linalg.cholesky(x, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((factor, True), jnp.eye(x.shape[0]))


def _norm_1(x: Float[Array, "n n"]) -> Float[Array, ""]:
    return jnp.max(jnp.sum(jnp.abs(x), axis=0))


def without_null(x: Array, null: Float[Array, " n"]) -> Array:
    """What of a vector, or of columns, is orthogonal to a unit vector."""
    return x - jnp.tensordot(null, null @ x, axes=0)


def unit(v: Float[Array, " n"]) -> Float[Array, " n"]:
    """The vector with length 1, or zeros."""
    return v / jnp.where(jnp.any(v != 0), jnp.linalg.norm(v), 1.0)


def _unit_columns(x: Float[Array, "n n"]) -> Float[Array, "n n"]:
    length = jnp.linalg.norm(x, axis=0, keepdims=True)
    return x / jnp.where(length > 0, length, 1.0)


def _equilibrate(
    matrix: Float[Array, "n n"],
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Powers of two for rows and columns, which make their largest elements about 1.

    See Ruiz, A scaling algorithm to equilibrate both rows and columns norms in
    matrices, RAL-TR-2001-034.
    """
    size = jnp.abs(matrix)

    def once(_: Any, factors: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, columns = factors
        scaled = rows[:, None] * size * columns[None, :]

        def factor(largest: Array) -> Array:
            # A row of zeros has no size; a nan must stay one.
            root = jnp.exp2(-jnp.round(jnp.log2(largest) / 2))
            return jnp.where(largest == 0, 1.0, root)

        return rows * factor(scaled.max(1)), columns * factor(scaled.max(0))

    ones = jnp.ones(matrix.shape[0], matrix.dtype)
    return jax.lax.fori_loop(0, 12, once, (ones, ones))


def _tangent_of_group_inverse(
    matrix: Array, null: Array, inverse: Array, dots: tuple[Array | None, Any]
) -> Array | None:
    # Golub and Pereyra, https://doi.org/10.1137/0710036, for the pseudo-inverse; Meyer
    # and Stewart, https://doi.org/10.1137/0725031, for the group inverse.
    def tangent(a: Array, null: Array, s: Array, da: Array) -> Array:
        outside = jnp.eye(a.shape[0], dtype=a.dtype) - without_null(a @ s, null)
        square = s @ s
        return -s @ da @ s + square @ da @ outside + outside @ da @ square

    if dots[0] is None:
        return None
    return x64_region(tangent, matrix, null, inverse, dots[0], may_close=False)
