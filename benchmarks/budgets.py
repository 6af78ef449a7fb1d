"""Is there a privacy budget for which jax-privacy has a better mechanism?

Draws budgets at random: 16 to 128 steps, 1 to 8 epochs, epsilon 0.5 to 16. For each
runs `python -m jaxmf_opt`, with defaults, and optimizes all strategy classes of
jax-privacy 2.0.0: banded Toeplitz with columns of one norm and column-normalised
banded, amplified or not, banded for fixed epochs, buffered Toeplitz, and dense. Its
errors are those of matrices that are written out, by its own functions, with noise
multipliers of dp-accounting. For every number of vectors of noise that its mechanisms
keep, the least error of ours with as many or fewer, over that of theirs, is printed.

    python -m benchmarks.budgets [COUNT]

takes three to six minutes a budget.
"""

import contextlib
import functools
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax_privacy.matrix_factorization import (
    banded,
    buffered_toeplitz,
    dense,
    sensitivity,
    toeplitz,
)

from jaxmf_opt.cli.main import main as job
from jaxmf_opt.privacy import Budget

from .common import progress

COUNT, MOST_BUFFERS = 20, 4


def drawn(count: int) -> Iterator[Budget]:
    """Budgets at random, the same ones each time."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        epochs = int(rng.choice([1, 2, 4, 8]))
        per_epoch = int(rng.choice([b for b in (4, 8, 12, 16) if b * epochs >= 16]))
        batch_size = int(10 ** rng.uniform(1.5, 3.5))
        yield Budget(
            examples=per_epoch * batch_size,
            batch_size=batch_size,
            epochs=epochs,
            epsilon=float(f"{2 ** rng.uniform(-1, 4):.2g}"),
            delta=float(f"{0.1 / (per_epoch * batch_size):.1g}"),
        )


def ours(budget: Budget) -> dict[int, float]:
    """The error of each mechanism of the job, by the vectors of noise that it keeps."""
    argv = [f"--{x.replace('_', '-')}={getattr(budget, x)}" for x in vars(budget)]
    with (
        tempfile.TemporaryDirectory() as out,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        job([*argv, "--out", out])
        (path,) = Path(out).rglob("budget.npz")
        with np.load(path) as table:
            kept, errors = table["budget/noise_kept"], table["budget/error"]
    return least(zip(kept.tolist(), errors.tolist(), strict=True))


def theirs(budget: Budget) -> dict[int, float]:
    """The same of jax-privacy."""
    return least(_of_jax_privacy(budget))


def least(pairs: Iterator[tuple[int, float]]) -> dict[int, float]:
    """The least error for each number of vectors."""
    found: dict[int, float] = {}
    for kept, error in pairs:
        found[kept] = min(error, found.get(kept, np.inf))
    return found


def _of_jax_privacy(budget: Budget) -> Iterator[tuple[int, float]]:
    n, epochs, separation = budget.steps, budget.epochs, budget.steps_per_epoch
    multiplier = functools.cache(budget.noise_multiplier)

    def both(kept: int, c: jax.Array, bands: int | None) -> Iterator[tuple[int, float]]:
        error = np.sqrt(float(dense.per_query_error(strategy_matrix=c).mean()))
        error /= budget.batch_size
        size = sensitivity.fixed_epoch_sensitivity(c, epochs)
        yield kept, error * float(size) * multiplier(None)
        if bands is not None:
            size = sensitivity.single_participation_sensitivity(c)
            yield kept, error * float(size) * multiplier(bands)

    for bands in (b for b in range(1, separation + 1) if n % b == 0):
        coef = toeplitz.optimize_banded_toeplitz(n, bands)
        of_toeplitz = banded.ColumnNormalizedBanded.from_banded_toeplitz(n, coef)
        yield from both(bands - 1, of_toeplitz.materialize(), bands)
        of_columns = banded.optimize(n, bands=bands)
        yield from both(bands - 1, of_columns.materialize(), bands)
        yield from both(bands - 1, dense.optimize(n, epochs=epochs, bands=bands), None)
    for buffers in range(1, MOST_BUFFERS + 1):
        blt = buffered_toeplitz.optimize(
            n=n,
            min_sep=separation,
            max_participations=epochs,
            error="mean",
            min_buffers=buffers,
            max_buffers=buffers,
        )
        yield from both(buffers, blt.materialize(n), None)
    yield from both(n - 1, dense.optimize(n, epochs=epochs), None)


def main(arguments: list[str] | None = None) -> None:
    """Prints how it is, for each budget."""
    count = int(arguments[0]) if arguments else COUNT
    worst = 0.0
    for budget in progress(list(drawn(count)), "budgets", repr):
        jax.clear_caches()
        of_job = ours(budget)
        with jax.enable_x64():
            rivals = theirs(budget)
        ratios = {}
        for kept in sorted(rivals):
            best, rival = (
                min(error for size, error in found.items() if size <= kept)
                for found in (of_job, rivals)
            )
            ratios[kept] = best / rival
        worst = max(worst, *ratios.values())
        text = ", ".join(f"{kept}: {ratio:.6f}" for kept, ratio in ratios.items())
        print(f"{budget}\n  {text}", flush=True)
    print(f"the largest ratio: {worst:.9f}")


if __name__ == "__main__":
    main(sys.argv[1:])
