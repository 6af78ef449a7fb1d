"""The contract of callbacks, which are ordinary Python between compiled steps."""

import copy
import dataclasses
import itertools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compilations
from jaxtyping import PyTree

from jaxmf_opt import CallbackArgs, optimize
from jaxmf_opt._solver.compilation import cached as compiled

START = {"x": np.array([1.2, -0.5], np.float32), "y": np.float32(2.0)}


def loss(p: PyTree) -> jax.Array:
    """Convex, not quadratic: the default optimizer needs about ten steps."""
    x, y = p["x"], p["y"]
    return jnp.sum((x - 1.0) ** 4) + jnp.sum(x**2) + (y + x[0]) ** 2


# All tests but few solve this problem: it is compiled once.
def follow(
    verdict: Callable[[CallbackArgs], Any] = lambda _: None, **options: Any
) -> tuple[list[CallbackArgs], PyTree]:
    seen: list[CallbackArgs] = []

    def callback(info: CallbackArgs) -> Any:
        seen.append(info)
        return verdict(info)

    options = {"max_optimizer_steps": 4, **options}
    return seen, optimize(loss, START, callback=callback, **options)


class TestWhatItSees:
    def test_steps_are_python_ints_from_0(self):
        seen, _ = follow()
        assert [info.step for info in seen] == [0, 1, 2, 3]
        assert all(type(info.step) is int for info in seen)

    def test_arrays_are_float64(self):
        for info in follow()[0]:
            for x in jax.tree.leaves((info.loss, info.grad, info.params)):
                assert isinstance(x, jax.Array)
                assert x.dtype == jnp.float64
            for x in jax.tree.leaves(info.state):
                assert x.dtype == jnp.float64 or jnp.issubdtype(x.dtype, jnp.integer)

    def test_loss_and_gradient_before_the_step_params_after_it(self):
        seen, result = follow()
        with jax.enable_x64():
            before = jax.tree.map(jnp.float64, START)
            for info in seen:
                assert jax.tree.structure(info.params) == jax.tree.structure(START)
                value, grad = jax.value_and_grad(loss)(before)
                np.testing.assert_allclose(info.loss, value, rtol=1e-13)
                jax.tree.map(
                    lambda got, want: np.testing.assert_allclose(
                        got, want, rtol=1e-12, atol=1e-13
                    ),
                    info.grad,
                    grad,
                )
                before = info.params
        assert_same(result, seen[-1].params, np.float32)

    def test_state_is_the_optimizers(self):
        infos = follow()[0]
        counts = [int(optax.tree.get(info.state, "count")) for info in infos]
        assert counts == [1, 2, 3, 4]
        for info in infos:
            assert float(optax.tree.get(info.state, "learning_rate")) > 0

    def test_what_it_has_seen_stays_as_it_was(self):
        """Buffers of one step are not reused for the next."""
        copies: list[Any] = []
        seen, _ = follow(lambda info: copies.append(copy.deepcopy(info)))
        for kept, copied in zip(seen, copies, strict=True):
            assert_same(jax.tree.leaves(kept), jax.tree.leaves(copied))


class TestWhereItRuns:
    def test_64_bit_on_the_calling_thread(self, x64: bool):
        def look(_: CallbackArgs) -> None:
            assert jnp.zeros(1).dtype == jnp.float64
            threads.append(threading.get_ident())

        threads: list[int] = []
        follow(look)
        assert threads == [threading.get_ident()] * 4
        assert jnp.zeros(1).dtype == (jnp.float64 if x64 else jnp.float32)

    @pytest.mark.parametrize(
        "error", [RuntimeError("stop"), KeyboardInterrupt(), StopIteration(3)]
    )
    def test_what_it_raises_arrives(self, error: BaseException, x64: bool):
        def fail(info: CallbackArgs) -> None:
            if info.step == 1:
                raise error

        with pytest.raises(type(error)) as caught:
            follow(fail)
        assert caught.value is error
        assert jnp.zeros(1).dtype == (jnp.float64 if x64 else jnp.float32)

    def test_it_may_call_jax_and_optimize(self):
        def busy(info: CallbackArgs) -> bool:
            gradient = jax.jit(jax.grad(lambda t: t**2))(info.loss)
            inner = optimize(loss, info.params, max_optimizer_steps=3)
            jax.tree.map(lambda x: np.testing.assert_equal(x.dtype, np.float64), inner)
            values.append((float(gradient), float(loss(inner)), float(info.loss)))
            return False

        values: list[tuple[float, float, float]] = []
        assert_same(follow(busy)[1], follow()[1])
        assert len(values) == 4
        for gradient, inner, outer in values:
            assert gradient == 2 * outer
            assert inner < outer


class _NoTruth:
    def __init__(self, error: Exception):
        self.error = error

    def __bool__(self) -> bool:
        raise self.error


VERDICTS: dict[str, tuple[Callable[[], Any], bool]] = {
    "None": (lambda: None, False),
    "False": (lambda: False, False),
    "True": (lambda: True, True),
    "0": (lambda: 0, False),
    "nan": (lambda: float("nan"), True),
    "numpy False": (lambda: np.bool_(False), False),
    "numpy 2.5": (lambda: np.float32(2.5), True),
    "numpy array of one 0": (lambda: np.zeros(1), False),
    "jax True": (lambda: jnp.array(True), True),
    "jax 0.0": (lambda: jnp.array(0.0), False),
    "jax array of one 3": (lambda: jnp.array([3]), True),
    "empty string": (lambda: "", False),
    "string": (lambda: "no", True),
    "empty list": (list, False),
    "list of 0": (lambda: [0], True),
    "object": (object, True),
}


class TestWhenItStops:
    @pytest.mark.parametrize("verdict", VERDICTS)
    def test_truth_is_pythons(self, verdict: str):
        make, stops = VERDICTS[verdict]
        seen, result = follow(lambda info: make() if info.step == 1 else None)
        assert len(seen) == (2 if stops else 4)
        assert_same(result, seen[-1].params, np.float32)

    def test_what_has_no_truth_raises_as_in_python(self):
        error = ValueError("neither true nor false")
        with pytest.raises(ValueError) as caught:
            follow(lambda _: _NoTruth(error))
        assert caught.value is error

    def test_a_stopped_solve_is_the_start_of_a_longer_one(self):
        short = follow(lambda info: info.step == 1)[0]
        for a, b in zip(short, follow()[0], strict=False):
            assert_same(jax.tree.leaves(a), jax.tree.leaves(b))

    @pytest.mark.parametrize("steps", [0, 1, 7, 100])
    def test_exactly_the_number_of_steps_otherwise(self, steps: int):
        """At 100 the solve has stood still for long."""
        seen, result = follow(max_optimizer_steps=steps)
        assert [info.step for info in seen] == list(range(steps))
        assert_same(result, seen[-1].params if steps else START, np.float32)

    def test_a_stationary_start_takes_all_steps_too(self):
        seen: list[int] = []
        optimize(
            lambda x: jnp.sum(x**2),
            np.zeros(2),
            max_optimizer_steps=20,
            callback=lambda info: seen.append(info.step),
        )
        assert seen == list(range(20))


class TestTolerances:
    @pytest.mark.parametrize(
        "options",
        [{"rtol": 1e-3}, {"atol": 1e-4}, {"gtol": 1e-3}, {"rtol": 1e-6, "gtol": 1e-6}],
        ids=str,
    )
    def test_stop_early_without_a_call_for_what_did_not_move(
        self, options: dict[str, Any]
    ):
        seen, result = follow(max_optimizer_steps=200, **options)
        assert 0 < len(seen) < 60
        points = [np.append(p["x"], p["y"]) for p in (START, *(i.params for i in seen))]
        for before, after in itertools.pairwise(points):
            assert np.any(before != after)
        assert_same(result, seen[-1].params, np.float32)
        assert_same(result, optimize(loss, START, **options), np.float32)

    def test_a_start_that_meets_them_is_returned_without_a_call(self):
        seen, result = follow(gtol=1e9)
        assert seen == []
        assert_same(result, START)


class TestCompilation:
    def test_once_over_repeated_calls(self):
        follow()
        before = compiled.cache_info()
        for steps in (1, 2):
            # Another function object each time, which computes the same.
            optimize(
                lambda p: loss(p),
                START,
                max_optimizer_steps=steps,
                callback=lambda _: None,
            )
        after = compiled.cache_info()
        assert after.misses == before.misses
        assert after.hits == before.hits + 2

    def test_the_step_is_compiled_when_first_called_only(self):
        follow()
        with compilations() as events:
            follow()
            assert events == []
            optimize(lambda p: loss(p) + 1, START, callback=lambda _: True)
            assert events  # this count does see a new loss


@pytest.fixture(scope="module")
def info() -> CallbackArgs:
    return follow(max_optimizer_steps=1)[0][0]


class TestCallbackArgs:
    def test_is_a_dataclass_of_upstreams_fields(self, info: CallbackArgs):
        names = [field.name for field in dataclasses.fields(info)]
        assert names == ["step", "loss", "grad", "params", "state"]
        assert dataclasses.replace(info, step=7).step == 7

    def test_is_a_pytree(self, info: CallbackArgs):
        leaves, treedef = jax.tree.flatten(info)
        assert info.step in [x for x in leaves if isinstance(x, int)]
        again = jax.tree.unflatten(treedef, leaves)
        assert type(again) is CallbackArgs
        assert jax.tree.structure(again) == treedef
        for field in dataclasses.fields(info):
            got, want = getattr(again, field.name), getattr(info, field.name)
            assert jax.tree.structure(got) == jax.tree.structure(want)
            jax.tree.map(np.testing.assert_array_equal, got, want)

    def test_tree_map(self, info: CallbackArgs):
        with jax.enable_x64():
            double = jax.tree.map(lambda x: 2 * x, info)
        np.testing.assert_array_equal(double.loss, 2 * np.asarray(info.loss))
        np.testing.assert_array_equal(
            double.params["x"], 2 * np.asarray(info.params["x"])
        )

    def test_repr_names_every_field(self, info: CallbackArgs):
        text = repr(info)
        assert text.startswith("CallbackArgs(step=0, loss=Array(")
        for name in ("grad", "params", "state"):
            assert f"{name}=" in text


def assert_same(got: PyTree, want: PyTree, dtype: Any = None) -> None:
    """Same bits, after `want` has been cast to `dtype`."""

    def compare(a: Any, b: Any) -> None:
        b = np.asarray(b) if dtype is None else np.asarray(b).astype(dtype)
        assert np.asarray(a).dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(compare, got, want)
