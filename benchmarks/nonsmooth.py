"""Minima on kinks: how close the robust optimizer comes, and what it says.

    python -m benchmarks.nonsmooth

Problems from the literature whose minima are known, most of them from Luksan and
Vlcek, "Test problems for nonsmooth unconstrained and linearly constrained
optimization" (2000, Technical report 798, Institute of Computer Science, Prague), those
of many variables from Haarala, Miettinen and Makela, "New limited memory bundle method
for large-scale nonsmooth optimization" (Optim. Methods Softw. 19, 2004), and two from
Lewis and Overton, "Nonsmooth optimization via quasi-Newton methods" (Math. Program.
141, 2013). None of them was used to choose a part or a number of the optimizer.

A problem is solved if the loss is within 1e-6 of the minimum, relatively, or absolutely
where that is 0. What says `successful` beyond that is counted as false.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmf_opt import ROBUST_OPTIMIZER, solve
from jaxmf_opt._solver.solution import statuses

LIMIT = 1000


class Kinked(NamedTuple):
    """A problem.

    Attributes:
      loss: The loss of a vector.
      start: Where to start.
      minimum: The smallest loss.
    """

    loss: Callable[[Array], Array]
    start: Any
    minimum: float


def _largest(*values: Any) -> Any:
    return jnp.max(jnp.stack(values))


def _rosen_suzuki(x: Any) -> Any:
    a, b, c, d = x
    f = a**2 + b**2 + 2 * c**2 + d**2 - 5 * a - 5 * b - 21 * c + 7 * d
    g = a**2 + b**2 + c**2 + d**2 + a - b + c - d - 8
    h = a**2 + 2 * b**2 + c**2 + 2 * d**2 - a - d - 10
    k = a**2 + b**2 + c**2 + 2 * a - b - d - 5
    return f + 10 * _largest(jnp.zeros_like(f), g, h, k)


def _wolfe(x: Any) -> Any:
    a, b = x[0], jnp.abs(x[1])
    near = 9 * a + 16 * b - jnp.where(a <= 0, a, 0) ** 9
    return jnp.where(a >= b, 5 * jnp.sqrt(9 * a**2 + 16 * b**2), near)


def _max_quad(x: Any) -> Any:
    i = np.arange(1, 11)
    low, high = np.minimum.outer(i, i), np.maximum.outer(i, i)
    values = []
    for k in range(1, 6):
        a = np.exp(low / high) * np.cos(low * high) * np.sin(k)
        np.fill_diagonal(a, 0)
        np.fill_diagonal(a, i / 10 * abs(np.sin(k)) + np.abs(a).sum(axis=1))
        values.append(x @ a @ x - np.exp(i / k) * np.sin(i * k) @ x)
    return _largest(*values)


def _active_faces(x: Any) -> Any:
    return jnp.max(jnp.log1p(jnp.abs(jnp.append(x, -jnp.sum(x)))))


def _pairs(x: Any) -> tuple[Any, Any]:
    return x[:-1], x[1:]


def _cb3(x: Any, y: Any) -> tuple[Any, Any, Any]:
    return x**4 + y**2, (2 - x) ** 2 + (2 - y) ** 2, 2 * jnp.exp(y - x)


def _chained_lq(x: Any) -> Any:
    a, b = _pairs(x)
    return jnp.sum(-a - b + jnp.maximum(0, a**2 + b**2 - 1))


def _chained_cb3_1(x: Any) -> Any:
    return jnp.sum(jnp.max(jnp.stack(_cb3(*_pairs(x))), axis=0))


def _chained_cb3_2(x: Any) -> Any:
    return _largest(*map(jnp.sum, _cb3(*_pairs(x))))


def _nesterov(x: Any) -> Any:
    a, b = _pairs(x)
    return (x[0] - 1) ** 2 / 4 + jnp.sum(jnp.abs(b - 2 * a**2 + 1))


_STEPS = np.arange(1, 51)
_HILBERT = 1 / (_STEPS[:, None] + _STEPS - 1)
_TO_20 = np.arange(1, 21)
_HALF_MINUS = np.where(_TO_20 <= 10, _TO_20, -_TO_20)

PROBLEMS: dict[str, Kinked] = {
    "CB2": Kinked(
        lambda x: _largest(
            x[0] ** 2 + x[1] ** 4,
            (2 - x[0]) ** 2 + (2 - x[1]) ** 2,
            2 * jnp.exp(x[1] - x[0]),
        ),
        [1, -0.1],
        1.9522244936,
    ),
    "CB3": Kinked(lambda x: _largest(*_cb3(*x)), [2, 2], 2.0),
    "DEM": Kinked(
        lambda x: (
            x[1] + jnp.maximum(5 * jnp.abs(x[0]), x[0] ** 2 + x[1] ** 2 + 3 * x[1])
        ),
        [1, 1],
        -3.0,
    ),
    "QL": Kinked(
        lambda x: (
            x @ x + 10 * _largest(0 * x[0], 4 - 4 * x[0] - x[1], 6 - x[0] - 2 * x[1])
        ),
        [-1, 5],
        7.2,
    ),
    "LQ": Kinked(_chained_lq, [-0.5, -0.5], -(2**0.5)),
    "Mifflin 1": Kinked(
        lambda x: -x[0] + 20 * jnp.maximum(0, x @ x - 1), [0.8, 0.6], -1.0
    ),
    "Mifflin 2": Kinked(
        lambda x: -x[0] + 2 * (x @ x - 1) + 1.75 * jnp.abs(x @ x - 1), [-1, -1], -1.0
    ),
    "Crescent": Kinked(
        lambda x: x[1] + jnp.abs(x[0] ** 2 + (x[1] - 1) ** 2 - 1), [-1.5, 2], 0.0
    ),
    "Rosen-Suzuki": Kinked(_rosen_suzuki, [0, 0, 0, 0], -44.0),
    "Wolfe": Kinked(_wolfe, [3, 2], -8.0),
    "MAXQUAD": Kinked(_max_quad, np.ones(10), -0.8414083346),
    "MAXQ": Kinked(lambda x: jnp.max(x**2), _HALF_MINUS, 0.0),
    "MAXL": Kinked(lambda x: jnp.max(jnp.abs(x)), _HALF_MINUS, 0.0),
    "Goffin": Kinked(lambda x: 50 * jnp.max(x) - jnp.sum(x), _STEPS - 25.5, 0.0),
    "MXHILB": Kinked(lambda x: jnp.max(jnp.abs(_HILBERT @ x)), np.ones(50), 0.0),
    "L1HILB": Kinked(lambda x: jnp.sum(jnp.abs(_HILBERT @ x)), np.ones(50), 0.0),
    "active faces": Kinked(_active_faces, np.ones(20), 0.0),
    "chained LQ": Kinked(_chained_lq, np.full(20, -0.5), -19 * 2**0.5),
    "chained CB3 I": Kinked(_chained_cb3_1, np.full(20, 2), 38.0),
    "chained CB3 II": Kinked(_chained_cb3_2, np.full(20, 2), 38.0),
    "Rosenbrock, kinked": Kinked(
        lambda x: 8 * jnp.abs(x[0] ** 2 - x[1]) + (1 - x[0]) ** 2, [-1.2, 1], 0.0
    ),
    "Chebyshev-Rosenbrock": Kinked(_nesterov, [-1, 1, 1], 0.0),
}


def main() -> None:
    """Solves all problems, and prints how that went."""
    jax.config.update("jax_enable_x64", True)
    print(f"{'problem':<22}{'variables':>10}{'error':>11}{'evaluations':>13}  status")
    solved = false = 0
    for name, problem in PROBLEMS.items():
        start = jnp.asarray(problem.start, float)
        end = solve(
            problem.loss,
            start,
            optimizer=ROBUST_OPTIMIZER,
            rtol=1e-8,
            max_optimizer_steps=LIMIT,
            throw=False,
        )
        scale = abs(problem.minimum) or 1.0
        error = (float(end.loss) - problem.minimum) / scale
        status = str(statuses(end.result))
        solved += error <= 1e-6
        false += status == "successful" and error > 1e-6
        evaluations = int(end.stats["num_loss_evaluations"])
        print(f"{name:<22}{start.size:>10}{error:>11.1e}{evaluations:>13}  {status}")
    print(f"solved {solved} of {len(PROBLEMS)}; successful, but not solved: {false}")


if __name__ == "__main__":
    main()
