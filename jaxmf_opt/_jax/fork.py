"""Refuses to solve in a process in which JAX would wait forever.

A process that is forked off another has none of its threads, and JAX waits for them. A
`multiprocessing` pool forks by default on Linux, up to Python 3.13.
"""

import os

from .compat import backends_are_initialized

_lost_threads = False


def check_process() -> None:
    """Refuses a process that has been forked off one in which JAX was running."""
    if _lost_threads:
        raise RuntimeError(
            "this process was forked off one that had used JAX, and JAX would wait "
            "here forever, for threads that stayed behind. Start processes with "
            "`multiprocessing.get_context('spawn')`, or before JAX is used."
        )


def _in_child() -> None:
    global _lost_threads
    _lost_threads = _lost_threads or backends_are_initialized()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_in_child)
