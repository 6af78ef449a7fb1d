"""What a sweep has finished, in a directory, for a run that may be killed.

A store keeps what came out of each block of lanes, in files that are written once.
The blocks of a sweep are a function of its arguments and of what came out of the blocks
before, so a run that reads some of them goes on exactly as the one that wrote them.

Each file says which sweep it is of. Nothing is removed or overwritten that may be
somebody else's: a file that cannot be used stays where it is, and is named.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from .._files import locked, read_npz, write_npz

_MANIFEST = "sweep.npz"
_LEFTOVER = re.compile(r"\.(\d+|sweep)\.npz\w{8}")

_T = TypeVar("_T")


class Layout(NamedTuple):
    """How the lanes of a sweep are put into blocks, which its results depend on.

    Attributes:
      width: The width of a batch.
      devices: Over how many devices it was split when the sweep was begun.
    """

    width: int
    devices: int


class _Manifest(NamedTuple):
    identity: Mapping[str, str]
    layout: Layout
    releases: Mapping[str, str]


def check_directory(directory: str | os.PathLike[str]) -> None:
    """Makes a directory, and refuses one in which nothing can be written.

    Raises:
      OSError: If it cannot be written.
    """
    with _named(directory):
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass


def is_kept(directory: Path) -> bool:
    """Whether a directory is one of a sweep."""
    return (directory / _MANIFEST).exists()


@contextlib.contextmanager
def _named(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Says what an exception of the file system is about."""
    try:
        yield
    except OSError as e:
        raise type(e)(
            "`checkpoint_dir` must be a directory that can be written, got "
            f"{str(directory)!r}: {e.strerror or e}."
        ) from e


class CheckpointStore:
    """A directory of records, each of them arrays by name.

    Attributes:
      layout: That of the sweep whose records the directory has; None if it has none.
    """

    def __init__(self, directory: str | os.PathLike[str], every: float = 1.0):
        """Opens a directory that has been checked. To be used as a context.

        Args:
          directory: Where.
          every: How many seconds may pass before what was added is written.

        Raises:
          ValueError: If the directory has records, and what they are of cannot be read.
          OSError: If it cannot be read, or another sweep is at work in it.
        """
        self._directory, self._every = Path(directory), every
        self._new: dict[str, np.ndarray] = {}
        self._written = time.monotonic()
        self._known: dict[str, list[tuple[Path, dict[str, np.ndarray]]]] = {}
        self._unusable: list[str] = []
        self._number = 0
        self._digest = ""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self._directory))
            except BlockingIOError as e:
                raise BlockingIOError(
                    f"`checkpoint_dir` {str(directory)!r} is in use: another sweep is "
                    "at work in it."
                ) from e
            with _named(directory):
                self._manifest = self._read_manifest()
            self._lock = stack.pop_all()
        self.layout = None if self._manifest is None else self._manifest.layout

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def begin(
        self, identity: Mapping[str, str], layout: Layout, releases: Mapping[str, str]
    ) -> None:
        """Says what the records are of.

        Args:
          identity: What has to be the same where a sweep goes on, by name.
          layout: How its lanes are put into blocks.
          releases: Those that compute it: mentioned where something else differs.

        Raises:
          ValueError: If the directory has records of something else.
          OSError: If it cannot be written.
        """
        with _named(self._directory):
            for path in self._directory.iterdir():  # of a run that was killed
                if _LEFTOVER.fullmatch(path.name) and path.is_file():
                    path.unlink()
            if self._manifest is None:
                text = json.dumps([dict(identity), layout, dict(releases)])
                write_npz(self._directory / _MANIFEST, {"sweep": np.array(text)})
            else:
                self._compare(self._manifest, identity, releases)
        self._digest = _digest(identity, layout)
        self._read()

    def record(
        self, name: str, parse: Callable[[Mapping[str, np.ndarray]], _T]
    ) -> _T | None:
        """What was added by a name, perhaps by an earlier run.

        Args:
          name: The name.
          parse: Takes the arrays. Raises a `ValueError` if it cannot use them.

        Returns:
          What `parse` returns; None if there is no record that it can use.

        Warns:
          UserWarning: In that case, of files of the directory that cannot be used.
        """
        for path, arrays in self._known.pop(name, []):
            try:
                return parse(arrays)
            except ValueError as e:
                self._unusable.append(f"{path} cannot be used: {e}")
        for text in self._unusable:
            warnings.warn(
                f"`checkpoint_dir`: {text}. It is left as it is, and what the sweep "
                "misses is solved again.",
                stacklevel=2,
            )
        self._unusable.clear()
        return None

    def add(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds a record, and writes it now or soon."""
        self._new |= {f"{name}/{key}": array for key, array in arrays.items()}
        if time.monotonic() - self._written >= self._every:
            self.write()

    def write(self) -> None:
        """Writes all that has been added."""
        if self._new:
            while os.path.lexists(path := self._directory / f"{self._number:06}.npz"):
                self._number += 1
            write_npz(path, {"identity": np.array(self._digest), **self._new})
            self._new = {}
        self._written = time.monotonic()

    def remove(self) -> None:
        """Removes the records, what says whose they are, and the directory if empty."""
        if self._manifest is None:
            return
        digest = _digest(self._manifest.identity, self._manifest.layout)
        for path in self._files():
            with contextlib.suppress(ValueError):
                if str(read_npz(path).get("identity")) == digest:
                    path.unlink()
        (self._directory / _MANIFEST).unlink()
        self._directory.rmdir()

    def _read_manifest(self) -> _Manifest | None:
        path = self._directory / _MANIFEST
        if not os.path.lexists(path) and not self._files():
            return None
        try:
            identity, layout, releases = json.loads(str(read_npz(path)["sweep"]))
            manifest = _Manifest(dict(identity), Layout(*layout), dict(releases))
            if not all(isinstance(n, int) and n > 0 for n in layout):
                raise ValueError(f"{path} has an impossible layout, {layout}")
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"`checkpoint_dir` {str(self._directory)!r} is damaged: {e}. Remove "
                "it, or give another."
            ) from e
        return manifest

    def _compare(
        self,
        known: _Manifest,
        identity: Mapping[str, str],
        releases: Mapping[str, str],
    ) -> None:
        others = [
            f"{name} (there {known.identity.get(name)}, here {identity.get(name)})"
            for name in sorted({*known.identity, *identity})
            if known.identity.get(name) != identity.get(name)
        ]
        if not others:
            return
        note = ""
        if known.releases != dict(releases):
            there, here = (
                ", ".join(f"{name} {release}" for name, release in each.items())
                for each in (known.releases, releases)
            )
            note = f" It was begun with {there}; here are {here}."
        raise ValueError(
            f"`checkpoint_dir` {str(self._directory)!r} belongs to another sweep, "
            f"which differs in: {', '.join(others)}.{note} Repeat that call, remove "
            "the directory, or give another."
        )

    def _files(self) -> list[Path]:
        numbered = [p for p in self._directory.glob("*.npz") if p.stem.isdecimal()]
        return sorted(numbered, key=lambda path: int(path.stem))

    def _read(self) -> None:
        for path in self._files():
            self._number = max(self._number, int(path.stem) + 1)
            try:
                arrays = read_npz(path)
            except ValueError as e:
                self._unusable.append(str(e))
                continue
            if str(arrays.pop("identity", None)) != self._digest:
                self._unusable.append(f"{path} does not belong to this sweep")
                continue
            records: dict[str, dict[str, np.ndarray]] = {}
            for key, array in arrays.items():
                name, _, part = key.rpartition("/")
                records.setdefault(name, {})[part] = array
            for name, record in records.items():
                self._known.setdefault(name, []).append((path, record))


def _digest(identity: Mapping[str, str], layout: Layout) -> str:
    text = json.dumps([dict(sorted(identity.items())), layout])
    return hashlib.sha256(text.encode()).hexdigest()


def remove_records(directory: Path) -> None:
    """Removes what a sweep has kept in a directory, and nothing else.

    The directory goes, too, if it is empty then. (While another sweep is at work in it,
    or if it cannot be read, nothing is removed.)
    """
    with contextlib.suppress(OSError, ValueError), CheckpointStore(directory) as store:
        store.remove()
