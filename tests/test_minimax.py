"""The least largest of several losses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
import scipy.optimize
from compiling import compilations

from jaxmf_opt import ROBUST_OPTIMIZER, minimax, solve
from jaxmf_opt.mechanisms import Dense, workloads

R = optx.RESULTS


def _quadratics(seed: int, losses: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Centers and weights of convex quadratics, and constants that are in the way."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(losses, n)), 10.0 ** rng.uniform(-1, 1, (losses, n))


def _of(centers: Any, weights: Any) -> Any:
    return lambda y: jnp.sum(weights * (y[None, :] - centers) ** 2, axis=1)


def _by_scipy(centers: np.ndarray, weights: np.ndarray) -> float:
    """The least bound of all losses, by another method."""

    def below(z: np.ndarray) -> np.ndarray:
        return z[-1] - np.sum(weights * (z[:-1] - centers) ** 2, axis=1)

    start = np.append(centers.mean(0), 100.0)
    end = scipy.optimize.minimize(
        lambda z: z[-1],
        start,
        constraints={"type": "ineq", "fun": below},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return end.fun


@pytest.mark.parametrize(("losses", "n"), [(1, 3), (8, 5), (40, 6)])
def test_convex_quadratics(losses: int, n: int):
    centers, weights = _quadratics(losses, losses, n)
    with jax.enable_x64():
        end = minimax(_of(centers, weights), np.zeros(n), atol=1e-9)
        assert end.result == R.successful
        best = _by_scipy(centers, weights)
        np.testing.assert_allclose(end.loss, best, rtol=1e-7, atol=1e-8)
        assert end.loss - end.gap <= best + 1e-7
        np.testing.assert_allclose(jnp.sum(end.weights), 1.0)
        assert np.all(end.weights >= 0)
        slopes = jax.jacobian(_of(centers, weights))
        first = np.abs(slopes(jnp.zeros(n))).max()
        assert np.abs(end.weights @ slopes(end.value)).max() < 1e-4 * first


def test_a_linear_program():
    """Chebyshev's regression, whose losses have no curvature."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20, 3))
    y = x @ np.arange(3.0) + rng.uniform(-1, 1, 20)
    with jax.enable_x64():
        off = lambda c: x @ c - y  # noqa: E731
        end = minimax(lambda c: jnp.concatenate([off(c), -off(c)]), np.zeros(3))
    best = scipy.optimize.linprog(
        [0, 0, 0, 1],
        A_ub=np.column_stack([np.vstack([x, -x]), -np.ones(40)]),
        b_ub=np.concatenate([y, -y]),
        bounds=[(None, None)] * 4,
    )
    assert end.result == R.successful
    np.testing.assert_allclose(end.loss, best.fun, rtol=1e-7)
    np.testing.assert_allclose(end.value, best.x[:3], rtol=1e-4)


@pytest.mark.parametrize("other", [False, True])
def test_where_one_loss_alone_is_the_largest(other: bool):
    """There is no gap then, from the start; what counts is how exactly it is solved."""

    def losses(y: Any) -> Any:
        valley = 1 + 1e4 * (y[1] - y[0] ** 2) ** 2 + (1 - y[0]) ** 2
        return jnp.stack([valley, jnp.sum(y**2) - 2] if other else [valley])

    with jax.enable_x64():
        end = minimax(losses, np.array([-1.2, 1.0]))
        assert end.result == R.successful
        np.testing.assert_allclose(end.loss, 1.0, rtol=1e-8)
        np.testing.assert_allclose(end.value, 1.0, rtol=1e-4)


# Charalambous and Conn, SIAM J. Numer. Anal. 15 (1978), and their minima.
LITERATURE: dict[str, tuple[Any, Any, float]] = {
    "CB2": (
        lambda y: jnp.stack(
            [
                y[0] ** 2 + y[1] ** 4,
                (2 - y[0]) ** 2 + (2 - y[1]) ** 2,
                2 * jnp.exp(y[1] - y[0]),
            ]
        ),
        [1.0, -0.1],
        1.9522245,
    ),
    "CB3": (
        lambda y: jnp.stack(
            [
                y[0] ** 4 + y[1] ** 2,
                (2 - y[0]) ** 2 + (2 - y[1]) ** 2,
                2 * jnp.exp(y[1] - y[0]),
            ]
        ),
        [2.0, 2.0],
        2.0,
    ),
}


@pytest.mark.parametrize(("name", "dtype"), [("CB2", "float32"), ("CB3", "float64")])
def test_problems_of_the_literature(name: str, dtype: str):
    losses, start, want = LITERATURE[name]
    end = minimax(losses, np.array(start, dtype))
    assert end.result == R.successful
    np.testing.assert_allclose(end.loss, want, rtol=2e-7)
    assert end.value.dtype == dtype


def test_lanes_are_as_alone_in_any_unit():
    centers, weights = _quadratics(0, 4, 3)

    def least(scale: Any, shift: Any) -> Any:
        of = _of(jnp.asarray(centers), jnp.asarray(weights))
        return minimax(lambda y: scale * of(y) + shift, jnp.zeros(3))

    with jax.enable_x64():
        scales, shifts = jnp.array([1.0, 1e9, 1e-9]), jnp.array([0.0, -1e9, 3e-9])
        batch = jax.jit(jax.vmap(least))(scales, shifts)
        plain = least(1.0, 0.0)
        assert np.all(batch.result == R.successful)
        np.testing.assert_allclose(batch.loss, scales * plain.loss + shifts, rtol=1e-7)
        lane = jax.tree.map(lambda x: x[0], batch)
        assert lane.num_steps == plain.num_steps
        assert lane.num_rounds == plain.num_rounds
        np.testing.assert_allclose(lane.value, plain.value, rtol=1e-9, atol=1e-12)


def test_evaluations_are_counted():
    executions = 0

    def tick() -> None:
        nonlocal executions
        executions += 1

    def losses(y: Any) -> Any:
        jax.debug.callback(tick)
        return jnp.stack([(y - 1) ** 2, (y + 1) ** 2])

    end = minimax(losses, 3.0)
    jax.effects_barrier()
    assert end.num_loss_evaluations == executions > 5


def test_other_data_compile_nothing():
    def circle(points: Any) -> Any:
        return minimax(_of(points, np.float64(1.0)), np.zeros(2)).value

    with jax.enable_x64():
        points = jnp.array([[0.0, 1.0], [2.0, 1.0], [1.0, 1.5]])
        here, moved = circle(points), jax.block_until_ready(points + 3.0)
        with compilations() as events:
            there = circle(moved)
        assert not events
        np.testing.assert_allclose(there, here + 3.0, rtol=1e-4)


def test_what_is_no_success():
    with jax.enable_x64():
        short = minimax(LITERATURE["CB2"][0], np.array([1.0, -0.1]), max_rounds=1)
        assert short.result == R.nonlinear_max_steps_reached
        assert short.num_rounds == 1
        # Of a problem that was not solved, the weights bound nothing.
        cosh = lambda y: jnp.cosh(y - 3) * jnp.array([1.0, 0.1])  # noqa: E731
        unsolved = minimax(cosh, 0.0, max_rounds=2, max_optimizer_steps=1)
        assert unsolved.result == R.nonlinear_max_steps_reached
        assert unsolved.loss - unsolved.gap <= 1.0 < unsolved.loss
        lost = minimax(lambda y: jnp.stack([jnp.log(y), -y]), -1.0)
        assert lost.result == R.nonfinite
        # Nor do they if the solver could not go on. Here there is no minimum.
        stuck = minimax(lambda y: jnp.stack([y, 2 * y]), 1.0)
        assert stuck.result != R.successful
        assert stuck.gap == np.inf


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e12])
def test_losses_that_are_all_0_at_the_start(unit: float):
    with jax.enable_x64():
        two = lambda y: unit * jnp.stack([(y - 1) ** 2 - 1, (y - 1) ** 2 - 1 + y])  # noqa: E731
        end = minimax(two, 0.0)
        assert end.result == R.successful
        np.testing.assert_allclose(end.loss, -0.25 * unit, rtol=1e-7)
        still = minimax(lambda y: unit * jnp.stack([y, -y]), 0.0)
        np.testing.assert_array_equal([still.value, still.loss, still.gap], 0.0)


def test_it_has_no_derivative():
    with pytest.raises(RuntimeError, match="no derivative"):
        jax.grad(lambda c: minimax(lambda y: jnp.stack([y - c, -y]), 1.0).loss)(0.5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"losses_fn": 3}, "`losses_fn` must be callable"),
        ({"losses_fn": lambda y: y}, "must return a vector"),
        ({"losses_fn": lambda y: jnp.arange(2)}, "floats, got dtype"),
        ({"losses_fn": lambda y: [y, -y]}, r"floats, got \["),
        ({"grad": True}, "must return a pair of the losses"),
        ({"params": {}}, "`params`"),
        ({"rtol": -1.0}, "`rtol`"),
        ({"max_rounds": 0}, "`max_rounds`"),
        ({"optimizer": None}, "`optimizer`"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str):
    given = {"losses_fn": lambda y: jnp.stack([y, -y]), "params": 1.0, **options}
    with pytest.raises((TypeError, ValueError), match=match):
        minimax(given.pop("losses_fn"), given.pop("params"), **given)


def test_matrices_of_the_least_largest_error():
    """No matrix has a lower error at those steps whose weights are not 0."""
    with jax.enable_x64():
        matrix = workloads.matrix(workloads.momentum(16, 0.5))
        mechanism = Dense(
            16, min_sep=8, max_participations=2, workload_matrix=matrix, max_error=True
        )
        start = mechanism.initial_params()
        end = minimax(mechanism.errors_and_pull_back, start, grad=True)
        assert end.result == R.successful
        loss, _ = mechanism.loss_and_gradient(end.value)
        np.testing.assert_allclose(end.loss, loss, rtol=1e-12)

        def weighted(gram: Any) -> Any:
            errors, pull_back = mechanism.errors_and_pull_back(gram)
            return errors @ end.weights, pull_back(end.weights)

        options = {"grad": True, "optimizer": ROBUST_OPTIMIZER}
        lower = solve(weighted, start, max_optimizer_steps=2000, **options).loss
        np.testing.assert_allclose(end.loss, lower, rtol=1e-6)
