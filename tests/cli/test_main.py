"""The main job, `python -m jaxmf_opt`, on tiny grids."""

import contextlib
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from jax_privacy.matrix_factorization import buffered_toeplitz, dense, toeplitz
from jax_privacy.matrix_factorization.sensitivity import fixed_epoch_sensitivity
from matplotlib.figure import Figure
from numpy.testing import assert_allclose, assert_array_equal

from jaxmf_opt._files import locked
from jaxmf_opt.cli import plot
from jaxmf_opt.cli.families import SetUp
from jaxmf_opt.cli.main import Line, main, table

pytestmark = pytest.mark.mixes  # upstream's code; whole jobs

# In another order than the families are known in.
FAMILIES = ("dense", "blt", "banded-toeplitz")
TRAININGS = list(itertools.product((12,), (1, 2), (0.5,)))
GRID = [
    (family, *training, size)
    for training in TRAININGS
    for family in FAMILIES
    for size in {"blt": [1, 2], "dense": [training[0]]}.get(family, [1, 3])
]
ERRORS = ("error_independent", "error_before", "error_after")
UNFINISHED = "jaxmf_opt-unfinished"


class Job(NamedTuple):
    """What a run of the job printed, wrote and drew."""

    out: str
    err: str
    arrays: dict[str, np.ndarray]
    grid: list[tuple[Any, ...]]
    drawn: list[Line]


def run(directory: Path, argv: str) -> Job:
    drawn: list[Line] = []
    draw = plot.plot_mechanisms

    def recording_plot(lines: Sequence[Line], path: Path) -> None:
        drawn.extend(lines)
        draw(lines, path)

    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.MonkeyPatch.context() as patch,
        # Fixtures of a module come before the marker that sets these.
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.setattr(plot, "plot_mechanisms", recording_plot)
        main([*argv.split(), "--out", str(directory)])
    with np.load(directory / "strategies.npz") as file:
        named = dict(file)
    columns = (named[name].tolist() for name in ("family", *SetUp._fields))
    grid = list(zip(*columns, strict=True))
    return Job(out.getvalue(), err.getvalue(), named, grid, drawn)


def ended(code: int, argv: str, out: Path) -> tuple[str, str]:
    """What a job prints that ends with a code, on both streams."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        pytest.raises(SystemExit) as exit_,
    ):
        main(["--out", str(out), *argv.split()])
    assert exit_.value.code == code
    return stdout.getvalue(), stderr.getvalue()


def refused(argv: str, out: Path) -> str:
    """The one line on standard error of a job whose arguments are bad."""
    stdout, stderr = ended(2, argv, out)
    assert stdout == ""
    (line,) = stderr.splitlines()
    return line


def process(argv: str) -> subprocess.Popen[str]:
    """A process that need not look for accelerators, and may mix types and ranks."""
    mixing = {"DTYPE_PROMOTION": "standard", "RANK_PROMOTION": "allow"}
    settings = {f"JAX_NUMPY_{name}": value for name, value in mixing.items()}
    return subprocess.Popen(
        [sys.executable, "-m", "jaxmf_opt", *argv.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **settings},
    )


def mechanism(job: Job, i: int) -> dict[str, np.ndarray]:
    """What is saved of the mechanism of a line, without zeros at its end."""
    family, *_, size = job.grid[i]
    row = [line[0] for line in job.grid[:i]].count(family)
    parts = {k.split("/")[1]: x[row] for k, x in job.arrays.items() if family in k}
    if family == "blt":  # of which there may be fewer than were asked for
        size = np.count_nonzero(parts["output_scale"])
    return {name: x[(slice(size),) * x.ndim] for name, x in parts.items()}


def strategy(family: str, parts: dict[str, np.ndarray], n: int) -> jax.Array:
    """The matrix of a saved mechanism, computed by upstream."""
    given = {name: jnp.array(x) for name, x in parts.items()}
    if family == "dense":
        return given["strategy_matrix"]
    if family == "blt":
        coef, inverse = (
            buffered_toeplitz.BufferedToeplitz.build(
                given[f"{prefix}buf_decay"], given[f"{prefix}output_scale"]
            ).toeplitz_coefs(n)
            for prefix in ("", "inv_")
        )
        assert_allclose(toeplitz.inverse_coef(inverse, n), coef, rtol=1e-12)
    elif family == "banded-inverse-toeplitz":
        coef = toeplitz.inverse_coef(given["noising_coef"], n)
    else:
        coef = given["strategy_coef"]
    return toeplitz.materialize_lower_triangular(jnp.pad(coef, (0, n - coef.size)))


@jax.enable_x64()
def error(
    family: str,
    parts: dict[str, np.ndarray],
    n: int,
    epochs: int,
    momentum: float,
    reduce: Callable[[Any], Any] = np.mean,
) -> float:
    """The root of the squared error of a mechanism, computed by upstream.

    The sensitivity of a Toeplitz strategy is that of its absolute values.
    """
    matrix = strategy(family, parts, n)
    workload = jnp.array(np.cumsum(momentum ** np.arange(n)))
    squares = dense.per_query_error(
        strategy_matrix=matrix,
        workload_matrix=toeplitz.materialize_lower_triangular(workload),
    )
    if family != "dense":
        matrix = jnp.abs(matrix)
    return float(reduce(squares)) ** 0.5 * fixed_epoch_sensitivity(matrix, epochs)


INDEPENDENT = {"strategy_coef": np.ones(1)}


# A program is compiled for each family, and for each size of dense matrices, in about
# 3 s each. So the grid runs once.
@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of all families, in which some set-ups reach the limit of steps."""
    return run(
        # A directory that is not there yet, nor is the one above it.
        tmp_path_factory.mktemp("job") / "new" / "out",
        # Once is enough of a family.
        f"--family {' '.join(FAMILIES)} {FAMILIES[0]} --steps 12 --epochs 1 2 "
        "--momentum 0.5 --bands 1 3 --buffers 1 2 --max-optimizer-steps 40",
    )


RESUMED = "--steps 8 --epochs 2 --momentum 0.5 --bands 3 --error max"
BOTH = f"--family banded-toeplitz banded-inverse-toeplitz {RESUMED}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of two families that nothing interrupts."""
    return run(tmp_path_factory.mktemp("whole"), BOTH)


class TestTable:
    def test_shows_the_arrays(self, job: Job):
        """In a paragraph for each training, with a star at the smallest error."""
        text = table(job.drawn)
        assert f"{text}\ncolumns: " in job.out
        assert job.grid == GRID
        lines = iter(range(len(GRID)))
        for training, paragraph in zip(TRAININGS, text.split("\n\n")[1:], strict=True):
            rows = [line.split() for line in paragraph.splitlines()]
            of_training = list(itertools.islice(lines, len(rows)))
            least = min(job.arrays["error_after"][of_training])
            for row, i in zip(rows, of_training, strict=True):
                family, *_, size = job.grid[i]
                units = {"blt": "buffers", "dense": "rows"}.get(family, "bands")
                assert row[:6] == [*map(str, training), family, str(size), units]
                parts = mechanism(job, i)
                kept = parts["buf_decay"].size if family == "blt" else size - 1
                assert int(row[6]) == kept == job.arrays["noise_kept"][i]
                assert int(row[7]) == job.arrays["optimizer_steps"][i]
                errors = [job.arrays[name][i] for name in ERRORS]
                shown = [float(x.rstrip("%")) for x in row[8:12]]
                assert_allclose(shown[:3], errors, atol=6e-4)
                gain = 100 * (1 - errors[2] / errors[0])
                assert_allclose(shown[3], gain, atol=0.06)
                remarks = ["*"] if errors[2] == least else []
                remarks += [] if job.arrays["converged"][i] else ["(not", "converged)"]
                assert row[12:] == remarks

    def test_of_few_mechanisms(self, job: Job):
        """Single ones for a training are no paragraph; equal errors have stars."""
        text = table([line for line in job.drawn if line.family == "dense"])
        assert len(text.splitlines()) == 1 + text.count(" *") == 1 + 2
        assert table(job.drawn[:1] * 2).count(" *") == 2

    def test_messages_about_it(self, job: Job):
        """Sweeps have those set-ups together whose arrays have the same sizes."""
        assert job.err == ""  # progress is for terminals
        sweeps = job.out.splitlines()[:4]
        assert [x.split(" in ")[0] for x in sweeps] == [
            "dense: 2 set-ups",
            *["blt: 2 set-ups"] * 2,
            "banded-toeplitz: 4 set-ups",
        ]
        for name in ("strategies.npz", "strategies.png"):
            assert f"{name}\n" in job.out.split("\nwrote ", 1)[1]


class TestArrays:
    def test_mechanisms_have_a_scale_and_zeros_at_the_end(self, job: Job, whole: Job):
        assert not np.any(job.arrays["banded-toeplitz/strategy_coef"][::2, 1:])
        norms = np.linalg.norm(job.arrays["banded-toeplitz/strategy_coef"], axis=1)
        assert_allclose(norms, 1, rtol=1e-14)
        first = whole.arrays["banded-inverse-toeplitz/noising_coef"][:, 0]
        assert_allclose(first, 1, rtol=1e-14)

    def test_errors_are_upstreams(self, job: Job, whole: Job):
        """Both mean and largest; and go down."""
        for of, reduce in ((job, np.mean), (whole, np.max)):
            for i, (family, *training, size) in enumerate(of.grid):
                of_dp_sgd, before, after = (of.arrays[name][i] for name in ERRORS)
                want = [
                    error("banded-toeplitz", INDEPENDENT, *training, reduce=reduce),
                    error(family, mechanism(of, i), *training, reduce=reduce),
                ]
                assert_allclose([of_dp_sgd, after], want, rtol=1e-12)
                if size > 1 or family == "blt":
                    assert after < before < of_dp_sgd

    def test_a_buffer_more_is_of_use_or_dropped(self, job: Job):
        column = job.arrays
        for i in np.flatnonzero((column["family"] == "blt") & (column["size"] == 1)):
            one, two = column["error_after"][[i, i + 1]]
            kept = column["noise_kept"][i + 1]
            assert (kept == 2 and two < one) or (kept == 1 and two == one)
        assert set(column["noise_kept"][column["size"] == 2]) == {1, 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_picture(family: str, job: Job, tmp_path: Path):
    """The gains for a training, and the best strategy, computed by upstream."""
    lines = [line for line in job.drawn[: len(GRID) // 2] if line.family == family]
    figures: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "close", figures.append)
        plot.plot_mechanisms(lines, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    gains, strategies = figures[0].axes
    drawn = np.concatenate([np.array(x.get_ydata()) for x in gains.get_lines()])
    assert_allclose(drawn, [100 * line.gain for line in lines])
    (curve,) = strategies.get_lines()
    last = job.grid.index((family, *lines[-1].set_up))  # which has the most bands
    with jax.enable_x64():
        coef = np.array(strategy(family, mechanism(job, last), 12))[:, 0]
    got = np.asarray(curve.get_ydata())
    assert_allclose(got, coef[: got.size] / coef[0], rtol=1e-12)


def test_without_steps_and_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "jaxmf_opt.cli.plot", raising=False)
    job = run(tmp_path, "--steps 9 --bands 3 --max-optimizer-steps 0")
    assert job.arrays["momentum"].tolist() == [0.0, 0.9]  # the default
    assert job.out.count(" *  (not converged)") == 2
    assert np.all(job.arrays["error_after"] == job.arrays["error_before"])
    *_, before_last, last = job.out.splitlines()
    assert before_last == f"wrote {tmp_path / 'strategies.npz'}"
    assert "matplotlib" in last and "pip install 'jaxmf_opt[plot]'" in last
    assert not (tmp_path / "strategies.png").exists()


def test_matrices_of_the_least_largest_error(tmp_path: Path):
    """As `minimax` finds them, though some take fewer rounds than others."""
    argv = "--family dense --steps 8 --epochs 1 2 --momentum 0.5 --error max"
    job = run(tmp_path, argv)
    assert job.grid == [("dense", 8, epochs, 0.5, 8) for epochs in (1, 2)]
    assert "not converged" not in job.out
    for i, (_, n, epochs, momentum, _) in enumerate(job.grid):
        found = error("dense", mechanism(job, i), n, epochs, momentum, np.max)
        assert_allclose(job.arrays["error_after"][i], found, rtol=1e-9)
    # The squares, from `minimax` with rtol=1e-9.
    assert_allclose(job.arrays["error_after"] ** 2, [5.436434335, 15.18938421], 2e-6)


# Arguments, and the set-ups of the first family: the product of these members.
ACCEPTED: dict[str, list[list[float]]] = {
    "": [[500, 2000, 8000], [1], [0, 0.9], [4, 16, 64]],
    "--family blt dense": [[64, 256], [1], [0, 0.9], [2, 4]],
    "--steps 3 4 --bands 3 1 --epochs 2 3": [[3, 4], [2, 3], [0, 0.9], [3, 1]],
    # More bands than steps, but no family has any.
    "--family blt --steps 9 --bands 99 --buffers 15": [[9], [1], [0, 0.9], [15]],
    "--family dense --steps 1024 --rtol 0 --error max": [[1024], [1], [0, 0.9], [1024]],
}


@pytest.mark.parametrize("argv", ACCEPTED)
def test_what_is_run(argv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []

    def stop(_: object, setups: list[SetUp], __: Path, **options: object) -> None:
        seen.extend([setups, options])
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxmf_opt.cli.main.run", stop)
    ended(130, argv, tmp_path)
    setups, options = seen
    assert setups == list(itertools.product(*ACCEPTED[argv]))
    given = {"rtol": 0.0 if "--rtol" in argv else 1e-6, "max_error": "max" in argv}
    assert options == {"max_optimizer_steps": 500, "progress": False, **given}


# Arguments, and what the message says.
BAD_ARGUMENTS: dict[str, str] = {
    "--family blt sparse": "--family: invalid choice: 'sparse'",
    "--steps 9 4 --bands 8": "--bands: 8 bands are more than the smallest number of",
    "--family banded-toeplitz dense --bands 65": "of training steps, 64",
    "--family blt --steps 8 --epochs 1 9": "--epochs: 9 epochs are more than",
    "--family dense --steps 12 8 --epochs 3": "--epochs: with dense, 3 epochs must",
    "--family banded --steps 8 --bands 2 --epochs 3": "--epochs: with banded, 3 epochs",
    "--family normalized-banded-toeplitz --epochs 1 8": "--bands: with normalized-",
    "--family dense --steps 8 1025": "--steps: matrices have at most 1024 rows",
    "--buffers 2 16": "--buffers: must be a whole number of at least 1 and below 16",
    "--momentum 0 1": "--momentum: must be a number of at least 0 and below 1, got '1'",
    "--steps 0.5": "--steps: must be a whole number of at least 1 and below",
    "--max-optimizer-steps -1": "--max-optimizer-steps: must be a whole number of at",
    "--rtol inf": "--rtol: must be a number of at least 0, got 'inf'",
    "--stepz 4": "unrecognized arguments: --stepz 4",
}


class TestBadArguments:
    @pytest.mark.parametrize("argv", BAD_ARGUMENTS)
    def test_one_line_that_names_it(self, argv: str, tmp_path: Path):
        assert BAD_ARGUMENTS[argv] in refused(argv, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("in_the_way", "below", "cannot"),
        [
            # Nothing can be made below a regular file, not even by root.
            ("out", "out", "write into {}: "),
            ("out", "out/far/below", "write into {}: "),
            ("strategies.png/below", "", "write into {}: "),
            (UNFINISHED, "", "write {}/" + UNFINISHED),
        ],
    )
    def test_a_directory_that_cannot_be_written(
        self, in_the_way: str, below: str, cannot: str, tmp_path: Path
    ):
        file, out = tmp_path / in_the_way, tmp_path / below
        file.parent.mkdir(exist_ok=True)
        file.write_text("kept")
        line = refused("--steps 4 --bands 2", out)
        assert "argument --out: cannot " + cannot.format(out) in line
        assert file.read_text() == "kept"


def test_help(tmp_path: Path):
    out, err = ended(0, "--help", tmp_path)
    assert err == ""
    assert out.startswith("usage: python -m jaxmf_opt ")
    options = "--family --steps --epochs --momentum --bands --buffers --error --rtol"
    options += " --examples --batch-size --epsilon --delta"
    for word in (*FAMILIES, *options.split(), "--max-optimizer-steps", "--out"):
        assert f"\n  {word} " in out


def files(directory: Path) -> dict[Path, bytes]:
    """What is in the files below a directory."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a job has had Ctrl-C, when all is solved and nothing is written."""
    out = tmp_path_factory.mktemp("solved")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with (
        pytest.MonkeyPatch.context() as patch,
        # Fixtures of a module come before the marker that sets these.
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.setattr("jaxmf_opt.cli.main._write", stop)
        _, err = ended(130, RESUMED, out)
    assert "the same command goes on from here" in err
    return out


@pytest.fixture
def interrupted(solved: Path, tmp_path: Path) -> Path:
    """A copy of it, that may be changed."""
    return shutil.copytree(solved, tmp_path, dirs_exist_ok=True)


class TestUnfinished:
    def test_leaves_nothing_but_what_is_not_its_own(self, tmp_path: Path):
        for name in ("finished/of a user", f"{UNFINISHED}/notes", "a/b/sweep.npz"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("mine")
        before = files(tmp_path)
        run(tmp_path, RESUMED)
        after = files(tmp_path)
        results = {path.name for path in after.keys() - before.keys()}
        assert results == {"strategies.npz", "strategies.png"}
        assert before.items() <= after.items()
        assert [path.name for path in (tmp_path / UNFINISHED).iterdir()] == ["notes"]

    def test_goes_on_by_itself(
        self, interrupted: Path, whole: Job, monkeypatch: pytest.MonkeyPatch
    ):
        """And lets no other job do so, nor take it away."""
        kept = files(interrupted)
        assert sorted(path.name for path in kept) == ["000000.npz", "sweep.npz"]
        other = run(interrupted, f"{RESUMED} --max-optimizer-steps 1")
        assert other.arrays["optimizer_steps"].max() == 1
        assert kept.items() <= files(interrupted).items()

        def none_is_solved(*_: Any) -> Any:
            raise AssertionError("a batch is solved again")

        with monkeypatch.context() as patch:
            patch.setattr("jaxmf_opt.sweeps._runner.BatchRunner._solve", none_is_solved)
            job = run(interrupted, RESUMED)
        for name in ("error_after", "optimizer_steps"):
            assert_array_equal(job.arrays[name], whole.arrays[name][:1])
        assert not (interrupted / UNFINISHED).exists()

    def test_killed(self, tmp_path: Path, whole: Job):
        """A run that is killed between two families goes on with the second."""
        job = process(f"{BOTH} --out {tmp_path}")
        limit = time.monotonic() + 60
        while time.monotonic() < limit and not any(tmp_path.rglob("000000.npz")):
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
        job.communicate()
        assert job.returncode == -signal.SIGKILL
        assert not (tmp_path / "strategies.npz").exists()
        (first,) = tmp_path.rglob("000000.npz")
        assert first.parent.parent.name == "banded-toeplitz"
        again = run(tmp_path, BOTH)
        assert again.arrays.keys() == whole.arrays.keys()
        for name, array in whole.arrays.items():
            assert_array_equal(array, again.arrays[name], err_msg=name)
        assert not (tmp_path / UNFINISHED).exists()

    def test_two_at_a_time(self, interrupted: Path):
        """The second of two that are the same is refused."""
        (unfinished,) = (interrupted / UNFINISHED).iterdir()
        with locked(unfinished):
            line = refused(RESUMED, interrupted)
        assert f"argument --out: the same job is at work in {interrupted}" in line

    def test_damaged(self, interrupted: Path):
        (path,) = interrupted.rglob("sweep.npz")
        path.write_bytes(b"")
        line = refused(RESUMED, interrupted)
        assert "argument --out: " in line and "damaged" in line
        assert str(path.parent) in line
