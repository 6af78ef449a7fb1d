"""Pictures. Imported only where one is drawn: matplotlib is optional."""

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np


def plot_strategies(setups: Any, report: Any, path: Path) -> None:
    """Draws the error over the number of bands, and the strategies themselves.

    Args:
      setups: The `SetUps` of the main job.
      report: Its `Report`.
      path: The file to write.
    """
    families = sorted(set(zip(setups.n, setups.momentum, strict=True)))
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(families)))
    figure, (errors, coefs) = plt.subplots(
        1, 2, figsize=(11, 4.5), layout="constrained"
    )
    for (n, momentum), colour in zip(families, colours, strict=True):
        rows = np.flatnonzero((setups.n == n) & (setups.momentum == momentum))
        rows = rows[np.argsort(setups.bands[rows])]
        label = f"n = {n}, momentum {momentum:g}"
        gain = 1 - report.error_after[rows] / report.error_independent[rows]
        errors.plot(setups.bands[rows], 100 * gain, "o-", color=colour, label=label)
        widest = rows[-1]
        coef = report.strategy_coef[widest, : setups.bands[widest]]
        coefs.plot(np.arange(1, coef.size + 1), coef, ".-", color=colour, label=label)
    errors.set_xscale("log", base=2)
    errors.xaxis.set_major_formatter("{x:g}")
    errors.set_xlabel("bands")
    errors.set_ylabel("error below DP-SGD's [%]")
    errors.set_title("What correlated noise gains")
    errors.legend()
    coefs.set_xscale("log", base=2)
    coefs.xaxis.set_major_formatter("{x:g}")
    coefs.set_yscale("log")
    coefs.set_xlabel("band")
    coefs.set_ylabel("coefficient, at sensitivity 1")
    coefs.set_title("The widest strategies")
    figure.savefig(path, dpi=150)
    plt.close(figure)
