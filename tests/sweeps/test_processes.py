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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax
import pytest
from bits import Arrays, arrays_of, assert_same_bits, contents
from jax.sharding import Mesh
from processes import environment
from valleys import curvatures, valleys

from jaxmf_opt import CallbackArgs, Solution
from jaxmf_opt.sweeps import SweepInterrupted, _processes, _sweep
from jaxmf_opt.sweeps._checkpoints import CheckpointStore

PROCESSES, DEVICES = 2, 4

# A device has two batches of eight lanes, and leaves one of each to a third.
LANES, WIDTH = 16 * DEVICES, 8 * DEVICES


def solved(mesh: Mesh, lanes: int = LANES, **changes: Any) -> Solution:
    options = {"params": np.array([0.5, -0.5, 0.25], np.float32), "batch_size": WIDTH}
    return valleys(curvatures(lanes), mesh=mesh, **(options | changes))


# First, what a process does.


class Job(NamedTuple):
    """Which of the processes it is, and what it does. Alone, it has all devices."""

    rank: int
    processes: int
    port: int
    out: str
    cases: list[str]

    def path(self, name: str) -> Path:
        return Path(self.out) / f"{name} of {self.rank} of {self.processes}"

    @property
    def directory(self) -> Path:
        """In which it keeps what it has finished."""
        return Path(self.out) / "kept" / (f"{self.rank}" if self.processes > 1 else "")


def mesh_of(*devices: int) -> Mesh:
    """Of some of all devices, which are in the order of processes."""
    return Mesh(np.array(jax.devices())[list(devices)], ("lanes",))


def uneven(_: Job) -> Solution:
    """One device of the first process, two of the other, in no order of processes."""
    noise = optax.add_noise(1e-4, 1.0, jax.random.key(7))
    return solved(
        mesh_of(2, 1, 3),
        lanes=LANES // 4 * 3,
        batch_size=WIDTH // 4 * 3,
        optimizer=optax.chain(noise, optax.sgd(0.01)),
    )


def going_on(_: Job) -> Solution:
    first = solved(mesh_of(0, 1, 2, 3), gtol=0.1)
    return solved(mesh_of(0, 1, 2, 3), state=first.state, history=True)


def devices_of_one(job: Job) -> Solution | None:
    """While the other process does something else."""
    is_last = job.rank == job.processes - 1
    return solved(mesh_of(2, 3), batch_size=WIDTH // 2) if is_last else None


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


def killed(job: Job, store: type[CheckpointStore] = Killed) -> Solution:
    with mock.patch.object(_sweep, "CheckpointStore", store):
        return solved(mesh_of(0, 1, 2, 3), checkpoint_dir=Path(job.out) / "kept")


def resumed(job: Job) -> Solution:
    before = contents(job.directory)
    solution = killed(job, EachBlock)
    after = contents(job.directory)
    assert {name: after[name] for name in before} == before
    assert len(after) > 3  # who it is, two batches, the rest
    return solution


def interrupted(_: Job) -> dict[str, list[int]]:
    """By its callback, at the last lane of its second batch."""
    seen: list[int] = []

    def see(info: CallbackArgs) -> None:
        seen.extend(info.lane.index)
        if len(seen) == LANES // PROCESSES:
            raise KeyboardInterrupt

    with pytest.raises(SweepInterrupted) as e:
        solved(mesh_of(0, 1, 2, 3), callback=see, max_optimizer_steps=1)
    return {"seen": seen, "ended": e.value.lanes.tolist()}


CASES: dict[str, Callable[[Job], Any]] = {
    f.__name__: f
    for f in (killed, resumed, uneven, going_on, devices_of_one, interrupted)
}


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
    assert (jax.process_count(), jax.device_count()) == (job.processes, DEVICES)
    for case in job.cases:
        print(case, flush=True)
        out = CASES[case](job)
        if isinstance(out, Solution):
            np.savez(job.path(case).with_suffix(".npz"), **arrays_of(out))  # pyright: ignore
        else:
            job.path(case).write_text(json.dumps(out))
    if job.processes > 1:
        jax.distributed.shutdown()


# Second, what comes of it.


def start(job: Job) -> subprocess.Popen[bytes]:
    with job.path("log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, __file__, json.dumps(job)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(DEVICES // job.processes),
        )


def run(*jobs: Job, seconds: float = 240) -> tuple[list[int], str]:
    """Exit codes and logs. If one fails, others would wait for it: they are killed."""
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
    return codes, "\n".join(job.path("log").read_text()[-5000:] for job in jobs)


def pair(out: Path, *cases: str) -> list[Job]:
    try:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
    except OSError as e:
        pytest.skip(f"no port can be bound: {e}")
    return [Job(rank, PROCESSES, port, str(out), [*cases]) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Job]]:
    """Two processes, after two of which one was killed; and one for comparison."""
    out, other = (tmp_path_factory.mktemp(name) for name in ("two", "one"))
    codes, logs = run(*pair(out, "killed"))
    assert codes[1] == -signal.SIGKILL, logs
    kept = [len(list(out.glob(f"kept/{rank}/[0-9]*.npz"))) for rank in (0, 1)]
    assert kept[0] >= 1 == kept[1], logs
    cases = ["resumed", "uneven", "going_on", "devices_of_one"]
    alone = Job(0, 1, 0, str(other), cases)
    jobs = [*pair(out, *cases, "interrupted"), alone]
    codes, logs = run(*jobs)
    assert codes == [0, 0, 0], logs
    yield jobs


def result(job: Job, case: str) -> Arrays:
    with np.load(job.path(case).with_suffix(".npz")) as file:
        return dict(file)


@pytest.mark.skipif(os.name != "posix", reason="a signal is sent")
class TestTwoProcesses:
    @pytest.mark.parametrize("case", ["resumed", "uneven", "going_on"])
    def test_each_returns_the_whole(self, case: str, jobs: list[Job]):
        """With the bits that one process gets."""
        first, second, want = (result(job, case) for job in jobs)
        assert_same_bits(first, second)
        assert_same_bits(first, want)
        lanes = LANES // 4 * 3 if case == "uneven" else LANES
        assert {x.shape[0] for x in first.values()} == {lanes}
        assert len(set(first[".stats['num_steps']"])) > 20
        assert first[".value"].dtype == first[".stats['loss']"].dtype == np.float32
        assert first[".state.params"].dtype == float
        keys = [name for name in first if "rng_key key<" in name]
        assert len(keys) == (case == "uneven")

    def test_one_by_itself(self, jobs: list[Job]):
        _, second, alone = jobs
        got, want = (result(job, "devices_of_one") for job in (second, alone))
        assert got[".value"].shape == (LANES, 3)
        assert_same_bits(got, want)

    def test_each_solves_its_part(self, jobs: list[Job]):
        for rank, job in enumerate(jobs[:2]):
            part = np.arange(LANES).reshape(PROCESSES, -1)[rank].tolist()
            told = json.loads(job.path("interrupted").read_text())
            assert told == {"seen": part, "ended": part[: WIDTH // PROCESSES]}


def fake_mesh(*owners: int) -> Any:
    """With a device for each of these numbers of processes."""
    devices = np.array([mock.Mock(process_index=p) for p in owners])
    return mock.Mock(spec=Mesh, devices=devices, size=len(owners))


class TestThreeProcesses:
    """As the middle one sees it."""

    @pytest.fixture(autouse=True)
    def three(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        monkeypatch.setattr(jax, "process_index", lambda: 1)

    @pytest.mark.parametrize("owners", [(1, 1, 2, 2), (0, 2)])
    def test_none_may_be_left_out(self, owners: tuple[int, ...]):
        with pytest.raises(ValueError, match="`mesh` must have devices of this proc"):
            solved(fake_mesh(*owners), lanes=12)

    def test_parts(self):
        """Devices take lanes in their order, whosever they are."""
        parts = _processes.lanes_by_process(fake_mesh(2, 0, 1, 0), 8)
        assert [p.tolist() for p in parts] == [[2, 3, 6, 7], [4, 5], [0, 1]]
        (whole,) = _processes.lanes_by_process(fake_mesh(1, 1), 8)
        assert whole.tolist() == list(range(8))


if __name__ == "__main__":
    work(Job(*json.loads(sys.argv[1])))
