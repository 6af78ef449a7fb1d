"""Which transformations does a solve work under? Ours beside that of jax-privacy 2.0.0.

The minimum of cosh(y - c) for a float32 array c, in a float32 program and in a float64
one: "yes" where the result (or derivative) is right, to 1e-4; else the exception, or
what came out.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_privacy.matrix_factorization import optimization as upstream

import jaxmf_opt

Solve = Callable[[Any], Any]
C = np.array([0.5, -1.0], np.float32)
STEPS = 12


def _solve(optimize: Callable[..., Any]) -> Solve:
    def minimum(c: Any) -> Any:
        return optimize(
            lambda y: jnp.sum(jnp.cosh(y - c)),
            jnp.zeros(2, jnp.float32),
            max_optimizer_steps=STEPS,
        )

    return minimum


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]), ("i",))


def _eye(f: Solve) -> Any:
    """The Jacobian less what it should be, where the result should be C."""
    return f(jnp.asarray(C)) - np.eye(2) + C[:, None]


def _hessian(f: Solve) -> Any:
    """That of the sum of squares of the minimum, likewise."""
    of_square = jax.hessian(lambda c: jnp.sum(f(c) ** 2))(jnp.asarray(C))
    return of_square - 2 * np.eye(2) + C[:, None]


def _custom(f: Solve) -> Any:
    @jax.custom_vjp
    def g(c: Any) -> Any:
        return f(c)

    g.defvjp(lambda c: (f(c), None), lambda _, ct: (ct,))
    value, pull = jax.vjp(g, jnp.asarray(C))
    pull(value)
    return value


WAYS: dict[str, Callable[[Solve], Any]] = {
    "nothing": lambda f: f(C),
    "jit": lambda f: jax.jit(f)(C),
    "vmap": lambda f: jax.vmap(f)(C[None])[0],
    "jit(vmap)": lambda f: jax.jit(jax.vmap(f))(C[None])[0],
    "vmap(jit)": lambda f: jax.vmap(jax.jit(f))(C[None])[0],
    "lax.map": lambda f: jax.lax.map(f, jnp.asarray(C[None]))[0],
    "vmap(lax.map)": lambda f: jax.vmap(lambda c: jax.lax.map(f, c))(
        jnp.asarray(C[None, None])
    )[0, 0],
    "cond": lambda f: jax.lax.cond(True, f, lambda c: c * 0, jnp.asarray(C)),
    "while_loop": lambda f: jax.lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, f(C)), (0, jnp.zeros(2, jnp.float32))
    )[1],
    "jacfwd": lambda f: _eye(jax.jacfwd(f)),
    "jacrev": lambda f: _eye(jax.jacrev(f)),
    "jacrev(jit)": lambda f: _eye(jax.jacrev(jax.jit(f))),
    "hessian": _hessian,
    "checkpoint": lambda f: _eye(jax.jacrev(jax.checkpoint(f))),
    "custom_vjp": _custom,
    "shard_map": lambda f: jax.jit(
        jax.shard_map(jax.vmap(f), mesh=_mesh(), in_specs=P("i"), out_specs=P("i"))
    )(C[None])[0],
    "NamedSharding": lambda f: jax.jit(jax.vmap(f))(
        jax.device_put(C[None], NamedSharding(_mesh(), P("i")))
    )[0],
    "export": lambda f: jax.export.export(jax.jit(f))(
        jax.ShapeDtypeStruct((2,), jnp.float32)
    ).call(C),
}


def outcome(way: str, optimize: Callable[..., Any]) -> str:
    """What comes of a solve under a transformation."""
    try:
        got = np.asarray(WAYS[way](_solve(optimize)))
    except Exception as e:
        return type(e).__name__
    if not np.isfinite(got).all():
        return "NaN"
    want = np.broadcast_to(C[:, None] if got.ndim == 2 else C, got.shape)
    return "yes" if np.allclose(got, want, atol=1e-4) else f"wrong: {got.tolist()}"


def main() -> None:
    warnings.simplefilter("ignore")
    heads = ("jax-privacy, float32", "float64", "ours, float32", "float64")
    print(f"{'':16} " + " ".join(f"{head:22}" for head in heads))
    for way in WAYS:
        cells = []
        for optimize in (upstream.optimize, jaxmf_opt.optimize):
            for x64 in (False, True):
                with jax.enable_x64(x64):
                    cells.append(outcome(way, optimize))
        print(f"{way:16} " + " ".join(f"{cell:22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
