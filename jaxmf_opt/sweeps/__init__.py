"""Many solves as one job, and tables and plots of them."""

import importlib
from typing import TYPE_CHECKING, Any

from ._collect import SweepInterrupted
from ._sweep import sweep
from ._table import SweepTable, best_lane, failed_lanes, table

if TYPE_CHECKING:
    from . import plots

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


def __getattr__(name: str) -> Any:
    """Imports the plots where they are used, as they need matplotlib."""
    if name == "plots":
        return importlib.import_module(".plots", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
