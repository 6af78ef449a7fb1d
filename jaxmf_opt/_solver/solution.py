"""The answer of a solve."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optimistix as optx
from jax.core import Tracer
from optimistix import RESULTS

from .._jax.pickling import reduced

# How a solve can end, and what to say of it where that is to be raised.
FAILURES = {
    "nonlinear_max_steps_reached": (
        "solve: the limit of `max_optimizer_steps` was reached before any of `rtol`, "
        "`atol`, `gtol` and `callback` ended the solve."
    ),
    "stagnation": (
        "solve: the line search cannot lower the loss any more, and the gradient is "
        "not small there. (On a kink of the loss it never is, not at a minimum either.)"
    ),
    "nonfinite": ("solve: the loss, its gradient or the parameters became non-finite."),
}
_NAMES = ("successful", *FAILURES)


class Solution(optx.Solution[Any, Any]):
    """An `optimistix.Solution`, whose `repr` says how the run went.

    Attributes:
      value: The last point whose loss is finite, in the dtypes of the parameters; NaN
        if there is none.
      result: `optimistix.RESULTS`: `successful`, `nonlinear_max_steps_reached`,
        `stagnation` (the line search cannot lower the loss any more, at a gradient that
        is not small), or `nonfinite`.
      aux: With `has_aux`, what the loss returns beside its value, at `value`.
      stats: Numbers about the run.
      state: A `SolverState`, to go on from.
      loss: The loss at `value`, float64 also where `stats` has it in float32.
      hyperparam_axes: Of a sweep, where each leaf of its hyperparameters has its lanes;
        None if all have them in front.
    """

    loss: Any = None
    hyperparam_axes: tuple[int | None, ...] | None = eqx.field(
        default=None, static=True
    )

    def __reduce__(self) -> tuple[Any, Any]:
        """All arrays as they are, also in a float32 program."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return reduced(type(self), fields)

    def __repr__(self) -> str:
        """Numbers where there are some, else types."""
        lines = [
            f"value={eqx.tree_pformat(self.value)}",
            f"result={_result(self.result)}",
            *(f"{name}={_numbers(x)}" for name, x in self.stats.items()),
            f"state=SolverState of {len(jax.tree.leaves(self.state))} arrays",
        ]
        return "Solution(\n  " + ",\n  ".join(lines) + "\n)"


def statuses(result: Any) -> np.ndarray:
    """The names of results, an array of the shape of theirs.

    Args:
      result: An `optimistix.RESULTS` of the results of this package.
    """
    names = np.full(np.shape(result._value), "", dtype=object)
    for name in _NAMES:
        names[np.asarray(result == getattr(RESULTS, name))] = name
    return names


def throw_failure(solution: Solution) -> Solution:
    """Returns a solution that raises if it is no success.

    Args:
      solution: The solution.

    Returns:
      The solution. In a compiled program the exception comes when it runs.

    Raises:
      equinox.EquinoxRuntimeError: If it is no success, or one lane of a batch is not.
    """
    result = solution.result
    known = not isinstance(result._value, Tracer)
    parts = lambda s: (s.value, s.result, s.stats)  # noqa: E731
    checked = parts(solution)
    for name, message in FAILURES.items():
        failed = result == getattr(RESULTS, name)
        if known and np.any(failed):
            raise eqx.EquinoxRuntimeError(message)
        if not known:
            checked = eqx.error_if(checked, failed, message)
    return eqx.tree_at(parts, solution, checked)


def _result(result: Any) -> str:
    if isinstance(result._value, Tracer):
        return "traced"
    names, counts = np.unique(statuses(result), return_counts=True)
    if np.ndim(result._value) == 0:
        return names[0]
    of_name = dict(zip(names, counts, strict=True))
    return " + ".join(f"{of_name[n]} {n}" for n in _NAMES if n in of_name)


def _numbers(x: Any) -> str:
    if not isinstance(x, (jax.Array, np.ndarray)) or isinstance(x, Tracer):
        return eqx.tree_pformat(x)
    values = np.asarray(x)
    if values.ndim == 0:
        return f"{values[()]:.6g}"
    if values.size == 0:
        return eqx.tree_pformat(x)
    known = values[~np.isnan(values)]
    if not known.size:
        return "nan"
    low, high = known.min(), known.max()
    text = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
    return text if known.size == values.size else f"{text}, or nan"
