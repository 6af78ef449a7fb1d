"""`python -m jaxmf_opt`: optimize DP-MF mechanisms for a grid of training set-ups."""

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from .._files import locked, write_npz
from ..privacy import Budget
from ..sweeps._checkpoints import remove_records
from . import budget
from .job import FAMILIES, Outcome, SetUp, run

_DESCRIPTION = """\
Optimize the correlated noise of training with differential privacy.

For each training, a combination of --steps, --epochs and --momentum, and for each
mechanism, a --family and one of its sizes, finds the noise with the smallest error. The
error is the root of the expected squared error of the model, the mean over training or
the largest, for noise of standard deviation 1 and sensitivity 1. Multiply it by the
noise multiplier and the clipping norm.

families:
  banded-toeplitz          DP-BandMF (arXiv 2405.15913): can be amplified by sampling
  normalized-banded-toeplitz  the same, with columns of one norm: a smaller error
  banded-inverse-toeplitz  BandInvMF, BISR (arXiv 2505.12128): little memory
  blt                      buffered linear Toeplitz (arXiv 2404.16706): least memory
  dense                    any matrix (arXiv 2306.08153): the least error, for few steps
  banded                   any banded matrix: the same with less memory
  column-normalized-banded  the same, with columns of one norm: can be amplified by
                           sampling

With a privacy budget (--examples, --batch-size, --epochs, --epsilon, --delta) it is one
training. Then the noise multipliers come from dp-accounting, also for banded mechanisms
that cyclic Poisson sampling amplifies, and the errors are those at the budget.
"""

_COLUMNS = """\
columns: epochs, in each of which an example takes part once, as many steps apart as an
epoch has; how many vectors of noise, as large as the model, training has to keep;
optimizer steps taken; error of independent noise (DP-SGD), of the starting point and
of the optimized mechanism (a bound where banded inverses have strategies with negative
coefficients); the part of DP-SGD's error that is gone; * the smallest error for a
training"""

# Matrices of this size take a minute.
_MAX_DENSE = 1024


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help explains)\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the job.

    Args:
      argv: The arguments; those of the command line by default.

    Raises:
      SystemExit: With code 2 after one line on standard error, if arguments are bad.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    private = _check(parser, args)
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
            if "`checkpoint_dir`" not in str(e):
                raise
            parser.error(f"argument --out: {e}")
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


def _parser() -> argparse.ArgumentParser:
    def number(kind: type, low: float, high: float) -> Any:
        def parse(text: str) -> Any:
            try:
                value = kind(text)
            except ValueError:
                value = None
            if value is None or not low <= value < high:
                name = {int: "a whole number", float: "a number"}[kind]
                limit = "" if high == np.inf else f" and below {high:g}"
                raise argparse.ArgumentTypeError(
                    f"must be {name} of at least {low:g}{limit}, got {text!r}"
                )
            return value

        return parse

    count = number(int, 1, 2**31)
    parser = _Parser(
        prog="python -m jaxmf_opt",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--family",
        nargs="+",
        choices=list(FAMILIES),
        metavar="F",
        help="families of mechanisms (default: banded-toeplitz; with a "
        "budget normalized-banded-toeplitz blt)",
    )
    add(
        "--steps",
        nargs="+",
        type=count,
        metavar="N",
        help="numbers of training steps (default: 500 2000 8000; with matrices 64 256)",
    )
    add(
        "--epochs",
        nargs="+",
        type=count,
        default=[1],
        metavar="K",
        help="how often each example takes part (default: 1)",
    )
    add(
        "--momentum",
        nargs="+",
        type=number(float, 0, 1),
        metavar="M",
        help="momenta of the training algorithm, in [0, 1) (default: 0 0.9; with a "
        "budget 0)",
    )
    add(
        "--bands",
        nargs="+",
        type=count,
        metavar="B",
        help="numbers of bands, each at most the smallest N (default: 4 16 64; with a "
        "budget all divisors of the steps up to an epoch)",
    )
    add(
        "--buffers",
        nargs="+",
        type=number(int, 1, 16),
        metavar="D",
        help="numbers of buffers of a blt (default: 2 4; with a budget 1 2 3 4)",
    )
    budget.add_arguments(add, count, number(float, 0, np.inf))
    add(
        "--error",
        choices=["mean", "max"],
        default="mean",
        help="which squared error of the steps is optimized (default: mean)",
    )
    add(
        "--max-optimizer-steps",
        type=number(int, 0, 2**31),
        default=500,
        metavar="K",
        help="limit of L-BFGS steps (default: 500)",
    )
    add(
        "--rtol",
        type=number(float, 0, np.inf),
        default=1e-6,
        help="stop a set-up once a step changes loss and parameters by less than "
        "this, relatively; 0 takes all steps (default: 1e-6)",
    )
    add(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="DIR",
        help="directory for strategies.npz and strategies.png, and, until they are "
        "written, for what is finished: the same command goes on with a run that was "
        "killed or interrupted (default: out)",
    )
    return parser


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Budget | None:
    """Refuses what single arguments do not show; fills in defaults.

    Returns:
      The privacy budget, or None if there is none.
    """
    private = budget.of(parser, args)
    args.family = args.family or ["banded-toeplitz"]
    args.momentum = args.momentum or [0.0, 0.9]
    args.bands = args.bands or [4, 16, 64]
    args.buffers = args.buffers or [2, 4]
    of_epochs = [name for name in args.family if name in ("banded", "dense")]
    has_matrices = any(FAMILIES[name].is_matrix for name in args.family)
    if args.steps is None:
        args.steps = [64, 256] if has_matrices else [500, 2000, 8000]
    steps, epochs = min(args.steps), max(args.epochs)
    has_bands = any(FAMILIES[name].sizes == "bands" for name in args.family)
    if has_bands and max(args.bands) > steps:
        parser.error(
            f"argument --bands: {max(args.bands)} bands are more than the smallest "
            f"number of training steps, {steps}"
        )
    apart = min(n // k for n, k in itertools.product(args.steps, args.epochs))
    for name in args.family:
        is_normalized = "normalized" in name
        if is_normalized and epochs > 1 and max(args.bands) > apart > 0:
            parser.error(
                f"argument --bands: with {name} at most {apart}, the steps of the "
                f"shortest epoch; got {max(args.bands)}"
            )
    if epochs > steps:
        parser.error(
            f"argument --epochs: {epochs} epochs are more than the smallest number of "
            f"training steps, {steps}"
        )
    if has_matrices and max(args.steps) > _MAX_DENSE:
        parser.error(
            f"argument --steps: matrices have at most {_MAX_DENSE} rows here, "
            f"got {max(args.steps)} training steps"
        )
    for n, k in itertools.product(args.steps, args.epochs):
        if of_epochs and n % k:
            parser.error(
                f"argument --epochs: with {of_epochs[0]}, {k} epochs must have the "
                f"same number of steps, got {n} training steps"
            )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
        for file in (args.out / "strategies.npz", args.out / "strategies.png"):
            if file.exists():
                file.open("ab").close()
    except OSError as e:
        parser.error(f"argument --out: cannot write into {args.out}: {e.strerror}")
    return private


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
