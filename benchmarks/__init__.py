"""Benchmarks: one module for each question. `python -m benchmarks` runs them all."""
