"""A sweep in two processes that share a mesh.

As a script, it is one of the processes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bits import Arrays, arrays_of, assert_same_bits
from jax.sharding import Mesh
from jaxtyping import install_import_hook
from processes import environment

# The hook that pytest puts on the library does not reach into the processes.
with install_import_hook("jaxmf_opt", "beartype.beartype"):
    from jaxmf_opt import CallbackArgs, Solution, sweep
    from jaxmf_opt.sweeps import SweepInterrupted, _processes, _sweep
    from jaxmf_opt.sweeps._checkpoints import CheckpointStore

PROCESSES, DEVICES_EACH = 2, 2
DEVICES = PROCESSES * DEVICES_EACH

# A device has two batches of eight lanes, and leaves one of each to a third.
LANES, WIDTH = 16 * DEVICES, 8 * DEVICES
PART, PART_WIDTH = LANES // PROCESSES, WIDTH // PROCESSES
CURVATURES = np.geomspace(1.0, 20.0, LANES)[np.random.default_rng(0).permutation(LANES)]
START = np.array([0.5, -0.5, 0.25], np.float32)
WEIGHTS = np.array([1.0, 1.5, 2.0])


def valley(y: Any, c: Any) -> Any:
    return c * jnp.sum(WEIGHTS * (y - 1) ** 2) + jnp.sum((y - 1) ** 4)


def noisy(_: Any) -> Any:
    noise = optax.add_noise(1e-4, 1.0, jax.random.key(7))
    return optax.chain(noise, optax.sgd(0.01))


def valleys(mesh: Mesh | None, **changes: Any) -> Solution:
    arguments: dict[str, Any] = {
        "loss_fn": valley,
        "params": START,
        "hyperparams": CURVATURES,
        "batch_size": WIDTH,
        "max_optimizer_steps": 999,
        "optimizer": optax.sgd(0.01),
        "gtol": 1e-3,
    }
    return sweep(**arguments | changes, mesh=mesh)


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Of each file, when it was written and what is in it."""
    files = directory.glob("[!.]*")  # a killed process may leave one with a dot
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


# First, what a process does.


class Job(NamedTuple):
    """Which of the processes it is, and what it does. Alone, it has all devices."""

    rank: int
    processes: int
    port: int
    out: str
    cases: Sequence[str]


def all_devices() -> Mesh:
    return jax.make_mesh((jax.device_count(),), ("lanes",))


def mesh_of(*devices: int) -> Mesh:
    """Of some of all devices, which are in the order of processes."""
    return Mesh(np.array(jax.devices())[list(devices)], ("lanes",))


def plain(_: Job) -> Solution:
    return valleys(all_devices(), history=True)


def in_a_float64_program(_: Job) -> Solution:
    with jax.enable_x64():
        return valleys(all_devices(), params=START.astype(float))


def uneven(_: Job) -> Solution:
    """One device of the first process, two of the other, in no order of processes."""
    return valleys(
        mesh_of(2, 1, 3),
        hyperparams=CURVATURES[: LANES // 4 * 3],
        batch_size=WIDTH // 4 * 3,
        optimizer=noisy,
    )


def going_on(_: Job) -> Solution:
    first = valleys(all_devices(), gtol=0.1)
    return valleys(all_devices(), state=first.state)


def devices_of_one(job: Job) -> Solution | None:
    """While the other process does something else."""
    if job.rank == job.processes - 1:
        mesh = Mesh(np.array(jax.local_devices()[-2:]), ("lanes",))
        return valleys(mesh, batch_size=PART_WIDTH)
    return None


def default_device(job: Job) -> Solution | None:
    return None if job.rank else valleys(None, batch_size=8)


def directory(job: Job) -> Path:
    """In which a process keeps what it has finished."""
    kept = Path(job.out) / "kept"
    return kept / f"{job.rank}" if job.processes > 1 else kept


class EachBlock(CheckpointStore):
    """Keeps each block in a file of its own."""

    def __init__(self, directory: Any):
        super().__init__(directory, every=0.0)


class Killed(EachBlock):
    """Is killed with its process, as soon as both processes have kept something."""

    def add(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        super().add(name, arrays)
        parent = self._directory.parent
        while len(list(parent.glob("*/[0-9]*.npz"))) < 2:
            time.sleep(0.01)
        if self._directory.name == "1":
            os.kill(os.getpid(), signal.SIGKILL)


def with_checkpoints(job: Job, store: type[CheckpointStore] = EachBlock) -> Solution:
    with mock.patch.object(_sweep, "CheckpointStore", store):
        return valleys(all_devices(), checkpoint_dir=Path(job.out) / "kept")


def killed(job: Job) -> Solution:
    return with_checkpoints(job, Killed)


def resumed(job: Job) -> Solution:
    before = contents(directory(job)) if job.processes > 1 else {}
    solution = with_checkpoints(job)
    after = contents(directory(job))
    assert {name: after[name] for name in before} == before
    assert len(after) > 3  # who it is, two batches, the rest
    return solution


def again(job: Job) -> Solution:
    """When the last of the processes has lost what it had kept."""
    before, is_last = contents(directory(job)), job.rank == job.processes - 1
    if is_last:
        for name in before:
            (directory(job) / name).unlink()
    solution = with_checkpoints(job)
    after = contents(directory(job))
    assert after.keys() == before.keys()
    assert (after == before) != is_last
    return solution


def what_a_callback_sees(job: Job) -> dict[str, Any]:
    """Until the user interrupts it, at the last lane."""
    del job
    seen: list[int] = []

    def see(info: CallbackArgs) -> None:
        (index,) = info.lane.index
        seen.append(index)
        if len(seen) == LANES // jax.process_count():
            raise KeyboardInterrupt

    try:
        valleys(all_devices(), callback=see, max_optimizer_steps=1)
    except SweepInterrupted as e:
        return {"seen": seen, "ended": e.lanes.tolist()}
    return {}


def devices_of_another(job: Job) -> dict[str, str]:
    other = 1 - job.rank
    devices = np.array([d for d in jax.devices() if d.process_index == other])
    try:
        valleys(Mesh(devices, ("lanes",)))
    except ValueError as e:
        return {"refused": str(e)}
    return {}


SOLVED: dict[str, Callable[[Job], Solution | None]] = {
    f.__name__: f
    for f in (
        plain,
        in_a_float64_program,
        uneven,
        going_on,
        resumed,
        again,
        devices_of_one,
        default_device,
    )
}
TOLD: dict[str, Callable[[Job], dict[str, Any]]] = {
    f.__name__: f for f in (what_a_callback_sees, devices_of_another)
}
CASES: dict[str, Callable[[Job], Any]] = {"killed": killed, **SOLVED, **TOLD}


def result_path(job: Job, case: str) -> Path:
    return Path(job.out) / f"{case} of {job.rank} of {job.processes}"


def work(job: Job) -> None:
    if job.processes > 1:
        address = f"127.0.0.1:{job.port}"
        jax.distributed.initialize(
            address,
            job.processes,
            job.rank,
            initialization_timeout=30,
            coordinator_bind_address=None if job.rank else address,
        )
    assert jax.process_count() == job.processes
    assert jax.device_count() == DEVICES
    for case in job.cases:
        print(case, file=sys.stderr, flush=True)
        path = result_path(job, case)
        try:
            out = CASES[case](job)
        except Exception:
            path.with_suffix(".error").write_text(traceback.format_exc())
            continue
        if isinstance(out, Solution):
            np.savez(path.with_suffix(".npz"), **cast(Any, arrays_of(out)))
        else:
            path.with_suffix(".json").write_text(json.dumps(out))
    if job.processes > 1:
        jax.distributed.shutdown()


# Second, what comes of it.


def free_port() -> int:
    try:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return s.getsockname()[1]
    except OSError as e:
        pytest.skip(f"no port can be bound: {e}")


def start(job: Job) -> subprocess.Popen[bytes]:
    with result_path(job, "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, __file__, json.dumps(job)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(DEVICES // job.processes),
        )


def run(jobs: Sequence[Job], seconds: float = 240) -> list[int]:
    """Their exit codes. If one fails, the others would wait for it: they are killed."""
    processes = [start(job) for job in jobs]
    ends = time.monotonic() + seconds
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < ends:
            if any(p.poll() for p in processes):
                break
            time.sleep(0.02)
    finally:
        for p in processes:
            p.kill()
        codes = [p.wait() for p in processes]
    return codes


class Runs:
    """What the processes have written."""

    def __init__(self, together: Sequence[Job], alone: Job):
        self._together, self._alone = together, alone

    def of(self, case: str) -> list[Arrays]:
        """The results of each of the processes that had one."""
        results = [self._load(job, case) for job in self._together]
        return [x for x in results if x is not None]

    def of_one(self, case: str) -> Arrays:
        """That of the process which has all devices."""
        return self._load(self._alone, case)

    def told(self, case: str) -> list[dict[str, Any]]:
        return [self._load(job, case) for job in self._together]

    def _load(self, job: Job, case: str) -> Any:
        path = result_path(job, case)
        error = path.with_suffix(".error")
        assert not error.exists(), error.read_text()[-5000:]
        if path.with_suffix(".json").exists():
            return json.loads(path.with_suffix(".json").read_text())
        with np.load(path.with_suffix(".npz")) as file:
            return dict(file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """After two processes of which one was killed: two, and for comparison one."""
    out = str(tmp_path_factory.mktemp("processes"))
    other = str(tmp_path_factory.mktemp("process"))

    def pair(cases: Sequence[str]) -> list[Job]:
        port = free_port()
        return [Job(rank, PROCESSES, port, out, cases) for rank in range(PROCESSES)]

    def logs(jobs: Sequence[Job]) -> str:
        return "\n".join(result_path(job, "log").read_text()[-5000:] for job in jobs)

    doomed = pair(["killed"])
    codes = run(doomed)
    assert codes[1] == -signal.SIGKILL, logs(doomed)
    kept = [len(list(Path(out).glob(f"kept/{rank}/[0-9]*.npz"))) for rank in (0, 1)]
    assert kept[0] >= 1, logs(doomed)
    assert kept[1] == 1, logs(doomed)
    # `resumed` comes first, for what the killed ones have left.
    cases = ["resumed", *(case for case in (*SOLVED, *TOLD) if case != "resumed")]
    together = pair(cases)
    alone = Job(0, 1, 0, other, [case for case in cases if case in SOLVED])
    jobs = [*together, alone]
    assert run(jobs) == [0, 0, 0], logs(jobs)
    yield Runs(together, alone)


TOGETHER = [case for case in SOLVED if case not in ("devices_of_one", "default_device")]


@pytest.mark.skipif(os.name != "posix", reason="a signal is sent")
class TestTwoProcesses:
    @pytest.mark.parametrize("case", TOGETHER)
    def test_each_returns_the_whole(self, case: str, runs: Runs):
        first, second = runs.of(case)
        assert_same_bits(first, second)
        lanes = LANES // 4 * 3 if case == "uneven" else LANES
        assert {x.shape[0] for x in first.values()} == {lanes}
        assert len(set(first[".stats['num_steps']"])) > 20

    @pytest.mark.parametrize("case", TOGETHER)
    def test_as_one_process_does(self, case: str, runs: Runs):
        assert_same_bits(runs.of(case)[0], runs.of_one(case))

    @pytest.mark.parametrize("case", ["devices_of_one", "default_device"])
    def test_one_by_itself(self, case: str, runs: Runs):
        (only,) = runs.of(case)
        assert only[".value"].shape == (LANES, 3)
        assert_same_bits(only, runs.of_one(case))

    @pytest.mark.parametrize(
        ("case", "dtype"), [("plain", np.float32), ("in_a_float64_program", float)]
    )
    def test_types_are_those_of_the_program(self, case: str, dtype: Any, runs: Runs):
        arrays = runs.of(case)[0]
        assert arrays[".value"].dtype == arrays[".stats['loss']"].dtype == dtype
        assert arrays[".state.params"].dtype == float

    def test_random_keys_are_keys(self, runs: Runs):
        names = [name for name in runs.of("uneven")[0] if "rng_key key<" in name]
        assert len(names) == 1

    def test_each_solves_its_part(self, runs: Runs):
        told = runs.told("what_a_callback_sees")
        for rank, of_process in enumerate(told):
            part = np.arange(LANES)[rank * PART :][:PART].tolist()
            assert of_process["seen"] == part
            # It was in the last batch that it was interrupted.
            assert of_process["ended"] == part[:PART_WIDTH]

    def test_refuses_devices_of_another(self, runs: Runs):
        for of_process in runs.told("devices_of_another"):
            assert "`mesh` must have devices of this process" in of_process["refused"]


def fake_mesh(*owners: int) -> Any:
    """With a device for each of these numbers of processes."""
    devices = np.array([mock.Mock(process_index=p) for p in owners])
    mesh = mock.Mock(spec=Mesh, devices=devices, size=len(owners))
    assert isinstance(mesh, Mesh)
    return mesh


class TestThreeProcesses:
    """As the middle one sees it."""

    @pytest.fixture(autouse=True)
    def three(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        monkeypatch.setattr(jax, "process_index", lambda: 1)

    @pytest.mark.parametrize("owners", [(0, 1), (1, 1, 2, 2), (0,), (0, 2)])
    def test_none_may_be_left_out(self, owners: tuple[int, ...]):
        with pytest.raises(ValueError, match="`mesh` must have devices of this proc"):
            valleys(fake_mesh(*owners), hyperparams=CURVATURES[:12])

    @pytest.mark.parametrize("owners", [(1,), (1, 1), (0, 1, 2), (2, 0, 1, 1)])
    def test_all_or_this_one(self, owners: tuple[int, ...]):
        mesh = fake_mesh(*owners)
        assert _sweep._check_mesh(mesh, 12) is mesh

    def test_parts(self):
        """Devices take lanes in their order, whosever they are."""
        parts = _processes.lanes_by_process(fake_mesh(2, 0, 1, 0), 8)
        assert [p.tolist() for p in parts] == [[2, 3, 6, 7], [4, 5], [0, 1]]
        (whole,) = _processes.lanes_by_process(fake_mesh(1, 1), 8)
        assert whole.tolist() == list(range(8))


if __name__ == "__main__":
    work(Job(*json.loads(sys.argv[1])))
