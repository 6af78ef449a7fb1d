"""Callbacks: what they are given, how to combine them, and ready-made ones.

A ready-made callback runs under every transformation, as any callback does.
"""

from ._args import CallbackArgs, CallbackFnType, Lane, combine, traced
from ._ready_made import (
    Checkpoint,
    NoProgress,
    Progress,
    Record,
    Recorder,
    TimeLimit,
    small_gradient,
)

__all__ = [
    "CallbackArgs",
    "CallbackFnType",
    "Checkpoint",
    "Lane",
    "NoProgress",
    "Progress",
    "Record",
    "Recorder",
    "TimeLimit",
    "combine",
    "small_gradient",
    "traced",
]


def __dir__() -> list[str]:
    return __all__
