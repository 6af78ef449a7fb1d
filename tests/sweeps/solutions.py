"""Solutions of sweeps that are made up."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from optimistix import RESULTS

from jaxmf_opt import History, Solution

OK, LIMIT, STAGNATION, NONFINITE = NAMES = (
    "successful",
    "nonlinear_max_steps_reached",
    "stagnation",
    "nonfinite",
)


def made(
    losses: Sequence[float], names: Sequence[str] | None = None, rows: Any = None
) -> Solution:
    """A solution of lanes of these losses and statuses.

    Args:
      losses: The losses at the end.
      names: The statuses; all are successful by default.
      rows: Losses and gradient norms where each step started, NaN after the last.
    """
    count = len(losses)
    of_lanes = [getattr(RESULTS, name) for name in names or [OK] * count]
    stats: dict[str, Any] = {
        "loss": jnp.array(losses, float),
        "grad_norm": jnp.arange(float(count)),
        "num_steps": jnp.arange(count) + 7,
    }
    if rows is not None:
        rows = jnp.array(rows, float)
        taken = jnp.where(jnp.isnan(rows), 0, jnp.arange(rows.shape[1]) + 1)
        stats["num_steps"] = taken.max(1, initial=0)
        stats["history"] = History(loss=rows, grad_norm=2 * rows, step_size=3 * rows)
    result = jax.tree.map(lambda *x: jnp.array(x), *of_lanes)
    values = jnp.zeros((count, 2))
    return Solution(value=values, result=result, aux=None, stats=stats, state=None)
