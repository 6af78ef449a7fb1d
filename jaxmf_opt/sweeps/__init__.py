"""Many solves as one job, and tables and plots of them."""

from . import plots
from ._collect import SweepInterrupted
from ._sweep import sweep
from ._table import SweepTable, best_lane, failed_lanes, table

__all__ = [
    "SweepInterrupted",
    "SweepTable",
    "best_lane",
    "failed_lanes",
    "plots",
    "sweep",
    "table",
]


def __dir__() -> list[str]:
    return __all__
