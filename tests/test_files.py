"""Files are whole or not there, of any dtype, and the user's."""

import os
import stat
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from jaxmf_opt import solve
from jaxmf_opt._files import locked, read_npz, replacing, write_npz
from jaxmf_opt.callbacks import Checkpoint

OF_JAX = [
    np.dtype(scalar)
    for scalar in vars(ml_dtypes).values()
    if isinstance(scalar, type) and issubclass(scalar, np.generic)
]
OF_NUMPY = [np.dtype(x) for x in ("?", "<i4", ">f8", "f2", "c16", "u1", "U3")]


@st.composite
def arrays(draw: Any) -> np.ndarray:
    dtype = draw(st.sampled_from(OF_JAX + OF_NUMPY))
    shape = draw(arrays_of.array_shapes(min_dims=0, min_side=0, max_side=4))
    x = draw(arrays_of.arrays(np.int8, shape)).astype(dtype)
    return x.T if draw(st.booleans()) else x[..., ::2] if x.ndim else x


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=99)
@given(st.dictionaries(st.sampled_from(["a", "0.1/3", "0.1/30", "b c"]), arrays()))
def test_same_bits(directory: Path, want: dict[str, np.ndarray]):
    write_npz(directory / "x.npz", want)
    got = read_npz(directory / "x.npz")
    assert [*got] == [*want]
    for name, x in want.items():
        assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape)
        assert got[name].tobytes() == x.tobytes()


def test_every_dtype(tmp_path: Path):
    """Also those of a release of ml_dtypes that is not there yet."""
    assert {"bfloat16", "float8_e5m2", "int4"} <= {dtype.name for dtype in OF_JAX}
    want = {dtype.name: np.arange(2).astype(dtype) for dtype in OF_JAX}
    write_npz(tmp_path / "x.npz", want)
    got = read_npz(tmp_path / "x.npz")
    assert {name: x.dtype for name, x in got.items()} == {d.name: d for d in OF_JAX}


def counting(dtype: str) -> optax.GradientTransformation:
    """Steps that grow, by a number in the state."""

    def init(params: Any) -> Any:
        del params
        return jnp.ones((), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        rate = 0.01 * state.astype(updates.dtype)
        return -rate * updates, (state.astype(float) + 1).astype(dtype)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2", "float8_e4m3fn", "int4"])
def test_a_checkpoint(dtype: str, tmp_path: Path):
    """Of an optimizer and parameters of few bits: goes on, to the bit."""
    checkpoint = Checkpoint(tmp_path / "run.npz")

    def solved(steps: int, state: Any = None) -> Any:
        return solve(
            lambda y: jnp.sum((y - 1.0) ** 2),
            jnp.zeros(3, dtype),
            optimizer=counting(dtype),
            max_optimizer_steps=steps,
            callback=checkpoint,
            state=state,
        )

    solved(3)
    got, want = solved(6, checkpoint.load()), solved(6)
    assert got.value.dtype == got.state.minimiser.opt_state.dtype == dtype
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.skipif(os.name != "posix", reason="permissions")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions(umask: int, tmp_path: Path):
    """Those of any file that the user makes."""
    before = os.umask(umask)
    try:
        for _ in range(2):  # the second takes the place of the first
            write_npz(tmp_path / "new" / "x.npz", {"x": np.ones(1)})
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode for name in ("new/x.npz", "other")]
    assert stat.S_IMODE(modes[0]) == stat.S_IMODE(modes[1]) == 0o666 & ~umask


def test_is_whole_or_not_there(tmp_path: Path):
    path = tmp_path / "x.npz"
    for old in (None, {"x": np.ones(2)}):
        if old is not None:
            write_npz(path, old)
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        with pytest.raises(KeyboardInterrupt), replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="no locks")
def test_what_is_no_file(tmp_path: Path):
    """A pipe is not waited for."""
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("pipe.npz", "", "nothing"):
        with pytest.raises(ValueError, match="cannot be read: it is no file"):
            read_npz(tmp_path / name)


@pytest.mark.skipif(os.name != "posix", reason="no locks")
def test_one_owner(tmp_path: Path):
    refused: list[BaseException] = []

    def try_it() -> None:
        try:
            with locked(tmp_path):
                pass
        except BlockingIOError as e:
            refused.append(e)

    for _ in range(2):
        with locked(tmp_path):
            thread = threading.Thread(target=try_it)
            thread.start()
            thread.join()
    try_it()
    assert len(refused) == 2
