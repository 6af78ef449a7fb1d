"""Solves under JAX's settings for debugging raise what is wrong, and nothing else."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxmf_opt


@contextlib.contextmanager
def switched_on(*alarms: str) -> Iterator[None]:
    """In all threads."""
    for name in alarms:
        jax.config.update(f"jax_debug_{name}", True)
    try:
        yield
    finally:
        for name in alarms:
            jax.config.update(f"jax_debug_{name}", False)


@pytest.fixture(params=["nans", "infs"])
def alarm(request: pytest.FixtureRequest) -> Iterator[float]:
    """Switches an alarm on; what it looks for."""
    with switched_on(request.param):
        yield float(request.param[:-1])


def loss(x: jax.Array, c: Any = 1.0) -> jax.Array:
    return jnp.sum((x - jnp.asarray(c, x.dtype)) ** 2) + jnp.sum(x**4)


# It is all the same to an alarm, and compiles quickly.
PLAIN = optax.sgd(0.05)
optimize = functools.partial(jaxmf_opt.optimize, optimizer=PLAIN)
solve = functools.partial(jaxmf_opt.solve, optimizer=PLAIN)
sweep = functools.partial(jaxmf_opt.sweep, optimizer=PLAIN)

START = jnp.zeros(3)
LANES = jnp.arange(2.0)


def minimum(c: Any) -> jax.Array:
    return jnp.sum(optimize(lambda x: loss(x, c), START, gtol=1e-3))


def resumed() -> Any:
    state = solve(loss, START, max_optimizer_steps=2).state
    return solve(loss, START, state=state, history=True, gtol=1e-3)


SOUND: dict[str, Callable[[], Any]] = {
    "callback and history": lambda: solve(
        loss, START, callback=lambda _: False, history=True, gtol=1e-3
    ),
    "state": resumed,
    "vmap of grad": lambda: jax.vmap(jax.grad(minimum))(LANES),
    "callback, jit": lambda: jax.jit(
        lambda: optimize(loss, START, callback=lambda _: False)
    )(),
    "sweep": lambda: sweep(loss, START, LANES, history=True, gtol=1e-3),
    "sweep of no steps": lambda: sweep(loss, START, LANES, max_optimizer_steps=0),
    "sweep, callback": lambda: sweep(
        loss, START, LANES, callback=lambda _: False, max_optimizer_steps=9
    ),
}


@pytest.mark.parametrize("way", SOUND)
def test_no_alarm_where_all_is_finite(way: str):
    with switched_on("nans", "infs"):
        jax.block_until_ready(SOUND[way]())


def test_an_alarm_where_the_loss_is_not(alarm: float):
    def bad(x: jax.Array, c: Any = 0.0) -> jax.Array:
        far = jnp.asarray(x[0] > 0.1, x.dtype) * jnp.asarray(alarm, x.dtype)
        return jnp.where(x[0] > 0.1, far, loss(x)) + jnp.asarray(c, x.dtype)

    steps: list[int] = []
    start = jnp.ones(3)
    calls: list[Callable[[], Any]] = [
        lambda: optimize(bad, start),
        lambda: jax.grad(lambda c: optimize(lambda x: bad(x, c), start)[0])(0.5),
        lambda: optimize(bad, start, rtol=1e-8),
        lambda: optimize(bad, start, callback=lambda info: steps.append(info.step)),
        lambda: jax.vmap(lambda c: optimize(lambda x: bad(x, c), start))(LANES),
        # A finite loss with a gradient that is not.
        lambda: jax.vmap(
            lambda c: optimize(
                lambda x: (loss(x, c), jnp.full_like(x, alarm)),
                start,
                grad=True,
                max_optimizer_steps=0,
            )
        )(LANES),
        lambda: sweep(bad, start, LANES),
        lambda: sweep(bad, start, LANES, rtol=0.0),
    ]
    # (Both alarms are raised by the same lines.)
    for call in calls if jnp.isnan(alarm) else calls[:2]:
        with pytest.raises(FloatingPointError):
            call()
    assert not steps  # raised where it happened


@pytest.mark.parametrize("callback", [None, lambda _: False])
def test_nothing_is_sent_that_nobody_has_asked_for(callback: Any):
    options = {} if callback is None else {"callback": callback}

    def run(params: Any) -> Any:
        return solve(loss, params, gtol=1e-3, history=True, **options)

    run(START)
    with jax.transfer_guard("disallow"):
        run(START)
        if callback is None:
            with pytest.raises(jax.errors.JaxRuntimeError, match="transfer"):
                run([jax.device_get(START)][0])
