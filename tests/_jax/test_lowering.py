"""Operations that JAX lowers by tracing functions of its own.

Lowering comes after tracing. A rule that builds an index or a constant then must see
the 64-bit setting too, or int32 and float32 end up in a 64-bit program. Which rules do
so changes from one release of JAX to the next, so here are many of them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
import pytest
from jax import lax

from jaxmf_opt._jax.region import x64_region

pytestmark = pytest.mark.mixes  # operations that mix types

Array = jax.Array
Operation = Callable[[Array, Array], Any]

MATRIX = np.array([[4, 1, 0.5], [1, 3, 0.25], [0.5, 0.25, 2]], np.float32)
VECTOR = np.array([0.75, 1.25, 0.5], np.float32)
KEY = functools.partial(jax.random.key, 7)  # a key needs a device: not at import
BIG = 2**40  # an integer that int32 cannot hold


def first(outputs: Any) -> Any:
    return outputs[0]


def newton_root(v: Array) -> Array:
    """The square root of an element of `v`, as a custom root."""

    def solve(f: Callable[[Array], Array], x: Array) -> Array:
        return lax.fori_loop(0, 20, lambda _, x: x - f(x) / (2 * x), x)

    def residual(x: Array) -> Array:
        return x * x - v[1]

    return lax.custom_root(
        residual, jnp.ones_like(v[1]), solve, lambda g, y: y / g(jnp.ones_like(y))
    )


REDUCTIONS: dict[str, Operation] = {
    "argmax": lambda a, v: jnp.argmax(v),
    "argmin, axis": lambda a, v: jnp.argmin(a, axis=1),
    "cumsum": lambda a, v: jnp.cumsum(a, axis=0),
    "cumprod": lambda a, v: jnp.cumprod(v),
    "cummax, reverse": lambda a, v: lax.cummax(v, reverse=True),
    "cumlogsumexp": lambda a, v: lax.cumlogsumexp(v),
    "logsumexp": lambda a, v: jsp.special.logsumexp(a, axis=0),
    "softmax": lambda a, v: jax.nn.softmax(a),
    "median": lambda a, v: jnp.median(a),
    "quantile": lambda a, v: jnp.quantile(v, 0.3),
    "var": lambda a, v: jnp.var(a, axis=1, ddof=1),
    "reduce_window": lambda a, v: lax.reduce_window(
        v, 0.0, lax.add, (2,), (1,), "SAME"
    ),
    "associative_scan": lambda a, v: lax.associative_scan(jnp.multiply, v),
    "segment_sum": lambda a, v: jax.ops.segment_sum(v, jnp.array([1, 0, 1]), 2),
}
INDEXING: dict[str, Operation] = {
    "sort": lambda a, v: jnp.sort(v, descending=True),
    "argsort": lambda a, v: jnp.argsort(v),
    "sort, two keys": lambda a, v: first(lax.sort((v, v[::-1]), num_keys=2)),
    "top_k": lambda a, v: lax.top_k(v, 2)[1],
    "approx_max_k": lambda a, v: first(lax.approx_max_k(v, 2)),
    "searchsorted": lambda a, v: jnp.searchsorted(jnp.sort(v), 0.2),
    "interp": lambda a, v: jnp.interp(0.3, jnp.sort(v), v),
    "unique": lambda a, v: jnp.unique(a, size=6, fill_value=0.1),
    "histogram": lambda a, v: first(jnp.histogram(v, bins=3)),
    "gather": lambda a, v: a[jnp.array([0, 2]), jnp.array([1, 1])],
    "take_along_axis": lambda a, v: jnp.take_along_axis(v, jnp.argsort(v), 0),
    "dynamic_slice": lambda a, v: lax.dynamic_slice(v, (jnp.argmin(v),), (1,)),
    "dynamic_update_slice": lambda a, v: lax.dynamic_update_slice(
        a, v[None], (jnp.argmax(v), 0)
    ),
    "scatter": lambda a, v: v.at[jnp.argmax(v)].set(0.1),
    "scatter-add": lambda a, v: v.at[jnp.array([0, 0, 2])].add(a[1]),
    "scatter-min": lambda a, v: a.at[:, 1].min(v),
    "roll": lambda a, v: jnp.roll(a, 1, axis=1),
    "toeplitz": lambda a, v: jsp.linalg.toeplitz(v),
    "pad": lambda a, v: jnp.pad(v, 2, mode="reflect"),
    "nonzero": lambda a, v: first(jnp.nonzero(v > 0.2, size=3)),
}
INTEGERS: dict[str, Operation] = {
    "arange": lambda a, v: jnp.arange(5) * v[0],
    "large iota": lambda a, v: jnp.sum(jnp.arange(3) * BIG / BIG * v),
    "to int64": lambda a, v: (v * BIG).astype(jnp.int64) % 1000,
    "population_count": lambda a, v: lax.population_count(jnp.uint64(BIG + 1)) + v,
    "clz": lambda a, v: lax.clz((v * BIG).astype(jnp.int64)),
    "bitcast": lambda a, v: lax.bitcast_convert_type(v, jnp.uint64),
    "nextafter": lambda a, v: jnp.nextafter(v, 9.0),
    "round": lambda a, v: jnp.round(v, 9),
    "mod": lambda a, v: v % 0.3,
    "power": lambda a, v: v**3 + 2.0**v + v**v,
    "frexp": lambda a, v: first(jnp.frexp(v)),
}
LINEAR_ALGEBRA: dict[str, Operation] = {
    "einsum": lambda a, v: jnp.einsum("ij,j,k->ik", a, v, v),
    "convolve": lambda a, v: jnp.convolve(v, a[0]),
    "fft": lambda a, v: jnp.fft.fft(v).imag,
    "irfft": lambda a, v: jnp.fft.irfft(v, n=5),
    "solve": lambda a, v: jnp.linalg.solve(a, v),
    "inv": lambda a, v: jnp.linalg.inv(a),
    "pinv": lambda a, v: jnp.linalg.pinv(a),
    "lstsq": lambda a, v: first(jnp.linalg.lstsq(a, v)),
    "cholesky": lambda a, v: jnp.linalg.cholesky(a),
    "cho_solve": lambda a, v: jsp.linalg.cho_solve(jsp.linalg.cho_factor(a), v),
    "solve_triangular": lambda a, v: jsp.linalg.solve_triangular(a, v, lower=True),
    "lu": lambda a, v: jsp.linalg.lu(a)[2],
    "qr": lambda a, v: jnp.abs(jnp.linalg.qr(a)[1]),
    "svd": lambda a, v: jnp.linalg.svd(a, compute_uv=False),
    "eigh": lambda a, v: first(jnp.linalg.eigh(a)),
    "slogdet": lambda a, v: jnp.linalg.slogdet(a)[1],
    "expm": lambda a, v: jsp.linalg.expm(a),
    "cg": lambda a, v: first(jsp.sparse.linalg.cg(a, v, tol=1e-14)),
}
SPECIAL: dict[str, Operation] = {
    "gammainc": lambda a, v: jsp.special.gammainc(v, v),
    "gammaln": lambda a, v: jsp.special.gammaln(v),
    "betainc": lambda a, v: jsp.special.betainc(v, v, v / 2),
    "digamma": lambda a, v: jsp.special.digamma(v),
    "zeta": lambda a, v: jsp.special.zeta(1 + v, v),
    "ndtri": lambda a, v: jsp.special.ndtri(v / 2),
    "erfinv": lambda a, v: jsp.special.erfinv(v / 2),
    "i0": lambda a, v: jsp.special.i0(v),
    "xlogy": lambda a, v: jsp.special.xlogy(v, v),
}
RANDOM: dict[str, Operation] = {
    "bits": lambda a, v: jax.random.bits(KEY(), (3,)),
    "uniform": lambda a, v: jax.random.uniform(KEY(), (3,)) + v,
    "normal": lambda a, v: jax.random.normal(KEY(), (3,)) + v,
    "randint": lambda a, v: jax.random.randint(KEY(), (3,), 0, BIG),
    "permutation": lambda a, v: jax.random.permutation(KEY(), v),
    "categorical": lambda a, v: jax.random.categorical(KEY(), a),
    "gamma": lambda a, v: jax.random.gamma(KEY(), v),
    "split": lambda a, v: jax.random.normal(jax.random.split(KEY())[1], (3,)),
}
CONTROL_FLOW: dict[str, Operation] = {
    "scan": lambda a, v: lax.scan(lambda c, x: (c + x, c), 0.0, v)[1],
    "fori_loop": lambda a, v: lax.fori_loop(0, 3, lambda i, x: x * 1.1 + i, v),
    "while_loop": lambda a, v: lax.while_loop(lambda x: x[0] < 9, lambda x: x * 2, v),
    "map": lambda a, v: lax.map(lambda x: x / 3, v),
    "cond": lambda a, v: lax.cond(v[0] > 0, jnp.sin, jnp.cos, v),
    "switch": lambda a, v: lax.switch(jnp.argmax(v), [jnp.sin, jnp.cos, jnp.tan], v),
    "custom_root": lambda a, v: newton_root(v),
    "jit": lambda a, v: jax.jit(lambda x: x.at[jnp.argmin(x)].add(0.1))(v),
    "vmap": lambda a, v: jax.vmap(lambda r: r[jnp.argmax(r)])(a),
    "grad": lambda a, v: jax.grad(lambda v: jnp.sum(jnp.cumprod(v) * v))(v),
    "grad of sort": lambda a, v: jax.grad(lambda v: jnp.sort(v)[1] ** 2)(v),
    "jacfwd": lambda a, v: jax.jacfwd(lambda v: jnp.linalg.solve(a, v) @ v)(v),
    "hessian": lambda a, v: jax.hessian(lambda v: jnp.sum(jnp.cumsum(v) ** 3))(v),
}
# Evaluated group by group: one program costs much less than its operations one by one.
GROUPS = {
    "reductions": REDUCTIONS,
    "indexing": INDEXING,
    "integers": INTEGERS,
    "linear algebra": LINEAR_ALGEBRA,
    "special": SPECIAL,
    "random": RANDOM,
    "control flow": CONTROL_FLOW,
}


def together(operations: Mapping[str, Operation]) -> Callable[[Array, Array], Any]:
    def fn(a: Array, v: Array) -> dict[str, Any]:
        # Thirds are no float32 numbers: rounding shows even where data only moves.
        a, v = a.astype(jnp.float64) / 3, v.astype(jnp.float64) / 3
        return {name: operation(a, v) for name, operation in operations.items()}

    return fn


def jit(fn: Callable[..., Any]) -> Any:
    return jax.jit(functools.partial(x64_region, fn))(MATRIX, VECTOR)


def jit_of_vmap(fn: Callable[..., Any]) -> Any:
    many = jax.jit(jax.vmap(functools.partial(x64_region, fn)))
    out = many(*(np.stack([x, x]) for x in (MATRIX, VECTOR)))
    return {name: np.asarray(x)[1] for name, x in out.items()}


WAYS = {"jit": jit, "jit of vmap": jit_of_vmap}


@functools.cache
def in_64_bit_jax(group: str) -> dict[str, np.ndarray]:
    with jax.enable_x64():
        program = jax.jit(together(GROUPS[group]))
        return jax.tree.map(np.asarray, program(MATRIX, VECTOR))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group", GROUPS)
def test_equals_64_bit_jax(group: str, way: str):
    got = WAYS[way](together(GROUPS[group]))
    for name, want in in_64_bit_jax(group).items():
        assert got[name].dtype == want.dtype, name
        np.testing.assert_allclose(
            got[name], want, rtol=1e-13, atol=1e-14, err_msg=name
        )


def test_floating_point_results_are_float64():
    # Or the comparison would say nothing about precision. (Some indices of JAX's own
    # are int32 even in a 64-bit program.)
    dtypes = [x.dtype for group in GROUPS for x in in_64_bit_jax(group).values()]
    floats = [d for d in dtypes if np.issubdtype(d, np.floating)]
    assert set(floats) == {np.dtype(np.float64)}
    assert len(floats) > 60
