"""What a sweep has finished, in a directory, for a run that may be killed.

A journal holds what came out of each block of lanes, in files that are written once.
The blocks of a sweep are a function of its arguments and of what came out of the blocks
before, so a run that reads some of them goes on exactly as the one that wrote them.
"""

import contextlib
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from .._files import read_npz, write_npz

_MANIFEST = "sweep.npz"
_LEFTOVER = re.compile(r"\.(\d+|sweep)\.npz\w{8}")


def check_directory(directory: str | os.PathLike[str]) -> None:
    """Makes a directory, and refuses one in which nothing can be written.

    Raises:
      OSError: If it cannot be written.
    """
    with _named(directory):
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass


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


class Journal:
    """A directory of records, each of them arrays by name."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        identity: Mapping[str, str],
        every: float = 1.0,
    ):
        """Opens a directory that has been checked.

        Args:
          directory: Where.
          identity: What the records are of, by name.
          every: How many seconds may pass before what was added is written.

        Raises:
          ValueError: If the directory has records of something else, or if what they
            are of cannot be read.
          OSError: If it cannot be written.
        """
        self._directory, self._every = Path(directory), every
        self._new: dict[str, np.ndarray] = {}
        self._written = time.monotonic()
        self._known: dict[str, dict[str, np.ndarray]] = {}
        self._number = 0
        with _named(directory):
            for path in self._directory.iterdir():
                if _LEFTOVER.fullmatch(path.name):  # of a run that was killed
                    path.unlink()
            self._check(identity)
        self._read()

    def record(self, name: str) -> dict[str, np.ndarray] | None:
        """What was added by this name, perhaps by an earlier run; else None."""
        return self._known.pop(name, None)

    def add(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds a record, and writes it now or soon."""
        self._new |= {f"{name}/{key}": array for key, array in arrays.items()}
        if time.monotonic() - self._written >= self._every:
            self.write()

    def write(self) -> None:
        """Writes all that has been added."""
        if self._new:
            write_npz(self._directory / f"{self._number:06}.npz", self._new)
            self._number += 1
            self._new = {}
        self._written = time.monotonic()

    def _check(self, identity: Mapping[str, str]) -> None:
        path = self._directory / _MANIFEST
        if not path.exists() and not self._files():
            text = json.dumps(dict(identity))
            write_npz(path, {"identity": np.array(text)})
            return
        try:
            known = json.loads(str(read_npz(path)["identity"]))
            if not isinstance(known, dict):
                raise ValueError(f"{path} does not say what the records are of")
        except (ValueError, KeyError) as e:
            raise ValueError(
                f"`checkpoint_dir` {str(self._directory)!r} is damaged: {e}. Remove "
                "it, or give another."
            ) from e
        others = [
            f"{name} (there {known.get(name)}, here {identity.get(name)})"
            for name in sorted({*known, *identity})
            if known.get(name) != identity.get(name)
        ]
        if others:
            raise ValueError(
                f"`checkpoint_dir` {str(self._directory)!r} belongs to another sweep, "
                f"which differs in: {', '.join(others)}. Repeat that call, remove the "
                "directory, or give another."
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
                path.unlink()
                warnings.warn(
                    f"`checkpoint_dir`: {e}. It is removed, and what was in it is "
                    "solved again.",
                    stacklevel=2,
                )
                continue
            for key, array in arrays.items():
                name, _, part = key.rpartition("/")
                self._known.setdefault(name, {})[part] = array
