"""The best lane, failed lanes and tables of sweeps, against the same made by hand."""

import csv
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimistix import RESULTS
from solutions import LIMIT, NAMES, NONFINITE, OK, STAGNATION, made

from jaxmf_opt import Solution, solve, sweep
from jaxmf_opt.sweeps import SweepTable, best_lane, failed_lanes, table

LAST = ["loss", "grad_norm", "num_steps", "status"]


def ending(y: Any, h: Any) -> Any:
    """A loss that ends in the way `NAMES[h["way"]]`, and its gradient."""
    c = jnp.asarray(h["c"], y.dtype)
    ways = [
        (jnp.sum((y - c) ** 2) + c, 2 * (y - c)),
        (jnp.sum(y), jnp.ones_like(y)),
        # It goes uphill, so that no line search gets anywhere.
        (jnp.sum(jnp.abs(y - c)), -jnp.sign(y - c)),
        (jnp.nan * c, y - c),
    ]
    values, gradients = zip(*ways, strict=True)
    return jnp.stack(values)[h["way"]], jnp.stack(gradients)[h["way"]]


START = np.zeros(2)
OPTIONS: dict[str, Any] = {"grad": True, "gtol": 1e-4, "max_optimizer_steps": 30}
HYPERPARAMS = {
    "c": np.array([3.0, 0.5, 2.0, 0.0, 1.0, 2.5]),
    "way": np.array([0, 1, 2, 3, 0, 3]),
}


@pytest.fixture(scope="module")
def swept() -> Solution:
    return sweep(ending, START, HYPERPARAMS, **OPTIONS)


@pytest.fixture(scope="module")
def singles() -> list[Solution]:
    """The same, one after the other."""
    lanes = [{k: jnp.array(x[i]) for k, x in HYPERPARAMS.items()} for i in range(6)]
    return [solve(lambda y, h=h: ending(y, h), START, **OPTIONS) for h in lanes]


def columns(hyperparams: Any) -> dict[str, np.ndarray]:
    """The columns of hyperparameters, in a table of three lanes."""
    got = dict(table(made([3.0, 1.0, np.nan], NAMES[:3]), hyperparams))
    assert next(iter(got)) == "lane"
    assert list(got)[-4:] == LAST
    return {name: x for name, x in got.items() if name not in ("lane", *LAST)}


def assert_columns(got: dict[str, np.ndarray], want: dict[str, Any]) -> None:
    assert list(got) == list(want)
    for name, column in want.items():
        np.testing.assert_array_equal(got[name], column)
        assert got[name].dtype == np.asarray(column).dtype


def test_best_lane(swept: Solution, singles: list[Solution]):
    """The first of several; it need not have succeeded."""
    losses = [float(x.stats["loss"]) for x in singles]
    assert best_lane(swept) == np.nanargmin(losses) == 1
    assert best_lane(made([1.0, 0.5, 0.5, 0.7, 0.5])) == 1
    got = best_lane(made([-np.inf, 2.0, np.inf, np.nan, 1.0]))
    assert (got, type(got)) == (4, int)
    with pytest.raises(ValueError, match=r"`solution` .*finite, got 2 lanes"):
        best_lane(made([np.inf, np.nan]))


def test_failed_lanes(swept: Solution, singles: list[Solution]):
    """In order, as Python's numbers and strings."""
    got = failed_lanes(swept)
    want = [(1, LIMIT), (2, STAGNATION), (3, NONFINITE), (5, NONFINITE)]
    assert list(got.items()) == want
    assert {(type(i), type(name)) for i, name in got.items()} == {(int, str)}
    for i, single in enumerate(singles):
        assert single.result == getattr(RESULTS, got.get(i, OK))


@pytest.mark.parametrize(
    "of_lanes", [best_lane, failed_lanes, lambda solution: table(solution, np.ones(3))]
)
def test_no_solution_of_a_sweep(of_lanes: Any):
    message = "`solution` must be that of a sweep, got 3.5 of type float."
    with pytest.raises(TypeError, match=re.escape(message)):
        of_lanes(3.5)
    message = "`solution` must have one axis over lanes; its loss has the shape ()."
    with pytest.raises(ValueError, match=re.escape(message)):
        of_lanes(jax.tree.map(lambda x: x[0], made([1.0])))


FLOATS, INTS = np.array([0.5, 0.25, -1.0]), np.array([4, 2, 7])
PAIRS = np.arange(6.0).reshape(3, 2)
KEYS: Any = np.array([[0, 1], [2, 3], [4, 5]], np.uint32)


class TestTable:
    def test_of_a_sweep(self, swept: Solution, singles: list[Solution]):
        got = table(swept, HYPERPARAMS)
        want: dict[str, Any] = {"lane": np.arange(6), **HYPERPARAMS}
        for name in ("loss", "grad_norm", "num_steps"):
            want[name] = np.array([single.stats[name] for single in singles])
        assert list(got) == [*want, "status"]
        for name, column in want.items():
            np.testing.assert_allclose(got[name], column, rtol=1e-6, atol=1e-6)
            assert got[name].dtype == column.dtype
        for status, single in zip(got["status"], singles, strict=True):
            assert single.result == getattr(RESULTS, status)

    @pytest.mark.parametrize(
        ("hyperparams", "want"),
        [
            (FLOATS * 1j, {"hyperparam": FLOATS * 1j}),
            (PAIRS, {"hyperparam[0]": PAIRS[:, 0], "hyperparam[1]": PAIRS[:, 1]}),
            (
                (FLOATS, [INTS, PAIRS[:, :1, None] > 1]),
                {"0": FLOATS, "1.0": INTS, "1.1[0, 0]": PAIRS[:, 0] > 1},
            ),
            # Nothing for each lane, no column.
            ({"a": INTS, "n": None, "z": np.ones((3, 0))}, {"a": INTS}),
            ({"rate": FLOATS, "of": {"x": INTS}}, {"of.x": INTS, "rate": FLOATS}),
            (
                jax.random.wrap_key_data(KEYS),
                {f"hyperparam[{i}]": KEYS[:, i] for i in (0, 1)},
            ),
        ],
    )
    def test_columns(self, hyperparams: Any, want: Any):
        assert_columns(columns(hyperparams), want)

    def test_axes_are_those_of_the_sweep(self):
        """What all lanes have in common is no column."""

        def swept(
            hyperparams: Any, in_axes: Any, start: Any = START, other: Any = None
        ) -> Any:
            def loss(y: Any, _: Any) -> Any:
                return jnp.sum(y**2)

            solution = sweep(
                loss,
                start,
                hyperparams,
                in_axes=in_axes,
                max_optimizer_steps=1,
                optimizer=optax.sgd(0.1),
            )
            solution = pickle.loads(pickle.dumps(solution))
            got = dict(table(solution, hyperparams if other is None else other))
            return {k: x for k, x in got.items() if k not in ("lane", *LAST)}

        want = {f"hyperparam[{i}]": PAIRS[:, i] for i in range(2)}
        assert_columns(swept(PAIRS.T, (None, -1)), want)
        hyperparams = ({"a": FLOATS, "b": np.stack([INTS, INTS])}, np.ones(3))
        axes = (None, ({"a": 0, "b": 1}, None))
        want = {"0.a": FLOATS, "0.b[0]": INTS, "0.b[1]": INTS}
        assert_columns(swept(hyperparams, axes), want)
        # Lanes may differ in their starting points only.
        for none, axes in ((None, (0, None)), (None, 0), (np.ones(99), (0, None))):
            assert swept(none, axes, np.ones((3, 2))) == {}
        with pytest.raises(ValueError, match="of 1 leaves, got 2"):
            swept(PAIRS.T, (None, 1), other=(PAIRS.T, PAIRS.T))

    @pytest.mark.parametrize("name", ["lane", "loss", "status", "a.b"])
    def test_names_that_are_taken(self, name: str):
        hyperparams = {name: FLOATS, "a": {"b": INTS}}
        with pytest.raises(ValueError, match=f"`hyperparams` .* of the name '{name}'"):
            columns(hyperparams)

    def test_refused_by_name(self):
        message = "`hyperparams` must be those of the sweep of 3 lanes, got 4."
        with pytest.raises(ValueError, match=re.escape(message)):
            columns({"a": np.ones(4)})

    def test_is_a_mapping_of_its_own(self):
        given = {"b": INTS, "a": FLOATS}
        whole = SweepTable(given)
        given["c"] = FLOATS
        assert dict(whole) == {"b": INTS, "a": FLOATS}
        assert len(whole) == 2
        assert repr(whole) == "SweepTable of b, a"


# Numbers that take all their digits, or more than a float has.
DIGITS = {
    "float": np.array([0.1, 5e-324, -1.7976931348623157e308, np.nan, -np.inf]),
    "float32": np.array([0.1, 1 / 3, 1e-45, 3.4028235e38, 2**24], np.float32),
    "int": np.array([2**63 - 1, -(2**63), 0, 2**53 + 1, 7]),
    'x, "y"\n[0]': np.array([2**64 - 1, 2**53 + 1, 0, 1, 2], np.uint64),
    "bool": np.array([True, False, True, True, False]),
    "status": np.array([*NAMES, OK], object),
}


class TestCsv:
    def test_every_digit(self, tmp_path: Path):
        path = tmp_path / "table.csv"
        path.write_text("much\n" * 99)  # which goes
        SweepTable(DIGITS).to_csv(path)
        with path.open(newline="") as file:
            names, *rows = csv.reader(file)
        assert names == list(DIGITS)
        for texts, column in zip(zip(*rows, strict=True), DIGITS.values(), strict=True):
            if column.dtype.kind in "bO":
                assert list(texts) == [str(x) for x in column]
                continue
            # Floats by `float`, so that no digit of an integer goes.
            number = float if column.dtype.kind == "f" else int
            back = np.array([number(x) for x in texts], column.dtype)
            assert back.tobytes() == column.tobytes()

    def test_cannot_be_written(self, tmp_path: Path):
        to_csv: Any = SweepTable({"a": INTS}).to_csv
        with pytest.raises(OSError, match="directory"):
            to_csv(tmp_path / "no" / "such")
        with pytest.raises(TypeError, match="`path` must be a path, got 3 of type int"):
            to_csv(3)


class TestFrame:
    def test_of_a_sweep(self, swept: Solution):
        whole = table(swept, HYPERPARAMS)
        frame = whole.to_frame()
        assert list(frame) == list(whole)
        for name, column in whole.items():
            np.testing.assert_array_equal(frame[name].to_numpy(), column)
        failed = frame[frame.status != OK]
        assert dict(zip(failed.lane, failed.status, strict=True)) == failed_lanes(swept)
        assert frame.loc[frame.loss.idxmin(), "lane"] == best_lane(swept)

    def test_without_pandas(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "pandas", None)
        message = "`to_frame` needs pandas: pip install 'jaxmf_opt[table]'"
        with pytest.raises(ModuleNotFoundError, match=re.escape(message)):
            SweepTable({"a": INTS}).to_frame()
