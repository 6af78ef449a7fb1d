"""How right and how fast is the derivative of a minimum, with a matrix and without?

Of losses `y.Hy / 2 - c.y`, whose minimum moves by `H^-1 dc`; of gradients `Hy - c` with
an `H` that is not symmetric (grad=True); of the first kind with a masked parameter, or
constant along a direction. `H` has singular values from 1 down to 1 / condition.
Printed are the seconds of a product with the derivative (compiled before) and its
relative error; "NaN" is what a system gives that was not solved. The library makes a
matrix up to the size that `_solver/implicit.py` names.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmf_opt import optimize
from jaxmf_opt._solver import implicit

from .common import seconds

SIZES = (256, 1024, 2048, 3000)
# Without a matrix it takes as many products as the condition is, up to 20 n.
CONDITIONS = {
    "symmetric": (1e2, 1e4),
    "grad=True": (1e2,),
    "masked": (1e2,),
    "constant along 1": (1e2,),
}


def _system(kind: str, n: int, condition: float) -> tuple[np.ndarray, np.ndarray]:
    """The matrix, and the derivative along `_direction(n)`."""
    rng = np.random.default_rng(n)
    size = n - 1 if kind in ("masked", "constant along 1") else n
    q = np.linalg.qr(rng.normal(size=(size, size)))[0]
    p = q
    if kind == "grad=True":
        p = np.linalg.qr(rng.normal(size=(size, size)))[0]
    values = np.geomspace(1.0, 1.0 / condition, size)
    matrix, inverse = (q * values) @ p.T, (p / values) @ q.T
    if size < n:
        # A basis of which the first vector is in the null space.
        basis = np.eye(n)
        if kind == "constant along 1":
            ones = np.ones(n) / n**0.5
            v = ones - np.eye(n)[0]
            basis -= 2 * np.outer(v, v) / (v @ v)
        matrix, inverse = (basis[:, 1:] @ x @ basis[:, 1:].T for x in (matrix, inverse))
    return matrix, inverse @ _direction(n)


def _direction(n: int) -> np.ndarray:
    """Alternating signs: in the range of all kinds, for an even n."""
    v = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    v[[0, -1]] = 0.0
    return v


def _product(kind: str, n: int, *, direct: bool) -> Any:
    """A compiled product with the derivative; a function of the matrix."""

    def minimum(matrix: jax.Array, c: jax.Array) -> jax.Array:
        def gradient(y: jax.Array) -> jax.Array:
            return matrix @ y - c

        def loss(y: jax.Array) -> Any:
            value = y @ (matrix @ y) / 2 - c @ y
            return (value, gradient(y)) if kind == "grad=True" else value

        return optimize(
            loss,
            jnp.zeros(n),
            grad=kind == "grad=True",
            optimizer=optax.sgd(0.1),
            max_optimizer_steps=1,
        )

    def product(matrix: jax.Array) -> jax.Array:
        v = jnp.asarray(_direction(n))
        return jax.jvp(lambda c: minimum(matrix, c), (v,), (v,))[1]

    default = implicit.DIRECT_SIZE
    implicit.DIRECT_SIZE = n if direct else 0
    try:
        return jax.jit(product).lower(jax.ShapeDtypeStruct((n, n), float)).compile()
    finally:
        implicit.DIRECT_SIZE = default


def _cell(kind: str, n: int, condition: float, *, direct: bool) -> str:
    matrix, want = _system(kind, n, condition)
    operand = jnp.asarray(matrix)
    product = _product(kind, n, direct=direct)
    found: list[np.ndarray] = []
    took = seconds(lambda: found.append(np.asarray(product(operand))))
    error = np.linalg.norm(found[0] - want) / np.linalg.norm(want)
    return f"{took:8.3f} s {'    NaN' if np.isnan(error) else f'{error:7.0e}'}"


def main() -> None:
    print(f"{'':6} {'kind':18} {'condition':9} {'with a matrix':>20} {'without':>20}")
    with jax.enable_x64():
        for n in SIZES:
            for kind in CONDITIONS:
                for condition in CONDITIONS[kind]:
                    cells = (
                        _cell(kind, n, condition, direct=direct)
                        for direct in (True, False)
                    )
                    row = f"{n:6} {kind:18} {condition:9.0e}"
                    print(row, *(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
