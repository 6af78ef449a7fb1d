"""Pictures of sweeps: that what is drawn are the numbers of the solution."""

import io
import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from solutions import LIMIT, NONFINITE, OK, STAGNATION, made

from jaxmf_opt import sweep

pytest.importorskip("matplotlib")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, same_color, to_hex
from matplotlib.lines import Line2D

from jaxmf_opt.sweeps import plots

# Some calls below are wrong, as a type checker would say.
convergence: Any = plots.convergence
final_loss: Any = plots.final_loss
heat_map: Any = plots.heat_map

NAN = np.nan
# The losses of five lanes before each step; and lanes that end so, in all ways.
STEPS = [
    *([8, 4, NAN, NAN], [9, 7, 5, 3], [4, NAN, NAN, NAN]),
    *([6, 7, NAN, NAN], [5, 4, 2, NAN]),
]
WAYS = [OK, LIMIT, STAGNATION, NONFINITE, OK]
LANES = made([1.0, 2.0, 3.0, NAN, 1.5], WAYS, STEPS)
VALUES = [4.0, 2.0, 3.0, 1.0, 6.0]


@pytest.fixture(autouse=True)
def no_window():
    plt.switch_backend("Agg")


def drawn(ax: Axes) -> Axes:
    """The same, when the picture has been made: it can be, and nothing warns."""
    file = io.BytesIO()
    ax.get_figure(root=True).savefig(file, format="png")  # pyright: ignore
    assert file.getvalue().startswith(b"\x89PNG\r\n\x1a\n")
    return ax


def xy(line: Line2D) -> tuple[list[float], list[float]]:
    x, y = (np.asarray(v, float).tolist() for v in line.get_data())
    return x, y


def legend(ax: Axes) -> dict[str, Line2D]:
    """What the legend explains, by what it says: each once."""
    box = ax.get_legend()
    if box is None:
        return {}
    handles, texts = ax.get_legend_handles_labels()
    assert [text.get_text() for text in box.get_texts()] == texts
    assert len(set(texts)) == len(texts)
    lines = [h for h in handles if isinstance(h, Line2D)]
    return dict(zip(texts, lines, strict=True))


def marks(ax: Axes) -> list[tuple[str, tuple[list[float], list[float]]]]:
    """What the legend says, and where they are."""
    return [(text, xy(line)) for text, line in legend(ax).items()]


def forms(ax: Axes) -> str:
    return "".join(str(line.get_marker()) for line in legend(ax).values())


def words(ax: Axes) -> list[str]:
    return [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]


def scales(ax: Axes) -> tuple[str, str]:
    return ax.get_xscale(), ax.get_yscale()


def colour_bar(ax: Axes) -> Any:
    """What is beside a picture. Its label is on the y axis."""
    (bar,) = (other for other in ax.figure.axes if other is not ax)
    return bar


class TestConvergence:
    def test_gradients(self):
        """A line for each lane; those that failed are marked at their last step."""
        ax = drawn(convergence(LANES))
        for line, row in zip(ax.get_lines()[:5], STEPS, strict=True):
            assert line.get_linestyle() == "-"
            np.testing.assert_array_equal(xy(line), [range(4), 2 * np.array(row)])
        assert marks(ax) == [
            ("limit of steps", ([3], [6])),
            ("stagnation", ([0], [8])),
            ("not finite", ([1], [14])),
        ]
        assert forms(ax) == "vsx"
        text = "largest element of the gradient"
        assert words(ax) == ["Convergence of 5 lanes", "step", text]
        assert scales(ax) == ("linear", "log")
        # Without values there are no colours.
        assert len({to_hex(line.get_color()) for line in ax.get_lines()[:5]}) == 1
        assert ax.figure.axes == [ax]

    def test_losses(self):
        """What is not above the last has no place on a logarithmic axis."""
        ax = drawn(convergence(LANES, of="loss"))
        first, *_, diverged, last = ax.get_lines()[:5]
        np.testing.assert_array_equal(xy(first)[1], [7, 3, NAN, NAN])
        np.testing.assert_array_equal(xy(diverged)[1], [NAN] * 4)
        np.testing.assert_array_equal(xy(last)[1], [3.5, 2.5, 0.5, NAN])
        assert ax.get_ylabel() == "loss above the least of its lane"

    @pytest.mark.parametrize("log", [False, True])
    def test_colours(self, log: bool):
        """Of a lane without a value there is none."""
        values = [0.5, 8.0, 2.0, NAN, 4.0]
        ax = drawn(convergence(LANES, values, log=log, label="centre"))
        norm = (LogNorm if log else Normalize)(0.5, 8.0)
        for value, line in zip(values, ax.get_lines()[:5], strict=True):
            want = plt.get_cmap("viridis")(norm(value))
            assert np.isnan(value) or same_color(line.get_color(), want)
        bar = colour_bar(ax)
        np.testing.assert_allclose(bar.get_ylim(), [0.5, 8.0])
        assert scales(bar)[1] == ("log" if log else "linear")
        assert bar.get_ylabel() == "centre"
        assert colour_bar(convergence(LANES, VALUES)).get_ylabel() == "hyperparameter"

    def test_nothing_to_mark_or_to_draw(self):
        """No lane failed; or none made a step, or none has anything above 0."""
        assert not legend(convergence(made([1.0], rows=[[3, 2, 1]])))
        for rows in (np.zeros((2, 0)), np.full((2, 3), NAN)):
            none = made([1.0, NAN], [LIMIT, NONFINITE], rows)
            ax = drawn(convergence(none, [2.0, 2.0], log=True))
            assert len(ax.get_lines()) == 2
            assert not legend(ax)
        still = made([0.0], rows=np.zeros((1, 3)))
        assert scales(drawn(convergence(still, of="loss"))) == ("linear", "linear")

    @pytest.mark.parametrize("last", [1e30, np.inf])
    def test_what_diverges_leaves_by_the_upper_edge(self, last: float):
        """And is marked there: where the legend has a mark, so has the picture."""
        rows = [[0.5, 1e5, last], [1, 0.1, 0.01]]
        ax = drawn(convergence(made([NAN, 0.0], [NONFINITE, OK], rows)))
        low, high = ax.get_ylim()
        assert low < 0.02
        assert high == 2e3
        assert marks(ax) == [("not finite", ([2], [2e3]))]
        # What comes down again is drawn to its height.
        ax = convergence(made([0.0], rows=[[1, 100, 0.01]]))
        assert 200 < ax.get_ylim()[1] < 2e3

    def test_a_run_that_went_on(self):
        """The record has nothing of the first steps."""
        ax = drawn(convergence(made([1.0], [LIMIT], [[NAN, NAN, 4, 2]])))
        np.testing.assert_array_equal(xy(ax.get_lines()[0])[1], [NAN, NAN, 8, 4])
        assert marks(ax) == [("limit of steps", ([3], [4]))]

    def test_many_lanes(self):
        """Each is faint."""
        many = convergence(made([0.0] * 300, rows=np.ones((300, 2))))
        alphas = [ax.get_lines()[0].get_alpha() for ax in (many, convergence(LANES))]
        assert 0.05 <= alphas[0] < 0.2
        assert alphas[1] > 0.8


class TestFinalLoss:
    def test_what_is_drawn(self):
        ax = drawn(final_loss(LANES, VALUES, label="centre"))
        # The line goes by a lane without a loss, which is at the upper edge.
        assert xy(ax.get_lines()[0]) == ([2, 4, 6], [2, 1, 1.5])
        assert marks(ax) == [
            (OK, ([4, 6], [1, 1.5])),
            ("limit of steps", ([2], [2])),
            ("stagnation, above", ([3], [1])),
            ("not finite, above or none", ([1], [1])),
            ("least: 1", ([4], [1])),
        ]
        assert forms(ax) == "ovsx*"
        edge = legend(ax)["not finite, above or none"]
        pixels = edge.get_transform().transform((1, 1))
        place = ax.transAxes.inverted().transform(pixels)
        np.testing.assert_allclose(place, [0.2 / 5.4, 1.0], atol=0.02)
        assert ax.get_ylim()[1] < 3
        assert words(ax) == ["Loss of 5 lanes", "centre", "loss"]
        assert scales(ax) == ("linear", "linear")
        assert final_loss(LANES, VALUES).get_xlabel() == "hyperparameter"

    def test_several_lanes_of_a_value(self):
        """There is no line through them."""
        ax = drawn(final_loss(made([2.0, 1.0, 3.0]), [0.1, 10.0, 0.1], log=True))
        assert len(ax.get_lines()) == 2
        assert marks(ax) == [
            (OK, ([0.1, 10, 0.1], [2, 1, 3])),
            ("least: 1", ([10], [1])),
        ]
        assert scales(ax) == ("log", "linear")

    @pytest.mark.parametrize(
        ("losses", "names", "want"),
        [
            ([5.0], [OK], [(OK, ([0], [5]))]),
            ([2.0**90] * 2, [OK, OK], [(OK, ([0, 1], [2.0**90] * 2))]),
            ([3.0, 1.0], [LIMIT] * 2, [("limit of steps", ([0, 1], [3, 1]))]),
            # Others that are hardly worse have a place of their own.
            (
                [0.0, 1.0, 2.0],
                [OK, LIMIT, LIMIT],
                [(OK, ([0], [0])), ("limit of steps", ([1, 2], [1, 2]))],
            ),
        ],
        ids=["one lane", "equal losses", "all failed", "one succeeded"],
    )
    def test_lanes_that_show_no_scale(self, losses: Any, names: Any, want: Any):
        ax = drawn(final_loss(made(losses, names), range(len(losses))))
        assert marks(ax)[:-1] == want
        assert marks(ax)[-1][0] == f"least: {min(losses):.6g}"


# A grid of 3 x 2, in an order of its own.
COLUMNS = np.array([2.0, 0.5, 1.0, 0.5, 2.0, 1.0])
ROWS = np.array([10.0, 10.0, 10.0, -5.0, -5.0, -5.0])
LOSSES = [6.0, 4.0, 5.0, 1.0, 3.0, 2.0]


def image_of(ax: Axes) -> Any:
    (image,) = ax.get_images()
    return image


def ticks(axis: Any) -> tuple[list[float], list[str]]:
    texts = [text.get_text() for text in axis.get_ticklabels()]
    return axis.get_ticklocs().tolist(), texts


class TestHeatMap:
    @pytest.mark.parametrize("log", [False, True])
    def test_what_is_drawn(self, log: bool):
        names = [OK, LIMIT, STAGNATION, OK, NONFINITE, LIMIT]
        solution = made(LOSSES, names)
        ax = drawn(heat_map(solution, COLUMNS, ROWS, labels=("a", "b"), log=log))
        image = image_of(ax)
        assert image.get_array().tolist() == [[1, 2, 3], [4, 5, 6]]
        assert image.origin == "lower"
        assert list(image.get_extent()) == [-0.5, 2.5, -0.5, 1.5]
        assert ticks(ax.xaxis) == ([0, 1, 2], ["0.5", "1", "2"])
        assert ticks(ax.yaxis) == ([0, 1], ["-5", "10"])
        assert marks(ax) == [
            ("limit of steps", ([0, 1], [1, 0])),
            ("stagnation", ([1], [1])),
            ("not finite", ([2], [0])),
            ("least: 1", ([0], [0])),
        ]
        assert forms(ax) == "vsx*"
        assert type(image.norm) is (LogNorm if log else Normalize)
        assert words(ax) == ["Loss of 6 lanes", "a", "b"]
        bar = colour_bar(ax)
        assert bar.get_ylabel() == "loss"
        assert scales(bar)[1] == ("log" if log else "linear")
        usual = ["first hyperparameter", "second hyperparameter"]
        assert words(heat_map(solution, COLUMNS, ROWS))[1:] == usual

    @pytest.mark.parametrize("none", [NAN, -np.inf])
    def test_cells(self, none: float):
        """The least of several lanes; white without a finite loss, or any lane."""
        solution = made([3.0, 1.0, none, 2.0], [OK, OK, NONFINITE, OK])
        ax = drawn(heat_map(solution, [1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 2.0]))
        cells = image_of(ax).get_array()
        masked = np.ma.getmaskarray(cells)
        assert masked.tolist() == [[False, True], [True, False]]
        assert cells.compressed().tolist() == [1, 2]
        assert marks(ax) == [("not finite", ([1], [0])), ("least: 1", ([0], [0]))]

    def test_colours_are_of_lanes_that_succeeded(self):
        """What is far above has the last colour, and the bar an arrow there."""
        for names, far in (([STAGNATION] + [OK] * 5, 1e9), ([LIMIT] * 6, 6.0)):
            solution = made([far, *LOSSES[1:]], names)
            image = image_of(drawn(heat_map(solution, COLUMNS, ROWS)))
            assert image.get_clim() == (1, min(far, 5 + (far == 6)))
            assert image.colorbar.extend == ("max" if far > 6 else "neither")

    def test_lanes_that_show_no_scale(self):
        """Cells that are equal, or hardly worse than the one that succeeded."""
        for losses, count in (([1.0] * 3, 1), ([1.0, 1.0 + 1e-6, 1.0 + 2e-6], 3)):
            solution = made(losses, [OK, LIMIT, LIMIT])
            image = image_of(drawn(heat_map(solution, range(3), [True] * 3, log=True)))
            colours = np.asarray(image.cmap(image.norm(image.get_array()))).tolist()
            assert len({tuple(x) for x in colours[0]}) == count

    def test_of_a_large_sweep(self):
        """Not all cells have room for their numbers."""
        x, y = (g.ravel() for g in np.meshgrid(np.arange(40.0), np.arange(25.0)))
        loss = lambda p, h: jnp.sum((p - h["x"]) ** 2) + h["x"] * h["y"] + 1  # noqa: E731
        ax = heat_map(sweep(loss, np.zeros(2), {"x": x, "y": y}, gtol=1e-6), x, y)
        want = (x * y + 1).reshape(25, 40)
        np.testing.assert_allclose(image_of(drawn(ax)).get_array(), want, rtol=1e-6)
        where, texts = ticks(ax.xaxis)
        assert (len(where), where[0], where[-1]) == (8, 0, 39)
        assert texts == [f"{place:.3g}" for place in where]


PICTURES: dict[str, Callable[..., Axes]] = {
    "convergence": convergence,
    "final_loss": final_loss,
    "heat_map": lambda solution, x, **kwargs: heat_map(solution, x, x, **kwargs),
}


@pytest.mark.parametrize("name", PICTURES)
def test_axes(name: str):
    """Those that are given, or of a new figure; nothing else is drawn on."""
    figure, (left, right) = plt.subplots(1, 2)
    assert PICTURES[name](LANES, VALUES, ax=left) is left
    assert left.has_data()
    assert plt.get_fignums() == [figure.number]
    assert PICTURES[name](LANES, VALUES).figure is not figure
    assert not right.has_data()


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: convergence(made([1.0])), "`solution` must be that of a sweep with `hist"),
    (
        lambda: convergence(LANES, of="x"),
        "`of` must be one of grad_norm, loss, got",
    ),
    (lambda: final_loss(made([NAN]), [1]), "`solution` must have a lane whose loss is"),
    (lambda: convergence(LANES, [NAN] * 5), "`values` must be finite, got [nan, nan"),
    (lambda: final_loss(made([1.0] * 2), [1, NAN]), "`values` must be finite, got [1"),
    (lambda: heat_map(made([1.0]), [1], 7), "`y` must be a number for each of the 1"),
    # What has no place on a logarithmic scale.
    (
        lambda: convergence(LANES, [0.0] * 5, log=True),
        "with `log`, `values` must be",
    ),
    (
        lambda: heat_map(made([0.0]), [1], [1], log=True),
        "with `log`, losses must be",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refused_by_name(call: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
    assert not plt.get_fignums()


def test_refused_types():
    with pytest.raises(TypeError, match=r"`solution` must be that of a sweep, got 3\."):
        convergence(3.5)
    with pytest.raises(TypeError, match=r"`values` must be numbers, got \['a'\]"):
        final_loss(made([1.0]), ["a"])


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.delitem(sys.modules, "jaxmf_opt.sweeps.plots")
    needs = "`jaxmf_opt.sweeps.plots` needs matplotlib: pip install 'jaxmf_opt[plot]'"
    with pytest.raises(ModuleNotFoundError, match=re.escape(needs)):
        import_module("jaxmf_opt.sweeps.plots")
