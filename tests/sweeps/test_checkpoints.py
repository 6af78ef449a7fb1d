"""What a sweep has finished stays, whatever happens to its process or its files.

As a script, it is the process that is killed or interrupted.
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bits import Arrays, arrays_of, assert_same_bits, contents
from processes import environment, report_of
from valleys import WEIGHTS, curvatures, valleys, with_weights

from jaxmf_opt import CallbackArgs, Solution, sweep, traced
from jaxmf_opt._files import read_npz, write_npz
from jaxmf_opt.sweeps import SweepInterrupted, _checkpoints, _sweep
from jaxmf_opt.sweeps._checkpoints import CheckpointStore, Layout, remove_records


def numbered(directory: Path) -> list[Path]:
    return sorted(directory.glob("[0-9]*.npz"))


def each_block() -> Any:
    """Nothing waits to be written with something else: each has a file."""
    store = functools.partial(CheckpointStore, every=0.0)
    return mock.patch.object(_sweep, "CheckpointStore", store)


@pytest.fixture
def a_file_for_each_block():
    with each_block():
        yield


# First, sweeps that take a moment, in this process.

LANES, WIDTH = 24, 8
CURVATURES = curvatures(LANES)
START = np.array([0.5, -0.5, 0.25])


valley = with_weights(WEIGHTS)


def small(checkpoint_dir: Any = None, **changes: Any) -> Solution:
    options: dict[str, Any] = {"params": START, "batch_size": WIDTH, **changes}
    curvatures = options.pop("hyperparams", CURVATURES)
    return valleys(curvatures, checkpoint_dir=checkpoint_dir, **options)


@functools.cache
def small_solution() -> Solution:
    return small()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a sweep that has been finished."""
    directory = tmp_path_factory.mktemp("template")
    with each_block():
        assert_same_bits(small(directory), small_solution())
    assert len(numbered(directory)) == LANES // WIDTH + 1
    return directory


@pytest.fixture
def directory(template: Path, tmp_path: Path) -> Path:
    """A copy of it, that may be damaged."""
    return shutil.copytree(template, tmp_path / "kept")


def noisy(rate: float, key: int) -> Any:
    """Optimizers whose states have random keys."""
    noise = optax.add_noise(1e-4, 1.0, jax.random.key(key))
    return lambda c: optax.chain(noise, optax.sgd(rate / c))


KINDS: dict[str, dict[str, Any]] = {
    "without states": {"history": True, "keep_states": False},
    "random keys": {"optimizer": lambda _: noisy(0.01, 7)(1.0)},
    "few bits": {
        "params": jnp.asarray(START, jnp.float8_e5m2),
        "optimizer": optax.adam(0.01, mu_dtype=jnp.bfloat16),
    },
}


class TestSameBits:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.usefixtures("a_file_for_each_block")
    def test_with_a_directory_and_a_second_time(self, kind: str, tmp_path: Path):
        want, directory = small(**KINDS[kind]), tmp_path / "a" / "b"
        assert_same_bits(small(directory, **KINDS[kind]), want)
        before = contents(directory)
        # A file says whose they are, and there is one for each block.
        assert len(before) > LANES // WIDTH
        assert_same_bits(small(str(directory), **KINDS[kind]), want)
        assert contents(directory) == before

    def test_nothing_is_solved_a_second_time(self, tmp_path: Path):
        """Nor with options that change nothing, and another closure over the same.

        Here of a sweep that goes on from the states of another, which are part of it.
        """
        executions, state = 0, small(max_optimizer_steps=4).state

        def tick() -> None:
            nonlocal executions
            executions += 1

        def run(**options: Any) -> Solution:
            weights = WEIGHTS.copy()

            def counted(y: Any, c: Any) -> Any:
                jax.debug.callback(tick)
                return with_weights(weights)(y, c)

            solution = small(tmp_path, loss_fn=counted, **options)
            jax.effects_barrier()
            return solution

        first = run(state=state)
        assert executions > LANES
        executions = 0
        assert_same_bits(run(state=state, throw=True, progress=True), first)
        assert executions == 0
        with pytest.raises(ValueError, match=rf"another sweep.*{DIFFERS}"):
            run()


def test_is_written_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(_checkpoints.time, "monotonic", lambda: now)
    for known in (False, True):
        with CheckpointStore(tmp_path) as store:
            store.begin({"of": "a"}, Layout(8, 1), {})
            for i in range(4):
                want = {"x": np.full(3, i)} if known else None
                np.testing.assert_equal(store.record(f"0.{i}", dict), want)
                now += 0.4
                if not known:
                    store.add(f"0.{i}", {"x": np.full(3, i)})
                    assert len(numbered(tmp_path)) == (i >= 2)
            store.write()
            store.write()  # there is nothing left
        assert len(numbered(tmp_path)) == 2


def cut(path: Path, part: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * part // 9])


def flip(path: Path) -> None:
    """A bit of a result."""
    arrays, data = read_npz(path), bytearray(path.read_bytes())
    (name,) = (key for key in arrays if key.endswith("/0"))
    data[data.index(arrays[name].tobytes())] ^= 1
    path.write_bytes(data)


def change(path: Path, end: str, to: Callable[[np.ndarray], Any]) -> None:
    """Writes a file that is whole, and not what a sweep has written."""
    arrays = read_npz(path)
    name = next(name for name in arrays if name.endswith(end))
    arrays[name] = to(arrays[name])
    write_npz(path, {k: x for k, x in arrays.items() if x is not None})


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "half": lambda path: cut(path, 5),
    "a bit of a result": flip,
    "text": lambda path: path.write_text("nothing of a sweep"),
    "an array is missing": lambda path: change(path, "/3", lambda x: None),
    "of another shape": lambda path: change(path, "/0", lambda x: x[..., None]),
    "of fewer lanes": lambda path: change(path, "/0", lambda x: x[:-1]),
    "of another type": lambda path: change(path, "/0", lambda x: x.astype("S3")),
    "of other lanes": lambda path: change(path, "/lanes", lambda x: x + 1),
    "of another sweep": lambda path: change(path, "identity", lambda x: np.array("a")),
}


@pytest.mark.usefixtures("a_file_for_each_block")
class TestDamage:
    """Of a directory that is whole but for one thing."""

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_of_files(self, damage: str, directory: Path):
        """Their lanes are solved again, and no others are; which is told once."""
        _, first, *_, last = numbered(directory)
        for path in (first, last):
            DAMAGE[damage](path)
        before = contents(directory)
        with pytest.warns(UserWarning, match="`checkpoint_dir`") as record:
            again = small(directory)
        for path, warning in zip((first, last), record, strict=True):
            assert path.name in str(warning.message)
        assert_same_bits(again, small_solution())
        after = contents(directory)
        assert len(after) == len(before) + 2
        assert {name: after[name] for name in before} == before
        if damage in ("half", "text"):  # others are seen when they are used
            assert_same_bits(small(directory), small_solution())

    def test_missing_files(self, directory: Path):
        """Nothing is written over, and what a killed write has left goes."""
        first, second, third, last = numbered(directory)
        for path in (first, second, last):
            path.unlink()
        (directory / ".000003.npzk3x_9a2b").write_bytes(third.read_bytes()[:99])
        # What is somebody else's stays; in the place of a file, it is named.
        first.mkdir()
        second.symlink_to("nowhere")
        (directory / ".000009.npz0123abcd").mkdir()
        (directory / "notes.txt").write_text("mine")
        write_npz(directory / "0 (copy).npz", {"x": np.zeros(2)})
        before = contents(directory)
        with pytest.warns(UserWarning) as record:
            assert_same_bits(small(directory), small_solution())
        told = " ".join(str(warning.message) for warning in record)
        assert all(path.name in told for path in (first, second))
        after = contents(directory)
        assert {name: after[name] for name in before} == before
        assert len(after) == len(before) + 3
        assert [path.name for path in directory.glob(".*")] == [".000009.npz0123abcd"]
        assert first.is_dir() and second.is_symlink()

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: cut(path, 5),
            lambda path: path.unlink(),  # these may be the results of anything
            lambda path: write_npz(path, {}),
            lambda path: write_npz(path, {"sweep": np.array("[]")}),
            lambda path: write_npz(path, {"sweep": np.array("[{}, [8, 0], {}]")}),
        ],
        ids=["half", "nothing", "no text", "no sweep", "no devices"],
    )
    def test_of_what_says_whose_it_is(self, damage: Any, directory: Path):
        damage(directory / "sweep.npz")
        before = contents(directory)
        message = rf"`checkpoint_dir` '{re.escape(str(directory))}' is damaged"
        with pytest.raises(ValueError, match=message):
            small(directory)
        assert contents(directory) == before


def below(level: float) -> traced:
    return traced(lambda info: info.params[0] < np.array(level))


SHARED, DIFFERS = (
    "loss, options and what all lanes share",
    "what differs between lanes",
)
# A sweep that has something of all kinds, other ones, and what the message has to name.
RICH: dict[str, Any] = {
    "loss_fn": jax.jit(valley),
    "optimizer": noisy(0.01, 0),
    "gtol": lambda c: 1e-3 * c,
    "callback": below(0.0),
    "max_optimizer_steps": 20,
}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "type of params": ({"params": START.astype(np.float32)}, SHARED),
    "hyperparams": ({"hyperparams": np.nextafter(CURVATURES, 0)}, DIFFERS),
    "fewer lanes": ({"hyperparams": CURVATURES[:-1]}, "lanes of this process"),
    "formula": ({"loss_fn": lambda y, c: valley(y, c) + 1e-300}, SHARED),
    "closure": ({"loss_fn": jax.jit(with_weights(np.nextafter(WEIGHTS, 9)))}, SHARED),
    "number in the optimizer": ({"optimizer": noisy(0.02, 0)}, SHARED),
    "tolerance": ({"gtol": lambda c: 2e-3 * c}, SHARED),
    "history": ({"history": True}, SHARED),
    "callback": ({"callback": below(1e-300)}, SHARED),
    "batch_size": ({"batch_size": 12}, "batch_size of this process (there 8, here 12)"),
    "keep_states": ({"keep_states": False}, "keep_states (there True, here False)"),
}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rich")
    assert_same_bits(small(directory, **RICH), small(directory, **RICH))
    return directory


class TestOtherSweep:
    def assert_refused(self, directory: Path, **changes: Any) -> str:
        before = contents(directory)
        message = rf"`checkpoint_dir` '{re.escape(str(directory))}' .*another sweep"
        with pytest.raises(ValueError, match=message) as e:
            small(directory, **RICH | changes)
        assert contents(directory) == before
        return str(e.value)

    @pytest.mark.parametrize("what", OTHERS)
    def test_is_refused(self, what: str, rich: Path):
        """And only what differs is named."""
        changes, words = OTHERS[what]
        message = self.assert_refused(rich, **changes)
        assert words in message
        if what != "fewer lanes":  # which differ in more
            (only,) = re.findall(r"differs in: (.*) \(there", message)
            assert words.startswith(only)

    def test_of_another_release(self, rich: Path, monkeypatch: pytest.MonkeyPatch):
        """A patch release goes on; and is mentioned where something else differs."""
        jaxlib, real = _sweep.version("jaxlib"), _sweep.version
        patch, minor = f"{jaxlib.rpartition('.')[0]}.99", "0.0.1"
        releases = {"jaxlib": patch}
        monkeypatch.setattr(_sweep, "version", lambda n: releases.get(n) or real(n))
        assert_same_bits(small(rich, **RICH), small(**RICH))
        message = self.assert_refused(rich, rtol=1e-9)
        assert re.search(rf"{SHARED}.* jaxlib {jaxlib}.* jaxlib {patch}", message)
        releases["jaxlib"] = minor
        assert "differs in: jaxlib (there" in self.assert_refused(rich)


def test_what_python_computes_is_refused(tmp_path: Path):
    """It may be something else the next time; what is only printed may not."""

    def loss(y: jax.Array, c: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x: None, c)
        if asks:
            like = jax.ShapeDtypeStruct((), c.dtype)
            c = jax.pure_callback(np.cos, like, c, vmap_method="sequential")
        return jnp.sum((y - c) ** 2)

    directory: Any = {"checkpoint_dir": tmp_path, "optimizer": optax.sgd(0.5)}
    asks = True
    with pytest.raises(ValueError, match="cannot tell whether Python functions have"):
        sweep(loss, np.zeros(2), np.arange(3.0), **directory)
    assert not any(path.is_file() for path in tmp_path.rglob("*.npz"))
    asks = False
    sweep(loss, np.zeros(2), np.arange(3.0), **directory)


class TestElsewhere:
    """A directory that was begun with other cores or devices."""

    def test_cores(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """The default width depends on them; a directory keeps its own."""
        want = small(tmp_path, batch_size=None)
        monkeypatch.setattr(_sweep, "num_workers", lambda _: 8)
        monkeypatch.setattr(_sweep, "default_width", lambda *_: 3)
        numbered(tmp_path)[0].unlink()
        assert_same_bits(small(tmp_path, batch_size=None), want)

    def test_devices(self, tmp_path: Path):
        """The blocks that are missing are solved, and no others; to the same bits."""
        report = report_of(__file__, "devices", str(tmp_path), devices=4)
        assert report == [2, 7]

    def test_processes(self, template: Path, tmp_path: Path):
        shutil.copytree(template, tmp_path / "0")
        with pytest.raises(ValueError, match=r"`checkpoint_dir` .*processes \(there"):
            small(tmp_path)


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_cannot_be_written(path: str, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    where = re.escape(str(tmp_path / path))
    with pytest.raises(OSError, match=rf"`checkpoint_dir` .* got '{where}': "):
        small(tmp_path / path)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_at_a_time(tmp_path: Path):
    message = r"`checkpoint_dir` .*sweep is at work"
    with CheckpointStore(tmp_path), pytest.raises(OSError, match=message):
        small(tmp_path)
    small(tmp_path)


def test_removed(directory: Path, tmp_path: Path):
    """All that the sweep has written, when nobody is at work; and nothing else."""
    shutil.copytree(directory, tmp_path / "whole")
    change(numbered(directory)[0], "identity", lambda x: np.array("another"))
    (directory / "000100.npz").write_bytes(b"")
    with CheckpointStore(directory):
        remove_records(directory)
    assert (directory / "sweep.npz").exists()
    remove_records(directory)
    names = {path.name for path in directory.iterdir()}
    assert names == {"000000.npz", "000100.npz"}
    remove_records(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_interrupted_callback():
    """Ctrl-C where it is known what has ended: the first batch."""
    calls = 0

    def callback(_: CallbackArgs) -> None:
        nonlocal calls
        calls += 1
        if calls > 5 * WIDTH:
            raise KeyboardInterrupt

    with pytest.raises(SweepInterrupted, match=f"{WIDTH} lanes have ended") as e:
        small(callback=callback, max_optimizer_steps=5)
    np.testing.assert_array_equal(e.value.lanes, np.arange(WIDTH))
    whole = small(callback=lambda _: None, max_optimizer_steps=5)
    assert_same_bits(e.value.solution, jax.tree.map(lambda x: x[:WIDTH], whole))
    with pytest.raises(SweepInterrupted, match="0 lanes have ended") as e:
        small(callback=callback, max_optimizer_steps=5)
    assert e.value.solution is None


def test_progress(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    """Of each batch at once; the same of a sweep that finds its lanes done."""
    curvatures = np.where(np.arange(LANES) % 5 == 0, np.nan, CURVATURES)
    small(tmp_path, hyperparams=curvatures)
    assert capfd.readouterr() == ("", "")
    for directory in (tmp_path, None):
        solution = small(directory, hyperparams=curvatures, progress=True)
        out, err = capfd.readouterr()
        assert not out
        counts = [int(n) for n in re.findall(rf"(\d+)/{LANES}", err)]
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (0, LANES)
        assert len(set(counts)) > LANES // WIDTH
        last = err.replace("\r", "\n").strip().splitlines()[-1]
        assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, .*\d(lane/s|s/lane), 5 failed,", last)
        least = np.nanmin(np.asarray(solution.stats["loss"]))
        assert f"least loss {least:.6g}]" in last


# Second, sweeps that take seconds, in processes of their own.

MIXING = np.random.default_rng(0).normal(size=(24, 24)) / 24**0.5


def chain(y: Any, h: dict[str, Any]) -> Any:
    """Has no minimum where `c` is negative."""
    mixed = jax.lax.fori_loop(0, 70, lambda _, x: jnp.sin(MIXING @ x), y)
    links = h["c"] * jnp.sum((y[1:] - y[:-1] ** 2) ** 2) + jnp.sum((1 - y[:-1]) ** 2)
    return jnp.where(h["c"] > 0, links + jnp.mean(mixed**2), jnp.sum(y))


def noisy_descent(h: dict[str, Any]) -> Any:
    noise = optax.add_noise(1e-4, 1.0, jax.random.key(7))
    return optax.chain(noise, optax.sgd(0.2 * h["rate"]))


FINITE = 6 * WIDTH
ENDLESS = {
    "c": np.append(np.full(FINITE, 0.1), np.full(WIDTH, -1.0)),
    "rate": np.geomspace(1.0, 0.1, FINITE + WIDTH),
}
BIG = {"endless": ENDLESS, "finite": {k: x[:FINITE] for k, x in ENDLESS.items()}}


def big(case: str, **options: Any) -> Solution:
    return sweep(
        *(chain, np.full(24, 0.3), BIG[case]),
        batch_size=WIDTH,
        max_optimizer_steps=10**9,
        optimizer=noisy_descent,
        gtol=2e-2,
        **options,
    )


class Job(NamedTuple):
    """What a process does."""

    case: str
    result: str
    options: dict[str, Any]
    stops_in_write: int = -1  # of which file it writes a part, and is killed


def work(job: Job) -> None:
    def savez(file: Any, **arrays: Any) -> None:
        nonlocal writes
        if writes == job.stops_in_write:
            file.write(b"PK\3\4" + bytes(10_000))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        writes += 1
        real(file, **arrays)

    writes, real = 0, np.savez
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with each_block(), mock.patch.object(np, "savez", savez):
        try:
            solution = big(job.case, **job.options)
        except SweepInterrupted as e:
            solution = e.solution
            np.save(f"{job.result}.lanes.npy", e.lanes)
    np.savez(job.result, **cast(Any, arrays_of(solution)))


class Process:
    """A process with a job. It is not waited for forever, nor left behind."""

    def __init__(self, job: Job):
        self.log = Path(f"{job.result}.log")
        with self.log.open("w") as err:
            self.popen = subprocess.Popen(
                [sys.executable, "-W", "error", __file__, json.dumps(job)],
                stderr=err,
                env=environment(),
            )

    def wait_until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            assert self.popen.poll() is None, self.log.read_text()
            time.sleep(0.005)

    def assert_ends(self, code: int = 0, seconds: float = 120) -> None:
        assert self.popen.wait(seconds) == code, self.log.read_text()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()


@functools.cache
def big_solution(case: str) -> Arrays:
    """Of a process that lives, and keeps nothing."""
    with jax.enable_x64(False):
        solution = big(case)
    steps = np.asarray(solution.stats["num_steps"])
    assert steps.max() > 4 * steps.min()
    return arrays_of(solution)


# Windows has no such signals.
posix = pytest.mark.skipif(os.name != "posix", reason="signals are sent")


@posix
def test_killed_and_called_again(tmp_path: Path):
    """In its fifth write."""
    directory, result = tmp_path / "kept", tmp_path / "result.npz"
    options = {"checkpoint_dir": str(directory), "keep_states": False}
    job = Job("finite", str(result), options)
    with Process(job._replace(stops_in_write=4)) as process:
        process.assert_ends(-signal.SIGKILL)
    (leftover,) = directory.glob(".*")
    assert leftover.stat().st_size == 10_004
    before = contents(directory)
    assert len(before) > 3
    with Process(job) as process:
        process.assert_ends()
    want = big_solution("finite")
    want = {k: x for k, x in want.items() if not k.startswith(".state")}
    assert_same_bits(read_npz(result), want)
    # What was there before still is, each block is there once, and nothing else.
    after = contents(directory)
    assert {name: after[name] for name in before} == before
    assert len(running(directory)) == len(numbered(directory)) == len(after) - 1
    assert not [*directory.glob(".*")]


def running(directory: Path) -> dict[str, np.ndarray]:
    """Which lanes of each block are still running, by its name."""
    return {
        name.partition("/")[0]: array
        for path in numbered(directory)
        for name, array in read_npz(path).items()
        if name.endswith("/running")
    }


@posix
def test_interrupted(tmp_path: Path):
    """Ctrl-C, while lanes are running that never end."""
    directory, result = tmp_path / "kept", tmp_path / "result.npz"
    options = {"checkpoint_dir": str(directory), "progress": True}
    with Process(Job("endless", str(result), options)) as process:
        process.wait_until(
            lambda: re.search(r" [1-4]?\d/56 .*least", process.log.read_text())
        )
        time.sleep(0.5)
        process.popen.send_signal(signal.SIGINT)
        process.assert_ends(seconds=10)
    lanes = np.load(f"{result}.lanes.npy")
    assert np.all(np.diff(lanes) > 0)
    assert WIDTH - 1 <= lanes.size < FINITE
    # The same batches, without the last, which leaves no lane to others.
    want = big_solution("finite")
    assert_same_bits(read_npz(result), {k: x[lanes] for k, x in want.items()})
    # All of them are kept, and perhaps those of a block at which the signal came.
    kept = sum(int((~rows).sum()) for rows in running(directory).values())
    assert lanes.size <= kept <= lanes.size + WIDTH


def on_devices(directory: str) -> list[int]:
    """How many blocks are solved by other devices than those that began a sweep."""

    def mesh(devices: int) -> jax.sharding.Mesh:
        return jax.make_mesh((devices,), ("lanes",), devices=jax.devices()[:devices])

    solved = []
    with each_block():
        for first, then, lost in (1, 4, 2), (4, 3, 7):
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
