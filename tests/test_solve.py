"""The whole answer of a solve, and going on from it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from compiling import compilations

from jaxmf_opt import SolverState, robust, solve

ROWS = np.array([[0.25, 1.0], [2.0, 0.5], [-1.0, 3.0]])
OPTIMIZERS: dict[str, Any] = {
    "default": {},
    "zoom": {"optimizer": optax.lbfgs(memory_size=3)},
    "adam": {"optimizer": optax.adam(0.1)},
}


def minimum(c: Any, steps: int, state: Any = None, **options: Any) -> optx.Solution:
    def loss(y: jax.Array) -> jax.Array:
        away = y - jnp.asarray(c, y.dtype)
        return jnp.sum(jnp.cosh(away)) + jnp.sum(away**4)

    start = np.zeros(2, np.float32)
    return solve(loss, start, max_optimizer_steps=steps, state=state, **options)


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


WAYS: dict[str, Any] = {
    "eager": lambda f: lambda *state: f(ROWS[0], *state),
    "eager with a callback": lambda f: (
        lambda *state: f(ROWS[0], *state, callback=lambda _: None)
    ),
    "jit": lambda f: lambda *state: jax.jit(f)(ROWS[0], *state),
    "jit of vmap": lambda f: lambda *state: jax.jit(jax.vmap(f))(ROWS, *state),
}


class TestGoingOn:
    @pytest.mark.parametrize(
        ("way", "optimizer", "rtol"),
        [
            ("eager", "default", 0.0),
            ("eager with a callback", "zoom", 1e-12),
            ("jit", "adam", 1e-12),
            ("jit of vmap", "default", 1e-12),
        ],
    )
    def test_as_if_it_had_never_stopped(self, way: str, optimizer: str, rtol: float):
        options = {**OPTIMIZERS[optimizer], "rtol": rtol}

        def run(steps: int, *state: Any) -> SolverState:
            fn = functools.partial(_state_of, steps=steps, options=options)
            return WAYS[way](fn)(*state)

        whole = run(7)
        assert_same(run(7, run(4)), whole)
        if way == "eager":
            assert_same(run(7, run(7)), whole)
            assert_same(run(7, run(0)), whole)

    def test_after_a_tolerance_was_met(self):
        """With the same one there is nothing to do; with a smaller one it goes on."""

        def run(rtol: float, *state: Any) -> SolverState:
            fn = functools.partial(_state_of, steps=100, options={"rtol": rtol})
            return WAYS["eager with a callback"](fn)(*state)

        first, tight = run(1e-3), run(1e-9)
        counts = [np.asarray(s.minimiser.step) for s in (first, tight)]
        assert np.all(counts[0] < counts[1])
        assert_same(run(1e-3, first), first)
        assert_same(run(1e-9, first), tight)

    def test_from_a_run_without_tolerances_and_back(self):
        def go_on(steps: int, rtol: float, state: Any = None) -> optx.Solution:
            return minimum(ROWS[0], steps, state, rtol=rtol)

        want = go_on(100, 1e-6)
        got = go_on(100, 1e-6, go_on(3, 0.0).state)
        assert got.stats["num_steps"] == want.stats["num_steps"] < 100
        np.testing.assert_array_equal(got.value, want.value)
        # A tolerance that was met does not end a run without one.
        got = go_on(12, 0.0, go_on(100, 1e-2).state)
        np.testing.assert_array_equal(got.value, go_on(12, 0.0).value)

    def test_a_stall_is_that_of_one_optimizer(self):
        def loss(y: jax.Array) -> jax.Array:
            return jnp.sum((y - 3) ** 4) + 1e6 * jnp.abs(y[0] - 2.0000001)

        def run(trials: int, state: Any = None) -> optx.Solution:
            optimizer = robust.robust_lbfgs(max_linesearch_steps=trials)
            return solve(loss, np.array([2.0, 5.0]), optimizer=optimizer, state=state)

        stuck = run(1)
        assert stuck.result == optx.RESULTS.stagnation
        assert run(30, stuck.state).stats["num_steps"] > stuck.stats["num_steps"] + 9

    @pytest.mark.parametrize("atol", [(1e-2, 1e-4), (1e-4, 1e-7)])
    def test_a_smaller_tolerance_on_a_steep_loss(self, atol: tuple[float, float]):
        """Where the change of the loss decides, not that of the parameters.

        (10 and 1e-2 end at the same point: the first with a gradient that is small.)
        """

        def run(atol: float, state: Any = None) -> SolverState:
            slopes, centre = np.array([1.0, 30.0]), np.array([1.0, 2.0])
            return solve(
                lambda y: 1e6 * jnp.sum(slopes * jnp.cosh(y - centre)),
                np.zeros(2),
                rtol=0.0,
                atol=atol,
                state=state,
            ).state

        first, tight = run(atol[0]), run(atol[1])
        assert int(first.minimiser.step) < int(tight.minimiser.step)
        assert_same(run(atol[1], first), tight)

    def test_after_a_callback_has_stopped_it(self):
        stopped = minimum(ROWS[0], 9, callback=lambda info: info.step == 3)
        assert stopped.stats["num_steps"] == 4
        assert stopped.result == optx.RESULTS.successful
        assert_same(minimum(ROWS[0], 9, stopped.state).state, minimum(ROWS[0], 9).state)


def _state_of(
    c: Any, state: Any = None, *, steps: int, options: dict[str, Any], **more: Any
) -> SolverState:
    return minimum(c, steps, state, **options, **more).state


class TestAnotherProblem:
    """A state from elsewhere is refused, not gone on from."""

    def test_other_values_in_the_loss(self):
        state = minimum(ROWS[0], 4).state
        for more in ({}, {"callback": lambda _: None}, {"optimizer": adam_with(0.1)}):
            state = minimum(ROWS[0], 4, **more).state
            with pytest.raises(ValueError, match=r"`state` .* the same problem"):
                minimum(ROWS[1], 9, state, **more)

    def test_where_the_loss_has_come_down_far(self):
        """What is small beside the loss at the start is no rounding of it."""

        def run(c: float, state: Any = None) -> Any:
            zoom, start = optax.lbfgs(memory_size=3), np.array(1e4)
            return solve(lambda y: (y - c) ** 2, start, state=state, optimizer=zoom)

        with pytest.raises(ValueError, match=r"`state` .* the same problem"):
            run(0.9, run(0.0).state)

    def test_another_shape_or_optimizer(self):
        state = minimum(ROWS[0], 4).state
        with pytest.raises(ValueError, match="`state` must be that of a solve"):
            solve(lambda y: jnp.sum(y**2), np.zeros(3), state=state)
        with pytest.raises(ValueError, match="`state` must be that of a solve"):
            minimum(ROWS[0], 9, state, optimizer=optax.adam(0.1))

    def test_in_a_program_it_gives_nan(self):
        state = minimum(ROWS[0], 4).state
        go_on = jax.jit(jax.vmap(lambda c: minimum(c, 9, state)))
        batch = go_on(ROWS)
        finite = np.isfinite(batch.value).all(axis=1)
        np.testing.assert_array_equal(finite, [True, False, False])
        failed = jax.tree.map(lambda x: x[1], batch.result)
        assert failed == optx.RESULTS.nonfinite
        np.testing.assert_allclose(batch.value[0], minimum(ROWS[0], 9).value, rtol=1e-6)

    def test_rounding_is_no_other_problem(self):
        """Another program for the same loss, at a minimum where digits cancel."""
        scale = 1e12
        a, b = np.linspace(1, 2, 12).reshape(4, 3), np.arange(4.0)

        def residuals(y: jax.Array) -> jax.Array:
            return scale * jnp.sum((a @ y - b) ** 2)

        def expanded(y: jax.Array) -> jax.Array:
            return scale * (y @ (a.T @ a) @ y - 2 * (a.T @ b) @ y + b @ b)

        state = solve(residuals, np.zeros(3)).state
        assert solve(expanded, np.zeros(3), state=state).stats["num_steps"] >= 1


def adam_with(rate: float) -> optax.GradientTransformation:
    """One that cannot be compared with others."""
    return optax.adam(lambda _: rate)


class TestSolution:
    def test_value_is_the_parameters_in_their_own_dtypes(self):
        solution = minimum(ROWS[0], 50)
        assert solution.value.dtype == jnp.float32
        assert solution.state.params.dtype == jnp.float64
        np.testing.assert_array_equal(
            solution.value, np.asarray(solution.state.params).astype(np.float32)
        )
        np.testing.assert_allclose(solution.value, ROWS[0], atol=1e-5)

    @pytest.mark.parametrize("way", ["eager with a callback", "jit"])
    def test_stats_are_numbers_of_the_caller(self, way: str, x64: bool):
        run = lambda c, **more: minimum(c, 3, **more).stats  # noqa: E731
        stats = WAYS[way](run)()
        assert stats["num_steps"] == stats["max_steps"] == 3
        for name, number in stats.items():
            kind = "float" if name in ("loss", "grad_norm") else "int"
            assert number.dtype == f"{kind}{64 if x64 else 32}"


def fit(params: Any, data: Any) -> Any:
    """A loss of parameters and data, and the residuals."""
    residuals = data["x"] @ params["w"] * data["scale"] - data["y"]
    return jnp.sum(residuals**2) + 0.1 * jnp.sum(params["w"] ** 2), residuals


X = np.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.1]])


def closed_form(y: Any, scale: float) -> Any:
    x = scale * X
    return np.linalg.solve(x.T @ x + 0.1 * np.eye(2), x.T @ np.asarray(y))


@pytest.mark.mixes  # data of float64 in a float32 program
class TestArgs:
    START = {"w": np.zeros(2, np.float32)}  # noqa: RUF012
    OPTIONS: dict[str, Any] = {"has_aux": True, "rtol": 1e-9}  # noqa: RUF012

    def test_are_operands(self):
        """Numbers and arrays of NumPy among them: nothing is compiled again."""
        for y, scale in (([1.0, 2.0, 3.0], 2), ([-1.0, 0.5, 9.0], 1)):
            data = {"x": X, "y": np.array(y), "scale": scale}
            with compilations() as events:
                solution = solve(fit, self.START, data, **self.OPTIONS)
            want = closed_form(y, scale)
            np.testing.assert_allclose(solution.value["w"], want, rtol=1e-6)
            want = X @ want * scale - y
            np.testing.assert_allclose(solution.aux, want, rtol=1e-5, atol=1e-6)
        assert not events

    def test_a_number_keeps_its_digits(self):
        value = solve(lambda y, c: (y - c) ** 2, np.float64(0.0), 0.1, rtol=1e-9)
        assert float(value.loss) < 1e-30
        assert float(value.state.params) == 0.1

    def test_have_derivatives_and_lanes(self):
        def end(y: Any) -> Any:
            data = {"x": X, "y": y, "scale": 2}
            solution = solve(fit, self.START, data, **self.OPTIONS)
            return solution.value["w"], solution.aux

        ys = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
        values, residuals = jax.jit(jax.vmap(end))(ys)
        want = closed_form(ys.T, 2).T
        np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(residuals, 2 * want @ X.T - ys, atol=1e-5)
        of_value, of_aux = jax.jacobian(end)(ys[0])
        np.testing.assert_allclose(of_value, closed_form(np.eye(3), 2), rtol=1e-5)
        want = 2 * X @ closed_form(np.eye(3), 2) - np.eye(3)
        np.testing.assert_allclose(of_aux, want, rtol=1e-5, atol=1e-6)

    def test_beside_a_gradient(self):
        def both(y: Any, c: Any) -> Any:
            return (jnp.sum((y - c) ** 2), {"y": y}), 2 * (y - c)

        solution = solve(both, np.zeros(2), 1.5, grad=True, **self.OPTIONS)
        np.testing.assert_array_equal(solution.aux["y"], solution.value)
        np.testing.assert_array_equal(solution.value, 1.5)

    def test_bad_calls(self):
        with pytest.raises(TypeError, match="`loss_fn` must be callable with two arg"):
            solve(lambda y: y**2, 1.0, 2.0)
        with pytest.raises(TypeError, match=r"must return \(loss, aux\), as `has_aux`"):
            solve(lambda y: y**2, 1.0, has_aux=True)
        with pytest.raises(TypeError, match=r"\(\(loss, aux\), gradient\)"):
            solve(lambda y: (y**2, 2 * y), 1.0, has_aux=True, grad=True)
        with pytest.raises(TypeError, match="`has_aux` must be True or False"):
            solve(lambda y: y**2, 1.0, has_aux=1)  # pyright: ignore[reportArgumentType]
