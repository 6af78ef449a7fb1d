"""A differential fuzzer: random losses, options, nestings and settings.

Run it by `python -m benchmarks.fuzz`. Each case has a number, which reproduces it:

* `problems`: losses whose minimum has a closed form;
* `options`: how a solve is asked for;
* `nestings`: functions of the minimum, by transformations inside of each other;
* `cases`: a case, drawn by its number, run, and compared.
"""
