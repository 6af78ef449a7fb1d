"""Some cases of the fuzzer; `python -m benchmarks.fuzz` runs a thousand."""

import pytest

from benchmarks.fuzz import cases

SEED = 5_000_000


@pytest.mark.mixes
@pytest.mark.parametrize("number", range(SEED, SEED + 20))
def test_case(number: int):
    outcome = cases.run(number)
    assert outcome.failure is None, f"case {number}: {outcome.text}"
