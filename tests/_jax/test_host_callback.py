"""Calls from compiled programs to the host, on several devices and one core."""

import threading
import time

import host_cases
import jax
import jax.numpy as jnp
import optax
import pytest
from processes import report_of

from jaxmf_opt import optimize
from jaxmf_opt._jax import host_callback
from jaxmf_opt._jax.host_runs import Team


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """What the script says, which has a process, devices and a core of its own."""
    return report_of(host_cases.__file__, devices=host_cases.DEVICES, timeout=500)


@pytest.mark.parametrize("case", host_cases.CASES)
def test_on_four_devices_and_one_core(case: str, results: dict[str, str]):
    assert results[case] == ""


def test_nothing_is_kept_of_runs_that_have_ended():
    steps: list[int] = []

    @jax.jit
    def minimum(c: jax.Array) -> jax.Array:
        return optimize(
            lambda x: (x - c) ** 2,
            jnp.array(0.0),
            callback=lambda info: steps.append(info.step),
            max_optimizer_steps=3,
            optimizer=optax.sgd(0.1),
        )

    for c in (1.0, 2.0):
        minimum(c).block_until_ready()
    assert steps == [0, 1, 2] * 2
    assert not host_callback._runs._open


def test_a_failure_waits_for_a_device_that_comes_late():
    team, error, seen = Team(2), ValueError("mine"), []

    def fails() -> None:
        team.join()
        team.fail(error)
        team.close()
        seen.append("failed")

    def late() -> None:
        time.sleep(0.2)
        assert team.join()
        seen.append(team.failure)
        team.close()

    threads = [threading.Thread(target=device) for device in (fails, late)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert seen == [error, "failed"]
