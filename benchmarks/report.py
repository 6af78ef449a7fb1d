"""What `benchmarks.comparison` has found, as text."""

import math
import statistics
from collections.abc import Collection, Iterator, Mapping
from typing import Any


def ratios(results: Mapping[str, Any], key: str) -> dict[str, list[float]]:
    """For each solver: a number over that of the best solver, problem by problem."""
    names = next(iter(results.values())).keys()
    least = {
        problem: min(
            (of[problem][key] for of in results.values() if of[problem]["solved"]),
            default=math.inf,
        )
        for problem in names
    }
    return {
        solver: [
            of[problem][key] / least[problem] if of[problem]["solved"] else math.inf
            for problem in names
        ]
        for solver, of in results.items()
    }


COLUMNS = (
    *("CUTEst solved", "false convergence", "evaluations"),
    *("DP-MF solved", "evaluations", "cold", "warm"),
    *("64 lanes [ms]", "derivative", "[ms]"),
)


def rows(results: Mapping[str, Any]) -> Iterator[list[str]]:
    """The cells of the table, the best of each column in bold."""
    cutest, made = results["cutest"], results["mechanisms"]
    of_first = of_cutest(cutest)
    columns: list[dict[str, Any]] = [
        *({k: ends[i] for k, ends in of_first.items()} for i in range(3)),
        {k: sum(r["solved"] for r in of.values()) for k, of in made.items()},
        *(_medians(made, key) for key in ("evaluations", "cold", "warm")),
        {k: r.get("ms", r.get("raised")) for k, r in results["batch"].items()},
        {k: r.get("error", r.get("raised")) for k, r in results["derivative"].items()},
        {k: r.get("ms", math.nan) for k, r in results["derivative"].items()},
    ]
    formats = ("d", "d", ".1f", "d", ".1f", ".1f", ".1f", ".1f", ".0e", ".1f")
    best = [
        (max if i in (0, 3) else min)(
            (v for k, v in column.items() if k in cutest and _is_number(v)),
            default=None,
        )
        for i, column in enumerate(columns)
    ]
    for solver in cutest:
        cells = [
            _cell(column[solver], how, column[solver] == least)
            for column, how, least in zip(columns, formats, best, strict=True)
        ]
        if results["derivative"][solver].get("mode") == "forward":
            cells[-2] += " (forward)"
        yield [f"`{solver}`" if solver.isupper() else solver, *cells]


def of_cutest(results: Mapping[str, Any]) -> dict[str, tuple[int, float, float]]:
    """For each solver: how many are solved, falsely said to be, median evaluations."""
    evaluations = _medians(results, "evaluations")
    return {
        name: (
            sum(r["solved"] for r in ends.values()),
            _false_convergence(ends.values()),
            evaluations[name],
        )
        for name, ends in results.items()
    }


def _false_convergence(ends: Collection[Mapping[str, Any]]) -> float:
    """On how many problems; NaN for a solver that never says whether it converged."""
    says = [r.get("says", False) for r in ends]
    if None in says:
        return math.nan
    return sum(s and not r["solved"] for s, r in zip(says, ends, strict=True))


def _medians(results: Mapping[str, Any], key: str) -> dict[str, float]:
    return {k: statistics.median(v) for k, v in ratios(results, key).items()}


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) and math.isfinite(value)


def _cell(value: Any, how: str, is_best: bool) -> str:
    if isinstance(value, str):
        return f"`{value}`"
    if not math.isfinite(value):
        return "-"
    text = format(value, how)
    return f"**{text}**" if is_best else text


def table(results: Mapping[str, Any]) -> str:
    """The table, in Markdown."""
    lines = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1), *rows(results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def details(results: Mapping[str, Any]) -> Iterator[str]:
    """Milliseconds of each mechanism and solver, in plain text."""
    made = results["mechanisms"]
    names = list(next(iter(made.values())))
    yield "warm milliseconds (first call in seconds; evaluations)"
    for number, name in enumerate(names):
        yield f"  [{number}] {name}"
    yield f"{'':26}" + "".join(f"{f'[{i}]':>22}" for i in range(len(names)))
    for solver, of in made.items():
        cells = (
            f"{1e3 * r['warm']:.1f} ({r['cold']:.1f}; {r['evaluations']})"
            if r["solved"]
            else f"gap {r['gap']:.0e}"
            for r in (of[name] for name in names)
        )
        yield f"{solver:26}" + "".join(f"{cell:>22}" for cell in cells)
    for name, r in results["batch"].items():
        took = f"{r['ms']:9.1f}" if "ms" in r else r["raised"]
        yield f"lanes, {name:26} {took} ms"
