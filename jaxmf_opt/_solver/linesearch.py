"""What optax's line searches leave in the state of an optimizer."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .state import Evaluations

_LineSearchState: TypeAlias = (
    optax.ScaleByZoomLinesearchState | optax.ScaleByBacktrackingLinesearchState
)
_KINDS = (optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)


def ends_with_linesearch(optimizer: optax.GradientTransformation) -> bool:
    """Whether an optimizer moves to the very point that its line search accepts.

    So it is if it is an `optax.chain` with a line search of optax, or of this library,
    at its end. That is seen by the code of its functions. A state does not show it:
    whatever wraps a chain may change the step, and hand on the state.
    """
    return _is_linesearch(optimizer.update)


def _is_linesearch(update: Any) -> bool:
    code = getattr(update, "__code__", None)
    if code in _LINESEARCHES:
        return True
    if code is not None and code is _CHAIN:
        names = update.__code__.co_freevars
        cell = update.__closure__[names.index("update_fns")]
        return _is_linesearch(cell.cell_contents[-1])
    return False


def register_linesearch(
    linesearch: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Declares that a transformation is a line search like optax's zoom.

    Args:
      linesearch: A transformation whose state is that of optax's zoom line search, or a
        tuple that ends in one. Each trial evaluates the gradient.

    Returns:
      `linesearch`.
    """
    _LINESEARCHES.add(_code(linesearch))
    return linesearch


def _code(optimizer: optax.GradientTransformation) -> Any:
    return getattr(optimizer.update, "__code__", None)


_CHAIN = _code(optax.chain(optax.identity(), optax.identity()))
_LINESEARCHES = {
    _code(optax.scale_by_zoom_linesearch(1)),
    _code(optax.scale_by_backtracking_linesearch(1)),
} - {None}


def stored(opt_state: PyTree, y: PyTree) -> _LineSearchState | None:
    """The line search at the very end of a chain, if it keeps value and gradient."""
    while type(opt_state) is tuple and opt_state:
        opt_state = opt_state[-1]
    if not isinstance(opt_state, _KINDS) or opt_state.grad is None:
        return None
    same_shapes = jax.tree.structure(opt_state.grad) == jax.tree.structure(y) and all(
        g.shape == x.shape
        for g, x in zip(
            jax.tree.leaves(opt_state.grad), jax.tree.leaves(y), strict=True
        )
    )
    return opt_state if same_shapes else None


def without_trials(opt_state: PyTree) -> PyTree:
    """The state with the trials of its line searches set to 0, for `count_trials`."""

    def reset(x: Any) -> Any:
        return _with_trials(x, jnp.zeros_like(x.info.num_linesearch_steps))

    return _map(reset, opt_state)


def count_trials(
    before: PyTree, after: PyTree, *, is_searching: bool
) -> tuple[PyTree, Evaluations]:
    """Counts what the line searches of an optimizer have evaluated in one update.

    Args:
      before: The state before the update.
      after: The state to which the update has led from `without_trials(before)`.
      is_searching: Whether the optimizer evaluates the loss at all.

    Returns:
      The state to which the update leads from `before`, and the count.
    """
    trials: list[Any] = [x.info.num_linesearch_steps for x in _all(after)]
    if is_searching and not trials:
        return after, Evaluations(jnp.array(-1), jnp.array(-1))
    loss = grad = jnp.array(0)
    for x, n in zip(_all(after), trials, strict=True):
        loss += n.sum()
        # A zoom computes each trial's gradient, a backtracking one none or the last's.
        if isinstance(x, optax.ScaleByZoomLinesearchState):
            grad += n.sum()
        elif x.grad is not None:
            grad += (n > 0).sum()
    if len(trials) != len(_always_run(after)):
        # One that was not asked (in a `MultiSteps` that accumulates) keeps its number.
        numbers = iter([x.info.num_linesearch_steps for x in _all(before)])

        def keep(x: Any) -> Any:
            n, old = x.info.num_linesearch_steps, next(numbers)
            return _with_trials(x, jnp.where(n > 0, n, old))

        after = _map(keep, after)
    return after, Evaluations(loss, grad)


def _is_one(x: Any) -> bool:
    return isinstance(x, _KINDS)


def _all(opt_state: PyTree) -> list[_LineSearchState]:
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_one)
    return [x for x in leaves if isinstance(x, _KINDS)]


def _always_run(opt_state: PyTree) -> list[_LineSearchState]:
    """Those that are links of a chain."""
    if type(opt_state) is tuple:
        return [x for part in opt_state for x in _always_run(part)]
    return [opt_state] if isinstance(opt_state, _KINDS) else []


def _map(fn: Callable[[Any], Any], opt_state: PyTree) -> PyTree:
    apply = lambda x: fn(x) if _is_one(x) else x  # noqa: E731
    return jax.tree.map(apply, opt_state, is_leaf=_is_one)


def _with_trials(x: Any, n: Any) -> Any:
    return x._replace(info=x.info._replace(num_linesearch_steps=n))
