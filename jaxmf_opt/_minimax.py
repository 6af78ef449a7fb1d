"""The least largest of several losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree
from optimistix import RESULTS

from ._jax.compat import nondifferentiable
from ._jax.region import x64_region
from ._jax.x64 import caller_dtype, is_traced
from ._solve import solve
from ._typing import Tolerance
from ._validation import (
    check_callable,
    check_flag,
    check_optimizer,
    check_params,
    check_positive,
    check_tolerance,
)
from .robust import ROBUST_OPTIMIZER

# The first temperature, over the range of the losses, and how fast it falls.
_START, _FALL = 0.03, 0.3
# How exactly a smooth problem is solved, over the gap before it, and at the most.
_PART_OF_GAP, _LEAST_RTOL = 1e-3, 1e-8
MAX_ROUNDS = 30


class Dual(NamedTuple):
    """What makes a smooth problem of the least largest loss.

    Attributes:
      log_weights: The logarithms of the weights of the losses.
      temperature: By how much losses differ that are told apart.
    """

    log_weights: Float[Array, " losses"]
    temperature: Float[Array, ""]

    @classmethod
    def first(cls, losses: Float[Array, " losses"]) -> "Dual":
        """That of the first problem, by the losses at the starting point."""
        spread, size = jnp.max(losses) - jnp.min(losses), jnp.max(jnp.abs(losses))
        # (Of losses that are all 0, none of these is a scale.)
        size = jnp.where(size > 0, size, 1.0)
        temperature = _START * jnp.where(spread > 0, spread, size)
        equal = -jnp.log(jnp.asarray(losses.size, losses.dtype))
        return cls(jnp.full_like(losses, equal), temperature)

    def loss(self, losses: Float[Array, " losses"]) -> Float[Array, ""]:
        """The loss of the problem, a smooth function of the losses."""
        return self.temperature * jax.nn.logsumexp(self._exponents(losses))

    def weights(self, losses: Float[Array, " losses"]) -> Float[Array, " losses"]:
        """Its derivative."""
        return jax.nn.softmax(self._exponents(losses))

    def next(self, losses: Float[Array, " losses"], result: RESULTS) -> "Dual":
        """That of the next problem, by the losses at the end of this one.

        The lower the temperature, the nearer are the weights to those wanted, and the
        harder the problem. So it falls where this one was solved.
        """
        fall = jnp.where(result == RESULTS.successful, _FALL, 1.0)
        log_weights = jax.nn.log_softmax(self._exponents(losses))
        return Dual(log_weights, fall * self.temperature)

    def gap(self, losses: Float[Array, " losses"]) -> Float[Array, ""]:
        """By how much the largest loss is above the weighted sum."""
        return jnp.sum(self.weights(losses) * (jnp.max(losses) - losses))

    def _exponents(self, losses: Float[Array, " losses"]) -> Float[Array, " losses"]:
        return self.log_weights + losses / self.temperature


def rtol_of_round(gap: Any, largest: Any) -> Any:
    """How exactly to solve a problem, by the gap and the largest loss before it."""
    part = gap / jnp.where(largest == 0, 1.0, jnp.abs(largest))
    return jnp.clip(_PART_OF_GAP * part, _LEAST_RTOL, _PART_OF_GAP)


def is_close(
    gap: Any, largest: Any, rtol_here: Any, rtol: Any, atol: Any = 0.0
) -> Bool[Array, "..."]:
    """Whether a gap is as small as asked for, and says anything.

    If one loss alone is the largest, the gap is 0 wherever that is so: it counts if the
    problem was solved as exactly as asked for.
    """
    is_exact = rtol_here <= jnp.maximum(rtol, _LEAST_RTOL)
    return (gap <= rtol * jnp.abs(largest) + atol) & is_exact


class Minimax(NamedTuple):
    """What `minimax` returns.

    Attributes:
      value: The parameters, with the structure and dtypes of `params`.
      loss: The largest of the losses there, float64.
      weights: Of the losses, shape (losses,), not negative and of sum 1: the Lagrange
        multipliers, by which the weighted sum of the losses is minimal.
      gap: By how much the largest loss is above that sum. If all losses are convex, no
        parameters have a largest loss below `loss - gap`, but for what the last smooth
        problem was solved too coarsely: 1e-6 of the losses, and with an `rtol` above
        1e-4 up to that part of them. Infinite if that problem was not solved, because
        that says nothing.
      result: An `optimistix.RESULTS`. `successful`: the gap is as small as asked for,
        and the weighted sum is minimal. `nonlinear_max_steps_reached`, `stagnation`:
        it is not, or could not be said to be. `nonfinite`: losses became non-finite.
      num_rounds: The number of smooth problems.
      num_steps: Their steps, together.
      num_loss_evaluations: How often all losses were evaluated; -1 if that is unknown.
    """

    value: PyTree
    loss: Float[Array, ""]
    weights: Float[Array, " losses"]
    gap: Float[Array, ""]
    result: RESULTS
    num_rounds: Int[Array, ""]
    num_steps: Int[Array, ""]
    num_loss_evaluations: Int[Array, ""]


def minimax(
    losses_fn: Callable[[PyTree], Any],
    params: PyTree,
    *,
    grad: bool = False,
    rtol: Tolerance = 1e-8,
    atol: Tolerance = 0.0,
    max_rounds: int = MAX_ROUNDS,
    max_optimizer_steps: int = 1000,
    optimizer: optax.GradientTransformation = ROBUST_OPTIMIZER,
) -> Minimax:
    """Minimises the largest of several smooth losses, in float64.

    Where several losses are the largest, the largest has a kink, and at its minimum
    they mostly are. A solver that goes by gradients gets there slowly, if at all. Here
    it is a sequence of smooth problems, by the exponential method of multipliers (Tseng
    and Bertsekas, "On the convergence of the exponential multiplier method for convex
    programming", Math. Program. 60, 1993): the loss of each is

        temperature * log(sum(weights * exp(losses / temperature))),

    and the weights of the next are its derivatives with respect to `losses`.

    Under `jax.jit` and `jax.vmap` it is part of the caller's program. Eager calls share
    a compiled program as long as losses and shapes are the same, whatever the data. It
    has no derivative.

    Args:
      losses_fn: Takes parameters, returns the losses, shape (losses,). With `grad`,
        returns them and a function that takes weights of their shape and returns the
        gradient of the weighted sum, in the structure of the parameters.
      params: The starting point.
      grad: Whether `losses_fn` brings its gradients.
      rtol: Relative tolerance for the gap, over the largest loss.
      atol: Absolute tolerance for the gap.
      max_rounds: The limit of smooth problems.
      max_optimizer_steps: The limit of steps in each of them.
      optimizer: An optax transformation, for them.

    Returns:
      A `Minimax`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument has an impossible value, or the losses are no vector.

    Example:
      The smallest circle around three points:

      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import minimax
      >>> points = jnp.array([[0.0, 1.0], [2.0, 1.0], [1.0, 1.5]])
      >>> squared = lambda center: jnp.sum((points - center) ** 2, axis=1)
      >>> minimax(squared, jnp.zeros(2)).value.round(4)
      Array([1., 1.], dtype=float32)
    """
    check_callable("losses_fn", losses_fn)
    check_params(params)
    check_flag("grad", grad)
    check_tolerance("rtol", rtol)
    check_tolerance("atol", atol)
    check_positive("max_rounds", max_rounds, whole=True)
    check_positive("max_optimizer_steps", max_optimizer_steps, whole=True)
    check_optimizer(optimizer)
    dtypes = [
        caller_dtype(x, in_program=is_traced(params)) for x in jax.tree.leaves(params)
    ]
    int_dtype, float_dtype = jnp.result_type(int), jnp.result_type(float)

    def evaluate(y: PyTree) -> tuple[Float[Array, " losses"], Any]:
        out = losses_fn(y)
        if grad and not (isinstance(out, tuple) and len(out) == 2 and callable(out[1])):
            raise TypeError(
                "with grad=True, `losses_fn` must return a pair of the losses and a "
                f"function of their weights, got {out!r}."
            )
        losses, pull_back = out if grad else (out, None)
        return _check_losses(losses), pull_back

    def smooth(y: PyTree, dual: Dual) -> Any:
        losses, pull_back = evaluate(y)
        loss = dual.loss(losses)
        return (loss, pull_back(dual.weights(losses))) if grad else loss

    def first_round(y: PyTree) -> _Round:
        one, none = jnp.array(1.0), jnp.array(0)
        at_limit: Any = RESULTS.nonlinear_max_steps_reached
        dual = Dual.first(evaluate(y)[0])
        return _Round(y, dual, one, one, one, at_limit, none, none, jnp.array(1))

    def next_round(at: _Round) -> _Round:
        rtol_here = rtol_of_round(at.gap, at.largest)
        solution = solve(
            smooth,
            at.y,
            at.dual,
            grad=grad,
            max_optimizer_steps=max_optimizer_steps,
            optimizer=optimizer,
            rtol=rtol_here,
        )
        losses, _ = evaluate(solution.value)
        evaluations = solution.stats["num_loss_evaluations"]
        is_known = (evaluations >= 0) & (at.num_evaluations >= 0)
        return _Round(
            y=solution.value,
            dual=at.dual.next(losses, solution.result),
            largest=jnp.max(losses),
            gap=at.dual.gap(losses),
            rtol=rtol_here,
            result=solution.result,
            num_rounds=at.num_rounds + 1,
            num_steps=at.num_steps + solution.stats["num_steps"],
            num_evaluations=jnp.where(
                is_known, at.num_evaluations + evaluations + 1, -1
            ),
        )

    def is_found(at: _Round) -> Bool[Array, ""]:
        return is_close(at.gap, at.largest, at.rtol, rtol, atol)

    def goes_on(at: _Round) -> Bool[Array, ""]:
        is_over = is_found(at) & (at.result != RESULTS.nonlinear_max_steps_reached)
        is_over |= ~jnp.isfinite(at.gap)
        return ~is_over & (at.num_rounds < max_rounds)

    def run(params: PyTree) -> Minimax:
        y = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        end = jax.lax.while_loop(goes_on, next_round, first_round(y))
        end = nondifferentiable(end, msg="`minimax` has no derivative.")
        leaves, treedef = jax.tree.flatten(end.y)
        value = [x.astype(d) for x, d in zip(leaves, dtypes, strict=True)]
        at_limit: Any = RESULTS.nonlinear_max_steps_reached
        nonfinite: Any = RESULTS.nonfinite
        is_short = (end.result == RESULTS.successful) & ~is_found(end)
        result = RESULTS.where(is_short, at_limit, end.result)
        result = RESULTS.where(jnp.isfinite(end.gap), result, nonfinite)
        is_solved = end.result == RESULTS.successful
        return Minimax(
            jax.tree.unflatten(treedef, value),
            end.largest,
            jnp.exp(end.dual.log_weights).astype(float_dtype),
            jnp.where(is_solved, end.gap, jnp.inf).astype(float_dtype),
            result,
            end.num_rounds.astype(int_dtype),
            end.num_steps.astype(int_dtype),
            end.num_evaluations.astype(int_dtype),
        )

    return x64_region(run, params)


class _Round(NamedTuple):
    """What is known after a smooth problem.

    Attributes:
      y: Its minimum.
      dual: What makes the next one.
      largest: The largest loss at `y`.
      gap: By how much it is above the weighted sum.
      rtol: How exactly the problem was solved.
      result: How the problem was solved.
      num_rounds: The number of problems so far.
      num_steps: Of their steps.
      num_evaluations: Of evaluations, or -1.
    """

    y: PyTree
    dual: Dual
    largest: Float[Array, ""]
    gap: Float[Array, ""]
    rtol: Float[Array, ""]
    result: RESULTS
    num_rounds: Int[Array, ""]
    num_steps: Int[Array, ""]
    num_evaluations: Int[Array, ""]


def _check_losses(losses: Any) -> Float[Array, " losses"]:
    """The losses, of float64; refuses what is no vector of real numbers."""
    dtype = getattr(losses, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = f"{losses!r}" if dtype is None else f"dtype {dtype}"
        raise TypeError(f"`losses_fn` must return an array of floats, got {got}.")
    if losses.ndim != 1 or not losses.size:
        raise ValueError(
            "`losses_fn` must return a vector, of a loss at least; got an array of "
            f"shape {losses.shape}."
        )
    return jnp.asarray(losses, jnp.float64)
