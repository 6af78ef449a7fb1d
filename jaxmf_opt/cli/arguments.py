"""The arguments of `python -m jaxmf_opt`."""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..privacy import Budget
from . import budget
from .families import FAMILIES

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

# Matrices of this size take a minute.
_MAX_DENSE = 1024


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help explains)\n")


def make_parser() -> argparse.ArgumentParser:
    """Returns what takes apart a command line, argument by argument."""

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
        help="limit of L-BFGS steps; for matrices with --error max, of each of the "
        "smooth problems by which they are found (default: 500)",
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


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Budget | None:
    """Refuses what single arguments do not show; fills in defaults.

    Returns:
      The privacy budget, or None if there is none.
    """
    private = budget.of(parser, args)
    args.family = args.family or ["banded-toeplitz"]
    args.momentum = args.momentum or [0.0, 0.9]
    args.bands = args.bands or [4, 16, 64]
    args.buffers = args.buffers or [2, 4]
    of_epochs = [name for name in args.family if FAMILIES[name].has_fixed_order]
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
