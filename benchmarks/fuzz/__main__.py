"""Does every combination give the right numbers? A differential fuzzer.

Values are compared with those of plain eager calls, derivatives with those of closed
forms, within what the accuracy of a solve and float32 leave over. Each case that fails
is printed with its number; `--case NUMBER` runs it again. With `--devices 4` there is
an ambient mesh around each case.
"""

import argparse
import collections
import faulthandler
import gc
import os
import sys
import time

import jax

from ..flags import COMPILE_QUICKLY, as_flag, known

# What one case may take before its stack is printed and the run ends.
_LIMIT = 300


def main() -> int:
    """Runs cases, and returns whether one has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="which cases")
    parser.add_argument("--cases", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="where to begin")
    parser.add_argument("--case", type=int, help="only the case of this number")
    parser.add_argument("--devices", type=int, default=1, help="with meshes if several")
    parser.add_argument("--verbose", action="store_true", help="print each case")
    args = parser.parse_args()

    flags = [as_flag(*option) for option in known(COMPILE_QUICKLY).items()]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    jax.config.update("jax_num_cpu_devices", args.devices)
    from . import cases

    base = args.seed * 1_000_000
    numbers = range(base + args.first, base + args.cases)
    if args.case is not None:
        numbers = [args.case]
    failed, skipped = [], collections.Counter()
    begin = time.monotonic()
    for done, number in enumerate(numbers):
        print(
            f"\r{done}/{len(numbers)}: {number} ", end="", file=sys.stderr, flush=True
        )
        faulthandler.dump_traceback_later(_LIMIT, exit=True)
        start = time.monotonic()
        outcome = cases.run(number, devices=args.devices)
        faulthandler.cancel_dump_traceback_later()
        if outcome.failure:
            failed.append(number)
            print(f"\rFAILED --case {number}: {outcome.text}\n    {outcome.failure}")
        elif outcome.skipped:
            skipped[outcome.skipped.partition(",")[0]] += 1
        if args.verbose or args.case is not None:
            took = time.monotonic() - start
            print(f"\r{number}: {outcome.text}; {outcome.skipped or ''} {took:.1f} s")
        sys.stdout.flush()
        if done % 50 == 49:
            jax.clear_caches()
            gc.collect()
    seconds = time.monotonic() - begin
    print(f"\r{len(numbers)} cases in {seconds:.0f} s, {len(failed)} failed", end="")
    print("".join(f", {n} {why}" for why, n in skipped.items()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
