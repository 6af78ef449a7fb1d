"""The ready-made callbacks, eager and compiled."""

import io
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
from numpy.testing import assert_allclose, assert_array_equal

from jaxmf_opt import CallbackArgs, Lane, combine, optimize, solve
from jaxmf_opt.callbacks import (
    Checkpoint,
    NoProgress,
    Progress,
    Recorder,
    TimeLimit,
    small_gradient,
)

ROWS = np.array([[0.25, 1.0], [2.0, 0.5], [-1.0, 3.0]], np.float32)


def loss(y: jax.Array, c: jax.Array) -> jax.Array:
    c = jnp.asarray(c, y.dtype)
    return jnp.sum(jnp.cosh(y - c)) + jnp.sum((y - c) ** 4)


def run(c: Any, callback: Any, limit: int = 8, **options: Any) -> Any:
    options = {"callback": callback, "max_optimizer_steps": limit, **options}
    options = {"rtol": 0.0, **options}
    return solve(lambda y: loss(y, c), jnp.zeros(2), **options)


def steps(c: Any, callback: Any, limit: int = 8) -> jax.Array:
    return run(c, callback, limit).stats["num_steps"]


def of_rows(callback: Any, limit: int = 8) -> np.ndarray:
    return np.array([steps(c, callback, limit) for c in ROWS])


def of_batch(callback: Any, limit: int = 8) -> np.ndarray:
    batch = jax.jit(jax.vmap(lambda c: steps(c, callback, limit)))
    return np.asarray(batch(ROWS))


WAYS = {"eager": of_rows, "jit of vmap": of_batch}
way = pytest.mark.parametrize("way", WAYS)


class TestSmallGradient:
    @way
    def test_stops_after_the_first_step_that_saw_one(self, way: str):
        gtol, recorder = 0.5, Recorder()
        of_rows(recorder)
        want = [1 + int(np.argmax(r.grad_norm <= gtol)) for r in recorder.records]
        assert len(set(want)) > 1
        assert_array_equal(WAYS[way](small_gradient(gtol)), want)

    def test_is_the_rule_of_jax_privacys_dense(self):
        """Whose limit is 1e-3."""
        matrix = np.diag(np.linspace(1.0, 4.0, 4))

        def fn(x: jax.Array) -> jax.Array:
            return jnp.sum((matrix @ x) ** 2) + jnp.sum(jnp.cosh(x - 1))

        theirs: Any = dense.pg_tol_termination_fn
        x: Any = np.eye(4)
        recorder = Recorder()
        callback = combine(recorder, lambda info: bool(theirs(info)))
        optimize(fn, x, callback=callback, max_optimizer_steps=200)
        ours = solve(fn, x, callback=small_gradient(1e-3), max_optimizer_steps=200)
        assert ours.stats["num_steps"] == len(recorder.records[0].step) < 200


def told(losses: Any, callback: Callable[[Any], bool]) -> int:
    """After how many steps a callback stops that is told these losses."""
    lane = Lane()
    for i, value in enumerate(losses):
        info = CallbackArgs.tree_unflatten(None, (i, value, None, None, None))
        if callback(info.bind(lane, dict)):
            return i + 1
    return len(losses) + 1


class TestNoProgress:
    @pytest.mark.parametrize(
        ("losses", "limits", "stop"),
        [
            ([5, 4, 3, 2, 1], (1,), 6),
            ([5, 4, 6, 3, 8, 9, 2], (2,), 6),
            ([100, 99.5, 99, 98.5], (2, 0.01), 3),
            ([-100, -99, -101.5, -102, -102.1], (2, 0.01), 5),
            ([np.inf, np.inf, 5, 4], (3,), 5),
            ([np.nan] * 5, (2,), 3),
        ],
    )
    def test_of_a_given_course(self, losses: list[float], limits: Any, stop: int):
        assert told(losses, NoProgress(*limits)) == stop

    @way
    def test_each_lane_by_itself(self, way: str):
        """And a second solve starts afresh."""
        recorder = Recorder()
        of_rows(recorder, limit=20)
        courses = [r.loss for r in recorder.records]
        want = [min(20, told(course, NoProgress(2, 1e-3))) for course in courses]
        assert len(set(want)) > 1
        callback = NoProgress(2, 1e-3)
        for _ in range(2):
            assert_array_equal(WAYS[way](callback, limit=20), want)


class TestTimeLimit:
    @way
    def test_stops(self, way: str):
        slow = lambda info: time.sleep(0.02)  # noqa: E731
        counts = WAYS[way](combine(slow, TimeLimit(0.05)), limit=10**6)
        assert np.all((counts >= 2) & (counts < 20))
        assert_array_equal(of_rows(TimeLimit(3600.0)), 8)


class TestProgress:
    @way
    def test_shows_steps_loss_and_gradient(self, way: str):
        out = io.StringIO()
        with Progress(total=24, file=out, mininterval=0) as progress:
            WAYS[way](progress)
        last = out.getvalue().split("\r")[-1]
        for word in ("24/24", "step/s", "loss ", "gradient "):
            assert word in last

    def test_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxmf_opt\["):
            Progress()


class TestRecorder:
    def test_records_what_a_run_did(self):
        recorder, batched = Recorder(), Recorder()
        assert recorder.records == []
        of_rows(recorder)
        of_batch(batched)
        assert [r.lane for r in recorder.records] == [()] * 3
        assert [r.lane for r in batched.records] == [(0,), (1,), (2,)]
        for got, want in zip(batched.records, recorder.records, strict=True):
            assert_array_equal(got.step, np.arange(8))
            assert_allclose(got.loss, want.loss, rtol=1e-9)
            assert_allclose(got.grad_norm, want.grad_norm, atol=1e-7)
            assert np.all(np.diff(got.seconds) >= 0)
        for record, c in zip(recorder.records, ROWS, strict=True):
            grad = jax.grad(loss)(jnp.zeros(2), jnp.asarray(c))
            assert_allclose(record.grad_norm[0], abs(grad).max(), rtol=1e-6)

    def test_a_gradient_that_is_nan_is_seen(self):
        recorder = Recorder()
        start = (jnp.zeros(1), jnp.full(1, jnp.nan))
        loss = lambda y: jnp.sum(y[0] ** 2) + jnp.sum(y[1] ** 2)  # noqa: E731
        solve(loss, start, callback=recorder, max_optimizer_steps=1)
        assert np.isnan(recorder.records[0].grad_norm)


class TestCheckpoint:
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
    def test_goes_on_bit_for_bit(self, compiled: bool, tmp_path: Path):
        """From Ctrl-C in a step; the compiled optimizer's state has a random key."""
        noise = optax.add_noise(1e-3, 0.5, jax.random.key(7))
        noisy = {"optimizer": optax.chain(noise, optax.sgd(0.05))}
        options: dict[str, Any] = noisy if compiled else {"rtol": 1e-9}
        checkpoint = Checkpoint(tmp_path / "new" / "run.npz", every=2)

        steps: list[int] = []

        def interrupt_once(info: CallbackArgs) -> None:
            steps.append(info.step)
            if len(steps) == 5:
                raise KeyboardInterrupt

        def best(callback: Any, state: Any) -> jax.Array:
            def go(c: jax.Array) -> jax.Array:
                return run(c, callback, 9, state=state, **options).value

            return (jax.jit(go) if compiled else go)(jnp.asarray(ROWS[0]))

        assert checkpoint.load() is None
        whole = best(checkpoint, None)
        checkpoint.path.unlink()
        callback = combine(checkpoint, interrupt_once)
        # (A compiled program can raise errors of JAX only.)
        with pytest.raises((KeyboardInterrupt, jax.errors.JaxRuntimeError)):
            best(callback, None)
        assert list(tmp_path.rglob("*")) == [checkpoint.path.parent, checkpoint.path]
        assert_array_equal(best(callback, checkpoint.load()), whole)
        assert steps == [*range(5), *range(4, len(steps) - 1)]

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
        of_rows(combine(infos.append, Checkpoint(tmp_path / "x")))

    def test_says_that_a_file_is_not_a_checkpoint(self, tmp_path: Path):
        path = tmp_path / "x.npz"
        path.write_bytes(b"something else")
        with pytest.raises(ValueError, match=r"x\.npz is not a checkpoint"):
            Checkpoint(path).load()
