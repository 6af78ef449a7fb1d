"""Callbacks: what they are given, how to combine them, and ready-made ones.

A ready-made callback runs under every transformation, as any callback does.
"""

from ._args import CallbackArgs as CallbackArgs
from ._args import CallbackFnType as CallbackFnType
from ._args import Lane as Lane
from ._args import combine as combine
from ._args import traced as traced
from ._ready_made import Checkpoint as Checkpoint
from ._ready_made import NoProgress as NoProgress
from ._ready_made import Progress as Progress
from ._ready_made import Record as Record
from ._ready_made import Recorder as Recorder
from ._ready_made import TimeLimit as TimeLimit
from ._ready_made import small_gradient as small_gradient
