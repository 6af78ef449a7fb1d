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
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jax.dtypes import float0
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from ._objective import Program
from ._run import Recipe, Tolerances
from ._x64 import x64_region

# Up to this many parameters dG/dy is made into a matrix; above, it is only multiplied.
DIRECT_SIZE = 256

# Singular values below this part of the largest one count as 0. A minimum is known to
# about the square root of the rounding error, and the singular direction of a
# scale-invariant loss, which is exactly singular at the minimum, about the square of
# that.
RCOND = 1e-12


def solve_in_program(
    recipe: Recipe,
    params: PyTree,
    captured: Sequence[Array],
    max_steps: int | Int[Array, ""],
    tolerances: Tolerances,
    linear_solver: lx.AbstractLinearSolver | None,
) -> optx.Solution:
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

    Returns:
      The solution, its value in the dtypes of the recipe.
    """
    # Tracers that an optimizer closes over (a learning rate) must be seen as operands.
    optimizer = eqxi.closure_to_pytree(recipe.optimizer)
    arrays, rest = eqx.partition(optimizer, eqx.is_array)

    def run(params: PyTree, captured: Any, arrays: PyTree, *limits: Any) -> Any:
        whole = recipe
        if jax.tree.leaves(arrays):
            whole = recipe.with_optimizer(eqx.combine(arrays, rest))
        return whole.solve_in_float64(params, captured, *limits)

    # No tangent enters the solve itself. They come in again with its result.
    operands = (params, captured, arrays, max_steps, tolerances)
    solution = x64_region(run, *jax.lax.stop_gradient(operands), may_close=False)

    @jax.custom_jvp
    def minimum(y: PyTree, captured: Sequence[Any]) -> PyTree:
        """`y`, as something that depends on `captured`."""
        del captured
        return y

    @minimum.defjvp
    def _(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
        y = minimum(*primals)
        moves = [None if t.dtype == float0 else t for t in tangents[1]]

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

    def gradient(flat: Float[Array, " n"], moving: Any) -> Float[Array, " n"]:
        full = eqx.combine(moving, still)
        return ravel_pytree(program.gradient(unravel(flat), full))[0]

    is_moving = [m is not None for m in moves]
    moving, still = eqx.partition(list(captured), is_moving)
    of_captured = lambda moving: gradient(flat, moving)  # noqa: E731
    linearize = _linearize_in_reverse if program.reverse_only else _linearize
    rhs = linearize(of_captured, moving)(list(moves))

    def of_point(x: Float[Array, " n"]) -> Float[Array, " n"]:
        return gradient(x, moving)

    # A Hessian is symmetric, the Jacobian of a user's gradient need not be.
    symmetric = not program.has_grad
    if linear_solver is None and flat.size <= DIRECT_SIZE:
        jacobian = jax.jacrev if program.reverse_only else jax.jacfwd
        matrix = jacobian(of_point)(flat)
        inverse = jnp.linalg.pinv(matrix, rtol=RCOND, hermitian=symmetric)
        return unravel(-inverse @ rhs)
    if linear_solver is None:
        linear_solver = (lx.CG if symmetric else lx.LSMR)(rtol=1e-10, atol=1e-300)
    tags = lx.positive_semidefinite_tag if symmetric else frozenset()
    product = linearize(of_point, flat)
    operator = lx.FunctionLinearOperator(product, jax.typeof(flat), tags)
    return unravel(lx.linear_solve(operator, -rhs, linear_solver, throw=False).value)


def _linearize(fn: Callable[[PyTree], Array], x: PyTree) -> Callable[[PyTree], Array]:
    return lambda dx: jax.jvp(fn, (x,), (dx,))[1]


def _linearize_in_reverse(
    fn: Callable[[PyTree], Array], x: PyTree
) -> Callable[[PyTree], Array]:
    """The same for functions that have no forward mode: the transpose of their vjp."""
    out, pull_back = jax.vjp(fn, x)
    push_forward = jax.linear_transpose(pull_back, out)
    return lambda dx: push_forward((dx,))[0]
