"""How many lanes run at the same time: by their number, size, devices and memory."""

import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax import lax

from jaxmf_opt import DEFAULT_OPTIMIZER
from jaxmf_opt.sweeps._lane import LaneSetting
from jaxmf_opt.sweeps._lanes import lanes_of
from jaxmf_opt.sweeps._width import (
    _lane_bytes,
    _peak_bytes,
    default_width,
    narrower_widths,
    num_workers,
)

MANY, MIB = 2**20, 2**20


def cpus(size: int) -> Any:
    """A mesh of as many CPUs as one likes; nothing is run on it."""
    return mock.Mock(devices=np.array(jax.devices("cpu")[:1] * size), size=size)


def accelerators(size: int, bytes_limit: int | None = None) -> Any:
    stats = None if bytes_limit is None else {"bytes_limit": bytes_limit}
    device = mock.Mock(platform="accelerator", memory_stats=lambda: stats)
    return mock.Mock(devices=np.array([device] * size), size=size)


class Problem(NamedTuple):
    """A loss that is traced and never run, and where it is to be minimised."""

    loss: Callable[..., Any]
    params: Any = np.zeros(2)

    @property
    def setting(self) -> LaneSetting:
        params = jax.ShapeDtypeStruct(self.params.shape, "float64")
        return LaneSetting(
            *(self.loss, False, DEFAULT_OPTIMIZER, (0.0, 0.0, 0.0), 250, None, ()),
            *(params, ["float64"], "int64", "float64", False, None),
        )

    def lanes(self, count: int) -> Any:
        arguments = [("params", self.params), ("hyperparams", np.zeros(count))]
        return lanes_of([*arguments, ("state", None)], (None, 0, 0))

    def width(self, count: int, mesh: Any, workers: int = 1) -> int:
        width = default_width(self.setting, self.lanes(count), mesh, workers)
        assert width % mesh.size == 0
        assert mesh.size <= width <= count
        return width

    @property
    def lane_bytes(self) -> int:
        return _lane_bytes(self.setting, self.lanes(1))


def wide(elements: int) -> Problem:
    """A loss with temporaries of many float64."""
    return Problem(
        lambda y, h: jnp.sum(
            jnp.sin(y[0] * jnp.arange(1.0 * elements) + jnp.asarray(h, y.dtype))
        )
    )


def square(y: Any, h: Any) -> Any:
    return jnp.sum((y - jnp.asarray(h, y.dtype)) ** 2)


class TestDefaultWidth:
    # Lanes, devices and workers; the width.
    def test_of_a_small_loss(self):
        """A few lanes are shared by workers and devices, many are batched."""
        of = Problem(square).width
        assert of(1, cpus(1), 8) == 1
        assert of(16, cpus(1), 4) == 16  # too few to be shared
        assert of(41, cpus(1), 2) == 21
        assert of(512, cpus(1), 1) == 256
        assert of(4000, cpus(4), 2) == 1024
        assert of(6, cpus(3), 2) == 6
        assert of(100, accelerators(1)) == 100
        assert of(MANY, accelerators(1), 2) == 2**14
        assert of(MANY, accelerators(2)) == 2 * 2**14

    def test_is_a_power_of_two_that_fits_a_cache(self):
        """Between 16 lanes and 256 lanes, what they take is what a core keeps."""
        widths = []
        for elements in (10, 300, 1000, 3000, 10_000):
            problem = wide(elements)
            width, each = problem.width(MANY, cpus(1)), problem.lane_bytes
            assert each >= 8 * elements
            assert width in (16, 32, 64, 128, 256)
            assert width == 16 or width * each <= MIB
            assert width == 256 or 2 * width * each > MIB
            widths.append(width)
        assert (widths[0], widths[-1]) == (256, 16)

    @pytest.mark.parametrize(("size", "workers"), [(1, 1), (1, 8), (4, 2)])
    def test_memory_of_a_huge_loss(self, size: int, workers: int):
        """Half a gigabyte is for the batches of all workers on all devices."""
        problem = wide(2 * 10**6)
        width = problem.width(MANY, cpus(size), workers)
        taken = width * workers * problem.lane_bytes
        assert width == size or taken <= 512 * MIB
        assert 2 * taken > 512 * MIB

    @pytest.mark.parametrize("limit", [None, 2**30])
    @pytest.mark.parametrize(("size", "workers"), [(1, 2), (4, 1)])
    def test_memory_of_an_accelerator(self, limit: int | None, size: int, workers: int):
        """An eighth of it is taken; it is 8 GiB where nobody says."""
        problem = wide(10**6)
        width = problem.width(MANY, accelerators(size, limit), workers) // size
        taken = problem.lane_bytes * workers * width
        assert taken <= (limit or 2**33) // 8 < 2 * taken

    @pytest.mark.parametrize("of", [cpus, accelerators])
    def test_one_lane_does_not_fit(self, of: Any):
        assert wide(10**9).width(MANY, of(4), 2) == 4


class TestNumWorkers:
    def test_cores(self, monkeypatch: pytest.MonkeyPatch):
        """Those that the process may use, or of the machine if nobody says."""
        affinity = lambda _: set(range(3, 11))  # noqa: E731
        monkeypatch.setattr(os, "sched_getaffinity", affinity, raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 6)
        assert [num_workers(cpus(n)) for n in (1, 3, 9)] == [8, 2, 1]
        monkeypatch.delattr(os, "sched_getaffinity")
        assert num_workers(cpus(2)) == 3
        monkeypatch.setattr(os, "cpu_count", lambda: None)
        assert num_workers(cpus(2)) == 1

    def test_accelerators(self):
        """One batch is made ready while the other runs."""
        assert num_workers(accelerators(1)) == 2
        assert num_workers(accelerators(4)) == 1


@given(st.integers(1, 10**6), st.integers(1, 16))
@example(2**15, 1)
def test_narrower_widths(per_device: int, devices: int):
    widths = narrower_widths(per_device * devices, devices)
    assert widths[0] == per_device * devices
    assert all(width % devices == 0 for width in widths)
    for wide, narrow in itertools.pairwise(widths):
        assert narrow <= wide / 8 < narrow + devices
        assert narrow >= 64 * devices
    assert widths[-1] // 8 < 64 * devices


X = jax.ShapeDtypeStruct((1000,), jnp.float32)
SIZE = 4000


def peak(fn: Callable[..., Any]) -> int:
    return _peak_bytes(jax.make_jaxpr(fn)(X).jaxpr)


def twice(x: Any) -> Any:
    return lax.cos(lax.sin(x))


def test_peak_bytes():
    """Of what is there at the same time; what is inside is beside its results."""
    inner = jax.jit(twice)
    assert peak(lambda x: (x, 1.0)) == 0
    assert peak(lambda x: (lax.sin(x), lax.cos(x))[1]) == SIZE
    assert peak(lambda x: lax.tan(twice(x))) == 2 * SIZE
    assert peak(lambda x: lax.sin(x) + lax.cos(x)) == 3 * SIZE
    assert peak(lambda x: (lax.sin(x), lax.tan(twice(x)))) == 3 * SIZE
    assert peak(inner) == 3 * SIZE
    assert peak(lambda x: inner(inner(x))) == 4 * SIZE
    scanned = lambda x: lax.scan(lambda c, _: (twice(c), None), x, None, 9)  # noqa: E731
    assert peak(scanned) == 3 * SIZE
    # Of branches the larger counts; their index may be there, too.
    branches = lambda x: lax.cond(x[0] > 0, lambda x: twice(x + x), lax.sin, x)  # noqa: E731
    assert 3 * SIZE <= peak(branches) <= 3 * SIZE + 16
