"""The loss as a pure function of the parameters and of what it captures."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jaxtyping import Array, Float, PyTree

from ._structure import Structure
from ._x64 import inside_region, struct


class Program(NamedTuple):
    """What a loss computes, apart from the arrays that it closes over.

    Hashable; two programs are equal if they compute the same thing, whichever
    function objects they were traced from.

    Attributes:
      value: The program `(*captured, *leaves of params) -> [loss, *leaves of grad]`,
        the gradient only if it is the user's.
      value_and_grad: None where the gradient follows from `value`. Where `value` has
        derivative rules of its own, or the gradient is the user's, the program that
        computes both: no two losses are equal that differ there.
      treedef: The structure of the parameters.
      has_grad: Whether the gradient is the user's (`grad=True`).
    """

    value: Structure
    value_and_grad: Structure | None
    treedef: Any
    has_grad: bool

    def loss(self, params: PyTree, captured: Sequence[Array]) -> Float[Array, ""]:
        """The loss. It is differentiable in `params`, by the user's gradient if any.

        Args:
          params: float64 leaves.
          captured: The arrays that the loss closes over.

        Returns:
          A float64 scalar.
        """
        if not self.has_grad:
            return self._evaluate(params, captured)[0]
        return _loss_with_gradient(self, params, captured)

    def gradient(self, params: PyTree, captured: Sequence[Array]) -> PyTree:
        """The gradient of the loss in `params`: the user's if there is one.

        Differentiable in both arguments, as often as the loss allows.

        Args:
          params: float64 leaves.
          captured: The arrays that the loss closes over.

        Returns:
          float64 leaves in the structure of `params`.
        """
        if not self.has_grad:
            return jax.grad(self.loss)(params, captured)
        return jax.tree.unflatten(self.treedef, self._evaluate(params, captured)[1:])

    def _evaluate(self, params: PyTree, captured: Sequence[Array]) -> list[Array]:
        leaves = jax.tree.leaves(params)
        return jex.jaxpr_as_fun(self.value.jaxpr)(*captured, *leaves)


class Objective(NamedTuple):
    """A loss, split into its program and the arrays it closes over.

    Attributes:
      program: What is computed.
      captured: The closed-over arrays, tracers of an outer program among them.
    """

    program: Program
    captured: list[Array]


def trace(loss_fn: Callable[..., Any], params: PyTree, *, grad: bool) -> Objective:
    """Traces a loss once, in 64-bit, at the shapes of the parameters.

    Args:
      loss_fn: Takes parameters, returns a scalar loss, or with `grad` a pair
        `(loss, gradient)`.
      params: Parameters, or their `jax.ShapeDtypeStruct`s, all float64.
      grad: Whether `loss_fn` returns its gradient too.

    Returns:
      The objective.

    Raises:
      TypeError: If the loss, or the gradient, is not of real floating point type or
        has the wrong form.
      ValueError: If the loss is not a scalar, or if the gradient has not the structure
        and shapes of the parameters.
    """
    leaves, treedef = jax.tree.flatten(params)
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]

    def outputs(*leaves: Array) -> list[Array]:
        out = loss_fn(jax.tree.unflatten(treedef, leaves))
        loss, gradient = _check_pair(out) if grad else (out, None)
        out = [_check_loss(loss)]
        if grad:
            out += _check_gradient(gradient, treedef, structs)
        return out

    with inside_region():
        closed = jax.make_jaxpr(outputs)(*structs)
        captured = [jnp.asarray(c) for c in closed.consts]
        open_jaxpr = closed.jaxpr

        def explicit(*operands: Array) -> list[Array]:
            n = len(captured)
            return eval_jaxpr(open_jaxpr, operands[:n], *operands[n:])

        captured_structs = [struct(c) for c in captured]
        operands = [*captured_structs, *structs]
        value = Structure(jax.make_jaxpr(explicit)(*operands) if captured else closed)
        value_and_grad = None
        if value.has_custom_rules and not grad:
            value_and_grad = Structure(
                jax.make_jaxpr(
                    jax.value_and_grad(
                        lambda leaves, captured: explicit(*captured, *leaves)[0]
                    )
                )(structs, captured_structs)
            )
    return Objective(Program(value, value_and_grad, treedef, grad), captured)


# The tangent of a loss that brings its own gradient is that gradient's, whoever asks:
# a zoom line search, a line search that stores gradients, or a minimiser.
def _loss_with_gradient(
    program: Program, params: PyTree, captured: Sequence[Array]
) -> Float[Array, ""]:
    @jax.custom_jvp
    def loss(params: PyTree, captured: Sequence[Array]) -> Array:
        return program._evaluate(params, captured)[0]

    @loss.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        value, *gradient = program._evaluate(*primals)
        moves = jax.tree.leaves(tangents[0])
        slopes = [jnp.vdot(g, t) for g, t in zip(gradient, moves, strict=True)]
        return value, jnp.stack(slopes).sum()

    return loss(params, captured)


def _check_pair(out: Any) -> tuple[Any, Any]:
    if isinstance(out, (tuple, list)) and len(out) == 2:
        return out[0], out[1]
    raise TypeError(
        "optimize: with grad=True, `loss_fn` must return a pair (loss, gradient), got "
        f"{_describe(out)}."
    )


def _check_loss(loss: Any) -> Array:
    loss = _real(loss, "`loss_fn` must return a real floating-point scalar")
    if loss.shape != ():
        raise ValueError(
            "optimize: `loss_fn` must return a scalar, got an array of shape "
            f"{loss.shape}. Reduce it, with `jnp.sum` or `jnp.mean` for example."
        )
    return loss


def _check_gradient(
    gradient: Any, treedef: Any, structs: Sequence[jax.ShapeDtypeStruct]
) -> list[Array]:
    leaves, found = jax.tree.flatten(gradient)
    if found != treedef:
        raise ValueError(
            "optimize: with grad=True, the gradient that `loss_fn` returns must have "
            f"the structure of `params`, {treedef}; got {found}."
        )
    want = "`loss_fn` must return a gradient of real floating-point arrays"
    leaves = [_real(g, want) for g in leaves]
    for got, want in zip(leaves, structs, strict=True):
        if got.shape != want.shape:
            raise ValueError(
                "optimize: with grad=True, the gradient that `loss_fn` returns must "
                f"have the shapes of `params`; got {got.shape} for {want.shape}."
            )
    return leaves


def _real(x: Any, wanted: str) -> Array:
    try:
        dtype = jax.typeof(x).dtype
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"optimize: {wanted}, got {_describe(x)}.")
    return jnp.asarray(x, dtype=jnp.float64)


def _describe(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array of shape {x.shape} and dtype {x.dtype}"
    return f"{x!r} of type {type(x).__name__}"
