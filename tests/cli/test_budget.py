"""The job for a privacy budget, by jax-privacy and dp-accounting."""

import contextlib
import functools
import io
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from jax_privacy.matrix_factorization import banded, dense, sensitivity, toeplitz
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from jaxmf_opt.cli.budget import Calibration
from jaxmf_opt.cli.main import main
from jaxmf_opt.mechanisms import load
from jaxmf_opt.privacy import Budget

pytestmark = pytest.mark.mixes  # jax-privacy's code

# (It is quick to find much noise.)
BUDGET = Budget(examples=400, batch_size=100, epochs=2, epsilon=0.3, delta=1e-5)
ARGV = "--examples 400 --batch-size 100 --epochs 2 --epsilon 0.3 --delta 1e-5"


@functools.cache
def noise_multiplier(bands: int | None) -> float:
    return BUDGET.noise_multiplier(bands)


class Job(NamedTuple):
    """What a run printed, wrote and drew."""

    out: str
    directory: Path
    arrays: dict[str, np.ndarray]
    figure: Figure


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    directory, figures = tmp_path_factory.mktemp("budget"), []
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        pytest.MonkeyPatch.context() as patch,
        # Fixtures of a module come before the marker that sets these.
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.setattr(plt, "close", figures.append)
        families = "normalized-banded-toeplitz blt column-normalized-banded banded"
        options = f"{ARGV} --family {families} --buffers 1"
        main([*options.split(), "--out", str(directory)])
    with np.load(directory / "budget.npz") as file:
        arrays = {name.removeprefix("budget/"): x for name, x in file.items()}
    return Job(out.getvalue(), directory, arrays, figures[0])


def amplified(job: Job, bands: int) -> int:
    """Where the amplified Toeplitz strategy with so many bands stands."""
    names = ("family", "size", "amplified")
    rows = list(zip(*(job.arrays[name].tolist() for name in names), strict=True))
    return rows.index(("normalized-banded-toeplitz", bands, True))


def test_all_divisors_are_there(job: Job):
    names = ("family", "size", "amplified")
    got = set(zip(*(job.arrays[name].tolist() for name in names), strict=True))
    of_bands = {
        (family, b, sampled)
        for family in ("normalized-banded-toeplitz", "column-normalized-banded")
        for b in (1, 2, 4)
        for sampled in (False, True)
    }
    of_epochs = {("blt", 1, False), *(("banded", b, False) for b in (1, 2, 4))}
    assert got == of_bands | of_epochs


def test_noise_multipliers_are_those_of_the_library(job: Job):
    for size, amplified, got in zip(
        *(job.arrays[x] for x in ("size", "amplified", "noise_multiplier")), strict=True
    ):
        if size in (1, 4):
            want = noise_multiplier(int(size) if amplified else None)
            assert_allclose(got, want, rtol=1e-12)


def test_files_hold_the_front_and_its_errors(job: Job):
    """The errors by jax-privacy, of matrices written out."""
    files = set(job.directory.glob("*.npz")) - {job.directory / "budget.npz"}
    kept, errors = job.arrays["noise_kept"], job.arrays["error"]
    best = [i for i in range(kept.size) if errors[i] <= errors[kept <= kept[i]].min()]
    assert len(files) == len({float(errors[i]) for i in best})
    with jax.enable_x64():
        for path in files:
            saved = load(path)
            assert saved.budget == BUDGET and saved.noise_multiplier is not None
            noising = np.asarray(saved.streaming_matrix().materialize(8))
            c = jnp.array(np.linalg.inv(noising))
            if saved.amplified:
                size = sensitivity.single_participation_sensitivity(c)
            else:
                size = sensitivity.fixed_epoch_sensitivity(c, 2)
            assert_allclose(size, 1, rtol=1e-6)
            error = np.sqrt(dense.per_query_error(strategy_matrix=c).mean())
            error *= saved.noise_multiplier / 100
            assert np.isclose(errors[best], error, rtol=1e-6).any()


def test_it_is_as_good_as_jax_privacy(job: Job):
    """For as much noise. (Each number of bands is compiled, so only one.)"""
    i = amplified(job, 4)
    with jax.enable_x64():
        loss = toeplitz.loss(toeplitz.optimize_banded_toeplitz(8, 4), n=8)
        want = np.sqrt(loss) * noise_multiplier(4) / 100
    assert job.arrays["error"][i] <= want * (1 + 1e-6)


def test_matrices_are_as_good_as_jax_privacys(job: Job):
    """And at least as good as Toeplitz ones."""
    i = amplified(job, 4)
    of = [job.arrays[x] for x in ("family", "size", "amplified")]
    (j,) = np.flatnonzero((of[0] == "column-normalized-banded") & (of[1] == 4) & of[2])
    with jax.enable_x64():
        loss = banded.per_query_error(banded.optimize(8, bands=4)).mean()
        want = np.sqrt(float(loss)) * noise_multiplier(4) / 100
    assert job.arrays["error"][j] <= min(want * (1 + 1e-6), job.arrays["error"][i])


def test_matrices_for_epochs_are_as_good_as_jax_privacys(job: Job):
    of = job.arrays
    (i,) = np.flatnonzero((of["family"] == "banded") & (of["size"] == 4))
    with jax.enable_x64():
        c = dense.optimize(8, epochs=2, bands=4)
        error = float(np.sqrt(dense.per_query_error(strategy_matrix=c).mean()))
        error *= float(sensitivity.fixed_epoch_sensitivity(c, 2))
    want = error * noise_multiplier(None) / BUDGET.batch_size
    assert job.arrays["error"][i] <= want * (1 + 1e-6)


def test_closed_forms_are_those_of_jax_privacy(job: Job):
    """The square root of the workload, cut at as many bands, columns of norm 1."""
    i = amplified(job, 2)
    with jax.enable_x64():
        coef = toeplitz.optimal_max_error_strategy_coefs(2)
        c = toeplitz.materialize_lower_triangular(coef, BUDGET.steps)
        c /= jnp.linalg.norm(c, axis=0, keepdims=True)
        error = float(np.sqrt(dense.per_query_error(strategy_matrix=c).mean()))
    want = error * noise_multiplier(2) / BUDGET.batch_size
    got = job.arrays["closed_form_error"]
    assert_allclose(got[i], want, rtol=1e-6)
    assert np.isnan(got[job.arrays["family"] == "blt"]).all()


def test_noise_multipliers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that is interrupted has them for the next one."""
    path = tmp_path / "noise_multipliers.npz"
    with Calibration(BUDGET, [], path) as first:
        want = {bands: future.result() for bands, future in first.items()}
    assert want.keys() == {None}
    monkeypatch.setattr(Budget, "noise_multiplier", None)
    with Calibration(BUDGET, [], path) as again:
        assert {bands: future.result() for bands, future in again.items()} == want


def test_the_table(job: Job):
    lines = job.out.splitlines()
    training = "400 examples, 8 steps with batches of 100, 2 epochs"
    first = lines.index(f"epsilon 0.3, delta 1e-05: {training}") + 2
    columns = (job.arrays[x] for x in ("family", "size", "noise_kept", "error"))
    of_mechanisms: dict[Any, list[Any]] = {}
    for family, size, kept, error in zip(*columns, strict=True):
        of_mechanisms.setdefault((family, size), []).append((kept, error))
    rows = lines[first : first + len(of_mechanisms)]
    assert rows[0].split()[:2] == ["DP-SGD", "Poisson"] and rows[0].endswith("0.0% *")
    want = sorted(min(both) for both in of_mechanisms.values())
    for row, (kept, error) in zip(rows, want, strict=True):
        assert (f" {error:.5f} " in row) and (f" {kept} " in row)
    starred = [row.endswith(" *") for row in rows]
    assert sum(starred) == len(list(job.directory.glob("*.npz"))) - 1


def test_the_picture(job: Job):
    (axes,) = job.figure.axes
    drawn = np.concatenate([np.array(x.get_ydata()) for x in axes.get_lines()])
    assert set(np.round(job.arrays["error"], 12)) <= set(np.round(drawn, 12))
    assert (job.directory / "budget.png").read_bytes().startswith(b"\x89PNG")


BAD: dict[str, Any] = {
    "--epsilon 8 --delta 1e-4": "takes --examples and --batch-size, too",
    ARGV + " --steps 9": "--steps: it follows from --examples",
    ARGV + " --momentum 0 0.9": "--momentum: one for a privacy budget",
    ARGV + " --epsilon 0": "--epsilon: must be a number above 0",
    ARGV + " --epsilon 0.001": "--epsilon: must be at least 0.01 where batches are",
    ARGV + " --batch-size 401": "--batch-size: must be at most `examples`, 400",
    ARGV
    + " --bands 5": "--bands: sampling allows at most 4 bands, the number of steps",
}


@pytest.mark.parametrize("argv", BAD)
def test_bad_budgets(argv: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main([*argv.split(), "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert BAD[argv] in line
    assert not (tmp_path / "out").exists()
