"""The derivative of the minimum, for any minimiser of optimistix."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import lineax as lx
import optimistix as optx
from jaxtyping import Array, PyTree

from .._jax.compat import lax_while_loop, nondifferentiable
from .implicit import tangent_of_minimum

# The functions of optimistix whose optimality condition is a gradient, by module.
_MINIMISERS = ("optimistix._minimise", "optimistix._least_squares")


class MinimumNormAdjoint(optx.AbstractAdjoint):
    """The implicit derivative of a minimum: of smallest norm, and right or NaN.

    For `optimistix.minimise` and `optimistix.least_squares`, with any solver. It is the
    derivative that `optimize` has. Unlike `optimistix.ImplicitAdjoint` it looks at the
    linear system that it solves: it scales the variables, takes the solution of
    smallest norm where the loss does not depend on the scale of its parameters or not
    on some of them at all, and is NaN where the system was not solved, or where one
    more step, of Newton's method, would change solutions of it by more than 3%, or
    would not lead to a smaller gradient.

    It computes in the precision of the program around it. In a float32 program (or with
    lower precision) a Hessian with a condition of more than about 1e4 cannot be told
    from a singular one, and the derivative is NaN.

    Attributes:
      linear_solver: A solver of lineax for the linear system. By default a
        factorisation up to 2,048 parameters, and above them conjugate gradients and
        LSMR, without a matrix.

    Raises:
      ValueError: In `optimistix.root_find` and `optimistix.fixed_point`, whose linear
        systems are of another kind.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optimistix
      >>> def minimum(center):
      ...     solver = optimistix.BFGS(rtol=1e-4, atol=1e-4)
      ...     loss = lambda y, center: jnp.sum((y - center) ** 2)
      ...     return optimistix.minimise(
      ...         loss, solver, jnp.zeros(2), center, adjoint=MinimumNormAdjoint()
      ...     ).value
      >>> jax.grad(lambda center: minimum(center).sum())(jnp.array([1.0, 2.0]))
      Array([1., 1.], dtype=float32)
    """

    linear_solver: lx.AbstractLinearSolver | None = None

    def apply(
        self,
        primal_fn: Callable[..., Any],
        rewrite_fn: Callable[..., Any],
        inputs: PyTree,
        tags: frozenset[object],
    ) -> PyTree[Array]:
        """Runs a minimiser; optimistix calls it."""
        del tags  # a Hessian is symmetric, and what else is known of it is not asked
        if rewrite_fn.__module__ not in _MINIMISERS:
            raise ValueError(
                "MinimumNormAdjoint is for `optimistix.minimise` and "
                f"`optimistix.least_squares`, got a call from {rewrite_fn.__module__}; "
                "take `optimistix.ImplicitAdjoint` there."
            )
        inputs = (*inputs, lax_while_loop)
        root, rest = _solve(primal_fn, rewrite_fn, inputs, self.linear_solver)
        return root, jax.lax.stop_gradient(rest)


@eqx.filter_custom_jvp
def _solve(
    primal_fn: Callable[..., Any],
    rewrite_fn: Callable[..., Any],
    inputs: PyTree,
    linear_solver: lx.AbstractLinearSolver | None,
) -> PyTree[Array]:
    del rewrite_fn, linear_solver
    # Where JAX forgets the rule below, as it does in the second derivative of a loop,
    # the iterates must not be differentiated in its place.
    return primal_fn(nondifferentiable(inputs))


@_solve.def_jvp
def _tangent(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    primal_fn, rewrite_fn, inputs, linear_solver = primals
    root, rest = _solve(primal_fn, rewrite_fn, inputs, linear_solver)
    arrays, others = eqx.partition(inputs, eqx.is_array)
    captured, treedef = jax.tree.flatten(arrays)
    moves = treedef.flatten_up_to(tangents[2])
    gradient = _Gradient(rewrite_fn, treedef, others)
    dot = tangent_of_minimum(gradient, root, captured, moves, linear_solver)
    return (root, rest), (dot, jax.tree.map(lambda _: None, rest))


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """The gradient of a minimisation of optimistix, as `tangent_of_minimum` takes it.

    Attributes:
      rewrite_fn: Of the minimum and the arrays.
      treedef: The structure of the arrays.
      others: What the minimisation takes beside them.
    """

    rewrite_fn: Callable[..., Any]
    treedef: Any
    others: PyTree
    has_grad: bool = False
    reverse_only: bool = False

    def gradient(self, y: PyTree, captured: Sequence[Array]) -> PyTree:
        arrays = self.treedef.unflatten(captured)
        return self.rewrite_fn(y, None, eqx.combine(arrays, self.others))
