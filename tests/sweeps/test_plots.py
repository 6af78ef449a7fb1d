"""Pictures of sweeps: that what is drawn are the numbers of the solution.

The suite checks annotations while it runs, which would refuse some arguments first. So
some calls are made in a process without these checks: this file, run as a script.
"""

import functools
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from calling import said
from optimistix import RESULTS
from processes import report_of

from jaxmf_opt import History, Solution, solve, sweep

pytest.importorskip("matplotlib")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, same_color, to_hex
from matplotlib.lines import Line2D

from jaxmf_opt.sweeps import plots

OK, LIMIT, STAGNATION, NONFINITE = NAMES = (
    "successful",
    "nonlinear_max_steps_reached",
    "stagnation",
    "nonfinite",
)
# How lanes that failed are marked, and what the legend says.
MARKS = {
    LIMIT: ("v", "limit of steps"),
    STAGNATION: ("s", "stagnation"),
    NONFINITE: ("x", "not finite"),
}
# Some calls below are wrong, as a type checker would say.
convergence: Any = plots.convergence
final_loss: Any = plots.final_loss
heat_map: Any = plots.heat_map


@pytest.fixture(autouse=True)
def no_window():
    plt.switch_backend("Agg")


def loss(y: Any, h: Any) -> Any:
    """One that ends in the way `h["way"]` of `NAMES`."""
    difference, way = y - h["c"], h["way"]
    value, gradient = jnp.sum(difference**4) + h["c"], 4 * difference**3
    for i, (other, slope) in enumerate(
        [
            (jnp.sum(y), jnp.ones_like(y)),
            # It goes uphill, so that no line search gets anywhere.
            (jnp.sum(jnp.abs(difference)), -jnp.sign(difference)),
            (jnp.sum(-y), jnp.where(y > 3, jnp.nan, -1.0)),
        ],
        start=1,
    ):
        value = jnp.where(way == i, other, value)
        gradient = jnp.where(way == i, slope, gradient)
    return value, gradient


C, WAYS, STEPS = np.array([2.0, 1.0, 1.5, 0.5, 3.0]), [0, 1, 2, 3, 0], 30


@functools.cache
def swept() -> Solution:
    """A sweep whose lanes end in all ways."""
    hyperparams = {"c": C, "way": np.array(WAYS)}
    options = {"grad": True, "gtol": 1e-4, "history": True}
    return sweep(loss, np.zeros(2), hyperparams, max_optimizer_steps=STEPS, **options)


@functools.cache
def constant() -> Solution:
    """A sweep in which nothing moves."""
    return sweep(
        lambda y, h: 1.0 + 0.0 * jnp.sum(y),
        *(np.zeros(2), np.arange(4.0)),
        history=True,
        max_optimizer_steps=3,
    )


def made(
    losses: Sequence[float],
    names: Sequence[str] | None = None,
    rows: Any = None,
    steps: Sequence[int] | None = None,
) -> Solution:
    """A solution of lanes of these losses and statuses.

    Args:
      losses: The losses at the end.
      names: The statuses; all are successful by default.
      rows: Losses and gradient norms where each step started.
      steps: How many steps were taken.
    """
    count = len(losses)
    of_lanes = [getattr(RESULTS, name) for name in names or [OK] * count]
    stats: dict[str, Any] = {
        "loss": jnp.array(losses, float),
        "grad_norm": jnp.zeros(count),
        "num_steps": jnp.array(steps if steps is not None else [3] * count),
    }
    if rows is not None:
        stats["history"] = History(*(jnp.array(rows, float),) * 3)
    result = jax.tree.map(lambda *x: jnp.array(x), *of_lanes)
    values = jnp.zeros(count)
    return Solution(value=values, result=result, aux=None, stats=stats, state=None)


def saved(ax: Axes) -> bytes:
    """The picture, as a file: it can be drawn, and nothing warns."""
    file = io.BytesIO()
    ax.get_figure(root=True).savefig(file, format="png")  # pyright: ignore
    assert file.getvalue().startswith(b"\x89PNG\r\n\x1a\n")
    return file.getvalue()


def xy(line: Line2D) -> tuple[list[float], list[float]]:
    x, y = (np.asarray(v, float).tolist() for v in line.get_data())
    return x, y


def markers(ax: Axes) -> dict[str, Line2D]:
    """What the legend explains, by what it says."""
    handles, texts = ax.get_legend_handles_labels()
    assert len(set(texts)) == len(texts)
    lines = [h for h in handles if isinstance(h, Line2D)]
    return dict(zip(texts, lines, strict=True))


def legend(ax: Axes) -> list[str]:
    box = ax.get_legend()
    return [] if box is None else [text.get_text() for text in box.get_texts()]


def curves(ax: Axes, count: int) -> list[Line2D]:
    """The lines of lanes; marks come after them."""
    lines = ax.get_lines()[:count]
    assert all(line.get_linestyle() == "-" for line in lines)
    return lines


def colour_bar(ax: Axes) -> Any:
    """What is beside a picture. Its label is on the y axis."""
    (bar,) = (other for other in ax.figure.axes if other is not ax)
    return bar


def places(ax: Axes, line: Line2D) -> np.ndarray:
    """Where marks are in a picture that has been drawn, from 0 to 1."""
    pixels = line.get_transform().transform(np.transpose(xy(line)))
    return ax.transAxes.inverted().transform(pixels)


def is_at(line: Line2D, x: Any, y: Any) -> None:
    got_x, got_y = xy(line)
    np.testing.assert_allclose(got_x, np.asarray(x, float), rtol=1e-6)
    np.testing.assert_allclose(got_y, np.asarray(y, float), rtol=1e-6)


class TestConvergence:
    @pytest.mark.parametrize(
        ("of", "text"),
        [
            ("grad_norm", "largest element of the gradient"),
            ("loss", "loss above the least of its lane"),
        ],
    )
    def test_words(self, of: str, text: str):
        ax = plots.convergence(swept(), C, of=of, label="centre")
        assert ax.get_xlabel() == "step"
        assert ax.get_ylabel() == text
        assert ax.get_title() == "Convergence of 5 lanes"
        assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
        assert colour_bar(ax).get_ylabel() == "centre"
        saved(ax)

    def test_gradients(self):
        rows = np.asarray(swept().stats["history"].grad_norm)
        lines = curves(plots.convergence(swept()), 5)
        for line, row in zip(lines, rows, strict=True):
            np.testing.assert_array_equal(xy(line), [np.arange(STEPS), row])
        # Lanes that have ended early end early in the picture, too.
        ends = [np.flatnonzero(np.isfinite(xy(line)[1])).max() for line in lines]
        assert ends == (np.asarray(swept().stats["num_steps"]) - 1).tolist()
        assert ends[1] == STEPS - 1 and max(ends[0], *ends[2:]) < STEPS - 1

    def test_losses(self):
        stats = swept().stats
        lines = curves(plots.convergence(swept(), of="loss"), 5)
        for i, line in enumerate(lines):
            row = np.asarray(stats["history"].loss[i], float)
            above = row - float(stats["loss"][i])
            # What is not above has no place on a logarithmic axis.
            want = np.where(above > 0, above, np.nan)
            np.testing.assert_array_equal(xy(line), [np.arange(STEPS), want])
        assert np.isfinite(xy(lines[0])[1]).sum() > 5

    @pytest.mark.parametrize("log", [False, True])
    @pytest.mark.parametrize("kind", [list, np.array, jnp.array])
    def test_colours(self, kind: Callable[..., Any], log: bool):
        values = [0.5, 8.0, 2.0, 1.0, 4.0]
        ax = plots.convergence(swept(), kind(values), log=log)
        norm = (LogNorm if log else Normalize)(0.5, 8.0)
        for value, line in zip(values, curves(ax, 5), strict=True):
            want = plt.get_cmap("viridis")(norm(value))
            assert same_color(line.get_color(), want)
        bar = colour_bar(ax)
        np.testing.assert_allclose(bar.get_ylim(), [0.5, 8.0])
        assert bar.get_yscale() == ("log" if log else "linear")
        assert bar.get_ylabel() == "hyperparameter"
        saved(ax)

    def test_without_values(self):
        ax = plots.convergence(swept())
        assert len({to_hex(line.get_color()) for line in curves(ax, 5)}) == 1
        assert ax.figure.axes == [ax]
        saved(ax)

    def test_failed_lanes(self):
        """Marked where the last step of theirs started."""
        ax = plots.convergence(swept())
        stats = swept().stats
        last = np.asarray(stats["num_steps"]) - 1
        assert last[1] == STEPS - 1 and all(0 <= last[i] < 20 for i in (2, 3))
        assert legend(ax) == [text for _, text in MARKS.values()]
        for way, (mark, text) in enumerate(MARKS.values(), start=1):
            line = markers(ax)[text]
            lane = WAYS.index(way)
            norm = float(stats["history"].grad_norm[lane, last[lane]])
            assert xy(line) == ([last[lane]], [norm])
            assert line.get_marker() == mark
            assert line.get_linestyle() == "None"
        saved(ax)

    def test_no_legend_where_none_failed(self):
        ax = plots.convergence(made([1.0, 2.0], rows=[[3, 2, 1], [2, 1, 0.5]]))
        assert ax.get_legend() is None
        saved(ax)

    def test_no_marks_without_steps(self):
        rows = np.full((2, 3), np.nan)
        ax = plots.convergence(made([np.nan] * 2, [NONFINITE] * 2, rows, [0, 0]))
        assert ax.get_legend() is None
        assert len(ax.get_lines()) == 2
        saved(ax)

    def test_all_failed(self):
        rows = np.array([[4.0, 2, 1], [8, 4, 2]])
        ax = plots.convergence(made([1.0, 2.0], [LIMIT] * 2, rows))
        assert legend(ax) == ["limit of steps"]
        assert xy(markers(ax)["limit of steps"]) == ([2, 2], [1, 2])
        saved(ax)

    def test_no_steps(self):
        """Of a limit of 0."""
        none = made([1.0, 2.0], [LIMIT] * 2, np.zeros((2, 0)), [0, 0])
        ax = plots.convergence(none, [1.0, 2.0])
        assert ax.get_title() == "Convergence of 2 lanes"
        assert all(xy(line) == ([], []) for line in curves(ax, 2))
        saved(ax)

    def test_one_lane(self):
        ax = plots.convergence(made([0.0], rows=[[3, 2, 1]]), [7.0])
        assert xy(curves(ax, 1)[0]) == ([0, 1, 2], [3, 2, 1])
        saved(ax)

    def test_equal_values(self):
        for log in (False, True):
            some = made([0.0] * 2, rows=[[3, 2, 1]] * 2)
            saved(plots.convergence(some, [2.0, 2.0], log=log))

    def test_losses_that_stay(self):
        ax = plots.convergence(constant(), np.arange(4.0), of="loss")
        assert not np.isfinite([xy(line)[1] for line in curves(ax, 4)]).any()
        saved(ax)

    def test_gradients_of_zero(self):
        saved(plots.convergence(constant(), np.arange(4.0)))

    def test_a_run_that_went_on(self):
        options = {"optimizer": optax.sgd(0.1), "history": True}
        run = functools.partial(
            sweep,
            lambda y, h: jnp.sum((y - h) ** 2),
            *(np.zeros(2), np.array([1.0, 2.0])),
            **options,
        )
        first = run(max_optimizer_steps=2)
        ax = plots.convergence(run(max_optimizer_steps=5, state=first.state))
        (one, other) = curves(ax, 2)
        assert np.isnan(xy(one)[1]).tolist() == [True, True, False, False, False]
        # A step leaves 0.8 of a gradient, which at first was 2 and 4.
        is_at(markers(ax)["limit of steps"], [4, 4], [2 * 0.8**4, 4 * 0.8**4])
        np.testing.assert_allclose(xy(other)[1][2:], 4 * 0.8 ** np.arange(2, 5))
        saved(ax)

    @pytest.mark.parametrize("log", [False, True])
    def test_a_lane_without_a_value(self, log: bool):
        """It has no colour, and the others have theirs."""
        some = made([1.0] * 3, rows=[[3, 2, 1]] * 3)
        ax = plots.convergence(some, [4.0, np.nan, 2.0], log=log)
        np.testing.assert_allclose(colour_bar(ax).get_ylim(), [2, 4])
        saved(ax)

    @pytest.mark.parametrize("last", [1e30, np.inf])
    def test_what_diverges_leaves_by_the_upper_edge(self, last: float):
        rows = [[0.5, 1e5, last], [1, 0.1, 0.01]]
        ax = plots.convergence(made([np.nan, 0.0], [NONFINITE, OK], rows))
        low, high = ax.get_ylim()
        assert low < 0.01
        assert high == 1e3
        saved(ax)

    @pytest.mark.parametrize(
        "row", [[0.5, 1e5, 1e30], [0.5, 1e5, np.inf], [np.nan, np.nan, np.nan]]
    )
    def test_marks_of_lanes_that_are_not_finite_are_seen(self, row: list[float]):
        """Where the legend has a mark, so has the picture."""
        rows = [row, [1, 0.1, 0.01]]
        ax = plots.convergence(made([np.nan, 0.0], [NONFINITE, OK], rows, [3, 3]))
        saved(ax)
        for mark in markers(ax).values():
            assert np.all((places(ax, mark) >= 0) & (places(ax, mark) <= 1))

    def test_of_lanes_that_do_not(self):
        ax = plots.convergence(made([0.0], rows=[[1, 100, 0.01]]))
        low, high = ax.get_ylim()
        assert low < 0.01
        assert 100 < high < 1e3

    def test_many_lanes(self):
        count = 1000
        rows = np.geomspace(1, 1e-6, 20) * np.geomspace(1, 10, count)[:, None]
        values = np.geomspace(1, 10, count)
        ax = plots.convergence(made([0.0] * count, rows=rows), values, log=True)
        lines = curves(ax, count)
        assert ax.get_title() == "Convergence of 1000 lanes"
        drawn = np.array([xy(line)[1] for line in lines])
        np.testing.assert_allclose(drawn, rows, rtol=1e-6)
        faint = lines[0].get_alpha()
        assert faint is not None and 0.05 <= faint < 0.2
        few = curves(plots.convergence(swept()), 5)[0].get_alpha()
        assert few is not None and few > 0.8
        saved(ax)


class TestFinalLoss:
    def test_words(self):
        ax = plots.final_loss(swept(), C, label="centre")
        assert ax.get_xlabel() == "centre"
        assert ax.get_ylabel() == "loss"
        assert ax.get_title() == "Loss of 5 lanes"
        assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "linear")
        least = float(np.nanmin(swept().stats["loss"]))
        want = [OK, *(text for _, text in MARKS.values()), f"least: {least:.6g}"]
        assert legend(ax) == want
        saved(ax)
        assert plots.final_loss(swept(), C).get_xlabel() == "hyperparameter"

    def test_numbers_of_a_sweep(self):
        ax, losses = plots.final_loss(swept(), C), swept().stats["loss"]
        line, *_ = ax.get_lines()
        order = np.argsort(C)
        is_at(line, C[order], losses[order])
        found = markers(ax)
        is_at(found[OK], C[[0, 4]], losses[np.array([0, 4])])
        for way, (mark, text) in enumerate(MARKS.values(), start=1):
            lane = WAYS.index(way)
            assert found[text].get_marker() == mark
            is_at(found[text], C[[lane]], losses[np.array([lane])])
        best = int(np.argmin(losses))
        is_at(list(found.values())[-1], C[[best]], losses[best][None])
        assert best == 1  # it failed

    def test_lanes_in_any_order(self):
        solution = made([3.0, 1.0, 2.0])
        ax = plots.final_loss(solution, [10.0, -1.0, 5.0])
        line, good, star = ax.get_lines()
        assert xy(line) == ([-1, 5, 10], [1, 2, 3])
        assert xy(good) == ([10, -1, 5], [3, 1, 2])
        assert xy(star) == ([-1], [1])
        assert star.get_marker() == "*"

    def test_no_line_through_several_lanes_of_a_value(self):
        ax = plots.final_loss(made([1.0, 2.0, 3.0]), [1.0, 2.0, 1.0])
        good, star = ax.get_lines()
        assert good.get_linestyle() == "None"
        assert xy(good) == ([1, 2, 1], [1, 2, 3])
        assert xy(star) == ([1], [1])
        saved(ax)

    def test_logarithmic(self):
        ax = plots.final_loss(made([1.0, 2.0]), [1e-3, 1e3], log=True)
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
        saved(ax)

    @pytest.mark.parametrize(
        "none",
        [
            np.nan,
            np.inf,
            -np.inf,
        ],
    )
    def test_lanes_without_a_finite_loss(self, none: float):
        solution = made([2.0, none, 1.0], [OK, NONFINITE, OK])
        ax = plots.final_loss(solution, [1.0, 2.0, 3.0])
        # The line goes by it.
        assert xy(ax.get_lines()[0]) == ([1, 3], [2, 1])
        assert legend(ax) == [OK, "not finite, above or none", "least: 1"]
        mark = markers(ax)["not finite, above or none"]
        assert xy(mark) == ([2], [1])
        saved(ax)
        # It is at the upper edge.
        np.testing.assert_allclose(places(ax, mark), [[0.5, 1.0]])

    def test_lanes_far_above(self):
        names = [OK, OK, STAGNATION, LIMIT, LIMIT, NONFINITE]
        solution = made([1.0, 2.0, 1e9, 1e6, 1.5, np.nan], names)
        ax = plots.final_loss(solution, np.arange(6.0))
        found = markers(ax)
        assert (
            legend(ax)
            == list(found)
            == [
                OK,
                "limit of steps",
                "limit of steps, above",
                "stagnation, above",
                "not finite, above or none",
                "least: 1",
            ]
        )
        assert xy(found["limit of steps"]) == ([4], [1.5])
        assert xy(found["limit of steps, above"]) == ([3], [1])
        assert xy(found["stagnation, above"]) == ([2], [1])
        assert xy(ax.get_lines()[0]) == ([0, 1, 4], [1, 2, 1.5])
        assert ax.get_ylim()[1] < 3
        saved(ax)

    def test_a_single_lane_that_succeeded(self):
        """Others that are hardly worse have a place of their own."""
        names = [OK, LIMIT, LIMIT]
        for least in (0.0, 1.0):
            solution = made([least, least + 1e-6, least + 2e-6], names)
            ax = plots.final_loss(solution, [1.0, 2.0, 3.0])
            assert legend(ax) == [OK, "limit of steps", f"least: {least:g}"]

    def test_all_failed(self):
        ax = plots.final_loss(made([3.0, 1.0, 2.0], [LIMIT] * 3), [1.0, 2.0, 3.0])
        assert legend(ax) == ["limit of steps", "least: 1"]
        assert xy(markers(ax)["limit of steps"]) == ([1, 2, 3], [3, 1, 2])
        saved(ax)

    def test_one_lane(self):
        ax = plots.final_loss(made([5.0]), [7.0])
        assert legend(ax) == [OK, "least: 5"]
        assert xy(markers(ax)["least: 5"]) == ([7], [5])
        saved(ax)

    @pytest.mark.parametrize("level", [0.0, 1.0, -1e-300, 1e300])
    def test_equal_losses(self, level: float):
        with jax.enable_x64():
            solution = made([level] * 3)
        ax = plots.final_loss(solution, [1.0, 2.0, 3.0])
        assert xy(markers(ax)[OK]) == ([1, 2, 3], [level] * 3)
        assert xy(markers(ax)[f"least: {level:.6g}"]) == ([1], [level])
        saved(ax)

    def test_a_constant_loss(self):
        ax = plots.final_loss(constant(), np.arange(4.0))
        assert xy(markers(ax)[OK]) == ([0, 1, 2, 3], [1] * 4)
        saved(ax)

    def test_many_lanes(self):
        x = np.geomspace(1e-3, 1e3, 1000)
        names = [NAMES[i % 3] for i in range(1000)]
        ax = plots.final_loss(made((np.log(x) ** 2).tolist(), names), x, log=True)
        assert len(xy(ax.get_lines()[0])[0]) == 1000
        drawn = [len(xy(markers(ax)[text])[0]) for text in legend(ax)[:-1]]
        assert drawn == [334, 333, 333]
        saved(ax)


# A grid of 3 x 2, in an order of its own.
COLUMNS = np.array([2.0, 0.5, 1.0, 0.5, 2.0, 1.0])
ROWS = np.array([10.0, 10.0, 10.0, -5.0, -5.0, -5.0])
LOSSES = [6.0, 4.0, 5.0, 1.0, 3.0, 2.0]
GRID = [[1, 2, 3], [4, 5, 6]]
SQUARE = np.array([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]])


def cells(ax: Axes) -> Any:
    (image,) = ax.get_images()
    return image.get_array()


def extension(image: Any) -> str:
    """At which ends the colour bar has arrows."""
    return image.colorbar.extend


def ticks(axis: Any) -> tuple[list[float], list[str]]:
    texts = [text.get_text() for text in axis.get_ticklabels()]
    return axis.get_ticklocs().tolist(), texts


class TestHeatMap:
    def test_words(self):
        ax = plots.heat_map(made(LOSSES), COLUMNS, ROWS, labels=("a", "b"))
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "b")
        assert ax.get_title() == "Loss of 6 lanes"
        assert colour_bar(ax).get_ylabel() == "loss"
        assert legend(ax) == ["least: 1"]
        saved(ax)
        ax = plots.heat_map(made(LOSSES), COLUMNS, ROWS)
        assert ax.get_xlabel() == "first hyperparameter"
        assert ax.get_ylabel() == "second hyperparameter"

    def test_cells(self):
        ax = plots.heat_map(made(LOSSES), COLUMNS, ROWS)
        assert cells(ax).tolist() == GRID
        (image,) = ax.get_images()
        assert image.origin == "lower"
        assert list(image.get_extent()) == [-0.5, 2.5, -0.5, 1.5]
        assert ticks(ax.xaxis) == ([0, 1, 2], ["0.5", "1", "2"])
        assert ticks(ax.yaxis) == ([0, 1], ["-5", "10"])
        # The least, as a star in its cell.
        assert xy(markers(ax)["least: 1"]) == ([0], [0])

    @pytest.mark.parametrize("log", [False, True])
    def test_colours(self, log: bool):
        ax = plots.heat_map(made(LOSSES), COLUMNS, ROWS, log=log)
        (image,) = ax.get_images()
        assert type(image.norm) is (LogNorm if log else Normalize)
        assert image.get_clim() == (1, 6)
        assert colour_bar(ax).get_yscale() == ("log" if log else "linear")
        saved(ax)

    def test_of_a_sweep(self):
        x, y = (g.ravel() for g in np.meshgrid([0.0, 1.0, 3.0], [2.0, 1.0]))
        solution = sweep(
            lambda p, h: jnp.sum((p - h["x"]) ** 2) + h["x"] * h["y"],
            *(np.zeros(2), {"x": x, "y": y}),
            gtol=1e-6,
        )
        ax = plots.heat_map(solution, x, y)
        np.testing.assert_allclose(cells(ax), [[0, 1, 3], [0, 2, 6]], atol=1e-6)
        assert ticks(ax.yaxis)[1] == ["1", "2"]
        saved(ax)

    def test_the_least_of_several_lanes(self):
        ax = plots.heat_map(
            made([3.0, 2.0, np.nan, 4.0]), [1.0] * 4, [1.0, 1.0, 1.0, 2.0]
        )
        assert cells(ax).tolist() == [[2], [4]]
        assert xy(markers(ax)["least: 2"]) == ([0], [0])
        saved(ax)

    @pytest.mark.parametrize("none", [np.nan, np.inf, -np.inf])
    def test_cells_that_stay_white(self, none: float):
        losses = [none if x == 5.0 else x for x in LOSSES]
        names = [NONFINITE if x == 5.0 else OK for x in LOSSES]
        ax = plots.heat_map(made(losses, names), COLUMNS, ROWS)
        masked = np.ma.getmaskarray(cells(ax))
        assert masked.tolist() == [[False] * 3, [False, True, False]]
        assert xy(markers(ax)["not finite"]) == ([1], [1])
        saved(ax)

    def test_pairs_that_do_not_occur(self):
        ax = plots.heat_map(made([1.0, 2.0]), [1.0, 2.0], [1.0, 2.0])
        masked = np.ma.getmaskarray(cells(ax))
        assert masked.tolist() == [[False, True], [True, False]]
        assert len(ax.get_lines()) == 1
        saved(ax)

    def test_failed_lanes(self):
        names = [OK, LIMIT, STAGNATION, OK, NONFINITE, LIMIT]
        ax = plots.heat_map(made(LOSSES, names), COLUMNS, ROWS)
        found = markers(ax)
        want = {
            "limit of steps": ([0, 1], [1, 0]),
            "stagnation": ([1], [1]),
            "not finite": ([2], [0]),
            "least: 1": ([0], [0]),
        }
        assert {text: xy(line) for text, line in found.items()} == want
        assert legend(ax) == list(want)
        marks = [found[text].get_marker() for _, text in MARKS.values()]
        assert marks == [mark for mark, _ in MARKS.values()]
        saved(ax)

    def test_colours_are_of_lanes_that_succeeded(self):
        """What is far above has the last colour, and the bar an arrow there."""
        names = [OK if x < 6 else STAGNATION for x in LOSSES]
        losses = [1e9 if x == 6 else x for x in LOSSES]
        ax = plots.heat_map(made(losses, names), COLUMNS, ROWS)
        (image,) = ax.get_images()
        assert image.get_clim() == (1, 5)
        assert extension(image) == "max"
        assert cells(ax).max() == 1e9
        saved(ax)
        ax = plots.heat_map(made(LOSSES, [LIMIT] * 6), COLUMNS, ROWS)
        (image,) = ax.get_images()
        assert image.get_clim() == (1, 6)
        assert extension(image) == "neither"
        saved(ax)

    def test_a_single_lane_that_succeeded(self):
        """Cells that are hardly worse have a colour of their own."""
        solution = made([0.0, 1e-6, 2e-6], [OK, LIMIT, LIMIT])
        ax = plots.heat_map(solution, [1.0, 2.0, 3.0], [1.0] * 3)
        (image,) = ax.get_images()
        (colours,) = np.asarray(image.cmap(image.norm(cells(ax))))
        assert len({tuple(x) for x in colours.tolist()}) == 3

    def test_one_lane(self):
        ax = plots.heat_map(made([5.0]), [7.0], [8.0])
        assert cells(ax).tolist() == [[5]]
        assert (ticks(ax.xaxis), ticks(ax.yaxis)) == (([0], ["7"]), ([0], ["8"]))
        saved(ax)

    @pytest.mark.parametrize("level", [0.0, 1.0, -3.0])
    def test_equal_losses(self, level: float):
        ax = plots.heat_map(made([level] * 6), COLUMNS, ROWS)
        assert cells(ax).tolist() == [[level] * 3] * 2
        saved(ax)

    def test_a_constant_loss(self):
        for log in (False, True):
            ax = plots.heat_map(constant(), *SQUARE, log=log)
            assert cells(ax).tolist() == [[1, 1], [1, 1]]
            saved(ax)

    def test_many_lanes(self):
        x, y = (g.ravel() for g in np.meshgrid(np.arange(40.0), np.arange(25.0)))
        losses = (x - 31) ** 2 + (y - 7) ** 2 + 1
        ax = plots.heat_map(made(losses.tolist()), x, y, log=True)
        np.testing.assert_array_equal(cells(ax), losses.reshape(25, 40))
        assert xy(markers(ax)["least: 1"]) == ([31], [7])
        # Not all have room for their numbers.
        for axis, last in ((ax.xaxis, 39), (ax.yaxis, 24)):
            places, texts = ticks(axis)
            assert len(places) == 8
            assert (places[0], places[-1]) == (0, last)
            assert texts == [f"{place:.3g}" for place in places]
        saved(ax)


PICTURES: dict[str, Callable[..., Axes]] = {
    "convergence": lambda **kwargs: convergence(swept(), C, **kwargs),
    "final_loss": lambda **kwargs: final_loss(swept(), C, **kwargs),
    "heat_map": lambda **kwargs: heat_map(swept(), C, C, **kwargs),
}


class TestAxes:
    @pytest.mark.parametrize("name", PICTURES)
    def test_given(self, name: str):
        figure, (left, right) = plt.subplots(1, 2)
        assert PICTURES[name](ax=left) is left
        assert left.get_title() != ""
        assert not right.has_data()
        assert plt.get_fignums() == [figure.number]
        saved(left)

    @pytest.mark.parametrize("name", PICTURES)
    def test_new(self, name: str):
        figure, other = plt.subplots()
        ax = PICTURES[name]()
        assert ax is not other
        assert not other.has_data()
        assert len(plt.get_fignums()) == 2
        assert ax.figure is not figure
        saved(ax)


ONE = made([1.0, 2.0, 3.0], rows=np.ones((3, 2)))
NONE_FINITE = made([np.nan, np.inf], [NONFINITE] * 2, np.ones((2, 2)))
# What an annotation does not refuse; see below for the rest.
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "no history": (
        lambda: convergence(made([1.0])),
        ValueError,
        ("`solution`", "`history=True`"),
    ),
    "unknown": (
        lambda: convergence(ONE, of="step_size"),
        ValueError,
        ("`of`", "grad_norm, loss", "'step_size'"),
    ),
    "none finite, final_loss": (
        lambda: final_loss(NONE_FINITE, np.ones(2)),
        ValueError,
        ("`solution`", "finite", "2 lanes"),
    ),
    "none finite, heat_map": (
        lambda: heat_map(NONE_FINITE, np.ones(2), np.ones(2)),
        ValueError,
        ("`solution`", "finite", "2 lanes"),
    ),
    **{
        f"{name} of {what}, {picture}": (
            functools.partial(draw, value),
            error,
            (f"`{name}`", *words),
        )
        for picture, name, draw in (
            ("convergence", "values", lambda x: convergence(ONE, x)),
            ("final_loss", "values", lambda x: final_loss(ONE, x)),
            ("heat_map", "x", lambda x: heat_map(ONE, x, np.ones(3))),
            ("heat_map", "y", lambda x: heat_map(ONE, np.ones(3), x)),
        )
        for what, value, error, words in (
            ("too few", np.ones(2), ValueError, ("3 lanes", "(2,)")),
            ("too many", [1.0] * 4, ValueError, ("3 lanes", "(4,)")),
            ("two axes", np.ones((3, 1)), ValueError, ("3 lanes", "(3, 1)")),
            ("no axis", np.ones(()), ValueError, ("3 lanes", "()")),
            ("strings", np.array(["a", "b", "c"]), TypeError, ("numbers", "'b'")),
            ("objects", np.array([1, {}, 2]), TypeError, ("numbers", "{}")),
            ("lists", np.array([[1], [2, 3], []], object), TypeError, ("numbers",)),
            ("infinity", [1.0, -np.inf, 2.0], ValueError, ("finite", "-inf")),
            ("no numbers", [np.nan] * 3, ValueError, ("finite", "nan")),
            ("a number missing", [1.0, np.nan, 2.0], ValueError, ("finite", "nan")),
        )
        # Of one number that is missing, a lane has no colour: see above.
        if (what, picture) != ("a number missing", "convergence")
    },
    # What has no place on a logarithmic scale.
    **{
        f"log of {least:g}, {picture}": (
            functools.partial(draw, [least, 1.0, 2.0]),
            ValueError,
            ("`log`", *words, f"above 0, got {least:g}"),
        )
        for picture, draw, words in (
            ("convergence", lambda x: convergence(ONE, x, log=True), ("`values`",)),
            ("final_loss", lambda x: final_loss(ONE, x, log=True), ("`values`",)),
            (
                "heat_map",
                lambda x: heat_map(made(x), np.ones(3), np.ones(3), log=True),
                ("losses",),
            ),
        )
        for least in (0.0, -2.0)
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str):
    call, error, words = REFUSED[case]
    with pytest.raises(error) as e:
        call()
    for word in words:
        assert word in str(e.value)
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    "draw",
    [
        lambda s: convergence(s),
        lambda s: final_loss(s, np.ones(1)),
        lambda s: heat_map(s, np.ones(1), np.ones(1)),
    ],
    ids=PICTURES,
)
def test_no_axis_over_lanes(draw: Any):
    single = solve(
        lambda y: jnp.sum(y**2), np.zeros(2), max_optimizer_steps=1, history=True
    )
    with pytest.raises(ValueError, match=r"`solution` .* axis over lanes"):
        draw(single)
    assert not plt.get_fignums()


def calls() -> dict[str, tuple[Callable[[], Any], list[str]]]:
    """Calls that annotations would refuse, and what is to be said of them."""
    solution = made([1.0, 2.0], rows=np.ones((2, 2)))
    return {
        "convergence of no solution": (
            lambda: convergence(3.5),
            ["TypeError", "`solution`", "3.5 of type float"],
        ),
        "final_loss of no solution": (
            lambda: final_loss(None, [1.0]),
            ["TypeError", "`solution`", "None of type NoneType"],
        ),
        "heat_map of no solution": (
            lambda: heat_map({"a": 1}, [1.0], [1.0]),
            ["TypeError", "`solution`", "{'a': 1} of type dict"],
        ),
        "of a number": (
            lambda: convergence(solution, of=3),
            ["ValueError", "`of`", "3"],
        ),
        "a list of strings": (
            lambda: final_loss(solution, ["low", "high"]),
            ["TypeError", "`values`", "['low', 'high']"],
        ),
        "a string": (
            lambda: heat_map(solution, "ab", [1.0, 2.0]),
            ["TypeError", "`x`", "'ab'"],
        ),
        "a number": (
            lambda: heat_map(solution, [1.0, 2.0], 7),
            ["ValueError", "`y`", "2 lanes", "()"],
        ),
        "none": (lambda: final_loss(solution, None), ["`values`"]),
        # Integers are numbers.
        "integers": (lambda: final_loss(solution, jnp.arange(2)), ["no error"]),
        "ints": (lambda: heat_map(solution, [1, 2], range(2)), ["no error"]),
        "bools": (lambda: convergence(solution, jnp.arange(2) > 0), ["no error"]),
        "colours without values": (
            lambda: convergence(solution, log=True),
            ["no error"],
        ),
    }


def report() -> dict[str, str]:
    """Makes these calls and writes down what came of them."""
    return {name: ": ".join(said(call)) for name, (call, _) in calls().items()}


def test_without_checks_of_annotations():
    # matplotlib 3.10 has its own warnings with a newer pyparsing.
    outcomes = report_of(__file__, warnings="default", MPLBACKEND="Agg")
    for name, (_, words) in calls().items():
        for word in words:
            assert word in outcomes[name], (name, outcomes[name])


@pytest.mark.parametrize("missing", ["matplotlib", "matplotlib.pyplot"])
def test_without_matplotlib(missing: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "jaxmf_opt.sweeps.plots")
    with pytest.raises(ModuleNotFoundError) as e:
        importlib.import_module("jaxmf_opt.sweeps.plots")
    assert "`jaxmf_opt.sweeps.plots` needs matplotlib" in str(e.value)
    assert "pip install 'jaxmf_opt[plot]'" in str(e.value)


def test_the_rest_does_without_matplotlib():
    """Nobody else imports it."""
    program = (
        "import sys; sys.modules['matplotlib'] = None;"
        "from jaxmf_opt import sweep, sweeps; print(sweeps.table.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert (done.stdout, done.stderr) == ("table\n", "")


if __name__ == "__main__":
    print(json.dumps(report()))
