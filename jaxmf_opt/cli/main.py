"""`python -m jaxmf_opt`: optimize DP-MF mechanisms for a grid of training set-ups."""

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .._files import locked, write_npz
from ..privacy import Budget
from ..sweeps._checkpoints import remove_records
from . import arguments, budget
from .families import FAMILIES, SetUp
from .job import Outcome, run

_COLUMNS = """\
columns: epochs, in each of which an example takes part once, as many steps apart as an
epoch has; how many vectors of noise, as large as the model, training has to keep;
optimizer steps taken; error of independent noise (DP-SGD), of the starting point and
of the optimized mechanism (a bound where banded inverses have strategies with negative
coefficients); the part of DP-SGD's error that is gone; * the smallest error for a
training"""


class Line(NamedTuple):
    """A mechanism for a training, and how good it is.

    Attributes:
      family: Its name.
      set_up: The training, and the size of the mechanism.
      kept: How many vectors of noise training keeps.
      outcome: The optimized mechanism.
    """

    family: str
    set_up: SetUp
    kept: int
    outcome: Outcome

    @property
    def training(self) -> tuple[Any, Any, Any]:
        """What is trained, whatever the mechanism is."""
        return self.set_up[:3]

    @property
    def gain(self) -> float:
        """The part of the error of independent noise that is gone."""
        return 1 - self.outcome.error_after / self.outcome.error_independent


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the job.

    Args:
      argv: The arguments; those of the command line by default.

    Raises:
      SystemExit: With code 2 after one line on standard error, if arguments are bad.
    """
    parser = arguments.make_parser()
    args = parser.parse_args(argv)
    private = arguments.check(parser, args)
    options = {
        "rtol": args.rtol,
        "max_optimizer_steps": args.max_optimizer_steps,
        "max_error": args.error == "max",
        "progress": sys.stderr.isatty() and find_spec("tqdm") is not None,
    }
    unfinished = args.out / "jaxmf_opt-unfinished" / _digest(args)
    calibrated = unfinished / "noise_multipliers.npz"
    with contextlib.ExitStack() as stack:
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(unfinished))
        except BlockingIOError:
            parser.error(f"argument --out: the same job is at work in {args.out}")
        except OSError as e:
            parser.error(f"argument --out: cannot write {unfinished}: {e.strerror}")
        try:
            with (
                jax.enable_x64(),
                budget.Calibration(private, args.bands, calibrated) as multipliers,
            ):
                lines = [
                    line
                    for name in dict.fromkeys(args.family)
                    for line in _lines(
                        name, _setups(args, name), unfinished / name, **options
                    )
                ]
                order = {t: i for i, t in enumerate(_trainings(args))}
                lines.sort(key=lambda line: order[line.training])  # then by family
                if private is None:
                    _write(lines, args.out)
                else:
                    choices = budget.choices(lines, private, multipliers)
                    _write_choices(choices, private, args)
        except KeyboardInterrupt:
            parser.exit(130, f"\n{parser.prog}: the same command goes on from here\n")
        except (ValueError, OSError) as e:
            if "`checkpoint_dir`" in str(e):
                parser.error(f"argument --out: {e}")
            if not str(e).startswith("`epsilon`"):
                raise
            parser.error(budget.as_option(str(e)))
        calibrated.unlink(missing_ok=True)
        _remove(unfinished)


def _digest(args: argparse.Namespace) -> str:
    """Tells apart jobs that share a directory."""
    options = {name: x for name, x in vars(args).items() if name != "out"}
    text = json.dumps(options, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(lines: Sequence[Line], directory: Path) -> None:
    """Shows the results, and writes them."""
    print(table(lines))
    print(_COLUMNS)
    write_npz(directory / "strategies.npz", arrays(lines))
    print(f"wrote {directory / 'strategies.npz'}")
    _draw("plot_mechanisms", directory / "strategies.png", lines)


def _write_choices(
    choices: Sequence[budget.Choice], private: Budget, args: argparse.Namespace
) -> None:
    """Shows what the mechanisms are at the budget, and writes the best of them."""
    print(budget.table(choices, private))
    print(budget.COLUMNS)
    write_npz(args.out / "budget.npz", budget.arrays(choices))
    is_max = args.error == "max"
    paths = budget.save_front(choices, private, args.out, max_error=is_max)
    for path in (args.out / "budget.npz", *paths):
        print(f"wrote {path}")
    _draw("plot_budget", args.out / "budget.png", choices)


def _draw(what: str, path: Path, *args: Any) -> None:
    """Draws a picture, if matplotlib is there."""
    try:
        plot = importlib.import_module(".plot", __package__)
    except ModuleNotFoundError:
        print("no picture without matplotlib: pip install 'jaxmf_opt[plot]'")
        return
    getattr(plot, what)(*args, path)
    print(f"wrote {path}")


def _remove(unfinished: Path) -> None:
    """Removes what the sweeps of a job have kept, and directories that are empty."""
    sweeps = [path.parent for path in unfinished.glob("*/*/sweep.npz")]
    for directory in sweeps:
        remove_records(directory)
    families = {directory.parent for directory in sweeps}
    for directory in (*families, unfinished, unfinished.parent):
        with contextlib.suppress(OSError):
            directory.rmdir()


def _trainings(args: argparse.Namespace) -> list[tuple[Any, Any, Any]]:
    return list(itertools.product(args.steps, args.epochs, args.momentum))


def _setups(args: argparse.Namespace, name: str) -> list[SetUp]:
    sizes = {"bands": args.bands, "buffers": args.buffers}.get(FAMILIES[name].sizes)
    return [
        SetUp(*training, size)
        for training in _trainings(args)
        for size in sizes or [training[0]]
    ]


def _lines(
    name: str, setups: list[SetUp], directory: Path, **options: Any
) -> list[Line]:
    """Runs the set-ups of a family, and reports progress."""
    family = FAMILIES[name]
    lines: list[Line | None] = [None] * len(setups)
    started = time.perf_counter()
    for lanes, outcomes in run(family, setups, directory, **options):
        took = time.perf_counter() - started
        print(f"{name}: {len(lanes)} set-ups in {took:.1f} s", flush=True)
        for lane, outcome in zip(lanes, outcomes, strict=True):
            kept = family.kept(setups[lane].size, outcome.mechanism)
            lines[lane] = Line(name, setups[lane], kept, outcome)
        started = time.perf_counter()
    return [line for line in lines if line is not None]


def table(lines: Sequence[Line]) -> str:
    """The mechanisms as text, a line for each, a paragraph for each training."""
    layout = "{:>7} {:>6} {:>8}  {:<23} {:>10} {:>6} {:>6} {:>10} {:>10} {:>10} {:>7}"
    head = ("n", "epochs", "momentum", "family", "size", "noise", "steps")
    text = [layout.format(*head, "DP-SGD", "before", "after", "gain")]
    for training, group in itertools.groupby(lines, lambda line: line.training):
        mechanisms = list(group)
        n, epochs, momentum = training
        least = min(float(line.outcome.error_after) for line in mechanisms)
        if len(mechanisms) > 1:
            text.append("")
        for line in mechanisms:
            o = line.outcome
            text.append(
                layout.format(
                    *(n, epochs, f"{momentum:.3g}", line.family),
                    f"{line.set_up.size} {FAMILIES[line.family].sizes}",
                    *(line.kept, int(o.optimizer_steps)),
                    f"{o.error_independent:.3f}",
                    f"{o.error_before:.3f}",
                    f"{o.error_after:.3f}",
                    f"{line.gain:.1%}",
                )
                + (" *" if o.error_after <= least else "")
                + ("" if o.converged else "  (not converged)")
            )
    return "\n".join(text)


def arrays(lines: Sequence[Line]) -> dict[str, np.ndarray]:
    """The table by columns, and the mechanisms of each family by what they consist of.

    Those are named `family/array`, with an axis over the family's lines in the order of
    the table; smaller ones are filled up with zeros.
    """
    columns = {
        "family": [line.family for line in lines],
        **{
            name: [getattr(line.set_up, name) for line in lines]
            for name in SetUp._fields
        },
        "noise_kept": [line.kept for line in lines],
        **{
            name: [getattr(line.outcome, name) for line in lines]
            for name in Outcome._fields
            if name not in ("mechanism", "params")
        },
    }
    named = {name: np.array(column) for name, column in columns.items()}
    for family in dict.fromkeys(line.family for line in lines):
        parts = [line.outcome.mechanism for line in lines if line.family == family]
        for name in parts[0]:
            each = [part[name] for part in parts]
            shape = np.max([x.shape for x in each], axis=0)
            filled = np.zeros((len(each), *map(int, shape)))
            for row, x in zip(filled, each, strict=True):
                row[tuple(map(slice, x.shape))] = x
            named[f"{family}/{name}"] = filled
    return named
