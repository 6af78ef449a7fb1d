"""Noising matrices as jax-privacy takes them, one step of training after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._setup import steps

_Step = Callable[[Array, Any], tuple[Array, Any]]


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


def by_buffers(
    decays: Float[Array, " buffers"],
    weights: Float[Array, " buffers"],
    scale: Float[Array, ""],
) -> Any:
    """A multiple of a BLT of such buffers. Its state are they."""

    def init(like: Any) -> Array:
        return jnp.zeros((decays.size, *like.shape), like.dtype)

    def step(z: Array, state: Array) -> tuple[Array, Array]:
        y = z + _weighted(weights, state)
        decay = decays.astype(z.dtype).reshape(-1, *(1,) * z.ndim)
        return scale.astype(z.dtype) * y, decay * state + z

    return _streaming_matrix(init, step)


def with_rows_scaled(matrix: Any, factors: Float[Array, " n"]) -> Any:
    """A streaming matrix of so many rows, each multiplied by a factor; then NaN."""

    def init(like: Any) -> tuple[Array, Any]:
        return jnp.array(0), matrix.init_multiply(like)

    def multiply_next(value: Any, state: tuple[Array, Any]) -> tuple[Any, Any]:
        t, inner = state
        y, inner = matrix.multiply_next(value, inner)
        scaled = jax.tree.map(lambda x: _row(factors, t).astype(x.dtype) * x, y)
        return scaled, (t + 1, inner)

    return type(matrix)(init, multiply_next)


def by_substitution(
    matrix: Float[Array, "n n"], bands: int, scale: Float[Array, ""]
) -> Any:
    """A multiple of the inverse of a lower-triangular matrix with so many bands.

    Its state are the last `bands - 1` vectors that it has given. From row `n` on it
    gives NaN.
    """
    kept = steps(bands - 1)
    column = steps(len(matrix))[:, None] - 1 - kept[None, :]
    rows = jnp.take_along_axis(matrix, jnp.maximum(column, 0), axis=1)
    rows = jnp.where(column >= 0, rows, 0.0) / jnp.diag(matrix)[:, None]
    factors = scale / jnp.diag(matrix)

    def init(like: Any) -> tuple[Array, Array]:
        return jnp.array(0), jnp.zeros((kept.size, *like.shape), like.dtype)

    def step(z: Array, state: tuple[Array, Array]) -> tuple[Array, Any]:
        t, outputs = state
        factor = _row(factors, t).astype(z.dtype)
        y = factor * z - _weighted(_row(rows, t), outputs)
        return y, (t + 1, jnp.concatenate([y[None], outputs])[: kept.size])

    return _streaming_matrix(init, step)


def _row(matrix: Array, t: Array) -> Array:
    # (Not the last row again, which would be no new noise.)
    return matrix.at[t].get(mode="fill", fill_value=jnp.nan)


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

    return StreamingMatrix.from_array_implementation(init, step)
