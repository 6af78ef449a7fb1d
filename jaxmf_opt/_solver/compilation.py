"""The functions of a solve, compiled once for each specification."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array

from .._jax.debugging import alarms, guarded, undisturbed
from .._jax.lapack import compile_one_by_one, uses_lapack
from .._jax.structure import CACHE_SIZE
from . import driver
from .driver import StepState
from .solution import Solution
from .spec import SolveSpec
from .state import SolverState


class Compiled(NamedTuple):
    """Functions of `driver.py` under `jax.jit`; each is compiled when first called."""

    solve: Callable[..., Solution]
    first_state: Callable[..., StepState]
    packed: Callable[..., StepState]
    unpacked: Callable[..., SolverState]
    interrupted: Callable[..., StepState]
    step: Callable[..., tuple[StepState, tuple[Array, Array] | None]]
    value_and_finish: Callable[..., Solution]
    judge_stall: Callable[..., Solution]
    loss: Callable[..., Array]


def compiled(spec: SolveSpec) -> Compiled:
    """The compiled functions, shared by all specifications that are equal."""
    programs = cached(spec)
    if not (alarms() or guarded()):
        return programs
    return Compiled(*map(undisturbed, programs))


@functools.lru_cache(maxsize=CACHE_SIZE)
def cached(spec: SolveSpec) -> Compiled:
    """The same, whatever JAX's settings for debugging are."""
    program = spec.program
    whole = program.value if program.value_and_grad is None else program.value_and_grad
    compile_ = compile_one_by_one if uses_lapack(whole.jaxpr.jaxpr) else jax.jit
    functions = (getattr(driver, name) for name in Compiled._fields)
    return Compiled(*(compile_(functools.partial(fn, spec)) for fn in functions))
