"""Many solves as one job, and tables and plots of them."""

from ._collect import SweepInterrupted as SweepInterrupted
from ._sweep import sweep as sweep
from ._table import SweepTable as SweepTable
from ._table import best_lane as best_lane
from ._table import failed_lanes as failed_lanes
from ._table import table as table
