"""The best lane, failed lanes and tables of sweeps, against the same made by hand."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from optimistix import RESULTS

from jaxmf_opt import Solution, solve, sweep
from jaxmf_opt.sweeps import SweepTable, best_lane, failed_lanes, table

NAMES = ("successful", "nonlinear_max_steps_reached", "stagnation", "nonfinite")
LAST = ("loss", "grad_norm", "num_steps", "status")
OPTIONS = {"grad": True, "gtol": 1e-6, "max_optimizer_steps": 25}


def loss(y: Any, h: Any) -> Any:
    """One that ends in a way of one's choice: in that of `NAMES[h["way"]]`."""
    c, way = jnp.asarray(h["c"], y.dtype), h["way"]
    difference = y - c
    value, gradient = jnp.sum(difference**2) + c, 2 * difference
    for i, (other, slope) in enumerate(
        [
            (jnp.sum(y), jnp.ones_like(y)),
            # It goes uphill, so that no line search gets anywhere.
            (jnp.sum(jnp.abs(difference)), -jnp.sign(difference)),
            (jnp.nan, gradient),
        ],
        start=1,
    ):
        value = jnp.where(way == i, other, value)
        gradient = jnp.where(way == i, slope, gradient)
    return value, gradient


START = np.zeros(2)
HYPERPARAMS = {
    "c": np.array([3.0, 0.5, 2.0, 0.0, 1.0, 2.5]),
    "way": np.array([0, 1, 2, 3, 0, 3]),
}


@pytest.fixture(scope="module")
def swept() -> Solution:
    return sweep(loss, START, HYPERPARAMS, **OPTIONS)


@pytest.fixture(scope="module")
def singles() -> list[Solution]:
    """The same, one after the other."""
    count = len(HYPERPARAMS["c"])
    lanes = [{k: jnp.array(x[i]) for k, x in HYPERPARAMS.items()} for i in range(count)]
    return [solve(lambda y, h=h: loss(y, h), START, **OPTIONS) for h in lanes]


def made(losses: Sequence[float], names: Sequence[str] | None = None) -> Solution:
    """A solution of lanes of which these are the losses and the statuses."""
    of_lanes = [getattr(RESULTS, n) for n in names or ["successful"] * len(losses)]
    stats = {
        "loss": jnp.array(losses, float),
        "grad_norm": jnp.arange(float(len(losses))),
        "num_steps": jnp.arange(len(losses)) + 7,
    }
    result = jax.tree.map(lambda *x: jnp.array(x), *of_lanes)
    values = jnp.zeros((len(losses), 2))
    return Solution(value=values, result=result, aux=None, stats=stats, state=None)


def columns(*arguments: Any) -> dict[str, np.ndarray]:
    """A table without what every one has, after a look at that."""
    got = dict(table(made([3.0, 1.0, np.nan], NAMES[:3]), *arguments))
    np.testing.assert_array_equal(got.pop("lane"), [0, 1, 2])
    np.testing.assert_array_equal(got.pop("loss"), [3.0, 1.0, np.nan])
    np.testing.assert_array_equal(got.pop("grad_norm"), [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(got.pop("num_steps"), [7, 8, 9])
    np.testing.assert_array_equal(got.pop("status"), NAMES[:3])
    return got


def are_columns(got: dict[str, np.ndarray], want: dict[str, Any]) -> None:
    assert list(got) == list(want)
    for name, column in want.items():
        np.testing.assert_array_equal(got[name], column)
        assert got[name].dtype == np.asarray(column).dtype


class TestBestLane:
    def test_of_a_sweep(self, swept: Solution, singles: list[Solution]):
        losses = [float(x.stats["loss"]) for x in singles]
        finite = [x for x in losses if np.isfinite(x)]
        assert best_lane(swept) == losses.index(min(finite)) == 1

    @pytest.mark.parametrize(
        ("losses", "want"),
        [
            ([2.0, 1.0, 3.0], 1),
            ([1.0, 0.5, 0.5, 0.7, 0.5], 1),  # the first of several
            ([np.nan, 2.0, np.nan, 1.0], 3),
            ([-np.inf, 2.0, np.inf, np.nan], 1),
            ([np.inf, np.nan, 1e30], 2),
            ([0.0, -0.0], 0),
            ([7.0], 0),
        ],
    )
    def test_of_losses(self, losses: list[float], want: int):
        got = best_lane(made(losses))
        assert got == want
        assert type(got) is int

    @pytest.mark.parametrize("name", NAMES)
    def test_whatever_the_status(self, name: str):
        assert best_lane(made([2.0, 1.0], ["successful", name])) == 1

    @pytest.mark.parametrize("losses", [[np.nan], [np.inf, -np.inf, np.nan]])
    def test_none_is_finite(self, losses: list[float]):
        with pytest.raises(ValueError, match=r"`solution`.*finite") as e:
            best_lane(made(losses, ["nonfinite"] * len(losses)))
        assert f"{len(losses)} lanes" in str(e.value)


class TestFailedLanes:
    def test_of_a_sweep(self, swept: Solution, singles: list[Solution]):
        want = {1: NAMES[1], 2: NAMES[2], 3: NAMES[3], 5: NAMES[3]}
        assert failed_lanes(swept) == want
        for i, single in enumerate(singles):
            assert single.result == getattr(RESULTS, want.get(i, "successful"))

    def test_in_order(self):
        names = [NAMES[i] for i in (3, 0, 2, 1, 0, 3)]
        got = failed_lanes(made([1.0] * 6, names))
        want = [(i, name) for i, name in enumerate(names) if name != "successful"]
        assert list(got.items()) == want
        assert {(type(i), type(name)) for i, name in got.items()} == {(int, str)}

    def test_none(self):
        assert failed_lanes(made([1.0, 2.0])) == {}


@pytest.mark.parametrize(
    "of_lanes",
    [best_lane, failed_lanes, lambda solution: table(solution, np.ones(3))],
    ids=["best_lane", "failed_lanes", "table"],
)
@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_no_axis_over_lanes(of_lanes: Any, shape: tuple[int, ...]):
    single = solve(lambda y: jnp.sum(y**2), np.zeros(2), max_optimizer_steps=0)
    assert jnp.shape(single.stats["loss"]) == ()
    broadcast = jax.tree.map(lambda x: jnp.broadcast_to(x, shape + x.shape), single)
    with pytest.raises(ValueError, match=r"`solution` .* axis over lanes") as e:
        of_lanes(broadcast)
    assert str(shape) in str(e.value)


class Model(eqx.Module):
    """A pytree with names, and something in it that is no array."""

    rate: Any
    inner: Any
    name: str = eqx.field(static=True)


FLOATS, INTS = np.array([0.5, 0.25, -1.0]), np.array([4, 2, 7])
PAIRS = np.arange(6.0).reshape(3, 2)
MATRICES = np.arange(12.0, dtype=np.float32).reshape(3, 2, 2)


class TestTable:
    def test_of_a_sweep(self, swept: Solution, singles: list[Solution]):
        got = table(swept, HYPERPARAMS)
        assert list(got) == ["lane", "c", "way", *LAST]
        np.testing.assert_array_equal(got["lane"], np.arange(6))
        for name, values in HYPERPARAMS.items():
            np.testing.assert_array_equal(got[name], values)
        for name in ("loss", "grad_norm", "num_steps"):
            want = [single.stats[name] for single in singles]
            np.testing.assert_allclose(got[name], want, rtol=1e-6, atol=1e-6)
            assert got[name].dtype == want[0].dtype
        for status, single in zip(got["status"], singles, strict=True):
            assert single.result == getattr(RESULTS, status)
        assert {type(x) for x in got["status"]} == {str}

    @pytest.mark.parametrize(
        ("hyperparams", "want"),
        [
            (FLOATS, {"hyperparam": FLOATS}),
            (jnp.array([1, 2, 3]), {"hyperparam": np.array([1, 2, 3], np.int32)}),
            (INTS > 3, {"hyperparam": INTS > 3}),
            (FLOATS * 1j, {"hyperparam": FLOATS * 1j}),
            (PAIRS, {"hyperparam[0]": PAIRS[:, 0], "hyperparam[1]": PAIRS[:, 1]}),
            ({"b": INTS, "a": FLOATS}, {"a": FLOATS, "b": INTS}),
            (
                {"a": {"b": {"c": FLOATS}, "d": INTS}},
                {"a.b.c": FLOATS, "a.d": INTS},
            ),
            ((FLOATS, [INTS, PAIRS]), None),
            (
                {"m": MATRICES},
                {f"m[{i}, {j}]": MATRICES[:, i, j] for i in range(2) for j in range(2)},
            ),
            # Nothing for each lane, no column.
            ({"a": INTS, "z": np.ones((3, 0))}, {"a": INTS}),
            ({"a": INTS, "n": None}, {"a": INTS}),
            (
                Model(FLOATS, {"x": PAIRS, "none": None}, name="m"),
                {"rate": FLOATS, "inner.x[0]": PAIRS[:, 0], "inner.x[1]": PAIRS[:, 1]},
            ),
        ],
    )
    def test_columns(self, hyperparams: Any, want: Any):
        if want is None:
            want = {"0": FLOATS, "1.0": INTS}
            want |= {f"1.1[{i}]": PAIRS[:, i] for i in range(2)}
        are_columns(columns(hyperparams), want)

    def test_bfloat16(self):
        got = columns(jnp.array([0.5, 3.0, -7.0], jnp.bfloat16))["hyperparam"]
        np.testing.assert_array_equal(got.astype(float), [0.5, 3.0, -7.0])

    def test_random_keys(self):
        keys = jax.random.split(jax.random.key(1), 3)
        data = np.asarray(jax.random.key_data(keys))
        want = {f"k[{i}]": data[:, i] for i in range(data.shape[1])}
        assert len(want) == 2
        are_columns(columns({"k": keys}), want)

    @pytest.mark.parametrize(
        ("hyperparams", "in_axes", "want"),
        [
            (PAIRS.T, (None, 1), {f"hyperparam[{i}]": PAIRS[:, i] for i in range(2)}),
            (PAIRS.T, (0, -1), {f"hyperparam[{i}]": PAIRS[:, i] for i in range(2)}),
            (INTS, 0, {"hyperparam": INTS}),
            (INTS, [None, 0], {"hyperparam": INTS}),
            # What all lanes have in common is no column.
            (
                {"a": FLOATS, "b": INTS, "c": "text"},
                (None, {"a": 0, "b": None, "c": None}),
                {"a": FLOATS},
            ),
            (
                ({"a": FLOATS, "b": np.stack([INTS, INTS])}, 3.0),
                ({"x": 0}, ({"a": 0, "b": 1}, None)),
                {"0.a": FLOATS, "0.b[0]": INTS, "0.b[1]": INTS},
            ),
            # Lanes that differ in their starting points only.
            (None, (0, None), {}),
            (7.0, (0, None), {}),
            ({"a": np.ones(99)}, (0, None), {}),
            ({"a": np.ones(99)}, (0, {"a": None}), {}),
        ],
    )
    def test_in_axes(self, hyperparams: Any, in_axes: Any, want: dict[str, Any]):
        are_columns(columns(hyperparams, in_axes), want)

    def test_of_many_starts(self):
        starts = np.array([[0.0, 1.0], [2.0, 3.0]])
        solution = sweep(
            lambda y, c: jnp.sum((y - c) ** 2),
            *(starts, 5.0),
            in_axes=(0, None),
            max_optimizer_steps=0,
        )
        got = table(solution, 5.0, (0, None))
        assert list(got) == ["lane", *LAST]
        np.testing.assert_allclose(got["loss"], np.sum((starts - 5) ** 2, 1))

    def test_of_many_starts_by_one_axis_for_both(self):
        solution = sweep(
            lambda y, _: jnp.sum(y**2),
            *(np.ones((2, 3)), None),
            in_axes=0,
            max_optimizer_steps=0,
        )
        assert list(table(solution, None, 0)) == ["lane", *LAST]

    @pytest.mark.parametrize(
        "hyperparams",
        [
            {"loss": FLOATS},
            {"lane": FLOATS},
            {"num_steps": FLOATS, "status": INTS},
            {"a.b": FLOATS, "a": {"b": INTS}},
        ],
    )
    def test_names_that_are_taken(self, hyperparams: Any):
        """No values are lost, or it is said that they would be."""
        solution = made([3.0, 1.0, np.nan], NAMES[:3])
        try:
            got = table(solution, hyperparams)
        except ValueError as e:
            assert "`hyperparams`" in str(e)
            return
        whole = [*jax.tree.leaves(hyperparams), *columns(None, (0, None)).values()]
        for column in [*whole, np.arange(3), solution.stats["loss"]]:
            equal = [np.array_equal(x, column, equal_nan=True) for x in got.values()]
            assert any(equal)

    @pytest.mark.parametrize(
        ("hyperparams", "got"),
        [(np.ones(2), "2"), ({"a": np.ones(4)}, "4"), (np.ones((5, 3)), "5")],
    )
    def test_another_number_of_lanes(self, hyperparams: Any, got: str):
        with pytest.raises(ValueError, match=f"`hyperparams` .* 3 lanes, got {got}"):
            columns(hyperparams)

    @pytest.mark.parametrize(
        ("hyperparams", "in_axes", "error", "words"),
        [
            (
                {"a": np.ones(3), "b": np.ones(4)},
                (None, 0),
                ValueError,
                ("`hyperparams['a']`", "`hyperparams['b']`", "same number"),
            ),
            (np.ones((3, 0)).T, (None, 0), ValueError, ("at least one", "hyperparams")),
            ([0.1, 0.2], (None, 0), ValueError, ("`hyperparams[0]`", "array", "0.1")),
            (None, (None, 0), ValueError, ("`in_axes`", "`hyperparams`")),
            (FLOATS, (None, 1), ValueError, ("`hyperparams`", "axis 1", "(3,)")),
            (FLOATS, (None, {"a": 0}), ValueError, ("`in_axes`", "{'a': 0}")),
            (FLOATS, (None, 0.5), TypeError, ("`in_axes`", "0.5")),
            (FLOATS, (None, True), TypeError, ("`in_axes`", "True")),
            (FLOATS, (0,), TypeError, ("`in_axes`", "pair", "(0,)")),
            (FLOATS, "0", TypeError, ("`in_axes`", "pair", "'0'")),
        ],
    )
    def test_refused_by_name(
        self,
        hyperparams: Any,
        in_axes: Any,
        error: type[Exception],
        words: tuple[str, ...],
    ):
        with pytest.raises(error) as e:
            columns(hyperparams, in_axes)
        for word in words:
            assert word in str(e.value)


class TestMapping:
    def test_is_one(self):
        whole = SweepTable({"b": INTS, "a": FLOATS})
        assert list(whole) == ["b", "a"]
        assert len(whole) == 2
        assert whole["a"] is FLOATS
        assert "b" in whole
        assert "c" not in whole
        assert dict(**whole) == {"b": INTS, "a": FLOATS}
        with pytest.raises(KeyError, match="c"):
            whole["c"]

    def test_repr(self):
        assert repr(SweepTable({"b": INTS, "a": FLOATS})) == "SweepTable of b, a"

    def test_columns_are_its_own(self):
        given = {"a": FLOATS}
        whole = SweepTable(given)
        given["b"] = FLOATS
        assert list(whole) == ["a"]


# Numbers that take all their digits, or more than a float has.
DIGITS = {
    "float": np.array([0.1, 1 / 3, 5e-324, -1.7976931348623157e308, 1e16]),
    "float32": np.array([0.1, 1 / 3, 1e-45, 3.4028235e38, 2**24], np.float32),
    "special": np.array([np.nan, np.inf, -np.inf, -0.0, 1.0]),
    "int": np.array([2**63 - 1, -(2**63), 0, 2**53 + 1, 7]),
    "unsigned": np.array([2**64 - 1, 2**53 + 1, 0, 1, 2], np.uint64),
    "bool": np.array([True, False, True, True, False]),
    'x, "y"\n[0]': np.arange(5),
    "status": np.array([*NAMES, "successful"], object),
}


class TestCsv:
    def read(self, path: Path) -> dict[str, list[str]]:
        with open(path, newline="") as file:
            names, *rows = csv.reader(file)
        assert {len(row) for row in rows} == {len(names)}
        return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))

    def test_every_digit(self, tmp_path: Path):
        path = tmp_path / "table.csv"
        SweepTable(DIGITS).to_csv(path)
        got = self.read(path)
        assert list(got) == list(DIGITS)
        for name, column in DIGITS.items():
            if name in ("status", "bool"):
                assert got[name] == [str(x) for x in column]
                continue
            # Floats by `float`, so that no digit of an integer goes.
            number = float if column.dtype.kind == "f" else int
            back = np.array([number(x) for x in got[name]], column.dtype)
            assert back.tobytes() == column.tobytes()

    def test_pandas(self, tmp_path: Path):
        path = tmp_path / "table.csv"
        SweepTable(DIGITS).to_csv(path)
        frame = pd.read_csv(path, engine="python")  # the other one may round
        assert list(frame) == list(DIGITS)
        for name, column in DIGITS.items():
            back = frame[name].to_numpy().astype(column.dtype)
            assert np.array_equal(back, column, equal_nan=column.dtype.kind == "f")

    def test_of_a_sweep(self, tmp_path: Path, x64: bool):
        start = jnp.array([0.1, 0.7])
        targets = np.random.default_rng(3).normal(size=(7, 2))
        solution = sweep(
            lambda y, h: jnp.sum(jnp.cosh(y - h)) + h[0], start, targets, rtol=1e-3
        )
        whole = table(solution, targets)
        assert whole["loss"].dtype == (np.float64 if x64 else np.float32)
        whole.to_csv(str(tmp_path / "table.csv"))
        got = self.read(tmp_path / "table.csv")
        assert list(got) == list(whole)
        assert got.pop("status") == ["successful"] * 7
        for name, column in got.items():
            back = np.array(list(map(float, column)), whole[name].dtype)
            np.testing.assert_array_equal(back, whole[name])
        np.testing.assert_array_equal(whole["hyperparam[1]"], targets[:, 1])
        assert len(set(got["loss"])) == 7

    def test_is_overwritten(self, tmp_path: Path):
        path = tmp_path / "table.csv"
        path.write_text("much\n" * 99)
        SweepTable({"a": INTS}).to_csv(path)
        assert path.read_text().split() == ["a", "4", "2", "7"]

    @pytest.mark.parametrize("below", ["", "no/such"])
    def test_cannot_be_written(self, below: str, tmp_path: Path):
        with pytest.raises(OSError, match="directory"):
            SweepTable({"a": INTS}).to_csv(tmp_path / below)


class TestFrame:
    def test_of_a_sweep(self, swept: Solution):
        whole = table(swept, HYPERPARAMS)
        frame = whole.to_frame()
        assert isinstance(frame, pd.DataFrame)
        assert list(frame.columns) == list(whole)
        assert len(frame) == 6
        for name, column in whole.items():
            np.testing.assert_array_equal(frame[name].to_numpy(), column)
            if name != "status":
                assert frame[name].dtype == column.dtype
        failed = frame[frame.status != "successful"]
        assert dict(zip(failed.lane, failed.status, strict=True)) == failed_lanes(swept)
        assert frame.loc[frame.loss.idxmin(), "lane"] == best_lane(swept)

    def test_every_digit(self):
        frame = SweepTable(DIGITS).to_frame()
        for name, column in DIGITS.items():
            back = frame[name].to_numpy().astype(column.dtype)
            assert np.array_equal(back, column, equal_nan=column.dtype.kind == "f")

    def test_without_pandas(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(ModuleNotFoundError) as e:
            SweepTable({"a": INTS}).to_frame()
        assert "`to_frame` needs pandas" in str(e.value)
        assert "pip install 'jaxmf_opt[table]'" in str(e.value)
