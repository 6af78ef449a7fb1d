"""Bad arguments are refused by name before anything is compiled; odd ones are not.

The suite checks annotations while it runs, which would refuse some of these arguments
first, with errors of its own. So all the calls are made in one process without these
checks: this file, run as a script.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from calling import assert_refused, numbers, said
from compiling import compilations
from jax.experimental import checkify
from jax.experimental.sparse import BCOO
from processes import report_of

import jaxmf_opt
from jaxmf_opt import (
    LeanOptaxMinimiser,
    callbacks,
    combine,
    traced,
)
from jaxmf_opt._solver.compilation import cached as compiled
from jaxmf_opt._solver.resume import start
from jaxmf_opt.robust import robust_lbfgs

# Most calls below are wrong, as a type checker would say.
optimize: Any = jaxmf_opt.optimize
solve: Any = jaxmf_opt.solve

Y = np.array([1.0, 2.0])
KEY = jax.random.key(0)
SPARSE = BCOO.fromdense(jnp.eye(2))


class Bad(NamedTuple):
    """A call, the exception it must raise, and what that has to say."""

    call: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...]
    late: bool = False  # seen when a step has been made


def square(y: Any) -> Any:
    return jnp.sum((y - 3.0) ** 2)


def checked(y: Any) -> Any:
    checkify.check(y[0] < 10, "too large")
    return square(y)


def with_loss(loss: Any, error: type[Exception], *words: str, **options: Any) -> Bad:
    return Bad(lambda: optimize(loss, Y, **options), error, ("`loss_fn`", *words))


def with_gradient(gradient: Any, error: type[Exception], *words: str) -> Bad:
    def loss(y: Any) -> Any:
        return square(y), gradient(y)

    words = ("`loss_fn`", "gradient", *words)
    return Bad(lambda: optimize(loss, Y, grad=True), error, words)


def with_params(make: Any, error: type[Exception], *words: str) -> Bad:
    # Made in the call: a PRNG key takes JAX, which is not to run at import.
    return Bad(lambda: optimize(square, make()), error, ("`params", *words))


def with_option(name: str, value: Any, error: type[Exception], *words: str) -> Bad:
    words = (f"`{name}`", *words)
    return Bad(lambda: optimize(square, Y, **{name: value}), error, words)


def with_argument(
    fn: Any, *args: Any, error: type[Exception], words: Sequence[str], **kwargs: Any
) -> Bad:
    return Bad(lambda: fn(*args, **kwargs), error, tuple(words))


SGD = optax.sgd(0.1)


def of_start(params: Any, optimizer: Any = SGD) -> Any:
    """The shapes of a state."""
    with jax.enable_x64():
        start_of = functools.partial(start, optimizer, tests=False)
        return jax.eval_shape(start_of, params)


def going_on(state: Any, *words: str) -> Bad:
    def call() -> Any:
        return solve(square, Y, optimizer=SGD, state=state)

    return Bad(call, ValueError, ("`state`", *words))


BAD: dict[str, Bad] = {
    "loss a number": with_loss(3.5, TypeError, "callable", "3.5"),
    "loss of two arguments": with_loss(lambda a, b: a, TypeError, "(a, b)"),
    # What it returns.
    "loss vector": with_loss(lambda y: y, ValueError, "scalar", "(2,)"),
    "loss int": with_loss(lambda y: 1, TypeError, "floating", "1 of type int"),
    "loss complex": with_loss(
        lambda y: jnp.sum(y).astype(complex), TypeError, "real", "complex128"
    ),
    # NumPy takes this string for the name of a dtype.
    "loss returns 'f'": with_loss(lambda y: "f", TypeError, "scalar", "'f'"),
    # The same with grad=True.
    "no pair": with_loss(square, TypeError, "pair", "float64", grad=True),
    "gradient of other structure": with_gradient(
        lambda y: {"a": y}, ValueError, "structure", "'a'"
    ),
    "gradient of other shape": with_gradient(
        lambda y: y[:1], ValueError, "shapes", "(1,)", "(2,)"
    ),
    # `params`.
    "params {}": with_params(dict, ValueError, "at least one", "{}"),
    "params with a string": with_params(
        lambda: {"a": Y, "b": ["x0"]}, TypeError, "['b'][0]`", "'x0' of type str"
    ),
    "params of many bits": with_params(
        lambda: 10**30, ValueError, "fit in 64 bits", str(10**30)
    ),
    "params of another byte order": with_params(
        lambda: np.ones(2, ">f8"), TypeError, "byte order", "'>f8'"
    ),
    "params that are sparse": with_params(
        lambda: SPARSE, TypeError, "sparse array", "`data`"
    ),
    "a loss and a gradient": with_loss(
        lambda y: (square(y), y), TypeError, "scalar", "grad=True"
    ),
    "a loss that checks": with_loss(checked, ValueError, "`checkify.check`"),
    "history of a long run": Bad(
        lambda: solve(square, Y, history=True, max_optimizer_steps=10**12),
        ValueError,
        ("`history`", str(10**12), "GiB"),
    ),
    "params of complex": with_params(
        lambda: (Y, Y + 0j), TypeError, "[1]`", "real", "complex128"
    ),
    "params a PRNG key": with_params(lambda: KEY, TypeError, "real numbers", "key<"),
    "params with a function": with_params(
        lambda: [Y, jnp.tanh], TypeError, "[1]`", "tanh", "equinox.partition"
    ),
    # Options.
    "steps -1": with_option("max_optimizer_steps", -1, ValueError, "-1"),
    "steps 2.5": with_option("max_optimizer_steps", 2.5, TypeError, "2.5", "integer"),
    "steps array": with_option("max_optimizer_steps", Y, TypeError, "array([1., 2.])"),
    "grad 1": with_option("grad", 1, TypeError, "True or False", "1 of type int"),
    "callback of nothing": with_option(
        "callback", lambda: None, TypeError, "one argument", "()"
    ),
    **{
        f"callback that returns {name}": with_option(
            "callback", lambda _, stop=stop: stop(), ValueError, "shape (2,)", ".any()"
        )._replace(late=True)
        for name, stop in {
            "an array of NumPy": lambda: np.array([True, False]),
            "an array of JAX": lambda: jnp.array([True, False]),
        }.items()
    },
    "traced callback that returns an array": with_option(
        "callback", traced(lambda i: i.grad < i.params), ValueError, "scalar", "(2,)"
    ),
    "traced callback that returns a number": with_option(
        "callback", traced(lambda i: i.loss), TypeError, "boolean", "float64"
    ),
    "combine of one that returns an array": with_option(
        "callback", combine(cast(Any, lambda _: np.ones(2))), ValueError, "shape (2,)"
    )._replace(late=True),
    "history 1": Bad(lambda: solve(square, Y, history=1), TypeError, ("`history`",)),
    "throw yes": Bad(lambda: solve(square, Y, throw="y"), TypeError, ("`throw`",)),
    "state a number": Bad(lambda: solve(square, Y, state=3), ValueError, ("`state`",)),
    "an unknown option": Bad(
        lambda: optimize(square, Y, steps=1), TypeError, ("'steps'",)
    ),
    # The solver by itself, its optimizers and callbacks.
    **{
        f"minimiser, {name} {value!r}": with_argument(
            LeanOptaxMinimiser,
            **{"optim": SGD, name: value},
            error=error,
            words=(f"`{name}`", str(value)),
        )
        for name, value, error in (
            ("optim", 0.1, TypeError),
            ("rtol", -1.0, ValueError),
            ("atol", "x", TypeError),
            ("gtol", float("nan"), ValueError),
            ("norm", 2, TypeError),
        )
    },
    **{
        f"robust_lbfgs({name}={value!r})": with_argument(
            robust_lbfgs, **{name: value}, error=ValueError, words=(f"`{name}`",)
        )
        for name, value in (
            ("memory_size", 2.5),
            ("max_linesearch_steps", -1),
            ("curv_rtol", float("nan")),
        )
    },
    **{
        f"small_gradient({value!r})": with_argument(
            callbacks.small_gradient, value, error=error, words=("`gtol`",)
        )
        for value, error in (
            (-1.0, ValueError),
            (np.ones(2), TypeError),
        )
    },
    "TimeLimit(True)": with_argument(
        callbacks.TimeLimit, True, error=ValueError, words=("`seconds`", "True")
    ),
    "Progress(total=0)": with_argument(
        callbacks.Progress, 0, error=ValueError, words=("`total`", "0")
    ),
    "Checkpoint(3)": with_argument(
        callbacks.Checkpoint, 3, error=TypeError, words=("`path`", "3 of type int")
    ),
    "traced number": with_argument(
        traced, 3, error=TypeError, words=("`fn`", "callable", "3")
    ),
    "combined None": with_argument(
        combine, len, None, error=TypeError, words=("`callbacks`", "callable", "None")
    ),
    **{
        f"{fn.__name__}({value!r})": with_argument(
            fn, value, error=ValueError, words=(f"`{name}`", repr(value))
        )
        for fn, name in (
            (callbacks.NoProgress, "steps"),
            (callbacks.TimeLimit, "seconds"),
        )
        for value in (-1.5, None)
    },
    "Checkpoint(every=0)": with_argument(
        callbacks.Checkpoint, "x.npz", 0, error=ValueError, words=("`every`", "0")
    ),
    "state of another size": going_on(of_start(np.ones(3)), "float64[2]", "float64[3]"),
    "state of another optimizer": going_on(of_start(Y, optax.adam(0.1)), "optimizer"),
    "optimizer not called": with_option(
        "optimizer", optax.lbfgs, TypeError, "optax", "lbfgs"
    ),
    "linear solver a string": with_option(
        "linear_solver", "cg", TypeError, "lineax", "'cg'"
    ),
    **{
        f"{name} {value!r}": with_option(name, value, error, word)
        for name in ("rtol", "atol", "gtol")
        for value, error, word in (
            (np.nan, ValueError, "nan"),
            (Y, TypeError, "array([1., 2.])"),
        )
    },
}


class WithStatic(eqx.Module):
    """A model with an attribute that is not an array."""

    weight: jax.Array
    name: str = eqx.field(static=True)


class Good(NamedTuple):
    """An unusual call, and the leaves that come out: values, dtypes.

    A dtype of None stands for a Python number's: what JAX makes of a float.
    """

    call: Callable[[], Any]
    values: list[Any]
    dtypes: list[str]


def total(tree: Any) -> Any:
    return sum((square(x) for x in jax.tree.leaves(tree)), start=jnp.zeros(()))


def solved(make: Callable[[], Any], values: Any, *dtypes: str, **options: Any) -> Good:
    return Good(lambda: optimize(total, make(), **options), values, list(dtypes))


GOOD: dict[str, Good] = {
    "float": solved(lambda: 1.5, [3.0], "float32"),
    "int": solved(lambda: 1, [3.0], "float32"),
    "numbers in a list": solved(lambda: [1, 2.5], [3.0, 3.0], "float32", "float32"),
    "numpy float64": solved(lambda: Y, [[3.0, 3.0]], "float64"),
    "numpy float32": solved(lambda: Y.astype(np.float32), [[3.0, 3.0]], "float32"),
    "numpy scalar": solved(lambda: np.float16(0.5), [3.0], "float16"),
    "bfloat16": solved(lambda: jnp.ones(2, jnp.bfloat16), [[3.0, 3.0]], "bfloat16"),
    "size 0 beside others": solved(
        lambda: {"a": np.ones((0, 2)), "b": Y}, [[], [3.0, 3.0]], "float64", "float64"
    ),
    "size 0 alone": solved(lambda: np.ones(0), [[]], "float64"),
    "None leaves": solved(lambda: (None, Y, {"a": None}), [[3.0, 3.0]], "float64"),
    "a module": solved(
        lambda: WithStatic(jnp.ones(2), name="m"), [[3.0, 3.0]], "float32"
    ),
    "integers": solved(lambda: np.array([0, 7], np.int8), [[3, 3]], "int8"),
    # One step of size 0.35 goes from 2 to 2.7, and from 4 to 3.3.
    "integers are rounded toward 0": solved(
        lambda: np.array([2, 4]),
        [[2, 3]],
        "int64",
        max_optimizer_steps=1,
        optimizer=optax.sgd(0.35),
    ),
    "no steps": solved(
        lambda: {"a": np.array([0.1, np.inf], np.float32), "b": np.int16(-7)},
        [[float(np.float32(0.1)), np.inf], -7],
        "float32",
        "int16",
        max_optimizer_steps=0,
    ),
    "no steps, with a callback": solved(
        lambda: Y,
        [[1.0, 2.0]],
        "float64",
        max_optimizer_steps=0,
        callback=lambda _: 1 / 0,
    ),
    "numpy number of steps": solved(
        lambda: Y,
        [[2.0, 2.5]],
        "float64",
        max_optimizer_steps=np.int8(1),
        optimizer=optax.sgd(0.25),
    ),
    "numpy bool": Good(
        lambda: optimize(lambda y: (square(y), 2 * (y - 3)), Y, grad=np.True_),
        [[3.0, 3.0]],
        ["float64"],
    ),
    "integer tolerances": solved(lambda: Y, [[1.0, 2.0]], "float64", gtol=100),
    "a constant loss": Good(lambda: optimize(lambda _: 1.0, Y), [[1, 2]], ["float64"]),
    "a callable object": Good(
        lambda: optimize(eqx.Partial(lambda a, y: a * square(y), 2.0), Y),
        [[3.0, 3.0]],
        ["float64"],
    ),
    "the structure comes back": Good(
        lambda: optimize(total, (None, WithStatic(jnp.ones(2), name="m")))[1].weight,
        [[3.0, 3.0]],
        ["float32"],
    ),
}


def report() -> dict[str, Any]:
    """Makes all the calls and writes down what came of them."""
    # Is compiled once a process: not to be counted below. (By such an array the library
    # sees whether it is traced.)
    jax.lax.iota("int32", 1)
    jax.random.key(0)
    with compilations() as events:
        refusals = {n: said(bad.call) for n, bad in BAD.items() if not bad.late}
        compiled_for_bad = (compiled.cache_info().misses, len(events))
        refusals |= {n: said(bad.call) for n, bad in BAD.items() if bad.late}
        results = {name: numbers(good.call) for name, good in GOOD.items()}
    return {
        "refusals": refusals,
        "compiled for bad calls": compiled_for_bad,
        "results": results,
        "compiled for good calls": (compiled.cache_info().misses, len(events)),
    }


@pytest.fixture(scope="module")
def reported() -> dict[str, Any]:
    return report_of(__file__)


@pytest.mark.parametrize("case", BAD)
def test_refused_by_name(case: str, reported: dict[str, Any]):
    assert_refused(reported["refusals"][case], BAD[case])


def test_nothing_is_compiled_for_bad_arguments(reported: dict[str, Any]):
    assert reported["compiled for bad calls"] == [0, 0]
    # The same counters, where there is something to count.
    specs, programs = reported["compiled for good calls"]
    assert specs >= len({tuple(good.dtypes) for good in GOOD.values()})
    assert programs >= specs


@pytest.mark.parametrize("case", GOOD)
def test_accepted(case: str, reported: dict[str, Any]):
    values, dtypes = reported["results"][case]
    assert dtypes == GOOD[case].dtypes
    for got, want in zip(values, GOOD[case].values, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


if __name__ == "__main__":
    print(json.dumps(report()))
