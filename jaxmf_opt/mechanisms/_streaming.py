"""Noising matrices as jax-privacy takes them, one step of training after the other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_Step = Callable[[Array, Any], tuple[Array, Any]]


class Buffers(NamedTuple):
    """What a training needs to correlate its noise.

    The strategy has the coefficients `c_0 = 1` and
    `c_t = sum_i output_scale[i] * buf_decay[i] ** (t - 1)`.
    Its inverse has coefficients of the same form.

    Attributes:
      buf_decay: The decay of each buffer of the strategy, decreasing, in (0, 1); shape
        (num_buffers,).
      output_scale: The weights of the buffers, positive.
      inv_buf_decay: The same of the inverse; the decays of both interlace.
      inv_output_scale: The weights of the buffers of the inverse, negative.
    """

    buf_decay: Float[Array, " num_buffers"]
    output_scale: Float[Array, " num_buffers"]
    inv_buf_decay: Float[Array, " num_buffers"]
    inv_output_scale: Float[Array, " num_buffers"]


def by_recursion(coef: Float[Array, " bands"], feedback: Float[Array, " kept"]) -> Any:
    """The matrix that takes `z` to `y_t = sum_j coef_j z_{t-j} - feedback_j y_{t-1-j}`.

    Its state are the last vectors of both kinds, as many as are needed.
    """

    def init(like: Any) -> tuple[Array, Array]:
        sizes = coef.size - 1, feedback.size
        return tuple(jnp.zeros((size, *like.shape), like.dtype) for size in sizes)  # pyright: ignore[reportReturnType]

    def step(z: Array, state: tuple[Array, Array]) -> tuple[Array, Any]:
        inputs, outputs = state
        inputs = jnp.concatenate([z[None], inputs])
        y = _weighted(coef, inputs) - _weighted(feedback, outputs)
        outputs = jnp.concatenate([y[None], outputs])[: feedback.size]
        return y, (inputs[: coef.size - 1], outputs)

    return _streaming_matrix(init, step)


def by_buffers(buffers: Buffers, scale: Float[Array, ""]) -> Any:
    """A multiple of the inverse of a BLT. Its state are the buffers."""

    def init(like: Any) -> Array:
        return jnp.zeros((buffers.inv_buf_decay.size, *like.shape), like.dtype)

    def step(z: Array, state: Array) -> tuple[Array, Array]:
        y = z + _weighted(buffers.inv_output_scale, state)
        decay = buffers.inv_buf_decay.astype(z.dtype)
        decay = decay.reshape(-1, *(1,) * z.ndim)
        return scale.astype(z.dtype) * y, decay * state + z

    return _streaming_matrix(init, step)


def with_rows_scaled(matrix: Any, factors: Float[Array, " n"]) -> Any:
    """A streaming matrix of so many rows, each multiplied by a factor."""

    def init(like: Any) -> tuple[Array, Any]:
        return jnp.array(0), matrix.init_multiply(like)

    def multiply_next(value: Any, state: tuple[Array, Any]) -> tuple[Any, Any]:
        t, inner = state
        y, inner = matrix.multiply_next(value, inner)
        scaled = jax.tree.map(lambda x: factors[t].astype(x.dtype) * x, y)
        return scaled, (t + 1, inner)

    return type(matrix)(init, multiply_next)


def by_rows(matrix: Float[Array, "n n"]) -> Any:
    """A lower-triangular matrix. Its state is all that has come so far."""

    def init(like: Any) -> tuple[Array, Array]:
        return jnp.array(0), jnp.zeros((len(matrix), *like.shape), like.dtype)

    def step(z: Array, state: tuple[Array, Array]) -> tuple[Array, Any]:
        t, inputs = state
        inputs = inputs.at[t].set(z)
        return _weighted(matrix[t], inputs), (t + 1, inputs)

    return _streaming_matrix(init, step)


def _weighted(weights: Array, vectors: Array) -> Array:
    # (Not by a product of matrices, which has fewer digits on some devices.)
    weights = weights.astype(vectors.dtype)
    return jnp.sum(weights.reshape(-1, *(1,) * (vectors.ndim - 1)) * vectors, axis=0)


def _streaming_matrix(init: Callable[[Any], Any], step: _Step) -> Any:
    try:
        from jax_privacy.matrix_factorization.streaming_matrix import StreamingMatrix
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            "A streaming matrix is one of jax-privacy's: pip install "
            "'jaxmf_opt[privacy]'"
        ) from e

    def multiply_next(value: Any, state: Any) -> tuple[Any, Any]:
        leaves, treedef = jax.tree.flatten(value)
        stepped = [
            step(x, s)
            for x, s in zip(leaves, treedef.flatten_up_to(state), strict=True)
        ]
        ys, states = zip(*stepped, strict=True)
        return treedef.unflatten(ys), treedef.unflatten(states)

    return StreamingMatrix(lambda like: jax.tree.map(init, like), multiply_next)
