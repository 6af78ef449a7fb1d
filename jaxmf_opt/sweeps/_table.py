"""What came out of a sweep, lane by lane."""

import csv
import os
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np

from .._jax.keys import as_numpy
from .._solver.solution import Solution, statuses
from .._typing import PyTree
from .._validation import check_path
from ._lanes import lanes_of


def best_lane(solution: Solution) -> int:
    """The lane of the least loss, among those whose loss is finite.

    Losses are compared in float64, also where `solution.stats` has them in float32.
    A lane need not have succeeded to be the best: its point is as good as its loss.

    Args:
      solution: The solution of a sweep.

    Returns:
      The number of the lane; the first one of several.

    Raises:
      TypeError: If it is no solution.
      ValueError: If it has no lanes, or none with a finite loss.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jaxmf_opt import sweep
      >>> loss = lambda x, rate: jnp.sum((x - 1.0) ** 2)
      >>> rates = jnp.array([0.01, 0.5, 1.1])

      >>> best_lane(sweep(loss, jnp.zeros(2), rates, optimizer=optax.sgd, gtol=1e-6))
      1
    """
    of = lanes_of_solution(solution)
    losses = np.asarray(of.stats["loss"] if of.loss is None else of.loss)
    if not np.isfinite(losses).any():
        raise ValueError(
            f"`solution` must have a lane whose loss is finite, got {losses.size} "
            "lanes without one."
        )
    return int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))


def failed_lanes(solution: Solution) -> dict[int, str]:
    """The lanes that failed, and why.

    Args:
      solution: The solution of a sweep.

    Returns:
      For each lane that is not `successful`, in order, its status:
      "nonlinear_max_steps_reached", "stagnation" or "nonfinite".

    Raises:
      TypeError: If it is no solution.
      ValueError: If it has no lanes.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jaxmf_opt import sweep
      >>> loss = lambda x, rate: jnp.sum((x - 1.0) ** 2)
      >>> rates = jnp.array([0.01, 0.5, 1.1])

      >>> solution = sweep(loss, jnp.zeros(2), rates, optimizer=optax.sgd, gtol=1e-6)
      >>> failed_lanes(solution)
      {0: 'nonlinear_max_steps_reached', 2: 'nonlinear_max_steps_reached'}
    """
    names = statuses(lanes_of_solution(solution).result)
    return {i: str(name) for i, name in enumerate(names) if name != "successful"}


class SweepTable(Mapping[str, np.ndarray]):
    """A table of lanes: a mapping from names of columns to NumPy arrays."""

    def __init__(self, columns: Mapping[str, np.ndarray]):
        self._columns = dict(columns)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return f"SweepTable of {', '.join(self._columns)}"

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as text, numbers with all their digits.

        Args:
          path: The file.

        Raises:
          TypeError: If `path` is no path.
          OSError: If it cannot be written.
        """
        check_path("path", path)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self._columns)
            rows = zip(*(c.tolist() for c in self._columns.values()), strict=True)
            writer.writerows(rows)

    def to_frame(self) -> Any:
        """The table as a `pandas.DataFrame`, a row for each lane.

        Raises:
          ModuleNotFoundError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError(
                "`to_frame` needs pandas: pip install 'jaxmf_opt[table]'"
            ) from e
        return pd.DataFrame(self._columns)


_NUMBERS = ("loss", "grad_norm", "num_steps")


def table(solution: Solution, hyperparams: PyTree) -> SweepTable:
    """A table of the lanes of a sweep.

    Args:
      solution: Its solution. (Or one of a `jax.vmap` of `solve`, whose hyperparameters
        have their lanes in front.)
      hyperparams: Its hyperparameters.

    Returns:
      A table of columns of a row for each lane: `lane`, each mapped array of the
      hyperparameters by its path (one of several numbers for each lane as several
      columns), and `loss`, `grad_norm`, `num_steps` and `status`.

    Raises:
      TypeError: If `solution` is no solution.
      ValueError: If `hyperparams` are not those of the sweep, in their structure or
        number of lanes, or two columns would have the same name.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import sweep
      >>> targets = {"target": jnp.arange(3.0)}
      >>> loss = lambda x, h: jnp.sum((x - h["target"]) ** 2)
      >>> found = table(sweep(loss, jnp.zeros(2), targets, gtol=1e-9), targets)
      >>> found
      SweepTable of lane, target, loss, grad_norm, num_steps, status
      >>> found["target"]
      array([0., 1., 2.], dtype=float32)
    """
    stats = lanes_of_solution(solution).stats
    count = np.size(stats["loss"])
    columns: dict[str, np.ndarray] = {"lane": np.arange(count)}
    leaves, treedef = jax.tree.flatten(hyperparams)
    axes = solution.hyperparam_axes
    axes = (0,) * len(leaves) if axes is None else axes
    if len(axes) != len(leaves):
        raise ValueError(
            f"`hyperparams` must be those of the sweep, of {len(axes)} leaves, got "
            f"{len(leaves)}."
        )
    if any(axis is not None for axis in axes):  # else they are all shared
        lanes = lanes_of([("hyperparams", hyperparams)], (treedef.unflatten(axes),))
        if lanes.count != count:
            raise ValueError(
                f"`hyperparams` must be those of the sweep of {count} lanes, got "
                f"{lanes.count}."
            )
        for path, leaf in jax.tree_util.tree_leaves_with_path(lanes.mapped[0]):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            for column, values in _columns(name or "hyperparam", leaf).items():
                if column in columns or column in (*_NUMBERS, "status"):
                    raise ValueError(
                        f"`hyperparams` have a second column of the name {column!r}; "
                        "rename what it is of."
                    )
                columns[column] = values
    for name in _NUMBERS:
        columns[name] = np.asarray(stats[name])
    columns["status"] = statuses(solution.result)
    return SweepTable(columns)


def _columns(name: str, leaf: Any) -> dict[str, np.ndarray]:
    leaf = as_numpy(leaf)
    if leaf.ndim == 1:
        return {name: leaf}
    return {
        f"{name}[{', '.join(map(str, index))}]": leaf[(slice(None), *index)]
        for index in np.ndindex(leaf.shape[1:])
    }


def lanes_of_solution(solution: Any) -> Solution:
    """The solution, if it is one and has an axis over lanes."""
    if not isinstance(solution, Solution):
        raise TypeError(
            "`solution` must be that of a sweep, got "
            f"{solution!r} of type {type(solution).__name__}."
        )
    if np.ndim(cast(Any, solution.stats["loss"])) != 1:
        raise ValueError(
            "`solution` must have one axis over lanes; its loss has the shape "
            f"{np.shape(cast(Any, solution.stats['loss']))}."
        )
    return solution
