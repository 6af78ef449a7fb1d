"""What `test_meshes.py` checks inside a mesh: a script with a process of its own.

Printed is, as JSON, for each case None or why it failed.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmf_opt import optimize, solve
from jaxmf_opt.mechanisms import Dense
from jaxmf_opt.sweeps import sweep

ROWS = np.arange(32, dtype=np.float32).reshape(8, 4) / 16
ORIGIN = np.zeros(4, np.float32)  # of no mesh
STEPS = 4
OUTSIDE = jnp.arange(4.0)  # made before there is a mesh


def cases(rows: jax.Array) -> dict[str, Callable[[], Any]]:
    start, targets = jnp.zeros(4), np.arange(2, dtype=np.float32)
    # Some use L-BFGS; what is plain compiles in a third of the time.
    limit: Any = {"max_optimizer_steps": STEPS}
    plain: Any = {"optimizer": optax.sgd(0.05), **limit}

    def loss(x: Any, target: Any = 1.0) -> Any:
        return jnp.sum((rows @ x - target) ** 2) + jnp.sum(jnp.cosh(x))

    def minimum(target: Any, **options: Any) -> Any:
        return optimize(lambda x: loss(x, target), start, **(limit | options))

    def total(target: Any) -> Any:
        return jnp.sum(minimum(target, **plain))

    def of_data(rows: Any) -> Any:
        fit = lambda x: jnp.sum((rows @ x - 1) ** 2) + jnp.sum(x**4)  # noqa: E731
        return jnp.sum(optimize(fit, start, **plain))

    def tell(info: Any) -> bool:
        return info.step >= 2

    def in_python(target: Any) -> Any:
        return minimum(target, callback=tell, **plain)

    def resumed() -> Any:
        half = solve(loss, start, max_optimizer_steps=2, history=True)
        whole = solve(loss, start, state=half.state, **limit)
        return half.stats["history"].loss, whole.value

    def swept(**options: Any) -> Any:
        solution = sweep(loss, start, targets, **plain, **options)
        return solution.value, solution.stats["num_steps"]

    def from_outside(start: Any) -> Any:
        fit = lambda x: jnp.sum((x - OUTSIDE) ** 4)  # noqa: E731
        few = plain | {"max_optimizer_steps": 2}
        half = solve(fit, start, gtol=1e-9, **few)
        return solve(fit, start, state=half.state, gtol=1e-9, **plain).value

    def root(target: Any, start: Any = ORIGIN) -> Any:
        return optimize(lambda x: jnp.sum((x - target) ** 2), start, **plain)

    def of_lanes() -> Any:
        """Of lanes that are split, as the message says that they have to be."""
        fn = jax.vmap(jax.jacrev(root))
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            return fn(targets)
        split = NamedSharding(mesh, PartitionSpec("data"))
        lanes = jax.device_put(targets, split)
        for refused in (lambda: fn(lanes), lambda: root(1.0, lanes)):
            with pytest.raises(ValueError, match="auto_axes"):
                refused()
        return jax.sharding.auto_axes(fn, out_sharding=split)(lanes)

    dense = Dense(8)
    return {
        "jit of vmap": lambda: jax.jit(jax.vmap(minimum))(targets),
        "grad": lambda: jax.grad(total)(1.0),
        "lanes": of_lanes,
        "gradient of data": lambda: jax.jit(jax.grad(of_data))(rows),
        "callback, jit": lambda: jax.jit(in_python)(1.0),
        "history and state": resumed,
        "from outside": lambda: from_outside(OUTSIDE / 2),
        "sweep": swept,
        "sweep, callback, mesh": lambda: swept(
            callback=tell, mesh=jax.make_mesh((2,), ("lanes",))
        ),
        "dense": lambda: optimize(
            dense.loss_and_gradient, dense.initial_params(), grad=True, **plain
        ),
    }


def arrays_of(fn: Callable[[], Any]) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(fn())]


# The type of the axis, its devices, whether the data is split over it, and which cases:
# None for all.
MESHES = (
    ("Explicit", 2, "data", None),
    ("Explicit", 1, "data", ("jit of vmap",)),
    ("Explicit", 2, None, ("sweep",)),
    ("Explicit", 4, "data", ("callback, jit",)),
    ("Auto", 2, "data", ("gradient of data", "callback, jit", "sweep")),
)


def main() -> None:
    want = {name: arrays_of(fn) for name, fn in cases(jnp.asarray(ROWS)).items()}
    failures: dict[str, str | None] = {}
    for kind, devices, axis, names in MESHES:
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType[kind],))
        jax.set_mesh(mesh)
        rows = jax.device_put(ROWS, NamedSharding(mesh, PartitionSpec(axis)))
        fns = cases(rows)
        for name in names or fns:
            try:
                for a, b in zip(arrays_of(fns[name]), want[name], strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
                why = None
            except Exception as e:
                why = f"{type(e).__name__}: {e}"[:500]
            failures[f"{name}, {axis} on {devices}, {kind}"] = why
    print(json.dumps(failures))


if __name__ == "__main__":
    main()
