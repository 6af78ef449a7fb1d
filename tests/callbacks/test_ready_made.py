"""The ready-made callbacks, eager and compiled."""

import io
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_privacy.matrix_factorization import dense

from jaxmf_opt import CallbackArgs, combine, optimize, solve
from jaxmf_opt.callbacks import (
    Checkpoint,
    NoProgress,
    Progress,
    Record,
    Recorder,
    TimeLimit,
    small_gradient,
)

ROWS = np.array([[0.25, 1.0], [2.0, 0.5], [-1.0, 3.0]], np.float32)


def loss(y: jax.Array, c: jax.Array) -> jax.Array:
    c = jnp.asarray(c, y.dtype)
    return jnp.sum(jnp.cosh(y - c)) + jnp.sum((y - c) ** 4)


def steps(c: Any, callback: Any, limit: int = 8) -> jax.Array:
    start = jnp.zeros(2)
    return solve(
        lambda y: loss(y, c), start, callback=callback, max_optimizer_steps=limit
    ).stats["num_steps"]


def of_rows(callback: Any, limit: int = 8) -> np.ndarray:
    return np.array([steps(c, callback, limit) for c in ROWS])


def of_batch(callback: Any, limit: int = 8) -> np.ndarray:
    batch = jax.jit(jax.vmap(lambda c: steps(c, callback, limit)))
    return np.asarray(batch(ROWS))


WAYS = {"eager": of_rows, "jit of vmap": of_batch}
way = pytest.mark.parametrize("way", WAYS)


def grad_norms() -> list[np.ndarray]:
    recorder = Recorder()
    of_rows(recorder)
    return [record.grad_norm for record in recorder.records]


class TestSmallGradient:
    @way
    def test_stops_after_the_first_step_that_saw_one(self, way: str):
        gtol = 0.5
        want = [1 + int(np.argmax(norms <= gtol)) for norms in grad_norms()]
        assert len(set(want)) > 1
        np.testing.assert_array_equal(WAYS[way](small_gradient(gtol)), want)

    def test_of_a_batched_limit(self):
        limits = jnp.array([1e9, 0.5, 0.0])
        got = jax.vmap(lambda g: steps(ROWS[0], small_gradient(g)))(limits)
        assert got[0] == 1
        assert 1 < got[1] < got[2] == 8

    def test_is_the_rule_of_jax_privacys_dense(self):
        """Whose limit is 1e-3."""
        options: dict[str, Any] = {"max_optimizer_steps": 200}
        matrix = np.diag(np.linspace(1.0, 4.0, 4))

        def fn(x: jax.Array) -> jax.Array:
            return jnp.sum((matrix @ x) ** 2) + jnp.sum(jnp.cosh(x - 1))

        seen: list[int] = []
        pg_tol_termination_fn: Any = dense.pg_tol_termination_fn

        def theirs(info: CallbackArgs) -> bool:
            seen.append(info.step)
            return bool(pg_tol_termination_fn(info))

        x: Any = np.eye(4)
        optimize(fn, x, callback=theirs, **options)
        rule = small_gradient(1e-3)
        got = solve(fn, x, callback=rule, **options).stats["num_steps"]
        assert got == len(seen) < 200


class TestNoProgress:
    @staticmethod
    def told(losses: list[float], callback: Callable[[Any], bool]) -> int:
        """After how many steps it stops."""
        from jaxmf_opt import Lane

        lane = Lane()
        for i, value in enumerate(losses):
            info = CallbackArgs.tree_unflatten(None, (i, value, None, None, None))
            if callback(info.bind(lane, dict)):
                return i + 1
        return len(losses) + 1

    @pytest.mark.parametrize(
        ("losses", "limits", "stop"),
        [
            ([5, 4, 3, 2, 1], (1,), 6),
            ([5, 5, 5, 5], (2,), 3),
            ([5, 4, 6, 7, 8], (2,), 4),
            ([5, 4, 6, 3, 8, 9, 2], (2,), 6),
            ([100, 99.5, 99, 98.5], (2, 0.01), 3),
            ([-100, -99, -101.5, -102, -102.1], (2, 0.01), 5),
            ([np.inf, np.inf, 5, 4], (3,), 5),
            ([np.nan] * 5, (2,), 3),
        ],
    )
    def test_of_a_given_course(self, losses: list[float], limits: Any, stop: int):
        assert self.told(losses, NoProgress(*limits)) == stop

    @way
    def test_each_lane_by_itself(self, way: str):
        recorder = Recorder()
        of_rows(recorder, limit=20)
        want = [
            min(20, self.told(list(r.loss), NoProgress(2, 1e-3)))
            for r in recorder.records
        ]
        assert len(set(want)) > 1
        np.testing.assert_array_equal(WAYS[way](NoProgress(2, 1e-3), limit=20), want)

    def test_a_second_solve_starts_afresh(self):
        callback = NoProgress(3, 0.5)
        first, second = of_rows(callback), of_rows(callback)
        np.testing.assert_array_equal(first, second)


class TestTimeLimit:
    @way
    def test_stops(self, way: str):
        slow = lambda info: time.sleep(0.02)  # noqa: E731
        started = time.monotonic()
        counts = WAYS[way](combine(slow, TimeLimit(0.05)), limit=10**6)
        assert np.all(counts >= 2)
        assert np.all(counts < 20)
        assert time.monotonic() - started < 30

    @way
    def test_leaves_a_quick_solve_alone(self, way: str):
        np.testing.assert_array_equal(WAYS[way](TimeLimit(3600.0)), 8)


class TestProgress:
    @way
    def test_shows_steps_loss_and_gradient(self, way: str):
        out = io.StringIO()
        with Progress(total=24, file=out, mininterval=0) as progress:
            WAYS[way](progress)
        last = out.getvalue().split("\r")[-1]
        assert "24/24" in last
        assert "step/s" in last
        assert "loss " in last
        assert "gradient " in last

    def test_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxmf_opt\["):
            Progress()


class TestRecorder:
    @way
    def test_records_what_a_run_did(self, way: str):
        recorder, seen = Recorder(), Recorder()
        of_rows(seen)
        WAYS[way](recorder)
        lanes = [r.lane for r in recorder.records]
        assert lanes == ([()] * 3 if way == "eager" else [(0,), (1,), (2,)])
        for got, want in zip(recorder.records, seen.records, strict=True):
            assert isinstance(got, Record)
            np.testing.assert_array_equal(got.step, np.arange(8))
            np.testing.assert_allclose(got.loss, want.loss, rtol=1e-9)
            np.testing.assert_allclose(got.grad_norm, want.grad_norm, atol=1e-7)
            assert np.all(np.diff(got.seconds) >= 0)

    def test_against_the_gradient_itself(self):
        recorder = Recorder()
        steps(ROWS[0], recorder, limit=1)
        (record,) = recorder.records
        grad = jax.grad(loss)(jnp.zeros(2), jnp.asarray(ROWS[0]))
        np.testing.assert_allclose(record.grad_norm, np.abs(grad).max(), rtol=1e-6)

    def test_a_gradient_that_is_nan_is_seen(self):
        recorder = Recorder()
        start = (jnp.zeros(1), jnp.full(1, jnp.nan))
        solve(
            lambda y: jnp.sum(y[0] ** 2) + jnp.sum(y[1] ** 2),
            start,
            callback=recorder,
            max_optimizer_steps=1,
        )
        assert np.isnan(recorder.records[0].grad_norm)

    def test_empty(self):
        assert Recorder().records == []


OPTIONS: list[dict[str, Any]] = [{}, {"rtol": 1e-9}]


class TestCheckpoint:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
    def test_goes_on_bit_for_bit(
        self, compiled: bool, options: dict[str, Any], tmp_path: Path
    ):
        checkpoint = Checkpoint(tmp_path / "run.npz", every=2)

        def run(limit: int, state: Any) -> Any:
            def go(c: jax.Array) -> Any:
                solution = solve(
                    lambda y: loss(y, c),
                    jnp.zeros(2),
                    callback=checkpoint,
                    state=state,
                    max_optimizer_steps=limit,
                    **options,
                )
                return solution.state

            return (jax.jit(go) if compiled else go)(jnp.asarray(ROWS[0]))

        assert checkpoint.load() is None
        whole = run(9, None)
        checkpoint.path.unlink()
        run(5, None)
        kept = checkpoint.load()
        assert kept is not None
        assert len(kept) == len(jax.tree.leaves(whole))
        continued = run(9, kept)
        jax.tree.map(np.testing.assert_array_equal, continued, whole)

    def test_a_killed_run(self, tmp_path: Path):
        """Killed in the middle of a step, and started again with the same lines."""
        script = tmp_path / "run.py"
        script.write_text(
            "import sys, numpy as np, jax.numpy as jnp\n"
            "from jaxmf_opt import solve, combine\n"
            "from jaxmf_opt.callbacks import Checkpoint\n"
            "path, result, pause = sys.argv[1:]\n"
            "checkpoint = Checkpoint(path, every=3)\n"
            "def wait(info):\n"
            "    print(info.step, flush=True)\n"
            "    if info.step == int(pause):\n"
            "        sys.stdin.read()\n"
            "c = np.array([0.25, 1.0])\n"
            "loss = lambda y: jnp.sum(jnp.cosh(y - c)) + jnp.sum((y - c) ** 4)\n"
            "solution = solve(loss, np.zeros(2), max_optimizer_steps=12,\n"
            "    callback=combine(checkpoint, wait), state=checkpoint.load())\n"
            "np.save(result, np.asarray(solution.state.params))\n"
        )

        def start(name: str, result: str, pause: int) -> subprocess.Popen[str]:
            arguments = [tmp_path / name, tmp_path / result, str(pause)]
            return subprocess.Popen(
                [sys.executable, script, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )

        def shown(process: subprocess.Popen[str]) -> list[int]:
            out, _ = process.communicate()
            assert process.returncode == 0
            return [int(line) for line in out.splitlines()]

        never_killed = start("a.npz", "a.npy", -1)
        killed = start("b.npz", "b.npy", 7)
        assert killed.stdout is not None
        for line in killed.stdout:
            if line == "7\n":
                killed.send_signal(signal.SIGKILL)
                break
        killed.communicate()
        again = start("b.npz", "b.npy", -1)
        assert shown(never_killed) == list(range(12))
        assert shown(again) == list(range(6, 12))
        np.testing.assert_array_equal(
            np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
        )

    def test_refuses_a_batch(self, tmp_path: Path):
        with pytest.raises(ValueError, match="not of the lanes of a batch"):
            jax.vmap(lambda c: steps(c, Checkpoint(tmp_path / "x")))(ROWS)
        assert not list(tmp_path.iterdir())

    def test_refuses_two_solves_in_turns(self, tmp_path: Path):
        checkpoint = Checkpoint(tmp_path / "x")

        def inner(info: CallbackArgs) -> None:
            steps(ROWS[1], checkpoint, limit=1)

        with pytest.raises(ValueError, match="several at a time"):
            steps(ROWS[0], combine(checkpoint, inner))
        # One after the other is well, whatever is kept of the first.
        infos: list[CallbackArgs] = []
        for row in ROWS:
            steps(row, combine(infos.append, Checkpoint(tmp_path / "x")))

    def test_an_optimizer_with_a_random_key(self, tmp_path: Path):
        noisy = optax.chain(
            optax.add_noise(1e-3, 0.5, jax.random.key(7)), optax.sgd(0.05)
        )
        checkpoint = Checkpoint(tmp_path / "x", every=4)

        def run(limit: int, state: Any, callback: Any = checkpoint) -> Any:
            return solve(
                lambda y: loss(y, jnp.asarray(ROWS[0])),
                jnp.zeros(2),
                callback=callback,
                max_optimizer_steps=limit,
                optimizer=noisy,
                state=state,
            ).value

        run(5, None)
        np.testing.assert_array_equal(
            run(8, checkpoint.load(), lambda _: None), run(8, None, lambda _: None)
        )

    def test_says_that_a_file_is_not_a_checkpoint(self, tmp_path: Path):
        path = tmp_path / "x.npz"
        path.write_bytes(b"something else")
        with pytest.raises(ValueError, match=r"x\.npz is not a checkpoint"):
            Checkpoint(path).load()

    def test_leaves_no_other_files(self, tmp_path: Path):
        path = tmp_path / "new" / "run.npz"
        steps(ROWS[0], Checkpoint(path))
        assert list(path.parent.iterdir()) == [path]


def test_all_of_them_together(tmp_path: Path):
    recorder = Recorder()
    with Progress(file=io.StringIO()) as progress:
        everything = combine(
            small_gradient(1e-30),
            NoProgress(100),
            TimeLimit(100.0),
            progress,
            recorder,
            Checkpoint(tmp_path / "run.npz"),
        )
        assert steps(ROWS[0], everything) == 8
        assert jax.jit(lambda c: steps(c, everything))(ROWS[0]) == 8
    assert [len(r.step) for r in recorder.records] == [8, 8]
    assert list(itertools.chain(*[r.lane for r in recorder.records])) == []
