"""The main job, `python -m jaxmf_opt`, on tiny grids."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from jax_privacy.matrix_factorization import (
    buffered_toeplitz,
    dense,
    sensitivity,
    toeplitz,
)
from matplotlib.figure import Figure

from jaxmf_opt._files import locked
from jaxmf_opt.cli import plot
from jaxmf_opt.cli.job import Outcome, SetUp
from jaxmf_opt.cli.main import Line, arrays, main, table

pytestmark = pytest.mark.mixes  # upstream's code; whole jobs

# In three epochs of 7 steps, one in two steps, columns of 3 bands have rows in common.
STEPS, EPOCHS, MOMENTA, BANDS = (9, 7), (1, 3), (0.0, 0.9), (1, 3)
GRID = [
    ("banded-toeplitz", *set_up)
    for set_up in itertools.product(STEPS, EPOCHS, MOMENTA, BANDS)
]

# In another order than the families are known in.
FAMILIES = ("blt", "dense", "banded-inverse-toeplitz", "banded-toeplitz")
FAMILIES_GRID = [
    (family, n, epochs, 0.5, size)
    for n, epochs in itertools.product((12, 8), (1, 2))
    for family in FAMILIES
    for size in {"blt": [1], "dense": [n]}.get(family, [1, 3])
]
UNITS = {"blt": "buffers", "dense": "rows"}

ERRORS = ("error_independent", "error_before", "error_after")
PARTS = {
    "banded-toeplitz": ["strategy_coef"],
    "banded-inverse-toeplitz": ["noising_coef"],
    "blt": ["buf_decay", "inv_buf_decay", "inv_output_scale", "output_scale"],
    "dense": ["strategy_matrix"],
}
PNG = b"\x89PNG\r\n\x1a\n"


class Job(NamedTuple):
    """What a run of the job printed, wrote and drew."""

    out: str
    err: str
    arrays: dict[str, np.ndarray]
    directory: Path
    grid: list[tuple[str, int, int, float, int]]
    drawn: list[Line]


def run(
    capsys: pytest.CaptureFixture[str], directory: Path, arguments: Sequence[object]
) -> Job:
    main([*map(str, arguments), "--out", str(directory)])
    captured = capsys.readouterr()
    return _job(captured.out, captured.err, directory, [])


def _job(out: str, err: str, directory: Path, drawn: list[Line]) -> Job:
    with np.load(directory / "strategies.npz") as file:
        named = dict(file)
    columns = (named[name].tolist() for name in ("family", *SetUp._fields))
    return Job(out, err, named, directory, list(zip(*columns, strict=True)), drawn)


def paragraphs(job: Job) -> list[list[list[str]]]:
    """The table, split at blanks: its lines are those between head and legend."""
    lines = job.out.splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.split()[:2] == ["n", "epochs"])
    (foot,) = (i for i, line in enumerate(lines) if line.startswith("columns:"))
    by_blank = itertools.groupby(lines[head + 1 : foot], lambda line: line != "")
    return [[line.split() for line in group] for filled, group in by_blank if filled]


def rows(job: Job) -> list[list[str]]:
    return list(itertools.chain(*paragraphs(job)))


def mechanism(job: Job, i: int) -> dict[str, np.ndarray]:
    """What is saved of the mechanism of a line, without zeros at its end."""
    family, n, *_, size = job.grid[i]
    of_family = [line[0] for line in job.grid[:i]].count(family)
    length = n if family == "dense" else size
    parts = {name: job.arrays[f"{family}/{name}"][of_family] for name in PARTS[family]}
    return {name: x[(slice(length),) * x.ndim] for name, x in parts.items()}


def strategy_coef(family: str, parts: dict[str, np.ndarray], n: int) -> jax.Array:
    """The first column of the strategy of a saved mechanism, computed by upstream."""
    given = {name: jnp.array(x) for name, x in parts.items()}
    if family == "dense":
        return given["strategy_matrix"][:, 0]
    if family == "blt":
        blt = buffered_toeplitz.BufferedToeplitz.build(
            given["buf_decay"], given["output_scale"]
        )
        return blt.toeplitz_coefs(n)
    if family == "banded-inverse-toeplitz":
        return toeplitz.inverse_coef(given["noising_coef"], n)
    return given["strategy_coef"]


def above(coef: jax.Array) -> np.ndarray:
    """The smallest coefficients above the absolute values that do not increase."""
    return np.maximum.accumulate(np.abs(np.array(coef))[::-1])[::-1]


def error(
    family: str,
    parts: dict[str, np.ndarray],
    n: int,
    epochs: int,
    momentum: float,
    *,
    largest: bool = False,
) -> float:
    """The root of the squared error of a mechanism, computed by upstream.

    Its sensitivity is that of coefficients that do not increase, none of which is
    negative; it checks that. A strategy of ours that is not of that kind (some end a
    rounding below 0) has the sensitivity of the smallest above it.
    """
    with jax.enable_x64():
        workload = jnp.array(np.cumsum(momentum ** np.arange(n)))
        if family == "dense":
            matrix = jnp.array(parts["strategy_matrix"])
            squares = dense.per_query_error(
                strategy_matrix=matrix,
                workload_matrix=toeplitz.materialize_lower_triangular(workload),
            )
            squared = sensitivity.fixed_epoch_sensitivity(matrix, epochs) ** 2
        else:
            strategy = strategy_coef(family, parts, n)
            known: dict[str, Any] = {"strategy_coef": strategy}
            atol = 1e-9
            if family == "banded-inverse-toeplitz":
                known = {"noising_coef": jnp.array(parts["noising_coef"])}
                atol = 0.02
            np.testing.assert_allclose(strategy, above(strategy), rtol=0, atol=atol)
            strategy = jnp.array(above(strategy))
            squares = toeplitz.per_query_error(n=n, workload_coef=workload, **known)
            squared = toeplitz.minsep_sensitivity_squared(
                strategy, n // epochs, epochs, n=n
            )
        squares = jnp.max(squares) if largest else jnp.mean(squares)
        return float(jnp.sqrt(squares * squared))


def start(family: str, momentum: float, bands: int) -> dict[str, np.ndarray]:
    """The root of the workload, or its inverse, that a banded mechanism starts from.

    The workload's generating function is `1 / ((1 - x) (1 - momentum x))`.
    """
    with jax.enable_x64():
        (name,) = PARTS[family]
        optimal = {
            "strategy_coef": toeplitz.optimal_max_error_strategy_coefs,
            "noising_coef": toeplitz.optimal_max_error_noising_coefs,
        }[name]
        root = np.array(optimal(bands))
    return {name: np.convolve(root, root * momentum ** np.arange(bands))[:bands]}


class _Recorder:
    """A stream that keeps what is written. (`capsys` lives for one test only.)"""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def _recorded(directory: Path, arguments: dict[str, Sequence[object]]) -> Job:
    words = [(name, *map(str, values)) for name, values in arguments.items()]
    drawn: list[Line] = []
    draw = plot.plot_mechanisms

    def recording_plot(lines: Sequence[Line], path: Path) -> None:
        drawn.extend(lines)
        draw(lines, path)

    with pytest.MonkeyPatch.context() as patch:
        out, err = _Recorder(), _Recorder()
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setattr(plot, "plot_mechanisms", recording_plot)
        main([*itertools.chain(*words), "--out", str(directory)])
    return _job(out.text, err.text, directory, drawn)


# A program is compiled for each family, and for each set-up of dense matrices, in about
# 3 s each. So the grids run once.
@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of the family that is the default."""
    # A directory that is not there yet, nor is the one above it.
    directory = tmp_path_factory.mktemp("job") / "new" / "out"
    return _recorded(
        directory,
        {"--steps": STEPS, "--epochs": EPOCHS, "--momentum": MOMENTA, "--bands": BANDS},
    )


@pytest.fixture(scope="module")
def families_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of all families, in which some set-ups reach the limit of steps."""
    return _recorded(
        tmp_path_factory.mktemp("families"),
        {
            "--family": [*FAMILIES, FAMILIES[0]],  # once is enough
            "--steps": (12, 8),
            "--epochs": (1, 2),
            "--momentum": (0.5,),
            "--bands": (1, 3),
            "--buffers": (1,),
            "--max-optimizer-steps": (40,),
        },
    )


@pytest.fixture(params=["job", "families_job"])
def either_job(request: pytest.FixtureRequest) -> Job:
    return request.getfixturevalue(request.param)


def is_close_to_upstream(got: Sequence[float], want: Sequence[float]) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-12)


class TestOutput:
    def test_table(self, either_job: Job):
        job = either_job
        for i, (row, line) in enumerate(zip(rows(job), job.grid, strict=True)):
            family, n, epochs, momentum, size = line
            assert row[:2] == [str(n), str(epochs)]
            assert float(row[2]) == momentum
            assert row[3:6] == [family, str(size), UNITS.get(family, "bands")]
            assert int(row[6]) == (size if family == "blt" else size - 1)
            assert int(row[6]) == job.arrays["noise_kept"][i]
            assert int(row[7]) == job.arrays["optimizer_steps"][i]
            errors = [job.arrays[name][i] for name in ERRORS]
            np.testing.assert_allclose([float(x) for x in row[8:11]], errors, atol=6e-4)
            gain = 100 * (1 - errors[2] / errors[0])
            np.testing.assert_allclose(float(row[11].rstrip("%")), gain, atol=0.06)
            assert row[11].endswith("%")
            remarks = " ".join(row[12:]).removeprefix("*").strip()
            limited = not job.arrays["converged"][i]
            assert remarks == ("(not converged)" if limited else "")

    def test_paragraphs(self, either_job: Job):
        """One for each training, as they were asked for."""
        trainings = []
        for paragraph in paragraphs(either_job):
            (training,) = {tuple(row[:3]) for row in paragraph}
            trainings.append(training)
        assert len(set(trainings)) == len(trainings)
        want = dict.fromkeys(line[1:4] for line in either_job.grid)
        assert [(int(n), int(k), float(m)) for n, k, m in trainings] == list(want)

    def test_columns_are_aligned(self, either_job: Job):
        lines = either_job.out.splitlines()
        foot = lines.index(next(x for x in lines if x.startswith("columns:")))
        body = [line for line in lines[:foot] if line and ": " not in line]
        assert len(body) == 1 + len(either_job.grid)
        ends = {
            len(line.removesuffix("  (not converged)").rstrip(" *")) for line in body
        }
        assert len(ends) == 1

    def test_stars(self, either_job: Job):
        """At the smallest errors of each training."""
        after = iter(either_job.arrays["error_after"])
        for paragraph in paragraphs(either_job):
            errors = [next(after) for _ in paragraph]
            stars = [row[12:13] == ["*"] for row in paragraph]
            assert stars == [x == min(errors) for x in errors]
            assert any(stars)

    def test_equal_errors_have_stars(self, families_job: Job):
        (line, *_) = families_job.drawn
        text = table([line, line._replace()]).splitlines()
        assert [x.rstrip().endswith("*") for x in text] == [False, False, True, True]

    def test_a_mechanism_for_each_training_is_no_paragraph(self, job: Job):
        text = table([line for line in job.drawn if line.set_up.size == 3])
        assert len(text.splitlines()) == 1 + len(GRID) / 2
        assert "\n\n" not in text
        stars = [
            x.removesuffix("  (not converged)")[-2:] for x in text.splitlines()[1:]
        ]
        assert set(stars) == {" *"}

    def test_messages(self, job: Job):
        assert job.err == ""  # progress is for terminals
        assert job.out.startswith("banded-toeplitz: 16 set-ups in ")
        for name in ("strategies.npz", "strategies.png"):
            assert f"wrote {job.directory / name}\n" in job.out

    def test_messages_of_families(self, families_job: Job):
        assert families_job.err == ""
        messages = [x for x in families_job.out.splitlines() if " set-ups in " in x]
        assert families_job.out.splitlines()[: len(messages)] == messages
        assert all(x.endswith(" s") for x in messages)
        # Those with arrays of the same sizes together.
        assert [x.split(" in ")[0] for x in messages] == [
            "blt: 4 set-ups",
            *["dense: 2 set-ups"] * 2,
            "banded-inverse-toeplitz: 8 set-ups",
            "banded-toeplitz: 8 set-ups",
        ]

    def test_arrays(self, job: Job):
        shapes = _check_columns(job, GRID)
        assert shapes == {"banded-toeplitz/strategy_coef": (len(GRID), max(BANDS))}
        # More bands than the 2 steps of an epoch: the error has a kink at a third of 0.
        at_kink = [(n, k, bands) == (7, 3, 3) for _, n, k, _, bands in GRID]
        np.testing.assert_array_equal(job.arrays["converged"], np.logical_not(at_kink))

    def test_arrays_of_families(self, families_job: Job):
        shapes = _check_columns(families_job, FAMILIES_GRID)
        assert shapes == {
            "blt/buf_decay": (4, 1),
            "blt/output_scale": (4, 1),
            "blt/inv_buf_decay": (4, 1),
            "blt/inv_output_scale": (4, 1),
            "dense/strategy_matrix": (4, 12, 12),
            "banded-inverse-toeplitz/noising_coef": (8, 3),
            "banded-toeplitz/strategy_coef": (8, 3),
        }

    def test_coefficients(self, either_job: Job):
        for i, (family, *_, bands) in enumerate(either_job.grid):
            if family in ("blt", "dense"):
                continue
            ((name, coef),) = mechanism(either_job, i).items()
            assert coef.shape == (bands,)
            assert np.all(coef != 0)
            first = np.linalg.norm(coef) if name == "strategy_coef" else coef[0]
            np.testing.assert_allclose(first, 1, rtol=1e-14)

    def test_buffers(self, families_job: Job):
        with jax.enable_x64():
            for i, (family, *_) in enumerate(families_job.grid):
                if family != "blt":
                    continue
                parts = mechanism(families_job, i)
                blt, inverse = (
                    buffered_toeplitz.BufferedToeplitz.build(
                        parts[f"{prefix}buf_decay"], parts[f"{prefix}output_scale"]
                    )
                    for prefix in ("", "inv_")
                )
                want = blt.inverse()
                np.testing.assert_allclose(
                    [*inverse.buf_decay, *inverse.output_scale],
                    [*want.buf_decay, *want.output_scale],
                    rtol=1e-12,
                    atol=1e-14,  # decays can be almost 0
                )

    def test_matrices(self, families_job: Job):
        for i, (family, n, epochs, *_) in enumerate(families_job.grid):
            if family != "dense":
                continue
            (matrix,) = mechanism(families_job, i).values()
            assert matrix.shape == (n, n)
            assert np.all(matrix == np.tril(matrix))
            assert np.all(np.diag(matrix) > 0)
            with jax.enable_x64():
                got = sensitivity.fixed_epoch_sensitivity(jnp.array(matrix), epochs)
            np.testing.assert_allclose(got, 1, rtol=1e-12)

    def test_smaller_ones_are_filled_with_zeros(self, families_job: Job):
        """What is left of each array if the lines' own parts are taken away."""
        for family, names in PARTS.items():
            lines = [i for i, x in enumerate(families_job.grid) if x[0] == family]
            for name in names:
                filled = families_job.arrays[f"{family}/{name}"].copy()
                for row, i in zip(filled, lines, strict=True):
                    part = mechanism(families_job, i)[name]
                    assert np.any(part)
                    row[tuple(map(slice, part.shape))] = 0
                assert not np.any(filled)

    def test_fewer_buffers_are_filled_with_zeros(self):
        def line(buffers: int) -> Line:
            parts = {"buf_decay": np.full(buffers, 0.5)}
            outcome = Outcome(parts, 7, True, 3.0, 2.0, 1.0)
            return Line("blt", SetUp(9, 1, 0.0, buffers), buffers, outcome)

        named = arrays([line(1), line(3), line(2)])
        want = [[0.5, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]
        np.testing.assert_array_equal(named["blt/buf_decay"], want)
        assert named["noise_kept"].tolist() == [1, 3, 2]

    def test_errors_are_upstreams(self, either_job: Job):
        independent = {"strategy_coef": np.ones(1)}
        for i, (family, n, epochs, momentum, _) in enumerate(either_job.grid):
            is_close_to_upstream(
                [either_job.arrays[name][i] for name in (ERRORS[0], ERRORS[2])],
                [
                    error("banded-toeplitz", independent, n, epochs, momentum),
                    error(family, mechanism(either_job, i), n, epochs, momentum),
                ],
            )

    def test_errors_of_starting_points(self, either_job: Job):
        for i, (family, n, epochs, momentum, bands) in enumerate(either_job.grid):
            if family in ("blt", "dense"):
                continue
            parts = start(family, momentum, bands)
            want = error(family, parts, n, epochs, momentum)
            is_close_to_upstream([either_job.arrays["error_before"][i]], [want])

    def test_errors_go_down(self, either_job: Job):
        independent, before, after = (either_job.arrays[name] for name in ERRORS)
        wide = either_job.arrays["noise_kept"] > 0
        assert np.all(after[wide] < before[wide])
        assert np.all(before[wide] < independent[wide])
        np.testing.assert_allclose(after[~wide], independent[~wide], rtol=1e-14)

    def test_any_matrix_is_best_for_one_epoch(self, families_job: Job):
        for paragraph in paragraphs(families_job):
            if paragraph[0][1] == "1":
                (best,) = (row[3] for row in paragraph if "*" in row)
                assert best == "dense"

    def test_picture(self, either_job: Job):
        check_picture(either_job.directory / "strategies.png")
        assert [(x.family, *x.set_up) for x in either_job.drawn] == either_job.grid


def _check_columns(job: Job, grid: list[Any]) -> dict[str, tuple[int, ...]]:
    """Looks at the columns of the table, and gives the shapes of the mechanisms."""
    columns = {
        "family",
        *("n", "epochs", "momentum", "size"),
        *("noise_kept", "optimizer_steps", "converged"),
        *ERRORS,
    }
    shapes = {name: x.shape for name, x in job.arrays.items()}
    assert {name for name in shapes if "/" not in name} == columns
    for name in columns:
        assert shapes.pop(name) == (len(grid),)
    assert job.grid == grid
    for name in (*shapes, "momentum", *ERRORS):
        assert job.arrays[name].dtype == np.float64
    for name in ("n", "epochs", "size", "noise_kept", "optimizer_steps"):
        assert np.issubdtype(job.arrays[name].dtype, np.integer)
    assert job.arrays["family"].dtype.kind == "U"
    assert job.arrays["converged"].dtype == bool
    return shapes


def check_picture(path: Path) -> None:
    data = path.read_bytes()
    assert data.startswith(PNG)
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width > 500 and height > 300
    assert data.endswith(b"IEND\xaeB`\x82")


class TestPicture:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_each_family(
        self,
        family: str,
        families_job: Job,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """The gains, and the best strategy of each training, computed by upstream."""
        lines = [line for line in families_job.drawn if line.family == family]
        figures: list[Figure] = []
        monkeypatch.setattr(plt, "close", figures.append)
        plot.plot_mechanisms(lines, tmp_path / "picture.png")
        monkeypatch.undo()
        check_picture(tmp_path / "picture.png")
        (figure,) = figures
        gains, coefs = figure.axes
        plt.close(figure)
        assert not plt.get_fignums()
        drawn = np.concatenate([np.array(x.get_ydata()) for x in gains.get_lines()])
        want = [100 * line.gain for line in lines]
        np.testing.assert_allclose(np.sort(drawn), np.sort(want))
        curves = [np.array(x.get_ydata()) for x in coefs.get_lines()]
        trainings = itertools.groupby(lines, lambda line: line.training)
        for curve, (training, group) in zip(curves, trainings, strict=True):
            best = min(group, key=lambda line: float(line.outcome.error_after))
            parts = dict(best.outcome.mechanism)
            if family.startswith("banded"):
                parts = {k: x[: best.set_up.size] for k, x in parts.items()}
            with jax.enable_x64():
                coef = np.array(strategy_coef(family, parts, training[0]))
            np.testing.assert_allclose(curve, coef / coef[0], rtol=1e-12)

    @pytest.mark.parametrize("sizes", [[1], [3]])
    def test_a_single_mechanism(self, sizes: list[int], job: Job, tmp_path: Path):
        lines = [line for line in job.drawn if line.set_up.size in sizes][:1]
        plot.plot_mechanisms(lines, tmp_path / "picture.png")
        check_picture(tmp_path / "picture.png")


class TestOptions:
    @pytest.mark.parametrize("limit", [0, 1])
    def test_limit_of_steps(
        self, limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        arguments = ("--steps", 9, "--bands", 3, "--max-optimizer-steps", limit)
        job = run(capsys, tmp_path, arguments)
        assert len(rows(job)) == 2  # the default momenta
        for row in rows(job):
            assert int(row[7]) == limit
            assert " ".join(row[12:]) == "* (not converged)"
        assert not job.arrays["converged"].any()
        unmoved = job.arrays["error_after"] == job.arrays["error_before"]
        assert np.all(unmoved == (limit == 0))

    @pytest.mark.parametrize("family", ["dense", "banded-toeplitz"])
    def test_largest_error(
        self, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        arguments = ("--family", family, "--error", "max", "--steps", 8, "--epochs", 2)
        options = ("--momentum", 0.5, "--bands", 3, "--max-optimizer-steps", 3)
        job = run(capsys, tmp_path, (*arguments, *options))
        size = 8 if family == "dense" else 3
        assert job.grid == [(family, 8, 2, 0.5, size)]
        independent = {"strategy_coef": np.ones(1)}
        want = [
            error("banded-toeplitz", independent, 8, 2, 0.5, largest=True),
            error(family, mechanism(job, 0), 8, 2, 0.5, largest=True),
        ]
        first, before, after = (job.arrays[name].item() for name in ERRORS)
        is_close_to_upstream([first, after], want)
        assert after < before < first

    def test_without_matplotlib(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.delitem(sys.modules, "jaxmf_opt.cli.plot", raising=False)
        arguments = ("--steps", 4, "--bands", 2, "--max-optimizer-steps", 1)
        job = run(capsys, tmp_path, arguments)
        *_, before_last, last = job.out.splitlines()
        assert before_last == f"wrote {tmp_path / 'strategies.npz'}"
        assert "matplotlib" in last
        assert "pip install 'jaxmf_opt[plot]'" in last
        assert job.err == ""
        assert "error_after" in job.arrays
        assert not (tmp_path / "strategies.png").exists()


class _Reached(Exception):  # noqa: N818
    """Arguments were accepted."""


def _product(*members: Sequence[float]) -> list[SetUp]:
    return [SetUp(*x) for x in itertools.product(*members)]


# Arguments, and the set-ups of the first family.
ACCEPTED: dict[str, tuple[list[str], list[SetUp]]] = {
    "defaults": ([], _product([500, 2000, 8000], [1], [0, 0.9], [4, 16, 64])),
    "defaults of a blt": (
        ["--family", "blt"],
        _product([500, 2000, 8000], [1], [0, 0.9], [2, 4]),
    ),
    "defaults with dense": (
        ["--family", "blt", "dense"],
        _product([64, 256], [1], [0, 0.9], [2, 4]),
    ),
    "as many bands as steps": (
        ["--steps", "3", "4", "--bands", "3", "1", "--momentum", "0.5"],
        _product([3, 4], [1], [0.5], [3, 1]),
    ),
    "bands that nobody uses": (
        ["--family", "blt", "--steps", "3", "--bands", "8", "--buffers", "15"],
        _product([3], [1], [0, 0.9], [15]),
    ),
    "bands that dense does not use": (
        ["--family", "dense", "--steps", "8", "--momentum", "0"],
        _product([8], [1], [0], [8]),
    ),
    "as many epochs as steps": (
        ["--family", "dense", "--steps", "8", "4", "--epochs", "4", "--momentum", "0"],
        [SetUp(8, 4, 0, 8), SetUp(4, 4, 0, 4)],
    ),
    "epochs of unequal steps": (
        ["--steps", "7", "--epochs", "2", "3", "--momentum", "0", "--bands", "2"],
        _product([7], [2, 3], [0], [2]),
    ),
    "the largest matrix": (
        ["--family", "dense", "--steps", "1024", "--momentum", "0"],
        [SetUp(1024, 1, 0, 1024)],
    ),
    "many steps": (
        ["--family", "blt", "--steps", "1025", "--momentum", "0", "--buffers", "1"],
        [SetUp(1025, 1, 0, 1)],
    ),
}


class TestAcceptedArguments:
    @pytest.mark.parametrize("case", ACCEPTED)
    def test_set_ups(self, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def stop(
            family: object, setups: Sequence[SetUp], _: Path, **options: object
        ) -> None:
            assert options == {
                "max_error": False,
                "rtol": 1e-6,
                "max_optimizer_steps": 500,
                "progress": False,
            }
            raise _Reached(setups)

        argv, want = ACCEPTED[case]
        monkeypatch.setattr("jaxmf_opt.cli.main.run", stop)
        with pytest.raises(_Reached) as reached:
            main(["--out", str(tmp_path), *argv])
        assert reached.value.args == (want,)


BANDED = ["--family", "blt", "banded-inverse-toeplitz"]
DENSE = ["--family", "banded-toeplitz", "dense", "--bands", "2"]
BAD_ARGUMENTS = {
    "unknown family": (["--family", "blt", "sparse"], "--family", "'sparse'"),
    "no family": (["--family"], "--family", "at least one"),
    "bands larger than steps": (["--steps", "9", "4", "--bands", "8"], "--bands", "8"),
    "bands of any family": ([*BANDED, "--steps", "9", "4"], "--bands", "64", "4"),
    "default bands, few steps": (["--steps", "5"], "--bands", "64"),
    "bands, default steps": (["--bands", "501"], "--bands", "501", "500"),
    "bands, steps with dense": ([*DENSE, "65"], "--bands", "65", "64"),
    "epochs more than steps": (
        ["--steps", "12", "8", "--epochs", "1", "9", "--bands", "2"],
        *("--epochs", "9", "8"),
    ),
    "epochs more than steps, blt": (
        ["--family", "blt", "--steps", "8", "--epochs", "9"],
        *("--epochs", "9", "8"),
    ),
    "epochs of unequal steps": (
        [*DENSE, "--steps", "12", "8", "--epochs", "1", "3"],
        *("--epochs", "3", "8"),
    ),
    "epochs, default steps": ([*DENSE, "--epochs", "3"], "--epochs", "3", "64"),
    "large matrix": ([*DENSE, "--steps", "8", "1025"], "--steps", "1025", "1024"),
    "0 epochs": (["--epochs", "0"], "--epochs", "'0'"),
    "half an epoch": (["--epochs", "1", "0.5"], "--epochs", "'0.5'"),
    "no epochs": (["--epochs"], "--epochs", "at least one"),
    "0 buffers": (["--buffers", "0"], "--buffers", "'0'"),
    "16 buffers": (["--buffers", "2", "16"], "--buffers", "'16'", "below 16"),
    "buffers in words": (["--buffers", "few"], "--buffers", "'few'"),
    "unknown error": (["--error", "median"], "--error", "'median'"),
    "no error": (["--error"], "--error", "expected one argument"),
    "momentum 1": (["--momentum", "0", "1"], "--momentum", "'1'"),
    "momentum nan": (["--momentum", "nan"], "--momentum", "'nan'"),
    "negative momentum": (["--momentum", "-0.5"], "--momentum", "'-0.5'"),
    "no steps": (["--steps"], "--steps", "at least one"),
    "0 steps": (["--steps", "0"], "--steps", "'0'"),
    "negative steps": (["--steps", "-3"], "--steps", "'-3'"),
    "half a step": (["--steps", "2.5"], "--steps", "'2.5'"),
    "steps in words": (["--steps", "many"], "--steps", "'many'"),
    "0 bands": (["--bands", "0"], "--bands", "'0'"),
    "bands in words": (["--bands", "4", "x"], "--bands", "'x'"),
    "negative limit": (["--max-optimizer-steps", "-1"], "--max-optimizer-steps", "-1"),
    "no number": (["--max-optimizer-steps", "1e2"], "--max-optimizer-steps", "1e2"),
    "negative rtol": (["--rtol", "-1"], "--rtol", "'-1'"),
    "infinite rtol": (["--rtol", "inf"], "--rtol", "'inf'"),
    "rtol in words": (["--rtol", "tiny"], "--rtol", "'tiny'"),
    "unknown option": (["--stepz", "4"], "--stepz", "unrecognized"),
    "no option": (["4"], "4", "unrecognized"),
    "empty": (["--momentum", ""], "--momentum", "''"),
}


def check_refusal(code: int | str | None, out: str, err: str, *words: str) -> None:
    assert code == 2
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


class TestBadArguments:
    @pytest.mark.parametrize("case", BAD_ARGUMENTS)
    def test_one_line_that_names_it(
        self, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        argv, *words = BAD_ARGUMENTS[case]
        directory = tmp_path / "out"
        with pytest.raises(SystemExit) as exit_:
            main(["--out", str(directory), *argv])
        out, err = capsys.readouterr()
        check_refusal(exit_.value.code, out, err, *words)
        assert not directory.exists()

    @pytest.mark.parametrize("below", ["", "below", "far/below"])
    def test_a_directory_that_cannot_be_written(
        self, below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        """Nothing can be made below a regular file, not even by root."""
        file = tmp_path / "file"
        file.write_text("kept")
        with pytest.raises(SystemExit) as exit_:
            main(["--steps", "4", "--bands", "2", "--out", str(file / below)])
        out, err = capsys.readouterr()
        check_refusal(exit_.value.code, out, err, "--out", str(file / below))
        assert file.read_text() == "kept"

    @pytest.mark.parametrize("name", ["strategies.npz", "strategies.png"])
    def test_results_that_cannot_be_overwritten(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        (tmp_path / name / "below").mkdir(parents=True)
        with pytest.raises(SystemExit) as exit_:
            main(["--steps", "4", "--bands", "2", "--out", str(tmp_path)])
        out, err = capsys.readouterr()
        check_refusal(exit_.value.code, out, err, "--out", str(tmp_path))


RESUMED = ("--steps", 8, 12, "--momentum", 0.5, "--bands", 1, 3)
UNFINISHED = "jaxmf_opt-unfinished"


def _files(directory: Path) -> dict[Path, bytes]:
    """What is in the files below a directory."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _interrupt(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> str:
    """Ctrl-C once all is solved, and before anything is written; what is said."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr("jaxmf_opt.cli.main._write", stop)
        main([*map(str, arguments), "--out", str(directory)])
    assert exit_.value.code == 130
    (job,) = (directory / UNFINISHED).iterdir()
    return job.name


class TestUnfinished:
    def test_leaves_what_is_not_its_own(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        """Whatever there is beside the results, finished or not."""
        for name in ("finished/of a user", f"{UNFINISHED}/notes", "a/b/sweep.npz"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("mine")
        before = _files(tmp_path)
        job = run(capsys, tmp_path, RESUMED)
        after = _files(tmp_path)
        results = [tmp_path / f"strategies.{kind}" for kind in ("npz", "png")]
        assert {path: after.pop(path)[:2] for path in results} == {
            results[0]: b"PK",
            results[1]: PNG[:2],
        }
        assert after == before
        assert [path.name for path in (tmp_path / UNFINISHED).iterdir()] == ["notes"]
        assert job.err == ""

    def test_nothing_is_left(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        umask = os.umask(0o027)
        try:
            run(capsys, tmp_path / "out", RESUMED)
        finally:
            os.umask(umask)
        results = sorted((tmp_path / "out").iterdir())
        assert [path.name for path in results] == ["strategies.npz", "strategies.png"]
        assert {oct(path.stat().st_mode & 0o777) for path in results} == {"0o640"}

    def test_goes_on_by_itself(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ):
        """And lets no other job do so, nor take it away."""
        whole = run(capsys, tmp_path / "whole", RESUMED)
        out = tmp_path / "out"
        _interrupt(out, monkeypatch, *RESUMED)
        assert "the same command goes on" in capsys.readouterr().err
        kept = _files(out)
        names = [path.name for path in kept]
        assert sorted(names) == ["000000.npz", "sweep.npz"]
        other = run(capsys, out, (*RESUMED, "--max-optimizer-steps", 1))
        assert other.arrays["optimizer_steps"].max() == 1
        assert kept.items() <= _files(out).items()

        def none_is_solved(*_: Any) -> Any:
            raise AssertionError("a batch is solved again")

        with monkeypatch.context() as patch:
            patch.setattr("jaxmf_opt.sweeps._runner.BatchRunner._solve", none_is_solved)
            _same_arrays(whole, run(capsys, out, RESUMED))
        assert not (out / UNFINISHED).exists()

    def test_two_at_a_time(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ):
        """The second of two that are the same is refused."""
        _interrupt(tmp_path, monkeypatch, *RESUMED)
        capsys.readouterr()
        (unfinished,) = (tmp_path / UNFINISHED).iterdir()
        with locked(unfinished), pytest.raises(SystemExit) as exit_:
            main([*map(str, RESUMED), "--out", str(tmp_path)])
        out, err = capsys.readouterr()
        check_refusal(exit_.value.code, out, err, "--out", "same job", str(tmp_path))

    def test_damaged(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ):
        _interrupt(tmp_path, monkeypatch, *RESUMED)
        capsys.readouterr()
        (path,) = tmp_path.rglob("sweep.npz")
        path.write_bytes(b"")
        with pytest.raises(SystemExit) as exit_:
            main([*map(str, RESUMED), "--out", str(tmp_path)])
        out, err = capsys.readouterr()
        check_refusal(exit_.value.code, out, err, "--out", str(path.parent), "damaged")

    @pytest.mark.parametrize("name", [UNFINISHED, f"{UNFINISHED}/job"])
    def test_cannot_be_written(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jaxmf_opt.cli.main._digest", lambda _: "job")
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("in the way")
            with pytest.raises(SystemExit) as exit_:
                main([*map(str, RESUMED), "--out", str(tmp_path)])
        out, err = capsys.readouterr()
        check_refusal(exit_.value.code, out, err, "--out", str(tmp_path / name))
        assert (tmp_path / name).read_text() == "in the way"
        assert not (tmp_path / "strategies.npz").exists()

    def test_killed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        """A run that is killed between two families goes on with the second."""
        arguments = ("--family", "banded-toeplitz", "blt", *RESUMED, "--buffers", 1)
        whole = run(capsys, tmp_path / "whole", arguments)
        out = tmp_path / "killed"
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxmf_opt", *map(str, arguments), "--out", out],
            stdout=subprocess.DEVNULL,
            env=_ENVIRONMENT,
        )
        limit = time.monotonic() + 60
        while time.monotonic() < limit and not any(out.rglob("000000.npz")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (out / "strategies.npz").exists()
        (first,) = out.rglob("000000.npz")
        assert first.parent.parent.name == "banded-toeplitz"
        _same_arrays(whole, run(capsys, out, arguments))
        assert not (out / UNFINISHED).exists()


def _same_arrays(one: Job, other: Job) -> None:
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name], err_msg=name)


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 0
    assert err == ""
    assert out.startswith("usage: python -m jaxmf_opt ")
    options = (
        "family steps epochs momentum bands buffers error max-optimizer-steps rtol"
    )
    for word in (*options.split(), "out"):
        assert f"\n  --{word} " in out
    for family in FAMILIES:
        assert f"\n  {family} " in out


class TestAsAProcess:
    def test_help(self):
        done = _process("--help")
        assert done.returncode == 0
        assert done.stderr == ""
        assert done.stdout.startswith("usage: python -m jaxmf_opt ")

    def test_bad_argument(self):
        done = _process("--momentum", "1.5")
        words = ("python -m jaxmf_opt: ", "--momentum", "'1.5'")
        check_refusal(done.returncode, done.stdout, done.stderr, *words)


# JAX need not look for accelerators, nor talk about it.
_ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
}


def _process(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jaxmf_opt", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env=_ENVIRONMENT,
    )
