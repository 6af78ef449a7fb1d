"""Each part of the robust optimizer by its effect, and the whole."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
import scipy.optimize

from jaxmf_opt import DEFAULT_OPTIMIZER, ROBUST_OPTIMIZER, robust, solve

pytestmark = pytest.mark.mixes  # optax's code


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64():
        yield


def after(points: Any, grads: Any, lbfgs: Any = None) -> Any:
    """The last update (uphill, as optax counts) and the state after some updates."""
    lbfgs = lbfgs or robust.scale_by_robust_lbfgs(3)
    update = jax.jit(lbfgs.update)
    state, updates = lbfgs.init(jnp.asarray(points[0])), None
    for y, g in zip(points, grads, strict=True):
        updates, state = update(jnp.asarray(g), state, jnp.asarray(y))
    return updates, state


def two_loops(pairs: list[Any], grad: np.ndarray, start: Any = 1.0) -> np.ndarray:
    """Nocedal and Wright, Numerical Optimization (2006), algorithm 7.4."""
    q, alphas = grad.copy(), []
    for s, y in reversed(pairs):
        alpha = s @ q / (s @ y)
        alphas.append(alpha)
        q -= alpha * y
    s, y = pairs[-1]
    q *= start * (s @ y) / (y @ (start * y))
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        q += (alpha - y @ q / (s @ y)) * s
    return q


def pairs_of(points: np.ndarray, grads: np.ndarray) -> list[Any]:
    return list(zip(np.diff(points, axis=0), np.diff(grads, axis=0), strict=True))


class TestDirections:
    # On a saddle: the gradient of (y0^2 - 8 y1^2) / 2 between points that differ in y1.
    POINTS = np.array([[1.0, 0.1], [0.9, 0.4], [0.85, 0.9]])
    GRADS = POINTS * [1.0, -8.0]

    @pytest.mark.parametrize("count", [2, 4, 5, 9])
    def test_good_pairs_are_those_of_optax(self, count: int):
        """Before and after the memory is full."""
        points = np.random.default_rng(1).normal(size=(count, 2))
        grads = points * [1.0, 10.0]
        got, state = after(points, grads)
        want, _ = after(points, grads, optax.scale_by_lbfgs(3))
        np.testing.assert_allclose(got, want, rtol=1e-9)
        assert state.num_points == count

    def test_bad_pairs_are_not_kept(self):
        """A bad pair between good ones is as if it had not been."""
        a = np.diag([1.0, 4.0, 9.0])
        rng = np.random.default_rng(0)
        points = rng.normal(size=(6, 3))
        good, bad = points @ a, points @ a
        bad[5] = bad[4] - (points[5] - points[4])  # negative curvature at the end
        _, before = after(points[:5], good[:5])
        direction, state = after(points, bad)
        for name in ("num_points", "steps", "changes", "weights", "curvature"):
            np.testing.assert_array_equal(getattr(state, name), getattr(before, name))
        want = two_loops(pairs_of(points[:5], good[:5])[-3:], bad[5])
        np.testing.assert_allclose(direction, want, rtol=1e-6)

    def test_different_curvatures_are_where_it_starts(self):
        """In units that are powers of two."""
        rng = np.random.default_rng(3)
        hessian = np.array([1.0, 4.0**9, 4.0**-9])
        points = rng.normal(size=(7, 3)) / np.sqrt(hessian)
        grads = points * hessian
        got, state = after(points, grads)
        units = np.exp2(np.round(-np.log2(state.curvature) / 2))
        assert units.argsort().tolist() == [1, 0, 2]
        pairs = pairs_of(points, grads)[-3:]
        want = two_loops(pairs, grads[-1], units**2)
        np.testing.assert_allclose(got, want, rtol=1e-9)
        assert not np.allclose(two_loops(pairs, grads[-1]), want, rtol=0.5)

    def test_starts_anew_where_it_has_not_moved(self):
        y, g = np.array([1.0, 2.0]), np.array([3.0, 1.0])
        points, grads = [y, y + 1, y + 1], [g, 3 * g, 3 * g]
        got, state = after(points, grads)
        fresh, start = after([y + 1], [3 * g])
        np.testing.assert_array_equal(got, fresh)
        np.testing.assert_array_equal(state.curvature, start.curvature)
        assert state.is_fresh and start.is_fresh
        assert not after(points[:2], grads[:2])[1].is_fresh
        # What was known is forgotten.
        points, grads = np.array([*points, 2 * y]), np.array([*grads, 2 * g + 1])
        np.testing.assert_array_equal(
            after(points, grads)[0], after(points[2:], grads[2:])[0]
        )

    def test_starts_anew_where_the_curvature_is_negative(self):
        plain, _ = after(self.POINTS, self.GRADS, optax.scale_by_lbfgs(3))
        got, state = after(self.POINTS, self.GRADS)
        assert plain @ self.GRADS[-1] < 0
        assert got @ self.GRADS[-1] > 0
        assert state.is_fresh

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_the_first_step_is_short(self, scale: float):
        y = scale * np.array([1.0, -2.0])
        updates, _ = after([y], [np.array([1e3, 1.0])])
        assert np.abs(updates).max() <= 0.1 * 2 * scale * (1 + 1e-12)
        assert np.abs(updates).max() > 0

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_types_stay_and_are_not_mixed(self, dtype: str):
        lbfgs = robust.scale_by_robust_lbfgs(3)
        with (
            jax.numpy_dtype_promotion("strict"),
            jax.numpy_rank_promotion("raise"),
        ):
            y = {"a": jnp.ones(2, dtype), "b": jnp.ones((1, 2), dtype)}
            state = first = lbfgs.init(y)
            for _ in range(3):
                updates, state = jax.jit(lbfgs.update)(y, state, y)
                chex.assert_trees_all_equal_shapes_and_dtypes(updates, y)
                chex.assert_trees_all_equal_shapes_and_dtypes(state, first)


def kinked(y: Any) -> Any:
    return jnp.abs(y - 0.7) + 0.3 * jnp.abs(y + 0.2) + 0.1 * y**2


ALONG: dict[str, Any] = {
    "smooth": lambda y: jnp.cosh(3 * y - 1),
    "kinked": kinked,
    "wavy": lambda y: y**2 + jnp.sin(9 * y),
    "flat": lambda y: 1e-3 * jnp.log1p(y**2),
    "steep": lambda y: jnp.exp(40 * y) - y,
    "a cliff": lambda y: jnp.where(y < 0.3, jnp.nan, y),
    "to minus infinity": lambda y: jnp.where(y > 1.5, -jnp.inf, -y),
}
STARTS = np.array([-3.0, -0.9, 0.31, 1.2, 40.0])


def searched(fn: Any, y: Any, *, scale: Any = 1.0, **options: Any) -> Any:
    """One search against the sign of the gradient: the step, and its state."""
    search: Any = robust.scale_by_weak_wolfe_linesearch(**options)
    value, grad = jax.value_and_grad(fn)(y)
    step, (_, state) = search.update(
        -scale * jnp.sign(grad), search.init(y), y, value=value, grad=grad, value_fn=fn
    )
    return step, state


class TestLineSearch:
    @pytest.mark.parametrize("scale", [1e-3, 1e3])
    @pytest.mark.parametrize("name", ALONG)
    def test_both_conditions_hold_or_nothing_is_lost(self, name: str, scale: float):
        fn, slope = ALONG[name], jax.grad(ALONG[name])
        for y in map(jnp.asarray, STARTS):
            if not np.isfinite(fn(y)):
                continue
            step, state = searched(fn, y, scale=scale)
            along = -scale * jnp.sign(slope(y))
            there, promised = y + step, along * slope(y)
            np.testing.assert_array_equal(step, state.learning_rate * along)
            # (A compiled program may round `y + step` once, where this does twice.)
            ulp = np.finfo(float).eps * max(abs(y), abs(there))
            for kept, of in ((state.value, fn), (state.grad, slope)):
                moves = 2 * ulp * abs(jax.grad(of)(there))
                np.testing.assert_allclose(kept, of(there), rtol=1e-15, atol=moves)
            assert np.isfinite(state.value) and np.isfinite(state.grad)
            enough = fn(y) + 1e-4 * state.learning_rate * promised
            assert fn(there) <= enough + 4 * np.finfo(float).eps * abs(fn(y))
            if name not in ("a cliff", "to minus infinity"):
                assert along * slope(there) >= 0.9 * promised

    def test_a_kink_is_found(self):
        """There the slope jumps: no strong Wolfe point is near it."""
        y, step = jnp.array(5.0), jax.jit(lambda y: searched(kinked, y)[0])
        for _ in range(60):
            y = y + step(y)
        np.testing.assert_allclose(y, 0.7, atol=1e-8)

    @pytest.mark.parametrize("way", ["uphill", "flat", "nan"])
    def test_where_it_does_not_descend_it_stays(self, way: str):
        fn = {"uphill": kinked, "flat": lambda y: 0 * y, "nan": lambda y: y * jnp.nan}
        scale = -1.0 if way == "uphill" else 1.0
        step, state = searched(fn[way], jnp.array(2.0), scale=scale)
        assert step == 0 or way == "nan"
        assert state.info.num_linesearch_steps == 0

    def test_a_lying_gradient_does_not_lead_uphill(self):
        def fn(y: Any) -> Any:
            return jnp.abs(y) + 1.5 * jax.lax.stop_gradient(jnp.abs(y)) - 1.5 * y

        step, state = searched(fn, jnp.array(1.0))
        rounding = 4 * np.finfo(float).eps
        assert state.value <= fn(1.0) + rounding
        np.testing.assert_array_equal(state.value, fn(1.0 + step))

    def test_what_is_rounding_of_the_largest_value_is_no_climb(self):
        """A loss that has come down from 1e9 has an error of 1e-7."""
        fn = lambda y: 1e-3 - 1e-9 * y + 1e-8 * (y > 0)  # noqa: E731
        search: Any = robust.scale_by_weak_wolfe_linesearch()
        y = jnp.array(-0.5)
        value, grad = jax.value_and_grad(fn)(y)
        for largest, moves in ((1e-3, False), (1e9, True)):
            progress, zoom = search.init(y)
            state = (progress._replace(largest=jnp.array(largest)), zoom)
            step, (after, _) = search.update(
                jnp.ones(()), state, y, value=value, grad=grad, value_fn=fn
            )
            assert (y + step > 0) == moves
            assert after.largest == max(largest, value)

    def test_in_a_loop_of_optax(self):
        """With an argument of the loss, and what the state has stored."""
        search = robust.scale_by_weak_wolfe_linesearch()
        optimizer = optax.lbfgs(linesearch=search)
        centre = jnp.array([1.0, -2.0])
        loss = lambda y, centre: jnp.sum((y - centre) ** 4 + (y - centre) ** 2)  # noqa: E731
        stored = optax.value_and_grad_from_state(loss)

        @jax.jit
        def step(_: Any, carry: Any) -> Any:
            y, state = carry
            value, grad = stored(y, centre=centre, state=state)
            updates, state = optimizer.update(
                grad, state, y, value=value, grad=grad, value_fn=loss, centre=centre
            )
            return optax.apply_updates(y, updates), state

        start = jnp.zeros(2)
        y, _ = jax.lax.fori_loop(0, 20, step, (start, optimizer.init(start)))
        np.testing.assert_allclose(y, centre, atol=1e-7)


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
        # No point is evaluated twice.
        stats = solution.stats
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

        options = {**OPTIONS, "rtol": 0.0, "gtol": 0.0}
        solution = solve(loss, np.zeros(3), **options)
        assert solution.result == optx.RESULTS.successful
        assert solution.stats["num_steps"] < 50
        # As if it had gone on.
        callback = {"callback": lambda _: None, "max_optimizer_steps": 60}
        on = solve(loss, np.zeros(3), **{**options, **callback})
        assert on.stats["num_steps"] == 60
        np.testing.assert_array_equal(solution.value, on.value)

    def test_it_ends_soon_after_a_smooth_minimum(self):
        """It neither takes rounding for progress, nor waits for a restart to help."""
        rng = np.random.default_rng(0)
        units = 10.0 ** rng.uniform(-1, 1, (12, 1, 8))
        features = rng.normal(size=(12, 30, 8)) * units

        def one(features: Any) -> Any:
            def loss(y: Any) -> Any:
                return jnp.sum(jnp.logaddexp(0.0, features @ y)) + jnp.sum(y**2)

            options = {**OPTIONS, "rtol": 0.0, "gtol": 0.0, "history": True}
            return solve(loss, jnp.zeros(8, features.dtype), **options)

        with jax.enable_x64():
            batch = jax.jit(jax.vmap(one))(features)
        assert np.all(batch.result == optx.RESULTS.successful)
        norms = np.asarray(batch.stats["history"].grad_norm)
        there = np.argmax(norms <= 1e-12 * norms[:, :1], axis=1)
        assert np.mean(batch.stats["num_steps"] - there) < 8
        assert np.all(batch.stats["grad_norm"] < 1e-14 * norms[:, 0])

    def test_a_program_has_the_gradient_once(self):
        """The line search evaluates the start, too. (A stall is judged by the loss.)"""

        def minimum(y: Any) -> Any:
            loss = lambda y: jnp.sum(jax.lax.lgamma(y))  # noqa: E731
            return solve(loss, y, **OPTIONS, history=True)

        program = str(jax.make_jaxpr(lambda y: minimum(y).value)(jnp.ones(2)))
        assert program.count("digamma") == 1
        assert program.count("lgamma") == 2
        # It is no step, not even where it is the last thing that is done.
        found = minimum(jnp.full(2, 1.4616321449683623))
        assert found.stats["num_steps"] == 0 < found.stats["num_grad_evaluations"]
        assert np.all(np.isnan(found.stats["history"].loss))

    @pytest.mark.parametrize("height", [1e6, 1e10, 1e16, 1e18])
    def test_behind_a_steep_wall_it_goes_on(self, height: float):
        """Its first pair says that no step can be short enough."""

        def loss(y: Any) -> Any:
            wall = height * 1e-3 * jax.nn.softplus((1 - y) * 1e3)
            return jnp.sum(wall + (y - jnp.arange(3.0, 6.0)) ** 2) + 1

        options = {**OPTIONS, "rtol": 0.0, "gtol": 0.0}
        solution = solve(loss, jnp.full(3, 0.5), **options)
        np.testing.assert_allclose(solution.value, [3, 4, 5], rtol=1e-7)

    def test_it_ends_on_a_kink(self):
        """And says that the gradient is not small there."""

        def loss(y: Any) -> Any:
            return jnp.max(jnp.abs(y - jnp.arange(3.0))) + 0.1 * jnp.sum(y**2) + 7

        options = {**OPTIONS, "rtol": 1e-8, "callback": lambda _: None}
        start = np.full(3, 4.0)
        solution = solve(loss, start, **options)
        assert solution.result == optx.RESULTS.stagnation
        assert solution.stats["num_loss_evaluations"] < 500
        below = [
            {"type": "ineq", "fun": lambda z, s=s: z[3] + s * (z[:3] - np.arange(3))}
            for s in (-1, 1)
        ]
        best = scipy.optimize.minimize(
            lambda z: z[3] + 0.1 * np.sum(z[:3] ** 2) + 7,
            np.array([0.0, 1.0, 2.0, 1.0]),
            constraints=below,
            method="SLSQP",
            options={"ftol": 1e-15},
        )
        np.testing.assert_allclose(solution.loss, best.fun, rtol=1e-9)
        # Nor would it move if it went on.
        steps = solution.stats["num_steps"] + 5
        further = {"gtol": 0.0, "rtol": 0.0, "max_optimizer_steps": steps}
        on = solve(loss, start, **{**options, **further, "state": solution.state})
        assert on.stats["num_steps"] == steps
        np.testing.assert_array_equal(solution.value, on.value)

    def test_a_restart_that_is_due_is_no_end(self):
        """Where the memory is empty already, and no step has been tried."""
        y = jnp.array([3.0, -1.0])
        value, grad = jax.value_and_grad(lambda y: jnp.sum(y**2))(y)
        optimizer: Any = ROBUST_OPTIMIZER
        *others, (progress, search) = optimizer.init(y)
        progress = progress._replace(lowest=value, least_slope=jnp.sqrt(40.0), idle=9)
        state, moved = (*others, (progress, search)), []
        for _ in range(2):
            update, state = optimizer.update(
                *(grad, state, y),
                value=value,
                grad=grad,
                value_fn=lambda y: jnp.sum(y**2),
            )
            assert state[0].is_fresh
            assert not optimizer.stands_still(state, update)
            moved.append(bool(jnp.any(update != 0)))
        assert moved == [False, True]
