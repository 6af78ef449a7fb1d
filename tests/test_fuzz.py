"""Some cases of the fuzzer, of those that compile quickly.

`python -m benchmarks.fuzz` runs a thousand.
"""

import pytest

from benchmarks.fuzz import cases

NUMBERS = [8, 27, 58, 71, 113, 143, 168, 227, 350]


@pytest.mark.mixes
@pytest.mark.parametrize("number", NUMBERS)
def test_case(number: int):
    outcome = cases.run(number)
    assert outcome.failure is None, f"case {number}: {outcome.text}"
    assert outcome.skipped is None
