"""The loss as a pure function of the parameters and of what it captures."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._jax.staging import hoist, inside_region, struct
from .._jax.structure import Structure
from .closures import with_open_constants, with_operands


class Program(NamedTuple):
    """What a loss computes, apart from the arrays that it closes over.

    Hashable; two programs are equal if they compute the same thing, whichever
    function objects they were traced from.

    Attributes:
      value: The program `(*captured, *leaves of params) -> [loss, ...]`; it uses the
        first `num_captured` captured arrays.
      value_and_grad: The program `(*captured, *leaves) -> [loss, *leaves of grad]`, or
        None where differentiating `value` gives it. It is there if the gradient is the
        user's, and if `value` has derivative rules of its own: those are functions,
        which may close over arrays too, and by which losses can differ.
      num_captured: How many captured arrays `value` uses.
      treedef: The structure of the parameters.
      has_grad: Whether the gradient is the user's (`grad=True`).
    """

    value: Structure
    value_and_grad: Structure | None
    num_captured: int
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
        if self.value_and_grad is None:
            return self.evaluate_loss(params, captured)
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
        if self.value_and_grad is None:
            return jax.grad(self.loss)(params, captured)
        gradient = self.evaluate_both(params, captured)[1:]
        return jax.tree.unflatten(self.treedef, gradient)

    @property
    def reverse_only(self) -> bool:
        """Whether `gradient` can be differentiated in reverse mode only."""
        return self.value_and_grad is not None and self.value_and_grad.has_custom_vjp

    def evaluate_loss(
        self, params: PyTree, captured: Sequence[Array]
    ) -> Float[Array, ""]:
        """The loss, by its program alone."""
        operands = (*captured[: self.num_captured], *jax.tree.leaves(params))
        return jex.jaxpr_as_fun(self.value.jaxpr)(*operands)[0]

    def evaluate_both(self, params: PyTree, captured: Sequence[Array]) -> list[Array]:
        """Loss and leaves of the gradient, by the program for both."""
        assert self.value_and_grad is not None
        operands = (*captured, *jax.tree.leaves(params))
        return jex.jaxpr_as_fun(self.value_and_grad.jaxpr)(*operands)


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
      ValueError: If the loss is not a scalar, if the gradient has not the structure
        and shapes of the parameters, or if the loss uses a mapped axis.
    """
    with inside_region(), jax.ensure_compile_time_eval():
        changed = with_operands(loss_fn)
    if changed is not loss_fn:
        try:
            return _trace(changed, params, grad=grad)
        except Exception:
            # It may need a NumPy scalar to be one: to branch on what it makes of it.
            return _trace(loss_fn, params, grad=grad)
    return _trace(loss_fn, params, grad=grad)


def _trace(loss_fn: Callable[..., Any], params: PyTree, *, grad: bool) -> Objective:
    leaves, treedef = jax.tree.flatten(params)
    structs = [struct(x) for x in leaves]

    def outputs(*leaves: Array) -> list[Array]:
        out = loss_fn(jax.tree.unflatten(treedef, leaves))
        loss, gradient = _check_pair(out) if grad else (out, None)
        if not grad and isinstance(out, (tuple, list)) and len(out) == 2:
            raise TypeError(
                "optimize: `loss_fn` must return a real floating-point scalar, got "
                f"{_describe(out)}. If it returns its gradient too, say so by "
                "grad=True."
            )
        out = [_check_loss(loss)]
        if grad:
            out += _check_gradient(gradient, treedef, structs)
        return out

    with inside_region():
        closed = with_open_constants(jax.make_jaxpr(outputs)(*structs))
        _check_local(closed)
        closed, captured = hoist(closed)
        value = Structure(closed)
        value_and_grad, num_captured = None, len(captured)
        if grad:
            value_and_grad = value
        elif value.has_custom_rules:

            def both(*operands: Array) -> list[Array]:
                def loss(*leaves: Array) -> Array:
                    full = (*operands[:num_captured], *leaves)
                    return jex.jaxpr_as_fun(value.jaxpr)(*full)[0]

                leaves = operands[num_captured:]
                every = tuple(range(len(leaves)))
                value_of, gradient = jax.value_and_grad(loss, every)(*leaves)
                return [value_of, *gradient]

            operands = [*map(struct, captured), *structs]
            closed = jax.make_jaxpr(both)(*operands)
            _check_local(closed)
            closed, in_rules = hoist(closed, after=num_captured)
            value_and_grad = Structure(closed)
            captured = [*captured, *in_rules]
    program = Program(value, value_and_grad, num_captured, treedef, grad)
    return Objective(program, captured)


@functools.cache
def _axis_effect() -> type:
    """The type of the effect by which JAX marks what uses a mapped axis."""
    uses_axis = jax.make_jaxpr(lambda: jax.lax.axis_index("i"), axis_env=[("i", 1)])()
    (effect,) = uses_axis.effects
    return type(effect)


def _check_local(closed: jex.ClosedJaxpr) -> None:
    """Refuses a loss that communicates: its solves would wait for each other."""
    for effect in closed.effects:
        if type(effect).__name__ == "ErrorEffect":
            raise ValueError(
                "optimize: `loss_fn` uses `checkify.check`, whose errors cannot be "
                "carried out of a solve. Return NaN where the check fails: the result "
                "of `solve` is then `nonfinite`."
            )
        if isinstance(effect, _axis_effect()):
            raise ValueError(
                "optimize: `loss_fn` uses a mapped axis, "
                f"{getattr(effect, 'name', effect)!r}, with `jax.lax.psum` or the "
                "like. Each device or lane takes its own number "
                "of steps, so a loss cannot communicate with those of the others. "
                "Compute what it needs from them outside of `loss_fn`."
            )


# The tangent of a loss that has a program for its gradient is by that gradient, whoever
# asks: a zoom line search, a line search that stores gradients, or a minimiser.
def _loss_with_gradient(
    program: Program, params: PyTree, captured: Sequence[Array]
) -> Float[Array, ""]:
    @jax.custom_jvp
    def loss(params: PyTree, captured: Sequence[Array]) -> Array:
        return program.evaluate_loss(params, captured)

    @loss.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        value, *gradient = program.evaluate_both(*primals)
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
