"""Bad arguments are refused by name before anything is compiled; odd ones are not."""

import functools
import re
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compilations
from jax.experimental import checkify
from jax.experimental.sparse import BCOO

import jaxmf_opt
from jaxmf_opt import LeanOptaxMinimiser, callbacks, combine, traced
from jaxmf_opt._solver.compilation import cached as compiled
from jaxmf_opt._solver.resume import start
from jaxmf_opt.robust import robust_lbfgs

# Most calls below are wrong, as a type checker would say.
optimize: Any = jaxmf_opt.optimize
solve: Any = jaxmf_opt.solve

Y = np.array([1.0, 2.0])
# Half a step along the gradient of `square` is all the way.
SGD = optax.sgd(0.5)


def square(y: Any) -> Any:
    return jnp.sum((y - 3.0) ** 2)


def checked(y: Any) -> Any:
    checkify.check(y[0] < 10, "too large")
    return square(y)


def of_start(params: Any, optimizer: Any = SGD) -> Any:
    """The shapes of a state."""
    with jax.enable_x64():
        start_of = functools.partial(start, optimizer, tests=False)
        return jax.eval_shape(start_of, params)


def with_gradient(gradient: Callable[[Any], Any]) -> dict[str, Any]:
    return {"loss_fn": lambda y: (square(y), gradient(y)), "grad": True}


# What is wrong with a call of `solve`, and what is said of it, in order.
TYPES: list[tuple[dict[str, Any], str]] = [
    ({"loss_fn": 3.5}, "`loss_fn` must be callable, got 3.5"),
    ({"loss_fn": lambda a, b: a}, "`loss_fn`.*(a, b)"),
    # What it returns.
    ({"loss_fn": lambda y: 1}, "`loss_fn`.*floating.*1 of type int"),
    ({"loss_fn": lambda y: jnp.sum(y).astype(complex)}, "real.*complex128"),
    # NumPy takes this string for the name of a dtype.
    ({"loss_fn": lambda y: "f"}, "`loss_fn`.*scalar.*'f'"),
    ({"loss_fn": lambda y: (square(y), y)}, "`loss_fn`.*scalar.*grad=True"),
    ({"grad": True}, "`loss_fn`.*pair.*float64"),
    # `params`.
    ({"params": {"b": ["x0"]}}, "`params['b'][0]`.*'x0' of type str"),
    ({"params": [Y, jnp.tanh]}, "`params[1]`.*tanh.*equinox.partition"),
    ({"params": np.ones(2, ">f8")}, "`params`.*byte order.*'>f8'"),
    ({"params": np.longdouble(1)}, "`params`.*dtype of JAX"),
    ({"params": BCOO.fromdense(jnp.eye(2))}, "`params`.*sparse array.*`data`"),
    ({"params": (Y, Y + 0j)}, "`params[1]`.*real.*complex128"),
    ({"params": jax.random.key(0)}, "`params`.*real numbers.*key<"),
    # Options.
    ({"max_optimizer_steps": 2.5}, "`max_optimizer_steps`.*integer.*2.5"),
    *(({name: 1}, f"`{name}` must be True") for name in ("grad", "history", "throw")),
    ({"callback": lambda: None}, "`callback`.*one argument.*()"),
    ({"callback": traced(lambda i: i.loss)}, "`callback`.*float64"),
    ({"optimizer": optax.lbfgs}, "`optimizer`.*optax.*lbfgs"),
    ({"linear_solver": "cg"}, "`linear_solver`.*lineax.*'cg'"),
    *(({name: Y}, f"`{name}`.*array([1., 2.])") for name in ("rtol", "atol", "gtol")),
    ({"steps": 1}, "'steps'"),
]
VALUES: list[tuple[dict[str, Any], str]] = [
    ({"loss_fn": lambda y: y}, "`loss_fn`.*scalar.*(2,)"),
    (with_gradient(lambda y: {"a": y}), "gradient that `loss_fn`.*structure.*'a'"),
    (with_gradient(lambda y: y[:1]), "gradient that `loss_fn`.*shapes.*(1,) for (2,)"),
    ({"loss_fn": checked}, "`loss_fn`.*`checkify.check`"),
    ({"params": {}}, "`params`.*at least one.*{}"),
    ({"params": 10**30}, f"`params`.*fit in 64 bits.*{10**30}"),
    ({"max_optimizer_steps": -1}, "`max_optimizer_steps`.*-1"),
    ({"history": True, "max_optimizer_steps": 10**12}, f"`history`.*{10**12}.*GiB"),
    ({"callback": traced(lambda i: i.grad < 0.0)}, "`callback`.*scalar.*(2,)"),
    *(({name: np.nan}, f"`{name}`.*nan") for name in ("rtol", "atol", "gtol")),
    ({"state": 3}, "`state`"),
    ({"state": of_start(np.ones(3))}, "`state`.*float64[2].*float64[3]"),
    ({"state": of_start(Y, optax.adam(0.1))}, "`state`.*optimizer"),
]
# Calls of other functions, and what is said of them.
OTHERS: list[tuple[type[Exception], Callable[..., Any], str]] = [
    (TypeError, lambda: LeanOptaxMinimiser(cast(Any, 0.1)), "`optim`.*0.1"),
    (ValueError, lambda: LeanOptaxMinimiser(SGD, rtol=-1.0), "`rtol`.*-1.0"),
    (TypeError, lambda: LeanOptaxMinimiser(SGD, norm=cast(Any, 2)), "`norm`.*2"),
    (ValueError, lambda: robust_lbfgs(memory_size=cast(Any, 2.5)), "`memory_size`"),
    (ValueError, lambda: robust_lbfgs(curv_rtol=float("nan")), "`curv_rtol`"),
    (ValueError, lambda: callbacks.small_gradient(-1.0), "`gtol`"),
    (ValueError, lambda: callbacks.TimeLimit(True), "`seconds`.*True"),
    (ValueError, lambda: callbacks.NoProgress(cast(Any, -1.5)), "`steps`.*-1.5"),
    (ValueError, lambda: callbacks.Progress(0), "`total`.*0"),
    (TypeError, lambda: callbacks.Checkpoint(cast(Any, 3)), "`path`.*3 of type int"),
    (ValueError, lambda: callbacks.Checkpoint("x.npz", 0), "`every`.*0"),
    (TypeError, lambda: traced(cast(Any, 3)), "`fn`.*callable.*3"),
    (
        TypeError,
        lambda: combine(cast(Any, len), cast(Any, None)),
        "`callbacks`.*callable.*None",
    ),
]


def call(loss_fn: Any = square, params: Any = Y, **options: Any) -> Any:
    """A solve that would be a good one without these."""
    return solve(loss_fn, params, **{"optimizer": SGD, **options})


def pattern(says: str) -> str:
    return ".*".join(map(re.escape, says.split(".*")))


@pytest.fixture(scope="module")
def warm() -> None:
    """By then small things of JAX have been compiled."""
    call(callback=traced(lambda _: True))


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    ("error", "make", "says"),
    [
        *((TypeError, functools.partial(call, **x), says) for x, says in TYPES),
        *((ValueError, functools.partial(call, **x), says) for x, says in VALUES),
        *OTHERS,
    ],
)
def test_refused_by_name(error: type[Exception], make: Any, says: str):
    """And nothing is compiled."""
    misses = compiled.cache_info().misses
    with compilations() as events, pytest.raises(error, match=pattern(says)):
        make()
    assert not events
    assert compiled.cache_info().misses == misses


@pytest.mark.parametrize(
    "callback", [lambda _: np.ones(2), combine(cast(Any, lambda _: jnp.ones(2)))]
)
def test_callbacks_that_return_arrays(callback: Any):
    """It is seen when a step has been made."""
    with pytest.raises(ValueError, match=r"`callback`.*shape \(2,\).*\.any\(\)"):
        call(callback=callback)


class WithStatic(eqx.Module):
    """A model with an attribute that is not an array."""

    weight: jax.Array
    name: str = eqx.field(static=True)


def total(tree: Any) -> Any:
    return sum((square(x) for x in jax.tree.leaves(tree)), start=jnp.zeros(()))


# Unusual arguments of `optimize`, and the leaves that come out.
F32, I8, F16 = np.float32, np.int8, np.float16
GOOD: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "Python's numbers": ({"params": [1, 2.5]}, [F32(3), F32(3)]),
    "numpy float64": ({}, [np.full(2, 3.0)]),
    "numpy scalar": ({"params": F16(0.5)}, [F16(3)]),
    "bfloat16": ({"params": jnp.ones(2, "bfloat16")}, [jnp.full(2, 3, "bfloat16")]),
    "size 0": (
        {"params": {"a": np.ones((0, 2)), "b": F32(1)}},
        [np.ones((0, 2)), F32(3)],
    ),
    "size 0 alone": ({"params": np.ones(0)}, [np.ones(0)]),
    "a module": (
        {"params": (None, WithStatic(jnp.ones(2), name="m"))},
        [np.full(2, 3, F32)],
    ),
    # A step of size 0.35 goes from 2 to 2.7, and from 4 to 3.3.
    "integers are rounded toward 0": (
        {
            "params": np.array([2, 4]),
            "max_optimizer_steps": 1,
            "optimizer": optax.sgd(0.35),
        },
        [np.array([2, 3])],
    ),
    "no steps": (
        {
            "params": {"a": np.array([0.1, np.inf], F32), "b": np.int16(-7)},
            "max_optimizer_steps": 0,
            "callback": lambda _: 1 / 0,
        },
        [np.array([0.1, np.inf], F32), np.int16(-7)],
    ),
    "numpy number of steps": (
        {"max_optimizer_steps": I8(1), "optimizer": optax.sgd(0.25)},
        [np.array([2.0, 2.5])],
    ),
    "numpy bool": (
        {"loss_fn": lambda y: (square(y), 2 * (y - 3)), "grad": np.True_},
        [np.full(2, 3.0)],
    ),
    "integer tolerances": ({"gtol": 100}, [Y]),
    "a constant loss": ({"loss_fn": lambda _: 1.0}, [Y]),
    "a callable object": (
        {"loss_fn": eqx.Partial(lambda a, y: a * square(y), 1.0)},
        [np.full(2, 3.0)],
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_accepted(case: str):
    changes, want = GOOD[case]
    arguments = {"loss_fn": total, "params": Y, "optimizer": SGD, **changes}
    got = optimize(arguments.pop("loss_fn"), arguments.pop("params"), **arguments)
    assert jax.tree.structure(got) == jax.tree.structure(changes.get("params", Y))
    for x, y in zip(jax.tree.leaves(got), want, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=1e-6)
