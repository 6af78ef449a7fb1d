"""Random ways to ask for a solve."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax

import jaxmf_opt
from jaxmf_opt import CallbackArgs, callbacks, combine, traced

from .problems import Problem, captured

Rng = np.random.Generator
Optimizer = optax.GradientTransformation


class Calls:
    """A callback in Python, which counts its calls and never stops a solve."""

    def __init__(self):
        self.count = 0

    def __call__(self, info: CallbackArgs) -> bool:
        assert np.asarray(info.loss).dtype == np.float64
        self.count += 1
        return False


@traced
def never(info: CallbackArgs) -> Any:
    """A compiled callback that stops where a loss is not a number."""
    return jnp.isnan(info.loss)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a solve is asked for.

    Attributes:
      name: All of it, in words.
      optimizer: The name of the optimizer.
      settings: Arguments of `jaxmf_opt.solve`.
      resume: After how many steps it is interrupted and resumed, if it is.
      is_exact: Whether the minimum is found to the last bits.
      layout: How the vector `y` is a pytree.
      full_answer: Whether `solve` is called and not `optimize`.
      matrix_free: Whether derivatives are to go without a matrix.
      moving: What else depends on `c`, though the minimum does not depend on it.
    """

    name: str
    optimizer: str
    settings: dict[str, Any]
    resume: int | None
    is_exact: bool
    layout: "Layout"
    full_answer: bool
    matrix_free: bool
    moving: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a vector is a pytree of parameters.

    Attributes:
      kind: What the pytree is.
      length: How long the vector is.
      extra: The start of another parameter that is in the loss by itself, or None.
      dtype: The type of the start; None for that of `c`.
    """

    kind: str
    length: int
    extra: Any
    dtype: Any

    def pack(self, y: Any, extra: Any = None) -> Any:
        """The pytree of a vector."""
        match self.kind:
            case "dict":
                tree: Any = {"b": y[1:], "a": y[:1], "none": None}
            case "tuple":
                tree = tuple(y[i] for i in range(self.length))
            case "column":
                tree = [y.reshape(-1, 1), y[:0]]
            case _:
                tree = y
        return tree if self.extra is None else (tree, extra)

    def unpack(self, tree: Any, dtype: Any = None) -> Any:
        """The vector of a pytree."""
        if self.extra is not None:
            tree = tree[0]
        cast = lambda x: x if dtype is None else jnp.asarray(x).astype(dtype)  # noqa: E731
        match self.kind:
            case "dict":
                return jnp.concatenate([cast(tree["a"]), cast(tree["b"])])
            case "tuple":
                return jnp.stack([cast(x) for x in tree])
            case "column":
                return cast(tree[0])[:, 0]
        return cast(tree)

    def start(self, y: Any, dtype: Any) -> Any:
        """Where to start."""
        if self.dtype == "number":
            return self.pack(y.tolist() if self.kind == "tuple" else y, self.extra)
        if self.dtype == "numpy":
            return self.pack(np.asarray(y, np.float64), self.extra)
        return self.pack(jnp.asarray(y, self.dtype or dtype), self.extra)

    def loss(self, problem: Problem, c: Any) -> Callable[[Any], Any]:
        """The loss of a pytree."""

        def of_tree(tree: Any) -> Any:
            return problem.loss(self.unpack(tree), c)

        def with_extra(tree: Any) -> Any:
            out = of_tree(tree)
            rest = tree[1] - 3.25
            if not problem.grad:
                return out + rest**2
            loss, gradient = out
            return loss + rest**2, self.pack(gradient, 2 * rest)

        if self.extra is not None:
            return with_extra
        if not problem.grad:
            return of_tree

        def with_gradient(tree: Any) -> Any:
            loss, gradient = of_tree(tree)
            return loss, self.pack(gradient)

        return with_gradient


def _layout(rng: Rng, problem: Problem) -> Layout:
    kinds = ["array", "array", "dict", "column"]
    kinds += ["tuple"] if problem.length <= 6 else []
    kind = kinds[rng.integers(len(kinds))]
    extra: Any = None
    # (What has no scale must not get a parameter that has one.)
    if rng.random() < 0.15 and problem.optimizer is None and problem.regular:
        starts = [np.int32(0), jnp.zeros((), "bfloat16"), 0, 0.0, np.zeros((), "f4")]
        extra = starts[rng.integers(len(starts))]
    dtypes = [None, None, None, jnp.float32, "numpy"]
    dtypes += ["number"] if kind == "tuple" else []
    return Layout(kind, problem.length, extra, dtypes[rng.integers(len(dtypes))])


def optimizers(problem: Problem, rng: Rng) -> tuple[str, Optimizer, int, bool]:
    """An optimizer that finds the minimum of a problem, in so many steps.

    Returns:
      Its name, itself, the limit of steps, and whether it finds it to the last bits.
    """
    if problem.optimizer is not None:
        return "own", problem.optimizer, 600, True
    choices: list[tuple[str, Optimizer, int, bool]] = [
        ("default", jaxmf_opt.DEFAULT_OPTIMIZER, 250, False),
        ("robust", jaxmf_opt.ROBUST_OPTIMIZER, 250, False),
        ("lbfgs", optax.lbfgs(), 250, False),
        (
            "backtracking",
            optax.lbfgs(
                memory_size=4, linesearch=optax.scale_by_backtracking_linesearch(30)
            ),
            250,
            False,
        ),
    ]
    if problem.regular and problem.condition <= 20:
        rate = float(captured(0.125, rng)) if rng.random() < 0.5 else 0.125
        schedule = optax.exponential_decay(0.25, 60, 0.5)
        choices += [
            ("sgd", optax.sgd(rate), 2000, True),
            ("sgd", optax.sgd(jnp.float32(0.125)), 2000, True),
            ("momentum", optax.sgd(0.125, momentum=0.5), 1500, True),
            ("adam, schedule", optax.adam(schedule), 2000, False),
        ]
    if len(choices) > 4 and rng.random() < 0.4:  # which compile quickly
        choices = choices[4:]
    return choices[rng.integers(len(choices))]


def _callback(rng: Rng) -> tuple[str, Any]:
    choices: list[Callable[[], tuple[str, Any]]] = [
        lambda: ("no callback", None),
        lambda: ("no callback", None),
        lambda: ("traced", never),
        lambda: ("Python", Calls()),
        lambda: ("combined", combine(Calls(), never)),
        lambda: ("small_gradient", callbacks.small_gradient(1e-13)),
        lambda: ("Recorder", callbacks.Recorder()),
    ]
    return choices[rng.integers(len(choices))]()


def _linear_solver(rng: Rng, problem: Problem) -> tuple[str, Any]:
    if rng.random() < 0.75 or problem.condition > 100 or not problem.regular:
        return "", None
    if problem.length != problem.size:  # masked
        return "LSMR", lx.LSMR(rtol=1e-14, atol=0.0, conlim=1e12)
    choices: list[tuple[str, Any]] = [
        ("SVD", lx.SVD()),
        ("LSMR", lx.LSMR(rtol=1e-14, atol=0.0, conlim=1e12)),
    ]
    if problem.symmetric:
        choices.append(("CG", lx.CG(rtol=1e-13, atol=1e-14)))
    return choices[rng.integers(len(choices))]


def _tolerances(rng: Rng, exact: bool) -> dict[str, Any]:
    kinds = [float, np.float64, np.asarray, jnp.asarray]
    kind = kinds[rng.integers(len(kinds))]
    match rng.integers(4):
        case 0:
            return {}
        case 1 if not exact:
            return {"rtol": kind(1e-9), "atol": kind(1e-12)}
        case _:
            return {"gtol": kind(1e-13)}


def draw(rng: Rng, problem: Problem) -> Options:
    """Random options, by which the minimum of a problem is found."""
    name, optimizer, steps, exact = optimizers(problem, rng)
    tolerances = _tolerances(rng, exact)
    told, callback = _callback(rng)
    if steps > 1000 and not tolerances:  # too many calls
        told, callback = "no callback", None
    solved, linear_solver = _linear_solver(rng, problem)
    history = bool(rng.random() < 0.1)
    resume = int(rng.integers(1, 6)) if rng.random() < 0.12 else None
    layout = _layout(rng, problem)
    settings: dict[str, Any] = {
        "max_optimizer_steps": steps,
        "optimizer": optimizer,
        "grad": problem.grad,
        "rtol": 0.0,
        **tolerances,
    }
    if callback is not None:
        settings["callback"] = callback
    if linear_solver is not None:
        settings["linear_solver"] = linear_solver
    full = history or resume is not None or bool(rng.random() < 0.1)
    if history:
        settings["history"] = True
    words = [name, told, *tolerances, solved, layout.kind, str(layout.dtype)]
    words += ["history"] * history + ["solve"] * full
    words += [f"resumed after {resume}"] if resume is not None else []
    words += [] if layout.extra is None else [f"extra {layout.extra!r}"]
    no_matrix = (
        linear_solver is None and problem.condition <= 1e4 and bool(rng.random() < 0.1)
    )
    words += ["matrix-free"] * no_matrix
    text = ", ".join(filter(None, words))
    return Options(text, name, settings, resume, exact, layout, full, no_matrix)


def with_matrix(options: Options) -> Options:
    """The same, with the default solver of linear systems.

    Without a matrix, higher derivatives of several solves take minutes to trace.
    """
    settings = {k: v for k, v in options.settings.items() if k != "linear_solver"}
    name = f"{options.name}, with a matrix"
    return dataclasses.replace(options, name=name, settings=settings, matrix_free=False)


def few_steps(options: Options, rng: Rng) -> Options:
    """The same, stopped after some steps, long before the minimum."""
    steps = int(rng.integers(1, 7))
    settings = {**options.settings, "max_optimizer_steps": steps, "rtol": 0.0}
    for name in ("atol", "gtol"):
        settings.pop(name, None)
    resume = None if options.resume is None else min(options.resume, steps)
    name = f"{options.name}, {steps} steps"
    return dataclasses.replace(options, name=name, settings=settings, resume=resume)


def moving(options: Options, problem: Problem, rng: Rng) -> Options:
    """The same, of which some depends on `c` that does not move the minimum."""
    possible = []
    # (What is near in one unit is far away in another.)
    near = problem.length == problem.size and problem.condition <= 100
    if near and options.layout.dtype in (None, jnp.float32):
        possible.append("start")
    if "gtol" in options.settings:
        possible.append("gtol")
    if options.optimizer == "sgd":
        possible.append("rate")
    if options.settings.get("callback") is never:
        possible.append("callback")
    chosen = tuple(name for name in possible if rng.random() < 0.3)
    name = ", ".join([options.name, *(f"moving {name}" for name in chosen)])
    return dataclasses.replace(options, name=name, moving=chosen)


def _arguments(problem: Problem, options: Options, c: Any) -> tuple[Any, Any, Any]:
    """Loss, start and settings of a call."""
    start, settings = problem.start, dict(options.settings)
    small = jnp.tanh(c[0]) / 8
    if "start" in options.moving:
        start = jnp.asarray(start, c.dtype) + jnp.tanh(c) / 8
    if "gtol" in options.moving:
        settings["gtol"] = 1e-13 * (1 + small)
    if "rate" in options.moving:
        settings["optimizer"] = optax.sgd(0.125 * (1 + small))
    if "callback" in options.moving:
        settings["callback"] = traced(lambda info: jnp.isnan(info.loss) | (small > 2))
    layout = options.layout
    return layout.loss(problem, c), layout.start(start, c.dtype), settings


def solve(problem: Problem, options: Options, c: Any) -> Any:
    """The whole answer."""
    loss, start, settings = _arguments(problem, options, c)
    call = functools.partial(jaxmf_opt.solve, loss, start)
    if options.resume is None:
        return call(**settings)
    first = call(**{**settings, "max_optimizer_steps": options.resume})
    return call(**settings, state=first.state)


def minimum(
    problem: Problem, options: Options, *, plus_loss: bool = False
) -> Callable[[Any], Any]:
    """The function of `c` that a case is about, perhaps with the loss there added."""

    def fn(c: Any) -> Any:
        least: Any = None
        if plus_loss or options.full_answer:
            solution = solve(problem, options, c)
            value, least = solution.value, solution.loss
        else:
            loss, start, settings = _arguments(problem, options, c)
            value = jaxmf_opt.optimize(loss, start, **settings)
        result = problem.read(options.layout.unpack(value, c.dtype))
        return result + least.astype(result.dtype) if plus_loss else result

    return fn


def bilevel(f: Callable[[Any], Any], size: int) -> Callable[[Any], Any]:
    """The `z` of which the minimum is as wanted: `f(z) = tanh(c) / 2`."""

    def fn(c: Any) -> Any:
        def loss(z: Any) -> Any:
            rest = f(z) - jnp.tanh(c.astype(z.dtype)) / 2
            return jnp.sum(rest**2) / 2

        return jaxmf_opt.optimize(
            loss,
            jnp.zeros(size, c.dtype),
            optimizer=optax.lbfgs(),
            max_optimizer_steps=60,
            gtol=1e-13,
        )

    return fn
