"""Some cases of the fuzzer, of those that are quick.

`python -m benchmarks.fuzz` runs a thousand.
"""

import pytest

from benchmarks.fuzz import cases

NUMBERS = [7, 8, 10, 14, 23, 24, 27, 33, 66, 67, 71, 76, 113, 123, 126, 128, 140, 143]
NUMBERS += [145, 148, 149, 168]


@pytest.mark.mixes
@pytest.mark.parametrize("number", NUMBERS)
def test_case(number: int):
    outcome = cases.run(number)
    assert outcome.failure is None, f"case {number}: {outcome.text}"
