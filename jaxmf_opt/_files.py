"""Files that are either whole or not there."""

import contextlib
import os
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import jax.numpy as jnp
import numpy as np

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to be written; leaves the old file or the new one whole.

    Args:
      path: The file. Missing directories are made.

    Yields:
      A binary file, which takes the place of `path` when the context is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}{secrets.token_hex(4)}")
    try:
        with new.open("xb") as file:  # (not by `tempfile`, whose files are private)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays into a file; leaves the old file or the new one whole.

    An array of one of JAX's own dtypes, such as bfloat16, which NumPy's files do not
    know, is written as unsigned integers, under a name with the dtype in it.

    Args:
      path: The file. Missing directories are made.
      arrays: By name.
    """
    encoded = {}
    for name, x in arrays.items():
        if x.dtype.isbuiltin == 2:  # a dtype that is registered with NumPy
            name, x = f"{name}@{x.dtype.name}", x.view(f"u{x.dtype.itemsize}")
        encoded[name] = x
    with replacing(path) as file:
        np.savez(file, **cast(Any, encoded))


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
        if not path.is_file():
            raise ValueError("it is no file")
        with zipfile.ZipFile(path) as members:
            damaged = members.testzip()  # NumPy may not read to where the checksum is
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged!r} is wrong")
        arrays = {}
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            for key in file.files:
                name, _, dtype = key.partition("@")
                arrays[name] = file[key].view(jnp.dtype(dtype)) if dtype else file[key]
        return arrays
    except Exception as e:
        raise ValueError(f"{path} cannot be read: {e}") from e


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps a directory to one owner at a time, as far as the file system can.

    Args:
      directory: The directory.

    Raises:
      BlockingIOError: If another process, or another thread, has it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
