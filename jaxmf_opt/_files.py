"""Files that are either whole or not there."""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays into a file; leaves the old file or the new one whole.

    Args:
      path: The file. Missing directories are made.
      arrays: By name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **cast(Any, arrays))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads such a file.

    Args:
      path: The file.

    Returns:
      The arrays, by name.

    Raises:
      ValueError: If it is not whole, or no such file. (Each array has a checksum.)
    """
    try:
        with zipfile.ZipFile(path) as members:
            damaged = members.testzip()  # NumPy may not read to where the checksum is
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged!r} is wrong")
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as e:
        raise ValueError(f"{path} cannot be read: {e}") from e
