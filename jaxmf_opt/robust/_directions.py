"""The directions of L-BFGS, with what makes them robust."""

from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._validation import check_positive

T = TypeVar("T")


class RobustLBFGSState(NamedTuple):
    """The state of `scale_by_robust_lbfgs`.

    Attributes:
      num_points: 1 more than there are pairs since the last restart; 0 at first.
      params: The last point.
      updates: The gradient there.
      steps: Steps between points, at `i % memory_size` that of the pair number `i`.
      changes: What they have changed of the gradient.
      weights: The reciprocals of the products of both.
      curvature: For each variable an estimate of its second derivative, up to a common
        factor.
    """

    num_points: Int[Array, ""]
    params: PyTree
    updates: PyTree
    steps: PyTree
    changes: PyTree
    weights: Float[Array, " memory_size"]
    curvature: PyTree

    @property
    def is_fresh(self) -> Bool[Array, ""]:
        """Whether the last update was the first one, or a restart."""
        return self.num_points == 1


def scale_by_robust_lbfgs(
    memory_size: int = 40,
    first_step: float = 0.1,
    min_ratio: float = 1e2,
    max_ratio: float = 1e10,
) -> optax.GradientTransformation:
    """`optax.scale_by_lbfgs`, for losses that are steep, badly scaled or kinked.

    It differs from that in four points:

    * A pair of no or negative curvature (a step `s` that changes the gradient by `y`
      with `s'y <= 0`, or nan) would make the approximate Hessian indefinite, and the
      directions uphill. It is kept out of the memory. Only the sign is tested: in a
      narrow valley a sound pair may have a cosine of 1e-12.
    * The approximate Hessian starts from a diagonal matrix, not from a multiple of the
      identity, which is far off where variables differ by orders of magnitude: the
      diagonal of the BFGS update of a diagonal matrix, from each pair (Gilbert and
      Lemarechal, 1989, "Some numerical experiments with variable-storage quasi-Newton
      algorithms"). As long as variables seem nearly alike it stays a multiple of the
      identity: there the diagonal says more about the last few steps than of the
      variables, and to follow it costs steps.
    * Everything is forgotten where the direction does not descend (or is nan), and
      where the parameters have not moved since the last update: the line search found
      no decrease. The update is then along the gradient.
    * The first step after a (re)start is at most a fraction of the parameters' size.
      Too short a step costs a few trials, since a line search doubles it; one too long
      can end in another valley (Hager and Zhang, 2006, start CG_DESCENT in this way).

    The two loops over the pairs (Nocedal and Wright, Numerical Optimization, 2006,
    algorithm 7.4) are as long as there are pairs; in a batch, as in the lane that has
    most of them.

    Args:
      memory_size: The number of pairs that are kept.
      first_step: The largest change of a variable in the first step, over the largest
        variable. At the origin, where there is no size to go by, nothing is limited.
      min_ratio: By how much the units of two variables have to differ to be used.
      max_ratio: By how much the units of two variables may differ.

    Returns:
      A transformation whose state is a `RobustLBFGSState`.

    Raises:
      ValueError: If a number is impossible.

    Example:
      >>> import optax
      >>> from jaxmf_opt import optimize
      >>> from jaxmf_opt.robust import scale_by_robust_lbfgs
      >>> optimizer = optax.chain(
      ...     scale_by_robust_lbfgs(),
      ...     optax.scale(-1.0),
      ...     optax.scale_by_backtracking_linesearch(20, store_grad=True),
      ... )
      >>> optimize(lambda y: (y - 2.0) ** 2, 0.0, optimizer=optimizer, gtol=1e-9)
      Array(2., dtype=float32)
    """
    check_positive("memory_size", memory_size, whole=True)
    for name, value in (
        ("first_step", first_step),
        ("min_ratio", min_ratio),
        ("max_ratio", max_ratio),
    ):
        check_positive(name, value)

    def init(params: PyTree) -> RobustLBFGSState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        memory = jax.tree.map(
            lambda x: jnp.zeros((memory_size, *jnp.shape(x)), jnp.result_type(x)), zeros
        )
        return RobustLBFGSState(
            num_points=jnp.array(0),
            params=zeros,
            updates=zeros,
            steps=memory,
            changes=memory,
            weights=jnp.zeros(memory_size, jnp.result_type(*jax.tree.leaves(params))),
            curvature=jax.tree.map(jnp.ones_like, params),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree
    ) -> tuple[PyTree, RobustLBFGSState]:
        known = state.num_points > 0
        step = optax.tree.sub(params, state.params)
        change = optax.tree.sub(updates, state.updates)
        slope = _dot(step, change)
        accept = known & (slope > 0)
        oldest = (state.num_points - 1) % memory_size

        def write(memory: PyTree, new: PyTree) -> PyTree:
            return jax.tree.map(
                lambda m, x: m.at[oldest].set(jnp.where(accept, x, m[oldest])),
                memory,
                new,
            )

        curvature = _diagonal_bfgs(state.curvature, step, change, max_ratio)
        curvature = _where(
            accept & _all_positive(curvature), curvature, state.curvature
        )
        new = RobustLBFGSState(
            num_points=state.num_points + accept.astype(state.num_points.dtype),
            params=params,
            updates=updates,
            steps=write(state.steps, step),
            changes=write(state.changes, change),
            weights=write(state.weights, (1 / slope).astype(state.weights.dtype)),
            curvature=curvature,
        )
        units = _units(curvature, min_ratio)
        direction = _two_loops(new, jax.tree.map(jnp.square, units))

        stayed = optax.tree.norm(step, ord=jnp.inf) == 0
        # Not `<= 0`: a nan is no descent either.
        no_descent = ~(_dot(direction, updates) > 0)
        restarts = stayed | no_descent | (new.num_points <= 1)
        fresh = _first_direction(updates, params, first_step)
        ones = jax.tree.map(jnp.ones_like, curvature)
        return _where(restarts, fresh, direction), new._replace(
            num_points=jnp.where(restarts, 1, new.num_points),
            curvature=_where(restarts, ones, curvature),
        )

    return optax.GradientTransformation(cast(Any, init), cast(Any, update))


def _two_loops(state: RobustLBFGSState, start: PyTree) -> PyTree:
    """The gradient times the approximate inverse Hessian.

    Args:
      state: The state; its memory has the newest pair in it.
      start: The diagonal from which the approximation starts, up to a factor.
    """
    memory_size = state.weights.size
    pairs = jnp.clip(state.num_points - 1, 0, memory_size)

    def pair(age: Array) -> tuple[Array, PyTree, PyTree]:
        index = (state.num_points - 2 - age) % memory_size
        at_index = lambda memory: memory[index]  # noqa: E731
        return index, *jax.tree.map(at_index, (state.steps, state.changes))

    def to_oldest(age: Array, carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        q, alphas = carry
        index, step, change = pair(age)
        alpha = state.weights[index] * _dot(step, q).astype(alphas.dtype)
        alphas = jnp.where(jnp.arange(memory_size) == index, alpha, alphas)
        return _plus(q, -alpha, change), alphas

    # (Which numbers are in the place of those to come does not matter.)
    carry = state.updates, state.weights
    q, alphas = jax.lax.fori_loop(0, pairs, to_oldest, carry)

    # (By the rounded weight instead of `_dot(step, change)`, some kinks are missed.)
    _, step, change = pair(jnp.zeros_like(pairs))
    size = _dot(change, _times(start, change))
    scale = _dot(step, change) / jnp.where(pairs > 0, size, 1)
    r = jax.tree.map(lambda x: scale.astype(x.dtype) * x, _times(start, q))

    def to_newest(i: Array, r: PyTree) -> PyTree:
        index, step, change = pair(pairs - 1 - i)
        beta = state.weights[index] * _dot(change, r).astype(alphas.dtype)
        return _plus(r, alphas[index] - beta, step)

    return jax.lax.fori_loop(0, pairs, to_newest, r)


def _first_direction(gradient: PyTree, params: PyTree, fraction: float) -> PyTree:
    """Along the gradient, not longer than 1, nor than a part of the parameters."""
    shrink = jnp.minimum(1.0, 1.0 / optax.tree.norm(gradient))
    length = shrink * optax.tree.norm(gradient, ord=jnp.inf)
    allowed = fraction * optax.tree.norm(params, ord=jnp.inf)
    shorten = (allowed > 0) & (length > allowed)
    factor = jnp.where(shorten, allowed / length, 1.0) * shrink
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, gradient)


def _diagonal_bfgs(
    curvature: PyTree, step: PyTree, change: PyTree, max_ratio: float
) -> PyTree:
    """The diagonal of the BFGS update of a diagonal matrix, scaled to fit the pair."""
    slope = _dot(step, change)
    fit = _dot(change, _over(change, curvature)) / slope
    along = _dot(step, _times(step, curvature))

    def updated(c: Array, s: Array, y: Array) -> Array:
        new = fit * (c - (c * s) ** 2 / along) + y**2 / slope
        # Positive but for rounding, which this outlives.
        return jnp.maximum(new, 1e-10 * fit * c)

    new = jax.tree.map(updated, curvature, step, change)
    least = optax.tree.norm(new, ord=jnp.inf) / max_ratio**2
    return jax.tree.map(lambda c: jnp.maximum(c, least), new)


def _units(curvature: PyTree, min_ratio: float) -> PyTree:
    """The lengths over which variables of these curvatures do the same, or all 1.

    Powers of two, so that to change them rounds nothing.
    """
    units = jax.tree.map(lambda c: jnp.exp2(jnp.round(-jnp.log2(c) / 2)), curvature)
    largest = optax.tree.norm(units, ord=jnp.inf)
    smallest = 1 / optax.tree.norm(jax.tree.map(jnp.reciprocal, units), ord=jnp.inf)
    alike = largest < min_ratio * smallest
    return jax.tree.map(lambda u: jnp.where(alike, 1, u), units)


def _all_positive(tree: PyTree) -> Bool[Array, ""]:
    leaves = [jnp.all(jnp.isfinite(x) & (x > 0)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))


def _where(condition: Bool[Array, ""], true: T, false: T) -> T:
    return jax.tree.map(lambda t, f: jnp.where(condition, t, f), true, false)


def _dot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    return optax.tree.real(optax.tree.vdot(a, b))


def _plus(tree: PyTree, factor: Array, other: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x + factor.astype(x.dtype) * y, tree, other)


def _times(tree: PyTree, factors: PyTree) -> PyTree:
    return jax.tree.map(jnp.multiply, tree, factors)


def _over(tree: PyTree, factors: PyTree) -> PyTree:
    return jax.tree.map(jnp.divide, tree, factors)
