"""What a sweep has finished stays, whatever happens to its process or its files.

As a script, it is the process that is killed or interrupted.
"""

import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bits import Arrays, arrays_of, assert_same_bits
from processes import environment, report_of

from jaxmf_opt import DEFAULT_OPTIMIZER, CallbackArgs, Solution, sweep, traced
from jaxmf_opt._files import read_npz, write_npz
from jaxmf_opt.sweeps import SweepInterrupted, _batch, _checkpoints, _sweep
from jaxmf_opt.sweeps._checkpoints import CheckpointStore, Layout, remove_records
from jaxmf_opt.sweeps._progress import ProgressBar


def numbered(directory: Path) -> list[Path]:
    return sorted(directory.glob("[0-9]*.npz"))


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Of each file, when it was written and what is in it."""
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in directory.iterdir()}


# First, sweeps that take a moment, in this process.

LANES, WIDTH = 24, 8
CURVATURES = np.geomspace(1.0, 20.0, LANES)[np.random.default_rng(0).permutation(LANES)]
START = np.array([0.5, -0.5, 0.25])
WEIGHTS = np.array([1.0, 1.5, 2.0])


def with_weights(weights: Any, power: int = 4) -> Callable[[Any, Any], Any]:
    return lambda y, c: c * jnp.sum(weights * (y - 1) ** 2) + jnp.sum((y - 1) ** power)


valley = with_weights(WEIGHTS)


def small(checkpoint_dir: Any = None, **changes: Any) -> Solution:
    arguments: dict[str, Any] = {
        "loss_fn": valley,
        "params": START,
        "hyperparams": CURVATURES,
        "batch_size": WIDTH,
        "max_optimizer_steps": 999,
        "optimizer": optax.sgd(0.01),
        "gtol": 1e-3,
        "checkpoint_dir": checkpoint_dir,
    }
    return sweep(**(arguments | changes))


@functools.cache
def small_solution() -> Solution:
    return small()


@pytest.fixture
def a_file_for_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits to be written with something else."""
    monkeypatch.setattr(
        _sweep, "CheckpointStore", functools.partial(CheckpointStore, every=0.0)
    )


def noisy(*_: Any) -> Any:
    """An optimizer whose state has random keys."""
    noise = optax.add_noise(1e-4, 1.0, jax.random.key(7))
    return optax.chain(noise, optax.sgd(0.01))


KINDS: dict[str, dict[str, Any]] = {
    "without states": {"history": True, "keep_states": False},
    "default optimizer": {"optimizer": DEFAULT_OPTIMIZER, "gtol": 1e-9},
    "random keys": {"optimizer": noisy},
    "a callback that stops": {"callback": traced(lambda info: info.loss < 0.5)},
    "one batch": {"batch_size": LANES},
    "few bits": {
        "loss_fn": lambda y, c: valley(y, c.astype(y.dtype)),
        "params": jnp.asarray(START, jnp.float8_e5m2),
        "hyperparams": CURVATURES.astype(jnp.bfloat16),
        "optimizer": optax.adam(0.01, mu_dtype=jnp.bfloat16),
    },
}


class TestSameBits:
    def check(self, directory: Path, options: dict[str, Any]) -> None:
        without = small(**options)
        assert_same_bits(small(directory, **options), without)
        before = contents(directory)
        # A file says whose they are, and there is one for each block.
        assert len(before) > LANES // options.get("batch_size", WIDTH)
        assert_same_bits(small(str(directory), **options), without)
        assert contents(directory) == before

    @pytest.mark.usefixtures("a_file_for_each_block")
    def test_with_a_directory_and_a_second_time(self, x64: bool, tmp_path: Path):
        del x64
        self.check(tmp_path / "a" / "b", {})

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.usefixtures("a_file_for_each_block")
    def test_of_each_kind(self, kind: str, tmp_path: Path):
        self.check(tmp_path, KINDS[kind])

    def test_nothing_is_solved_a_second_time(self, tmp_path: Path):
        executions = 0

        def tick() -> None:
            nonlocal executions
            executions += 1

        def counted(y: Any, c: Any) -> Any:
            jax.debug.callback(tick)
            return valley(y, c)

        first = small(tmp_path, loss_fn=counted)
        jax.effects_barrier()
        assert executions > LANES
        executions = 0
        assert_same_bits(small(tmp_path, loss_fn=counted), first)
        jax.effects_barrier()
        assert executions == 0

    def test_options_that_change_nothing(self, tmp_path: Path):
        """And another closure over the same arrays."""
        small(tmp_path)
        before = contents(tmp_path)
        loss = with_weights(WEIGHTS.copy())
        again = small(tmp_path, loss_fn=loss, throw=True, progress=True)
        assert_same_bits(again, small_solution())
        assert contents(tmp_path) == before

    def test_a_sweep_that_goes_on(self, tmp_path: Path):
        """From the states of an earlier one, which are a part of what it is."""
        first = small(max_optimizer_steps=4)
        for _ in range(2):
            rest = small(tmp_path, state=first.state)
            assert_same_bits(rest, small(state=first.state))
        before = contents(tmp_path)
        other = small(max_optimizer_steps=5).state
        with pytest.raises(
            ValueError, match=r"`checkpoint_dir` .*differs between lane"
        ):
            small(tmp_path, state=other)
        assert contents(tmp_path) == before


def begun(directory: Path) -> CheckpointStore:
    """A store of a sweep, of which there is nothing else. It is closed."""
    with CheckpointStore(directory) as store:
        store.begin({"of": "a"}, Layout(8, 1), {})
    return store


class TestJournal:
    """The directory by itself."""

    def test_is_written_now_and_then(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        now = 100.0
        monkeypatch.setattr(_checkpoints.time, "monotonic", lambda: now)
        store = begun(tmp_path)
        records = {f"0.{i}": {"x": np.full(3, i)} for i in range(4)}
        for i, (name, record) in enumerate(records.items()):
            now += 0.4
            store.add(name, record)
            assert len(numbered(tmp_path)) == (i >= 2)
        store.write()
        store.write()  # there is nothing left
        assert len(numbered(tmp_path)) == 2
        again = begun(tmp_path)
        for name, record in records.items():
            known = again.record(name, dict)
            assert known is not None
            np.testing.assert_equal(known, record)
        assert again.record("0.4", dict) is None

    def test_by_default_once_a_second(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("time.monotonic", lambda: 0.0)
        small(tmp_path)  # as if it took less
        assert [p.name for p in numbered(tmp_path)] == ["000000.npz"]


def cut(path: Path, size: Callable[[int], int]) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: size(len(data))])


def flip(path: Path, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def flip_in_value(path: Path) -> None:
    """In the number that a lane's result is."""
    (name,) = (key for key in read_npz(path) if key.endswith("/0"))
    value = read_npz(path)[name]
    assert value.dtype in (np.float32, np.float64)
    flip(path, path.read_bytes().index(value.tobytes()) + value.itemsize, 5)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: cut(path, lambda n: 0),
    "first bytes": lambda path: cut(path, lambda n: 20),
    "half": lambda path: cut(path, lambda n: n // 2),
    "last byte missing": lambda path: cut(path, lambda n: n - 1),
    "a bit of a result": flip_in_value,
    "a bit of the first array's name": lambda path: flip(path, 31, 0),
    "text": lambda path: path.write_text("nothing of a sweep"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a sweep that has been finished."""
    directory = tmp_path_factory.mktemp("template")
    store = functools.partial(CheckpointStore, every=0.0)
    with mock.patch.object(_sweep, "CheckpointStore", store):
        assert_same_bits(small(directory), small_solution())
    assert len(numbered(directory)) == LANES // WIDTH + 1
    return directory


def reopened(directory: Path, least: int = 0) -> dict[str, Arrays | None]:
    """What a store knows of the blocks of `template`, of so many arrays at least."""

    def parse(arrays: Any) -> Arrays:
        if len(arrays) < least:
            raise ValueError("arrays are missing")
        return arrays

    identity, layout, releases = json.loads(
        str(read_npz(directory / "sweep.npz")["sweep"])
    )
    with CheckpointStore(directory) as store:
        store.begin(identity, Layout(*layout), releases)
    return {name: store.record(name, parse) for name in ("0.0", "0.1", "0.2", "1.0")}


@pytest.mark.usefixtures("a_file_for_each_block")
class TestDamage:
    """Of a directory that is whole but for one thing."""

    @pytest.fixture
    def directory(self, template: Path, tmp_path: Path) -> Path:
        return shutil.copytree(template, tmp_path / "kept")

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_of_files(self, damage: str, directory: Path):
        """Their lanes are solved again, and no others are."""
        files = numbered(directory)
        bad = [files[1], files[-1]]
        for path in bad:
            DAMAGE[damage](path)
        before = contents(directory)
        with pytest.warns(UserWarning, match="`checkpoint_dir`") as record:
            again = small(directory)
        for path, warning in zip(bad, record, strict=True):
            assert path.name in str(warning.message)
        assert_same_bits(again, small_solution())
        after = contents(directory)
        written = [name for name, file in after.items() if file != before.get(name)]
        assert len(written) == len(bad)
        assert {name: after[name] for name in before} == before

    def test_of_all_files(self, directory: Path):
        files = numbered(directory)
        for path in files:
            cut(path, lambda n: n // 3)
        with pytest.warns(UserWarning, match="`checkpoint_dir`") as record:
            assert_same_bits(small(directory), small_solution())
        assert len(record) == len(files)

    def test_of_any_bit(self, directory: Path):
        """If nothing is said of it, it did nothing."""
        draw, want = random.Random(0), reopened(directory)
        path, said = numbered(directory)[1], 0
        kept, least = path.read_bytes(), len(want["0.0"] or ())
        for _ in range(150):
            flip(path, draw.randrange(len(kept)), draw.randrange(8))
            with warnings.catch_warnings(record=True) as record:
                warnings.simplefilter("always")
                known = reopened(directory, least)
            path.write_bytes(kept)
            if record:
                said += 1
                assert path.name in str(record[0].message)
                lost = [name for name, arrays in known.items() if arrays is None]
                assert len(lost) == 1
                del known[lost[0]]
            for name, arrays in known.items():
                assert_same_bits(arrays, want[name])
        assert said > 50

    def test_of_any_bit_that_says_what_an_array_is(self, tmp_path: Path):
        """Also where the array is larger than what is read at a time."""
        path, arrays = tmp_path / "x.npz", {"0.1/0": np.ones((256, 3))}
        write_npz(path, arrays)
        kept, said = path.read_bytes(), 0
        header = range(kept.index(b"{"), kept.index(b"}"))
        for byte, bit in itertools.product(header, range(8)):
            flip(path, byte, bit)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert_same_bits(read_npz(path), arrays)
                except ValueError:
                    said += 1
            path.write_bytes(kept)
        assert said > 400

    def test_of_arrays(self, directory: Path):
        """A record that is whole as a file, and not what a sweep has written."""
        path = numbered(directory)[1]
        arrays = read_npz(path)
        keys = sorted(set(arrays) - {"identity"})
        draw = random.Random(0)
        for damage in (
            *(lambda key: [(key, None)],) * 6,
            *(lambda key: [(key, arrays[key][..., None])],) * 4,
            *(lambda key: [(key, arrays[key][:-1])],) * 4,
            *(lambda key: [(key, arrays[key].astype("S3"))],) * 4,
            lambda _: [("identity", None)],
            lambda _: [("identity", np.array("another"))],
            lambda key: [(f"{key.partition('/')[0]}/lanes", np.arange(WIDTH) + 1)],
        ):
            changed = arrays | dict(damage(draw.choice(keys)))
            write_npz(path, {k: x for k, x in changed.items() if x is not None})
            before = contents(directory)
            with pytest.warns(UserWarning, match=path.name):
                assert_same_bits(small(directory), small_solution())
            after = contents(directory)
            assert {name: after[name] for name in before} == before
            (added,) = {*after} - {*before}
            (directory / added).unlink()

    def test_of_another_sweep(self, directory: Path, tmp_path: Path):
        """Which has as many lanes, of the same shapes."""
        other = tmp_path / "other"
        small(other, hyperparams=CURVATURES[::-1].copy())
        path = numbered(directory)[1]
        shutil.copy(numbered(other)[1], path)
        with pytest.warns(UserWarning, match=rf"{path.name} .*not belong to this sw"):
            assert_same_bits(small(directory), small_solution())
        assert path.read_bytes() == numbered(other)[1].read_bytes()

    def test_in_the_place_of_files(self, directory: Path):
        """Directories and links to nowhere are named, and stay."""
        first, second, *_ = numbered(directory)
        for path in (first, second):
            path.unlink()
        first.mkdir()
        second.symlink_to("nowhere")
        leftover = directory / ".000009.npz0123abcd"
        leftover.mkdir()
        with pytest.warns(UserWarning) as record:
            assert_same_bits(small(directory), small_solution())
        assert {first.name, second.name} <= {
            name
            for warning in record
            for name in re.findall(r"\w+\.npz", str(warning.message))
        }
        assert first.is_dir()
        assert leftover.is_dir()
        assert second.readlink() == Path("nowhere")
        assert_same_bits(small(directory), small_solution())  # says nothing

    def test_removed(self, directory: Path, tmp_path: Path):
        """All that the sweep has written, and nothing else."""
        small(tmp_path / "other", hyperparams=CURVATURES[::-1].copy())
        shutil.copy(numbered(tmp_path / "other")[0], directory / "000099.npz")
        (directory / "000100.npz").write_bytes(b"")
        (directory / "notes").touch()
        with CheckpointStore(directory):
            remove_records(directory)  # while a sweep is at work
        assert (directory / "sweep.npz").exists()
        remove_records(directory)
        names = {path.name for path in directory.iterdir()}
        assert names == {"000099.npz", "000100.npz", "notes"}
        remove_records(tmp_path / "other")
        assert not (tmp_path / "other").exists()

    def test_files_that_are_missing(self, directory: Path):
        files = numbered(directory)
        for path in (files[0], files[-1]):
            path.unlink()
        left = contents(directory)
        assert_same_bits(small(directory), small_solution())
        # Two blocks are solved again, and nothing is written over.
        assert len(numbered(directory)) == len(files)
        after = contents(directory)
        assert {name: after[name] for name in left} == left

    def test_is_told_once(self, directory: Path):
        """There is nothing to solve again when that has been done."""
        cut(numbered(directory)[1], lambda n: n // 2)
        with pytest.warns(UserWarning, match=r"000001\.npz"):
            small(directory)
        assert_same_bits(small(directory), small_solution())

    def test_what_a_killed_write_leaves(self, directory: Path):
        data = numbered(directory)[0].read_bytes()
        numbered(directory)[-1].unlink()
        for name in (".000003.npzk3x_9a2b", ".sweep.npz0123abcd"):
            (directory / name).write_bytes(data[: len(data) // 2])
        (directory / "notes.txt").write_text("mine")
        assert_same_bits(small(directory), small_solution())
        names = {p.name for p in directory.iterdir()}
        assert not any(name.startswith(".") for name in names)
        assert (directory / "notes.txt").read_text() == "mine"

    def test_files_of_somebody_else(self, directory: Path):
        """Are left alone, and do no harm."""
        for name in (".backup.npz", "0 (copy).npz", "results.npz"):
            write_npz(directory / name, {"x": np.zeros(2)})
        before = contents(directory)
        assert_same_bits(small(directory), small_solution())
        assert contents(directory) == before

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_of_what_says_whose_it_is(self, damage: str, directory: Path):
        path = directory / "sweep.npz"
        if damage == "a bit of a result":  # of the text
            flip(path, path.read_bytes().index(b"k\0\0\0e\0\0\0e\0\0\0p"), 1)
        else:
            DAMAGE[damage](path)
        before = contents(directory)
        with pytest.raises(ValueError, match=r"`checkpoint_dir` .*is damaged") as e:
            small(directory)
        assert str(directory) in str(e.value)
        assert contents(directory) == before

    @pytest.mark.parametrize("text", [None, 3.0, "{", "[]", "0"])
    def test_nonsense_in_the_place_of_it(self, text: Any, directory: Path):
        arrays = {} if text is None else {"sweep": np.array(text)}
        write_npz(directory / "sweep.npz", arrays)
        with pytest.raises(ValueError, match=r"`checkpoint_dir` .*is damaged"):
            small(directory)

    def test_nothing_says_whose_it_is(self, directory: Path):
        """These may be the results of anything."""
        (directory / "sweep.npz").unlink()
        before = contents(directory)
        with pytest.raises(ValueError, match="`checkpoint_dir`"):
            small(directory, loss_fn=with_weights(2 * WEIGHTS))
        assert contents(directory) == before


def ulp(x: np.ndarray, index: int) -> np.ndarray:
    """The same but for the last bit of one element."""
    x = x.copy()
    x[index] = np.nextafter(x[index], np.inf)
    return x


SHARED, DIFFERS, SIZE = (
    "loss, options and what all lanes share",
    "what differs between lanes",
    "batch_size",
)


class Other(NamedTuple):
    """Another sweep than `base`, and what the message has to name."""

    changes: dict[str, Any]
    words: str
    base: dict[str, Any] = {}  # noqa: RUF012


OTHERS: dict[str, Other] = {
    "params": Other({"params": ulp(START, 1)}, SHARED),
    "params of each lane": Other(
        {"params": ulp(np.tile(START, LANES), 5).reshape(LANES, 3)},
        DIFFERS,
        {"params": np.tile(START, (LANES, 1)), "in_axes": (0, 0)},
    ),
    "dtype of params": Other({"params": START.astype(np.float32)}, SHARED),
    "hyperparams": Other({"hyperparams": ulp(CURVATURES, -1)}, DIFFERS),
    "order of hyperparams": Other({"hyperparams": CURVATURES[::-1]}, DIFFERS),
    "fewer lanes": Other({"hyperparams": CURVATURES[:-1]}, "lanes of this process"),
    "formula": Other({"loss_fn": with_weights(WEIGHTS, 6)}, SHARED),
    "number in the formula": Other(
        {"loss_fn": lambda y, c: valley(y, c) + 1e-300}, SHARED
    ),
    "what the loss closes over": Other(
        {"loss_fn": with_weights(ulp(WEIGHTS, 2))}, SHARED
    ),
    "what a compiled part of the loss closes over": Other(
        {"loss_fn": jax.jit(with_weights(ulp(WEIGHTS, 2)))},
        SHARED,
        {"loss_fn": jax.jit(with_weights(WEIGHTS))},
    ),
    "optimizer": Other({"optimizer": optax.adam(0.01)}, SHARED),
    "number in the optimizer": Other(
        {"optimizer": optax.sgd(float(np.nextafter(0.01, 1)))}, SHARED
    ),
    "number in an optimizer of a hyperparameter": Other(
        {"optimizer": lambda c: optax.sgd(0.02 / c)},
        SHARED,
        {"optimizer": lambda c: optax.sgd(0.01 / c)},
    ),
    "random key of the optimizer": Other(
        {"optimizer": optax.add_noise(0.1, 0.5, jax.random.key(1))},
        SHARED,
        {"optimizer": optax.add_noise(0.1, 0.5, jax.random.key(0))},
    ),
    "rtol": Other({"rtol": 1e-9}, SHARED),
    "gtol": Other({"gtol": 1.1e-3}, SHARED),
    "tolerance of a hyperparameter": Other(
        {"gtol": lambda c: 1e-3 * c}, SHARED, {"gtol": lambda c: 2e-3 * c}
    ),
    "steps": Other({"max_optimizer_steps": 998}, SHARED),
    "history": Other({"history": True}, SHARED),
    "grad": Other({"loss_fn": jax.value_and_grad(valley), "grad": True}, SHARED),
    "callback": Other({"callback": traced(lambda info: info.loss < 1)}, SHARED),
    "what a callback closes over": Other(
        {"callback": traced(lambda info: info.params[0] > ulp(START, 0)[0])},
        SHARED,
        {"callback": traced(lambda info: info.params[0] > START[0])},
    ),
    "batch_size": Other({"batch_size": 12}, SIZE),
    "keep_states": Other({"keep_states": False}, "keep_states"),
}


class NotCompiledError(Exception):
    pass


class NotCompiled:
    """In the place of a program that would be run, if the sweep were not refused."""

    def __call__(self, *_: Any) -> Any:
        raise NotCompiledError


@pytest.fixture
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_batch, "_compile", _batch._compile.__wrapped__)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda _: NotCompiled())


class TestOtherSweep:
    @pytest.mark.parametrize("what", OTHERS)
    @pytest.mark.usefixtures("nothing_is_compiled")
    def test_is_refused(self, what: str, template: Path, tmp_path: Path):
        changes, words, base = OTHERS[what]
        directory = tmp_path if base else template
        if base:
            for _ in range(2):  # the second goes on from the first
                with pytest.raises(NotCompiledError):
                    small(directory, **base)
        before = contents(directory)
        with pytest.raises(ValueError, match=r"`checkpoint_dir` .*another sweep") as e:
            small(directory, **base | changes)
        assert words in str(e.value)
        assert str(directory) in str(e.value)
        assert contents(directory) == before

    def test_only_what_differs_is_named(self, template: Path):
        with pytest.raises(ValueError, match="another sweep") as e:
            small(template, hyperparams=ulp(CURVATURES, 3))
        assert DIFFERS in str(e.value)
        assert SHARED not in str(e.value)
        for word in (SIZE, "keep_states", "platform", "jaxlib", "devices"):
            assert word not in str(e.value)

    def test_in_a_float64_program(self, template: Path):
        """It has results of other types."""
        with jax.enable_x64(), pytest.raises(ValueError, match="another sweep"):
            small(template)

    @pytest.mark.parametrize("package", ["jax", "jaxlib"])
    @pytest.mark.parametrize("patch", [False, True])
    def test_of_another_release(
        self,
        package: str,
        patch: bool,
        template: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """A patch release goes on; and is mentioned where something else differs."""
        directory = shutil.copytree(template, tmp_path / "kept")
        real = _sweep.version
        release = f"{real(package).rpartition('.')[0]}.99" if patch else "0.0.1"

        def version(name: str) -> str:
            return release if name == package else real(name)

        monkeypatch.setattr(_sweep, "version", version)
        if patch:
            assert_same_bits(small(directory), small_solution())
            words = rf"{SHARED}.* {package} {real(package)}.* {package} {release}"
            with pytest.raises(ValueError, match=words):
                small(directory, gtol=1.1e-3)
        else:
            with pytest.raises(ValueError, match=rf"another sweep.*: {package} \(th"):
                small(directory)


class TestBadDirectory:
    @pytest.mark.parametrize("path", ["file", "file/below", "/proc/nowhere/below"])
    def test_cannot_be_written(self, path: str, tmp_path: Path):
        (tmp_path / "file").write_text("mine")
        where = tmp_path / path
        with pytest.raises(OSError, match="`checkpoint_dir`") as e:
            small(where)
        assert str(where) in str(e.value)
        assert (tmp_path / "file").read_text() == "mine"
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.skipif(
        not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write anywhere"
    )
    def test_of_somebody_else(self, tmp_path: Path):
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(PermissionError, match="`checkpoint_dir`"):
                small(tmp_path)
        finally:
            tmp_path.chmod(0o700)

    def test_is_no_path(self, tmp_path: Path):
        """In a process of its own, where no hook sees to the annotations."""
        result = tmp_path / "result.json"
        with Process(Job("no paths", str(result)), tmp_path / "log") as process:
            assert process.end() == 0, process.log()
        messages = json.loads(result.read_text())
        assert len(messages) == len(NO_PATHS)
        for message in messages:
            assert "`checkpoint_dir` must be a path" in message

    def test_beside_a_callback(self, tmp_path: Path):
        called = []
        with pytest.raises(ValueError, match=r"`checkpoint_dir`.*`callback`"):
            small(tmp_path / "new", callback=called.append)
        assert not called
        assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("a_file_for_each_block")
class TestElsewhere:
    """A directory that was begun with other cores or devices."""

    def test_cores(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """The default width depends on them; a directory keeps its own."""
        monkeypatch.setattr(_sweep, "num_workers", lambda _: 1)
        want = small(tmp_path, batch_size=None)
        monkeypatch.setattr(_sweep, "num_workers", lambda _: 8)
        monkeypatch.setattr(_sweep, "default_width", lambda *_: 3)
        numbered(tmp_path)[0].unlink()
        assert_same_bits(small(tmp_path, batch_size=None), want)
        # As a width, it may also be said.
        assert_same_bits(small(tmp_path, batch_size=LANES), want)
        with pytest.raises(ValueError, match=rf"{SIZE} .*there 24, here 8"):
            small(tmp_path)

    def test_devices(self, tmp_path: Path):
        """The blocks that are missing are solved, and no others; to the same bits."""
        report = report_of(__file__, "devices", str(tmp_path), devices=4)
        assert report == [2, 5, 7, 2]

    def test_processes(self, template: Path, tmp_path: Path):
        shutil.copytree(template, tmp_path / "0")
        with pytest.raises(ValueError, match=r"`checkpoint_dir` .*processes \(there"):
            small(tmp_path)

    def test_two_at_a_time(self, tmp_path: Path):
        with (
            CheckpointStore(tmp_path),
            pytest.raises(OSError, match=r"`checkpoint_dir` .*sweep is at work"),
        ):
            small(tmp_path)
        assert_same_bits(small(tmp_path), small_solution())


class TestProgress:
    def test_is_shown(self, capfd: pytest.CaptureFixture[str], tmp_path: Path):
        """The same of a sweep that finds its lanes done."""
        curvatures = np.where(np.arange(LANES) % 5 == 0, np.nan, CURVATURES)
        for _ in range(2):
            solution = small(tmp_path, hyperparams=curvatures, progress=True)
            out, err = capfd.readouterr()
            assert not out
            last = err.replace("\r", "\n").strip().splitlines()[-1]
            assert f"{LANES}/{LANES}" in last
            assert ", 5 failed," in last
            assert re.search(r"\d(lane/s|s/lane)", last)
            assert re.search(r"\[\d\d:\d\d<\d\d:\d\d,", last)
            least = np.nanmin(np.asarray(solution.stats["loss"]))
            assert f"least loss {least:.6g}]" in last

    def test_counts_up(self, capfd: pytest.CaptureFixture[str]):
        """To as many lanes as there are, whatever they end as."""
        small(progress=True, max_optimizer_steps=2)
        text = capfd.readouterr().err
        counts = [int(n) for n in re.findall(rf"(\d+)/{LANES}", text)]
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (0, LANES)
        assert f"{LANES} failed" in text

    def test_is_up_to_date(self, capfd: pytest.CaptureFixture[str]):
        """Though nobody knows how long the next batch takes."""
        solution = jax.tree.map(lambda x: np.asarray(x)[:WIDTH], small_solution())
        with ProgressBar(LANES, show=True) as progress_bar:
            for done in range(1, WIDTH):
                progress_bar.add(solution, np.arange(WIDTH) == done)
            assert f"{WIDTH - 1}/{LANES}" in capfd.readouterr().err

    def test_of_nothing_but_failures(self, capfd: pytest.CaptureFixture[str]):
        small(progress=True, hyperparams=np.full(LANES, np.nan))
        text = capfd.readouterr().err
        assert f"{LANES} failed" in text

    def test_is_not_shown(self, capfd: pytest.CaptureFixture[str]):
        small()
        assert capfd.readouterr() == ("", "")

    def test_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with pytest.raises(
            ModuleNotFoundError, match=r"`progress`.*pip install 'jaxmf_opt\[progress"
        ):
            small(progress=True)
        small()  # needs it not


class TestInterruptedCallback:
    """Ctrl-C where it is known what has ended."""

    def interrupted(self, calls: int) -> SweepInterrupted:
        def callback(_: CallbackArgs) -> None:
            nonlocal calls
            calls -= 1
            if not calls:
                raise KeyboardInterrupt

        with pytest.raises(SweepInterrupted) as e:
            small(callback=callback, max_optimizer_steps=5)
        return e.value

    def test_of_a_second_batch(self):
        e = self.interrupted(5 * WIDTH + 1)
        np.testing.assert_array_equal(e.lanes, np.arange(WIDTH))
        assert str(e) == f"{WIDTH} lanes have ended"
        whole = small(callback=lambda _: None, max_optimizer_steps=5)
        assert_same_bits(e.solution, jax.tree.map(lambda x: x[:WIDTH], whole))

    def test_of_the_first_step(self):
        e = self.interrupted(1)
        assert e.lanes.size == 0
        assert e.solution is None


# Second, sweeps that take seconds, in processes of their own.

BIG_LANES = 80
MIXING = np.random.default_rng(0).normal(size=(24, 24)) / 24**0.5
ORDER = np.random.default_rng(1).permutation(BIG_LANES)


def chain(y: Any, c: Any, layers: int) -> Any:
    """Has no minimum where `c` is negative."""
    mixed = jax.lax.fori_loop(0, layers, lambda _, x: jnp.sin(MIXING @ x), y)
    links = c * jnp.sum((y[1:] - y[:-1] ** 2) ** 2) + jnp.sum((1 - y[:-1]) ** 2)
    return jnp.where(c > 0, links + jnp.mean(mixed**2), jnp.sum(y))


def noisy_descent(hyperparam: dict[str, Any]) -> Any:
    noise = optax.add_noise(1e-4, 1.0, jax.random.key(7))
    return optax.chain(noise, optax.sgd(0.2 * hyperparam["rate"]))


# Lanes take between 8 and 300 steps.
PLAIN: dict[str, Any] = {
    "loss_fn": functools.partial(chain, layers=40),
    "hyperparams": np.geomspace(0.1, 100.0, BIG_LANES)[ORDER],
    "max_optimizer_steps": 400,
    "history": True,
    "gtol": 1e-2,
}
NOISY: dict[str, Any] = {
    "loss_fn": lambda y, hyperparam: chain(y, hyperparam["c"], 70),
    "hyperparams": {
        "c": np.full(BIG_LANES, 0.1),
        "rate": np.geomspace(1.0, 0.2, BIG_LANES)[ORDER],
    },
    "max_optimizer_steps": 10**9,
    "optimizer": noisy_descent,
    "gtol": 2e-2,
}
FINITE = 3 * WIDTH
ENDLESS_HYPERPARAMS = {
    "c": np.append(np.full(FINITE, 0.1), np.full(WIDTH, -1.0)),
    "rate": np.geomspace(1.0, 0.15, FINITE + WIDTH),
}
BIG: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "without states": PLAIN | {"keep_states": False},
    "random keys": NOISY,
    "endless": NOISY | {"hyperparams": ENDLESS_HYPERPARAMS},
    "endless, but for that": NOISY
    | {"hyperparams": {k: x[:FINITE] for k, x in ENDLESS_HYPERPARAMS.items()}},
}


def big(case: str, **options: Any) -> Solution:
    return sweep(params=np.full(24, 0.3), batch_size=WIDTH, **BIG[case], **options)


class Job(NamedTuple):
    """What a process does."""

    case: str
    result: str
    checkpoint_dir: str | None = None
    stops_in_write: int = -1  # of which file it writes a part, and is killed
    progress: bool = False


NO_PATHS = (5, b"bytes", ["a", "b"], True, 1.5)


def refusals() -> Iterator[str]:
    for path in NO_PATHS:
        try:
            small(path)
        except TypeError as e:
            yield str(e)


def work(job: Job) -> None:
    def savez(file: Any, **arrays: Any) -> None:
        nonlocal writes
        if writes == job.stops_in_write:
            file.write(b"PK\3\4" + bytes(10_000))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        writes += 1
        real(file, **arrays)

    if job.case == "no paths":
        Path(job.result).write_text(json.dumps(list(refusals())))
        return
    writes, real = 0, np.savez
    signal.signal(signal.SIGINT, signal.default_int_handler)
    store = functools.partial(CheckpointStore, every=0.0)
    with (
        mock.patch.object(_sweep, "CheckpointStore", store),
        mock.patch.object(np, "savez", savez),
    ):
        try:
            solution = big(
                job.case, checkpoint_dir=job.checkpoint_dir, progress=job.progress
            )
        except SweepInterrupted as e:
            assert isinstance(e, KeyboardInterrupt)
            solution = e.solution
            np.save(f"{job.result}.lanes.npy", e.lanes)
    np.savez(job.result, **cast(Any, arrays_of(solution)))


class Process:
    """A process with a job. It is not waited for forever, nor left behind."""

    def __init__(self, job: Job, log: Path):
        self._log = log
        with log.open("w") as err:
            self.popen = subprocess.Popen(
                [sys.executable, "-W", "error", __file__, json.dumps(job)],
                stderr=err,
                env=environment(),
            )
        self._timer = threading.Timer(120, self.popen.kill)
        self._timer.start()

    def log(self) -> str:
        return self._log.read_text()

    def wait_until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            assert self.popen.poll() is None, self.log()
            time.sleep(0.005)

    def end(self) -> int:
        code = self.popen.wait()
        self._timer.cancel()
        return code

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.end()


@functools.cache
def big_solution(case: str) -> Arrays:
    """Of a process that lives, and keeps nothing."""
    if case == "without states":
        arrays = big_solution("plain")
        return {k: x for k, x in arrays.items() if not k.startswith(".state")}
    with jax.enable_x64(False):
        solution = big(case)
    steps = np.asarray(solution.stats["num_steps"])
    assert steps.max() > 4 * steps.min()
    return arrays_of(solution)


def records(directory: Path) -> dict[str, np.ndarray]:
    """Which lanes of each block are still running, by its name."""
    return {
        name.partition("/")[0]: array
        for path in numbered(directory)
        for name, array in read_npz(path).items()
        if name.endswith("/running")
    }


def check_completed(directory: Path, before: dict[str, Any]) -> None:
    """That files which were there before still are; and each block once."""
    after = contents(directory)
    names = [name for name in before if not name.startswith(".")]
    assert {name: after[name] for name in names} == {n: before[n] for n in names}
    assert len(names) < len(after)
    assert len(records(directory)) == len(numbered(directory)) == len(after) - 1
    assert {name.partition(".")[0] for name in records(directory)} > {"0"}


# Windows has no such signals.
posix = pytest.mark.skipif(os.name != "posix", reason="signals are sent")


@posix
@pytest.mark.parametrize(
    ("case", "seed", "kills"),
    [("plain", 0, 3), ("without states", 1, 1), ("random keys", 2, 2)],
)
def test_killed(case: str, seed: int, kills: int, tmp_path: Path):
    """Where so many more files are there, some time after, or in a write."""
    directory, result = tmp_path / "kept", tmp_path / "result.npz"
    want = big_solution(case)
    job, draw = Job(case, str(result), str(directory)), random.Random(seed)
    kept = 0
    for moment in draw.sample(["files", "seconds", "write"], kills):
        is_first, more = not directory.exists(), draw.randint(1, 2)
        wanted, stops = kept + more, more if moment == "write" else -1
        with Process(job._replace(stops_in_write=stops), tmp_path / "log") as process:
            if moment != "write":
                process.wait_until(lambda n=wanted: len(numbered(directory)) >= n)
                time.sleep(draw.uniform(0, 0.1) if moment == "seconds" else 0)
                process.popen.send_signal(signal.SIGKILL)
            assert process.end() == -signal.SIGKILL, process.log()
        if moment == "write":
            (leftover,) = directory.glob(".*")
            assert leftover.stat().st_size == 10_004
            # The first of all files says whose they are.
            assert len(numbered(directory)) == wanted - is_first
        else:
            assert len(numbered(directory)) >= wanted
        kept = len(numbered(directory))
    before = contents(directory)
    with Process(job, tmp_path / "log") as process:
        assert process.end() == 0, process.log()
    assert_same_bits(read_npz(result), want)
    check_completed(directory, before)


@posix
class TestInterrupted:
    """Ctrl-C."""

    def interrupt(self, process: Process) -> None:
        started = time.monotonic()
        process.popen.send_signal(signal.SIGINT)
        assert process.end() == 0, process.log()
        assert time.monotonic() - started < 10

    def check_lanes(self, result: Path, want: Arrays) -> np.ndarray:
        """That lanes which have ended are as in the whole."""
        lanes = np.load(f"{result}.lanes.npy")
        assert np.all(np.diff(lanes) > 0)
        assert_same_bits(read_npz(result), {k: x[lanes] for k, x in want.items()})
        return lanes

    def test_and_called_again(self, tmp_path: Path):
        directory, result = tmp_path / "kept", tmp_path / "result.npz"
        want = big_solution("random keys")
        job = Job("random keys", str(result), str(directory))
        with Process(job, tmp_path / "log") as process:
            process.wait_until(lambda: len(numbered(directory)) >= 2)
            self.interrupt(process)
        lanes = self.check_lanes(result, want)
        # All of them are kept, and perhaps those of a block at which the signal came.
        ended = sum(int((~running).sum()) for running in records(directory).values())
        assert WIDTH - 1 <= lanes.size <= ended <= lanes.size + WIDTH
        assert lanes.size < BIG_LANES
        before = contents(directory)
        with Process(job, tmp_path / "log") as process:
            assert process.end() == 0, process.log()
        assert_same_bits(read_npz(result), want)
        check_completed(directory, before)

    def test_without_a_directory(self, tmp_path: Path):
        """While lanes are running that never end."""
        result = tmp_path / "result.npz"
        job = Job("endless", str(result), progress=True)
        with Process(job, tmp_path / "log") as process:
            process.wait_until(lambda: re.search(r" [12]?\d/32 .*least", process.log()))
            time.sleep(1.0)
            assert process.popen.poll() is None
            self.interrupt(process)
        # The same batches, without the last, which leaves no lane to others.
        lanes = self.check_lanes(result, big_solution("endless, but for that"))
        assert WIDTH - 1 <= lanes.size < FINITE


def on_devices(directory: str) -> list[int]:
    """How many blocks are solved by other devices than those that began a sweep."""

    def mesh(devices: int) -> jax.sharding.Mesh:
        return jax.make_mesh((devices,), ("lanes",), devices=jax.devices()[:devices])

    solved = []
    store = functools.partial(CheckpointStore, every=0.0)
    with mock.patch.object(_sweep, "CheckpointStore", store):
        for first, then, lost in (1, 4, 2), (4, 1, 5), (4, 3, 7), (2, 4, 2):
            kept = Path(directory) / f"{first} {then}"
            want = small(kept, mesh=mesh(first))
            for path in numbered(kept)[:lost]:
                path.unlink()
            left = len(numbered(kept))
            same_call = WIDTH if WIDTH % then == 0 else None
            got = small(kept, mesh=mesh(then), batch_size=same_call)
            assert_same_bits(got, want)
            solved.append(len(numbered(kept)) - left)
    return solved


if __name__ == "__main__":
    if "devices" in sys.argv:
        print(json.dumps(on_devices(sys.argv[-1])))
    else:
        work(Job(*json.loads(sys.argv[1])))
