"""Which lanes are solved together: properties of the blocks of all generations."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmf_opt.sweeps._schedule import Block, blocks
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


class TestAGeneration:
    @given(jobs())
    def test_each_lane_is_in_one_block(self, job: Job):
        got = np.concatenate([block.lanes for block in job.blocks()])
        np.testing.assert_array_equal(got, job.remaining)

    @given(jobs())
    def test_rows_are_the_places_of_lanes(self, job: Job):
        end = 0
        for block in job.blocks():
            np.testing.assert_array_equal(job.remaining[block.rows], block.lanes)
            assert isinstance(block.rows, slice)
            assert block.rows.start == end
            end = block.rows.stop
        assert end == job.remaining.size

    @given(jobs())
    def test_widths(self, job: Job):
        """All blocks have the same, the narrowest that takes all lanes at once."""
        plan, count = job.blocks(), job.remaining.size
        (width,) = {block.width for block in plan}
        assert width in job.widths
        if len(plan) > 1:
            assert width == job.widths[0] < count
        else:
            assert width == min(w for w in job.widths if w >= count)
        for block in plan:
            assert 0 < block.lanes.size <= width
        assert all(block.lanes.size == width for block in plan[:-1])

    @given(jobs())
    def test_what_they_leave(self, job: Job):
        plan = job.blocks()
        (keep,), (width,) = {b.keep for b in plan}, {b.width for b in plan}
        if len(plan) == 1 and width == job.widths[-1]:
            assert keep == 0
        else:
            assert keep == width // job.devices // 8
            assert 8 * keep * job.devices <= width

    @given(jobs())
    def test_what_a_narrower_batch_is_left(self, job: Job):
        """All that a single block leaves has room in the next batch."""
        plan = job.blocks()
        if len(plan) == 1 and plan[0].keep:
            narrower = job.widths[job.widths.index(plan[0].width) + 1]
            assert plan[0].keep * job.devices <= narrower < job.remaining.size

    @given(jobs(), st.integers(0, 9))
    def test_names(self, job: Job, generation: int):
        names = [block.name for block in job.blocks(generation)]
        assert names == [f"{generation}.{i}" for i in range(len(names))]

    @given(jobs())
    def test_deterministic(self, job: Job):
        again = job._replace(remaining=job.remaining.copy())
        for one, other in zip(job.blocks(), again.blocks(), strict=True):
            np.testing.assert_array_equal(one.lanes, other.lanes)
            assert one._replace(lanes=None) == other._replace(lanes=None)

    def test_no_lanes(self):
        assert list(blocks(0, np.arange(0), [8], 1)) == []


# Widths and devices, lanes; then width, keep and lanes of each block.
@pytest.mark.parametrize(
    ("widths", "devices", "count", "want"),
    [
        ([8], 1, 1, [(8, 0, 1)]),
        ([8], 1, 8, [(8, 0, 8)]),
        ([8], 1, 9, [(8, 1, 8), (8, 1, 1)]),
        ([7], 1, 20, [(7, 0, 7), (7, 0, 7), (7, 0, 6)]),
        ([16], 2, 17, [(16, 1, 16), (16, 1, 1)]),
        ([16], 4, 40, [(16, 0, 16), (16, 0, 16), (16, 0, 8)]),
        ([512, 64], 1, 1100, [(512, 64, 512), (512, 64, 512), (512, 64, 76)]),
        ([512, 64], 1, 512, [(512, 64, 512)]),
        ([512, 64], 1, 65, [(512, 64, 65)]),
        ([512, 64], 1, 64, [(64, 0, 64)]),
        ([4096, 512], 8, 600, [(4096, 64, 600)]),
        ([4096, 512], 8, 512, [(512, 0, 512)]),
        ([4096, 512, 64], 1, 300, [(512, 64, 300)]),
    ],
)
def test_examples(
    widths: list[int], devices: int, count: int, want: list[tuple[int, int, int]]
):
    plan = blocks(3, np.arange(count), widths, devices)
    assert [(b.width, b.keep, b.lanes.size) for b in plan] == want


def left_by(block: Block, devices: int, rng: np.random.Generator, greedy: bool) -> Any:
    """Lanes of a block that are left when it stops: at most `keep` on each device."""
    rows = np.arange(block.width).reshape(devices, -1)
    left = []
    for of_device in rows:
        real = of_device[of_device < block.lanes.size]
        most = min(block.keep, real.size)
        count = most if greedy else rng.integers(0, most + 1)
        left.append(rng.choice(real, count, replace=False))
    return block.lanes[np.sort(np.concatenate(left).astype(int))]


class TestAllGenerations:
    @settings(max_examples=60)
    @given(jobs(), st.integers(0, 2**32 - 1), st.booleans())
    def test_end(self, job: Job, seed: int, greedy: bool):
        """Whatever is left, there are fewer lanes each time, and none in the end."""
        rng, names, ended = np.random.default_rng(seed), [], []
        first, generation = job.remaining, 0
        while job.remaining.size:
            plan = job.blocks(generation)
            names += [block.name for block in plan]
            left = [left_by(block, job.devices, rng, greedy) for block in plan]
            remaining = np.concatenate(left)
            assert remaining.size < job.remaining.size
            ended.append(np.setdiff1d(job.remaining, remaining))
            job, generation = job._replace(remaining=remaining), generation + 1
        assert len(set(names)) == len(names)
        np.testing.assert_array_equal(np.sort(np.concatenate(ended)), first)
        # Several blocks leave a quarter at most, a single one has a narrower successor.
        assert generation <= 1 + np.log2(first.size) / 2 + len(job.widths)
