"""Comparing pytrees to the last bit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]


def arrays_of(tree: Any) -> Arrays:
    """The leaves by their places, random keys as their data."""
    out: Arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            name, leaf = f"{name} {leaf.dtype}", jax.random.key_data(leaf)
        out[name] = np.asarray(leaf)
    return out


def assert_same_bits(got: Any, want: Any) -> None:
    """Of pytrees, or of what `arrays_of` makes of them."""
    got, want = (x if isinstance(x, dict) else arrays_of(x) for x in (got, want))
    assert list(got) == list(want)
    for name, x in want.items():
        assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
        assert got[name].tobytes() == x.tobytes(), name


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Of each file, when it was written and what is in it."""
    files = directory.glob("[!.]*")  # a killed process may leave one with a dot
    return {
        p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in files if p.is_file()
    }
