"""Batched linear algebra runs one matrix at a time, and cannot wait for ever."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmf_opt import jax_enable_x64, optimize, solve
from jaxmf_opt._jax.compat import LAPACK_CAN_HANG
from jaxmf_opt._jax.lapack import compile_one_by_one, evaluate_one_by_one
from jaxmf_opt.mechanisms import Dense
from jaxmf_opt.sweeps import sweep

N, LANES = 24, 8

LAPACK_CALLS_OF_INV = 3

needed = pytest.mark.skipif(not LAPACK_CAN_HANG, reason="this jaxlib does not wait")


def matrices(*batch: int, dtype: Any = "float32") -> jax.Array:
    x = jax.random.normal(jax.random.key(0), (*batch, N, N), dtype)
    return x + N * jnp.broadcast_to(jnp.eye(N), x.shape)


def symmetric(x: jax.Array) -> jax.Array:
    return x + x.swapaxes(-1, -2)


def tridiagonal(x: jax.Array) -> Any:
    return jax.lax.linalg.tridiagonal_solve(x[..., 0], x[..., 1] + N, x[..., 2], x)


FUNCTIONS: dict[str, Any] = {
    "cholesky": lambda x: jnp.linalg.cholesky(symmetric(x)),
    "complex": lambda x: jnp.linalg.inv(jax.lax.complex(x, x)),
    "det": jnp.linalg.det,
    "eig": jnp.linalg.eig,
    "eigh": lambda x: jnp.linalg.eigh(symmetric(x)),
    "expm": jax.scipy.linalg.expm,
    "hessenberg": jax.scipy.linalg.hessenberg,
    "inv": jnp.linalg.inv,
    "lstsq": lambda x: jnp.linalg.lstsq(x[:, :3], x[:, 3])[0],
    "qr": jnp.linalg.qr,
    "schur": jax.scipy.linalg.schur,
    "solve": lambda x: jnp.linalg.solve(x, x[:, 0]),
    "svd": jnp.linalg.svd,
    "triangular": lambda x: jax.scipy.linalg.solve_triangular(x, x, lower=True),
    "tridiagonal": tridiagonal,
}


def kernels_of_batches(text: str) -> list[str]:
    """The calls of LAPACK in a program for more than one large matrix."""
    calls = [line for line in text.splitlines() if "custom_call @lapack" in line]
    assert calls
    return [
        line
        for line in calls
        if f"{LANES}x{N}" in line or f"{LANES // 2}x2x{N}" in line
    ]


@needed
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_batch_is_done_one_by_one(name: str):
    fn = jax.vmap(jax.vmap(FUNCTIONS[name]))
    x = matrices(LANES // 2, 2)
    in_turn = jax.jit(evaluate_one_by_one(jax.make_jaxpr(fn)(x)))
    assert kernels_of_batches(jax.jit(fn).lower(x).as_text())
    assert not kernels_of_batches(in_turn.lower(x).as_text())
    want = jax.tree.leaves(jax.jit(fn)(x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b), in_turn(x), want)


def loss(x: jax.Array, t: jax.Array) -> jax.Array:
    x = x - t.astype(x.dtype)
    return jnp.sum(x**2) + jnp.sum(jnp.linalg.inv(matrices(dtype=x.dtype) + 0.1 * x))


def solved(x: jax.Array, t: Any) -> jax.Array:
    return optimize(lambda x: loss(x, t), x, max_optimizer_steps=2)


def gradient(x: jax.Array, t: Any) -> jax.Array:
    return jax.grad(lambda t: jnp.sum(solved(x, t)))(t)


def called_back(x: jax.Array, t: Any) -> jax.Array:
    return optimize(
        lambda x: loss(x, t), x, max_optimizer_steps=2, callback=lambda _: False
    )


def in_region(x: jax.Array, t: Any) -> jax.Array:
    return jax_enable_x64(jnp.linalg.inv)(x + t * matrices()).astype(x.dtype)


@needed
@pytest.mark.parametrize("fn", [solved, gradient, called_back, in_region])
def test_programs_of_the_library_have_no_batched_kernels(fn: Callable[..., Any]):
    x, t = jnp.zeros((LANES, N, N)), jnp.linspace(0.1, 0.2, LANES)

    def outside_too(x: jax.Array, t: jax.Array) -> Any:
        # What the user's program has lowered before is not taken over.
        return fn(x, t), jnp.linalg.inv(x)

    text = jax.jit(jax.vmap(outside_too)).lower(x, t).as_text()
    batched = kernels_of_batches(text)
    assert len(batched) == LAPACK_CALLS_OF_INV


@needed
def test_of_a_batch_in_an_eager_loss():
    def batch(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.linalg.inv(x)) + jnp.sum((x - 1) ** 2)

    program = compile_one_by_one(batch)
    assert not kernels_of_batches(program.lower(matrices(LANES)).as_text())
    with jax.disable_jit():
        np.testing.assert_allclose(program(matrices(LANES)), batch(matrices(LANES)))
    solution = solve(batch, matrices(LANES), max_optimizer_steps=2)
    assert jnp.isfinite(solution.stats["loss"])


@needed
def test_of_dense_mechanisms_in_a_sweep(monkeypatch: pytest.MonkeyPatch):
    texts: list[str] = []
    from jaxmf_opt.sweeps import _batch

    digest = _batch.digest_of
    monkeypatch.setattr(
        _batch, "digest_of", lambda *x: texts.append(x[0]) or digest(*x)
    )
    sweep(
        lambda x, sep: Dense(
            N, min_sep=sep, equal_norm=True, bands=2
        ).loss_and_gradient(x),
        Dense(N).initial_params(),
        jnp.full(LANES, 3),
        grad=True,
        max_optimizer_steps=1,
        batch_size=LANES,
    )
    assert any("custom_call @lapack" in text for text in texts)
    assert not any(map(kernels_of_batches, filter(lambda t: "@lapack" in t, texts)))


@needed
def test_of_dense_mechanisms_in_programs_of_the_user():
    dense = Dense(N, min_sep=4, max_participations=6)
    grams = jnp.stack([dense.initial_params()] * LANES)

    @jax.jit
    @jax.vmap
    def all_of_it(gram: jax.Array) -> Any:
        slope = jax.grad(lambda gram: dense.loss_and_gradient(gram)[0])(gram)
        errors, noising = dense.per_query_error(gram), dense.noising_matrix(gram)
        return dense.loss_and_gradient(gram), slope, errors, noising

    assert not kernels_of_batches(all_of_it.lower(grams).as_text())
