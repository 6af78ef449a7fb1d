"""Callbacks of compiled, batched and differentiated solves, against the eager ones."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from compiling import calls_host
from differentiating import value_beside
from jax import lax

from jaxmf_opt import CallbackArgs, Lane, combine, optimize, solve, traced

ROWS = np.array(
    [[0.25, 1.0, -2.0], [2.0, 0.5, 0.125], [-1.0, 3.0, 0.75], [0.0, 0.25, 0.5]],
    np.float32,
)
STEPS = 6
LIMIT = 3.25  # of the loss: reached by the rows after different numbers of steps

# Compiles in a third of the time of L-BFGS, and has a state.
CHEAP = optax.sgd(0.02, momentum=0.5)

Verdict = Callable[[CallbackArgs], Any]
VERDICTS: dict[str, Verdict] = {
    "no stop": lambda info: None,
    "stop by lane": lambda info: info.loss < LIMIT,
}


def loss(y: jax.Array, c: jax.Array) -> jax.Array:
    c = jnp.asarray(c, y.dtype)
    return jnp.sum(jnp.cosh(y - c)) + jnp.sum((y - c) ** 4)


def minimum(c: jax.Array, callback: Verdict) -> jax.Array:
    return optimize(
        lambda y: loss(y, c),
        jnp.zeros(c.shape, c.dtype),
        callback=callback,
        max_optimizer_steps=STEPS,
        optimizer=CHEAP,
    )


class Calls:
    """A callback in NumPy that remembers what it has been told, by lane."""

    def __init__(self, verdict: Verdict):
        self.verdict = verdict
        self.of_lane: dict[Lane, list[CallbackArgs]] = defaultdict(list)

    def __call__(self, info: CallbackArgs) -> Any:
        self.of_lane[info.lane].append(info)
        return self.verdict(info)

    def by_row(self) -> list[list[CallbackArgs]]:
        """Of each lane, ordered by the first loss, which differs between the rows."""
        return sorted(self.of_lane.values(), key=lambda calls: float(calls[0].loss))


class Eager(NamedTuple):
    """What an eager solve of each row did."""

    calls: list[list[CallbackArgs]]
    results: np.ndarray


@functools.cache
def eager(verdict: str, dtype: Any = np.float32) -> Eager:
    calls = Calls(VERDICTS[verdict])
    with jax.enable_x64(dtype == np.float64):
        rows = [minimum(jnp.asarray(row, dtype), calls) for row in ROWS]
    return Eager(calls.by_row(), np.stack(rows))


def of_each(f: Any) -> Any:
    return lambda rows: jnp.stack([f(c) for c in rows])


def blocks(rows: jax.Array) -> jax.Array:
    return rows.reshape(2, 2, 3)


slope = functools.partial(value_beside, jax.grad)

WAYS: dict[str, Callable[[Any], Callable[[jax.Array], jax.Array]]] = {
    "jit": lambda f: of_each(jax.jit(f)),
    "vmap": jax.vmap,
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "vmap of vmap": lambda f: lambda c: jax.vmap(jax.vmap(f))(blocks(c)).reshape(4, 3),
    "map": lambda f: lambda c: lax.map(f, c),
    "grad": lambda f: of_each(slope(f)),
    "vmap of grad": lambda f: jax.vmap(slope(f)),
    "jit of scan": lambda f: jax.jit(
        lambda c: lax.scan(lambda _, c: (None, f(c)), None, c)[1]
    ),
    "vmap of map": lambda f: (
        lambda c: jax.vmap(lambda b: lax.map(f, b))(blocks(c)).reshape(4, 3)
    ),
    "cond": lambda f: of_each(
        jax.jit(lambda c: lax.cond(c[0] > -9, f, lambda c: f(c + 1), c))
    ),
    "jit of vmap of grad of jit": lambda f: jax.jit(jax.vmap(slope(jax.jit(f)))),
    "hessian": lambda f: jax.jit(jax.vmap(value_beside(jax.hessian, f))),
}
# With and without x64 in turn.
CELLS = [
    *((way, "stop by lane", i % 2 == 0) for i, way in enumerate(WAYS)),
    ("vmap", "no stop", True),
]
TRACED = ("vmap of vmap", "vmap of grad", "jit of scan", "hessian")


class TestEveryWay:
    """As often, in the order and with the values of the eager solve."""

    @pytest.fixture(autouse=True)
    def setting(self, x64: bool):
        with jax.enable_x64(x64):
            yield

    @pytest.mark.parametrize(("way", "verdict", "x64"), CELLS)
    def test_host(self, way: str, verdict: str, x64: bool):
        dtype = np.float64 if x64 else np.float32
        want = eager(verdict, dtype)
        calls = Calls(VERDICTS[verdict])
        solve = functools.partial(minimum, callback=calls)
        got = jax.block_until_ready(WAYS[way](solve)(jnp.asarray(ROWS, dtype)))
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want.results, rtol=1e-6, atol=1e-7)
        assert [len(c) for c in calls.by_row()] == [len(c) for c in want.calls]
        for seen, expected in zip(calls.by_row(), want.calls, strict=True):
            for i, (info, other) in enumerate(zip(seen, expected, strict=True)):
                assert type(info.step) is int
                assert info.step == other.step == i
                leaves = jax.tree.leaves((info.loss, info.grad, info.params))
                for x in leaves:
                    assert isinstance(x, (np.ndarray, np.generic))
                    assert x.dtype == np.float64
                jax.tree.map(
                    lambda a, b: np.testing.assert_allclose(
                        a, b, rtol=1e-9, atol=1e-12
                    ),
                    (info.loss, info.grad, info.params, info.state),
                    (other.loss, other.grad, other.params, other.state),
                )

    @pytest.mark.parametrize(
        ("way", "x64"), [(way, i % 2 == 0) for i, way in enumerate(TRACED)]
    )
    def test_traced(self, way: str, x64: bool):
        dtype = np.float64 if x64 else np.float32
        want = eager("stop by lane", dtype)
        callback = traced(VERDICTS["stop by lane"])
        solve = functools.partial(minimum, callback=callback)
        got = WAYS[way](solve)(jnp.asarray(ROWS, dtype))
        np.testing.assert_allclose(got, want.results, rtol=1e-6, atol=1e-7)


def test_the_rows_stop_at_different_steps():
    """Or the tests above would not test what they say."""
    assert {len(calls) for calls in eager("no stop").calls} == {STEPS}
    assert len({len(calls) for calls in eager("stop by lane").calls}) >= 3


class TestHost:
    def test_a_branch_that_is_not_taken_is_not_called(self):
        calls = Calls(VERDICTS["no stop"])
        fn = jax.jit(
            lambda c: lax.cond(c[0] > 9, lambda c: minimum(c, calls), jnp.sin, c)
        )
        np.testing.assert_allclose(fn(ROWS[0]), np.sin(ROWS[0]), rtol=1e-6)
        assert not calls.of_lane

    def test_what_it_has_seen_stays_as_it_was(self):
        copies: list[Any] = []

        def verdict(info: CallbackArgs) -> None:
            copies.append(jax.tree.map(np.copy, info))

        calls = Calls(verdict)
        jax.block_until_ready(jax.jit(lambda c: minimum(c, calls))(ROWS[0]))
        (seen,) = calls.by_row()
        for kept, copied in zip(seen, copies, strict=True):
            jax.tree.map(np.testing.assert_array_equal, kept, copied)

    def test_tolerances_stop_without_a_call(self):
        counts = []
        for transform in (of_each, lambda f: jax.jit(jax.vmap(f))):
            calls = Calls(lambda info: None)

            def one(c: jax.Array, calls: Calls = calls) -> jax.Array:
                start = jnp.zeros(c.shape)
                return optimize(lambda y: loss(y, c), start, callback=calls, rtol=1e-4)

            jax.block_until_ready(transform(one)(jnp.asarray(ROWS)))
            counts.append([len(seen) for seen in calls.by_row()])
        assert counts[0] == counts[1]
        assert all(0 < n < 30 for n in counts[0])

    def test_a_lane_that_is_no_longer_finite_takes_its_steps_too(self):
        """As upstream's loop does. And its number of calls is that of its steps."""
        calls = Calls(VERDICTS["no stop"])

        def one(scale: jax.Array) -> Any:
            solution = solve(
                lambda y: scale.astype(y.dtype) * jnp.sum(y**4),
                jnp.full(2, 2.0),
                callback=calls,
                max_optimizer_steps=9,
                optimizer=optax.sgd(1e-3),
            )
            failed = solution.result == optx.RESULTS.nonfinite
            return solution.stats["num_steps"], failed

        scales = jnp.array([1e4, 1.0])
        steps, failed = jax.vmap(one)(scales)
        assert steps.tolist() == [9, 9]
        assert failed.tolist() == [True, False]
        for seen in calls.of_lane.values():
            assert [info.step for info in seen] == list(range(9))

    @pytest.mark.parametrize("steps", [0, 1])
    def test_few_steps(self, steps: int):
        calls = Calls(VERDICTS["no stop"])
        start = jnp.ones(2)
        got = jax.jit(
            lambda c: optimize(
                lambda y: loss(y, c), c, callback=calls, max_optimizer_steps=steps
            )
        )(start)
        jax.block_until_ready(got)
        assert [len(seen) for seen in calls.by_row()] == [1] * steps


class MineError(Exception):
    pass


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


# NUL ends a text in C, and half of a surrogate pair ended the process.
HALF = "a\ud800b"
ODD_TEXTS: list[tuple[Exception, str]] = [
    (MineError("a\0b"), r"MineError: a\x00b"),
    (MineError(HALF), r"MineError: a\ud800b"),
    (SpeechlessError(), "SpeechlessError (its `__str__` raised ValueError)"),
]


class TestExceptions:
    @pytest.mark.parametrize(
        "error",
        [
            KeyboardInterrupt("mine"),
            StopIteration("mine"),
            *(error for error, _ in ODD_TEXTS[1:]),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_eager_the_same_object(self, error: BaseException):
        def fail(info: CallbackArgs) -> None:
            if info.step == 2:
                raise error

        calls = Calls(fail)
        with pytest.raises(type(error)) as caught:
            WAYS["vmap of grad"](lambda c: minimum(c, calls))(jnp.asarray(ROWS))
        assert caught.value is error
        # The others of the batch are told of no more steps.
        assert max(info.step for seen in calls.of_lane.values() for info in seen) == 2
        assert sum(len(seen) == 3 for seen in calls.of_lane.values()) == 1

    @pytest.mark.parametrize("way", ["jit of vmap", "map"])
    def test_compiled_type_and_message(self, way: str):
        def fail(info: CallbackArgs) -> None:
            if info.step == 2:
                raise MineError("the reason")

        calls = Calls(fail)
        with pytest.raises(jax.errors.JaxRuntimeError, match="MineError: the reason"):
            jax.block_until_ready(
                WAYS[way](lambda c: minimum(c, calls))(jnp.asarray(ROWS))
            )
        assert max(info.step for seen in calls.of_lane.values() for info in seen) == 2

    def test_whatever_is_used_of_the_solution(self):
        """Here nothing of the solve itself."""

        def fail(_: CallbackArgs) -> None:
            raise MineError("the reason")

        @jax.jit
        def fn(c: jax.Array) -> Any:
            return solve(lambda y: loss(y, c), jnp.zeros(3), callback=fail).result

        with pytest.raises(jax.errors.JaxRuntimeError, match="MineError: the reason"):
            jax.block_until_ready(fn(ROWS[0]))

    def test_compiled_with_an_odd_text(self):
        errors = [error for error, _ in ODD_TEXTS]

        def fail(_: CallbackArgs) -> None:
            raise errors.pop(0)

        fn = jax.jit(lambda c: minimum(c, fail))
        for _, text in ODD_TEXTS:
            with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(text)):
                jax.block_until_ready(fn(ROWS[0]))

    def test_a_solve_after_one_that_failed(self):
        error = MineError("once")

        def fail(info: CallbackArgs) -> None:
            if failing:
                raise error

        fn = jax.vmap(lambda c: minimum(c, fail))
        failing = True
        with pytest.raises(MineError):
            fn(jnp.asarray(ROWS))
        failing = False
        np.testing.assert_allclose(
            fn(jnp.asarray(ROWS)), eager("no stop").results, rtol=1e-6, atol=1e-7
        )


class TestTraced:
    def test_costs_no_host_call(self):
        """As another callback does."""
        on_host = VERDICTS["stop by lane"]
        for callback in (on_host, traced(on_host)):
            fn = jax.jit(jax.vmap(lambda c, callback=callback: minimum(c, callback)))
            text = fn.lower(ROWS).compile().as_text()
            assert text is not None
            assert calls_host(text) == (callback is on_host)

    def test_goes_through_export(self):
        fn = jax.jit(jax.vmap(lambda c: minimum(c, traced(VERDICTS["stop by lane"]))))
        data = jax.export.export(fn)(ROWS).serialize()
        got = jax.export.deserialize(data).call(ROWS)
        want = eager("stop by lane").results
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)

    def test_limits_that_are_arrays(self):
        """What it closes over may be traced and batched, without the loss being so."""
        limits = jnp.array([100.0, LIMIT, 0.0])
        c = jnp.asarray(ROWS[2], float)

        def steps(limit: jax.Array) -> jax.Array:
            return solve(
                lambda y: loss(y, c),
                jnp.zeros(3),
                callback=traced(lambda info: info.loss < limit.astype(info.loss.dtype)),
                max_optimizer_steps=STEPS,
                optimizer=CHEAP,
            ).stats["num_steps"]

        (stopped,) = (len(s) for s in eager("stop by lane").calls[-1:])
        counts = [1, stopped, STEPS]
        np.testing.assert_array_equal(jax.vmap(steps)(limits), counts)
        np.testing.assert_array_equal(jax.jit(jax.vmap(steps))(limits), counts)
        np.testing.assert_array_equal([steps(limit) for limit in limits], counts)

    @pytest.mark.parametrize("value", [np.bool_(True), None])
    def test_constants(self, value: Any):
        solution = solve(
            lambda y: loss(y, ROWS[0]),
            np.zeros(3),
            callback=traced(lambda _: value),
            max_optimizer_steps=2,
        )
        assert solution.stats["num_steps"] == (1 if value else 2)

    @pytest.mark.parametrize(
        ("value", "error", "words"),
        [
            (1, TypeError, "got 1"),
            (np.float64(1.0), TypeError, "dtype float64"),
            (np.array([True]), ValueError, r"shape \(1,\)"),
        ],
    )
    def test_refuses_what_is_no_boolean(self, value: Any, error: Any, words: str):
        with pytest.raises(error, match=rf"`callback`.*boolean scalar, .*{words}"):
            minimum(jnp.zeros(2), traced(lambda _: value))

    def test_the_default_optimizer_takes_all_its_steps(self):
        """At the minimum too, where without a callback it would end."""
        solution = solve(
            lambda y: jnp.sum(y**2),
            np.ones(2),
            rtol=0.0,
            callback=traced(lambda _: False),
        )
        assert solution.stats["num_steps"] == 250


class TestCombine:
    @pytest.mark.parametrize("way", ["jit", "vmap"])
    def test_all_are_called_and_any_stops(self, way: str):
        first, second = Calls(lambda info: info.step == 2), Calls(lambda info: None)
        both = combine(first, combine(traced(lambda info: info.loss < 0)), second)
        fn: Any = lambda c: minimum(c, both)  # noqa: E731
        fn = {"jit": jax.jit, "vmap": jax.vmap}[way](fn)
        jax.block_until_ready(fn(jnp.asarray(ROWS if way == "vmap" else ROWS[0])))
        lanes = len(ROWS) if way == "vmap" else 1
        for calls in (first, second):
            assert [len(seen) for seen in calls.by_row()] == [3] * lanes

    def test_a_traced_one_may_make_it_part_of_a_program(self):
        """Nothing else here is traced by the eager `vmap`."""
        calls = Calls(VERDICTS["no stop"])

        def steps(limit: jax.Array) -> jax.Array:
            return solve(
                lambda y: loss(y, ROWS[2]),
                np.zeros(3),
                callback=combine(
                    traced(lambda info: info.loss < limit.astype(info.loss.dtype)),
                    calls,
                ),
                max_optimizer_steps=STEPS,
                optimizer=CHEAP,
            ).stats["num_steps"]

        counts = jax.vmap(steps)(jnp.array([100.0, 0.0]))
        assert counts.tolist() == [1, STEPS]
        assert sorted(map(len, calls.of_lane.values())) == [1, STEPS]
