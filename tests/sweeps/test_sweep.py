"""Each lane of a sweep is a solve of its own, however they are run together."""

import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from bits import arrays_of, assert_same_bits
from compiling import compilations
from jax.sharding import AxisType, Mesh, NamedSharding
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


def run(steps: int, rows: Any = ROWS, **options: Any) -> Solution:
    options = {"max_optimizer_steps": steps, "batch_size": 4, **options}
    return sweep(loss, START, rows, **{"optimizer": SGD, **options})


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
    if isinstance(got, Solution):  # single solves have no axes
        got = dataclasses.replace(got, hyperparam_axes=None)
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


SOLVERS: dict[str, dict[str, Any]] = {
    "default, tolerances": {"rtol": 1e-6, "atol": 1e-9, "gtol": 1e-9},
    "robust": {"optimizer": ROBUST_OPTIMIZER},
}


class TestLanes:
    @pytest.mark.parametrize("name", SOLVERS)
    def test_are_single_solves(self, name: str):
        """In a first sweep, and in one whose programs are there already."""
        options = {"history": True, **SOLVERS[name]}
        one = functools.partial(alone_at, **options)
        for rows in (ROWS, ROWS[::-1] ** 2 / 2):
            with jax.enable_x64():
                got = sweep(loss, START, rows, batch_size=4, **options)
            assert_close(got, alone_in_program(one, rows))

    def test_types_are_those_of_a_solve(self, x64: bool):
        """Python's floats too, and those that the program around has not."""
        params = {
            "float32": jnp.ones(3, jnp.float32),
            "float64": np.ones(3),
            "bfloat16": jnp.ones(3, jnp.bfloat16),
            "int32": np.ones(3, np.int32),
            "python": (1.0, 1),
        }

        def of_sum(x: Any, h: Any) -> Any:
            return loss(sum(jax.tree.leaves(x)), h)

        options = {"optimizer": optax.sgd(0.01), "max_optimizer_steps": 3}
        got = sweep(of_sum, params, FEW, **options)
        want = [solve(lambda x, h=h: of_sum(x, h), params, **options) for h in FEW]
        assert got.value["float64"].dtype == np.float64
        assert got.value["python"][1].dtype == (np.float64 if x64 else np.float32)
        assert_close(got, stack(want))
        assert type(got) is Solution
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(got))


# 3 lanes of 3 numbers: those along a wrong axis have other values.
STARTS, CENTRES = ROWS[:3], ROWS[3:6]


class Problem(eqx.Module):
    """A hyperparameter with names, and with something in it that is no array."""

    arrays: Any
    nothing: Any
    power: int = eqx.field(static=True)


class TestInAxes:
    def test_anywhere(self):
        """Of vectors, scalars, vectors and scalars."""
        axes = (0, None, -1, 0)
        arrays = (STARTS, ROWS[6], CENTRES, ROWS[6] + 1)
        pairs = [*zip(arrays, axes, strict=True)]

        def weighed(params: Any, h: Any) -> Any:
            (start, offset), (centre, weight) = params, h
            return weight * loss(start + offset, centre) + offset**2

        want = []
        for i in range(3):
            lane = [x[0] if axis is None else np.take(x, i, axis) for x, axis in pairs]
            of = functools.partial(weighed, h=lane[2:])
            want.append(solve(of, lane[:2], **CHEAP))
        whole = [x[0] if axis is None else x for x, axis in pairs]
        in_axes = [list(axes[:2]), list(axes[2:])]
        got = sweep(weighed, whole[:2], whole[2:], in_axes=in_axes, **CHEAP)
        assert_close(got, stack(want))

    def test_many_starts(self):
        """And options that are functions of what all lanes share."""
        options = {"optimizer": optax.sgd, "gtol": lambda h: h / 99}
        got = sweep(bowl, STARTS, np.array(0.2), in_axes=(0, None), **options)
        options = {"optimizer": optax.sgd(0.2), "gtol": 0.2 / 99}
        want = [solve(lambda x: bowl(x, np.array(0.2)), y, **options) for y in STARTS]
        assert_close(got, stack(want))

    def test_an_axis_for_a_part_of_a_tree(self):
        """What is shared may be anything."""
        mapped = Problem({"centre": FEW, "size": FEW[:, :1]}, None, 4)
        shared = [2.0, None, "cosh", jnp.cosh]

        def of_tree(x: Any, h: Any) -> Any:
            factor, nothing, text, fn = h[1]
            assert (nothing, h[0].nothing, text) == (None, None, "cosh")
            quartic = jnp.sum(h[0].arrays["size"] * x ** h[0].power)
            return factor * loss(x, h[0].arrays["centre"]) + quartic + jnp.sum(fn(x))

        in_axes = (None, (0, None))
        got = sweep(of_tree, START, (mapped, shared), in_axes=in_axes, **CHEAP)
        want = [alone_at((row(mapped, i), shared), of_tree, **CHEAP) for i in range(4)]
        assert_close(got, stack(want))

    def test_random_keys(self):
        """Two for each lane, along an axis in the middle, and one for all."""
        keys, key = jax.random.split(jax.random.key(0), (2, 4)), jax.random.key(7)

        def noisy(x: Any, h: Any) -> Any:
            noise = jax.random.uniform(h[0][1], (3,)) + jax.random.uniform(h[1], (3,))
            return loss(x, 1.0 + noise)

        got = sweep(noisy, START, (keys, key), in_axes=(None, (-1, None)), **CHEAP)
        want = [alone_at((keys[:, i], key), noisy, **CHEAP) for i in range(4)]
        assert_close(got, stack(want))


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
    @pytest.mark.parametrize("size", [4, 100, None])
    def test_of_any_size(self, size: Any, generations: list[set[int]]):
        """With some to fill up, of more lanes than there are, of all."""
        options = {"optimizer": SGD, "gtol": 0.05}
        got = sweep(loss, START, ROWS[:6], batch_size=size, **options)
        want = alone(ROWS[:6], **options)
        assert len(set(want.stats["num_steps"].tolist())) > 2
        assert_close(got, want)
        assert generations == [{6 if size is None else min(size, 6)}]

    def test_lanes_that_have_not_ended_go_on_together(
        self, generations: list[set[int]]
    ):
        """The last ones in narrower batches."""
        curvatures = slow_ones(600, range(0, 600, 6))
        got = many_bowls(curvatures, batch_size=512)
        assert generations == [{512}, {512}, {64}]
        one = functools.partial(alone_at, loss=bowl, **DESCENT)
        assert_close(got, alone_in_program(one, curvatures))

    def test_lanes_are_independent_of_their_neighbours(self):
        """Their order is nothing to them; nor are states that are not kept."""
        curvatures = slow_ones(40, [0, 1, 2, 39])
        order = np.random.default_rng(0).permutation(40)
        got = many_bowls(curvatures)
        other = many_bowls(curvatures[order], keep_states=False)
        assert other.state is None
        want = eqx.tree_at(lambda s: s.state, row(got, order), None)
        assert_same_bits(other, want)


def test_a_fresh_closure_over_other_arrays_is_not_compiled():
    def options(number: Any) -> dict[str, Any]:
        shift, level = jnp.array(number), jnp.array(5 + number)
        return {
            "optimizer": lambda h: optax.sgd(shift * h[0]),
            "callback": traced(lambda info: info.loss < level),
            "rtol": jnp.array(1e-3 * number),
            "max_optimizer_steps": 20,
        }

    def shifted(number: Any) -> Callable[[Any, Any], Any]:
        shift = np.array(number)
        return lambda x, h: loss(x - shift, h)

    sweep(shifted(0.125), START, FEW, **options(0.125))
    with compilations() as compiled:
        got = sweep(shifted(0.25), START, FEW[::-1], **options(0.25))
    assert not compiled
    for i, h in enumerate(FEW[::-1]):
        of_lane = options(0.25) | {"optimizer": optax.sgd(0.25 * h[0])}
        assert_close(row(got, i), alone_at(h, shifted(0.25), **of_lane))


class TestOptions:
    """Functions of the hyperparameter."""

    def test_of_its_own(self):
        options: dict[str, Any] = {
            "optimizer": lambda h: optax.chain(
                optax.sgd(0.02 + h[0] / 10),
                optax.scale_by_backtracking_linesearch(9, decrease_factor=0.9 - h[0]),
            ),
            "rtol": lambda h: h[0],
            "atol": lambda h: h[0] ** 2,
            "gtol": lambda h: h[0] / 10,
        }

        def of_row(x: Any, h: Any) -> Any:
            return loss(3 * x, h[1])

        def one(h: Any) -> Solution:
            of_lane = {name: of(h) for name, of in options.items()}
            return alone_at(h, of_row, max_optimizer_steps=20, **of_lane)

        h = (np.array([0.4, 0.1, 0.03, 0.01]), FEW)
        got = sweep(of_row, START, h, max_optimizer_steps=20, **options)
        want = alone_in_program(one, h)
        # (The single ones are those of a float64 program, of which the state is.)
        parts = lambda s: (s.value, s.result, s.state)  # noqa: E731
        assert_close(parts(got), parts(want))
        # The lanes would be others with the same number.
        same = alone_in_program(one, (np.full(4, 0.1), FEW))
        assert not np.array_equal(same.value, want.value)

    def test_an_optimizer_with_random_keys(self, generations: list[set[int]]):
        """They are in the state, and go through every generation."""
        h = (slow_ones(20, [0, 17]), np.arange(20))

        def noisy(h: Any) -> Any:
            noise = optax.add_noise(1e-4, 0.55, jax.random.key(h[1]))
            return optax.chain(optax.sgd(0.3), noise)

        of = lambda x, h: bowl(x, h[0])  # noqa: E731
        one = jax.jit(lambda h: alone_at(h, of, optimizer=noisy(h), gtol=3e-3))
        with jax.enable_x64():
            got = sweep(of, START, h, optimizer=noisy, batch_size=16, gtol=3e-3)
            for i in (0, 1, 17, 19):
                assert_close(arrays_of(row(got, i)), arrays_of(one(row(h, i))))
        assert len(generations) == 2


def sometimes_nan(x: Any, h: Any) -> Any:
    return bowl(x, jnp.abs(h)) + 0 * jnp.log(h).sum()


# One lane is fast, one is NaN from the start, one is too slow.
MIXED = np.array([[1.0], [-1.0], [0.05]])
LIMITED: dict[str, Any] = {**DESCENT, "max_optimizer_steps": 60}


class TestResult:
    def test_every_lane_has_its_own(self):
        got = sweep(sometimes_nan, START, MIXED, **LIMITED)
        statuses = (R.successful, R.nonfinite, R.nonlinear_max_steps_reached)
        for i, status in enumerate(statuses):
            assert row(got.result, i) == status
        assert_close(got, alone(MIXED, sometimes_nan, **LIMITED))

    def test_throw(self):
        """When all lanes have been solved."""
        seen, rows = Seen(), np.array([[-1.0], [1.0]])
        options = {**LIMITED, "batch_size": 1, "callback": seen, "throw": True}
        with pytest.raises(eqx.EquinoxRuntimeError, match="non-finite"):
            sweep(sometimes_nan, START, rows, **options)
        assert len(seen.lanes[1]) > 10
        assert sweep(sometimes_nan, START, rows[1:], **options).value.shape == (1, 3)


RESUMED: dict[str, dict[str, Any]] = {
    "traced callback, history": {
        "optimizer": DEFAULT_OPTIMIZER,
        "rtol": 1e-9,
        "callback": traced(lambda info: info.step == 5),
        "history": True,
    },
    "python callback": {"callback": lambda info: info.step == 5},
}


class TestState:
    @pytest.mark.parametrize("name", RESUMED)
    def test_as_if_it_had_never_stopped(self, name: str):
        """From the state, or from its leaves, as a file has them."""
        options = RESUMED[name]
        whole, first = run(7, **options), run(3, **options)
        leaves = [np.asarray(x) for x in jax.tree.leaves(first.state)]
        rest = run(7, state=leaves if "history" in name else first.state, **options)
        np.testing.assert_array_equal(whole.stats["num_steps"], 6)
        histories = [s.stats.pop("history", ()) for s in (whole, first, rest)]
        assert_same_bits(rest, whole)
        for a, b, c in zip(*histories, strict=True):
            np.testing.assert_array_equal(c[:, 3:], a[:, 3:])
            np.testing.assert_array_equal(b, a[:, :3])
            assert np.all(np.isnan(c[:, :3]))

    def test_with_a_tolerance_after_none_and_back(self):
        small, large = jnp.array(1e-3), jnp.array(0.3)
        want = run(100, rtol=small)
        got = run(100, rtol=small, state=run(3).state)
        assert np.all(want.stats["num_steps"] < 100)
        assert_close(got, want)
        # Where all have ended, nothing is left to do.
        assert_same_bits(run(100, rtol=small, state=want.state), want)
        # A tolerance that was met does not end a run without one.
        met = run(100, rtol=large)
        assert np.all(met.stats["num_steps"] < 7)
        got, want = run(7, state=met.state), run(7)
        assert_close((got.value, got.stats), (want.value, want.stats))

    def test_of_a_lane_continues_as_a_solve_and_back(self):
        first, want = run(3), alone(max_optimizer_steps=7, optimizer=SGD)
        for i in (0, 4):
            state = row(first.state, i)
            got = alone_at(ROWS[i], state=state, max_optimizer_steps=7, optimizer=SGD)
            assert_close(got, row(want, i))
        state = alone(max_optimizer_steps=3, optimizer=SGD).state
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
    fields = ("step", "loss", "grad", "params", "state", "solver_state")
    return stack([[getattr(info, name) for name in fields] for info in infos])


class TestCallbacks:
    def test_beside_a_nan_lane(self):
        """Which goes on too, because somebody is told of its steps."""
        options = {**LIMITED, "callback": lambda info: info.step == 4}
        got = sweep(sometimes_nan, START, MIXED, **options)
        np.testing.assert_array_equal(got.stats["num_steps"], 5)
        assert_close(got, alone(MIXED, sometimes_nan, **options))

    def test_told_what_a_solve_tells(self, generations: list[set[int]]):
        """Once for each step, in every generation."""
        seen, curvatures = Seen(), slow_ones(40, [0, 1, 17, 39])
        got = sweep(bowl, START, curvatures, batch_size=16, callback=seen, **DESCENT)
        assert len(generations) >= 2
        # As many lanes as objects: each keeps the same one.
        assert sorted(lane.index for lane in seen.steps) == [(i,) for i in range(40)]
        for i, infos in enumerate(seen.lanes):
            assert [info.step for info in infos] == [*range(got.stats["num_steps"][i])]
        for i in (0, 5, 39):
            single = Seen()
            want = alone_at(curvatures[i], bowl, callback=single, **DESCENT)
            assert_close(row(got, i), want)
            assert_close(told(seen.lanes[i]), told(*single.lanes))
        assert isinstance(seen.lanes[0][0].params, np.ndarray)

    @pytest.mark.parametrize("kind", [LookupError, StopIteration])
    def test_may_raise(self, kind: type[Exception]):
        error = kind("the reason")

        def callback(info: CallbackArgs) -> None:
            if info.lane.index == (4,) and info.step == 2:
                raise error

        with pytest.raises(kind) as caught:
            run(20, callback=callback)
        assert caught.value is error

    def test_combined(self):
        """Whoever stops a lane first, a traced one or one in Python, all are told."""
        limit, first = jnp.array(4.0), Seen()
        second = Seen(lambda info: info.step == 1 + info.lane.index[0])
        below = traced(lambda info: info.loss < limit)
        got = run(20, callback=combine(first, combine(below, second)))
        either = lambda info, i: info.loss < 4.0 or info.step == 1 + i  # noqa: E731
        options = {"optimizer": SGD, "max_optimizer_steps": 20}
        want = [
            alone_at(h, callback=functools.partial(either, i=i), **options)
            for i, h in enumerate(ROWS)
        ]
        assert_close(got, stack(want))
        steps = got.stats["num_steps"].tolist()
        assert steps != sorted(steps)
        for seen in (first, second):
            assert [len(infos) for infos in seen.lanes] == steps


# The rest runs in a process of its own, with four devices: this file, as a script.

DEVICES = 4
SEARCHING: dict[str, Any] = {
    "optimizer": DEFAULT_OPTIMIZER,
    "callback": traced(lambda info: info.loss < 5),
    "history": True,
}


def mesh_of(*devices: int) -> Mesh:
    return Mesh(np.array(jax.devices())[list(devices)], ("lanes",))


def as_on_one_device(mesh: Mesh, batch_size: int | None = None, **options: Any) -> None:
    go = functools.partial(sweep, loss, START, CENTRES[[0, 1, 2, 1, 0, 2]], **options)
    assert_close(go(mesh=mesh, batch_size=batch_size), go())


def random_keys_and_starts() -> None:
    """On a mesh of two axes."""
    keys, starts = jax.random.split(jax.random.key(0), 8), np.ones((8, 3))

    def noisy(x: Any, key: Any) -> Any:
        return loss(x, 1.0 + jax.random.uniform(key, (3,)))

    go = functools.partial(sweep, noisy, starts, keys, in_axes=0, **CHEAP)
    assert_close(go(mesh=Mesh(np.array(jax.devices()).reshape(2, 2), ("i", "j"))), go())


def no_communication() -> None:
    """Between devices, in any program."""
    texts: list[str] = []
    real: Any = _batch._compile

    def compile_and_keep(*args: Any) -> Any:
        texts.append(real(*args)[0].as_text())
        return real(*args)

    with mock.patch.object(_batch, "_compile", compile_and_keep):
        sweep(loss, START, FEW, mesh=mesh_of(2, 0, 3, 1), **SEARCHING)
    summed = jax.shard_map(
        lambda x: jax.lax.psum(x, "lanes"),
        mesh=mesh_of(0, 1, 2, 3),
        in_specs=jax.P("lanes"),
        out_specs=jax.P(),
    )
    texts.append(jax.jit(summed).lower(np.ones(4)).compile().as_text() or "")
    assert all("num_partitions=4" in text for text in texts)
    pattern = "all-(reduce|gather|to-all)|collective|reduce-scatter"
    assert [bool(re.search(pattern, text)) for text in texts] == [False, False, True]


def data_on_a_mesh() -> None:
    """Whose type says so, as do those of loops over it."""
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        data = jax.device_put(START, NamedSharding(mesh, jax.P()))
        of_data = lambda x, h, z=data: loss(x + z.astype(x.dtype), h)  # noqa: E731
        with pytest.raises(ValueError, match=r"on a mesh, .* Make it a NumPy array"):
            sweep(of_data, START, FEW, mesh=mesh, **CHEAP)
    with jax.set_mesh(mesh):
        got = sweep(of_data, START, FEW, **CHEAP)
    assert_close(got, sweep(loss, START, FEW, **CHEAP))


def on_devices() -> None:
    as_on_one_device(mesh_of(1, 3), batch_size=4, **SEARCHING)
    stops = lambda info: info.step == info.lane.index[0]  # noqa: E731
    as_on_one_device(mesh_of(2, 0, 1), optimizer=SGD, callback=stops)
    random_keys_and_starts()
    no_communication()
    data_on_a_mesh()
    with pytest.raises(ValueError, match="`mesh` must have a number of devices that"):
        as_on_one_device(mesh_of(0, 1, 2, 3))
    with pytest.raises(ValueError, match="`batch_size` must be a positive multiple of"):
        as_on_one_device(mesh_of(0, 1), batch_size=3)


def test_on_four_devices():
    assert report_of(__file__, devices=DEVICES, warnings="error") == DEVICES


if __name__ == "__main__":
    on_devices()
    print(jax.device_count())
