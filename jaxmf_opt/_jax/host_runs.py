"""Loops that call the host, as the host sees them: runs.

A run is opened before its loop and closed behind it. What a call raises ends the run,
and is raised when it is closed: on all devices, since one that goes on alone would wait
for the others in vain.
"""

import collections
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

# Called with the index of a lane in its batch and with what is known about it.
Listener = Callable[[tuple[int, ...], Sequence[np.ndarray | np.generic]], bool]


@runtime_checkable
class Host(Protocol):
    """Who is called. Hashable: equal hosts share compiled programs."""

    def listen(self) -> Listener:
        """Opens a run, and returns who listens to it."""
        ...


class Team:
    """The runs of one solve on all the devices of a `jax.shard_map`.

    When one fails, all must: a device that went on to a collective operation would wait
    for the failed one, and XLA then aborts the process. So each waits for the others
    at its end, until all have closed or one has failed.
    """

    # Seconds without any sign of the others after which a run goes on alone. A device
    # may have taken another branch; and a step, or a Python callback, may take long.
    PATIENCE_BEFORE_OPEN = 2.0
    PATIENCE = 60.0

    def __init__(self, size: int):
        self.size = size
        self.failure: BaseException | None = None
        self._changed = threading.Condition()
        self._threads: set[int] = set()  # one for each device: it will wait in `close`
        self._closed = self._calling = 0
        self._sealed = False

    def join(self) -> bool:
        """Adds a run, unless this device has one here or it is too late."""
        with self._changed:
            thread = threading.get_ident()
            if self.is_closed_to_others or thread in self._threads:
                return False
            self._threads.add(thread)
            self._changed.notify_all()
            return True

    @property
    def is_closed_to_others(self) -> bool:
        return self._sealed or len(self._threads) == self.size

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """While a listener is called, everybody has patience."""
        with self._changed:
            self._calling += 1
        try:
            yield
        finally:
            with self._changed:
                self._calling -= 1
                self._changed.notify_all()

    def fail(self, failure: BaseException) -> None:
        with self._changed:
            self.failure = self.failure or failure
            self._changed.notify_all()

    def close(self) -> None:
        """Waits for the other runs: for their end, or after a failure their start."""
        with self._changed:
            self._closed += 1
            self._changed.notify_all()
            while not self._sealed:
                opened = len(self._threads)
                known = self._closed if self.failure is None else opened
                if known == self.size:
                    break
                patience = self.PATIENCE
                if known == opened:  # all but those that have not come
                    patience = self.PATIENCE_BEFORE_OPEN
                if not self._changed.wait(patience) and not self._calling:
                    break
            self._sealed = True
            self._changed.notify_all()


class Run:
    """One loop, as the host sees it."""

    def __init__(self, listener: Listener, team: Team):
        self.team = team
        self._listener = listener

    def tell(
        self, shape: tuple[int, ...], operands: Sequence[np.ndarray], active: np.ndarray
    ) -> np.ndarray:
        """Calls the listener for the active lanes of a batch of this shape."""
        # XLA takes its buffers back after the call; what is kept must not change.
        lanes = [
            np.broadcast_to(x.copy(), shape + x.shape[len(shape) :]) for x in operands
        ]
        stop = np.zeros(shape, bool)
        with self.team.calling():
            for index in np.ndindex(shape):
                if self.team.failure is None and active[index]:
                    try:
                        stop[index] = self._listener(index, [x[index] for x in lanes])
                    except BaseException as e:  # KeyboardInterrupt too
                        self.team.fail(e)
        return stop if self.team.failure is None else np.ones(shape, bool)


class Runs:
    """All loops that are being run, and how the last ones failed."""

    def __init__(self):
        self._lock = threading.Lock()
        self._numbers = itertools.cycle(range(1, 2**31))
        self._open: dict[int, Run] = {}
        self._teams: dict[Host, list[Team]] = {}
        self._failures: collections.OrderedDict[int, BaseException]
        self._failures = collections.OrderedDict()

    def open(self, host: Host, devices: int) -> int:
        run = Run(host.listen(), self._team(host, devices))
        with self._lock:
            number = next(self._numbers)
            self._open[number] = run
        return number

    def _team(self, host: Host, devices: int) -> Team:
        with self._lock:
            waiting = self._teams.pop(host, [])
            for team in waiting:
                if team.size == devices and team.join():
                    break
            else:
                team = Team(devices)
                team.join()
                waiting.append(team)
            waiting = [t for t in waiting if not t.is_closed_to_others]
            if waiting:
                self._teams[host] = waiting
            return team

    def __getitem__(self, number: int) -> Run:
        return self._open[number]

    def close(self, number: int) -> None:
        """Raises the run's failure. Where many devices share it, each closes it."""
        run = self._open.get(number)
        if run is not None:
            run.team.close()
        with self._lock:
            run = self._open.pop(number, None)
            if run is not None and run.team.failure is not None:
                self._failures[number] = run.team.failure
                if len(self._failures) > 8:
                    self._failures.popitem(last=False)
            failure = self._failures.get(number)
        if failure is not None:
            raise RuntimeError(f"`callback` raised {_told(failure)} [run {number}]")

    def failure_of(self, number: int) -> BaseException | None:
        with self._lock:
            return self._failures.pop(number, None)


def _told(failure: BaseException) -> str:
    """What an exception is and says, as text that XLA can hand on.

    XLA ends a text at NUL, and the process at half of a surrogate pair.
    """
    try:
        text = f"{type(failure).__name__}: {failure}"
    except BaseException as e:  # whatever `__str__` does
        text = f"{type(failure).__name__} (its `__str__` raised {type(e).__name__})"
    return text.encode(errors="backslashreplace").decode().replace("\0", r"\x00")
