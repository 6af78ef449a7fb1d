"""The solvers that are compared, all called in the same way."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optax
import optimistix as optx
import scipy.optimize
from jax.core import Tracer
from jax_privacy.matrix_factorization import optimization as upstream

import jaxmf_opt
from jaxmf_opt import DEFAULT_OPTIMIZER, ROBUST_OPTIMIZER

Loss = Callable[[Any, Any], Any]

# What a solver is called with: the loss, where to start, the hyperparameter, the
# tolerance, the number of steps. It gives the point, and whether it has converged, or
# None if it does not say.
Solver = Callable[[Loss, Any, Any, Any, int], tuple[Any, Any]]


class Peer(NamedTuple):
    """A solver.

    Attributes:
      solve: The solver.
      compiled: Whether to call it under `jax.jit`. (If not, it is ordinary Python that
        calls compiled functions.)
      traceable: Whether JAX's transformations can be tried on it.
      has_tolerance: Whether it looks at its tolerance.
    """

    solve: Solver
    compiled: bool = True
    traceable: bool = True
    has_tolerance: bool = True


def ours(optimizer: Any, tolerance: str = "gtol") -> Solver:
    """`solve` of this library, with the tolerance of that name."""

    def solve(loss: Loss, start: Any, hyperparam: Any, tol: Any, steps: int) -> Any:
        solution = jaxmf_opt.solve(
            lambda y: loss(y, hyperparam),
            start,
            optimizer=optimizer,
            max_optimizer_steps=steps,
            **{"rtol": 0.0, tolerance: tol},
        )
        return solution.value, solution.result == optx.RESULTS.successful

    return solve


def _jax_privacy(
    loss: Loss, start: Any, hyperparam: Any, tol: Any, steps: int
) -> tuple[Any, Any]:
    def callback(info: upstream.CallbackArgs) -> Any:
        small = jnp.abs(jnp.asarray(info.grad)).max() <= tol
        # A traced value cannot end a loop of Python, which then takes all its steps.
        return not isinstance(small, Tracer) and bool(small)

    end = upstream.optimize(
        lambda y: loss(y, hyperparam),
        start,
        max_optimizer_steps=steps,
        callback=callback,
    )
    return end, None


def _optax(
    loss: Loss, start: Any, hyperparam: Any, tol: Any, steps: int
) -> tuple[Any, Any]:
    """L-BFGS in a loop, as optax's documentation shows it, compiled."""
    optimizer = optax.lbfgs()

    def of_params(y: Any) -> Any:
        return loss(y, hyperparam)

    both = optax.value_and_grad_from_state(of_params)

    def more(carry: Any) -> Any:
        _, state = carry
        step = optax.tree.get(state, "count")
        norm = optax.tree.norm(optax.tree.get(state, "grad"))
        return (step == 0) | ((step < steps) & (norm > tol))

    def step(carry: Any) -> Any:
        y, state = carry
        value, grad = both(y, state=state)
        updates, state = optimizer.update(
            grad, state, y, value=value, grad=grad, value_fn=of_params
        )
        return optax.apply_updates(y, updates), state

    y, state = jax.lax.while_loop(more, step, (start, optimizer.init(start)))
    return y, optax.tree.norm(optax.tree.get(state, "grad")) <= tol


def _jaxopt(
    loss: Loss, start: Any, hyperparam: Any, tol: Any, steps: int
) -> tuple[Any, Any]:
    solver = jaxopt.LBFGS(loss, tol=tol, maxiter=steps, implicit_diff=True)
    end = solver.run(start, hyperparam)
    return end.params, end.state.error <= tol


def _optimistix(make: Callable[[Any], optx.AbstractMinimiser], factor: int) -> Solver:
    """A minimiser of optimistix.

    Args:
      make: Makes it, given a tolerance.
      factor: How many of its steps are as a step of others. (For some, every trial of
        a line search is a step.)
    """

    def solve(loss: Loss, start: Any, hyperparam: Any, tol: Any, steps: int) -> Any:
        end = optx.minimise(
            loss, make(tol), start, hyperparam, max_steps=steps * factor, throw=False
        )
        return end.value, end.result == optx.RESULTS.successful

    return solve


@functools.lru_cache(maxsize=8)
def _value_and_grad(loss: Loss) -> Callable[[Any, Any], Any]:
    return jax.jit(jax.value_and_grad(loss))


def scipy_with(method: str, **options: Any) -> Solver:
    """SciPy's `minimize`, around a compiled value and gradient."""

    def solve(loss: Loss, start: Any, hyperparam: Any, tol: Any, steps: int) -> Any:
        both = _value_and_grad(loss)
        with np.errstate(all="ignore"):
            end = scipy.optimize.minimize(
                lambda y: [np.array(x) for x in both(y, hyperparam)],
                np.asarray(start),
                jac=True,
                method=method,
                options={"maxiter": steps, "gtol": tol, **options},
            )
        return end.x, end.success

    return solve


L_BFGS_B = Peer(
    scipy_with("L-BFGS-B", maxfun=100_000, ftol=0.0), compiled=False, traceable=False
)

THEIRS: dict[str, Peer] = {
    "jax-privacy 2.0.0": Peer(_jax_privacy, compiled=False),
    "optax.lbfgs in a loop": Peer(_optax),
    "optimistix.OptaxMinimiser": Peer(
        _optimistix(lambda t: optx.OptaxMinimiser(optax.lbfgs(), rtol=t, atol=t), 1)
    ),
    "optimistix.LBFGS": Peer(_optimistix(lambda t: optx.LBFGS(rtol=t, atol=t), 20)),
    "optimistix.BFGS": Peer(_optimistix(lambda t: optx.BFGS(rtol=t, atol=t), 20)),
    "jaxopt.LBFGS": Peer(_jaxopt),
    "SciPy L-BFGS-B": L_BFGS_B,
}

OURS: dict[str, Any] = {
    "DEFAULT_OPTIMIZER": DEFAULT_OPTIMIZER,
    "ROBUST_OPTIMIZER": ROBUST_OPTIMIZER,
}
