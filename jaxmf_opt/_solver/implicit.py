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

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from .._jax.debugging import raise_alarm
from .._jax.region import x64_region
from .convergence import gain_of_loss
from .driver import in_dtypes, nan_unless_matching, solve_in_float64
from .group_inverse import as_matrix, group_inverse, rows_of, unit
from .linear_system import MatrixFree, random_part
from .near_minimum import is_near_minimum
from .objective import Program
from .solution import Solution
from .spec import SolveSpec, Tolerances
from .state import SolverState

# Up to this many parameters A is made into a matrix and factorised; above, it is only
# multiplied. There the factorisation takes seconds, and the matrix 32 MiB.
DIRECT_SIZE = 2048


def solve_in_program(
    spec: SolveSpec,
    params: PyTree,
    captured: Sequence[Array],
    max_steps: int | Int[Array, ""],
    tolerances: Tolerances,
    linear_solver: lx.AbstractLinearSolver | None,
    callback_consts: Sequence[Array] = (),
    start: SolverState | None = None,
) -> Solution:
    """A solve as part of a larger program, of whatever precision.

    It is a float64 region, with a derivative with respect to `captured`. With respect
    to the starting point, the tolerances and the optimizer's arrays, the derivative is
    zero: a minimum does not depend on them.

    Args:
      spec: What to solve, and how.
      params: The starting point.
      captured: What the loss closes over.
      max_steps: The limit of steps.
      tolerances: When to stop before it.
      linear_solver: For the linear system of the derivative; None chooses by size.
      callback_consts: What traced callbacks close over.
      start: Where to go on, instead of at `params`.

    Returns:
      The solution, its value in the caller's dtypes.
    """

    def run(params: PyTree, captured: Any, limits: Any, start: Any) -> Solution:
        if start is not None:
            start = nan_unless_matching(spec, start, captured)
        max_steps, tolerances, callback_consts = limits
        return solve_in_float64(
            spec, params, captured, max_steps, tolerances, callback_consts, start
        )

    # What else `run` closes over, the learning rate of an optimizer for example, does
    # not move the minimum.
    limits = (max_steps, tolerances, list(callback_consts))
    rule = _TangentOfSolve(spec.program, linear_solver)
    solution = x64_region(run, params, list(captured), limits, start, tangent=rule)
    value = x64_region(functools.partial(in_dtypes, spec), solution.value)
    return eqx.tree_at(lambda s: s.value, solution, value)


@runtime_checkable
class HasGradient(Protocol):
    """A loss of which only the gradient is needed.

    Attributes:
      has_grad: Whether the gradient is the user's, so that its Jacobian need not be
        symmetric.
      reverse_only: Whether it has no forward-mode derivative.
    """

    @property
    def has_grad(self) -> bool: ...

    @property
    def reverse_only(self) -> bool: ...

    def gradient(self, y: PyTree, captured: Any, /) -> PyTree:
        """The gradient, in the structure of `y`."""
        ...


@dataclasses.dataclass(frozen=True)
class _TangentOfSolve:
    """How a solution moves with what the loss captures: its value and its loss do.

    Attributes:
      program: The loss.
      linear_solver: For the linear system; None chooses by size.
    """

    program: Program
    linear_solver: lx.AbstractLinearSolver | None

    def __call__(self, *primals_and_tangents: Any) -> Solution:
        """The tangents of all that is in a solution, None where they are zero."""
        _, captured, *_, solution, dots = primals_and_tangents
        still = jax.tree.map(lambda _: None, solution)
        moves = dots[1]
        if all(m is None for m in moves):
            return still

        state = solution.state.minimiser
        end = state.loss, state.first_loss

        def tangent(y: PyTree, captured: Any, moves: Any, end: Any) -> PyTree:
            gain = gain_of_loss(*jax.lax.stop_gradient(end))
            program, solver = self.program, self.linear_solver
            return tangent_of_minimum(program, y, captured, moves, solver, gain)

        dy = x64_region(tangent, solution.value, captured, moves, end, may_close=False)
        dloss = x64_region(self._of_loss, solution.value, captured, dy, moves)
        of = lambda s: (s.value, s.loss, s.stats["loss"])  # noqa: E731
        moved = dy, dloss, dloss.astype(solution.stats["loss"].dtype)
        return eqx.tree_at(of, still, moved, is_leaf=lambda x: x is None)

    def _of_loss(
        self, y: PyTree, captured: Any, dy: PyTree, moves: Any
    ) -> Float[Array, ""]:
        """How the loss at the minimum moves, where that moves by `dy`.

        NaN if a derivative rule of the loss closes over arrays: they may be traced, and
        by a program that has ended.
        """
        moving, of_moving, whole = _moving_part(captured, moves)

        def loss(point: Any) -> Float[Array, ""]:
            y, moving = point
            return self.program.evaluate_loss(y, whole(moving))

        point, dots = (y, moving), (dy, of_moving)
        if len(captured) > self.program.num_captured:
            slopes = jax.tree.map(lambda d: jnp.full_like(d, jnp.nan), dots)
        elif self.program.value.has_custom_vjp:
            slopes = jax.grad(loss)(point)
        else:
            return jax.jvp(loss, (point,), (dots,))[1]

        def part(slope: Array, dot: Array) -> Array:
            return jnp.real(jnp.sum(slope.astype(dot.dtype) * dot)).astype(float)

        return jnp.stack(jax.tree.leaves(jax.tree.map(part, slopes, dots))).sum()

    def look(self, solution: Solution) -> None:
        """Raises JAX's alarm where the solution is not finite."""
        state = solution.state.minimiser
        raise_alarm((solution.value, state.loss, state.last_finite.grad_norm))


def tangent_of_minimum(
    program: "HasGradient",
    y: PyTree,
    captured: Sequence[Array],
    moves: Sequence[Array | None],
    linear_solver: lx.AbstractLinearSolver | None = None,
    gain: Float[Array, ""] | None = None,
) -> PyTree:
    """How the minimum moves when what the loss captures moves.

    Args:
      program: The loss.
      y: Its minimum.
      captured: What it closes over.
      moves: The tangents of `captured`; None for those that have none.
      linear_solver: For the linear system; None chooses by size.
      gain: By how much the loss has fallen on the way to `y`. A step that promises next
        to nothing of that may be rounding. None: a loss of about 1 is all rounding.

    Returns:
      The tangent of `y`, in which the result is linear.
    """
    flat, unravel = ravel_pytree(y)
    # Of leaves of several dtypes the Hessian is as exact as the coarsest.
    dtypes = [x.dtype for x in jax.tree.leaves(y)]
    coarsest = max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps))

    def gradient(flat: Float[Array, " n"], captured: Any) -> Float[Array, " n"]:
        return ravel_pytree(program.gradient(unravel(flat), captured))[0]

    linearize = _linearize_in_reverse if program.reverse_only else _linearize

    def mixed(point: Any, moves: Sequence[Array | None]) -> Float[Array, " n"]:
        x, captured = point
        moving, dots, whole = _moving_part(captured, moves)
        return linearize(lambda moving: gradient(x, whole(moving)), moving)(dots)

    def mixed_at_random(point: Any) -> Float[Array, " n"]:
        both = zip(point[1], moves, strict=True)
        parts = [None if m is None else random_part(x) for x, m in both]
        return mixed(point, parts)

    point = (flat, list(captured))
    rhs = mixed(point, moves)
    if not flat.size:
        return unravel(rhs)

    @jax.jit  # to be traced once
    def product(point: Any, v: Float[Array, " n"]) -> Float[Array, " n"]:
        x, captured = point
        return linearize(lambda x: gradient(x, captured), x)(v)

    # A Hessian is symmetric, the Jacobian of a user's gradient need not be.
    symmetric = not program.has_grad
    system: Any
    solve: Callable[[Any, Array], Array]
    null, minimum = jnp.zeros_like(flat), None
    slope = jax.lax.stop_gradient(gradient(flat, captured))
    if symmetric:
        minimum = (flat, slope)
        of_y = (*minimum, product(point, flat))
        null = _null_vector(*jax.lax.stop_gradient(of_y))
    if linear_solver is None and flat.size <= DIRECT_SIZE:
        derivative = linearize(lambda x: gradient(x, captured), flat)
        matrix = as_matrix(derivative, flat.size, flat.dtype).astype(coarsest)
        if minimum is not None and coarsest != jnp.float64:
            of_matrix = (matrix.astype(flat.dtype), *minimum)
            far = gradient(1e3 * flat, captured)
            known = _null_of_matrix(*jax.lax.stop_gradient((*of_matrix, far)))
            null = jnp.where(jnp.any(null != 0), null, known)
        inverse = group_inverse(matrix, null, symmetric).astype(flat.dtype)
        system, solve = inverse, jnp.matmul
        rows = rows_of(jax.lax.stop_gradient(matrix))
    elif coarsest != flat.dtype:  # which products do not tell apart
        return unravel(jnp.nan * rhs)
    else:
        matrix_free = MatrixFree(product, symmetric, linear_solver, flat.dtype)
        system, solve = matrix_free.look(point, null, minimum), matrix_free.solve
        rows = (system.known.mask == 0, system.known.units)
    at_point = jax.lax.stop_gradient((point, system))
    eps = float(jnp.finfo(coarsest).eps)
    is_near = is_near_minimum(
        *(gradient, product, mixed_at_random, solve, *at_point, slope, *rows),
        symmetric=symmetric,
        rounding=eps ** (1 / 3),
        gain=jnp.asarray(eps) if gain is None else gain,
    )
    dy = -jnp.where(is_near, 1.0, jnp.nan) * solve(system, rhs)
    # JAX knows that the slopes of a kink do not change, and drops what is times that.
    every = sum(jnp.sum(jnp.real(m)).astype(dy.dtype) for m in moves if m is not None)
    return unravel(dy + jnp.where(is_near, 0.0, jnp.nan) * every)


def _null_vector(
    y: Float[Array, " n"], gradient: Float[Array, " n"], along: Float[Array, " n"]
) -> Float[Array, " n"]:
    """The direction of `y`, if the loss does not depend on the scale of `y`; or zeros.

    Such a loss has `G y = 0` and, differentiated once more, `dG/dy y = -G` at every
    `y`. At an inexact minimum dG/dy is regular, if only just, and its inverse is all
    wrong along `y`. At an exact one both sides are 0, which says nothing, but then
    dG/dy is singular as far as can be seen. (All is multiplied by `y`, to be the same
    in all units of its elements.)

    Args:
      y: The point.
      gradient: The gradient `G` there.
      along: dG/dy times `y`.

    Returns:
      A unit vector, or zeros.
    """
    rest, slopes = jnp.abs(y * (along + gradient)), y * gradient
    size = jnp.abs(slopes)
    is_free = (jnp.max(rest) <= 1e-3 * jnp.max(size)) & (jnp.max(size) > 0)
    is_free &= jnp.abs(jnp.sum(slopes)) <= 1e-3 * jnp.sum(size)
    return jnp.where(is_free, unit(y), 0.0)


def _null_of_matrix(
    matrix: Float[Array, "n n"],
    y: Float[Array, " n"],
    gradient: Float[Array, " n"],
    far: Float[Array, " n"],
) -> Float[Array, " n"]:
    """The same of a whole matrix, for float32, in which a gradient is mostly rounding.

    The bound is one for each element, so that it holds in all units. Along `y` the loss
    may also be curved a little, less than rounding shows here. Then it has a gradient a
    thousand times as far out, `far`, where one that does not depend on the scale of `y`
    has next to none.
    """
    most = 1e-5 * jnp.abs(matrix) @ jnp.abs(y)
    is_free = (jnp.abs(matrix @ y + gradient) <= most) & (jnp.abs(far) <= most)
    return jnp.where(jnp.all(is_free), unit(y), 0.0)


def _moving_part(
    captured: Sequence[Array], moves: Sequence[Array | None]
) -> tuple[PyTree, PyTree, Callable[[PyTree], list[Array]]]:
    """What moves of the captured values, its tangents, and how to put it back."""
    is_moving = [m is not None for m in moves]
    moving, still = eqx.partition(list(captured), is_moving)
    # (A program of another precision may hand over tangents of another type.)
    dots = jax.tree.map(lambda x, m: m.astype(x.dtype), moving, list(moves))
    return moving, dots, lambda moving: eqx.combine(moving, still)


def _linearize(fn: Callable[[PyTree], Array], x: PyTree) -> Callable[[PyTree], Array]:
    return lambda dx: jax.jvp(fn, (x,), (dx,))[1]


def _linearize_in_reverse(
    fn: Callable[[PyTree], Array], x: PyTree
) -> Callable[[PyTree], Array]:
    """The same for functions that have no forward mode: the transpose of their vjp."""
    out, pull_back = jax.vjp(fn, x)
    push_forward = jax.linear_transpose(pull_back, out)
    return lambda dx: push_forward((dx,))[0]
