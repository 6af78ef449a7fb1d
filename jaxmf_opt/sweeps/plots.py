"""Pictures of sweeps. Needs matplotlib: `pip install 'jaxmf_opt[plot]'`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Real

from .._solver.solution import Solution, statuses
from ._table import best_lane, lanes_of_solution

__all__ = ["convergence", "final_loss", "heat_map"]

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
        "`jaxmf_opt.sweeps.plots` needs matplotlib: pip install 'jaxmf_opt[plot]'"
    ) from e

_FAILED = {
    "nonlinear_max_steps_reached": ("v", "tab:orange", "limit of steps"),
    "stagnation": ("s", "tab:brown", "stagnation"),
    "nonfinite": ("x", "tab:red", "not finite"),
}

_TITLES = {
    "grad_norm": "largest element of the gradient",
    "loss": "loss above the least of its lane",
}

_Values = Real[Array, " lanes"] | np.ndarray | Sequence[float]


def convergence(
    solution: Solution,
    values: _Values | None = None,
    *,
    of: str = "grad_norm",
    label: str = "hyperparameter",
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draws how lanes have converged: a line for each, over the steps.

    Args:
      solution: The solution of a sweep with `history=True`.
      values: A number for each lane, for its colour.
      of: What to draw: "grad_norm", the max-norm of the gradient, or "loss", how much
        higher the loss is than at the end of its lane.
      label: What the numbers are, for the colour bar.
      log: Whether colours are by their logarithms.
      ax: Where to draw; a new figure by default.

    Returns:
      The axes.

    Raises:
      TypeError: If `solution` is no solution.
      ValueError: If it has no lanes or no history, `of` is unknown, or `values` are not
        one for each lane.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import sweep
      >>> loss = lambda x, h: jnp.sum(jnp.cosh(x - h["shift"])) + h["weight"] * x @ x
      >>> h = {"shift": jnp.arange(4.0), "weight": jnp.array([0.1, 0.1, 1.0, 1.0])}

      >>> solution = sweep(loss, jnp.zeros(2), h, gtol=1e-6, history=True)
      >>> ax = convergence(solution, h["shift"], label="shift")
    """
    stats = lanes_of_solution(solution).stats
    if "history" not in stats:
        raise ValueError("`solution` must be that of a sweep with `history=True`.")
    if of not in _TITLES:
        raise ValueError(f"`of` must be one of {', '.join(_TITLES)}, got {of!r}.")
    rows = np.asarray(getattr(stats["history"], of), float)
    if of == "loss":
        rows = rows - np.asarray(stats["loss"], float)[:, None]
        rows = np.where(rows > 0, rows, np.nan)
    steps = np.arange(rows.shape[1])
    colours, mappable = ["tab:blue"] * len(rows), None
    if values is not None:
        of_lane = _numbers("values", values, len(rows), log=log)
        norm = (LogNorm if log else Normalize)(np.nanmin(of_lane), np.nanmax(of_lane))
        mappable = ScalarMappable(norm, "viridis")
        colours = mappable.to_rgba(of_lane)
    ax = _axes(ax)
    # Of many lines each is faint.
    style: dict[str, Any] = {"linewidth": 1.0, "alpha": max(0.1, 3 / (2 + len(rows)))}
    if len(rows) <= 30:
        style["alpha"] = 0.9
    for row, colour in zip(rows, colours, strict=True):
        ax.plot(steps, row, color=colour, **style)
    positive = rows[np.isfinite(rows) & (rows > 0)]
    if positive.size:
        ax.set_yscale("log")
        first = rows[:, :1][np.isfinite(rows[:, :1])].max(initial=0.0)
        if first > 0:  # what diverges leaves by the upper edge
            ax.set_ylim(top=min(ax.get_ylim()[1], 1e3 * first))
    names, top = statuses(solution.result), ax.get_ylim()[1]
    taken = np.minimum(np.asarray(stats["num_steps"]), rows.shape[1])
    for name, (marker, colour, text) in _FAILED.items():
        lanes = np.flatnonzero((names == name) & (taken > 0))
        if lanes.size:
            last = taken[lanes] - 1
            heights = np.nan_to_num(rows[lanes, last], nan=np.inf)
            ax.plot(
                *(last, np.minimum(heights, top), marker),
                color=colour,
                linestyle="none",
                clip_on=False,
                label=text,
            )
    ax.set_ylim(top=top)
    ax.set_xlabel("step")
    ax.set_ylabel(_TITLES[of])
    ax.set_title(f"Convergence of {_lanes(len(rows))}")
    if mappable is not None:
        ax.figure.colorbar(mappable, ax=ax, label=label)
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return ax


def final_loss(
    solution: Solution,
    values: _Values,
    *,
    label: str = "hyperparameter",
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draws the loss of each lane over one hyperparameter.

    Lanes that failed are marked by how; at the upper edge, if they have no finite loss
    or one far above those of lanes that succeeded.

    Args:
      solution: The solution of a sweep.
      values: The hyperparameter, a number for each lane.
      label: What it is.
      log: Whether its axis is logarithmic.
      ax: Where to draw; a new figure by default.

    Returns:
      The axes.

    Raises:
      TypeError: If `solution` is no solution.
      ValueError: If it has no lanes, none has a finite loss, or `values` are not one
        for each.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import sweep
      >>> loss = lambda x, h: jnp.sum(jnp.cosh(x - h["shift"])) + h["weight"] * x @ x
      >>> h = {"shift": jnp.arange(4.0), "weight": jnp.array([0.1, 0.1, 1.0, 1.0])}

      >>> solution = sweep(loss, jnp.zeros(2), h, gtol=1e-6)
      >>> ax = final_loss(solution, h["shift"], label="shift")
    """
    best = best_lane(solution)
    losses = np.asarray(solution.stats["loss"], float)
    x = _finite_numbers("values", values, losses.size, log=log)
    names = statuses(solution.result)
    ax = _axes(ax)
    top = _top(losses, names)
    below = np.isfinite(losses) & (losses <= top)
    if np.unique(x).size == x.size:
        order = np.argsort(x)
        order = order[below[order]]
        ax.plot(x[order], losses[order], "-", color="lightgray", zorder=0)
    good = names == "successful"
    if good.any():
        ax.plot(x[good], losses[good], "o", color="tab:blue", label="successful")
    edge = {"transform": ax.get_xaxis_transform(), "clip_on": False}
    for name, (marker, colour, text) in _FAILED.items():
        style: dict[str, Any] = {"color": colour, "linestyle": "none"}
        lanes = (names == name) & below
        if lanes.any():
            ax.plot(x[lanes], losses[lanes], marker, label=text, **style)
        lanes = (names == name) & ~below
        if lanes.any():
            text += ", above" if np.isfinite(losses[lanes]).all() else ", above or none"
            ax.plot(x[lanes], np.ones(lanes.sum()), marker, label=text, **style, **edge)
    _mark_best(ax, x[best], losses[best], losses[best])
    if log:
        ax.set_xscale("log")
    ax.set_xlabel(label)
    ax.set_ylabel("loss")
    ax.set_title(f"Loss of {_lanes(losses.size)}")
    ax.legend()
    return ax


def heat_map(
    solution: Solution,
    x: _Values,
    y: _Values,
    *,
    labels: tuple[str, str] = ("first hyperparameter", "second hyperparameter"),
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draws the loss of each lane over a grid of two hyperparameters.

    A cell for each pair of values that occur; of several lanes in one, the least loss.
    Cells without a finite loss stay white; lanes that failed are marked by how. Colours
    span the losses of lanes that succeeded, and a bit more.

    Args:
      solution: The solution of a sweep.
      x: The first hyperparameter, a number for each lane.
      y: The second.
      labels: What they are.
      log: Whether colours are by the logarithm of the loss.
      ax: Where to draw; a new figure by default.

    Returns:
      The axes.

    Raises:
      TypeError: If `solution` is no solution.
      ValueError: If it has no lanes, none has a finite loss, or `x` or `y` are not one
        for each.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import sweep
      >>> loss = lambda x, h: jnp.sum(jnp.cosh(x - h["shift"])) + h["weight"] * x @ x
      >>> h = {"shift": jnp.arange(4.0), "weight": jnp.array([0.1, 0.1, 1.0, 1.0])}

      >>> solution = sweep(loss, jnp.zeros(2), h, gtol=1e-6)
      >>> ax = heat_map(solution, h["shift"], h["weight"], labels=("shift", "weight"))
    """
    best = best_lane(solution)
    losses = np.asarray(solution.stats["loss"], float)
    finite = losses[np.isfinite(losses)]
    if log and finite.min() <= 0:
        raise ValueError(f"with `log`, losses must be above 0, got {finite.min():g}.")
    numbers = [
        _finite_numbers(name, values, losses.size, log=False)
        for name, values in (("x", x), ("y", y))
    ]
    (columns, column), (rows, row) = (
        np.unique(values, return_inverse=True) for values in numbers
    )
    cells = np.full((rows.size, columns.size), np.inf)
    np.minimum.at(cells, (row, column), np.where(np.isfinite(losses), losses, np.inf))
    ax = _axes(ax)
    names = statuses(solution.result)
    top = _top(losses, names)
    norm = (LogNorm if log else Normalize)(vmax=finite[finite <= top].max())
    shown = np.ma.masked_invalid(cells)
    image = ax.imshow(shown, origin="lower", aspect="auto", norm=norm)
    extend = "max" if (shown > top).any() else "neither"
    ax.figure.colorbar(image, ax=ax, label="loss", extend=extend)
    for name, (marker, colour, text) in _FAILED.items():
        lanes = names == name
        if lanes.any():
            style: dict[str, Any] = {"color": colour, "linestyle": "none"}
            ax.plot(column[lanes], row[lanes], marker, label=text, **style)
    _mark_best(ax, column[best], row[best], losses[best])
    for axis, ticks in ((ax.xaxis, columns), (ax.yaxis, rows)):
        few = np.linspace(0, len(ticks) - 1, min(len(ticks), 8))
        few = np.unique(few.astype(int))
        axis.set_ticks(few, [f"{ticks[i]:.3g}" for i in few])
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    ax.set_title(f"Loss of {_lanes(losses.size)}")
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, frameon=False)
    return ax


def _top(losses: np.ndarray, names: np.ndarray) -> float:
    """Up to where losses are worth to be told apart."""
    finite = losses[np.isfinite(losses)]
    good = losses[(names == "successful") & np.isfinite(losses)]
    if good.size and np.ptp(good) > 0:
        return good.max() + np.ptp(good)
    # Where those that succeeded do not show a scale, the best quarter of all does.
    quarter = np.quantile(finite, 0.25, method="higher")
    with np.errstate(over="ignore"):
        wide = quarter + 10 * (quarter - finite.min())
    return max(good.max(initial=-np.inf), wide)


def _mark_best(ax: Axes, x: Any, y: Any, loss: float) -> None:
    ax.plot(
        *(x, y, "*"),
        color="gold",
        markeredgecolor="black",
        markersize=14,
        label=f"least: {loss:.6g}",
        linestyle="none",
    )


def _lanes(count: int) -> str:
    return "1 lane" if count == 1 else f"{count} lanes"


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(figsize=(7, 5), layout="constrained")[1] if ax is None else ax


def _numbers(name: str, values: Any, count: int, *, log: bool) -> np.ndarray:
    """Numbers that have a place on an axis; or are NaN."""
    try:
        array = np.asarray(values, float)
    except (TypeError, ValueError) as e:
        raise TypeError(f"`{name}` must be numbers, got {values!r}.") from e
    if array.shape != (count,):
        raise ValueError(
            f"`{name}` must be a number for each of the {count} lanes, got an array of "
            f"shape {array.shape}."
        )
    if np.isinf(array).any() or np.isnan(array).all():
        raise ValueError(f"`{name}` must be finite, got {values!r}.")
    if log and np.nanmin(array) <= 0:
        raise ValueError(
            f"with `log`, `{name}` must be above 0, got {np.nanmin(array):g}."
        )
    return array


def _finite_numbers(name: str, values: Any, count: int, *, log: bool) -> np.ndarray:
    array = _numbers(name, values, count, log=log)
    if np.isnan(array).any():
        raise ValueError(f"`{name}` must be finite, got {values!r}.")
    return array


def __dir__() -> list[str]:
    return __all__
