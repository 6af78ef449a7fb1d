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
from jaxtyping import PyTree
from numpy.testing import assert_allclose, assert_array_equal

from jaxmf_opt import CallbackArgs, optimize

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


def assert_same(got: PyTree, want: PyTree, dtype: Any = None) -> None:
    """Same bits, after `want` has been cast to `dtype`."""

    def compare(a: Any, b: Any) -> None:
        b = np.asarray(b) if dtype is None else np.asarray(b).astype(dtype)
        assert np.asarray(a).dtype == b.dtype
        assert_array_equal(a, b)

    jax.tree.map(compare, got, want)


class TestWhatItSees:
    def test_types(self):
        """Ints from 0, float64 arrays, and the state of the optimizer."""
        seen, _ = follow()
        assert [info.step for info in seen] == [0, 1, 2, 3]
        for info in seen:
            assert type(info.step) is int
            assert int(optax.tree.get(info.state, "count")) == info.step + 1
            assert float(optax.tree.get(info.state, "learning_rate")) > 0
            for x in jax.tree.leaves((info.loss, info.grad, info.params)):
                assert isinstance(x, jax.Array) and x.dtype == jnp.float64
            for x in jax.tree.leaves(info.state):
                assert x.dtype == jnp.float64 or jnp.issubdtype(x.dtype, jnp.integer)

    def test_loss_and_gradient_before_the_step_params_after_it(self):
        seen, result = follow()
        with jax.enable_x64():
            before = jax.tree.map(jnp.float64, START)
            for info in seen:
                assert jax.tree.structure(info.params) == jax.tree.structure(START)
                value, grad = jax.value_and_grad(loss)(before)
                assert_allclose(info.loss, value, rtol=1e-13)
                for name, want in grad.items():
                    got = info.grad[name]
                    assert_allclose(got, want, rtol=1e-12, atol=1e-13)
                before = info.params
        assert_same(result, seen[-1].params, np.float32)

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

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), StopIteration(3)])
    def test_what_it_raises_arrives(self, error: BaseException):
        def fail(info: CallbackArgs) -> None:
            if info.step == 1:
                raise error

        with pytest.raises(type(error)) as caught:
            follow(fail)
        assert caught.value is error
        assert jnp.zeros(1).dtype == jnp.float32

    def test_it_may_call_jax_and_optimize(self):
        def busy(info: CallbackArgs) -> None:
            assert jax.jit(jax.grad(lambda t: t**2))(info.loss) == 2 * info.loss
            inner = optimize(loss, info.params, max_optimizer_steps=3)
            assert loss(inner) < info.loss

        assert_same(follow(busy)[1], follow()[1])


class TestWhenItStops:
    def test_truth_is_pythons(self):
        goes_on = [None, np.bool_(False), np.zeros(1), jnp.array(0.0), ""]
        stops = [True, float("nan"), np.float32(2.5), jnp.array([3]), [0]]
        for answer in goes_on + stops:
            seen, result = follow(lambda info, x=answer: x if info.step == 1 else None)
            assert len(seen) == (2 if any(answer is x for x in stops) else 4)
            assert_same(result, seen[-1].params, np.float32)

    @pytest.mark.parametrize("steps", [0, 100])
    def test_exactly_the_number_of_steps_otherwise(self, steps: int):
        """At 100 the solve has stood still for long."""
        seen, result = follow(max_optimizer_steps=steps)
        assert [info.step for info in seen] == list(range(steps))
        assert_same(result, seen[-1].params if steps else START, np.float32)

    @pytest.mark.parametrize("name", ["rtol", "atol", "gtol"])
    def test_tolerances_stop_without_a_call_for_what_did_not_move(self, name: str):
        options: dict[str, Any] = {name: 1e-3}
        seen, result = follow(max_optimizer_steps=200, **options)
        assert 0 < len(seen) < 60
        points = [np.append(p["x"], p["y"]) for p in (START, *(i.params for i in seen))]
        for before, after in itertools.pairwise(points):
            assert np.any(before != after)
        assert_same(result, seen[-1].params, np.float32)
        assert_same(result, optimize(loss, START, **options), np.float32)


class TestCallbackArgs:
    def test_is_a_dataclass(self):
        (info,), _ = follow(max_optimizer_steps=1)
        assert dataclasses.replace(info, step=7).step == 7
        assert repr(info).startswith("CallbackArgs(step=0, loss=Array(")
        with pytest.raises(AttributeError, match="has no `lane` here"):
            _ = dataclasses.replace(info).lane

    def test_is_a_pytree(self):
        (info,), _ = follow(max_optimizer_steps=1)
        with jax.enable_x64():
            double = jax.tree.map(lambda x: 2 * x, info)
        assert type(double) is CallbackArgs
        assert jax.tree.structure(double) == jax.tree.structure(info)
        assert_array_equal(double.loss, 2 * np.asarray(info.loss))
        assert_array_equal(double.params["x"], 2 * np.asarray(info.params["x"]))
