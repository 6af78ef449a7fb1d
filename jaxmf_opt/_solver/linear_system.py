"""Linear systems of which only products are known, whose solution is right, or NaN.

The solution that is wanted is that by the group inverse, see `group_inverse.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg as jsl
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .._jax.region import x64_region
from .group_inverse import RCOND, unit, without_null


class _Accuracy(NamedTuple):
    """What rounding in products allows.

    Attributes:
      rtol: How well an iterative solver has to solve: the residual over the right-hand
        side ...
      backward: ... or over the size of the matrix times that of the solution.
      rcond: A product below this part of the matrix's size is 0.
    """

    rtol: float
    backward: float
    rcond: float


_FLOAT64 = _Accuracy(1e-12, 4e-15, RCOND)
_FLOAT32 = _Accuracy(1e-5, 2e-6, 1e-5)


@dataclasses.dataclass(frozen=True)
class MatrixFree:
    """Linear systems `A(point) x = b` of which only products `A(point) v` are known.

    Attributes:
      product: `A(point) v`.
      symmetric: Whether `A` is.
      solver: Solves, given an operator and a right-hand side; None for the default,
        conjugate gradients and where they fail LSMR.
      dtype: That of the products. If it is not float64, `A` has to be regular, but for
        what is known to be null, since more cannot be seen of it.
    """

    product: Callable[[Any, Array], Array]
    symmetric: bool
    solver: lx.AbstractLinearSolver | None
    dtype: Any = jnp.float64

    @property
    def _accuracy(self) -> _Accuracy:
        return _FLOAT64 if self.dtype == jnp.float64 else _FLOAT32

    def solve(self, system: "System", b: Float[Array, " n"]) -> Float[Array, " n"]:
        """`A# b`, or NaN where it was not reached; differentiable in both."""
        rule = _Rule(self)
        return x64_region(self._apply, system, b, may_close=False, tangent=rule)

    def look(
        self,
        point: PyTree,
        null: Float[Array, " n"],
        minimum: tuple[Float[Array, " n"], Float[Array, " n"]] | None = None,
    ) -> "System":
        """The system at a point.

        Args:
          point: Where `A` is.
          null: As in `group_inverse`.
          minimum: The minimum at which `A` is the Hessian, and the gradient there, of
            a loss that may not depend on its scale.

        Returns:
          It, with what products tell of `A`.
        """
        known = self._look(*jax.lax.stop_gradient((point, null, minimum)))
        return System(point, jax.lax.stop_gradient(known))

    def _look(
        self, point: PyTree, null: Array, minimum: tuple[Array, Array] | None
    ) -> "_Known":
        n = null.size
        # A masked parameter has a gradient of 0 wherever it is. A row is seen to be 0
        # by its product with any vector that is orthogonal to no other row.
        probe = random_vectors(1, n, self.dtype)[0]
        mask = jnp.where(self.product(point, probe) == 0, 0.0, 1.0).astype(self.dtype)
        product = lambda v: mask * self.product(point, mask * v)  # noqa: E731
        null = unit(mask * null)
        units, is_scaled = _units(product, n, self.dtype)
        scaled = lambda v: units * product(units * v)  # noqa: E731
        size = _norm_of(scaled, n, self.dtype)
        if minimum is not None:
            # (Of such a loss this is 0 at every `y`.)
            y, gradient = minimum
            moved = scaled(y / units) + units * mask * gradient
            limit = self._accuracy.rcond * size * jnp.linalg.norm(y / units)
            is_null = jnp.linalg.norm(moved) <= limit
            null = jnp.where(is_null & jnp.all(null == 0), unit(mask * y), null)
        return _Known(mask, null, units, is_scaled, size)

    def _multiply(self, at: "System", v: Array) -> Array:
        """The product, without what is masked."""
        mask = at.known.mask
        moved = self.product(at.point, (mask * v).astype(self.dtype))
        return mask * moved.astype(v.dtype)

    @property
    def transposed(self) -> "MatrixFree":
        """The same of the transposed matrices."""
        if self.symmetric:
            return self

        def product(point: Any, v: Array) -> Array:
            transpose = jax.linear_transpose(lambda v: self.product(point, v), v)
            return transpose(v)[0]

        return dataclasses.replace(self, product=product)

    def _apply(self, at: "System", b: Array) -> Array:
        floats = lambda x: x.astype(float) if eqx.is_inexact_array(x) else x  # noqa: E731
        at = at._replace(known=jax.tree.map(floats, at.known))

        def project(v: Array) -> Array:
            return without_null(v, at.known.null)

        def product(v: Array) -> Array:
            return project(self._multiply(at, project(v)))

        x = self._solve_scaled(product, at.known, project(b.astype(float)))
        return project(x).astype(b.dtype)

    def tangent(self, at: "System", b: Array, x: Array, dots: Any) -> Array:
        """How the solution moves: as that of `group_inverse`, without the matrix."""

        def tangent(at: "System", b: Array, x: Array, dots: Any) -> Array:
            dat, db = dots
            rhs = jnp.zeros_like(b) if db is None else db
            if not jax.tree.leaves(dat.point):
                return self.solve(at, rhs)

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
            # What is left of b is rounding, or outside of the range.
            rest = b - self._multiply(at, x)
            is_outside = jnp.linalg.norm(rest) > 1e-8 * jnp.linalg.norm(b)
            rhs = rhs + self.solve(at, move(jnp.where(is_outside, rest, 0.0)))
            null = move(self.solve(at, x))
            # (One solve does for both.)
            null_in_range = without_null(self._multiply(at, null), at.known.null)
            return null + self.solve(at, rhs - null_in_range)

        return x64_region(tangent, at, b, x, dots, may_close=False)

    def _solve_scaled(
        self, product: Callable[[Array], Array], known: "_Known", b: Array
    ) -> Array:
        """The solution, in units in which all rows of the matrix are alike."""
        units, is_scaled = known.units, known.is_scaled
        # What is known to be null is made regular.
        null = unit(units * known.null)

        def scaled(v: Array) -> Array:
            regular = (1 - known.mask) * v + null * (null @ v)
            return units * product(units * v) + known.size * regular

        # A second system shows whether the solution is the one that is wanted. In other
        # units other solutions have the smallest norm, so there must be only one. In
        # those of the variables it must be in the range, and not out of proportion; the
        # system need not be solved as exactly, and cannot be if `x` is off by rounding.
        probe = random_vectors(1, b.size)[0]
        if self.dtype != jnp.float64:
            is_scaled = jnp.array(True)
        rtol = self._accuracy.rtol
        rtols = jnp.stack([rtol, jnp.where(is_scaled, rtol, 1e-5)])

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
            is_solved = self._is_solved(product, size, x, b - product(x), b, rtol, atol)
            return jnp.where(is_solved, x, jnp.nan)

        def solve(
            solver: Callable[[Array], Array],
            turns: int,
            rtol: Array,
            at: _Approximation,
        ) -> _Approximation:
            """Adds solutions for what is left, until that is small: then it is 0."""

            def once(_: Any, at: _Approximation) -> _Approximation:
                move = solver(at.rest)
                rest = at.rest - product(move)
                is_no_worse = jnp.linalg.norm(rest) <= 1.01 * jnp.linalg.norm(at.rest)
                x = jnp.where(is_no_worse, at.x + move, at.x)
                rest = jnp.where(is_no_worse, rest, at.rest)
                is_solved = self._is_solved(product, size, x, rest, b, rtol)
                return _Approximation(x, jnp.where(is_solved, 0.0, rest))

            return jax.lax.fori_loop(0, turns, once, at)

        at = _Approximation(jnp.zeros_like(b), b)
        if self.symmetric:
            # Conjugate gradients that go on where rounding lets them get no further
            # drift off, along a null space above all. A part of the way at a time they
            # never come there.
            tol = max(1e-7, 0.01 * self._accuracy.rtol)
            cg = lambda b: jsl.cg(product, b, tol=tol, maxiter=10 * b.size)[0]  # noqa: E731
            at = solve(cg, 3, 0.01 * rtol, at)
        # (Of 0 the solution is known at once. LSMR measures by an estimate of the
        # matrix's size that is up to n**0.5 times too large; its own estimate of the
        # residual goes on falling below rounding. The second time it shows that what is
        # left is outside of the range.)
        lsmr = lx.LSMR(rtol=1e-17, atol=0.0, conlim=1 / RCOND, max_steps=10 * b.size)
        at = solve(lambda b: _compute(lsmr, product, b, symmetric=False), 2, rtol, at)
        return jnp.where(jnp.all(at.rest == 0), at.x, jnp.nan)

    def _is_solved(
        self,
        product: Callable[[Array], Array],
        size: Array,
        x: Array,
        rest: Array,
        b: Array,
        rtol: Any,
        atol: Any = 0.0,
    ) -> Bool[Array, ""]:
        """Whether a residual is small, or rounding, or outside of the range."""
        left = jnp.linalg.norm(rest)
        allowed = rtol * jnp.linalg.norm(b) + atol
        backward = self._accuracy.backward
        allowed = jnp.maximum(allowed, backward * size * jnp.linalg.norm(x))
        slope = jnp.linalg.norm(jax.linear_transpose(product, x)(rest)[0])
        return (left <= allowed) | (slope <= (rtol + backward) * size * left)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The derivative and the transpose of the solution of a linear system."""

    of: MatrixFree

    def __call__(self, at: "System", b: Array, x: Array, dots: Any) -> Array:
        return self.of.tangent(at, b, x, dots)

    def transpose(self, at: "System", _: None, x: Array) -> Array:
        """What is the cotangent of the right-hand side, if `x` is of the solution."""
        return self.of.transposed.solve(at, x)


class _Approximation(NamedTuple):
    """An approximate solution, and what it leaves of the right-hand side."""

    x: Float[Array, " n"]
    rest: Float[Array, " n"]


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


class System(NamedTuple):
    """Where a matrix is, and what is known of it there."""

    point: PyTree
    known: _Known


def _units(
    product: Callable[[Array], Array], n: int, dtype: Any
) -> tuple[Array, Bool[Array, ""]]:
    """Units for the variables, and whether they are other than 1.

    By products with random vectors: Bradley, Algorithms for the equilibration of
    matrices and their application to limited-memory quasi-Newton methods (2010).
    """

    def once(i: Any, units: Array) -> Array:
        v = jax.random.normal(jax.random.key(i), (4, n), units.dtype)
        moved = jax.vmap(lambda v: units * product(units * v))(v)
        size = jnp.sqrt(jnp.mean(moved**2, axis=0))
        return units * jnp.where(size > 0, size, 1.0) ** -0.5

    units = jax.lax.fori_loop(0, 24, once, jnp.ones(n, dtype))
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


def _norm_of(product: Callable[[Array], Array], n: int, dtype: Any) -> Array:
    """About the largest singular value, by power iteration."""
    start = random_vectors(1, n, dtype)[0]
    transpose = jax.linear_transpose(product, start)

    def once(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        v, _ = carry
        v = v / jnp.linalg.norm(v)
        moved = product(v)
        w = transpose(moved)[0]
        return jnp.where(jnp.linalg.norm(w) > 0, w, v), jnp.linalg.norm(moved)

    return jax.lax.fori_loop(0, 8, once, (start, jnp.zeros((), dtype)))[1]


def random_vectors(number: int, n: int, dtype: Any = float) -> Float[Array, "_ n"]:
    """Vectors of normal numbers, the same ones each time."""
    return jnp.asarray(np.random.default_rng(0).normal(size=(number, n)), dtype)


def random_part(x: Array) -> Array:
    """Each element times a random number, the same ones each time; 1 for 0 and inf.

    They have a mean, so that what depends on a sum of the elements shows, and differ
    the more, the more there are, so that a mean of what is random does as well.
    """
    index = jnp.arange(x.size, dtype=float).reshape(x.shape)
    noise = jnp.sin(index * 12.9898 + 78.233) * 43758.5453
    noise = noise - jnp.floor(noise) - 0.5
    number = 1 + noise * jnp.sqrt(jnp.sum(jnp.ones_like(index)))
    part = x * number.astype(jnp.real(x).dtype)
    # (A bound may be as large as there are numbers.)
    return jnp.where(jnp.isfinite(part) & (x != 0), part, 1)


def _is_near(x: Array, y: Array, rtol: float) -> Bool[Array, ""]:
    return jnp.linalg.norm(x - y) <= rtol * jnp.linalg.norm(y)
