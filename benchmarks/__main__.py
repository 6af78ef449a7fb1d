"""Runs every benchmark: `python -m benchmarks` (from the root of the repository).

But for the fuzzer, which takes hours: `python -m benchmarks.fuzz`.
"""

from . import callbacks, calls, comparison, losses, regions, steps, sweeps


def main() -> None:
    for benchmark in (calls, steps, callbacks, regions, losses, sweeps, comparison):
        print((benchmark.__doc__ or "").strip(), end="\n\n")
        benchmark.main()
        print()


if __name__ == "__main__":
    main()
