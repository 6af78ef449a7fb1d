"""Performance profiles (Dolan and More, 2002, doi:10.1007/s101070100263)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def profile(ratios: Sequence[float], factors: np.ndarray) -> np.ndarray:
    """The share of problems solved at a cost within factors of the least.

    Args:
      ratios: The cost of each problem over that of the best solver; infinite if it was
        not solved.
      factors: The factors.

    Returns:
      For each factor a number between 0 and 1.
    """
    return np.mean(np.asarray(ratios)[:, None] <= factors, axis=0)


def draw(
    kinds: Mapping[str, Mapping[str, Sequence[float]]], path: Path, most: float = 100.0
) -> None:
    """Draws the profiles of several kinds of cost side by side into a file.

    Args:
      kinds: For each kind of cost, and each solver, the ratios.
      path: Where the picture is written.
      most: The largest factor that is shown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    factors = np.geomspace(1.0, most, 400)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for ax, (title, solvers) in zip(axes, kinds.items(), strict=True):
        for number, (name, ratios) in enumerate(solvers.items()):
            ax.step(
                factors,
                profile(ratios, factors),
                where="post",
                label=name,
                color=f"C{number}",
                linewidth=2.5 if name.isupper() else 1.2,
                linestyle="-" if name.isupper() else ("--", "-.", ":")[number % 3],
            )
        ax.set_xscale("log")
        ax.set_xlim(1.0, most)
        ax.set_ylim(0.0, 1.02)
        ax.set_xlabel("factor of the best solver's cost")
        ax.set_title(title)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("share of problems solved within it")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(path, dpi=120)
