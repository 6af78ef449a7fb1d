"""Some cases of the fuzzer, of those that compile quickly.

`python -m benchmarks.fuzz` runs a thousand.
"""

import pytest

from benchmarks.fuzz import cases

NUMBERS = [8, 10, 23, 24, 27, 33, 58, 66, 67, 71, 76, 113, 123, 126, 131, 143, 145, 149]
NUMBERS += [168, 42]


@pytest.mark.mixes
@pytest.mark.parametrize("number", NUMBERS)
def test_case(number: int):
    outcome = cases.run(number)
    assert outcome.failure is None, f"case {number}: {outcome.text}"
    assert outcome.skipped is None
