"""Cases: drawn by a number, run, and compared with what is right."""

import contextlib
import dataclasses
import math
import traceback
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmf_opt
from jaxmf_opt._solver.solution import statuses

from . import nestings, options, problems
from .nestings import Plain, Traced, nested
from .options import Options
from .problems import Problem

Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
      number: The number of the case.
      text: What the case is.
      failure: What is wrong, or None.
      skipped: Why nothing was compared, or None.
    """

    number: int
    text: str
    failure: str | None = None
    skipped: str | None = None


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What is around a case.

    Attributes:
      x64: Whether the program is float64.
      partitionable: Of random numbers.
      mesh: How many devices the ambient mesh has, if there is one.
      explicit: Whether its axis is explicit.
      split: Whether the data are split over it.
    """

    x64: bool
    partitionable: bool
    mesh: int | None
    explicit: bool
    split: bool

    @property
    def text(self) -> str:
        words = ["x64" if self.x64 else "x32"]
        words += [] if self.partitionable else ["not partitionable"]
        if self.mesh:
            words += [f"mesh of {self.mesh}", "explicit" if self.explicit else "auto"]
            words += ["split"] if self.split else []
        return ", ".join(words)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The setting, for as long as a case runs."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.enable_x64(self.x64))
            stack.enter_context(jax.threefry_partitionable(self.partitionable))
            if self.mesh:
                kind = AxisType.Explicit if self.explicit else AxisType.Auto
                mesh = jax.make_mesh(
                    (self.mesh,),
                    ("data",),
                    axis_types=(kind,),
                    devices=jax.devices()[: self.mesh],
                )
                stack.enter_context(jax.set_mesh(mesh))
            yield

    def placed(self, c: Any) -> Any:
        """An array where it is to be."""
        if not self.mesh:
            return c
        spec = P("data") if self.split and c.shape[0] % self.mesh == 0 else P()
        return jax.device_put(c, NamedSharding(jax.sharding.get_mesh(), spec))


def _setting(rng: Rng, devices: int) -> _Setting:
    x64, partitionable = (bool(rng.random() < p) for p in (0.5, 0.75))
    mesh, explicit, split = rng.integers(3), *(rng.random(2) < 0.5)
    number = None if devices == 1 else min(devices, (1, 2, 4)[mesh])
    # (On an explicit axis, JAX itself refuses an index or a loop over what is split.)
    split &= ~explicit
    return _Setting(x64, partitionable, number, bool(explicit), bool(split))


def run(number: int, *, devices: int = 1) -> Outcome:
    """Runs a case.

    Args:
      number: Its number, by which it is drawn.
      devices: How many devices there are; if several, there is an ambient mesh.

    Returns:
      What came of it.
    """
    rng = np.random.default_rng([number])
    setting = _setting(rng, devices)
    kinds = [_of_closed_form, _of_plain_calls, _of_sweep, _of_resume]
    kind = kinds[rng.choice(4, p=[0.78, 0.14, 0.03, 0.05])]
    text = setting.text
    try:
        with setting.entered():
            case = kind(rng, setting)
            text = f"{setting.text}; {case.text}"
            return Outcome(number, text, *case.check())
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        message = str(e).strip() or "(no message)"
        lines = [line for line in message.splitlines() if line.strip()][:2]
        at = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
        return Outcome(number, text, f"{type(e).__name__} at {at}: {' '.join(lines)}")


@dataclasses.dataclass(frozen=True)
class _Case:
    text: str
    check: Callable[[], tuple[str | None, str | None]]


def _point(rng: Rng, size: int, setting: _Setting) -> Any:
    """Exact in float32, so that programs of both precisions are at one point."""
    c = rng.integers(-24, 25, size) / 16
    c[0] = c[0] if abs(c[0]) > 0.1 else 0.25  # away from where branches change
    return c, setting.placed(jnp.asarray(c, jnp.float64 if setting.x64 else None))


def _in_float64(fn: Callable[[Any], Any], c: Any) -> np.ndarray:
    with jax.enable_x64():
        return np.asarray(fn(jnp.asarray(c, jnp.float64)))


def _tolerance(
    reference: Callable[[Any], Any],
    c: np.ndarray,
    want: np.ndarray,
    error: float,
    floor: float,
) -> np.ndarray:
    """How far a result may be off: by what the inputs may be off, many times over."""
    scale = np.max(np.abs(want))
    worst = 0.0
    for sign in (1.0, -1.0):
        moved = c + sign * error * np.cos(np.arange(c.size)) * (1 + np.abs(c))
        worst = max(worst, float(np.max(np.abs(_in_float64(reference, moved) - want))))
    return 30 * worst + floor * max(scale, 0.1)


def _compared(
    got: Any, want: np.ndarray, allowed: Any, dtype: Any, what: str
) -> str | None:
    got = np.asarray(got)
    if got.dtype != dtype:
        return f"{what}: dtype {got.dtype}, not {dtype}"
    if got.shape != want.shape:
        return f"{what}: shape {got.shape}, not {want.shape}"
    if not np.isfinite(got).all():
        return f"{what}: {_short(got)}, not {_short(want)}"
    off = float(np.max(np.abs(got - want)))
    if off <= allowed:
        return None
    return f"{what}: {_short(got)}, not {_short(want)}; off {off:.2g} > {allowed:.2g}"


def _short(x: np.ndarray) -> str:
    return np.array2string(np.ravel(x)[:4], precision=10, separator=", ")


def _is_single(setting: _Setting, asked: Options) -> bool:
    """Whether the result has the precision of float32."""
    return not setting.x64 or asked.layout.dtype == jnp.float32


def _plain_answer(
    problem: Problem, asked: Options, c: Any, closed: np.ndarray, single: bool
) -> tuple[str | None, str | None, float]:
    """The plain eager call: what is wrong with it, why it does not count, its error."""
    solution = options.solve(problem, asked, c)
    value = asked.layout.unpack(solution.value, c.dtype)
    got = np.asarray(problem.read(value))
    wrong = None
    starts = jax.tree.leaves(asked.layout.start(problem.start, c.dtype))
    for leaf, start in zip(jax.tree.leaves(solution.value), starts, strict=True):
        dtype = getattr(start, "dtype", jnp.result_type(float))
        if leaf.dtype != dtype:
            wrong = f"plain call: a leaf of dtype {leaf.dtype}, not {dtype}"
    if asked.layout.extra is not None:
        extra = np.asarray(solution.value[1], float)
        whole = np.issubdtype(np.asarray(asked.layout.extra).dtype, np.integer)
        whole &= not isinstance(asked.layout.extra, int)
        if abs(extra - (3.0 if whole else 3.25)) > 1e-4:
            wrong = f"plain call: the extra parameter is {extra}"
    error = float(np.max(np.abs(got - closed)) / (1 + np.max(np.abs(closed))))
    allowed = 3e-7 * min(problem.condition, 100) ** 0.5 + (1e-6 if single else 0.0)
    if wrong or error <= allowed:
        return wrong, None, error
    ended = statuses(solution.result)[()]
    if ended != "successful":
        return None, f"not solved: {ended}, off {error:.2g}", error
    return f"plain call: successful, but off {error:.2g}", None, error


def _of_closed_form(rng: Rng, setting: _Setting) -> _Case:
    """Values and derivatives beside those of the closed form."""
    problem = problems.draw(rng)
    asked = options.draw(rng, problem)
    ways = nestings.draw(rng, problem.max_order)
    asked = options.moving(asked, problem, rng.spawn(1)[0])
    order = sum(way.order for way in ways)
    if order * math.prod(way.cost for way in ways) > 2:
        asked = options.with_matrix(asked)
    values, c = _point(rng, problem.size, setting)
    is_bilevel = (
        rng.random() < 0.15
        and problem.size <= 5
        and order <= 1
        and not any(way.no_forward or way.cost > 1 for way in ways)
        and not asked.settings.get("callback")
        and asked.optimizer != "robust"
        and "cond" not in problem.name
    )

    least = problem.least
    plus_loss = least is not None and not is_bilevel and rng.random() < 0.25

    def with_loss(c: Any) -> Any:
        assert least is not None
        return problem.closed_form(c) + least(c)

    def check() -> tuple[str | None, str | None]:
        single = _is_single(setting, asked)
        f = options.minimum(problem, asked, plus_loss=plus_loss)
        closed = problem.closed_form
        plain = _in_float64(jax.jit(closed), values)
        wrong, skipped, error = _plain_answer(problem, asked, c, plain, single)
        if wrong or skipped:
            return wrong, skipped
        if is_bilevel:
            return _check_bilevel(f, closed, c, values, ways, single)
        closed = with_loss if plus_loss else closed
        with _direct_size(asked):
            got = nested(f, ways, Traced)(c)
        with jax.enable_x64():
            reference = jax.jit(nested(closed, ways, Traced))
        want = _in_float64(reference, values)
        floor = 2e-6 * 3.0**order if single else 1e-8 * 10.0 ** max(order - 1, 0)
        error = max(error, 2e-7 if single else 1e-11)
        allowed = _tolerance(reference, values, want, error, floor)
        return _compared(got, want, allowed, c.dtype, "result"), None

    names = " > ".join(way.name for way in ways)
    names = f"bilevel > {names}" if is_bilevel else names
    names = f"{names}, with the loss" if plus_loss else names
    return _Case(f"{problem.name}; {asked.name}; {names}", check)


@contextlib.contextmanager
def _direct_size(asked: Options) -> Iterator[None]:
    """Has all systems solved without a matrix, if that is asked for."""
    if not asked.matrix_free:
        yield
        return
    with unittest.mock.patch("jaxmf_opt._solver.implicit.DIRECT_SIZE", 0):
        yield


def _check_bilevel(
    f: Any, closed: Any, c: Any, values: np.ndarray, ways: Any, single: bool
) -> tuple[str | None, str | None]:
    """Nested solves: the outer one's derivative by that of the inner one."""
    outer = options.bilevel(f, c.shape[0])
    z = np.asarray(outer(c), float)
    inner = _in_float64(jax.jit(closed), z)
    want = np.tanh(values) / 2
    if np.max(np.abs(inner - want)) > (1e-5 if single else 1e-6):
        return None, "bilevel: not solved"

    # The inverse of the closed form near `z`, by Newton's method, which is exact to all
    # orders that are asked for after as many steps from a point with no derivative.
    def inverse(c: Any) -> Any:
        x, target = jnp.asarray(z, c.dtype), jnp.tanh(c) / 2
        for _ in range(4):
            x = x - jnp.linalg.solve(jax.jacfwd(closed)(x), closed(x) - target)
        return x

    with jax.enable_x64():
        reference = jax.jit(nested(inverse, ways, Traced))
    right = _in_float64(reference, values)
    got = nested(outer, ways, Traced)(c)
    error = 2e-6 if single else 1e-7
    allowed = _tolerance(reference, values, right, error, 1e-4 if single else 1e-5)
    return _compared(got, right, allowed, c.dtype, "bilevel"), None


def _of_plain_calls(rng: Rng, setting: _Setting) -> _Case:
    """Values of some steps, beside plain eager calls in Python loops."""
    problem = problems.draw(rng)
    asked = options.few_steps(options.draw(rng, problem), rng)
    ways = nestings.draw(rng, 0, values_only=True)
    _, c = _point(rng, problem.size, setting)

    def check() -> tuple[str | None, str | None]:
        f = options.minimum(problem, asked)
        want = np.asarray(nested(f, ways, Plain)(c))
        got = nested(f, ways, Traced)(c)
        if not np.isfinite(want).all():
            return None, "not finite"
        # Two programs may round differently, which steps may amplify.
        floor = 3e-5 if _is_single(setting, asked) else 1e-8
        floor *= max(1.0, problem.condition**0.5 / 100)
        allowed = floor * max(1.0, float(np.max(np.abs(want))))
        return _compared(got, want, allowed, c.dtype, "value"), None

    names = " > ".join(way.name for way in ways)
    return _Case(f"plain calls: {problem.name}; {asked.name}; {names}", check)


def _of_sweep(rng: Rng, setting: _Setting) -> _Case:
    """Lanes of a sweep beside single solves."""
    problem = problems.draw(rng)
    asked = options.draw(rng, problem)
    count, width = int(rng.integers(1, 7)), int(rng.integers(0, 4))
    _, c = _point(rng, problem.size, setting)
    kept = {k: v for k, v in asked.settings.items() if k != "linear_solver"}

    def check() -> tuple[str | None, str | None]:
        rows = jnp.stack([c * (1 + i) / count for i in range(count)])
        start = asked.layout.start(problem.start, c.dtype)
        many = jaxmf_opt.sweep(
            lambda tree, row: asked.layout.loss(problem, row)(tree),
            start,
            rows,
            in_axes=(None, 0),
            batch_size=width or None,
            **kept,
        )
        singles = [
            jaxmf_opt.solve(asked.layout.loss(problem, row), start, **kept)
            for row in rows
        ]
        failures = []
        for i, single in enumerate(singles):
            lane = jax.tree.map(lambda x, i=i: x[i], many.value)
            got, want = (
                np.asarray(problem.read(asked.layout.unpack(v, c.dtype)))
                for v in (lane, single.value)
            )
            floor = 3e-6 if _is_single(setting, asked) else 3e-7
            floor *= max(1.0, problem.condition**0.5)
            failures.append(_compared(got, want, floor, c.dtype, f"lane {i}"))
        return next(filter(None, failures), None), None

    words = f"{count} lanes, batches of {width or 'any size'}"
    return _Case(f"sweep: {problem.name}; {asked.name}; {words}", check)


def _of_resume(rng: Rng, setting: _Setting) -> _Case:
    """A solve that is interrupted and resumed, to the bit."""
    problem = problems.draw(rng)
    asked = options.few_steps(options.draw(rng, problem), rng)
    steps = asked.settings["max_optimizer_steps"]
    # (Which may be more steps than the limit of the rest.)
    resume = int(rng.integers(0, steps + 3))
    settings = {**asked.settings, "max_optimizer_steps": max(steps, resume)}
    whole = dataclasses.replace(asked, resume=None, settings=settings)
    parts = dataclasses.replace(asked, resume=resume)
    _, c = _point(rng, problem.size, setting)
    way = ["eager", "jit", "vmap"][rng.integers(3)]

    def check() -> tuple[str | None, str | None]:
        def answer(asked: Options) -> Any:
            def fn(c: Any) -> Any:
                solution = options.solve(problem, asked, c)
                return solution.value, solution.state.params, solution.stats

            if way == "vmap":
                return jax.vmap(fn)(jnp.stack([c, c / 2]))
            return (jax.jit(fn) if way == "jit" else fn)(c)

        got, want = answer(parts), answer(whole)
        same = [
            np.array_equal(a, b, equal_nan=True)
            for a, b in zip(*map(jax.tree.leaves, (got[:2], want[:2])), strict=True)
        ]
        if np.any(got[2]["num_steps"] != want[2]["num_steps"]):
            return f"{got[2]['num_steps']} steps, not {want[2]['num_steps']}", None
        return (None if all(same) else f"other bits: {got[1]} {want[1]}"), None

    words = f"{way}, resumed after {parts.resume}"
    return _Case(f"resume: {problem.name}; {asked.name}; {words}", check)
