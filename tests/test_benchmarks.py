"""What the comparison of solvers makes of its numbers."""

import math
from typing import Any

import numpy as np
import pytest

from benchmarks import profiles, report

# Of two problems: one is solved by both solvers, the other one by neither.
ENDS = {
    "OURS": {"a": {"solved": True, "n": 6}, "b": {"solved": False}},
    "theirs": {"a": {"solved": True, "n": 3}, "b": {"solved": False, "says": True}},
}


def test_ratios_are_over_the_least_and_infinite_where_unsolved():
    assert report.ratios(ENDS, "n") == {"OURS": [2, math.inf], "theirs": [1, math.inf]}


def test_a_profile_counts_what_is_within_a_factor():
    got = profiles.profile([1.0, 2.0, 4.0, math.inf], np.array([1.0, 2.0, 3.0, 100.0]))
    np.testing.assert_array_equal(got, [0.25, 0.5, 0.5, 0.75])


def test_the_table_marks_the_best_of_each_column():
    made = {
        k: {"c": {"solved": True, "evaluations": n, "cold": n, "warm": n}}
        for k, n in (("OURS", 1), ("theirs", 3))
    }
    results: dict[str, Any] = {
        "cutest": {
            k: {p: r | {"evaluations": r.get("n")} for p, r in of.items()}
            for k, of in ENDS.items()
        },
        "mechanisms": made,
        "batch": {"OURS": {"ms": 2.0}, "theirs": {"raised": "TypeError"}},
        "derivative": {
            "OURS": {"error": 1e-8, "ms": 3.0, "mode": "reverse"},
            "theirs": {"error": 1e-9, "ms": 4.0, "mode": "forward"},
        },
    }
    ours, theirs = list(report.rows(results))
    assert ours[:4] == ["`OURS`", "**1**", "**0**", "-"]
    assert ours[5:9] == ["**1.0**", "**1.0**", "**1.0**", "**2.0**"]
    assert ours[9:] == ["1e-08", "**3.0**"]
    assert theirs[1:3] == ["**1**", "1"]
    assert theirs[5:] == [
        "3.0",
        "3.0",
        "3.0",
        "`TypeError`",
        "**1e-09** (forward)",
        "4.0",
    ]
    assert report.table(results).count("\n") == 3


def test_a_picture_is_drawn(tmp_path: Any):
    pytest.importorskip("matplotlib")
    profiles.draw({"n": report.ratios(ENDS, "n")}, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
