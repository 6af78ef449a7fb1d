"""Linear systems whose solution is right, or NaN.

The matrix `A` of the derivative of a minimum may be singular: the Hessian of a loss
that does not depend on the scale of its parameters is, and so is the Jacobian of a
gradient that is masked or projected. What is wanted is the group inverse `A#`, of which

    A A# = A# A    and    A A# A = A.

For a symmetric matrix that is the pseudo-inverse: `A# b` is the solution of smallest
norm. For others it is the solution that an iteration can move to, whose steps are
combinations of gradients. See Meyer, The role of the group generalized inverse in the
theory of finite Markov chains, https://doi.org/10.1137/1017044.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg as jsl
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .._jax.x64 import x64_region

# Up to this many parameters A is made into a matrix and factorised; above, it is only
# multiplied. There the factorisation takes seconds, and the matrix 32 MiB.
DIRECT_SIZE = 2048

# As many columns of A are computed at the same time.
_COLUMNS = 256

# Singular values below this part of the largest one count as 0, after rows and columns
# have been scaled to the same size. The rounding error of a Hessian is about that.
RCOND = 1e-13

# Up to this condition a matrix, scaled like that, is regular, and simply inverted.
_REGULAR = 1e10

# How well an iterative solver has to solve: the residual over the right-hand side, or
# over the size of the matrix times that of the solution, which is rounding.
_RTOL = 1e-12
_BACKWARD = 4e-15


def as_matrix(product: Callable[[Array], Array], n: int) -> Float[Array, "n n"]:
    """The matrix of a linear function, some columns at a time."""
    eye = jnp.eye(n)
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
      Its group inverse; NaN if the matrix is not finite.
    """
    inverse = functools.partial(_group_inverse, symmetric=symmetric)
    return x64_region(
        inverse, matrix, null, may_close=False, tangent=_tangent_of_group_inverse
    )


def _group_inverse(
    matrix: Float[Array, "n n"], null: Float[Array, " n"], *, symmetric: bool
) -> Float[Array, "n n"]:
    # Without the barrier XLA's CPU backend fuses an FFT's transposed output into the
    # factorisation, and then fails on its layout.
    matrix = jax.lax.optimization_barrier(matrix)
    # What is known to be singular is made regular: the direction `null`, and variables
    # that are in nothing.
    matrix = _without_null(_without_null(matrix, null).T, null).T
    absent = jnp.all(matrix == 0, axis=0) & jnp.all(matrix == 0, axis=1)
    size = jnp.max(jnp.abs(matrix))
    matrix = matrix + size * jnp.tensordot(null, null, axes=0)
    matrix = matrix + jnp.diag(jnp.where(absent, 1.0, 0.0))
    rows, columns = _equilibrate(matrix)
    if symmetric:
        rows = columns = jnp.exp2(jnp.round(jnp.log2(rows * columns) / 2))
    scaled = rows[:, None] * matrix * columns[None, :]
    inverse = _inverse(scaled, definite=symmetric)
    condition = _norm_1(scaled) * _norm_1(inverse)
    inverse = jax.lax.cond(
        condition <= _REGULAR,
        lambda: columns[:, None] * inverse * rows[None, :],
        lambda: _inverse_on_range(scaled, rows, columns, symmetric),
    )
    inverse = _without_null(_without_null(inverse, null).T, null).T
    return jnp.where(absent[:, None] | absent[None, :], 0.0, inverse)


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


def _without_null(x: Array, null: Float[Array, " n"]) -> Array:
    """What of a vector, or of columns, is orthogonal to a unit vector."""
    return x - jnp.tensordot(null, null @ x, axes=0)


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

    ones = jnp.ones(matrix.shape[0])
    return jax.lax.fori_loop(0, 12, once, (ones, ones))


def _tangent_of_group_inverse(
    matrix: Array, null: Array, inverse: Array, dots: tuple[Array | None, Any]
) -> Array | None:
    # Golub and Pereyra, https://doi.org/10.1137/0710036, for the pseudo-inverse; Meyer
    # and Stewart, https://doi.org/10.1137/0725031, for the group inverse.
    def tangent(a: Array, null: Array, s: Array, da: Array) -> Array:
        outside = jnp.eye(a.shape[0]) - _without_null(a @ s, null)
        square = s @ s
        return -s @ da @ s + square @ da @ outside + outside @ da @ square

    if dots[0] is None:
        return None
    return x64_region(tangent, matrix, null, inverse, dots[0], may_close=False)


@dataclasses.dataclass(frozen=True)
class MatrixFree:
    """Linear systems `A(point) x = b` of which only products `A(point) v` are known.

    Attributes:
      product: `A(point) v`.
      symmetric: Whether `A` is.
      solver: Solves, given an operator and a right-hand side; None for the default,
        conjugate gradients and where they fail LSMR.
    """

    product: Callable[[Any, Array], Array]
    symmetric: bool
    solver: lx.AbstractLinearSolver | None

    def solve(
        self,
        point: PyTree,
        null: Float[Array, " n"],
        b: Float[Array, " n"],
        y: Float[Array, " n"] | None = None,
    ) -> Float[Array, " n"]:
        """`A# b`, or NaN where it was not reached.

        Args:
          point: Where `A` is.
          null: As in `group_inverse`.
          b: The right-hand side.
          y: A vector that may be in the null space of a symmetric `A`.

        Returns:
          The solution, differentiable in `point` and `b`.
        """
        known = self._look(*jax.lax.stop_gradient((point, null, y)), b.size)
        return self._solve(_At(point, jax.lax.stop_gradient(known)), b)

    def _look(self, point: PyTree, null: Array, y: Array | None, n: int) -> "_Known":
        # A masked parameter has a gradient of 0 wherever it is. A row is seen to be 0
        # by its product with any vector that is orthogonal to no other row.
        mask = jnp.where(self.product(point, _random(n)) == 0, 0.0, 1.0)
        product = lambda v: mask * self.product(point, mask * v)  # noqa: E731
        if y is not None:
            length = jnp.linalg.norm(y)
            limit = RCOND * _norm_of(product, n) * length
            is_null = jnp.linalg.norm(product(y)) <= limit
            is_null &= (length > 0) & jnp.all(null == 0)
            null = jnp.where(is_null, y / jnp.where(length > 0, length, 1.0), null)
        units, is_scaled = _units(product, n)
        size = _norm_of(lambda v: units * product(units * v), n)
        return _Known(mask, null, units, is_scaled, size)

    def _multiply(self, at: "_At", v: Array) -> Array:
        """The product, without what is masked."""
        mask = at.known.mask
        return mask * self.product(at.point, mask * v)

    def _solve(self, at: "_At", b: Array) -> Array:
        return x64_region(self._apply, at, b, may_close=False, tangent=self._tangent)

    def _apply(self, at: "_At", b: Array) -> Array:
        def project(v: Array) -> Array:
            return _without_null(v, at.known.null)

        def product(v: Array) -> Array:
            return project(self._multiply(at, project(v)))

        def solve(product: Callable[[Array], Array], b: Array) -> Array:
            return project(self._solve_scaled(product, at.known, project(b)))

        return jax.lax.custom_linear_solve(product, b, solve, solve, self.symmetric)

    def _tangent(self, at: "_At", b: Array, x: Array, dots: Any) -> Array:
        """As that of `group_inverse`, without the matrix."""

        def tangent(at: "_At", b: Array, x: Array, dots: Any) -> Array:
            dat, db = dots
            rhs = jnp.zeros_like(b) if db is None else db
            if not jax.tree.leaves(dat.point):
                return self._solve(at, rhs)

            def move(v: Array) -> Array:
                leaves, treedef = jax.tree.flatten(at.point)
                moves = treedef.flatten_up_to(dat.point)
                is_moving = [m is not None for m in moves]
                moving, still = eqx.partition(leaves, is_moving)

                def multiply(moving: list[Any]) -> Array:
                    point = treedef.unflatten(eqx.combine(moving, still))
                    return self._multiply(at._replace(point=point), v)

                return jax.jvp(multiply, (moving,), (moves,))[1]

            rhs = rhs - move(x)
            if self.solver is not None and self.solver.assume_full_rank():
                return self._solve(at, rhs)
            # What is left of b is rounding, or outside of the range.
            rest = b - self._multiply(at, x)
            is_outside = jnp.linalg.norm(rest) > 1e-8 * jnp.linalg.norm(b)
            rhs = rhs + self._solve(at, move(jnp.where(is_outside, rest, 0.0)))
            null = move(self._solve(at, x))
            # (One solve does for both.)
            null_in_range = _without_null(self._multiply(at, null), at.known.null)
            return null + self._solve(at, rhs - null_in_range)

        return x64_region(tangent, at, b, x, dots, may_close=False)

    def _solve_scaled(
        self, product: Callable[[Array], Array], known: "_Known", b: Array
    ) -> Array:
        """The solution, in units in which all rows of the matrix are alike."""
        units, is_scaled = known.units, known.is_scaled
        # What is known to be null is made regular.
        null = units * known.null
        null /= jnp.where(jnp.any(null != 0), jnp.linalg.norm(null), 1.0)

        def scaled(v: Array) -> Array:
            regular = (1 - known.mask) * v + null * (null @ v)
            return units * product(units * v) + known.size * regular

        # A second system shows whether the solution is the one that is wanted. In other
        # units other solutions have the smallest norm, so there must be only one. In
        # those of the variables it must be in the range, and not out of proportion; the
        # system need not be solved as exactly, and cannot be if `x` is off by rounding.
        probe = _random(b.size)

        rtols = jnp.stack([_RTOL, jnp.where(is_scaled, _RTOL, 1e-5)])

        def solve_and_check(
            rhs: Array, rtol: Array
        ) -> tuple[Array, tuple[Array, Array]]:
            x = self._solve_once(scaled, known.size, rhs, rtol)
            return jnp.where(is_scaled, scaled(probe), x), (rhs, x)

        # (A loop of two turns, to be compiled once.)
        _, (rhs, x) = jax.lax.scan(solve_and_check, units * b, rtols)
        is_regular = _is_near(x[1], probe, 1e-3)
        lengths = jnp.linalg.norm(x, axis=1)
        is_in_range = _is_near(scaled(x[1]), rhs[1], 1e-4)
        is_in_range &= known.size * lengths[1] <= 1e11 * lengths[0]
        is_right = jnp.where(is_scaled, is_regular, is_in_range)
        return units * jnp.where(is_right, x[0], jnp.nan)

    def _solve_once(
        self, product: Callable[[Array], Array], size: Array, b: Array, rtol: Array
    ) -> Array:
        if self.solver is not None:
            own, atol = (getattr(self.solver, name, 0.0) for name in ("rtol", "atol"))
            rtol = jnp.maximum(10 * own, rtol)
            atol = 10 * b.size**0.5 * jnp.asarray(atol, float)
            x = _compute(self.solver, product, b, self.symmetric)
            return jnp.where(_is_solution(product, size, x, b, rtol, atol), x, jnp.nan)
        x, rest = jnp.zeros_like(b), b
        if self.symmetric:
            # Conjugate gradients that go on where rounding lets them get no further
            # drift off, along a null space above all. A part of the way at a time, each
            # from a residual that was computed, they never come there.
            def refine(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                x, rest = carry
                y = x + jsl.cg(product, rest, tol=1e-7, maxiter=10 * b.size)[0]
                is_better = jnp.linalg.norm(b - product(y)) < jnp.linalg.norm(rest)
                x = jnp.where(is_better, y, x)
                is_solved = _is_solution(product, size, x, b, 0.01 * rtol)
                return x, jnp.where(is_solved, 0.0, b - product(x))

            x, rest = jax.lax.fori_loop(0, 3, refine, (x, rest))
        # (Of 0 the solution is known at once. LSMR measures by an estimate of the
        # matrix's size that is up to n**0.5 times too large; its own estimate of the
        # residual goes on falling below rounding.)
        lsmr = lx.LSMR(rtol=1e-17, atol=0.0, conlim=1 / RCOND, max_steps=10 * b.size)
        x = x + _compute(lsmr, product, rest, symmetric=False)
        return jnp.where(_is_solution(product, size, x, b, rtol), x, jnp.nan)


class _Known(NamedTuple):
    """What is known of a matrix.

    Attributes:
      mask: 0 for variables that are in nothing, else 1.
      null: A unit vector in the null space, or zeros.
      units: Units for the variables, in which rows are alike.
      is_scaled: Whether they are other than 1.
      size: About the largest singular value, in these units.
    """

    mask: Float[Array, " n"]
    null: Float[Array, " n"]
    units: Float[Array, " n"]
    is_scaled: Bool[Array, ""]
    size: Float[Array, ""]


class _At(NamedTuple):
    """Where a matrix is, and what is known of it there."""

    point: PyTree
    known: _Known


def _units(product: Callable[[Array], Array], n: int) -> tuple[Array, Bool[Array, ""]]:
    """Units for the variables, and whether they are other than 1.

    By products with random vectors: Bradley, Algorithms for the equilibration of
    matrices and their application to limited-memory quasi-Newton methods (2010).
    """

    def once(i: Any, units: Array) -> Array:
        v = jax.random.normal(jax.random.key(i), (4, n), units.dtype)
        moved = jax.vmap(lambda v: units * product(units * v))(v)
        size = jnp.sqrt(jnp.mean(moved**2, axis=0))
        return units * jnp.where(size > 0, size, 1.0) ** -0.5

    units = jax.lax.fori_loop(0, 24, once, jnp.ones(n))
    is_scaled = jnp.max(units) > 1e3 * jnp.min(units)
    return jnp.where(is_scaled, units, 1.0), is_scaled


def _compute(
    solver: Any, product: Callable[[Array], Array], b: Array, symmetric: bool
) -> Array:
    """What a solver returns, which has to be looked at.

    Its status is no help. A solver may say that it has failed because the matrix is
    singular, or because rounding does not let it do better; it may also be content with
    a solution that is none (`lineax.CG` where an element of `b` is 0).
    """
    tags = lx.positive_semidefinite_tag if symmetric else frozenset()
    operator = lx.FunctionLinearOperator(product, jax.typeof(b), tags)
    return solver.compute(solver.init(operator, {}), b, {})[0]


def _is_solution(
    product: Callable[[Array], Array],
    size: Array,
    x: Array,
    b: Array,
    rtol: Any,
    atol: Any = 0.0,
) -> Bool[Array, ""]:
    """Whether a residual is small, or as small as it can be made."""
    transpose = jax.linear_transpose(product, x)
    rest = b - product(x)
    left = jnp.linalg.norm(rest)
    allowed = rtol * jnp.linalg.norm(b) + atol
    allowed = jnp.maximum(allowed, _BACKWARD * size * jnp.linalg.norm(x))
    slope = jnp.linalg.norm(transpose(rest)[0])
    return (left <= allowed) | (slope <= (rtol + _BACKWARD) * size * left)


def _norm_of(product: Callable[[Array], Array], n: int) -> Array:
    """About the largest singular value, by power iteration."""
    start = _random(n)
    transpose = jax.linear_transpose(product, start)

    def once(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        v, _ = carry
        v = v / jnp.linalg.norm(v)
        moved = product(v)
        w = transpose(moved)[0]
        return jnp.where(jnp.linalg.norm(w) > 0, w, v), jnp.linalg.norm(moved)

    return jax.lax.fori_loop(0, 8, once, (start, jnp.zeros(())))[1]


def _random(n: int) -> Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=n))


def _is_near(x: Array, y: Array, rtol: float) -> Bool[Array, ""]:
    return jnp.linalg.norm(x - y) <= rtol * jnp.linalg.norm(y)
