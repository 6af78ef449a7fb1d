"""Which lanes are solved together: properties of the blocks of all generations."""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxmf_opt.sweeps._schedule import Block, blocks, merge, split
from jaxmf_opt.sweeps._width import narrower_widths


class Job(NamedTuple):
    """Lanes that are left, and the batches that there are for them."""

    remaining: np.ndarray
    width: int
    devices: int

    @property
    def widths(self) -> list[int]:
        return narrower_widths(self.width, self.devices)

    def blocks(self, generation: int = 0) -> list[Block]:
        return list(blocks(generation, self.remaining, self.widths, self.devices))


@st.composite
def jobs(draw: Any) -> Job:
    devices = draw(st.sampled_from([1, 2, 3, 4, 8]))
    per_device = st.one_of(st.integers(1, 40), st.integers(1, 5000))
    width = devices * draw(per_device)
    count = draw(st.one_of(st.integers(1, 60), st.integers(1, 20_000)))
    # Some lanes have ended before.
    first, step = draw(st.integers(0, 99)), draw(st.integers(1, 9))
    remaining = first + step * np.arange(count)
    return Job(remaining, width, devices)


def assert_partition(plan: list[Block], remaining: np.ndarray) -> None:
    """That each lane is in one block, in order, and at the place that `rows` says."""
    np.testing.assert_array_equal(np.concatenate([b.lanes for b in plan]), remaining)
    rows = np.concatenate([np.r_[b.rows] for b in plan])
    np.testing.assert_array_equal(rows, np.arange(remaining.size))


class TestAGeneration:
    @given(jobs(), st.integers(0, 9))
    def test_its_blocks(self, job: Job, generation: int):
        """All have the same width, the narrowest that takes all lanes at once."""
        plan, count = job.blocks(generation), job.remaining.size
        assert_partition(plan, job.remaining)
        assert [b.name for b in plan] == [f"{generation}.{i}" for i in range(len(plan))]
        (width,) = {block.width for block in plan}
        if len(plan) > 1:
            assert width == job.widths[0] < count
        else:
            assert width == min(w for w in job.widths if w >= count)
        assert all(block.lanes.size == width for block in plan[:-1])
        assert 0 < plan[-1].lanes.size <= width

    @given(jobs())
    def test_what_they_leave(self, job: Job):
        """An eighth; what a single block leaves has room in a narrower one."""
        plan = job.blocks()
        (keep,), (width,) = {b.keep for b in plan}, {b.width for b in plan}
        if len(plan) == 1 and width == job.widths[-1]:
            assert keep == 0
            return
        assert keep == width // job.devices // 8
        if len(plan) == 1:
            narrower = job.widths[job.widths.index(width) + 1]
            assert keep * job.devices <= narrower < job.remaining.size


@given(jobs(), st.integers(1, 8), st.integers(1, 3))
def test_parts(job: Job, devices: int, step: int):
    """Of blocks, each for one device; some of them together on other devices."""
    whole = job.blocks(7)
    parts = list(split(whole, job.devices))
    assert_partition(parts, job.remaining)
    assert [p.name for p in parts] == [f"7.{i}" for i in range(len(parts))]
    assert {p.width for p in parts} == {whole[0].width // job.devices}
    assert {p.keep for p in parts} == {whole[0].keep}
    rest = parts[::step]
    for together, some in merge(rest, devices):
        assert some == rest[: len(some)]
        rest = rest[len(some) :]
        assert len(some) == devices or not rest
        assert (together.name, together.keep) == (some[0].name, some[0].keep)
        assert together.width == devices * some[0].width
        np.testing.assert_array_equal(
            together.lanes, np.concatenate([p.lanes for p in some])
        )
        np.testing.assert_array_equal(job.remaining[together.rows], together.lanes)
    assert not rest
