"""`python -m jaxmf_opt`: optimize DP-MF strategies for a grid of training set-ups.

All set-ups are lanes of one jitted, vmapped solve.
"""

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

from ._callback import CallbackArgs
from ._solve import solve
from .losses import banded_toeplitz

_DESCRIPTION = """\
Optimize banded Toeplitz strategies for training with differential privacy.

For each combination of --steps, --bands and --momentum, finds the correlated noise of
DP-BandMF (arXiv 2405.15913) with the smallest error. The error is the root of the
expected squared error of the model's updates, averaged over training, for noise of
standard deviation 1 and sensitivity 1: each example may take part again after `bands`
steps at the earliest. Multiply it by the noise multiplier and the clipping norm.
"""

_COLUMNS = """\
columns: optimizer steps taken; error of independent noise (DP-SGD), of the starting
point and of the optimized strategy; the part of DP-SGD's error that is gone."""


class SetUps(NamedTuple):
    """Training set-ups, one a lane; each field has shape (lanes,).

    Attributes:
      n: Training steps.
      bands: Bands of the strategy.
      momentum: Momentum of the training algorithm.
    """

    n: Any
    bands: Any
    momentum: Any


class Report(NamedTuple):
    """What came out, one row a lane.

    Attributes:
      strategy_coef: The strategies, scaled to sensitivity 1; shape (lanes, max bands).
      optimizer_steps: Steps taken.
      converged: Whether a tolerance was met.
      error_independent: Root mean squared error of independent noise.
      error_before: The same of the starting point.
      error_after: The same of the optimized strategy.
    """

    strategy_coef: Any
    optimizer_steps: Any
    converged: Any
    error_independent: Any
    error_before: Any
    error_after: Any


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
    if max(args.bands) > min(args.steps):
        parser.error(
            f"argument --bands: {max(args.bands)} bands are more than the smallest "
            f"number of training steps, {min(args.steps)}"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "strategies.npz").open("ab").close()
    except OSError as e:
        parser.error(f"argument --out: cannot write into {args.out}: {e.strerror}")

    grid = list(itertools.product(args.steps, args.bands, args.momentum))
    columns = (np.array(column) for column in zip(*grid, strict=True))
    setups = SetUps(*columns)
    with jax.enable_x64():
        report = _run(setups, args.max_optimizer_steps, args.rtol)
    print(table(setups, report))
    print(_COLUMNS)
    np.savez(args.out / "strategies.npz", **setups._asdict(), **report._asdict())
    print(f"wrote {args.out / 'strategies.npz'}")
    try:
        from ._plot import plot_strategies
    except ModuleNotFoundError:
        print("no picture without matplotlib: pip install 'jaxmf_opt[plot]'")
        return
    plot_strategies(setups, report, args.out / "strategies.png")
    print(f"wrote {args.out / 'strategies.png'}")


def _parser() -> argparse.ArgumentParser:
    def number(kind: type, low: int, high: int | float) -> Any:
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
        "--steps",
        nargs="+",
        type=count,
        default=[500, 2000, 8000],
        metavar="N",
        help="numbers of training steps (default: 500 2000 8000)",
    )
    add(
        "--bands",
        nargs="+",
        type=count,
        default=[4, 16, 64],
        metavar="B",
        help="numbers of bands, each at most the smallest N (default: 4 16 64)",
    )
    add(
        "--momentum",
        nargs="+",
        type=number(float, 0, 1),
        default=[0.0, 0.9],
        metavar="M",
        help="momenta of the training algorithm, in [0, 1) (default: 0 0.9)",
    )
    add(
        "--max-optimizer-steps",
        type=number(int, 0, 2**31),
        default=250,
        metavar="K",
        help="limit of L-BFGS steps (default: 250)",
    )
    add(
        "--rtol",
        type=number(float, 0, np.inf),
        default=1e-6,
        help="stop a set-up once a step changes loss and coefficients by less than "
        "this, relatively; 0 takes all steps (default: 1e-6)",
    )
    add(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="DIR",
        help="directory for strategies.npz and strategies.png (default: out)",
    )
    return parser


def _run(setups: SetUps, max_optimizer_steps: int, rtol: float) -> Report:
    lanes = len(setups.n)
    progress = _Progress(lanes)
    max_n, max_bands = int(setups.n.max()), int(setups.bands.max())

    def one(n: Any, bands: Any, momentum: Any) -> Report:
        workload = banded_toeplitz.momentum_workload(max_n, momentum)
        error = functools.partial(
            banded_toeplitz.mean_squared_error, workload_coef=workload, n=n
        )
        start = banded_toeplitz.initial_strategy(max_bands, bands)
        solution = solve(
            lambda coef: error(coef, bands=bands),
            start,
            max_optimizer_steps=max_optimizer_steps,
            rtol=rtol,
            callback=progress,
        )
        coef = jnp.where(jnp.arange(max_bands) < bands, solution.value, 0.0)
        return Report(
            strategy_coef=coef / jnp.linalg.norm(coef),
            optimizer_steps=solution.stats["num_steps"],
            converged=solution.result == optx.RESULTS.successful,
            error_independent=jnp.sqrt(error(start, bands=1)),
            error_before=jnp.sqrt(error(start, bands=bands)),
            error_after=jnp.sqrt(error(coef, bands=bands)),
        )

    print(f"{lanes} set-ups, up to {max_n} training steps and {max_bands} bands")
    started = time.perf_counter()
    program = jax.jit(jax.vmap(one)).lower(*setups).compile()
    compiled = time.perf_counter()
    print(f"compiled in {compiled - started:.1f} s")
    report = jax.device_get(program(*setups))
    progress.close()
    print(f"solved in {time.perf_counter() - compiled:.1f} s")
    return report


class _Progress:
    """A line on the terminal, told of each step of each lane by the running solve."""

    def __init__(self, lanes: int):
        self._lanes = lanes
        self._step, self._running = -1, 0
        self._shown = 0.0

    def __call__(self, info: CallbackArgs) -> None:
        """Counts the lanes that are still running at the latest step."""
        if info.step > self._step:
            self._step, self._running = info.step, 0
        self._running += 1
        now = time.perf_counter()
        if now - self._shown > 0.2 and sys.stderr.isatty():
            self._shown = now
            line = f"step {self._step}: {self._running} of {self._lanes} set-ups run"
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def table(setups: SetUps, report: Report) -> str:
    """The report as text, a line for each set-up."""
    head = ("n", "bands", "momentum", "steps", "DP-SGD", "before", "after", "gain")
    lines = ["{:>7} {:>6} {:>9} {:>6} {:>10} {:>10} {:>10} {:>7}".format(*head)]
    for setup, row in zip(
        zip(*setups, strict=True), zip(*report, strict=True), strict=True
    ):
        n, bands, momentum = setup
        _, steps, converged, independent, before, after = row
        mark = "" if converged else "  (limit of steps)"
        lines.append(
            f"{n:7d} {bands:6d} {momentum:9.3g} {steps:6d} {independent:10.3f} "
            f"{before:10.3f} {after:10.3f} {1 - after / independent:7.1%}{mark}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
