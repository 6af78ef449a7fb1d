"""How many lanes run at the same time: by their number, size, devices and memory."""

import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh

from jaxmf_opt import DEFAULT_OPTIMIZER
from jaxmf_opt.sweeps._lane import LaneSetting
from jaxmf_opt.sweeps._lanes import lanes_of
from jaxmf_opt.sweeps._width import (
    _bytes,
    _lane_bytes,
    _peak_bytes,
    default_width,
    narrower_widths,
    num_workers,
)

MIB = 2**20


class Accelerator:
    """Stands for a device that is no CPU."""

    platform = device_kind = "accelerator"
    process_index = 0

    def __init__(self, id: int, bytes_limit: int | None):
        self.id, self._bytes_limit = id, bytes_limit

    def memory_stats(self) -> dict[str, int] | None:
        limit = self._bytes_limit
        return None if limit is None else {"bytes_limit": limit}


def cpus(size: int) -> Mesh:
    """A mesh of as many CPUs as one likes; nothing is run on it."""
    return Mesh(np.array(jax.devices("cpu")[:1] * size), ("i",))


def accelerators(size: int, bytes_limit: int | None = None) -> Mesh:
    devices = [Accelerator(i, bytes_limit) for i in range(size)]
    return Mesh(np.array(devices), ("i",))


class Problem(NamedTuple):
    """A loss that is traced and never run, and where it is to be minimised."""

    loss: Callable[..., Any]
    params: Any = np.zeros(2)
    optimizer: Any = DEFAULT_OPTIMIZER

    @property
    def setting(self) -> LaneSetting:
        struct = lambda x: jax.ShapeDtypeStruct(x.shape, "float64")  # noqa: E731
        return LaneSetting(
            *(self.loss, False, self.optimizer, (0.0, 0.0, 0.0), 250, None, ()),
            *(jax.tree.map(struct, self.params), ["float64"], "int64", "float64"),
            *(False, None),
        )

    def lanes(self, count: int) -> Any:
        arguments = [("params", self.params), ("hyperparams", np.zeros(count))]
        return lanes_of([*arguments, ("state", None)], (None, 0, 0))

    def width(self, count: int, mesh: Mesh | None = None, workers: int = 1) -> int:
        mesh = cpus(1) if mesh is None else mesh
        width = default_width(self.setting, self.lanes(count), mesh, workers)
        assert width % mesh.size == 0
        assert mesh.size <= width <= count
        return width


def square(y: Any, h: Any) -> Any:
    return jnp.sum((y - jnp.asarray(h, y.dtype)) ** 2)


def wide(elements: int) -> Callable[..., Any]:
    """A loss with temporaries of many float64."""
    return lambda y, h: jnp.sum(
        jnp.sin(y[0] * jnp.arange(1.0 * elements) + jnp.asarray(h, y.dtype))
    )


SMALL, MANY = Problem(square), 2**20


class TestDefaultWidth:
    @given(
        st.sampled_from([1, 2, 3, 4, 8]),
        st.integers(1, 2000),
        st.integers(1, 9),
        st.sampled_from([1, 100, 10_000, 10_000_000]),
        st.booleans(),
    )
    def test_between_one_and_all(
        self, size: int, per_device: int, workers: int, elements: int, is_cpu: bool
    ):
        mesh = cpus(size) if is_cpu else accelerators(size)
        width = Problem(wide(elements)).width(size * per_device, mesh, workers)
        assert isinstance(width, int)

    # Lanes, devices and workers; the width.
    @pytest.mark.parametrize(
        ("count", "size", "workers", "want"),
        [
            (1, 1, 1, 1),
            (1, 1, 8, 1),
            (8, 1, 2, 8),  # too few to be shared
            (16, 1, 4, 16),
            (31, 1, 2, 16),
            (40, 1, 2, 20),
            (41, 1, 2, 21),
            (400, 1, 2, 200),
            (512, 1, 1, 256),
            (100_000, 1, 8, 256),
            (4, 4, 1, 4),
            (64, 4, 1, 64),
            (400, 4, 1, 400),
            (400, 4, 4, 100),
            (4000, 4, 2, 1024),
            (6, 3, 2, 6),
        ],
    )
    def test_of_a_small_loss(self, count: int, size: int, workers: int, want: int):
        assert SMALL.width(count, cpus(size), workers) == want

    @pytest.mark.parametrize("count", [16, 100, 16_384, 100_000])
    def test_of_a_small_loss_on_accelerators(self, count: int):
        want = min(2**14, count)
        assert SMALL.width(count, accelerators(1)) == want
        assert SMALL.width(2 * count, accelerators(2)) == 2 * want
        assert SMALL.width(2 * count, accelerators(1), workers=2) == want

    @pytest.mark.parametrize("of", [cpus, accelerators])
    @pytest.mark.parametrize("size", [1, 4])
    @pytest.mark.parametrize(
        "of_size",
        [
            lambda n: Problem(wide(n)),
            lambda n: Problem(square, np.zeros(n)),
            lambda n: Problem(square, np.zeros(9), optax.lbfgs(memory_size=n)),
        ],
        ids=["temporaries", "params", "memory"],
    )
    def test_larger_problems_are_narrower(self, of_size: Any, size: int, of: Any):
        widths = [of_size(10**i).width(MANY, of(size)) for i in range(1, 8, 2)]
        assert widths == sorted(widths, reverse=True)
        assert widths[0] > widths[-1]

    def test_is_a_power_of_two_that_fits_a_cache(self):
        """Between 16 lanes and 256 lanes, what they take is what a core keeps."""
        widths = set()
        for elements in (10, 300, 1000, 3000, 10_000):
            problem = Problem(wide(elements))
            width = problem.width(MANY)
            each = _lane_bytes(problem.setting, problem.lanes(1))
            assert each >= 8 * elements
            assert width in (16, 32, 64, 128, 256)
            assert width == 16 or width * each <= MIB
            assert width == 256 or 2 * width * each > MIB
            widths.add(width)
        assert len(widths) > 2

    @pytest.mark.parametrize(("size", "workers"), [(1, 1), (1, 8), (4, 2)])
    @pytest.mark.parametrize("millions", [1, 2, 5])
    def test_memory_of_a_huge_loss(self, millions: int, size: int, workers: int):
        """Half a gigabyte is for the batches of all workers on all devices."""
        elements = millions * 10**6
        problem = Problem(wide(elements))
        width = problem.width(MANY, cpus(size), workers)
        each = _lane_bytes(problem.setting, problem.lanes(1))
        assert each >= 8 * elements
        assert width == size or width * workers * each <= 512 * MIB
        assert 2 * width * workers * each > 512 * MIB

    def test_what_the_optimizer_remembers(self):
        """It is there more than once."""
        problem = Problem(square, np.zeros(100), optax.lbfgs(memory_size=50))
        pairs = 2 * 50 * 100 * 8
        each = _lane_bytes(problem.setting, problem.lanes(1))
        assert 4 * pairs < each < 8 * pairs

    @pytest.mark.parametrize("limit", [None, 2**30, 2**36])
    @pytest.mark.parametrize(("size", "workers"), [(1, 1), (1, 2), (4, 1)])
    def test_memory_of_an_accelerator(self, limit: int | None, size: int, workers: int):
        """An eighth of it is taken; it is 8 GiB where nobody says."""
        mesh = accelerators(size, limit)
        problem = Problem(wide(10**6))
        width = problem.width(MANY, mesh, workers) // size
        each = _lane_bytes(problem.setting, problem.lanes(1))
        most = (limit or 2**33) // 8
        assert each * workers * width <= most < each * workers * 2 * width

    @pytest.mark.parametrize("of", [cpus, accelerators])
    @pytest.mark.parametrize("size", [1, 4])
    def test_one_lane_does_not_fit(self, size: int, of: Any):
        assert Problem(wide(10**9)).width(MANY, of(size), 2) == size

    def test_many_starts(self):
        params = np.zeros((40, 3))
        arguments = [("params", params), ("hyperparams", None), ("state", None)]
        lanes = lanes_of(arguments, (0, None, 0))
        problem = Problem(lambda y, _: jnp.sum(y**2), np.zeros(3))
        assert default_width(problem.setting, lanes, cpus(1), 2) == 20

    def test_random_keys(self):
        keys = jax.random.split(jax.random.key(0), 40)
        arguments = [("params", np.zeros(3)), ("hyperparams", keys), ("state", None)]
        lanes = lanes_of(arguments, (None, 0, 0))
        problem = Problem(
            lambda y, key: jnp.sum((y - jax.random.normal(key, y.shape)) ** 2),
            np.zeros(3),
        )
        assert default_width(problem.setting, lanes, cpus(1), 2) == 20


class TestNumWorkers:
    @pytest.mark.parametrize(
        ("cores", "size", "want"),
        [(1, 1, 1), (8, 1, 8), (8, 4, 2), (8, 3, 2), (8, 16, 1), (2, 2, 1)],
    )
    def test_cores_that_the_process_may_use(
        self, cores: int, size: int, want: int, monkeypatch: pytest.MonkeyPatch
    ):
        def affinity(_: int) -> set[int]:
            return set(range(3, 3 + cores))

        monkeypatch.setattr(os, "sched_getaffinity", affinity, raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 99)
        assert num_workers(cpus(size)) == want

    @pytest.mark.parametrize(("cores", "want"), [(6, 3), (None, 1)])
    def test_cores_of_the_machine(
        self, cores: int | None, want: int, monkeypatch: pytest.MonkeyPatch
    ):
        """Where nobody says which ones the process may use."""
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        assert num_workers(cpus(2)) == want

    def test_accelerators(self):
        """One batch is made ready while the other runs."""
        assert num_workers(accelerators(1)) == 2
        assert num_workers(accelerators(4)) == 1


class TestNarrowerWidths:
    @pytest.mark.parametrize(
        ("width", "devices", "want"),
        [
            (1, 1, [1]),
            (511, 1, [511]),
            (512, 1, [512, 64]),
            (1000, 1, [1000, 125]),
            (2**14, 1, [2**14, 2**11, 256]),
            (2**15, 1, [2**15, 2**12, 512, 64]),
            (512, 2, [512]),
            (1024, 2, [1024, 128]),
            (4096, 8, [4096, 512]),
            (1600, 3, [1600, 198]),
        ],
    )
    def test_examples(self, width: int, devices: int, want: list[int]):
        assert narrower_widths(width, devices) == want

    @given(st.integers(1, 10**6), st.integers(1, 16))
    def test_properties(self, per_device: int, devices: int):
        widths = narrower_widths(per_device * devices, devices)
        assert widths[0] == per_device * devices
        assert all(width % devices == 0 for width in widths)
        for wide, narrow in itertools.pairwise(widths):
            assert narrow <= wide / 8 < narrow + devices
            assert narrow >= 64 * devices
        assert widths[-1] // 8 < 64 * devices


X = jax.ShapeDtypeStruct((1000,), jnp.float32)
SIZE = 4000


def peak(fn: Callable[..., Any], *structs: Any) -> int:
    return _peak_bytes(jax.make_jaxpr(fn)(*structs).jaxpr)


def early(x: Any) -> Any:
    """A result that is there to the end, and others that are not."""
    first = lax.sin(x)
    return first, lax.tan(lax.cos(lax.exp(x)))


def twice(x: Any) -> Any:
    return lax.cos(lax.sin(x))


def scanned(x: Any) -> Any:
    return lax.scan(lambda c, _: (twice(c), None), x, None, length=9)[0]


PEAKS: dict[str, tuple[Callable[..., Any], int]] = {
    "nothing": (lambda x: x, 0),
    "a literal": (lambda x: 1.0, 0),
    "one result": (lax.sin, SIZE),
    "a chain of two": (twice, 2 * SIZE),
    "a chain of three": (lambda x: lax.tan(twice(x)), 2 * SIZE),
    "a sum of two": (lambda x: lax.sin(x) + lax.cos(x), 3 * SIZE),
    "the same twice": (lambda x: (lambda y: y + y)(lax.sin(x)), 2 * SIZE),
    "a result that nobody uses": (lambda x: (lax.sin(x), lax.cos(x))[1], SIZE),
    "a result from the beginning": (early, 3 * SIZE),
    "an outer product": (lambda x: lax.mul(*[lax.sin(x)] * 2) * 2.0, 2 * SIZE),
    "a reduction": (lambda x: jnp.sum(lax.sin(x)), SIZE + 4),
    "bools": (lambda x: lax.gt(x, x), 1000),
    "half precision": (lambda x: lax.convert_element_type(x, jnp.bfloat16), SIZE // 2),
    "a program inside": (jax.jit(twice), 3 * SIZE),
    "a loop inside": (scanned, 3 * SIZE),
    "two programs, one after the other": (
        lambda x: jax.jit(twice)(jax.jit(twice)(x)),
        4 * SIZE,
    ),
    "programs in programs": (jax.jit(lambda x: jax.jit(twice)(x)), 4 * SIZE),
}


class TestPeakBytes:
    @pytest.mark.parametrize("case", PEAKS)
    def test_known(self, case: str):
        fn, want = PEAKS[case]
        assert peak(fn, X) == want

    def test_the_larger_branch_counts(self):
        def branches(p: Any, x: Any) -> Any:
            return lax.cond(p, lambda x: lax.tan(twice(x + x)), lax.sin, x)

        got = peak(branches, jax.ShapeDtypeStruct((), bool), X)
        # The index of the branch may be there, too.
        assert 3 * SIZE <= got <= 3 * SIZE + 8

    def test_float64(self):
        with jax.enable_x64():
            assert peak(lax.sin, jax.ShapeDtypeStruct((3, 5), jnp.float64)) == 120

    def test_random_keys(self):
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 10))
        assert _bytes(keys) == 160
        assert _bytes(jax.ShapeDtypeStruct((10, 2), np.uint32)) == 80

    @given(st.data())
    def test_programs_of_many_lines(self, data: st.DataObject):
        """Against a count, line by line, of what is made before and used after."""
        size = data.draw(st.integers(2, 9), "size")
        lines: list[tuple[int, int]] = []  # the two numbers of what is put together
        for i in range(data.draw(st.integers(1, 10), "lines")):
            some = st.integers(0, i)
            lines.append((data.draw(some), data.draw(some)))
        kept = data.draw(st.sets(st.integers(0, len(lines))), "results")

        def program(x: Any) -> Any:
            made = [x]
            for a, b in lines:
                made.append(lax.concatenate([made[a], made[b]], 0))
            return [made[i] for i in kept]

        sizes = [size]
        for a, b in lines:
            sizes.append(sizes[a] + sizes[b])
        last = {i: i for i in range(len(sizes))}
        for i, (a, b) in enumerate(lines, start=1):
            last[a] = last[b] = i
        last |= dict.fromkeys(kept, len(sizes))
        want = max(
            sum(4 * sizes[j] for j in range(1, i + 1) if last[j] >= i)
            for i in range(1, len(sizes))
        )
        assert peak(program, jax.ShapeDtypeStruct((size,), jnp.float32)) == want
