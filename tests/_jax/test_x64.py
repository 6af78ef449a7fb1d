"""64-bit regions, on functions that have nothing to do with solving."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmf_opt import jax_enable_x64
from jaxmf_opt._jax.region import x64_region


def of_arrays(a: jax.Array, v: jax.Array, *, power: int = 2) -> dict[str, Any]:
    exact = jnp.linalg.solve(a.astype(float), v.astype(float)) ** power
    return {"value": exact.astype(v.dtype), "dtype": str(exact.dtype), "none": None}


class TestTransformedJaxEnableX64:
    """The decorator on a function of arrays, in a float32 program."""

    call = staticmethod(jax_enable_x64(of_arrays))

    def solve(self, a: jax.Array, v: jax.Array) -> jax.Array:
        out = self.call(a, v, power=3)
        assert out["dtype"] == "float64"
        assert out["none"] is None
        return out["value"]

    @pytest.mark.parametrize("inner", [jax.jit, jax.checkpoint])
    def test_values_and_derivatives(self, inner: Any):
        a, v = jnp.float32(A), jnp.float32(V)
        with jax.enable_x64():
            want = jnp.linalg.solve(A, V) ** 3
            slope = jax.grad(lambda v: jnp.sum(jnp.linalg.solve(A, v) ** 3))(V)
        fn = inner(self.solve)
        got = jax.jit(jax.vmap(fn))(a[None], v[None])[0]
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-6)
        grad = jax.grad(lambda v: fn(a, v).sum())
        np.testing.assert_allclose(grad(v), slope, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(grad)(v), slope, rtol=1e-6)

    def test_nothing_but_the_setting_changes_for_a_plain_call(self):
        seen = []

        @jax_enable_x64
        def fn(x: jax.Array) -> float:
            seen.append(x)
            return float(x.sum())  # not possible with a tracer

        x = jnp.ones(3)
        assert fn(x) == 3.0
        assert seen[0] is x


A = np.array([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]])
V = np.array([0.3, 1.2, 0.7])


class TestJaxEnableX64:
    def test_runs_in_64_bit_and_restores(self, x64: bool):
        assert jax_enable_x64(lambda: jnp.zeros(1).dtype)() == jnp.float64
        assert jnp.zeros(1).dtype == (jnp.float64 if x64 else jnp.float32)

    def test_hands_on_exceptions_and_restores(self):
        error = ValueError("mine")

        def fails():
            raise error

        with pytest.raises(ValueError) as caught:
            jax_enable_x64(fails)()
        assert caught.value is error
        assert jnp.zeros(1).dtype == jnp.float32

    def test_keeps_name_docstring_and_signature(self):
        def fn(a: int, *, b: str = "x") -> None:
            """Says what it does."""

        wrapped = jax_enable_x64(fn)
        assert wrapped.__name__ == "fn"
        assert wrapped.__doc__ == "Says what it does."
        assert inspect.signature(wrapped) == inspect.signature(fn)

    def test_refuses_what_is_not_callable(self):
        with pytest.raises(TypeError):  # of the annotation, where it is checked
            jax_enable_x64(3)  # pyright: ignore[reportArgumentType]


FUNCTIONS = {
    "polynomial": lambda a, v: a @ v**3,
    "scan": lambda a, v: jax.lax.scan(lambda c, x: (c * x, c), 1.0, a @ v)[1],
    "pad": lambda a, v: jnp.pad(v, 2) * v.sum(),
    "convolve": lambda a, v: jnp.convolve(v, a[0]),
    "solve": lambda a, v: jnp.linalg.solve(a, v),
    "cholesky": lambda a, v: jnp.linalg.cholesky(a) @ v,
    "fft": lambda a, v: jnp.fft.fft(v).real * v,
    "scatter at argmax": lambda a, v: v.at[jnp.argmax(v)].multiply(3.0) @ a,
    "random": lambda a, v: jax.random.normal(jax.random.key(0), v.shape) * v,
    "cond": lambda a, v: jax.lax.cond(v[0] > 0, jnp.sin, jnp.cos, v),
    "while": lambda a, v: jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) + i, v),
}
TRANSFORMATIONS = {
    "vmap": lambda f: lambda a, v: jax.vmap(f)(a[None], v[None])[0],
    "vmap of jit": lambda f: lambda a, v: jax.vmap(jax.jit(f))(a[None], v[None])[0],
    "vmap, one operand": lambda f: (
        lambda a, v: jax.vmap(f, in_axes=(None, 0))(a, v[None])[0]
    ),
    "scan": lambda f: (
        lambda a, v: jax.lax.scan(lambda _, x: (None, f(a, x)), None, v[None])[1][0]
    ),
    "jacfwd": jax.jacfwd,
    "jacrev of jit": lambda f: jax.jacrev(jax.jit(f), argnums=1),
    "jit of vmap of grad": lambda f: jax.jit(
        lambda a, v: jax.vmap(jax.grad(lambda a, v: f(a, v).sum(), 1))(a[None], v[None])
    ),
}


REVERSE = ("jacrev of jit", "jit of vmap of grad")
# Each function under every fourth transformation, and each transformation of a few.
CELLS = [
    (f, t)
    for i, f in enumerate(FUNCTIONS)
    for j, t in enumerate(TRANSFORMATIONS)
    if (i + j) % 4 == 0
    and not (f == "while" and t in REVERSE)  # JAX has no transpose of a while loop
]


@pytest.mark.parametrize(("function", "transformation"), CELLS)
def test_region_equals_64_bit_jax(function: str, transformation: str):
    f, transform = FUNCTIONS[function], TRANSFORMATIONS[transformation]
    with jax.enable_x64():
        want = np.asarray(transform(f)(jnp.asarray(A), jnp.asarray(V)))

    def in_float32_program(a: jax.Array, v: jax.Array) -> jax.Array:
        def exact(a: jax.Array, v: jax.Array) -> jax.Array:
            return f(a.astype(jnp.float64), v.astype(jnp.float64)).astype(jnp.float32)

        return x64_region(exact, a, v)

    a, v = jnp.asarray(A, jnp.float32), jnp.asarray(V, jnp.float32)
    got = transform(in_float32_program)(a, v)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_region_computes_in_float64():
    # 1e-12 is lost next to 1 in float32.
    def f(x: jax.Array) -> jax.Array:
        return ((x.astype(jnp.float64) + 1e-12) - x.astype(jnp.float64)) * 1e12

    out = jax.vmap(jax.jit(lambda x: x64_region(f, x)))(jnp.ones(2))
    np.testing.assert_allclose(out, 1.0, rtol=1e-3)


def test_numpy_float64_operands_are_not_rounded():
    exact = np.float64(1) / 3
    assert x64_region(lambda x: x == np.float64(1) / 3, exact)


def test_closed_over_tracers_are_operands():
    def f(c: jax.Array) -> jax.Array:
        return x64_region(lambda x: jnp.sum(c * x**2), jnp.arange(3.0))

    np.testing.assert_allclose(jax.grad(f)(2.0), 5.0)
    np.testing.assert_allclose(jax.jit(jax.grad(f))(2.0), 5.0)
    np.testing.assert_allclose(jax.vmap(f)(jnp.array([1.0, 2.0])), [5.0, 10.0])
