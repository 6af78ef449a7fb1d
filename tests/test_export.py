"""Solves in programs that are staged, exported, compiled ahead, or that branch."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxmf_opt
from jaxmf_opt import ROBUST_OPTIMIZER, solve

# Programs of it are small.
optimize = functools.partial(jaxmf_opt.optimize, optimizer=optax.sgd(0.08))

ROWS = np.arange(9, dtype=np.float32).reshape(3, 3) / 4
WEIGHTS = np.cos(np.arange(9, dtype=np.float32)).reshape(3, 3)
MORE = np.arange(15, dtype=np.float32).reshape(5, 3) / 16


def minimum(c: jax.Array) -> jax.Array:
    """Something like `sin(c)`, as the minimum of a loss."""
    centre = jnp.sin(c)

    def loss(x: jax.Array) -> jax.Array:
        weights, away = jnp.arange(1.0, x.size + 1), x - centre.astype(x.dtype)
        return jnp.sum(weights * away**2) + jnp.sum(away**4)

    return optimize(loss, jnp.zeros(c.shape))


def gradient(c: jax.Array) -> jax.Array:
    return jax.grad(lambda c: jnp.sum(jax.vmap(minimum)(c) * WEIGHTS))(c)


def close(got: Any, want: Any) -> None:
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


# Calls what it finds in a directory, without the library. `pullback` is differentiated
# there: its derivative was exported with it.
READER = """
import pathlib, sys
import jax, jax.export, jax.numpy as jnp, numpy as np

directory = pathlib.Path(sys.argv[1])
assert not jax.config.jax_enable_x64
weights = np.load(directory / "weights.npy")
inputs, outputs = np.load(directory / "inputs.npz"), {}
for name in inputs.files:
    blob = bytearray((directory / name).read_bytes())
    program = jax.export.deserialize(blob)
    x = jnp.asarray(inputs[name])
    if name == "pullback":
        outputs[name] = jax.grad(lambda x: jnp.sum(program.call(x) * weights))(x)
    else:
        outputs[name] = program.call(x)
    if name == "symbolic":
        outputs["symbolic, one row"] = program.call(x[:1])
assert "jaxmf_opt" not in sys.modules
np.savez(directory / "outputs.npz", **outputs)
"""


class Exported(NamedTuple):
    """A function, what it is exported for and called with, and what it must return."""

    fn: Callable[..., Any]
    rows: int | str
    x: np.ndarray
    want: np.ndarray


EXPORTED = {
    "value": Exported(jax.vmap(minimum), 3, ROWS, np.sin(ROWS)),
    "pullback": Exported(jax.vmap(minimum), 3, ROWS, np.cos(ROWS) * WEIGHTS),
    "symbolic": Exported(jax.vmap(minimum), "n", MORE, np.sin(MORE)),
    "symbolic gradient": Exported(
        lambda c: jax.grad(lambda c: jnp.sum(jax.vmap(minimum)(c)))(c),
        "2*n + 1",
        MORE,
        np.cos(MORE),
    ),
}
WANTED = {name: exported.want for name, exported in EXPORTED.items()}
WANTED["symbolic, one row"] = np.sin(MORE[:1])


def export(exported: Exported, *, vjp_order: int = 0, **kwargs: Any) -> bytes:
    shape = jax.export.symbolic_shape(f"{exported.rows}, 3")
    struct = jax.ShapeDtypeStruct(shape, np.float32)
    program = jax.export.export(jax.jit(exported.fn), **kwargs)(struct)
    return bytes(program.serialize(vjp_order=vjp_order))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What a process computes that has the exported programs only."""
    pytest.importorskip("flatbuffers")
    directory = tmp_path_factory.mktemp("exported")
    for name, exported in EXPORTED.items():
        blob = export(exported, vjp_order=int(name == "pullback"))
        (directory / name).write_bytes(blob)
    inputs: dict[str, Any] = {name: exported.x for name, exported in EXPORTED.items()}
    np.savez(directory / "inputs.npz", **inputs)
    np.save(directory / "weights.npy", WEIGHTS)
    return read_elsewhere(directory)


def read_elsewhere(directory: Path) -> dict[str, np.ndarray]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", READER, str(directory)],
        env=os.environ | {"JAX_ENABLE_X64": "0"},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(directory / "outputs.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", WANTED)
def test_exported_program_in_a_fresh_process(name: str, outputs: dict[str, np.ndarray]):
    close(outputs[name], WANTED[name])


@pytest.mark.parametrize("options", [{}, {"optimizer": ROBUST_OPTIMIZER}])
def test_a_number_of_parameters_that_is_symbolic(options: dict[str, Any]):
    def minimum(c: jax.Array) -> jax.Array:
        loss = lambda y, c: jnp.sum(jnp.cosh(y - jnp.sin(c).astype(y.dtype)))  # noqa: E731
        return solve(loss, jnp.zeros_like(c), c, **options).value

    struct = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n"), np.float32)
    program = jax.export.export(jax.jit(minimum))(struct)
    for n in (1, 5):
        close(program.call(np.arange(n, dtype=np.float32)), np.sin(np.arange(n)))


def test_export_for_several_platforms():
    pytest.importorskip("flatbuffers")
    blob = export(EXPORTED["value"], platforms=("cpu", "cuda", "tpu"))
    program = jax.export.deserialize(bytearray(blob))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert [a.dtype for a in (*program.in_avals, *program.out_avals)] == [
        np.dtype(np.float32)
    ] * 2
    if jax.default_backend() in program.platforms:
        close(program.call(ROWS), np.sin(ROWS))


def mixed(params: Any) -> Any:
    return optimize(
        lambda p: jnp.sum((p["a"] - 0.5) ** 2) + jnp.sum((p["b"][0] - 2.0) ** 2), params
    )


MIXED = {"a": np.ones(3, np.float16), "b": (np.ones((2, 1), np.float32),)}
DTYPES = {"a": np.dtype(np.float16), "b": (np.dtype(np.float32),)}


def dtypes(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.dtype, tree)


class TestStaging:
    """Tracing alone tells the types of the results, and they are the caller's."""

    def test_eval_shape(self, x64: bool):
        out = jax.eval_shape(mixed, MIXED)
        assert dtypes(out) == DTYPES
        assert jax.tree.map(np.shape, out) == jax.tree.map(np.shape, MIXED)

    def test_default_types_follow_the_setting(self, x64: bool):
        out = jax.eval_shape(minimum, jax.eval_shape(lambda: jnp.zeros(3)))
        assert out.dtype == (np.float64 if x64 else np.float32)


@jax.custom_vjp
def doubled_gradient(c: jax.Array) -> jax.Array:
    return minimum(c)


def _forward(c: jax.Array) -> tuple[jax.Array, jax.Array]:
    return minimum(c), c


def _backward(c: jax.Array, ct: jax.Array) -> tuple[jax.Array]:
    # Solves in the backward pass too: the result is twice the cotangent.
    return (
        optimize(
            lambda x: jnp.sum((x - 2 * ct.astype(x.dtype)) ** 2), jnp.zeros(ct.shape)
        ),
    )


doubled_gradient.defvjp(_forward, _backward)


def shrink(c: jax.Array) -> jax.Array:
    """Takes a number of steps that depends on the row."""

    def step(x: jax.Array) -> jax.Array:
        return optimize(lambda y: jnp.sum((y - x.astype(y.dtype) / 2) ** 2), x)

    return lax.while_loop(lambda x: jnp.max(jnp.abs(x)) > 0.8, step, c)


def shrunk(rows: np.ndarray) -> np.ndarray:
    steps = np.ceil(np.log2(np.max(np.abs(rows), axis=1, keepdims=True) / 0.8))
    return rows / 2 ** np.maximum(steps, 0)


def switch(c: jax.Array) -> jax.Array:
    index = (c[0] / 0.75).astype(int)  # of the rows: 0, 1, 2
    return lax.switch(index, [lambda c: -c, minimum, lambda c: minimum(3 * c)], c)


def switched(rows: np.ndarray) -> np.ndarray:
    return np.stack([-rows[0], np.sin(rows[1]), np.sin(3 * rows[2])])


def switched_slope(rows: np.ndarray) -> np.ndarray:
    return np.stack([-np.ones(3), np.cos(rows[1]), 3 * np.cos(3 * rows[2])])


def with_slope(fn: Callable[[jax.Array], jax.Array]) -> Callable[..., Any]:
    def both(c: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, pull_back = jax.vjp(fn, c)
        return value, pull_back(jnp.ones_like(value))[0]

    return both


# Functions of a row, and what they return for all rows.
INSIDE: dict[str, tuple[Callable[[jax.Array], Any], Any]] = {
    "switch": (with_slope(switch), (switched(ROWS), switched_slope(ROWS))),
    "while_loop": (shrink, shrunk(ROWS)),  # JAX has no transpose of it
    "custom_vjp": (
        with_slope(doubled_gradient),
        (np.sin(ROWS), np.full(ROWS.shape, 2.0)),
    ),
}


def check_rows(rows: Any, want: Any) -> None:
    jax.tree.map(close, rows, want)


@pytest.mark.parametrize("inside", INSIDE)
def test_inside_other_functions_and_vmap(inside: str):
    fn, want = INSIDE[inside]
    check_rows(jax.jit(jax.vmap(fn))(ROWS), want)


def test_rows_take_different_ways():
    # Or the tests above would not test what they say.
    assert (ROWS[:, 0] / 0.75).astype(int).tolist() == [0, 1, 2]
    assert len(set((shrunk(ROWS)[:, 2] / ROWS[:, 2]).tolist())) == 3


def test_filter_vmap_over_a_module():
    class Model(eqx.Module):
        centre: jax.Array
        name: str

        def __call__(self, scale: jax.Array) -> jax.Array:
            return minimum(self.centre * scale)

    models = Model(jnp.asarray(ROWS), "not an array")
    many = eqx.filter_vmap(lambda m, s: m(s), in_axes=(eqx.if_array(0), None))

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def grad(models: Model, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = many(models, scale)
        return jnp.sum(out), out

    grads, out = grad(models, jnp.float32(0.5))
    close(out, np.sin(ROWS / 2))
    close(grads.centre, np.cos(ROWS / 2) / 2)
