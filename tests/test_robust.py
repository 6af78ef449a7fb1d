"""Each part of the robust optimizer by its effect, and the whole."""

import subprocess
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

from jaxmf_opt import DEFAULT_OPTIMIZER, ROBUST_OPTIMIZER, robust, solve

pytestmark = pytest.mark.mixes  # optax's code


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64():
        yield


def lbfgs_after(points: Any, grads: Any, *wrappers: Any, memory: int = 3) -> Any:
    """The last update (uphill, as optax counts) and the state after some updates."""
    lbfgs = optax.scale_by_lbfgs(memory)
    for wrap in wrappers:
        lbfgs = wrap(lbfgs)
    state, updates = lbfgs.init(jnp.asarray(points[0])), None
    for y, g in zip(points, grads, strict=True):
        updates, state = lbfgs.update(jnp.asarray(g), state, jnp.asarray(y))
    return updates, state


class TestDirections:
    # On a saddle: the gradient of (y0^2 - 8 y1^2) / 2 between points that differ in y1.
    POINTS = np.array([[1.0, 0.1], [0.9, 0.4], [0.85, 0.9]])
    GRADS = POINTS * [1.0, -8.0]

    def test_negative_curvature_leads_uphill_unless_skipped(self):
        plain, _ = lbfgs_after(self.POINTS, self.GRADS)
        guarded, state = lbfgs_after(self.POINTS, self.GRADS, robust.skip_bad_pairs)
        assert plain @ self.GRADS[-1] < 0
        assert guarded @ self.GRADS[-1] > 0
        np.testing.assert_array_equal(state.diff_params_memory, 0.0)

    def test_a_skipped_pair_leaves_the_memory(self):
        """A bad pair between good ones is as if it had not been."""
        a = np.diag([1.0, 4.0, 9.0])
        rng = np.random.default_rng(0)
        points = rng.normal(size=(6, 3))
        good, bad = points @ a, points @ a
        bad[5] = bad[4] - (points[5] - points[4])  # negative curvature at the end
        _, before = lbfgs_after(points[:5], good[:5], robust.skip_bad_pairs)
        direction, after = lbfgs_after(points, bad, robust.skip_bad_pairs)
        for name in ("diff_params_memory", "diff_updates_memory", "weights_memory"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
        # Of the same memory the direction is that of the two-loop recursion.
        pairs = [(points[i + 1] - points[i], good[i + 1] - good[i]) for i in (1, 2, 3)]
        want = two_loops(pairs, bad[5])
        np.testing.assert_allclose(direction, want, rtol=1e-6)

    def test_good_pairs_are_not_skipped(self):
        points = np.random.default_rng(1).normal(size=(6, 2))
        grads = points * [1.0, 100.0]
        got = lbfgs_after(points, grads, robust.skip_bad_pairs)
        chex.assert_trees_all_equal(got, lbfgs_after(points, grads))

    def test_units_do_not_matter_to_rescaled_variables(self):
        """Powers of two as units change no direction once there are pairs."""
        rng = np.random.default_rng(2)
        points = rng.normal(size=(9, 3))
        units = np.array([1.0, 2.0**10, 2.0**-12])

        def direction(units: np.ndarray) -> np.ndarray:
            grads = points * np.array([1.0, 3.0, 2.0]) / units
            updates, _ = lbfgs_after(
                points * units, grads, robust.rescale_variables, memory=4
            )
            return np.asarray(updates) / units

        cosine = direction(units) @ direction(np.ones(3))
        cosine /= np.linalg.norm(direction(units))
        cosine /= np.linalg.norm(direction(np.ones(3)))
        assert cosine > 0.95

    def test_starts_anew_where_it_has_not_moved(self):
        y, g = np.array([1.0, 2.0]), np.array([3.0, 1.0])
        points, grads = [y, y + 1, y + 1], [g, 3 * g, 3 * g]
        got, state = lbfgs_after(points, grads, robust.restart_when_stuck)
        fresh, _ = lbfgs_after([y + 1], [3 * g])
        np.testing.assert_array_equal(got, fresh)
        assert state.is_fresh
        assert not lbfgs_after(points[:2], grads[:2], robust.restart_when_stuck)[
            1
        ].is_fresh

    def test_starts_anew_where_the_direction_is_no_descent(self):
        got, state = lbfgs_after(self.POINTS, self.GRADS, robust.restart_when_stuck)
        assert got @ self.GRADS[-1] > 0
        assert state.is_fresh

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_the_first_step_is_short(self, scale: float):
        y = scale * np.array([1.0, -2.0])
        updates, _ = lbfgs_after([y], [np.array([1e3, 1.0])], robust.short_first_step)
        assert np.abs(updates).max() <= 0.01 * 2 * scale * (1 + 1e-12)
        assert np.abs(updates).max() > 0


def two_loops(pairs: list[Any], grad: np.ndarray) -> np.ndarray:
    """Nocedal and Wright, Numerical Optimization (2006), algorithm 7.4."""
    q, alphas = grad.copy(), []
    for s, y in reversed(pairs):
        alpha = s @ q / (s @ y)
        alphas.append(alpha)
        q -= alpha * y
    s, y = pairs[-1]
    q *= s @ y / (y @ y)
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        q += (alpha - y @ q / (s @ y)) * s
    return q


class TestLineSearch:
    @staticmethod
    def search(fn: Any, y: float, *wrappers: Any, trials: int = 5) -> Any:
        """One search from `y` along minus the gradient: where it leads, its state."""
        search: Any = optax.scale_by_zoom_linesearch(trials, approx_dec_rtol=1e-6)
        for wrap in wrappers:
            search = wrap(search)
        point = jnp.array(y)
        value, grad = jax.value_and_grad(fn)(point)
        step, state = search.update(
            -grad, search.init(point), point, value=value, grad=grad, value_fn=fn
        )
        return point + step, state

    def test_minus_infinity_is_no_decrease(self):
        def fn(y: Any) -> Any:
            return jnp.where(y > 1.5, -jnp.inf, -y)

        plain, _ = self.search(fn, 1.0)
        assert fn(plain) == -jnp.inf
        got, state = self.search(fn, 1.0, robust.finite_trials, robust.refuse_uphill)
        assert np.isfinite(fn(got))
        np.testing.assert_allclose(state.value, fn(got))

    def test_it_stays_where_it_would_climb(self):
        def fn(y: Any) -> Any:  # with a gradient that lies
            return jnp.abs(y) + 1.5 * jax.lax.stop_gradient(jnp.abs(y)) - 1.5 * y

        plain, _ = self.search(fn, 1.0)
        assert fn(plain) > fn(1.0)
        got, state = self.search(fn, 1.0, robust.refuse_uphill)
        assert got == 1.0
        np.testing.assert_array_equal(state.value, fn(1.0))
        np.testing.assert_array_equal(state.grad, jax.grad(fn)(1.0))

    def test_the_tolerance_is_never_below_rounding(self):
        """A loss that has come down from 1e9 has an error of 1e-7."""
        given = []

        def search(rtol: Any) -> Any:
            given.append(float(rtol))
            return optax.scale_by_zoom_linesearch(3, approx_dec_rtol=rtol)

        floored, y = robust.rounding_floor(search), jnp.array(1.0)
        state: Any = floored.init(y)
        for value in (1e-3, 1e9, 1e-3, 0.0, -1e-3):
            _, state = floored.update(
                -y, state, y, value=jnp.array(value), grad=y, value_fn=lambda y: y**2
            )
        floor = 4 * np.finfo(float).eps * 1e9 / 1e-3
        # (Twice before the first update: when it is made, and at the start.)
        want = [1e-6, 1e-6, 1e-6, 1e-6, floor, 1e-6, floor]
        np.testing.assert_allclose(given, want, rtol=1e-12)
        assert isinstance(state[-1], optax.ScaleByZoomLinesearchState)


def valley(y: Any) -> Any:
    return 1e6 * (y[1] - y[0] ** 2) ** 2 + (1 - y[0]) ** 2


OPTIONS: dict[str, Any] = {
    "optimizer": ROBUST_OPTIMIZER,
    "max_optimizer_steps": 1000,
    "gtol": 1e-5,
}


class TestWhole:
    def test_where_the_default_sticks(self):
        start = np.full(2, -1.2)
        options = {**OPTIONS, "optimizer": DEFAULT_OPTIMIZER}
        assert solve(valley, start, **options).result == optx.RESULTS.stagnation
        solution = solve(valley, start, **OPTIONS)
        assert solution.result == optx.RESULTS.successful
        np.testing.assert_allclose(solution.value, 1.0, rtol=1e-4)

    def test_each_point_is_evaluated_once(self):
        solution = solve(valley, np.full(2, -1.2), **OPTIONS)
        stats = solution.stats
        assert solution.state.minimiser.reuses_linesearch
        assert stats["num_loss_evaluations"] == stats["num_grad_evaluations"]

    def test_pytrees_and_lanes(self):
        def loss(y: Any, c: Any) -> Any:
            return valley(y["a"] * c) + jnp.sum((y["b"] - c) ** 2)

        start = {"a": np.array([0.5, 0.5]), "b": np.zeros((2, 1))}
        c = np.array([1.0, 2.0, 0.5])
        one = lambda c: solve(lambda y: loss(y, c), start, **OPTIONS)  # noqa: E731
        batch = jax.jit(jax.vmap(one))(c)
        assert np.all(batch.result == optx.RESULTS.successful)
        for i, x in enumerate(c):
            want = {"a": np.full(2, 1 / x), "b": np.full((2, 1), x)}
            got = jax.tree.map(lambda v, i=i: v[i], batch.value)
            chex.assert_trees_all_close(got, want, rtol=1e-4)

    def test_without_a_tolerance_it_ends_where_it_stands_still(self):
        def loss(y: Any) -> Any:
            return jnp.sum(jnp.cosh(y - 1.0))

        options = {**OPTIONS, "gtol": 0.0}
        solution = solve(loss, np.zeros(3), **options)
        assert solution.result == optx.RESULTS.successful
        assert solution.stats["num_steps"] < 50
        # As if it had gone on.
        callback = {"callback": lambda _: None, "max_optimizer_steps": 60}
        on = solve(loss, np.zeros(3), **{**options, **callback})
        assert on.stats["num_steps"] == 60
        np.testing.assert_array_equal(solution.value, on.value)

    def test_equal_ones_are_one(self):
        """(Without the checks of this suite, which wrap functions.)"""
        program = """
from jaxmf_opt import ROBUST_OPTIMIZER, robust
from jaxmf_opt._solver.optimizers import optimizer_key as key
assert key(ROBUST_OPTIMIZER) == key(robust.robust_lbfgs()) is not None
assert key(ROBUST_OPTIMIZER) != key(robust.robust_lbfgs(memory_size=5))
"""
        subprocess.run([sys.executable, "-c", program], check=True)
