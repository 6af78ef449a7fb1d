"""Upstream's function: parameters in, parameters out."""

from collections.abc import Callable
from typing import Any

import lineax as lx
import optax
from jaxtyping import Array, Float

from ._solve import minimise
from ._solver.optimizers import DEFAULT_OPTIMIZER
from ._typing import Tolerance, Y
from .callbacks._args import CallbackFnType


def optimize(
    loss_fn: Callable[[Y], Float[Array, ""] | tuple[Float[Array, ""], Y]],
    params: Y,
    *,
    max_optimizer_steps: int = 250,
    grad: bool = False,
    callback: CallbackFnType | None = None,
    optimizer: optax.GradientTransformation = DEFAULT_OPTIMIZER,
    rtol: Tolerance = 0.0,
    atol: Tolerance = 0.0,
    gtol: Tolerance = 0.0,
    linear_solver: lx.AbstractLinearSolver[Any] | None = None,
) -> Y:
    """Minimises a differentiable loss, by default with L-BFGS, in float64.

    The drop-in for `jax_privacy.matrix_factorization.optimization.optimize`: same
    arguments, same defaults, same iterates. Without a callback the solve is one
    compiled program. Called eagerly, it is compiled once for all losses that compute
    the same thing; inside `jax.jit` and `jax.vmap` it is part of the caller's program.
    The setting `jax_enable_x64` around the call does not matter.

    The result can be differentiated, in forward and reverse mode and repeatedly, with
    respect to whatever floating-point values the loss closes over: by the implicit
    function theorem. It is NaN where the solve has ended so far from a minimum that the
    linear system is another one there, and on kinks. Of a minimum that is not unique,
    as that of a loss that does not depend on the scale of its parameters, the
    derivative is the one of smallest norm. With respect to the starting point, the
    tolerances and the optimizer it is zero.

    Args:
      loss_fn: Takes parameters as float64 arrays, returns a real scalar. It may close
        over arrays, traced ones too. With `grad=True` it returns a pair of the loss and
        its gradient, which has the structure and shapes of the parameters.
      params: The starting point: a pytree of real arrays or numbers of any shapes and
        dtypes. They are cast to float64 inside and cast back on return, leaf by leaf:
        integer leaves are optimized as reals and rounded toward zero in the end, to the
        nearest number that their dtype has.
      max_optimizer_steps: The (maximum) number of optimization steps.
      grad: Whether `loss_fn` returns its gradient too. That gradient is used wherever
        one is needed. It need not be the true one: it may be a projection, for example.
      callback: Called after each step with a `CallbackArgs`. If it returns something
        truthy, the solve stops there. It runs on the calling thread, in a 64-bit
        setting, between compiled steps.
      optimizer: Any optax transformation, with or without a line search.
      rtol: Relative tolerance: stop once a step is smaller than
        `atol + rtol * abs(params)` and changes the loss by less than
        `atol + rtol * abs(loss)`, in all elements, and the gradient is as small as at a
        minimum. With all three tolerances at 0, as in upstream, the solve takes all its
        steps.
      atol: Absolute tolerance of the same criterion.
      gtol: Stop once no element of the gradient is larger than this.
      linear_solver: Solves the linear system of the derivative of the minimum, if one
        is taken. By default a factorisation up to 2,048 parameters, and above them
        conjugate gradients and LSMR, without a matrix. Where the system was not solved
        the derivative is NaN: give the solver more steps, or none for the default.
        (`lineax.CG` with `atol=0` does not start where an element of the right-hand
        side is 0.)

    Returns:
      The parameters that approximately minimise the loss locally, with the structure
      and dtypes of `params`.

    Raises:
      TypeError: If an argument is of the wrong kind, `params` has a leaf that is not a
        real array or number, or `loss_fn` does not return real floating-point numbers.
      ValueError: If an argument has an impossible value, `params` has no leaves, or
        `loss_fn` returns a loss or gradient of the wrong shape.
      RuntimeError: If the process was forked off one that had used JAX.

    Example:
      >>> import jax.numpy as jnp
      >>> optimize(lambda x: jnp.sum((x - 3.0) ** 2), jnp.zeros(2))
      Array([3., 3.], dtype=float32)

    References:
      Nocedal and Wright, Numerical Optimization (2006), section 7.2, for L-BFGS. For
      its use on matrix-factorisation mechanisms: https://arxiv.org/abs/2106.12118,
      https://arxiv.org/abs/2306.08153, https://arxiv.org/abs/2405.15913 and
      https://arxiv.org/abs/2408.08868.
    """
    return minimise(
        loss_fn,
        params,
        max_optimizer_steps=max_optimizer_steps,
        grad=grad,
        callback=callback,
        optimizer=optimizer,
        rtol=rtol,
        atol=atol,
        gtol=gtol,
        linear_solver=linear_solver,
        only_value=True,
    ).value
