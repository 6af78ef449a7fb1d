"""The minimiser by itself: any optax transformation, each point evaluated once."""

from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from compiling import loops_around

from jaxmf_opt import LeanOptaxMinimiser, solve

pytestmark = pytest.mark.mixes  # optax's code

STEPS = 12


def start() -> dict[str, Any]:
    return {"a": jnp.array([-1.2, 1.0]), "b": (jnp.array(0.5),)}


def rosenbrock(y: Any, args: Any = None) -> jax.Array:
    del args
    (x0, x1), (b,) = y["a"], y["b"]
    return 100.0 * (x1 - x0**2) ** 2 + (1 - x0) ** 2 + (b - x0) ** 4


ZOOM = optax.scale_by_zoom_linesearch(max_linesearch_steps=15)
OPTIMIZERS = {
    "default": optax.lbfgs(
        memory_size=1, linesearch=optax.scale_by_backtracking_linesearch(128)
    ),
    "lbfgs zoom": optax.lbfgs(memory_size=5, linesearch=ZOOM),
    "backtracking, gradient stored": optax.chain(
        optax.sgd(1.0),
        optax.scale_by_backtracking_linesearch(30, store_grad=True),
    ),
    "scaled after the line search": optax.chain(optax.lbfgs(), optax.scale(0.5)),
    "adam": optax.adam(1e-2),
    "schedule from 0": optax.sgd(optax.linear_schedule(0.0, 1e-3, 5)),
    "multi steps": optax.MultiSteps(optax.sgd(1e-3), 3).gradient_transformation(),
    "hyperparameters in the state": optax.inject_hyperparams(optax.adam)(1e-2),
    "plain transformation": optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None: (
            jax.tree.map(lambda u: -1e-3 * u, updates),
            state,
        ),
    ),
}


def plain_loop(optimizer: Any, steps: int = STEPS) -> list[Any]:
    """The iterates of the loop that optax's documentation shows."""
    optimizer = optax.with_extra_args_support(optimizer)

    @jax.jit
    def step(y: Any, state: Any) -> Any:
        loss, grad = jax.value_and_grad(rosenbrock)(y)
        update, state = optimizer.update(
            grad, state, y, value=loss, grad=grad, value_fn=rosenbrock
        )
        return optax.apply_updates(y, update), state

    y, state = start(), optimizer.init(start())
    iterates = []
    for _ in range(steps):
        y, state = step(y, state)
        iterates.append(y)
    return iterates


def by_hand(
    solver: LeanOptaxMinimiser, fn: Callable[..., Any], y: Any
) -> tuple[Callable[..., Any], Any]:
    """Compiled `step(y, state)` and the first state."""
    fn_aux = lambda y, args: (fn(y), None)  # noqa: E731
    loss = jax.ShapeDtypeStruct((), y["a"].dtype)
    state = solver.init(fn_aux, y, None, {}, loss, None, frozenset())
    step = jax.jit(lambda y, s: solver.step(fn_aux, y, None, {}, s, frozenset())[:2])
    return step, state


@pytest.mark.parametrize("name", [x for x in OPTIMIZERS if "scaled" not in x])
def test_steps_are_those_of_a_plain_loop(name: str):
    with jax.enable_x64():
        y = start()
        step, first = by_hand(LeanOptaxMinimiser(OPTIMIZERS[name]), rosenbrock, y)
        state = first
        for i, want in enumerate(plain_loop(OPTIMIZERS[name])):
            y, state = step(y, state)
            assert state.step == i + 1
            chex.assert_trees_all_close(y, want, rtol=1e-9, atol=1e-12)
        # The state is a pytree of arrays whose types never change.
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(first))
        assert jax.tree.structure(state) == jax.tree.structure(first)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, first)


def test_in_optimistix():
    with jax.enable_x64():
        solver = LeanOptaxMinimiser(optax.lbfgs(), rtol=1e-8, atol=1e-8)
        solution = optx.minimise(rosenbrock, solver, start(), max_steps=200)
        chex.assert_trees_all_close(
            solution.value, {"a": jnp.ones(2), "b": (jnp.array(1.0),)}, rtol=1e-2
        )
        assert solution.result == optx.RESULTS.successful
        assert 10 < solution.stats["num_steps"] < 200
        assert solution.stats["num_steps"] == solution.state.step


def test_aux_is_that_of_the_last_evaluation():
    def with_aux(y: jax.Array, args: Any) -> tuple[jax.Array, Any]:
        return jnp.sum((y - args) ** 2), {"twice": 2 * y}

    solver = LeanOptaxMinimiser(optax.lbfgs(), rtol=1e-6, atol=1e-6)
    solution = optx.minimise(with_aux, solver, jnp.zeros(2), 3.0, has_aux=True)
    np.testing.assert_allclose(solution.value, 3.0, rtol=1e-5)
    np.testing.assert_allclose(solution.aux["twice"], 6.0, rtol=1e-5)


def test_hyperparameters_as_arrays_do_not_recompile():
    traces = 0

    @eqx.filter_jit
    def solve(solver: LeanOptaxMinimiser) -> Any:
        nonlocal traces
        traces += 1
        return optx.minimise(
            rosenbrock, solver, start(), max_steps=STEPS, throw=False
        ).value

    values = [
        solve(LeanOptaxMinimiser(optax.sgd(jnp.array(rate))))["a"]
        for rate in (1e-4, 1e-3)
    ]
    assert traces == 1
    assert abs(values[0] - values[1]).max() > 1e-4


class Counted:
    """A loss that counts its executions."""

    def __init__(self, fn: Callable[[Any], jax.Array] = rosenbrock):
        self.fn = fn
        self.count = 0

    def _tick(self) -> None:
        self.count += 1

    def __call__(self, y: Any, args: Any = None) -> jax.Array:
        jax.debug.callback(self._tick)
        return self.fn(y)

    def during(self, call: Callable[[], Any]) -> int:
        self.count = 0
        jax.block_until_ready(call())
        jax.effects_barrier()
        return self.count


@pytest.mark.parametrize(
    ("name", "of_step"),
    [
        # value and gradient, and one value for each trial of the line search
        ("default", lambda s: 1 + s.opt_state[-1].info.num_linesearch_steps),
        # stored: the trials alone
        ("lbfgs zoom", lambda s: s.opt_state[-1].info.num_linesearch_steps),
        (
            "backtracking, gradient stored",
            lambda s: s.opt_state[-1].info.num_linesearch_steps,
        ),
        # a transformation behind the line search: what it stored is of another point
        (
            "scaled after the line search",
            lambda s: 1 + s.opt_state[0][-1].info.num_linesearch_steps,
        ),
        ("multi steps", lambda s: 1),
    ],
)
def test_evaluations(name: str, of_step: Callable[[Any], Any]):
    counted, y = Counted(), start()
    step, state = by_hand(LeanOptaxMinimiser(OPTIMIZERS[name]), counted, y)
    first = True
    for _ in range(STEPS):
        before = counted.during(lambda: step(y, state))  # noqa: B023
        y, state = step(y, state)
        stores = state.reuses_linesearch
        assert before == of_step(state) + (first and stores)
        first = False


def test_stops_before_the_line_search():
    """The step that finds the minimum reached evaluates once, and does not move."""
    counted, y = Counted(), {"a": jnp.ones(2), "b": (jnp.array(1.0),)}
    solver = LeanOptaxMinimiser(OPTIMIZERS["default"], gtol=1e-6)
    step, state = by_hand(solver, counted, y)
    new_y, new_state = step(y, state)
    chex.assert_trees_all_equal(new_y, y)
    chex.assert_trees_all_equal(new_state.opt_state, state.opt_state)
    assert new_state.converged
    assert new_state.step == 0
    assert counted.during(lambda: step(y, state)) == 1


@pytest.mark.parametrize("name", ["schedule from 0", "multi steps"])
def test_zero_steps_are_not_convergence(name: str):
    solver = LeanOptaxMinimiser(OPTIMIZERS[name], rtol=1e-9, atol=1e-9)
    solution = optx.minimise(rosenbrock, solver, start(), max_steps=STEPS, throw=False)
    assert solution.stats["num_steps"] == STEPS
    assert rosenbrock(solution.value) < rosenbrock(start())


def bowl(y: jax.Array) -> jax.Array:
    """Strictly convex, so that rounding does not decide the path."""
    return jnp.sum(jnp.arange(1.0, 4.0) * y**2) + jnp.sum((y - 1.0) ** 4)


def test_lanes_equal_single_solves():
    """A lane that has stopped early is not touched while others go on."""
    starts = jnp.array([[-9.0, 5.0, 1.0], [0.1, 0.2, 0.3], [30.0, -2.0, 0.0]])
    solver = LeanOptaxMinimiser(optax.lbfgs(memory_size=3), rtol=1e-6, atol=1e-6)

    def solve(y: jax.Array) -> Any:
        return optx.minimise(lambda y, _: bowl(y), solver, y, throw=False)

    with jax.enable_x64():
        starts = jnp.float64(starts)
        lanes = jax.jit(jax.vmap(solve))(starts)
        assert len(set(lanes.stats["num_steps"].tolist())) > 1
        single = jax.jit(solve)
        for i, y in enumerate(starts):
            want = single(y)
            lane = jax.tree.map(lambda x: x[i], lanes)  # noqa: B023
            np.testing.assert_allclose(lane.value, want.value, rtol=1e-12)
            assert lane.stats["num_steps"] == want.stats["num_steps"]
            assert lane.result == want.result


def test_a_stopped_lane_ends_its_line_search_at_once():
    """The batch costs what its slowest lane costs."""
    counted = Counted(bowl)
    solver = LeanOptaxMinimiser(OPTIMIZERS["default"], gtol=1e-4)

    @jax.jit
    @jax.vmap
    def solve(y: jax.Array) -> Any:
        fn = lambda y, _: counted(y)  # noqa: E731
        return optx.minimise(fn, solver, y, max_steps=200, throw=False).value

    with jax.enable_x64():
        slow = jnp.array([[30.0, -2.0, 0.0]])
        minimum = solve(slow)
        alone = counted.during(lambda: solve(slow))
        both = counted.during(lambda: solve(jnp.concatenate([slow, minimum])))
    assert alone > 20
    assert both == alone


def test_a_batch_does_not_evaluate_again_what_is_stored():
    """The gradient is computed in the loop of a loop only, and not in every step."""

    def one(c: Any) -> Any:
        def loss(y: Any) -> Any:  # in whose gradient alone there is a sine
            return -jnp.sum(jnp.log(jnp.cos(y - c)))

        optimizer = OPTIMIZERS["lbfgs zoom"]
        return solve(loss, jnp.zeros(3), optimizer=optimizer, gtol=1e-6).value

    program = jax.jit(jax.vmap(one)).lower(jnp.linspace(0, 1, 4)).compile()
    text = program.as_text()
    assert text is not None
    assert loops_around("sine", text) == {2}


def test_a_step_that_is_changed_behind_the_line_search():
    """What the line search has stored is of a point that was not moved to."""
    inner = optax.lbfgs()

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        step, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(lambda x: x / 2, step), state

    halved = optax.GradientTransformationExtraArgs(inner.init, update)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum((x - 3) ** 2 + (x - 1) ** 4)

    solution = solve(
        loss, jnp.zeros(2), optimizer=halved, max_optimizer_steps=3, history=True
    )
    with jax.enable_x64():
        x: Any = jnp.zeros(2)
        state, losses = halved.init(x), []
        for _ in range(3):
            value, grad = jax.value_and_grad(loss)(x)
            losses.append(value)
            extra = {"value": value, "grad": grad, "value_fn": loss}
            step, state = halved.update(grad, state, x, **extra)
            x = optax.apply_updates(x, step)
    history: Any = solution.stats["history"]
    np.testing.assert_allclose(history.loss, losses, rtol=1e-6)
