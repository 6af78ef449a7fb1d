"""Pictures. Imported only where one is drawn: matplotlib is optional."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import scipy.signal

from .._files import replacing
from .budget import dp_sgd, front

_STYLES = {
    "banded-toeplitz": "o-",
    "normalized-banded-toeplitz": "D-",
    "banded-inverse-toeplitz": "s--",
    "blt": "^:",
    "column-normalized-banded": "p-",
    "banded": "h-",
    "dense": "*-",
}


def plot_mechanisms(lines: Sequence[Any], path: Path) -> None:
    """Draws what mechanisms gain for the noise that is kept, and the best strategies.

    Args:
      lines: The `Line`s of the main job.
      path: The file to write.
    """
    trainings = list(dict.fromkeys(line.training for line in lines))
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(trainings)))
    figure, (gains, coefs) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for training, colour in zip(trainings, colours, strict=True):
        mechanisms = [line for line in lines if line.training == training]
        n, epochs, momentum = training
        label = f"n = {n}, epochs {epochs}, momentum {momentum:g}"
        gains.plot([], [], color=colour, label=label)
        by_family = sorted(mechanisms, key=lambda line: (line.family, line.kept))
        for family, group in itertools.groupby(by_family, lambda line: line.family):
            of_family = list(group)
            # No noise is kept by a single band; a logarithm has no 0.
            kept = [max(line.kept, 0.5) for line in of_family]
            gain = [100 * line.gain for line in of_family]
            gains.plot(kept, gain, _STYLES[family], color=colour, markersize=5)
        best = min(mechanisms, key=lambda line: float(line.outcome.error_after))
        coef = _strategy_coef(best, min(n, 256))
        coefs.plot(
            np.arange(1, coef.size + 1), coef / coef[0], color=colour, label=label
        )
    for family in dict.fromkeys(line.family for line in lines):
        gains.plot([], [], _STYLES[family], color="gray", label=family)
    gains.set_xscale("log", base=2)
    gains.xaxis.set_major_formatter("{x:g}")
    gains.set_xlabel("noise kept by training [vectors as large as the model]")
    gains.set_ylabel("error below DP-SGD's [%]")
    gains.set_title("What correlated noise gains")
    gains.legend(fontsize="small")
    coefs.set_xscale("log", base=2)
    coefs.xaxis.set_major_formatter("{x:g}")
    coefs.set_yscale("log")
    coefs.set_xlabel("step")
    coefs.set_ylabel("strategy coefficient / first")
    coefs.set_title("The strategies of the smallest errors")
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


def plot_budget(choices: Sequence[Any], path: Path) -> None:
    """Draws the errors at a privacy budget over the noise that is kept.

    Args:
      choices: The `Choice`s of the main job.
      path: The file to write.
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")

    def kept(of: Sequence[Any]) -> list[float]:
        return [max(c.line.kept, 0.5) for c in of]  # a logarithm has no 0

    def kind(choice: Any) -> tuple[str, bool]:
        return choice.line.family, choice.amplified

    for family, amplified in dict.fromkeys(map(kind, choices)):
        these = [c for c in choices if kind(c) == (family, amplified)]
        axes.plot(
            kept(these),
            [c.error for c in these],
            _STYLES[family],
            fillstyle="full" if amplified else "none",
            label=f"{family}, cyclic Poisson" if amplified else family,
        )
    best = front(choices)
    axes.step(
        [*kept(best), max(kept(choices))],
        [*(c.error for c in best), best[-1].error],
        color="black",
        linewidth=0.8,
        where="post",
        label="smallest",
    )
    rival = dp_sgd(choices).error
    axes.axhline(rival, color="gray", linestyle="--", label="DP-SGD, Poisson")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    axes.set_xlabel("noise kept by training [vectors as large as the model]")
    axes.set_ylabel("error / (learning rate x clipping norm)")
    axes.set_title("Mechanisms at the privacy budget")
    axes.legend(fontsize="small")
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


def _strategy_coef(line: Any, length: int) -> np.ndarray:
    """The first column of a strategy, without zeros at its end."""
    mechanism = line.outcome.mechanism
    if "strategy_matrix" in mechanism:
        return mechanism["strategy_matrix"][:length, 0]
    if line.family == "blt":
        powers = mechanism["buf_decay"] ** np.arange(length - 1)[:, None]
        return np.append(1.0, powers @ mechanism["output_scale"])
    if line.family == "banded-inverse-toeplitz":
        noising = mechanism["noising_coef"][: line.set_up.size]
        return np.asarray(scipy.signal.lfilter([1.0], noising, np.eye(1, length)[0]))
    return mechanism["strategy_coef"][: line.set_up.size]
