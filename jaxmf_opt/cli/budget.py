"""The job for a privacy budget: which mechanism, how much noise, what error."""

import argparse
import concurrent.futures
import contextlib
import functools
import multiprocessing
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._files import read_npz, write_npz
from ..mechanisms._saved import write
from ..privacy import Budget, check_sampled
from .families import FAMILIES
from .job import found

# Up to so many steps matrices are tried, too.
_FEW = 128

_GIVEN = ("examples", "batch_size", "epsilon", "delta")

COLUMNS = """\
columns: how examples come into batches, of what is possible what is better: in a fixed
order in each epoch, or by cyclic Poisson sampling (arXiv 2306.08153, Algorithm 2); how
many vectors of noise, as large as the model, training has to keep; the noise multiplier
(dp-accounting); the error of the model, the root of its expected square, over learning
rate and clipping norm, for gradients that are means over a batch; the same of a closed
form with as many bands, the (inverse) square root of the workload (arXiv 2405.13763 and
2505.12128); that error below DP-SGD's; * no smaller error with so few vectors"""


class Choice(NamedTuple):
    """A mechanism at the budget.

    Attributes:
      line: The mechanism.
      amplified: Whether batches are drawn by cyclic Poisson sampling.
      noise_multiplier: The standard deviation of the noise, over clipping norm and
        sensitivity.
      error: The root of the expected squared error of the model.
      closed_form: The same of the mechanism of closed form where optimization started;
        NaN if there is none.
    """

    line: Any
    amplified: bool
    noise_multiplier: float
    error: float
    closed_form: float

    @property
    def name(self) -> str:
        """A name for a file."""
        size = f"{self.line.family}-{self.line.set_up.size}"
        return f"{size}-amplified" if self.amplified else size


def add_arguments(add: Callable[..., Any], count: Any, number: Any) -> None:
    """Adds what makes a budget, beside `--epochs`."""
    for name, kind, metavar, text in (
        ("--examples", count, "N", "size of the data set"),
        ("--batch-size", count, "B", "examples in a batch"),
        ("--epsilon", number, "E", "privacy budget"),
        ("--delta", number, "D", "probability that it does not hold; below 1 / N"),
    ):
        add(name, type=kind, metavar=metavar, help=text)


def of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Budget | None:
    """The budget of the arguments, and what follows from it, filled in.

    Args:
      parser: Gets what is wrong.
      args: The arguments.

    Returns:
      The budget, or None if there is none.
    """
    given = [name for name in _GIVEN if getattr(args, name) is not None]
    if not given:
        return None
    missing = [f"--{x.replace('_', '-')}" for x in _GIVEN if x not in given]
    if missing:
        parser.error(f"a privacy budget takes {' and '.join(missing)}, too")
    if args.steps is not None:
        parser.error(
            "argument --steps: it follows from --examples, --batch-size and --epochs"
        )
    for name in ("epochs", "momentum"):
        if len(getattr(args, name) or [0]) != 1:
            parser.error(f"argument --{name}: one for a privacy budget")
    try:
        values = {name: getattr(args, name) for name in _GIVEN}
        budget = Budget(epochs=args.epochs[0], **values)
        budget.noise_multiplier()
        check_sampled(budget)
    except (ValueError, ModuleNotFoundError) as e:
        parser.error(as_option(str(e)))
    most = budget.steps_per_epoch
    args.steps = [budget.steps]
    args.momentum = args.momentum or [0.0]
    if not args.family:
        args.family = ["normalized-banded-toeplitz", "blt"]
        if budget.steps <= _FEW:  # of which matrices take seconds
            args.family += ["column-normalized-banded", "banded", "dense"]
    args.buffers = args.buffers or [1, 2, 3, 4]
    if args.bands is None:
        args.bands = [b for b in range(1, most + 1) if budget.steps % b == 0]
    if max(args.bands) > most:
        parser.error(
            f"argument --bands: sampling allows at most {most} bands, the number of "
            f"steps in an epoch; got {max(args.bands)}"
        )
    # One band is DP-SGD, with which all others are compared.
    args.bands = sorted({1, *args.bands})
    if not any(FAMILIES[name].can_be_amplified for name in args.family):
        args.family = ["banded-toeplitz", *args.family]
        if not any(FAMILIES[name].sizes == "bands" for name in args.family[1:]):
            args.bands = [1]
    return budget


def as_option(message: str) -> str:
    """What `Budget` says of an argument, as the command line calls it."""

    def option(argument: re.Match[str]) -> str:
        return f"argument --{argument[1].replace('_', '-')}:"

    return re.sub("^`(.*?)`", option, message)


class Calibration:
    """Noise multipliers, computed in processes of their own beside a sweep."""

    def __init__(self, budget: Budget | None, bands: Sequence[int], path: Path):
        """Of a budget, unamplified and for these numbers of bands.

        Args:
          budget: The budget, or None for none.
          bands: The numbers of bands.
          path: A file for those that are known, for the run that continues this one.
        """
        self._budget, self._bands, self._path = budget, (None, *bands), path

    def __enter__(self) -> Mapping[int | None, concurrent.futures.Future[float]]:
        """Begins. The multiplier without amplification is that of None."""
        if self._budget is None:
            return {}
        known: dict[str, Any] = {}
        with contextlib.suppress(ValueError):  # of no file, or a damaged one
            known = read_npz(self._path)
        self._pool = concurrent.futures.ProcessPoolExecutor(
            mp_context=multiprocessing.get_context("spawn"), initializer=_uninterrupted
        )
        compute, futures = self._budget.noise_multiplier, {}
        for bands in self._bands:
            future: concurrent.futures.Future[float] = concurrent.futures.Future()
            if str(bands) in known:
                future.set_result(float(known[str(bands)]))
            else:
                future = self._pool.submit(compute, bands)
                future.add_done_callback(functools.partial(self._keep, known, bands))
            futures[bands] = future
        return futures

    def _keep(
        self, known: dict[str, Any], bands: int | None, future: Any
    ) -> None:  # (in one thread, that of the pool)
        if not future.cancelled() and future.exception() is None:
            known[str(bands)] = np.array(future.result())
            write_npz(self._path, known)

    def __exit__(self, *_: object) -> None:
        """Ends, with what is not done."""
        if self._budget is not None:
            self._pool.shutdown(cancel_futures=True)


def _uninterrupted() -> None:
    """Leaves it to the first process to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def choices(
    lines: Sequence[Any],
    budget: Budget,
    noise_multipliers: Mapping[int | None, concurrent.futures.Future[float]],
) -> list[Choice]:
    """All mechanisms at the budget, by the noise that they keep, then by error."""
    all_of_them = []
    for line in lines:
        family, outcome = FAMILIES[line.family], line.outcome
        before = outcome.error_before if family.starts_in_closed_form else np.nan
        errors = np.array([outcome.error_after, before]) / budget.batch_size
        sigma = noise_multipliers[None].result()
        all_of_them.append(Choice(line, False, sigma, *map(float, errors * sigma)))
        if family.can_be_amplified:
            # Of one participation, where columns of an example have no row in common.
            errors /= budget.epochs**0.5
            sigma = noise_multipliers[line.set_up.size].result()
            all_of_them.append(Choice(line, True, sigma, *map(float, errors * sigma)))
    return sorted(all_of_them, key=lambda c: (c.line.kept, c.error))


def front(choices: Sequence[Choice]) -> list[Choice]:
    """Those with a smaller error than all that keep as much noise, or less."""
    best: list[Choice] = []
    for choice in choices:
        if not best or choice.error < best[-1].error * (1 - 1e-9):
            best.append(choice)
    return best


def dp_sgd(choices: Sequence[Choice]) -> Choice:
    """Independent noise, amplified by sampling."""
    return next(c for c in choices if c.amplified and c.line.set_up.size == 1)


def table(choices: Sequence[Choice], budget: Budget) -> str:
    """The mechanisms as text, each with the batches that suit it better."""
    layout = "{:<38} {:<15} {:>6} {:>11} {:>10} {:>12} {:>7}"
    n, e = budget.steps, budget.epochs
    text = [
        f"epsilon {budget.epsilon:g}, delta {budget.delta:g}: {budget.examples} "
        f"examples, {n} steps with batches of {budget.batch_size}, {e} epochs",
        layout.format(
            *("mechanism", "batches", "noise", "multiplier", "error"),
            *("closed form", "gain"),
        ),
    ]
    best, rival = set(map(id, front(choices))), dp_sgd(choices)
    better = {id(c.line): c for c in sorted(choices, key=lambda c: -c.error)}
    for c in (c for c in choices if better[id(c.line)] is c):
        size = f"{c.line.set_up.size} {FAMILIES[c.line.family].sizes}"
        name = "DP-SGD" if c is rival else f"{c.line.family}, {size}"
        batches = "cyclic Poisson" if c.amplified else "fixed order"
        gain = f"{1 - c.error / rival.error:.1%}"
        closed = "" if np.isnan(c.closed_form) else f"{c.closed_form:.5f}"
        numbers = f"{c.noise_multiplier:.4f}", f"{c.error:.5f}", closed, gain
        star = " *" if id(c) in best else ""
        text.append(
            layout.format(
                name, "Poisson" if c is rival else batches, c.line.kept, *numbers
            )
            + star
            + ("" if c.line.outcome.converged else "  (not converged)")
        )
    return "\n".join(text)


def arrays(choices: Sequence[Choice]) -> dict[str, np.ndarray]:
    """The table by columns."""
    return {
        "budget/family": np.array([c.line.family for c in choices]),
        "budget/size": np.array([c.line.set_up.size for c in choices]),
        "budget/noise_kept": np.array([c.line.kept for c in choices]),
        "budget/amplified": np.array([c.amplified for c in choices]),
        "budget/noise_multiplier": np.array([c.noise_multiplier for c in choices]),
        "budget/error": np.array([c.error for c in choices]),
        "budget/closed_form_error": np.array([c.closed_form for c in choices]),
    }


def save_front(
    choices: Sequence[Choice], budget: Budget, directory: Path, *, max_error: bool
) -> list[Path]:
    """Writes the mechanisms on the front into files for `mechanisms.load`."""
    paths = []
    for c in front(choices):
        mechanism, params = found(
            FAMILIES[c.line.family],
            c.line.set_up,
            c.line.outcome,
            max_error=max_error,
            sampled=c.amplified,
        )
        paths.append(directory / f"{c.name}.npz")
        # (The noise multiplier is known, and takes seconds to find.)
        known = budget, c.amplified, c.noise_multiplier
        write(paths[-1], mechanism, params, *known)
    return paths
