"""What a solve tells: statuses, numbers, histories."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

from jaxmf_opt import ROBUST_OPTIMIZER, History, Solution, callbacks, solve, traced

R = optx.RESULTS
ROWS = np.array([[0.25, 1.0, -0.5], [2.0, 0.5, 0.0]])
ZOOM = optax.lbfgs(memory_size=3)


def quartic(y: Any, c: Any) -> Any:
    """The same in NumPy and in JAX."""
    c = c.astype(y.dtype)
    return ((y - c) ** 4 + (y - c) ** 2 + 0.5 * y).sum()


def quartic_grad(y: Any, c: Any) -> Any:
    c = c.astype(y.dtype)
    return 4 * (y - c) ** 3 + 2 * (y - c) + 0.5


def minimum(c: Any, steps: int = 6, **options: Any) -> Solution:
    start = np.zeros(3)
    return solve(lambda y: quartic(y, c), start, max_optimizer_steps=steps, **options)


WAYS: dict[str, Callable[..., Any]] = {
    "eager": lambda f: f(ROWS[0]),
    "jit": lambda f: jax.jit(f)(ROWS[0]),
    "jit of vmap": lambda f: jax.tree.map(lambda x: x[0], jax.jit(jax.vmap(f))(ROWS)),
}
CALLBACKS: dict[str, Any] = {
    "none": {},
    "host": {"callback": lambda _: None},
    "traced": {"callback": traced(lambda _: None)},
}
# Each way with a callback, and the two kinds of loops.
PAIRS = [
    ("eager", "host"),
    ("jit", "traced"),
    ("jit of vmap", "host"),
]


class TestStats:
    @pytest.mark.parametrize(("way", "callback"), PAIRS)
    def test_loss_and_gradient_are_those_at_the_value(self, way: str, callback: str):
        with jax.enable_x64():
            solution = WAYS[way](functools.partial(minimum, **CALLBACKS[callback]))
        solution = jax.tree.map(np.asarray, solution)
        y = np.asarray(solution.state.params)
        np.testing.assert_array_equal(solution.value, y)
        stats = solution.stats
        np.testing.assert_allclose(stats["loss"], quartic(y, ROWS[0]), rtol=1e-12)
        norm = np.abs(quartic_grad(y, ROWS[0])).max()
        np.testing.assert_allclose(stats["grad_norm"], norm, rtol=1e-9)
        assert 1e-9 < norm < 1
        assert stats["num_steps"] == 6

    @pytest.mark.parametrize("callback", ["none", "host"])
    def test_also_where_a_tolerance_was_met(self, callback: str):
        solution = minimum(ROWS[0], 50, rtol=1e-3, **CALLBACKS[callback])
        y, state = np.asarray(solution.value), solution.state.minimiser
        assert solution.result == R.successful
        assert solution.stats["num_steps"] < 50
        np.testing.assert_allclose(state.loss, quartic(y, ROWS[0]), rtol=1e-12)
        np.testing.assert_allclose(state.grad, quartic_grad(y, ROWS[0]), atol=1e-12)

    def test_numbers_that_the_callers_floats_do_not_have(self):
        """They are no other finite number."""
        most = 2**40
        solution = solve(lambda y: 1e100 * (y + y**2), 1.0, max_optimizer_steps=most)
        assert solution.stats["loss"].dtype == jnp.float32
        assert solution.stats["loss"] == -np.inf
        assert float(solution.loss) < -1e99
        assert solution.stats["max_steps"] == -1


def _is_even(step: Any, **_: Any) -> Any:
    return step % 2 == 0


OPTIMIZERS: dict[str, Any] = {
    "default": {},
    "zoom": {"optimizer": ZOOM},
    "backtracking that stores gradients": {
        "optimizer": optax.chain(
            optax.sgd(1.0),
            optax.scale_by_backtracking_linesearch(20, store_grad=True),
        )
    },
    "scaled behind the search": {"optimizer": optax.chain(ZOOM, optax.scale(0.5))},
    "every other step": {
        "optimizer": optax.conditionally_mask(ZOOM, _is_even),
    },
}


class TestEvaluations:
    @pytest.mark.parametrize(
        ("name", "callback", "steps"),
        [
            *((name, "none", 7) for name in OPTIMIZERS),
            ("zoom", "host", 7),
            # Whether it stands still at a minimum takes evaluations, too.
            ("default", "none", 300),
        ],
    )
    def test_as_often_as_the_loss_was_executed(
        self, name: str, callback: str, steps: int
    ):
        executions = 0

        def tick() -> None:
            nonlocal executions
            executions += 1

        def loss(y: Any) -> Any:
            jax.debug.callback(tick)
            return quartic(y, ROWS[0])

        options = {**OPTIMIZERS[name], **CALLBACKS[callback]}
        stats = solve(loss, np.zeros(3), max_optimizer_steps=steps, **options).stats
        jax.effects_barrier()
        assert stats["num_loss_evaluations"] == executions >= 5
        assert 5 <= stats["num_grad_evaluations"] <= executions

    def test_lane_by_lane(self):
        batch = jax.vmap(lambda c: minimum(c, 40, rtol=1e-6).stats)(ROWS)
        for i, c in enumerate(ROWS):
            single = minimum(c, 40, rtol=1e-6).stats
            for name in ("num_steps", "num_loss_evaluations", "num_grad_evaluations"):
                assert batch[name][i] == single[name]

    def test_unknown_where_the_optimizer_searches_by_itself(self):
        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            half = jax.tree.map(lambda g: -0.1 * g, updates)
            lower = extra["value_fn"](params + half) < extra["value"]
            return jnp.where(lower, half, 0.5 * half), state

        make: Any = optax.GradientTransformationExtraArgs
        own = make(lambda _: optax.EmptyState(), update)
        for callback in ("none", "host"):
            stats = minimum(ROWS[0], optimizer=own, **CALLBACKS[callback]).stats
            assert stats["num_loss_evaluations"] == stats["num_grad_evaluations"] == -1


def test_a_state_that_is_asked_for_late():
    """It is that after its step, whatever has happened since."""
    states: list[Any] = []
    minimum(ROWS[0], callback=lambda info: states.append(info.solver_state))
    late: list[Any] = []
    minimum(ROWS[0], callback=late.append)
    for info, state in zip(late, states, strict=True):
        jax.tree.map(np.testing.assert_array_equal, info.solver_state, state)


@pytest.mark.parametrize("rtol", [0.0, 1e-12])
def test_a_limit_of_steps_that_a_state_has_passed(rtol: float):
    """Nothing is left to do, whoever looks on."""
    first = minimum(ROWS[0], 4)
    for limit in (0, 3, 4, 6):
        calls: list[Any] = []
        for callback in (None, traced(lambda _: None), calls.append):
            options = {"state": first.state, "rtol": rtol, "callback": callback}
            end = minimum(ROWS[0], limit, **options)
            assert end.stats["num_steps"] == max(limit, 4)
            assert end.result == R.nonlinear_max_steps_reached
            want = minimum(ROWS[0], max(limit, 4)).value
            np.testing.assert_array_equal(end.value, want)
        assert [info.step for info in calls] == list(range(4, limit))


class TestHistory:
    @pytest.mark.parametrize(("way", "callback"), PAIRS)
    def test_is_what_a_callback_sees(self, way: str, callback: str):
        recorder, points = callbacks.Recorder(), [np.zeros(3)]

        def see(info: Any) -> None:
            recorder(info)
            points.append(np.asarray(info.params))

        minimum(ROWS[0], 9, gtol=1e-2, callback=see)
        options = {"history": True, "gtol": 1e-2, **CALLBACKS[callback]}
        with jax.enable_x64():
            stats = WAYS[way](lambda c: minimum(c, 9, **options).stats)
        history, n = stats["history"], int(stats["num_steps"])
        before = np.asarray(history.grad_norm)[n - 1]
        assert float(stats["grad_norm"]) <= 1e-2 < before
        assert isinstance(history, History)
        (record,) = recorder.records
        assert 2 < n == len(record.loss) < 9
        steps = np.abs(np.diff(points, axis=0)).max(axis=1)
        want = (record.loss, record.grad_norm, steps)
        for got, column in zip(history, want, strict=True):
            assert got.shape == (9,)
            np.testing.assert_allclose(got[:n], column, rtol=1e-9)
            assert np.all(np.isnan(got[n:]))

    def test_it_changes_nothing(self):
        solution, plain = minimum(ROWS[0], history=True), minimum(ROWS[0])
        assert jax.tree.structure(solution.state) == jax.tree.structure(plain.state)
        jax.tree.map(np.testing.assert_array_equal, solution.state, plain.state)

    @pytest.mark.parametrize("callback", ["none", "host"])
    def test_of_a_run_that_goes_on(self, callback: str):
        options = {"history": True, **CALLBACKS[callback]}
        whole = minimum(ROWS[0], 6, **options).stats["history"]
        first = minimum(ROWS[0], 4, **options)
        rest = minimum(ROWS[0], 6, state=first.state, **options).stats["history"]
        for a, b, c in zip(whole, first.stats["history"], rest, strict=True):
            np.testing.assert_array_equal(np.concatenate([b, c[4:]]), a)
            assert np.all(np.isnan(c[:4]))


class Case:
    """A loss of two parameters, from where, and how a solve of it has to end."""

    def __init__(self, loss: Callable[[Any], Any], start: float, *results: Any):
        self.loss, self.start, self.results = loss, np.full(2, start), results


LIMIT, NONFINITE, OK = R.nonlinear_max_steps_reached, R.nonfinite, R.successful
STUCK = R.stagnation
# By the default optimizer, gradient descent with a fixed step, and the robust one: by
# those that may differ.
HARD = {
    "minimum": Case(lambda y: jnp.cosh(y - 1).sum(), 0.0, OK, LIMIT),
    "minimum at the start": Case(lambda y: (y**2).sum(), 0.0, OK),
    "flat": Case(lambda y: 0.0 * y.sum() + 3, 1.0, OK),
    "unbounded, slowly": Case(lambda y: y.sum(), 1.0, LIMIT, LIMIT),
    "unbounded, fast": Case(lambda y: -jnp.exp(y).sum(), 1.0, LIMIT, None, STUCK),
    "NaN everywhere": Case(
        lambda y: jnp.log(-1 - y**2).sum(),
        1.0,
        *[NONFINITE] * 2,
    ),
    "infinite at the start": Case(lambda y: (1 / y).sum(), 0.0, *[NONFINITE] * 3),
    "steps out of its domain": Case(
        lambda y: (y - 1e-3 * jnp.log(y)).sum(), 1.0, OK, NONFINITE, OK
    ),
    "gradients of 1e300": Case(
        lambda y: 1e300 * ((y - 0.25) ** 2).sum(), 1.0, STUCK, NONFINITE, STUCK
    ),
    "too steep": Case(
        lambda y: 1e8 * (y[1] - y[0] ** 2) ** 2 + (1 - y[0]) ** 2,
        -1.2,
        *(STUCK, NONFINITE, LIMIT),
    ),
}
SOLVERS: list[dict[str, Any]] = [
    {},
    {"optimizer": optax.sgd(0.25)},
    {"optimizer": ROBUST_OPTIMIZER},
]


class TestResult:
    @pytest.mark.parametrize(
        ("name", "solver"),
        [(name, i) for name, case in HARD.items() for i in range(len(case.results))],
    )
    def test_status_and_finite_value(self, name: str, solver: int):
        case = HARD[name]
        solution = solve(case.loss, case.start, rtol=0.0, **SOLVERS[solver])
        want = case.results[solver]
        assert want is None or solution.result == want, repr(solution)
        with jax.enable_x64():
            loss = case.loss(jnp.asarray(solution.value))
        with np.errstate(divide="ignore"):
            first = case.loss(case.start)
        if np.isfinite(first):
            assert np.all(np.isfinite(solution.value))
            np.testing.assert_allclose(
                solution.state.minimiser.last_finite.loss, loss, rtol=1e-9
            )
        else:
            assert np.all(np.isnan(solution.value))
            assert np.isnan(solution.stats["loss"])

    @pytest.mark.parametrize("name", ["steps out of its domain", "NaN everywhere"])
    def test_with_a_callback(self, name: str):
        """It sees all the steps; the value is the last finite point all the same."""
        case, losses = HARD[name], []
        for optimizer in (optax.sgd(0.25), optax.sgd(0.01)):
            solution = solve(
                case.loss,
                case.start,
                optimizer=optimizer,
                callback=lambda info: losses.append(float(info.loss)),
            )
            finite = np.flatnonzero(np.isfinite(losses))
            assert len(losses) == solution.stats["num_steps"] == 250
            plain = solve(case.loss, case.start, optimizer=optimizer)
            np.testing.assert_array_equal(solution.value, plain.value)
            assert solution.result == plain.result
            if finite.size and solution.result == NONFINITE:
                last = losses[finite[-1]]
                np.testing.assert_allclose(solution.stats["loss"], last, rtol=1e-6)
            losses.clear()

    def test_every_lane_has_its_own(self):
        def loss(y: Any, c: Any) -> Any:
            return quartic(y, c) + jnp.log(c[0]).astype(y.dtype)

        c = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [2.0, 1.0, 0.5]])
        options = {"rtol": 1e-9, "max_optimizer_steps": 30, "history": True}

        def one(c: Any) -> Solution:
            return solve(lambda y: loss(y, c), np.zeros(3), **options)

        batch, alone = jax.jit(jax.vmap(one))(c), jax.jit(one)
        for i, status in enumerate((OK, NONFINITE, OK)):
            lane, single = jax.tree.map(lambda x, i=i: x[i], batch), alone(c[i])
            assert lane.result == single.result == status
            np.testing.assert_allclose(lane.value, single.value, rtol=1e-6)
            assert np.all(np.isfinite(lane.value) == (status == OK))
            assert lane.stats["num_steps"] == single.stats["num_steps"]
            for a, b in zip(
                lane.stats["history"], single.stats["history"], strict=True
            ):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_success_is_one_in_all_units_of_the_loss():
    """In small ones too, where nothing is known yet but that the gradient is small."""
    centre = np.array([1.0, 2.0])

    def loss(y: Any, unit: Any) -> Any:
        return unit * jnp.sum((y - centre) ** 2 + (y - centre) ** 4)

    def one(unit: Any) -> Any:
        return solve(loss, np.array([3.0, -1.0]), unit, optimizer=ZOOM)

    with jax.enable_x64():
        units = 10.0 ** np.arange(-120, 121, 5)
        batch = jax.jit(jax.vmap(one))(units)
    is_right = np.abs(np.asarray(batch.value) - centre).max(axis=1) < 1e-6
    assert np.all(is_right | (batch.result != OK)), units[~is_right]
    assert np.all(is_right[units > 1e-16])


class TestThrow:
    def test_eager(self):
        with pytest.raises(eqx.EquinoxRuntimeError, match="max_optimizer_steps"):
            minimum(ROWS[0], 2, throw=True)
        with pytest.raises(eqx.EquinoxRuntimeError, match="non-finite"):
            solve(HARD["NaN everywhere"].loss, np.ones(2), throw=True)
        with pytest.raises(eqx.EquinoxRuntimeError, match="cannot lower"):
            solve(HARD["too steep"].loss, np.full(2, -1.2), throw=True)
        good = minimum(ROWS[0], 99, rtol=1e-6, throw=True)
        np.testing.assert_array_equal(good.value, minimum(ROWS[0], 99, rtol=1e-6).value)

    def test_in_a_program(self):
        way = "jit of vmap"

        def value(c: Any) -> Any:
            return minimum(c, 2, throw=True).value

        with pytest.raises(jax.errors.JaxRuntimeError, match="max_optimizer_steps"):
            jax.block_until_ready(WAYS[way](value))

        def good(c: Any) -> Any:
            return minimum(c, 99, rtol=1e-6, throw=True).value

        want = minimum(ROWS[0], 99, rtol=1e-6).value
        np.testing.assert_allclose(WAYS[way](good), want, rtol=1e-6)
        assert np.all(np.isfinite(jax.jacrev(good)(ROWS[0])))


class TestRepr:
    def test_numbers(self):
        lines = repr(minimum(ROWS[0], 40, rtol=1e-6, history=True)).splitlines()
        assert len(lines) < 15
        assert "  result=successful," in lines
        assert any(line.startswith("  num_steps=") for line in lines)
        assert "  value=f64[3](numpy)," in lines or "  value=f64[3]," in lines

    def test_of_a_batch(self):
        batch = jax.vmap(lambda c: minimum(c, 30, rtol=1e-6))
        text = repr(batch(np.array([ROWS[0], ROWS[1], np.full(3, np.nan)])))
        assert "result=2 successful + 1 nonfinite" in text
        assert ", or nan" in text
