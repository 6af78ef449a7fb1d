"""The main job, `python -m jaxmf_opt`, on tiny grids."""

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_privacy.matrix_factorization import toeplitz

from jaxmf_opt.__main__ import main

STEPS, BANDS, MOMENTA = (9, 6), (1, 3), (0.0, 0.9)
GRID = list(itertools.product(STEPS, BANDS, MOMENTA))
ERRORS = ("error_independent", "error_before", "error_after")
PNG = b"\x89PNG\r\n\x1a\n"


class Job(NamedTuple):
    """What a run of the job printed and wrote."""

    out: str
    err: str
    arrays: dict[str, np.ndarray]
    directory: Path


def run(
    capsys: pytest.CaptureFixture[str], directory: Path, arguments: Sequence[object]
) -> Job:
    main([*map(str, arguments), "--out", str(directory)])
    captured = capsys.readouterr()
    with np.load(directory / "strategies.npz") as file:
        return Job(captured.out, captured.err, dict(file), directory)


def rows(job: Job) -> list[list[str]]:
    """The table, split at blanks: its lines are those between head and legend."""
    lines = job.out.splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.split()[:2] == ["n", "bands"])
    (foot,) = (i for i, line in enumerate(lines) if line.startswith("columns:"))
    return [line.split() for line in lines[head + 1 : foot]]


def error(coef: np.ndarray, n: int, momentum: float) -> float:
    """The root mean squared error of a strategy, computed by upstream."""
    workload = np.cumsum(momentum ** np.arange(n))
    with jax.enable_x64():
        strategy = jnp.array(coef)
        squares = toeplitz.per_query_error(
            strategy_coef=strategy, n=n, workload_coef=jnp.array(workload)
        )
        squared = jnp.mean(squares) * toeplitz.sensitivity_squared(strategy)
        return float(jnp.sqrt(squared))


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


def _grid_arguments(directory: Path) -> list[str]:
    options = {"--steps": STEPS, "--bands": BANDS, "--momentum": MOMENTA}
    words = [(name, *map(str, values)) for name, values in options.items()]
    return [*itertools.chain(*words), "--out", str(directory)]


# The whole job is compiled for about 2 s, so the grid runs once.
@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    # A directory that is not there yet, nor is the one above it.
    directory = tmp_path_factory.mktemp("job") / "new" / "out"
    with pytest.MonkeyPatch.context() as patch:
        out, err = _Recorder(), _Recorder()
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        main(_grid_arguments(directory))
    with np.load(directory / "strategies.npz") as file:
        return Job(out.text, err.text, dict(file), directory)


class TestOutput:
    def test_table(self, job: Job):
        table = rows(job)
        assert len(table) == len(GRID)
        for i, (row, (n, bands, momentum)) in enumerate(zip(table, GRID, strict=True)):
            assert row[:2] == [str(n), str(bands)]
            assert float(row[2]) == momentum
            assert int(row[3]) == job.arrays["optimizer_steps"][i]
            errors = [job.arrays[name][i] for name in ERRORS]
            np.testing.assert_allclose([float(x) for x in row[4:7]], errors, atol=6e-4)
            gain = 100 * (1 - errors[2] / errors[0])
            np.testing.assert_allclose(float(row[7].rstrip("%")), gain, atol=0.06)
            assert len(row) == 8  # all have converged

    def test_messages(self, job: Job):
        assert job.err == ""  # progress is for terminals
        assert job.out.startswith("8 set-ups, up to 9 training steps and 3 bands\n")
        for name in ("strategies.npz", "strategies.png"):
            assert f"wrote {job.directory / name}\n" in job.out

    def test_arrays(self, job: Job):
        shapes = {name: x.shape for name, x in job.arrays.items()}
        lanes = len(GRID)
        assert shapes == {
            "n": (lanes,),
            "bands": (lanes,),
            "momentum": (lanes,),
            "strategy_coef": (lanes, max(BANDS)),
            "optimizer_steps": (lanes,),
            "converged": (lanes,),
            "error_independent": (lanes,),
            "error_before": (lanes,),
            "error_after": (lanes,),
        }
        for name in ("strategy_coef", *ERRORS):
            assert job.arrays[name].dtype == np.float64
        columns = [job.arrays[name] for name in ("n", "bands", "momentum")]
        assert list(zip(*columns, strict=True)) == GRID
        assert job.arrays["converged"].dtype == bool
        assert job.arrays["converged"].all()

    def test_strategies(self, job: Job):
        coefs = job.arrays["strategy_coef"]
        np.testing.assert_allclose(np.linalg.norm(coefs, axis=1), 1, rtol=1e-14)
        for coef, (_, bands, _) in zip(coefs, GRID, strict=True):
            assert np.all(coef[bands:] == 0)
            assert np.all(coef[:bands] != 0)

    def test_errors_are_upstreams(self, job: Job):
        start = np.array(toeplitz.optimal_max_error_strategy_coefs(max(BANDS)))
        for i, (n, bands, momentum) in enumerate(GRID):
            coefs = (start[:1], start[:bands], job.arrays["strategy_coef"][i, :bands])
            want = [error(coef, n, momentum) for coef in coefs]
            got = [job.arrays[name][i] for name in ERRORS]
            # `start` is float32 here.
            np.testing.assert_allclose(got, want, rtol=1e-6)
            np.testing.assert_allclose(got[2], want[2], rtol=1e-12)

    def test_errors_go_down(self, job: Job):
        independent, before, after = (job.arrays[name] for name in ERRORS)
        wide = job.arrays["bands"] > 1
        assert np.all(after[wide] < before[wide])
        assert np.all(before[wide] < independent[wide])
        np.testing.assert_allclose(after[~wide], independent[~wide], rtol=1e-14)

    def test_picture(self, job: Job):
        data = (job.directory / "strategies.png").read_bytes()
        assert data.startswith(PNG)
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        assert width > 500 and height > 300
        assert data.endswith(b"IEND\xaeB`\x82")


class TestOptions:
    @pytest.mark.parametrize("limit", [0, 1])
    def test_limit_of_steps(
        self, limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        arguments = ("--steps", 9, "--bands", 3, "--max-optimizer-steps", limit)
        job = run(capsys, tmp_path, arguments)
        for row in rows(job):
            assert int(row[3]) == limit
            assert " ".join(row[8:]) == "(limit of steps)"
        assert not job.arrays["converged"].any()
        unmoved = job.arrays["error_after"] == job.arrays["error_before"]
        assert np.all(unmoved == (limit == 0))

    def test_without_matplotlib(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.delitem(sys.modules, "jaxmf_opt._plot", raising=False)
        arguments = ("--steps", 4, "--bands", 2, "--max-optimizer-steps", 1)
        job = run(capsys, tmp_path, arguments)
        *_, before_last, last = job.out.splitlines()
        assert before_last == f"wrote {tmp_path / 'strategies.npz'}"
        assert "matplotlib" in last
        assert "pip install 'jaxmf_opt[plot]'" in last
        assert job.err == ""
        assert "error_after" in job.arrays
        assert not (tmp_path / "strategies.png").exists()


BAD_ARGUMENTS = {
    "bands larger than steps": (["--steps", "9", "4", "--bands", "8"], "--bands", "8"),
    "default bands, few steps": (["--steps", "5"], "--bands", "64"),
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

    def test_results_that_cannot_be_overwritten(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        (tmp_path / "strategies.npz" / "below").mkdir(parents=True)
        with pytest.raises(SystemExit) as exit_:
            main(["--steps", "4", "--bands", "2", "--out", str(tmp_path)])
        out, err = capsys.readouterr()
        check_refusal(exit_.value.code, out, err, "--out", str(tmp_path))


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 0
    assert err == ""
    assert out.startswith("usage: python -m jaxmf_opt ")
    for word in ("--steps", "--bands", "--momentum", "--rtol", "--out"):
        assert f"\n  {word} " in out


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


def _process(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jaxmf_opt", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        # JAX need not look for accelerators, nor talk about it.
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
