"""`optimize`, called in every way that this library supports."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmf_opt import optimize
from jaxmf_opt._solver.compilation import cached as compiled


def bowl(y: jax.Array, centre: jax.Array) -> jax.Array:
    """A strictly convex function with its minimum at `centre`."""
    weights = jnp.arange(1.0, y.size + 1).reshape(y.shape).astype(y.dtype)
    difference = y - centre.astype(y.dtype)
    return jnp.sum(weights * difference**2) + jnp.sum(difference**4)


CENTRES = jnp.array([[0.3, -1.0, 2.0], [5.0, 0.1, -4.0]])


def minimum(start: jax.Array, centre: jax.Array) -> jax.Array:
    return optimize(
        lambda y: bowl(y, centre),
        start,
        optimizer=optax.sgd(0.005),
        max_optimizer_steps=4000,
    )


STARTS = jnp.arange(6.0).reshape(2, 3)
WAYS: dict[str, tuple[Callable[..., Any], Any]] = {
    "jit of vmap of vmap of jit": (
        jax.jit(jax.vmap(jax.vmap(jax.jit(minimum), (None, 0)), (0, None))),
        (STARTS, CENTRES),
    ),
    "nothing traced, under jit": (
        jax.jit(lambda: minimum(STARTS[0], CENTRES[0])),
        (),
    ),
}


class TestInLargerPrograms:
    """Over params, over what the loss closes over, over both; nested."""

    @pytest.mark.parametrize("way", WAYS)
    def test_value(self, way: str):
        fn, args = WAYS[way]
        out = fn(*args)
        centres = CENTRES if out.ndim > 1 else CENTRES[0]
        want = np.broadcast_to(centres, out.shape)
        np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-7)

    def test_a_solve_inside_a_loss(self):
        def outer(y: jax.Array) -> jax.Array:
            inner = optimize(lambda z: bowl(z, CENTRES[0]), jnp.zeros(3))
            return bowl(y, jax.lax.stop_gradient(inner))

        np.testing.assert_allclose(optimize(outer, jnp.ones(3)), CENTRES[0], rtol=1e-6)


class TestCompilation:
    def test_a_fresh_closure_over_another_array_is_not_compiled(self):
        def closure(centre: jax.Array) -> Callable[[jax.Array], jax.Array]:
            return lambda y: bowl(y, centre) + 1.0

        values = self._compiles_once([closure(c) for c in CENTRES])
        np.testing.assert_allclose(values, CENTRES, rtol=1e-6)

    def test_a_fresh_equal_optimizer_is_not_compiled(self):
        self._compiles_once(
            [lambda y: bowl(y, CENTRES[1])] * 2,
            optimizer=lambda: optax.lbfgs(memory_size=3),
        )

    def test_the_number_of_steps_and_the_tolerances_are_not_compiled_in(self):
        loss = functools.partial(bowl, centre=CENTRES[0] + 1)
        before = compiled.cache_info().misses
        for steps, rtol in ((3, 1e-3), (5, 1e-8)):
            optimize(loss, jnp.zeros(3), max_optimizer_steps=steps, rtol=rtol)
        assert compiled.cache_info().misses == before + 1

    def _compiles_once(
        self, losses: list[Any], optimizer: Callable[[], Any] | None = None
    ) -> list[jax.Array]:
        options = {} if optimizer is None else {"optimizer": optimizer()}
        values = [optimize(losses[0], jnp.ones(3), **options)]
        count = _compilations()
        for loss in losses[1:]:
            options = {} if optimizer is None else {"optimizer": optimizer()}
            values.append(optimize(loss, jnp.ones(3), **options))
        assert _compilations() == count
        return values

    def test_a_rebound_global_gives_the_new_answer(self):
        scope: dict[str, Any] = {"target": 1.0, "jnp": jnp}
        exec("def loss(y): return jnp.sum((y - target) ** 2)", scope)
        first = optimize(scope["loss"], jnp.zeros(2))
        scope["target"] = 2.0
        second = optimize(scope["loss"], jnp.zeros(2))
        np.testing.assert_allclose([first, second], [[1, 1], [2, 2]], rtol=1e-6)

    def test_custom_rules_that_differ_are_told_apart(self):
        """Two losses of the same values, with other derivatives."""

        def loss_with(slope: float) -> Callable[[jax.Array], jax.Array]:
            @jax.custom_jvp
            def square(y: jax.Array) -> jax.Array:
                return jnp.sum(y**2)

            square.defjvp(lambda p, t: (square(*p), slope * jnp.sum(2 * p[0] * t[0])))
            return square

        steps = [
            optimize(
                loss_with(slope),
                jnp.ones(2),
                max_optimizer_steps=1,
                optimizer=optax.sgd(0.1),
            )
            for slope in (1.0, -1.0)
        ]
        np.testing.assert_allclose(steps, [[0.8, 0.8], [1.2, 1.2]], rtol=1e-6)


def _compilations() -> int:
    """How many programs have been compiled: misses of the cache."""
    return compiled.cache_info().misses
