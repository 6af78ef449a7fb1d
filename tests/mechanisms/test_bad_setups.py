"""Impossible set-ups are refused by name; where they are traced, a lane is NaN.

The suite checks annotations while it runs, which would refuse some of these arguments
first, with errors of its own. So the calls of the first part are made in one process
without these checks: this file, run as a script.
"""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calling import assert_refused, said
from processes import report_of

from jaxmf_opt import mechanisms
from jaxmf_opt.mechanisms import workloads

# Most calls below are wrong, as a type checker would say.
FAMILIES: dict[str, Any] = {
    "BandedToeplitz": mechanisms.BandedToeplitz,
    "BandedInverseToeplitz": mechanisms.BandedInverseToeplitz,
    "BufferedToeplitz": mechanisms.BufferedToeplitz,
    "Dense": mechanisms.Dense,
}
# What is possible, in which one argument at a time is made wrong.
POSSIBLE: dict[str, dict[str, Any]] = {
    "BandedToeplitz": {"n": 6, "bands": 2},
    "BandedInverseToeplitz": {"n": 6, "bands": 2},
    "BufferedToeplitz": {"n": 6, "num_buffers": 1},
    "Dense": {"n": 6},
}
FUNCTIONS: dict[str, Any] = {
    f.__name__: f
    for f in (
        workloads.prefix_sum,
        workloads.momentum,
        workloads.weight_decay,
        workloads.linear_cooldown,
        workloads.exponential_decay,
        workloads.matrix,
    )
}


class Wrong(NamedTuple):
    """Arguments of which one is wrong, the exception, and what that has to say.

    Attributes:
      arguments: The wrong one, and what is needed beside it.
      error: The type of the exception.
      name: The argument that is to be named, in backquotes.
      got: The beginning of what is to be shown as what was got.
    """

    arguments: dict[str, Any]
    error: type[Exception]
    name: str
    got: str


def types(name: str, *values: Any, **others: Any) -> list[Wrong]:
    """Values of a wrong type."""
    return [Wrong({name: x, **others}, TypeError, name, repr(x)) for x in values]


def values(name: str, *values: Any, **others: Any) -> list[Wrong]:
    """Impossible values of a right type."""
    return [Wrong({name: x, **others}, ValueError, name, str(x)) for x in values]


def shapes(name: str, *sizes: tuple[int, ...], **others: Any) -> list[Wrong]:
    """Arrays of wrong shapes."""
    return [
        Wrong({name: np.ones(x), **others}, ValueError, name, str(x)) for x in sizes
    ]


def dtypes(name: str, array: np.ndarray, **others: Any) -> list[Wrong]:
    """An array of the right shape, of dtypes that are not those of real numbers."""
    return [
        Wrong({name: array.astype(x), **others}, TypeError, name, f"dtype {x}")
        for x in ("int64", "bool", "complex128")
    ]


ONES, EYE = np.ones(6), np.eye(6)

OF_ALL = [
    *values("n", 0, -2),
    *types("n", 2.5, True, np.True_, "6", 6j, np.array([6]), np.array(6.0)),
    # An array is no size.
    Wrong({"n": np.array(6)}, TypeError, "n", "Array(6"),
    *values("min_sep", 0, -1),
    *types("min_sep", 1.5, None, False, "1", np.array([2])),
    *values("max_participations", 0, -1, 7),
    *values("max_participations", 4, min_sep=2),
    *types("max_participations", 2.0, True, "all", np.ones(())),
    *types("max_error", 1, 0.0, None, "yes", np.array(1), np.array([True])),
]
OF_TOEPLITZ = [
    *OF_ALL,
    *values("n", 7, 100, np.array(7), np.array(0), workload_coef=ONES),
    *values("n", 7, learning_rate=ONES),
    *shapes("workload_coef", (2, 3), (0,), ()),
    *dtypes("workload_coef", ONES),
    *types("workload_coef", [1.0, 0.5], 2.0, "prefix"),
    *shapes("learning_rate", (2, 3), (0,), ()),
    *shapes("learning_rate", (5,), (7,), workload_coef=ONES),
    *dtypes("learning_rate", ONES),
    *types("learning_rate", [1.0, 0.5], 2.0),
    *values("decay", 0, 0.0, -0.5, 1.5, 2, np.nan, np.inf),
    *values("decay", 2.0, learning_rate=ONES),
    *types("decay", "x", None, 0.9j, True, [0.9], np.array([0.9])),
    *types("decay", np.True_, np.array(True), np.str_("x")),
]
OF_BANDED = [
    *OF_TOEPLITZ,
    *values("bands", 0, -1, 7),
    *values("bands", 0, 3, 7, np.array(3), np.array(0), max_bands=2),
    Wrong({"bands": None, "max_bands": 7}, ValueError, "bands", "7"),
    *types("bands", 2.0, True, "2", np.array([2]), max_bands=2),
    Wrong({"bands": np.array(2)}, TypeError, "max_bands", "Array(2"),
    *values("max_bands", 0, -1),
    *types("max_bands", 2.0, True, np.array(2)),
]
WRONG: dict[str, list[Wrong]] = {
    "BandedToeplitz": OF_BANDED,
    "BandedInverseToeplitz": OF_BANDED,
    "BufferedToeplitz": [
        *OF_TOEPLITZ,
        *values("num_buffers", 0, -1),
        *types("num_buffers", np.array(2), 2.0, True, None, "3"),
    ],
    "Dense": [
        *OF_ALL,
        *values("bands", 0, -1, 7, np.array(7)),
        *types("bands", 2.0, True, "2"),
        *types("equal_norm", 1, None, "no", np.array([True])),
        # Neither once, nor in epochs, nor apart with columns that are orthogonal.
        *(
            Wrong(
                {"max_participations": 2, "min_sep": 2, **others},
                ValueError,
                "max_participations",
                f"2 times 2 for 6 steps, {got}",
            )
            for others, got in (
                ({}, "6 bands and equal_norm=False"),
                ({"bands": 2}, "2 bands and equal_norm=False"),
                ({"bands": 3, "equal_norm": True}, "3 bands and equal_norm=True"),
            )
        ),
        *values("n", 7, np.array(7), workload_matrix=EYE),
        *shapes("workload_matrix", (2, 3), (6,), (0, 0), (2, 6, 6)),
        *dtypes("workload_matrix", EYE),
        *types("workload_matrix", [[1.0]], 1.0),
    ],
    "prefix_sum": [*values("n", 0, -3), *types("n", 2.5, True, "3", None, np.array(3))],
    "momentum": [
        *values("n", 0, momentum=0.9),
        *values("momentum", 1, 1.0, -0.1, np.nan, np.inf, n=6),
        *types("momentum", "x", None, True, 1j, np.array([0.5]), n=6),
    ],
    "weight_decay": [
        *types("n", 6.0, decay=0.9),
        *values("decay", 0, 2, -0.5, np.nan, n=6),
        *types("decay", None, "x", False, np.array([0.5]), n=6),
        *values("momentum", 1.0, -0.1, n=6, decay=0.5),
    ],
    "linear_cooldown": [
        *values("max_n", 0, -1),
        *types("max_n", 6.0, np.array(6), True),
        *values("n", 0, 7, np.array(7), max_n=6),
        *types("n", 5.0, True, max_n=6),
        *values("fraction", 2, -0.1, np.nan, max_n=6),
        *types("fraction", "x", None, True, max_n=6),
        *types("final", "x", None, True, np.array([0.1]), max_n=6),
    ],
    "exponential_decay": [
        *values("max_n", 0),
        *values("n", 0, 7, max_n=6),
        *values("final", 0, 0.0, -1, np.nan, max_n=6),
        *types("final", "x", None, 1j, max_n=6),
    ],
    "matrix": [
        *shapes("workload_coef", (2, 3), (0,)),
        *dtypes("workload_coef", ONES),
        *types("workload_coef", [1.0]),
        *shapes("learning_rate", (5,), (6, 1), workload_coef=ONES),
        *dtypes("learning_rate", ONES, workload_coef=ONES),
        *values("decay", 0, 2, workload_coef=ONES),
        *types("decay", None, "x", workload_coef=ONES),
    ],
}
METHODS = {
    "BandedToeplitz": (
        "loss",
        "per_query_error",
        "sensitivity_squared",
        "strategy_coef",
        "noising_coef",
    ),
    "BandedInverseToeplitz": ("loss", "strategy_coef"),
    "BufferedToeplitz": ("loss", "strategy_coef", "buffers"),
    "Dense": (
        "loss_and_gradient",
        "per_query_error",
        "sensitivity_squared",
        "strategy_matrix",
        "noising_matrix",
    ),
}
OF_PARAMS = [
    *shapes("params", (3,), (1,), (0,), (1, 2), ()),
    *dtypes("params", np.ones(2)),
    *types("params", [1.0, 0.5], None, 1.0),
]
WRONG_PARAMS = {
    **dict.fromkeys(FAMILIES, OF_PARAMS),
    "Dense": [
        *shapes("params", (5, 5), (6, 5), (6,), (7, 7), (0, 0), (1, 6, 6)),
        *dtypes("params", EYE),
        *types("params", [[1.0]], None),
    ],
}


class Bad(NamedTuple):
    """A call, the exception it must raise, and what that has to say."""

    call: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...]


def made(name: str, arguments: dict[str, Any]) -> Any:
    if name in FAMILIES:
        return FAMILIES[name](**{**POSSIBLE[name], **arguments})
    return FUNCTIONS[name](**arguments)


def applied(name: str, method: str, params: Any) -> Any:
    return getattr(made(name, {}), method)(params)


def in_a_program(name: str) -> Any:
    """With a traced `n`, of which no array over steps says how large it can be."""
    return jax.jit(lambda n: made(name, {"n": n}).valid)(6)


def with_array_of_jax(name: str) -> Any:
    """An impossible value that can be seen, as it is not traced."""
    return made(name, {"min_sep": jnp.array(0)})


def with_key(name: str) -> Any:
    return made(name, {"decay": jax.random.key(0)})


def shown(arguments: dict[str, Any]) -> str:
    def value(x: Any) -> str:
        is_large = isinstance(x, np.ndarray) and x.shape
        return f"{x.dtype}{x.shape}" if is_large else repr(x)

    return ", ".join(f"{k}={value(x)}" for k, x in arguments.items())


def bad_calls() -> Iterator[tuple[str, Bad]]:
    def expecting(wrong: Wrong, fn: Callable[..., Any], *args: Any) -> Bad:
        words = (f"`{wrong.name}`", f"got {wrong.got}")
        return Bad(functools.partial(fn, *args), wrong.error, words)

    for name, wrongs in WRONG.items():
        for wrong in wrongs:
            call = expecting(wrong, made, name, wrong.arguments)
            yield f"{name}({shown(wrong.arguments)})", call
    for name, methods in METHODS.items():
        for method in methods:
            # All are checked by the same function: that it is called at all.
            some = WRONG_PARAMS[name][: None if method == methods[0] else 1]
            for wrong in some:
                (params,) = wrong.arguments.values()
                call = expecting(wrong, applied, name, method, params)
                yield f"{name}.{method}({shown(wrong.arguments)})", call
    for name in FAMILIES:
        traced, not_traced = (
            functools.partial(f, name) for f in (in_a_program, with_array_of_jax)
        )
        # The value has no other name than that of a tracer.
        yield f"{name}(n traced)", Bad(traced, TypeError, ("`n`", "Python integer"))
        words = ("`min_sep`", "at least 1", "got 0")
        yield f"{name}(min_sep of JAX)", Bad(not_traced, ValueError, words)
        no_size = functools.partial(made, name, {"n": None})
        yield f"{name}(n=None)", Bad(no_size, TypeError, ("`n`", "must be given"))
    for name in ("BandedToeplitz", "BandedInverseToeplitz"):
        no_bands = functools.partial(made, name, {"bands": None})
        words = ("`bands`", "`max_bands`", "must be given")
        yield f"{name}(bands=None)", Bad(no_bands, TypeError, words)
    key = functools.partial(with_key, "BandedToeplitz")
    yield "decay a PRNG key", Bad(key, TypeError, ("`decay`", "key<fry>"))


BAD = dict(bad_calls())

# Arguments of unusual types that are no mistake: NumPy's numbers, arrays of shape ().
GOOD: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name}({shown(arguments)})": (name, arguments)
    for name, arguments in (
        ("BandedToeplitz", {"n": np.int64(6), "bands": np.int8(2)}),
        ("BandedToeplitz", {"max_error": np.True_, "max_participations": None}),
        ("BandedToeplitz", {"bands": 2, "max_bands": 9}),
        ("BandedInverseToeplitz", {"bands": np.array(2), "max_bands": 3}),
        ("BandedInverseToeplitz", {"n": np.array(5), "workload_coef": ONES}),
        ("BufferedToeplitz", {"min_sep": np.array(2), "max_error": np.array(False)}),
        ("BufferedToeplitz", {"decay": 1, "learning_rate": ONES.astype(np.float32)}),
        ("Dense", {"min_sep": np.uint8(3), "max_participations": np.array(2)}),
        ("Dense", {"equal_norm": np.True_, "workload_matrix": EYE}),
    )
}


def use(name: str, arguments: dict[str, Any]) -> None:
    m = made(name, arguments)
    errors = m.per_query_error(m.initial_params())
    if not jnp.all(jnp.isfinite(errors)):
        raise ArithmeticError(str(errors))


def report() -> dict[str, Any]:
    """Makes all the calls and writes down what came of them."""
    return {
        "refusals": {name: said(bad.call) for name, bad in BAD.items()},
        "uses": {
            name: said(functools.partial(use, *good)) for name, good in GOOD.items()
        },
    }


@pytest.fixture(scope="module")
def reported() -> dict[str, Any]:
    return report_of(__file__)


@pytest.mark.parametrize("case", BAD)
def test_refused_by_name(case: str, reported: dict[str, Any]):
    assert_refused(reported["refusals"][case], BAD[case])


@pytest.mark.parametrize("case", GOOD)
def test_accepted(case: str, reported: dict[str, Any]):
    assert reported["uses"][case] == ["no error", ""]


# The second part: set-ups in a compiled batch, where values cannot be seen.


class SetUp(NamedTuple):
    """Hyperparameters that can be traced. These are possible, everywhere."""

    n: int = 8
    bands: int = 3
    min_sep: int = 2
    max_participations: int = 4
    max_error: bool = False
    equal_norm: bool = False
    decay: float = 0.9


class Traced(NamedTuple):
    """Mechanisms whose shapes do not depend on the set-up, and their parameters.

    Attributes:
      make: From a set-up.
      params: The parameters.
      fields: What of a set-up is looked at.
    """

    make: Callable[[Any], Any]
    params: np.ndarray
    fields: set[str]


MAX_N, MAX_BANDS = 9, 4
ARRAYS = {
    "workload_coef": np.linspace(1, 2, MAX_N),
    "learning_rate": np.linspace(1, 0.1, MAX_N),
}


def options(s: Any, *more: str) -> dict[str, Any]:
    names = ("min_sep", "max_participations", "max_error", *more)
    return {name: getattr(s, name) for name in names}


def toeplitz(family: str, params: list[float], *, arrays: bool) -> Traced:
    """With arrays over steps, or prefix sums with closed forms."""
    fields = {"min_sep", "max_participations", "decay"}
    fields |= {"bands"} if family.startswith("Banded") else set()
    fields |= {"n"} if arrays else set()

    def make(s: Any) -> Any:
        kwargs = options(s, "decay") | (ARRAYS if arrays else {"n": 8})
        kwargs |= {"n": s.n} if "n" in fields else {}
        if "bands" in fields:
            kwargs |= {"bands": s.bands, "max_bands": MAX_BANDS}
        else:
            kwargs |= {"num_buffers": len(params) // 2}
        return FAMILIES[family](**kwargs)

    return Traced(make, np.array(params), fields)


TRACED: dict[str, Traced] = {
    **{
        f"{family}, {kind}": toeplitz(family, params, arrays=arrays)
        for family, params in (
            ("BandedToeplitz", [1.0, 0.5, 0.4, 0.3]),
            ("BandedInverseToeplitz", [1.0, -0.5, -0.1, -0.05]),
            ("BufferedToeplitz", [-3.0, -1.0, -0.5, 0.1]),
        )
        for kind, arrays in (("arrays", True), ("prefix sums", False))
    },
    "Dense": Traced(
        lambda s: mechanisms.Dense(
            s.n,
            bands=s.bands,
            workload_matrix=np.tri(MAX_N),
            **options(s, "equal_norm"),
        ),
        np.eye(MAX_N) + 0.1 * np.tri(MAX_N) @ np.tri(MAX_N).T,
        {"n", "bands", "min_sep", "max_participations", "equal_norm"},
    ),
}

IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "n 0": {"n": 0},
    "n -3": {"n": -3},
    "n too large": {"n": MAX_N + 1},
    "n that is no int32": {"n": 2**40 + 8},
    "n far below 0": {"n": -(2**63)},
    "bands 0": {"bands": 0},
    "bands -1": {"bands": -1},
    "bands too many": {"bands": MAX_N + 1},
    # Not of a dense strategy, which has no decay either.
    "bands above max_bands": {"bands": MAX_BANDS + 1, "decay": 0.9},
    "bands above n": {"bands": 4, "n": 3, "min_sep": 3, "max_participations": 1},
    "min_sep 0": {"min_sep": 0},
    "min_sep -2": {"min_sep": -2},
    "min_sep too large": {"min_sep": 8},
    "min_sep that is no int32": {"min_sep": 2**32 + 2},
    "participations 0": {"max_participations": 0},
    "participations -1": {"max_participations": -1},
    "participations too many": {"max_participations": 5},
    "both negative": {"min_sep": -2, "max_participations": -4},
    "decay 0": {"decay": 0.0},
    "decay negative": {"decay": -0.5},
    "decay too large": {"decay": 1.01},
    "decay NaN": {"decay": np.nan},
    "epochs that end early": {"max_participations": 3, "equal_norm": False},
    "too many bands for equal_norm": {"max_participations": 3, "equal_norm": True},
    "one step too many": {"n": 9, "equal_norm": False},
}
LANES = {
    name: [case for case, x in IMPOSSIBLE.items() if x.keys() <= traced.fields]
    for name, traced in TRACED.items()
}


def results(name: str, s: Any) -> dict[str, jax.Array]:
    """All that a mechanism says, and the gradient of its loss."""
    make, params, _ = TRACED[name]
    m, params = make(s), jnp.array(params)
    found = {"initial_params": m.initial_params()}
    if name == "Dense":
        params = params[: m.max_n, : m.max_n]
        found["loss"], found["gradient"] = m.loss_and_gradient(params)
        more = ["strategy_matrix", "noising_matrix"]
    else:
        found["loss"], found["gradient"] = jax.value_and_grad(m.loss)(params)
        more = ["strategy_coef", "noising_coef"]
    if isinstance(m, mechanisms.BufferedToeplitz):
        found["buffers"] = jnp.concatenate(m.buffers(params))
    for method in ("per_query_error", "sensitivity_squared", *more):
        found[method] = getattr(m, method)(params)
    return found


@functools.cache
def lanes(name: str) -> dict[str, np.ndarray]:
    """A possible set-up and all impossible ones, in one program."""
    set_ups = [SetUp(), *(SetUp(**IMPOSSIBLE[case]) for case in LANES[name])]
    with jax.enable_x64():
        operands = jax.tree.map(lambda *xs: jnp.array(xs), *set_ups)
        found = jax.jit(jax.vmap(functools.partial(results, name)))(operands)
        return {k: np.asarray(x) for k, x in found.items()}


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in LANES.items() for case in cases]
)
def test_lane_is_nan(name: str, case: str):
    i = 1 + LANES[name].index(case)
    for result, values in lanes(name).items():
        # That of autodiff is no result of a mechanism.
        if result != "gradient" or name == "Dense":
            assert np.all(np.isnan(values[i])), result


@pytest.mark.parametrize("name", TRACED)
def test_lane_beside_them_is_not(name: str):
    with jax.enable_x64():
        single = jax.jit(lambda: results(name, SetUp()))()
    for result, values in lanes(name).items():
        want = np.asarray(single[result])
        inside = values[0][tuple(map(slice, want.shape))]
        assert np.all(np.isfinite(values[0])), result
        assert np.any(want != 0), result
        atol = 1e-12 * np.max(np.abs(want))
        np.testing.assert_allclose(inside, want, rtol=1e-12, atol=atol, err_msg=result)


if __name__ == "__main__":
    print(json.dumps(report()))
