"""Compares speeds and solvers: `python -m benchmarks`, from the root of the repository.

The other benchmarks ask whether the numbers are right, whether something stays behind
or hangs, and what a part is good for. They take from minutes to hours, each by itself:
`ablation`, `derivatives`, `fuzz`, `hangs`, `soak`, `statuses` and `transformations`.
"""

from . import callbacks, calls, comparison, mechanisms, regions, steps, sweeps


def main() -> None:
    for benchmark in (calls, steps, callbacks, regions, mechanisms, sweeps, comparison):
        print((benchmark.__doc__ or "").strip(), end="\n\n")
        benchmark.main()
        print()


if __name__ == "__main__":
    main()
