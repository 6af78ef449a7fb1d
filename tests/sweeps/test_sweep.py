"""Each lane of a sweep is a solve of its own, however they are run together."""

import functools
import json
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from compiling import compilations
from jax.sharding import Mesh
from processes import report_of

from jaxmf_opt import (
    DEFAULT_OPTIMIZER,
    ROBUST_OPTIMIZER,
    CallbackArgs,
    Lane,
    Solution,
    combine,
    solve,
    sweep,
    traced,
)
from jaxmf_opt.sweeps import _batch, _collect

R = optx.RESULTS
# Seven lanes in two batches of four, where nothing else is said, or four in one: each
# width, limit of steps and kind of option is a program of its own to compile.
START = np.zeros(3)
ROWS = np.random.default_rng(0).uniform(0.5, 2.0, (7, 3))
FEW = ROWS[:4]
SGD = optax.sgd(0.1)
CHEAP: dict[str, Any] = {"optimizer": SGD, "max_optimizer_steps": 3}


def loss(x: Any, h: Any) -> Any:
    """Curved by about 1 everywhere, with a gradient that no rounding makes 0."""
    h = jnp.asarray(h, x.dtype)
    return jnp.sum(h * jnp.cosh(x - h)) + jnp.sum((x - 1.0) ** 2)


def row(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def alone(hyperparams: Any = ROWS, loss: Any = loss, **options: Any) -> Solution:
    """The solves one by one, from one start, with an axis over them in front."""
    count = len(jax.tree.leaves(hyperparams)[0])
    return stack([alone_at(row(hyperparams, i), loss, **options) for i in range(count)])


def alone_in_program(one: Callable[[Any], Solution], hyperparams: Any) -> Solution:
    """The same of a solve that is compiled once, whatever its numbers are.

    For many lanes, and for numbers that are constants of an eager solve.
    """
    count = len(jax.tree.leaves(hyperparams)[0])
    with jax.enable_x64():
        one = jax.jit(one)
        return stack([one(row(hyperparams, i)) for i in range(count)])


def alone_at(h: Any, loss: Any = loss, **options: Any) -> Solution:
    return solve(lambda x: loss(x, h), START, **options)


def assert_close(got: Any, want: Any) -> None:
    """The same trees, dtypes, integers and NaNs; floats but for their rounding."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    paths = jax.tree_util.tree_leaves_with_path(got)
    for (path, a), b in zip(paths, jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        where = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        if not jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_array_equal(a, b, err_msg=where)
            continue
        # A float32 may be rounded from a float64 to one side or the other; and numbers
        # near 0 are differences of numbers of about 1.
        rtol = max(1e-12, float(jnp.finfo(a.dtype).eps))
        a, b = a.astype(float), b.astype(float)
        np.testing.assert_allclose(a, b, rtol, atol=1e-13, err_msg=where)


def assert_same(got: Any, want: Any) -> None:
    """To the bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def few_examples(count: int, **strategies: Any) -> Callable[..., Any]:
    """As many as are worth their time: each retraces a sweep, and some compile one."""

    def wrap(test: Any) -> Any:
        given = hypothesis.given(**strategies)(test)
        return hypothesis.settings(max_examples=count)(given)

    return wrap


HYPERPARAMS = hnp.arrays(float, ROWS.shape, elements=st.floats(0.5, 2.0))
SOLVERS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, tolerances": {"rtol": 1e-6, "atol": 1e-9, "gtol": 1e-9},
    "robust": {"optimizer": ROBUST_OPTIMIZER},
}


class TestLanes:
    @pytest.mark.parametrize("name", SOLVERS)
    @few_examples(2, rows=HYPERPARAMS)
    def test_are_single_solves(self, name: str, rows: np.ndarray):
        with jax.enable_x64():
            got = sweep(loss, START, rows, batch_size=4, **self.options(name))
            one = self.single_solve(name)
            assert_close(got, stack([one(h) for h in rows]))

    @staticmethod
    def options(name: str) -> dict[str, Any]:
        return {"history": True, **SOLVERS[name]}

    @staticmethod
    @functools.cache
    def single_solve(name: str) -> Callable[[Any], Solution]:
        """Compiled: one with the robust optimizer is not cached under these hooks."""
        return jax.jit(lambda h: alone_at(h, **TestLanes.options(name)))

    def test_in_both_settings(self, x64: bool):
        """NumPy's float64 hyperparameters are exact in a float32 program, too."""
        options = self.options("default, tolerances")
        got = sweep(loss, START, FEW, **options)
        assert got.stats["loss"].dtype == (np.float64 if x64 else np.float32)
        assert_close(got, alone(FEW, **options))

    def test_values_have_the_dtypes_of_a_solve(self, x64: bool):
        """Python's floats too, and those that the program around has not. (Here the
        hyperparameters are narrow.)
        """
        params = {
            "float32": jnp.ones(3, jnp.float32),
            "float64": np.ones(3),
            "bfloat16": jnp.ones(3, jnp.bfloat16),
            "int32": np.ones(3, np.int32),
            "python": (1.0, 1),
        }

        def of_sum(x: Any, h: Any) -> Any:
            return loss(sum(jax.tree.leaves(x)), h)

        rows = jnp.asarray(FEW, jnp.float32)
        options = {"optimizer": optax.sgd(0.01), "max_optimizer_steps": 3}
        got = sweep(of_sum, params, rows, **options)
        want = [solve(lambda x, h=h: of_sum(x, h), params, **options) for h in rows]
        assert got.value["float64"].dtype == np.float64
        assert got.value["python"][1].dtype == (np.float64 if x64 else np.float32)
        assert_close(got, stack(want))

    def test_it_is_a_solution_of_jax_arrays(self):
        solution = run(3)
        assert type(solution) is Solution
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(solution))
        assert "result=7 nonlinear_max_steps_reached" in repr(solution)

    def test_a_loss_with_its_gradient(self):
        """The user's: here one that masks a parameter, which then stays."""

        def both(x: Any, h: Any) -> Any:
            value, grad = jax.value_and_grad(loss)(x, h)
            return value, grad * np.array([1.0, 0.0, 1.0])

        got = sweep(both, START, FEW, grad=True, **CHEAP)
        np.testing.assert_array_equal(got.value[:, 1], 0.0)
        assert_close(got, alone(FEW, both, grad=True, **CHEAP))

    def test_no_steps(self):
        seen = Seen()
        got = run(0, FEW, history=True, callback=seen)
        want = alone(FEW, max_optimizer_steps=0, optimizer=SGD, history=True)
        assert_close(got, want)
        np.testing.assert_array_equal(got.value, np.zeros((4, 3)))
        assert [x.shape for x in got.stats["history"]] == [(4, 0)] * 3
        assert not seen.steps


# Where the lanes are in these: nowhere, or along any axis, counted from either end.
AXES = [None, 0, 1, -1, -2]
VECTORS = ["start", "centre"]
SCALARS = ["offset", "weight"]


def weighed(params: Any, h: Any) -> Any:
    x = params["start"] + params["offset"]
    return h["weight"] * loss(x, h["centre"]) + params["offset"] ** 2


@jax.jit
def weighed_alone(params: Any, h: Any) -> Solution:
    return solve(lambda x: weighed(x, h), params, **CHEAP)


STARTS = jnp.linspace(-1.0, 1.0, 9).reshape(3, 3).astype(jnp.bfloat16)
SQUARE = ROWS[:3]

# Starts and hyperparameters, each of 3 numbers, for 3 lanes, so that lanes along
# the wrong axis would go unnoticed but for the values.
FORMS: dict[str, tuple[Any, Callable[[int], tuple[Any, Any]]]] = {
    "many starts": ((0, None), lambda i: (STARTS[i], SQUARE)),
    "both": ((0, 0), lambda i: (STARTS[i], SQUARE[i])),
    "a list": ([0, 0], lambda i: (STARTS[i], SQUARE[i])),
    "second axis": ((None, 1), lambda i: (STARTS, SQUARE[:, i])),
    "one for both": (0, lambda i: (STARTS[i], SQUARE[i])),
    "one for both, from the end": (-1, lambda i: (STARTS[:, i], SQUARE[:, i])),
    "NumPy's integers": (
        (np.int64(0), np.int64(1)),
        lambda i: (STARTS[i], SQUARE[:, i]),
    ),
}


class TestInAxes:
    def assert_lanes(
        self,
        loss: Any,
        arguments: Sequence[tuple[Any, Any]],
        params: Any,
        hyperparams: Any,
        in_axes: Any,
    ) -> None:
        got = sweep(loss, params, hyperparams, in_axes=in_axes, **CHEAP)
        want = [solve(lambda x, h=h: loss(x, h), p, **CHEAP) for p, h in arguments]
        assert_close(got, stack(want))

    @few_examples(
        6,
        axes=st.fixed_dictionaries(
            {
                **{name: st.sampled_from(AXES) for name in VECTORS},
                **{name: st.sampled_from([None, 0, -1]) for name in SCALARS},
            }
        ).filter(lambda axes: any(a is not None for a in axes.values())),
    )
    def test_anywhere(self, axes: dict[str, int | None]):
        rng, count = np.random.default_rng(1), 4
        lanes: list[dict[str, Any]] = [{} for _ in range(count)]
        whole: dict[str, Any] = {}
        for name, axis in axes.items():
            shape = (3,) if name in VECTORS else ()
            x = rng.uniform(0.5, 1.5, (count, *shape))
            for i, lane in enumerate(lanes):
                lane[name] = x[0 if axis is None else i]
            whole[name] = x[0] if axis is None else np.stack(list(x), axis)

        def split(tree: dict[str, Any]) -> tuple[Any, Any]:
            params, hyperparams = ("start", "offset"), ("centre", "weight")
            return {n: tree[n] for n in params}, {n: tree[n] for n in hyperparams}

        with jax.enable_x64():
            got = sweep(weighed, *split(whole), in_axes=split(axes), **CHEAP)
            want = [weighed_alone(*split(lane)) for lane in lanes]
        assert_close(got, stack(want))

    @pytest.mark.mixes  # starts of another rank than the hyperparameters
    @pytest.mark.parametrize("form", FORMS)
    def test_forms(self, form: str):
        in_axes, lane = FORMS[form]

        def summed(x: Any, h: Any) -> Any:
            return jnp.sum(loss(x, h) * jnp.ones(3))

        self.assert_lanes(summed, [lane(i) for i in range(3)], STARTS, SQUARE, in_axes)

    def test_an_axis_for_a_part_of_a_tree(self):
        h = {"mapped": (FEW, {"also": FEW[:, :1]}), "shared": [FEW[0], 2.0, None]}
        axes = (None, {"mapped": 0, "shared": None})

        def of_tree(x: Any, h: Any) -> Any:
            centre, more = h["mapped"]
            shift, factor, nothing = h["shared"]
            assert nothing is None
            return factor * loss(x - shift, centre) + jnp.sum(more["also"] * x**2)

        lanes = [(START, {**h, "mapped": row(h["mapped"], i)}) for i in range(4)]
        self.assert_lanes(of_tree, lanes, START, h, axes)

    def test_what_is_no_array_is_shared(self):
        h = {"centre": FEW, "kind": "cosh", "fn": jnp.cosh}
        axes = (None, {"centre": 0, "kind": None, "fn": None})

        def by_name(x: Any, h: Any) -> Any:
            assert h["kind"] == "cosh"
            return jnp.sum(h["fn"](x - h["centre"]))

        lanes = [(START, {**h, "centre": c}) for c in FEW]
        self.assert_lanes(by_name, lanes, START, h, axes)

    def test_modules_and_nones(self):
        class Problem(eqx.Module):
            centre: Any
            nothing: Any
            power: int = eqx.field(static=True)

            def loss(self, x: Any) -> Any:
                assert self.nothing is None
                return loss(x, self.centre) + jnp.sum(x**self.power)

        problems = Problem(FEW, None, 4)
        lanes = [(START, Problem(c, None, 4)) for c in FEW]
        loss_of = lambda x, problem: problem.loss(x)  # noqa: E731
        self.assert_lanes(loss_of, lanes, START, problems, (None, 0))
        axes = (None, Problem(0, None, 4))
        self.assert_lanes(loss_of, lanes, START, problems, axes)

    @pytest.mark.parametrize("axis", [0, 1, -1])
    def test_random_keys(self, axis: int):
        """A key for each lane, or two."""
        keys = jax.random.split(jax.random.key(0), 4)
        whole, lanes = keys, list(keys)
        if axis != 0:
            whole = jnp.stack([keys, keys[::-1]])
            lanes = [whole[:, i] for i in range(4)]

        def noisy(x: Any, h: Any) -> Any:
            key = h if h.ndim == 0 else h[1]
            return loss(x, 1.0 + jax.random.uniform(key, (3,)))

        self.assert_lanes(
            noisy, [(START, h) for h in lanes], START, whole, (None, axis)
        )

    def test_a_key_for_all(self):
        key = jax.random.key(7)

        def noisy(x: Any, h: Any) -> Any:
            return loss(x, h["row"] + 0.1 * jax.random.uniform(h["key"], (3,)))

        h = {"row": FEW, "key": key}
        lanes = [(START, {"row": r, "key": key}) for r in FEW]
        self.assert_lanes(noisy, lanes, START, h, (None, {"row": 0, "key": None}))


DESCENT: dict[str, Any] = {"optimizer": optax.sgd(0.3), "gtol": 1e-3}


def slow_ones(count: int, slow: Sequence[int]) -> np.ndarray:
    """Curvatures of bowls, of which some take about 150 steps and not about 20."""
    curvatures = np.linspace(0.8, 1.2, count)[:, None]
    curvatures[list(slow)] *= 0.15
    return curvatures


def bowl(x: Any, curvature: Any) -> Any:
    return curvature.sum() * jnp.sum(jnp.cosh(x - np.array([1.0, 0.5, -1.0])))


def many_bowls(curvatures: np.ndarray, **options: Any) -> Solution:
    with jax.enable_x64():
        options = {"batch_size": 16, **DESCENT, **options}
        return sweep(bowl, START, curvatures, **options)


def bowl_alone(curvature: Any) -> Solution:
    return alone_at(curvature, bowl, **DESCENT)


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The widths of batches, of each generation that a sweep is going to run."""
    seen: list[set[int]] = []
    real = _collect.blocks

    def blocks(*args: Any) -> Iterator[Any]:
        plan = list(real(*args))
        seen.append({block.width for block in plan})
        return iter(plan)

    monkeypatch.setattr(_collect, "blocks", blocks)
    return seen


class TestBatches:
    @pytest.mark.parametrize("size", [1, 2, 4, 6, 100, None])
    def test_of_any_size(self, size: Any, generations: list[set[int]]):
        """Of one lane, of a divisor of 6, with some to fill up, of all, of more."""
        options = {"optimizer": SGD, "gtol": 0.05}
        got = sweep(loss, START, ROWS[:6], batch_size=size, **options)
        want = alone(ROWS[:6], **options)
        assert len(set(want.stats["num_steps"].tolist())) > 2
        assert_close(got, want)
        assert generations == [{6 if size is None else min(size, 6)}]

    def test_lanes_that_have_not_ended_go_on_together(
        self, generations: list[set[int]]
    ):
        curvatures = slow_ones(160, range(3, 160, 8))
        got = many_bowls(curvatures)
        want = alone_in_program(bowl_alone, curvatures)
        assert generations == [{16}] * 3
        steps = want.stats["num_steps"]
        assert np.median(steps) * 5 < steps.max() < 250
        assert_close(got, want)

    def test_the_last_ones_in_narrower_batches(self, generations: list[set[int]]):
        curvatures = slow_ones(600, range(0, 600, 6))
        got = many_bowls(curvatures, batch_size=512)
        assert generations == [{512}, {512}, {64}]
        assert_close(got, alone_in_program(bowl_alone, curvatures))

    def test_lanes_are_independent_of_their_neighbours(self):
        """Their order is nothing to them."""
        curvatures = slow_ones(40, [0, 1, 2, 39])
        order = np.random.default_rng(0).permutation(40)
        got, other = many_bowls(curvatures), many_bowls(curvatures[order])
        assert_same(other, row(got, order))


class TestCompilation:
    def test_the_loss_is_traced_as_often_for_many_lanes_as_for_few(self):
        counts: list[int] = []
        for lanes in (4, 40):
            calls = 0

            def counted(x: Any, h: Any) -> Any:
                nonlocal calls
                calls += 1
                return bowl(x, h)

            sweep(counted, START, slow_ones(lanes, [0]), batch_size=4, **DESCENT)
            counts.append(calls)
        assert counts[0] == counts[1] > 0

    def test_one_program_for_all_batches(self):
        """Beside the one that makes the first states, which other losses share."""

        def fresh(x: Any, h: Any) -> Any:
            return bowl(x, h) + jnp.sum(jnp.sin(0.01 * x))

        run = functools.partial(sweep, batch_size=4, **DESCENT)
        run(bowl, START, slow_ones(4, [0]))
        before = _batch._compile.cache_info().misses
        run(fresh, START, slow_ones(40, [0, 9]))
        assert _batch._compile.cache_info().misses == before + 1

    @pytest.mark.parametrize("way", ["optimizer", "callback"])
    def test_a_fresh_closure_over_other_arrays_is_not_compiled(self, way: str):
        def run(number: Any, rows: Any) -> Solution:
            shift, level = jnp.array(number), jnp.array(5 + number)
            options: dict[str, Any] = {
                "optimizer": {"optimizer": lambda h: optax.sgd(shift * h[0])},
                "callback": {"callback": traced(lambda info: info.loss < level)},
            }[way]
            return sweep(
                lambda x, h: loss(x - shift, h),
                START,
                rows,
                batch_size=4,
                rtol=jnp.array(1e-3 * number),
                max_optimizer_steps=20,
                **options,
            )

        run(0.125, ROWS)
        with compilations() as compiled:
            got = run(0.25, ROWS[::-1])
        assert not compiled
        if way == "callback":
            want = alone(
                ROWS[::-1],
                lambda x, h: loss(x - 0.25, h),
                callback=traced(lambda info: info.loss < 5.25),
                rtol=1e-3 * 0.25,
                max_optimizer_steps=20,
            )
            assert_close(got, want)


OF_A_NUMBER: dict[str, dict[str, Callable[[Any], Any]]] = {
    "learning rate": {"optimizer": lambda x: optax.sgd(x / 4, momentum=0.5)},
    "line search": {
        "optimizer": lambda x: optax.chain(
            optax.sgd(1.0),
            optax.scale_by_backtracking_linesearch(
                20, slope_rtol=x, decrease_factor=0.9 - 4 * x
            ),
        )
    },
    "gtol": {"optimizer": lambda _: optax.sgd(0.02), "gtol": lambda x: 20 * x},
    "all tolerances": {
        "optimizer": lambda _: optax.sgd(0.02),
        "rtol": lambda x: x,
        "atol": lambda x: x**2,
        "gtol": lambda _: 1e-3,
    },
}


class TestOptions:
    """Functions of the hyperparameter."""

    @pytest.mark.parametrize("name", OF_A_NUMBER)
    def test_of_its_own(self, name: str):
        options = OF_A_NUMBER[name]
        h = {"number": np.array([0.1, 0.03, 0.01, 0.003]), "row": FEW}

        def of_row(x: Any, h: Any) -> Any:
            return loss(3 * x, h["row"])

        def one(h: Any) -> Solution:
            of_lane = {name: of(h["number"]) for name, of in options.items()}
            return alone_at(h, of_row, max_optimizer_steps=20, **of_lane)

        swept: dict[str, Any] = {
            name: lambda h, of=of: of(h["number"]) for name, of in options.items()
        }
        got = sweep(of_row, START, h, max_optimizer_steps=20, **swept)
        want = alone_in_program(one, h)
        # (The single ones are those of a float64 program, of which the state is.)
        parts = lambda s: (s.value, s.result, s.state)  # noqa: E731
        assert_close(parts(got), parts(want))
        # The lanes would be others with the same number.
        same = alone_in_program(one, {**h, "number": np.full(4, 0.1)})
        assert not np.array_equal(same.value, want.value)

    def test_an_optimizer_with_random_keys(self, generations: list[set[int]]):
        """They are in the state, and go through every generation."""
        curvatures, seeds = slow_ones(20, [0, 17]), np.arange(20)

        def noisy(h: Any) -> Any:
            noise = optax.add_noise(1e-4, 0.55, jax.random.key(h[1]))
            return optax.chain(optax.sgd(0.3), noise)

        def of_curvature(x: Any, h: Any) -> Any:
            return bowl(x, h[0])

        h = (curvatures, seeds)
        options: dict[str, Any] = {"gtol": 3e-3}
        with jax.enable_x64():
            got = sweep(
                of_curvature, START, h, optimizer=noisy, batch_size=16, **options
            )
            one = jax.jit(
                lambda h: alone_at(h, of_curvature, optimizer=noisy(h), **options)
            )
            lanes = [0, 1, 17, 19]
            want = [one(row(h, i)) for i in lanes]
        assert len(generations) == 2
        assert_close(
            without_keys(row(got, np.array(lanes))), stack([*map(without_keys, want)])
        )

    def test_a_function_that_looks_at_nothing_that_differs(self):
        options: dict[str, Any] = {"max_optimizer_steps": 30}
        got = sweep(
            loss,
            STARTS,
            FEW[0],
            in_axes=(0, None),
            optimizer=lambda h: optax.sgd(0.1 * h[0]),
            gtol=lambda h: 1e-3 * h[0],
            **options,
        )
        want = [
            solve(
                lambda x: loss(x, FEW[0]),
                start,
                optimizer=optax.sgd(0.1 * FEW[0, 0]),
                gtol=1e-3 * FEW[0, 0],
                **options,
            )
            for start in STARTS
        ]
        assert_close(got, stack(want))


def without_keys(tree: Any) -> Any:
    """With their data in the places of random keys."""

    def data(x: Any) -> Any:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(data, tree)


def sometimes_nan(x: Any, h: Any) -> Any:
    return bowl(x, jnp.abs(h)) + 0 * jnp.log(h).sum()


# One lane is fast, one is NaN from the start, one is too slow.
MIXED = np.array([[1.0], [-1.0], [0.05]])
LIMITED: dict[str, Any] = {**DESCENT, "max_optimizer_steps": 60}


class TestResult:
    @pytest.mark.parametrize("size", [1, 3])
    def test_every_lane_has_its_own(self, size: int):
        got = sweep(sometimes_nan, START, MIXED, batch_size=size, **LIMITED)
        statuses = (R.successful, R.nonfinite, R.nonlinear_max_steps_reached)
        for i, status in enumerate(statuses):
            assert row(got.result, i) == status
        assert_close(got, alone(MIXED, sometimes_nan, **LIMITED))

    def test_a_lane_that_leaves_the_finite_on_its_way(self):
        def falling(x: Any, h: Any) -> Any:
            return jnp.sum(-jnp.exp(h * x) + (1 - h) * jnp.cosh(x))

        rows = np.array([[0.01], [1.0], [0.02]])
        options = {"optimizer": SGD, "max_optimizer_steps": 60, "history": True}
        got = sweep(falling, START + 1, rows, **options)
        want = [solve(lambda x, h=h: falling(x, h), START + 1, **options) for h in rows]
        assert row(got.result, 1) == R.nonfinite
        assert 1 < got.stats["num_steps"][1] < 60
        assert_close(got, stack(want))

    @pytest.mark.parametrize(
        ("rows", "message"),
        [([1.0, -1.0, 1.0], "non-finite"), ([0.05, 1.0, 1.0], "max_opt")],
    )
    def test_throw(self, rows: list[float], message: str):
        with pytest.raises(eqx.EquinoxRuntimeError, match=message):
            sweep(
                sometimes_nan,
                START,
                np.array(rows)[:, None],
                throw=True,
                **LIMITED,
            )

    def test_throw_solves_all_before(self):
        steps: list[int] = []
        with pytest.raises(eqx.EquinoxRuntimeError, match="non-finite"):
            sweep(
                sometimes_nan,
                START,
                np.array([[-1.0], [1.0]]),
                batch_size=1,
                throw=True,
                callback=lambda info: steps.append(info.lane.index[0]),
                **LIMITED,
            )
        assert steps.count(1) > 10

    def test_throw_without_a_failure(self):
        options = {**LIMITED, "throw": True}
        got = sweep(sometimes_nan, START, np.array([[1.0], [0.9], [1.1]]), **options)
        del options["throw"]
        assert_same(
            got, sweep(sometimes_nan, START, np.array([[1.0], [0.9], [1.1]]), **options)
        )


def run(steps: int, rows: Any = ROWS, **options: Any) -> Solution:
    options = {"max_optimizer_steps": steps, "batch_size": 4, **options}
    return sweep(loss, START, rows, **{"optimizer": SGD, **options})


RESUMED: dict[str, dict[str, Any]] = {
    "default, rtol": {"optimizer": DEFAULT_OPTIMIZER, "rtol": 1e-9},
    "adam": {"optimizer": optax.adam(0.1)},
    "traced callback, history": {
        "callback": traced(lambda info: info.step == 5),
        "history": True,
    },
    "python callback": {"callback": lambda info: info.step == 5},
}


class TestState:
    @pytest.mark.parametrize("name", RESUMED)
    def test_as_if_it_had_never_stopped(self, name: str):
        options = RESUMED[name]
        whole, first = run(7, **options), run(3, **options)
        rest = run(7, state=first.state, **options)
        last = 6 if "callback" in name else 7
        np.testing.assert_array_equal(whole.stats["num_steps"], last)
        histories = [s.stats.pop("history", ()) for s in (whole, first, rest)]
        assert_same(rest, whole)
        for a, b, c in zip(*histories, strict=True):
            np.testing.assert_array_equal(c[:, 3:], a[:, 3:])
            np.testing.assert_array_equal(b, a[:, :3])
            assert np.all(np.isnan(c[:, :3]))

    def test_of_leaves_as_a_file_has_them(self):
        leaves = [np.asarray(x) for x in jax.tree.leaves(run(3).state)]
        assert_same(run(7, state=leaves), run(7))

    def test_with_a_tolerance_after_none_and_back(self):
        small, large = jnp.array(1e-3), jnp.array(0.3)
        want = run(100, rtol=small)
        got = run(100, rtol=small, state=run(3).state)
        assert np.all(want.stats["num_steps"] < 100)
        assert_close(got, want)
        # A tolerance that was met does not end a run without one.
        met = run(100, rtol=large)
        assert np.all(met.stats["num_steps"] < 7)
        got, want = run(7, state=met.state), run(7)
        assert_close((got.value, got.stats), (want.value, want.stats))

    def test_where_all_have_ended(self):
        rtol = jnp.array(1e-3)
        done = run(100, rtol=rtol)
        assert_same(run(100, rtol=rtol, state=done.state), done)

    def test_of_other_hyperparameters(self):
        state = run(3).state
        rows = ROWS.copy()
        rows[[2, 3]] += 0.01
        with pytest.raises(ValueError, match=r"`state` .* lanes 2, 3\."):
            run(7, rows, state=state)
        with pytest.raises(ValueError, match="`state`"):
            run(7, ROWS + 0.01, state=state, keep_states=False)
        with pytest.raises(ValueError, match="`state`"):
            run(7, ROWS + 0.01, state=state, callback=lambda _: None)

    def test_of_another_form(self):
        state = run(3).state
        for wrong in (
            run(3, FEW).state,
            row(state, 0),
            run(3, **RESUMED["adam"]).state,
        ):
            with pytest.raises(ValueError, match="`state` must be that of a solve"):
                run(7, state=wrong)

    def test_not_kept(self):
        without, whole = run(7, keep_states=False), run(7)
        assert without.state is None
        assert_same(without, eqx.tree_at(lambda s: s.state, whole, None))

    def test_not_kept_where_lanes_go_on_in_other_batches(self):
        curvatures = slow_ones(20, [1, 18])
        without = many_bowls(curvatures, keep_states=False)
        whole = many_bowls(curvatures)
        assert_same(without, eqx.tree_at(lambda s: s.state, whole, None))

    def test_of_a_lane_continues_as_a_solve(self):
        options = RESUMED["default, rtol"]
        first = run(3, **options)
        for i in (0, 4):
            state = row(first.state, i)
            got = alone_at(ROWS[i], state=state, max_optimizer_steps=7, **options)
            assert_close(got, alone_at(ROWS[i], max_optimizer_steps=7, **options))

    def test_of_solves_continues_as_a_sweep(self):
        options = {"optimizer": SGD}
        state = alone(max_optimizer_steps=3, **options).state
        want = alone(max_optimizer_steps=7, **options)
        assert_close(run(7, state=state), want)


class Seen:
    """A Python callback that keeps what it is told, and may stop."""

    def __init__(self, stops: Callable[[Any], Any] = lambda info: None):
        self.steps: dict[Lane, list[Any]] = {}
        self.stops = stops

    def __call__(self, info: CallbackArgs) -> Any:
        assert threading.current_thread() is threading.main_thread()
        self.steps.setdefault(info.lane, []).append(info)
        return self.stops(info)

    @property
    def lanes(self) -> list[list[Any]]:
        """What each lane has told, in the order of lanes."""
        return [
            steps
            for _, steps in sorted(self.steps.items(), key=lambda item: item[0].index)
        ]


def told(infos: Sequence[CallbackArgs]) -> Any:
    """The fields, the whole state too, an axis over steps in front."""
    return stack(
        [(vars_of(info), info.solver_state) for info in infos],
    )


def vars_of(info: CallbackArgs) -> tuple[Any, ...]:
    return (info.step, info.loss, info.grad, info.params, info.state)


class TestTracedCallbacks:
    def test_lanes_stop_by_themselves(self):
        limit = jnp.array(7.0)
        options = {"callback": traced(lambda info: info.loss < limit), "optimizer": SGD}
        got, want = run(20, **options), alone(max_optimizer_steps=20, **options)
        assert len(set(want.stats["num_steps"].tolist())) > 2
        assert np.all(np.asarray(got.result == R.successful))
        assert_close(got, want)

    def test_beside_a_nan_lane(self):
        """Which goes on too, because somebody is told of its steps."""
        options = {**DESCENT, "max_optimizer_steps": 40}
        options["callback"] = traced(lambda info: info.step == 4)
        rows = np.array([[-1.0], [1.0], [0.9]])
        got = sweep(sometimes_nan, START, rows, **options)
        np.testing.assert_array_equal(got.stats["num_steps"], 5)
        assert_close(got, alone(rows, sometimes_nan, **options))


class TestPythonCallbacks:
    def test_told_what_a_solve_tells(self):
        seen, options = Seen(), {"gtol": 0.05, "optimizer": SGD}
        got = sweep(loss, START, ROWS, batch_size=4, callback=seen, **options)
        assert_close(got, alone(callback=lambda _: None, **options))
        assert [lane.index for lane in seen.steps] == [(i,) for i in range(len(ROWS))]
        for h, infos in zip(ROWS, seen.lanes, strict=True):
            single = Seen()
            alone_at(h, callback=single, **options)
            assert [info.step for info in infos] == list(range(len(infos)))
            assert_close(told(infos), told(*single.lanes))
            assert isinstance(infos[0].params, np.ndarray)
            assert isinstance(infos[0].loss, np.float64)

    def test_once_for_each_step_in_every_generation(self, generations: list[set[int]]):
        seen, curvatures = Seen(), slow_ones(40, [0, 1, 17, 39])
        options = {**DESCENT, "batch_size": 16, "callback": seen}
        got = sweep(bowl, START, curvatures, **options)
        assert len(generations) >= 2
        # As many lanes as objects: each keeps the same one.
        assert len(seen.lanes) == 40
        counts = [[info.step for info in infos] for infos in seen.lanes]
        assert counts == [list(range(int(n))) for n in got.stats["num_steps"]]
        indices = sorted(lane.index for lane in seen.steps)
        assert indices == [(i,) for i in range(40)]
        for i in (0, 5, 39):
            want = alone_at(curvatures[i], bowl, callback=lambda _: None, **DESCENT)
            assert_close(row(got, i), want)

    def test_a_state_that_is_asked_for_goes_on(self):
        seen = Seen()
        run(20, callback=seen)
        state = seen.lanes[2][2].solver_state
        options = {"max_optimizer_steps": 7, "optimizer": SGD}
        got = alone_at(ROWS[2], state=state, **options)
        assert_close(got, alone_at(ROWS[2], **options))

    def test_may_call_jax(self):
        norms = np.zeros(len(ROWS))
        doubled = jax.jit(lambda x: 2 * x)

        def callback(info: CallbackArgs) -> Any:
            nested = solve(lambda y: jnp.sum((y - info.params) ** 2), np.zeros(3))
            norms[info.lane.index] = jnp.linalg.norm(doubled(nested.value))
            return jnp.array(info.step == 1)

        got = run(20, callback=callback)
        want = np.linalg.norm(2 * np.asarray(got.value), axis=1)
        np.testing.assert_array_equal(got.stats["num_steps"], 2)
        np.testing.assert_allclose(norms, want, rtol=1e-6)

    @pytest.mark.parametrize("kind", [LookupError, StopIteration])
    def test_may_raise(self, kind: type[Exception]):
        error = kind("the reason")

        def callback(info: CallbackArgs) -> None:
            if info.lane.index == (4,) and info.step == 2:
                raise error

        with pytest.raises(kind) as caught:
            run(20, callback=callback)
        assert caught.value is error
        # And the next sweep knows nothing of it.
        got = run(20, callback=lambda _: None)
        assert_close(got, alone(optimizer=SGD, max_optimizer_steps=20))

    def test_stops_its_lane(self):
        def stops(info: CallbackArgs) -> bool:
            return info.step == 1 + info.lane.index[0]

        seen = Seen(stops)
        got = run(20, callback=seen)
        np.testing.assert_array_equal(got.stats["num_steps"], np.arange(7) + 2)
        assert np.all(np.asarray(got.result == R.successful))
        options = {"optimizer": SGD, "max_optimizer_steps": 20}
        want = [
            alone_at(h, callback=lambda info, i=i: info.step == 1 + i, **options)
            for i, h in enumerate(ROWS)
        ]
        assert_close(got, stack(want))
        assert [len(infos) for infos in seen.lanes] == list(range(2, 9))

    def test_beside_a_nan_lane(self):
        rows = np.array([[-1.0], [1.0], [0.05]])
        options = {**DESCENT, "max_optimizer_steps": 40}
        seen = Seen()
        got = sweep(sometimes_nan, START, rows, callback=seen, **options)
        want = alone(rows, sometimes_nan, callback=lambda _: None, **options)
        assert_close(got, want)
        counts = [len(infos) for infos in seen.lanes]
        assert counts == want.stats["num_steps"].tolist()

    def test_combined(self):
        """Whoever stops first, a traced one or one in Python, all are told."""
        limit, first, second = jnp.array(4.0), Seen(), Seen(lambda info: info.step == 5)
        below = traced(lambda info: info.loss < limit)
        got = run(20, callback=combine(first, combine(below, second)))
        either = lambda info: info.loss < 4.0 or info.step == 5  # noqa: E731
        want = alone(optimizer=SGD, max_optimizer_steps=20, callback=either)
        steps = want.stats["num_steps"].tolist()
        assert max(steps) == 6 > min(steps)
        assert_close(got, want)
        for seen in (first, second):
            assert [len(infos) for infos in seen.lanes] == steps


def closing_over(option: Callable[[Any], dict[str, Any]]) -> Callable[[], Any]:
    """No argument is traced, but what one of them closes over."""

    def run_with(number: Any) -> Any:
        options = {"loss_fn": loss, "optimizer": SGD, **option(number)}
        return sweep(options.pop("loss_fn"), START, FEW, **options).value

    return lambda: jax.vmap(run_with)(np.ones(2))


INSIDE: dict[str, Callable[[], Any]] = {
    "jit": lambda: jax.jit(lambda h: sweep(loss, START, h).value)(ROWS),
    "jit, nothing traced": lambda: jax.jit(lambda: run(3).value)(),
    "vmap": lambda: jax.vmap(lambda h: sweep(loss, START, h[None]).value)(ROWS),
    "vmap of starts": lambda: jax.vmap(
        lambda x: sweep(loss, x[None], ROWS[0], in_axes=(0, None)).value
    )(STARTS),
    "grad": lambda: jax.grad(lambda h: sweep(loss, START, h).value.sum())(ROWS),
    "scan": lambda: jax.lax.scan(lambda c, _: (c, run(3).value), 0, None, 2),
    "tolerance": lambda: jax.vmap(lambda t: run(3, rtol=t).value)(np.ones(2)),
    "state": lambda: jax.vmap(lambda s: run(3, state=s).value, axis_size=2, in_axes=1)(
        jax.tree.map(lambda x: np.stack([x, x], 1), run(3).state)
    ),
    "what the loss closes over": closing_over(
        lambda c: {"loss_fn": lambda x, h: c.astype(x.dtype) * loss(x, h)}
    ),
    "what a callback closes over": closing_over(
        lambda c: {
            "callback": traced(lambda info: info.loss < c.astype(info.loss.dtype))
        }
    ),
    "what an optimizer closes over": closing_over(
        lambda c: {"optimizer": optax.sgd(c)}
    ),
    "what a function for it closes over": closing_over(
        lambda c: {"optimizer": lambda h: optax.sgd(c * h[0])}
    ),
    "what a tolerance closes over": closing_over(lambda c: {"gtol": lambda h: c}),
}


class TestInsideOfAProgram:
    @pytest.mark.parametrize("case", INSIDE)
    def test_it_refuses(self, case: str):
        with pytest.raises(TypeError, match="`sweep` is a job of ordinary Python"):
            INSIDE[case]()


# The rest runs in a process of its own, with four devices.

DEVICES = 4
LANES = np.random.default_rng(1).uniform(0.5, 2.0, (8, 3))
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "reduce-scatter",
)


def mesh_of(*devices: int) -> Mesh:
    every = jax.devices()
    return Mesh(np.array([every[i] for i in devices]), ("lanes",))


def split(mesh: Mesh | None, **options: Any) -> Solution:
    return sweep(
        loss, START, LANES, mesh=mesh, **{"gtol": 0.05, "optimizer": SGD, **options}
    )


def equal(mesh: Mesh, **options: Any) -> None:
    batch = options.pop("batch_size", None)
    got = split(mesh, batch_size=batch, **options)
    assert_close(got, split(None, **options))


def in_generations() -> None:
    curvatures = slow_ones(160, [*range(20), 159])
    devices = mesh_of(0, 1, 2, 3)
    got = sweep(bowl, START, curvatures, mesh=devices, batch_size=64, **DESCENT)
    assert_close(got, sweep(bowl, START, curvatures, **DESCENT))


def in_narrower_batches() -> None:
    curvatures = slow_ones(1200, range(0, 1200, 24))
    devices, widths = mesh_of(0, 3), set()
    real = _collect.blocks

    def blocks(*args: Any) -> Iterator[Any]:
        for block in real(*args):
            widths.add(block.width)
            yield block

    _collect.blocks = blocks
    try:
        got = sweep(bowl, START, curvatures, mesh=devices, batch_size=1024, **DESCENT)
    finally:
        _collect.blocks = real
    assert widths == {1024, 128}, widths
    assert_close(got, sweep(bowl, START, curvatures, **DESCENT))


def many_starts() -> None:
    starts = np.linspace(-1, 1, 24).reshape(8, 3)
    go = functools.partial(sweep, loss, starts, LANES[0], in_axes=(0, None), **CHEAP)
    assert_close(go(mesh=mesh_of(0, 1, 2, 3)), go())


def random_keys() -> None:
    keys = jax.random.split(jax.random.key(0), 8)

    def noisy(x: Any, key: Any) -> Any:
        return loss(x, 1.0 + jax.random.uniform(key, (3,)))

    go = functools.partial(sweep, noisy, START, keys, **CHEAP)
    assert_close(go(mesh=mesh_of(0, 1, 2, 3)), go())


def going_on() -> None:
    devices = mesh_of(0, 1, 2, 3)
    first = split(devices, max_optimizer_steps=3)
    got = split(devices, max_optimizer_steps=7, state=first.state)
    assert_same(got, split(devices, max_optimizer_steps=7))
    elsewhere = split(None, max_optimizer_steps=7, state=first.state)
    assert_close(elsewhere, got)


def python_callback() -> None:
    runs = [Seen(lambda info: info.step == info.lane.index[0]) for _ in range(2)]
    got, want = (
        split(mesh, callback=seen)
        for mesh, seen in zip((mesh_of(0, 1, 2, 3), None), runs, strict=True)
    )
    assert_close(got, want)
    assert [lane.index for lane in runs[0].steps] == [(i,) for i in range(8)]
    for lanes in zip(*(seen.lanes for seen in runs), strict=True):
        assert_close(*map(told, lanes))
    assert len({len(infos) for infos in runs[0].lanes}) >= 3


def a_callback_that_raises() -> None:
    error = LookupError("the reason")

    def callback(info: CallbackArgs) -> None:
        if info.lane.index == (5,):
            raise error

    with pytest.raises(LookupError) as caught:
        split(mesh_of(0, 1, 2, 3), callback=callback)
    assert caught.value is error


SEARCHING: dict[str, Any] = {
    "optimizer": DEFAULT_OPTIMIZER,
    "callback": traced(lambda info: info.loss < 5),
    "history": True,
}


def has_collective(text: str) -> bool:
    return any(name in text for name in COLLECTIVES)


def no_communication() -> None:
    programs: list[Any] = []
    real = _batch._compile

    def compile_and_keep(*args: Any) -> Any:
        programs.append(real(*args)[0])
        return real(*args)

    _batch._compile = compile_and_keep
    options = [{}, SEARCHING]
    try:
        for more in options:
            split(mesh_of(0, 1, 2, 3), **more)
    finally:
        _batch._compile = real
    texts = [program.as_text() for program in programs]
    assert len(texts) == 2 * len(options)
    for text in texts:
        assert "num_partitions=4" in text
        assert not has_collective(text)
    # And it would be seen.
    summed = jax.shard_map(
        lambda x: jax.lax.psum(x, "lanes"),
        mesh=mesh_of(0, 1, 2, 3),
        in_specs=jax.P("lanes"),
        out_specs=jax.P(),
    )
    text = jax.jit(summed).lower(np.ones(4)).compile().as_text()
    assert has_collective(text or "")


def numbers_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="`mesh` must have a number of devices that"):
        split(mesh_of(0, 1, 2))
    with pytest.raises(ValueError, match="`batch_size` must be a positive multiple of"):
        split(mesh_of(0, 1), batch_size=3)


ON_DEVICES: dict[str, Callable[[], None]] = {
    "all devices": lambda: equal(mesh_of(0, 1, 2, 3)),
    "in another order": lambda: equal(mesh_of(2, 0, 3, 1)),
    "in several batches": lambda: equal(mesh_of(0, 1, 2, 3), batch_size=4),
    "some devices": lambda: equal(mesh_of(1, 3), batch_size=6),
    "one device": lambda: equal(mesh_of(2), batch_size=3),
    "two axes": lambda: equal(
        Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b")), batch_size=8
    ),
    "default optimizer, traced callback, history": lambda: equal(
        mesh_of(0, 1, 2, 3), **SEARCHING
    ),
    "generations": in_generations,
    "narrower batches": in_narrower_batches,
    "many starts": many_starts,
    "random keys": random_keys,
    "going on": going_on,
    "python callback": python_callback,
    "a callback that raises": a_callback_that_raises,
    "no communication": no_communication,
    "numbers that do not fit": numbers_that_do_not_fit,
}


def run_on_devices() -> None:
    """Prints what went wrong with each case, as JSON."""
    assert jax.device_count() == DEVICES
    results: dict[str, str] = {}
    for name, case in ON_DEVICES.items():
        try:
            case()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


@pytest.fixture(scope="module")
def on_devices() -> dict[str, str]:
    """What the process says."""
    return report_of("-c", _PROGRAM, devices=DEVICES, warnings="error")


# The hook that pytest puts on the library does not reach into that process.
_PROGRAM = """
from jaxtyping import install_import_hook

with install_import_hook("jaxmf_opt", "beartype.beartype"):
    import test_sweep
test_sweep.run_on_devices()
"""


@pytest.mark.parametrize("case", ON_DEVICES)
def test_on_four_devices(case: str, on_devices: dict[str, str]):
    assert not on_devices[case], on_devices[case]
