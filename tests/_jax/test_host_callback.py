"""Calls from compiled programs to the host, on several devices and one core."""

import threading
import time
from typing import Any

import host_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import report_of

from jaxmf_opt._jax import host_callback, host_runs
from jaxmf_opt._jax.host_runs import Team


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """What the script says, which has a process, devices and a core of its own."""
    return report_of(host_cases.__file__, devices=host_cases.DEVICES, timeout=500)


@pytest.mark.parametrize("case", host_cases.CASES)
def test_on_four_devices_and_one_core(case: str, results: dict[str, str]):
    assert results[case] == ""


class TestCall:
    """The primitive by itself."""

    class Adder:
        """Adds up what it hears, and says stop above a limit."""

        def __init__(self, limit: float = np.inf):
            self.limit = limit
            self.heard: list[Any] = []

        def listen(self) -> host_runs.Listener:
            def listener(index: tuple[int, ...], operands: Any) -> bool:
                self.heard.append((index, *map(float, operands)))
                return bool(operands[0] > self.limit)

            return listener

    @staticmethod
    def count(adder: "TestCall.Adder", first: jax.Array) -> jax.Array:
        """Doubles until told to stop."""
        run = host_callback.open_run(adder)
        x, stop = jax.lax.while_loop(
            lambda carry: ~carry[1],
            lambda carry: (
                2 * carry[0],
                host_callback.call(adder, run, [carry[0]], ~carry[1]),
            ),
            (first, jnp.array(False)),
        )
        return jnp.where(host_callback.close_run(adder, run, stop), x, 0)

    @pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_in_order_and_until_it_stops(self, wrap):
        adder = self.Adder(limit=10)
        got = wrap(lambda x: self.count(adder, x))(jnp.array(1.5))
        assert got == 24.0
        assert adder.heard == [((), x) for x in (1.5, 3.0, 6.0, 12.0)]

    def test_active_lanes_of_nested_batches(self):
        adder = self.Adder(limit=10)
        first = jnp.array([[1.5, 20.0], [4.0, 9.0]])
        got = jax.vmap(jax.vmap(lambda x: self.count(adder, x)))(first)
        np.testing.assert_array_equal(got, [[24.0, 40.0], [32.0, 36.0]])
        assert sorted(adder.heard) == [
            *[((0, 0), x) for x in (1.5, 3.0, 6.0, 12.0)],
            ((0, 1), 20.0),
            *[((1, 0), x) for x in (4.0, 8.0, 16.0)],
            *[((1, 1), x) for x in (9.0, 18.0)],
        ]

    def test_it_is_seen_in_a_program(self):
        adder = self.Adder()
        jaxpr = jax.make_jaxpr(lambda x: self.count(adder, x))(1.0)
        assert host_callback.calls_host(jaxpr.jaxpr)
        assert not host_callback.calls_host(jax.make_jaxpr(jnp.sin)(1.0).jaxpr)

    def test_keys_arrive_as_their_data(self):
        heard = []

        class Host:
            def listen(self):
                return lambda index, operands: bool(heard.append(operands))

        host = Host()

        @jax.jit
        def fn(key):
            run = host_callback.open_run(host)
            stop = host_callback.call(host, run, [key], jnp.array(True))
            return host_callback.close_run(host, run, stop)

        key = jax.random.key(7)
        assert fn(key)
        np.testing.assert_array_equal(heard[0][0], jax.random.key_data(key))

    def test_nothing_is_kept_of_runs_that_have_ended(self):
        adder = self.Adder(limit=10)
        fn = jax.jit(lambda x: self.count(adder, x))
        for _ in range(3):
            fn(1.0).block_until_ready()
        assert not host_callback._runs._open


class TestTeam:
    """How the devices of a program wait for each other."""

    def run_all(self, *devices):
        threads = [threading.Thread(target=d) for d in devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()

    def test_each_waits_for_all(self):
        team, closed = Team(2), []

        def quick():
            assert team.join()
            assert not team.join()  # a second solve of the same device
            team.close()
            closed.append("quick")

        def slow():
            assert team.join()
            time.sleep(0.2)
            closed.append("slow")
            team.close()

        self.run_all(quick, slow)
        assert closed == ["slow", "quick"]
        assert not team.join()

    def test_a_failure_frees_those_that_wait(self):
        team, error = Team(2), ValueError("mine")

        def fails():
            team.join()
            team.fail(error)
            team.close()

        self.run_all(lambda: team.join() and team.close(), fails)
        assert team.failure is error
        assert not team.join()

    def test_a_failure_waits_for_those_that_come_late(self):
        team, error, seen = Team(2), ValueError("mine"), []

        def fails():
            team.join()
            team.fail(error)
            team.close()
            seen.append("failed")

        def late():
            time.sleep(0.2)
            assert team.join()
            seen.append(team.failure)
            team.close()

        self.run_all(fails, late)
        assert seen == [error, "failed"]

    @pytest.mark.parametrize("failure", [None, ValueError("mine")])
    def test_one_that_never_comes_is_not_waited_for(
        self, failure: Exception | None, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(Team, "PATIENCE_BEFORE_OPEN", 0.05)
        team = Team(2)

        def alone():
            team.join()
            if failure is not None:
                team.fail(failure)
            team.close()

        self.run_all(alone)
        assert not team.join()


def test_private_name_of_jax_is_where_it_was():
    """Without it, callbacks on several devices would be called on each of them."""
    from jax._src.callback import _callback_op_sharding

    assert host_callback.callback_op_sharding is _callback_op_sharding
