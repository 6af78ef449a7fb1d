"""The derivative of the minimum, by the implicit function theorem.

At a minimum `y*` of a loss `L(y, c)` the gradient `G = dL/dy` is zero, whatever the
captured values `c` are. Differentiating `G(y*(c), c) = 0` gives one linear system,

    (dG/dy) dy = -(dG/dc) dc,

and with it every derivative of the minimum: no iteration is differentiated, and the
solve runs once. See Blondel et al., Efficient and Modular Implicit Differentiation,
https://arxiv.org/abs/2105.15183.

DP-MF losses do not depend on the scale of their parameters, so `dG/dy` is singular
along them. Of all solutions the one of smallest norm is taken: it is right for every
function of the minimum that does not depend on the scale either.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.core import Tracer
from jax.dtypes import float0
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from ._objective import Program
from ._run import Recipe, Tolerances
from ._solution import Solution
from ._state import SolverState
from ._x64 import x64_region

# Up to this many parameters dG/dy is made into a matrix; above, it is only multiplied.
DIRECT_SIZE = 256

# Singular values below this part of the largest one count as 0. A minimum is known to
# about the square root of the rounding error, and the singular direction of a
# scale-invariant loss, which is exactly singular at the minimum, about the square of
# that.
RCOND = 1e-12

# Minimises the norm of the solution and that of the residual, whatever the matrix and
# the right-hand side. (Conjugate gradients diverge on the singular Hessian of a
# scale-invariant loss.) Fong and Saunders, LSMR, https://arxiv.org/abs/1006.0758
MATRIX_FREE = lx.LSMR(rtol=1e-14, atol=0.0, conlim=1 / RCOND)


def solve_in_program(
    recipe: Recipe,
    params: PyTree,
    captured: Sequence[Array],
    max_steps: int | Int[Array, ""],
    tolerances: Tolerances,
    linear_solver: lx.AbstractLinearSolver | None,
    watched: Sequence[Array] = (),
    start: SolverState | None = None,
) -> Solution:
    """A solve as part of a larger program, of whatever precision.

    It is a float64 region, with a derivative with respect to `captured`. With respect
    to the starting point, the tolerances and the optimizer's arrays, the derivative is
    zero: a minimum does not depend on them.

    Args:
      recipe: What to solve, and how.
      params: The starting point.
      captured: What the loss closes over.
      max_steps: The limit of steps.
      tolerances: When to stop before it.
      linear_solver: For the linear system of the derivative; None chooses by size.
      watched: What traced callbacks close over.
      start: Where to go on, instead of at `params`.

    Returns:
      The solution, its value in the dtypes of the recipe.
    """
    # Tracers that an optimizer closes over (a learning rate) must be seen as operands.
    optimizer = eqxi.closure_to_pytree(recipe.optimizer)
    arrays, rest = eqx.partition(optimizer, eqx.is_array)

    def run(
        params: PyTree, captured: Any, arrays: PyTree, limits: Any, start: Any
    ) -> Solution:
        whole = recipe
        if jax.tree.leaves(arrays):
            whole = recipe.with_optimizer(eqx.combine(arrays, rest))
        if start is not None:
            start = whole.of_this_problem(start, captured)
        max_steps, tolerances, watched = limits
        return whole.solve_in_float64(
            params, captured, max_steps, tolerances, watched, start
        )

    # No tangent enters the solve itself. They come in again with its result. (What is
    # no tracer has none, and NumPy's float64 would be rounded here.)
    def without_tangent(x: Any) -> Any:
        return jax.lax.stop_gradient(x) if isinstance(x, Tracer) else x

    limits = (max_steps, tolerances, list(watched))
    operands = (params, captured, arrays, limits, start)
    operands = jax.tree.map(without_tangent, operands)
    solution = x64_region(run, *operands, may_close=False)

    @jax.custom_jvp
    def minimum(y: PyTree, captured: Sequence[Any]) -> PyTree:
        """`y`, as something that depends on `captured`."""
        del captured
        return y

    @minimum.defjvp
    def _(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
        y = minimum(*primals)
        still = [getattr(t, "dtype", None) == float0 for t in tangents[1]]
        moves = [None if s else t for s, t in zip(still, tangents[1], strict=True)]

        def tangent(y: PyTree, captured: Any, moves: Any) -> PyTree:
            return tangent_of_minimum(recipe.program, y, captured, moves, linear_solver)

        return y, x64_region(tangent, y, primals[1], moves, may_close=False)

    y = minimum(solution.value, list(captured))
    value = x64_region(recipe.in_dtypes, y)
    return eqx.tree_at(lambda s: s.value, solution, value)


def tangent_of_minimum(
    program: Program,
    y: PyTree,
    captured: Sequence[Array],
    moves: Sequence[Array | None],
    linear_solver: lx.AbstractLinearSolver | None = None,
) -> PyTree:
    """How the minimum moves when what the loss captures moves.

    Args:
      program: The loss.
      y: Its minimum, float64 leaves.
      captured: What it closes over.
      moves: The tangents of `captured`; None for those that have none.
      linear_solver: For the linear system; None chooses by size.

    Returns:
      The tangent of `y`, in which the result is linear.
    """
    flat, unravel = ravel_pytree(y)

    def gradient(flat: Float[Array, " n"], captured: Any) -> Float[Array, " n"]:
        return ravel_pytree(program.gradient(unravel(flat), captured))[0]

    is_moving = [m is not None for m in moves]
    moving, still = eqx.partition(list(captured), is_moving)
    of_moving = lambda moving: gradient(flat, eqx.combine(moving, still))  # noqa: E731
    linearize = _linearize_in_reverse if program.reverse_only else _linearize
    rhs = linearize(of_moving, moving)(list(moves))

    # A Hessian is symmetric, the Jacobian of a user's gradient need not be.
    symmetric = not program.has_grad
    if linear_solver is None and flat.size <= DIRECT_SIZE:
        jacobian = jax.jacrev if program.reverse_only else jax.jacfwd
        matrix = jacobian(lambda x: gradient(x, captured))(flat)
        return unravel(-_solve_direct(matrix, rhs, symmetric))

    def product(point: Any, v: Float[Array, " n"]) -> Float[Array, " n"]:
        x, captured = point
        return linearize(lambda x: gradient(x, captured), x)(v)

    system = _System(product, symmetric, linear_solver or MATRIX_FREE)
    return unravel(-system.solve((flat, list(captured)), rhs))


def _solve_direct(
    matrix: Float[Array, "n n"], rhs: Float[Array, " n"], symmetric: bool
) -> Float[Array, " n"]:
    """The solution of smallest norm, among those that the iteration can move to.

    Steps are combinations of gradients, so they stay in the range of dG/dy. That of a
    symmetric matrix holds the solution of smallest norm anyway. Otherwise (a gradient
    that is masked, or projected) the solution is the one of the group inverse: see
    Meyer, The role of the group generalized inverse in the theory of finite Markov
    chains, https://doi.org/10.1137/1017044.
    """
    # Without the barrier XLA's CPU backend fuses an FFT's transposed output into the
    # factorisation, and then fails on its layout.
    matrix = jax.lax.optimization_barrier(matrix)
    inverse = jnp.linalg.pinv(matrix, rtol=RCOND, hermitian=symmetric)
    if not symmetric:
        onto_range = matrix @ inverse
        inverse = jnp.linalg.pinv(matrix @ onto_range, rtol=RCOND)
    return inverse @ rhs


class _System(NamedTuple):
    """Linear systems `A(point) x = b`, by an iterative solver of lineax.

    `lineax.linear_solve` would do, but its transpose reports failures through the host,
    and a compiled program must not have to wait for the host. So the solver is called
    here, and the rule for the derivative of a pseudo-inverse stands below.

    Attributes:
      product: `A(point) v`.
      symmetric: Whether `A` is.
      solver: Solves, given an operator and a right-hand side.
    """

    product: Callable[[Any, Array], Array]
    symmetric: bool
    solver: lx.AbstractLinearSolver

    def solve(self, point: PyTree, b: Float[Array, " n"]) -> Float[Array, " n"]:
        """The solution of smallest norm, differentiable in `point` and `b`."""
        if self.symmetric:
            return self._solve(point, b)
        # A masked parameter has a gradient of 0 wherever it is. A row is seen to be 0
        # by its product with any vector that is orthogonal to no other row.
        probe = np.random.default_rng(0).normal(size=b.shape)
        row = jax.lax.stop_gradient(self.product(point, jnp.asarray(probe)))
        mask = jnp.where(row == 0, 0.0, 1.0)
        masked = lambda p, v: self.product(p[0], p[1] * v)  # noqa: E731
        return self._replace(product=masked)._solve((point, mask), b)

    def _solve(self, point: PyTree, b: Float[Array, " n"]) -> Float[Array, " n"]:
        @jax.custom_jvp
        def solution(point: PyTree, b: Array) -> Array:
            return jax.lax.custom_linear_solve(
                lambda v: self.product(point, v),
                b,
                self._apply_solver,
                self._apply_solver,
                self.symmetric,
            )

        # With + for the pseudo-inverse, ' for the derivative and A x = b,
        #   x' = A+ (b' - A' x) + (1 - A+ A) A'^T A+^T x.
        # Golub and Pereyra, https://doi.org/10.1137/0710036
        @solution.defjvp
        def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
            (point, b), (dpoint, db) = primals, tangents
            x = solution(point, b)
            rhs = db - jax.jvp(lambda p: self.product(p, x), (point,), (dpoint,))[1]
            if self.solver.assume_full_rank():
                return x, solution(point, rhs)
            other = self if self.symmetric else self._transposed()
            w = other._solve(point, x)
            null = jax.jvp(lambda p: other.product(p, w), (point,), (dpoint,))[1]
            return x, null + solution(point, rhs - self.product(point, null))

        return solution(point, b)

    def _transposed(self) -> "_System":
        def product(point: PyTree, v: Array) -> Array:
            transpose = jax.linear_transpose(lambda u: self.product(point, u), v)
            return transpose(v)[0]

        return self._replace(product=product)

    def _apply_solver(self, product: Callable[[Array], Array], b: Array) -> Array:
        tags = lx.positive_semidefinite_tag if self.symmetric else frozenset()
        operator = lx.FunctionLinearOperator(product, jax.typeof(b), tags)
        return self.solver.compute(self.solver.init(operator, {}), b, {})[0]


def _linearize(fn: Callable[[PyTree], Array], x: PyTree) -> Callable[[PyTree], Array]:
    return lambda dx: jax.jvp(fn, (x,), (dx,))[1]


def _linearize_in_reverse(
    fn: Callable[[PyTree], Array], x: PyTree
) -> Callable[[PyTree], Array]:
    """The same for functions that have no forward mode: the transpose of their vjp."""
    out, pull_back = jax.vjp(fn, x)
    push_forward = jax.linear_transpose(pull_back, out)
    return lambda dx: push_forward((dx,))[0]
