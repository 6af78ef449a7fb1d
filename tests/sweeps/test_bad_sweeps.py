"""Bad sweeps are refused by name before anything is compiled; odd ones are not.

The suite checks annotations while it runs, which would refuse some of these arguments
first, with errors of its own. So all the calls are made in one process without these
checks, of several devices: this file, run as a script.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from calling import assert_refused, numbers, said
from compiling import compilations
from jax.sharding import Mesh
from processes import report_of

import jaxmf_opt
from jaxmf_opt import combine, sweeps, traced
from jaxmf_opt.sweeps import SweepTable

# Most calls below are wrong, as a type checker would say.
sweep: Any = jaxmf_opt.sweep
solve: Any = jaxmf_opt.solve

DEVICES = 4
Y, H = np.array([1.0, 2.0]), np.arange(4.0)
PAIR = {"a": H, "b": H + 1}
# Half a step along the gradient of `square` is all the way.
SGD = optax.sgd(0.5)

evaluations = 0


class Bad(NamedTuple):
    """A call, the exception it must raise, and what that has to say.

    Attributes:
      call: The call.
      error: The type of the exception.
      words: What its message must have.
      late: Whether something has to be compiled, or the loss to be traced, before one
        can know.
    """

    call: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...]
    late: bool = False


def square(y: Any, h: Any) -> Any:
    global evaluations
    evaluations += 1
    return jnp.sum((y - jnp.asarray(h, y.dtype)) ** 2)


def with_loss(loss: Any, error: type[Exception], *words: str, **options: Any) -> Bad:
    def call() -> Any:
        return sweep(loss, Y, H, **options)

    return Bad(call, error, ("`loss_fn`", *words))


def with_gradient(gradient: Any, error: type[Exception], *words: str) -> Bad:
    def loss(y: Any, h: Any) -> Any:
        return square(y, h), gradient(y)

    words = ("`loss_fn`", "gradient", *words)
    return Bad(lambda: sweep(loss, Y, H, grad=True), error, words, late=True)


def with_params(params: Any, error: type[Exception], *words: str, **options: Any):
    return Bad(lambda: sweep(square, params, H, **options), error, ("`params", *words))


def with_hyperparams(make: Any, error: type[Exception], *words: str, **options: Any):
    def call() -> Any:
        # Made in the call where that takes JAX, which is not to run at import.
        return sweep(square, Y, make() if callable(make) else make, **options)

    return Bad(call, error, words)


def with_axes(
    in_axes: Any, error: type[Exception], *words: str, hyperparams: Any = H
) -> Bad:
    def call() -> Any:
        return sweep(square, Y, hyperparams, in_axes=in_axes)

    return Bad(call, error, words)


def with_option(
    name: str, value: Any, error: type[Exception], *words: str, late: bool = False
) -> Bad:
    def call() -> Any:
        return sweep(square, Y, H, **{name: value})

    return Bad(call, error, (f"`{name}`", *words), late=late)


def mesh(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))])
    return Mesh(devices.reshape(shape), tuple("ijk"[: len(shape)]))


def on_mesh(shape: tuple[int, ...], *words: str, **options: Any) -> Bad:
    def call() -> Any:
        return sweep(square, Y, np.arange(6.0), mesh=mesh(*shape), **options)

    return Bad(call, ValueError, words)


@functools.cache
def state() -> Any:
    """A state to go on from, of `square` and `SGD` after one step."""
    return sweep(square, Y, H, optimizer=SGD, max_optimizer_steps=1).state


def going_on(
    make: Callable[[], Any],
    *words: str,
    late: bool = False,
    loss: Any = square,
    params: Any = Y,
    hyperparams: Any = H,
    **options: Any,
) -> Bad:
    def call() -> Any:
        kwargs = {"optimizer": SGD, "state": make(), **options}
        return sweep(loss, params, hyperparams, **kwargs)

    return Bad(call, ValueError, ("`state`", *words), late=late)


def inside(call: Callable[[], Any]) -> Bad:
    words = ("`sweep`", "must not be traced", "`jax.vmap` of `solve`")
    return Bad(call, TypeError, words)


def total(c: Any, **options: Any) -> Any:
    """A number that depends on what a sweep closes over or is given."""
    kwargs = {"optimizer": SGD, "max_optimizer_steps": 1, **options}

    def loss(y: Any, h: Any) -> Any:
        return square(y, jnp.asarray(c, y.dtype) * jnp.asarray(h, y.dtype))

    return sweep(loss, Y, H, **kwargs).value.sum()


def closing_over(name: str, call: Callable[[], Any]) -> Bad:
    """What is traced can only be seen when functions are called."""
    bad = inside(call)
    return bad._replace(words=(f"`{name}`", *bad.words), late=True)


def in_directory(directory: Any, error: type[Exception], *words: str) -> Bad:
    """A path below a regular file, in which nothing can be made, not even by root."""

    def call() -> Any:
        with tempfile.TemporaryDirectory() as above:
            Path(above, "file").write_text("kept")
            path = directory(above) if callable(directory) else directory
            return sweep(square, Y, H, optimizer=SGD, checkpoint_dir=path)

    words = ("`checkpoint_dir`", *words)
    return Bad(call, error, words, late=callable(directory))


def of_another_sweep() -> Any:
    with tempfile.TemporaryDirectory() as directory:
        run = functools.partial(sweep, square, Y, optimizer=SGD)
        run(H, checkpoint_dir=directory, max_optimizer_steps=1)
        run(H + 1, checkpoint_dir=directory, max_optimizer_steps=1)


def without_tqdm() -> Any:
    known = {name: sys.modules.pop(name) for name in ("tqdm",) if name in sys.modules}
    sys.modules["tqdm"] = None  # pyright: ignore
    try:
        return sweep(square, Y, H, progress=True)
    finally:
        del sys.modules["tqdm"]
        sys.modules.update(known)


BAD: dict[str, Bad] = {
    # What `loss_fn` is.
    "loss None": with_loss(None, TypeError, "callable", "None"),
    "loss a number": with_loss(3.5, TypeError, "callable", "3.5"),
    "loss without arguments": with_loss(lambda: 0.0, TypeError, "two arguments", "()"),
    "loss of one argument": with_loss(lambda y: y, TypeError, "two arguments", "(y)"),
    "loss of three": with_loss(lambda a, b, c: a, TypeError, "two", "(a, b, c)"),
    "loss by keyword": with_loss(lambda y, *, h: y, TypeError, "two", "(y, *, h)"),
    # What it returns.
    **{
        f"loss {name}": with_loss(loss, error, *words)._replace(late=True)
        for name, loss, error, words in (
            ("vector", lambda y, h: y, ValueError, ("scalar", "(2,)")),
            ("int", lambda y, h: 1, TypeError, ("floating", "1 of type int")),
            (
                "integer array",
                lambda y, h: jnp.sum(y).astype(int),
                TypeError,
                ("floating", "int64"),
            ),
            ("bool", lambda y, h: y[0] > h, TypeError, ("floating", "bool")),
            (
                "complex",
                lambda y, h: jnp.sum(y).astype(complex),
                TypeError,
                ("real", "complex128"),
            ),
            ("nothing", lambda y, h: None, TypeError, ("scalar", "None")),
            ("a string", lambda y, h: "low", TypeError, ("scalar", "'low'")),
            (
                "a pair, grad=False",
                lambda y, h: (square(y, h), y),
                TypeError,
                ("scalar", "of type tuple"),
            ),
        )
    },
    # The same with grad=True.
    "no pair": with_loss(square, TypeError, "pair", "float64", grad=True)._replace(
        late=True
    ),
    "gradient None": with_gradient(lambda y: None, ValueError, "structure", "None"),
    "gradient of other structure": with_gradient(
        lambda y: {"a": y}, ValueError, "structure", "'a'"
    ),
    "gradient of other shape": with_gradient(
        lambda y: y[:1], ValueError, "shapes", "(1,)", "(2,)"
    ),
    "gradient integer": with_gradient(
        lambda y: y.astype(int), TypeError, "floating", "int64"
    ),
    # `params`.
    "params {}": with_params({}, ValueError, "at least one", "{}"),
    "params None": with_params(None, ValueError, "at least one", "None"),
    "params a string": with_params("x0", TypeError, "'x0' of type str"),
    "params with a string": with_params(
        {"a": Y, "b": ["x0"]}, TypeError, "['b'][0]`", "'x0' of type str"
    ),
    "params a complex": with_params(2j, TypeError, "2j of type complex"),
    "params of complex": with_params(
        (Y, Y + 0j), TypeError, "[1]`", "real", "complex128"
    ),
    "params of objects": with_params(np.array([None]), TypeError, "object"),
    "params a mapped number": with_params(
        1.5, ValueError, "`params` must be an array", "1.5 of type float", in_axes=0
    ),
    "params a mapped list": with_params(
        [1.0, 2.0], ValueError, "`params[0]`", "an array", "map None", in_axes=0
    ),
    "params of no axis": with_params(
        np.array(1.0), ValueError, "`params`", "the axis 0", "()", in_axes=0
    ),
    "params of other lanes": with_params(
        np.ones(3), ValueError, "3 in `params`", "4 in `hyperparams`", in_axes=0
    ),
    # `hyperparams`.
    "other lanes": with_hyperparams(
        {"a": np.ones(3), "b": {"c": np.ones((4, 2))}},
        ValueError,
        *("3 in `hyperparams['a']`", "4 in `hyperparams['b']['c']`", "meshgrid"),
    ),
    "no lanes": with_hyperparams(
        np.ones(0), ValueError, "`hyperparams`", "at least one lane"
    ),
    "no lanes of many numbers": with_hyperparams(
        {"a": np.ones((0, 3))}, ValueError, "`hyperparams['a']`", "at least one lane"
    ),
    **{
        f"no array: {value!r}": with_hyperparams(
            value, ValueError, "`in_axes`", "`params`, `hyperparams`", "no lanes"
        )
        for value in (None, {}, [], {"a": None})
    },
    **{
        f"hyperparams {value!r}": with_hyperparams(
            value, ValueError, *words, "must be an array", "Make an array"
        )
        for value, words in (
            ([0.1, 0.2], ("`hyperparams[0]`", "0.1 of type float")),
            ({"lr": [1, 2]}, ("`hyperparams['lr'][0]`", "1 of type int")),
            (0.1, ("`hyperparams`", "0.1 of type float")),
            (np.float32(0.5), ("`hyperparams`", "np.float32(0.5)")),
            ("abc", ("`hyperparams`", "'abc' of type str")),
            (range(3), ("`hyperparams`", "range(0, 3)")),
            ({"a": H, "b": 2.0}, ("`hyperparams['b']`", "2.0", "map None")),
        )
    },
    "hyperparams of no axis": with_hyperparams(
        np.array(1.0), ValueError, "`hyperparams`", "the axis 0", "shape ()"
    ),
    "hyperparams of strings": with_hyperparams(
        {"a": np.array(["x"])}, TypeError, "`hyperparams['a']`", "numbers", "<U1"
    ),
    "hyperparams of objects": with_hyperparams(
        np.array([None, 1.0]), TypeError, "`hyperparams`", "numbers", "object"
    ),
    "hyperparams of dates": with_hyperparams(
        np.array(["2020-02-02"], "datetime64[D]"),
        *(TypeError, "`hyperparams`", "numbers", "datetime64"),
    ),
    # `in_axes`.
    **{
        f"in_axes {value!r}": with_axes(value, TypeError, "`in_axes`", *words)
        for value, words in (
            ("0", ("pair", "'0'")),
            (1.0, ("pair", "1.0")),
            ({}, ("pair", "{}")),
            ((0,), ("pair", "(0,)")),
            ((0, 0, 0), ("pair", "(0, 0, 0)")),
            (np.array([0, 0]), ("pair", "array([0, 0])")),
            (True, ("ints and None", "True for `params`")),
            ((None, False), ("ints and None", "False for `hyperparams`")),
            ((None, 0.5), ("ints and None", "0.5 for `hyperparams`")),
            ((None, "a"), ("ints and None", "'a' for `hyperparams`")),
            ((0.0, None), ("ints and None", "0.0 for `params`")),
        )
    },
    **{
        f"in_axes {axes!r} of two": with_axes(
            axes,
            ValueError,
            "`in_axes`",
            "structure of `hyperparams`",
            hyperparams=PAIR,
        )
        for axes in ((None, (0, 0)), (None, {"a": 0}), (None, {"a": 0, "c": 0}))
    },
    "in_axes of params": with_axes(
        ({"a": None}, 0),
        ValueError,
        "`in_axes`",
        "structure of `params`",
        "{'a': None}",
    ),
    "in_axes too large": with_axes(
        (None, 1), ValueError, "`hyperparams`", "`in_axes`", "axis 1", "(4,)"
    ),
    "in_axes too small": with_axes(
        (None, {"a": 0, "b": -2}),
        ValueError,
        *("`hyperparams['b']`", "`in_axes`", "axis -2", "(4,)"),
        hyperparams=PAIR,
    ),
    "in_axes None": with_axes(None, ValueError, "`in_axes`", "must map", "None"),
    "in_axes of Nones": with_axes(
        (None, {"a": None, "b": None}),
        ValueError,
        *("`in_axes`", "must map", "no lanes"),
        hyperparams=PAIR,
    ),
    # Batches and devices.
    "batch_size 0": with_option("batch_size", 0, ValueError, "positive", "0"),
    "batch_size -1": with_option("batch_size", -1, ValueError, "positive", "-1"),
    **{
        f"batch_size {value!r}": with_option(
            "batch_size", value, TypeError, "integer", repr(value)
        )
        for value in (2.0, True, "2", np.array(2), [2])
    },
    "batch_size of a mesh": on_mesh((2,), "`batch_size`", "of 2", "3", batch_size=3),
    "batch_size of a large mesh": on_mesh(
        (3,), "`batch_size`", "of 3", "got 4", batch_size=4
    ),
    "mesh that does not divide": on_mesh((4,), "`mesh`", "divides the 6 lanes", "4"),
    "mesh of two axes": on_mesh((2, 2), "`mesh`", "divides the 6 lanes", "4"),
    "mesh of none": on_mesh((0,), "`mesh`", "divides the 6 lanes", "0"),
    **{
        f"mesh {value!r}": with_option("mesh", value, TypeError, "`jax.sharding.Mesh`")
        for value in (4, "all", ("lanes",))
    },
    "mesh a list of devices": Bad(
        lambda: sweep(square, Y, H, mesh=jax.devices()),
        TypeError,
        ("`mesh`", "`jax.sharding.Mesh`", "id=0"),
    ),
    "mesh of no devices": Bad(
        lambda: sweep(square, Y, H, mesh=mesh(4).abstract_mesh),
        TypeError,
        ("`mesh`", "`jax.sharding.Mesh`", "AbstractMesh"),
    ),
    # Flags and numbers.
    **{
        f"{name} {value!r}": with_option(
            name, value, TypeError, "True or False", f"{value!r} of type"
        )
        for name in ("progress", "keep_states", "grad", "history", "throw")
        for value in (1, None, "yes")
    },
    "steps -1": with_option("max_optimizer_steps", -1, ValueError, "-1"),
    "steps 2**63": with_option("max_optimizer_steps", 2**63, ValueError, "64 bits"),
    "steps 2.5": with_option("max_optimizer_steps", 2.5, TypeError, "2.5", "integer"),
    "steps None": with_option("max_optimizer_steps", None, TypeError, "None"),
    "steps of lanes": with_option(
        "max_optimizer_steps", np.arange(4), TypeError, "array([0, 1, 2, 3])"
    ),
    **{
        f"{name} {value!r}": with_option(name, value, error, word)
        for name in ("rtol", "atol", "gtol")
        for value, error, word in (
            (-1, ValueError, "-1"),
            (np.nan, ValueError, "nan"),
            ("x", TypeError, "'x' of type str"),
            (H, TypeError, "array([0., 1., 2., 3.])"),
            (None, TypeError, "None"),
            (1j, TypeError, "1j"),
        )
    },
    # Tolerances of lanes.
    "tolerance of nothing": with_option(
        "rtol", lambda: 0.1, TypeError, "one argument", "()"
    ),
    "tolerance of two": with_option(
        "atol", lambda h, g: 0.1, TypeError, "one argument", "(h, g)"
    ),
    **{
        f"tolerance {what}": with_option(name, tolerance, error, *words, late=True)
        for what, name, tolerance, error, words in (
            ("negative in a lane", "rtol", lambda h: 2.5 - h, ValueError, ("-0.5",)),
            (
                "NaN in a lane",
                "atol",
                lambda h: jnp.where(h == 2, jnp.nan, h),
                ValueError,
                ("nan",),
            ),
            ("negative in all", "gtol", lambda h: -1.0, ValueError, ("-1.0",)),
            ("complex", "gtol", lambda h: h.astype(complex), TypeError, ("real",)),
            ("a vector", "rtol", lambda h: h * jnp.ones(2), TypeError, ("scalar",)),
        )
    },
    **{
        f"tolerance {value!r} of a lane": with_option(
            "gtol",
            lambda h, value=value: value,
            *(TypeError, "a number", f"got {value!r}"),
            late=True,
        )
        for value in (None, "x", {"a": 1.0})
    },
    # Optimizers.
    "optimizer None": with_option("optimizer", None, TypeError, "optax", "None"),
    "optimizer a string": with_option("optimizer", "adam", TypeError, "'adam'"),
    "optimizer of lanes": with_option(
        "optimizer", [SGD, SGD], TypeError, "optax", "GradientTransformation"
    ),
    "optimizer that is none": with_option(
        "optimizer", lambda h: None, TypeError, "optax", "None"
    ),
    "optimizer a number of lanes": with_option(
        "optimizer", lambda h: h, TypeError, "optax", "0.0"
    ),
    "optimizer a schedule": with_option(
        "optimizer",
        optax.cosine_decay_schedule(0.1, 9),
        *(TypeError, "optax", "Array(0.1"),
        late=True,
    ),
    "optimizer of nothing": with_option(
        "optimizer", lambda: SGD, TypeError, "one argument", "()"
    ),
    "optimizer of two": with_option(
        "optimizer", lambda h, g: SGD, TypeError, "one argument", "(h, g)"
    ),
    # Callbacks.
    "callback None": with_option("callback", None, TypeError, "callable", "None"),
    "callback a string": with_option("callback", "log", TypeError, "callable", "'log'"),
    "callback of nothing": with_option(
        "callback", lambda: None, TypeError, "one argument", "()"
    ),
    "callback of two": with_option(
        "callback", lambda step, loss: None, TypeError, "(step, loss)"
    ),
    **{
        f"traced callback {what}{where}": Bad(
            functools.partial(sweep, square, Y, H, callback=wrap(traced(fn))),
            error,
            ("`callback`", "None or a boolean scalar", *words),
        )
        for what, fn, error, words in (
            ("a float", lambda info: info.loss, TypeError, ("float64",)),
            ("a string", lambda info: "stop", TypeError, ("'stop'",)),
            ("an array", lambda info: info.grad > 0, ValueError, ("(2,)",)),
        )
        for where, wrap in (
            ("", lambda fn: fn),
            (", beside another", lambda fn: combine(lambda info: None, fn)),
        )
    },
    # States.
    "state a string": going_on(lambda: "x", "got 1", "str"),
    "state of numbers": going_on(lambda: [1.0, 2.0], "got 2"),
    "state of fewer lanes": going_on(
        lambda: jax.tree.map(lambda x: np.asarray(x)[:3], state()),
        "float64[4, 2]",
        "float64[3, 2]",
    ),
    "state of a lane": going_on(
        lambda: jax.tree.map(lambda x: np.asarray(x)[0], state()),
        "float64[4, 2]",
        "float64[2]",
    ),
    "state of another size": going_on(
        state, "float64[4, 3]", "float64[4, 2]", params=np.ones(3), hyperparams=H
    ),
    "state of another optimizer": going_on(
        state, "optimizer", optimizer=optax.adam(0.1)
    ),
    "a solution": going_on(
        lambda: sweep(square, Y, H, optimizer=SGD, max_optimizer_steps=1),
        *("got 23", "int32[4]"),
        late=True,
    ),
    "state of another loss": going_on(
        state,
        *("same problems", "`loss_fn`", "lanes 0, 1, 2, 3."),
        late=True,
        loss=lambda y, h: square(y, h) + 1,
    ),
    "state of some other lanes": going_on(
        state,
        *("same problems", "lanes 1, 3."),
        late=True,
        hyperparams=np.array([0.0, 1.5, 2.0, 7.0]),
    ),
    # What else there is.
    "unknown": Bad(
        lambda: sweep(square, Y, H, linear_solver=None),
        TypeError,
        ("unexpected", "'linear_solver'"),
    ),
    "in_axes without its name": Bad(
        lambda: sweep(square, Y, H, (None, 0)), TypeError, ("positional",)
    ),
    "no hyperparams": Bad(lambda: sweep(square, Y), TypeError, ("'hyperparams'",)),
    "without tqdm": Bad(
        without_tqdm,
        ModuleNotFoundError,
        ("`progress`", "pip install 'jaxmf_opt[progress]'"),
        late=True,
    ),
    # Inside of programs and transformations.
    "jit": inside(lambda: jax.jit(lambda h: sweep(square, Y, h).value)(H)),
    "jit of constants": inside(lambda: jax.jit(lambda: sweep(square, Y, H).value)()),
    "vmap": inside(
        lambda: jax.vmap(lambda h: sweep(square, Y, h).value)(np.ones((3, 2)))
    ),
    "vmap of starts": inside(
        lambda: jax.vmap(lambda y: sweep(square, y, H).value)(np.ones((3, 2)))
    ),
    "grad": inside(lambda: jax.grad(lambda h: sweep(square, Y, h).value.sum())(H)),
    "scan": inside(lambda: jax.lax.scan(lambda c, h: (c, total(2.0)), 0.0, H)),
    "eval_shape": inside(lambda: jax.eval_shape(lambda h: sweep(square, Y, h), H)),
    "grad of a tolerance": inside(lambda: jax.grad(lambda c: total(1, gtol=c))(1.0)),
    "vmap of a state": inside(
        lambda: jax.vmap(lambda s: total(1, state=s), out_axes=0)(state())
    ),
    "grad of a closure": closing_over("loss_fn", lambda: jax.grad(total)(1.0)),
    "vmap of a closure": closing_over("loss_fn", lambda: jax.vmap(total)(H)),
    "grad of a tolerance's closure": closing_over(
        "gtol", lambda: jax.grad(lambda c: total(1.0, gtol=lambda h: c * h))(1.0)
    ),
    "grad of an optimizer": closing_over(
        "optimizer", lambda: jax.grad(lambda c: total(1.0, optimizer=optax.sgd(c)))(0.1)
    ),
    "grad of an optimizer's closure": closing_over(
        "optimizer",
        lambda: jax.grad(lambda c: total(1.0, optimizer=lambda h: optax.sgd(c * h)))(
            0.1
        ),
    ),
    "vmap of a callback's closure": closing_over(
        "callback",
        lambda: jax.vmap(
            lambda c: total(
                1.0, callback=traced(lambda i: i.loss < c.astype(i.loss.dtype))
            )
        )(H),
    ),
    # `checkpoint_dir`.
    "directory 3": in_directory(3, TypeError, "path", "3 of type int"),
    "directory True": in_directory(True, TypeError, "path", "True of type bool"),
    "directory bytes": in_directory(b"x", TypeError, "path", "b'x' of type bytes"),
    "directory a file": in_directory(
        lambda above: f"{above}/file", FileExistsError, "/file'", "can be written"
    ),
    "directory below a file": in_directory(
        lambda above: Path(above, "file", "a"), NotADirectoryError, "/file/a'"
    ),
    "directory of another sweep": Bad(
        of_another_sweep,
        ValueError,
        ("`checkpoint_dir`", "another sweep", "what differs between lanes"),
        late=True,
    ),
    "directory and callback": Bad(
        lambda: sweep(square, Y, H, callback=lambda info: None, checkpoint_dir="never"),
        ValueError,
        ("`checkpoint_dir`", "`callback`", "`traced`"),
    ),
    "directory and combined callback": Bad(
        lambda: sweep(
            *(square, Y, H),
            callback=combine(traced(lambda info: None), lambda info: None),
            checkpoint_dir="never",
        ),
        ValueError,
        ("`checkpoint_dir`", "`callback`"),
    ),
    # Tables.
    **{
        f"{fn.__name__} of {value!r}": Bad(
            functools.partial(fn, value, *more),
            TypeError,
            ("`solution`", repr(value), f"of type {type(value).__name__}"),
        )
        for fn, more in (
            (sweeps.best_lane, ()),
            (sweeps.failed_lanes, ()),
            (sweeps.table, (H,)),
        )
        for value in (3.5, None, {"loss": [1.0]})
    },
    "to_csv 3": Bad(
        lambda: SweepTable({}).to_csv(3),  # pyright: ignore
        TypeError,
        ("`path`", "3 of type int"),
    ),
}

# Refusals after which the loss must not have been traced: all those that are no
# matter of what it returns.
TRACES_NOTHING = [name for name, case in BAD.items() if not case.late]


class WithStatic(eqx.Module):
    """A model with an attribute that is not an array."""

    weight: Any
    name: str = eqx.field(static=True)


class Good(NamedTuple):
    """An unusual call, and the leaves of the values: numbers, dtypes."""

    call: Callable[[], Any]
    values: list[Any]
    dtypes: list[str]


def solved(
    make: Callable[[], Any],
    values: Any,
    *dtypes: str,
    params: Any = Y,
    loss: Any = square,
    **options: Any,
) -> Good:
    """A sweep over hyperparameters that are made in the call."""

    def call() -> Any:
        kwargs = {"optimizer": SGD, "max_optimizer_steps": 3, **options}
        return sweep(loss, params, make(), **kwargs).value

    return Good(call, values, list(dtypes or ["float64"]))


def from_params(params: Any, values: Any, *dtypes: str, **options: Any) -> Good:
    """A sweep over `H`, in which all leaves go there."""

    def loss(y: Any, h: Any) -> Any:
        return sum((square(x, h) for x in jax.tree.leaves(y)), start=jnp.zeros(()))

    def call() -> Any:
        # Made in the call where that takes JAX, which is not to run at import.
        start = params() if callable(params) else params
        kwargs = {"optimizer": SGD, "max_optimizer_steps": 3, **options}
        return sweep(loss, start, H, **kwargs).value

    return Good(call, values, list(dtypes))


ROWS = [[x, x] for x in H.tolist()]  # where `square` of two parameters goes

GOOD: dict[str, Good] = {
    # Parameters.
    "float": from_params(1.5, [H], "float32"),
    "int": from_params(1, [H], "float32"),
    "numbers in a list": from_params([1, 2.5], [H, H], "float32", "float32"),
    "numpy float32": from_params(Y.astype(np.float32), [ROWS], "float32"),
    "numpy scalar": from_params(np.float16(0.5), [H], "float16"),
    "bfloat16": from_params(lambda: jnp.ones(2, jnp.bfloat16), [ROWS], "bfloat16"),
    "int8": from_params(np.array([0, 7], np.int8), [ROWS], "int8"),
    "size 0 beside others": from_params(
        {"a": np.ones((0, 2)), "b": Y}, [[[]] * 4, ROWS], "float64", "float64"
    ),
    "size 0 alone": from_params(np.ones(0), [[[]] * 4], "float64"),
    "None leaves": from_params((None, Y, {"a": None}), [ROWS], "float64"),
    "a module": from_params(
        lambda: WithStatic(jnp.ones(2), name="m"), [ROWS], "float32"
    ),
    # Hyperparameters.
    "jax array": solved(lambda: jnp.arange(4.0), [ROWS]),
    "int8 hyperparams": solved(lambda: H.astype(np.int8), [ROWS]),
    "bool hyperparams": solved(
        lambda: np.array([True, False]), [[[1, 1], [0, 0]]], "float64"
    ),
    "bfloat16 hyperparams": solved(lambda: jnp.arange(4, dtype=jnp.bfloat16), [ROWS]),
    "complex hyperparams": solved(
        lambda: H * 1j, [ROWS], loss=lambda y, h: square(y, h.imag)
    ),
    "random keys": solved(
        lambda: jax.random.wrap_key_data(jnp.array([[0, 5], [0, 6]], jnp.uint32)),
        [[[5, 5], [6, 6]]],
        loss=lambda y, key: square(y, jax.random.key_data(key)[1]),
    ),
    "NaN in a lane": solved(
        lambda: np.array([0.0, np.nan]), [[[0, 0], [1, 2]]], "float64"
    ),
    "not contiguous": solved(
        lambda: np.arange(8.0)[::-2], [[[x, x] for x in (7, 5, 3, 1)]]
    ),
    "not writable": solved(lambda: np.broadcast_to(3.0, (4,)), [[[3, 3]] * 4]),
    "one lane": solved(lambda: H[2:3], [[[2, 2]]]),
    "None and size 0 leaves": solved(
        lambda: {"a": H, "b": None, "c": np.ones((4, 0))},
        [ROWS],
        loss=lambda y, h: square(y, h["a"]) + jnp.sum(h["c"]),
    ),
    "a module of hyperparams": solved(
        lambda: WithStatic({"x": H}, name="m"),
        [ROWS],
        loss=lambda y, h: square(y, h.weight["x"]) if h.name == "m" else None,
    ),
    "unused hyperparams": solved(
        lambda: H, [[[3, 3]] * 4], loss=lambda y, _: square(y, 3.0)
    ),
    "text for all lanes": solved(
        lambda: {"a": H, "kind": "square", "power": 2},
        [ROWS],
        loss=lambda y, h: jnp.sum(
            (y - h["a"]) ** h["power"] if h["kind"] == "square" else y
        ),
        in_axes=(None, {"a": 0, "kind": None, "power": None}),
    ),
    # Axes.
    "the last axis": solved(
        lambda: np.arange(8.0).reshape(2, 4),
        [[[i, 4 + i] for i in range(4)]],
        in_axes=(None, -1),
    ),
    "axes of numpy in a list": solved(lambda: H, [ROWS], in_axes=[None, np.int8(0)]),
    "axes for both": solved(lambda: H, [H], params=np.ones(4), in_axes=0),
    "starts alone": solved(
        lambda: 3.0, [[[3, 3]] * 5], params=np.ones((5, 2)), in_axes=(0, None)
    ),
    "starts without hyperparams": solved(
        lambda: None,
        [[[3, 3]] * 5],
        params=np.ones((5, 2)),
        in_axes=(0, None),
        loss=lambda y, h: square(y, 3.0) if h is None else None,
    ),
    # Batches and devices.
    "a large batch": solved(lambda: H, [ROWS], batch_size=1000),
    "a batch of numpy's integer": solved(lambda: H, [ROWS], batch_size=np.int16(1)),
    "several devices": Good(
        lambda: sweep(square, Y, H, mesh=mesh(2, 2), optimizer=SGD, batch_size=4).value,
        [ROWS],
        ["float64"],
    ),
    "another device": Good(
        lambda: (
            sweep(
                *(square, Y, H),
                mesh=Mesh(np.array(jax.devices()[3:]), ("i",)),
                optimizer=SGD,
                max_optimizer_steps=3,
            ).value
        ),
        [ROWS],
        ["float64"],
    ),
    # Options.
    "no steps": solved(lambda: H, [[[1, 2]] * 4], max_optimizer_steps=0),
    "no steps, history": solved(
        lambda: H, [[[1, 2]] * 4], max_optimizer_steps=0, history=True
    ),
    "no steps, a callback": solved(
        lambda: H, [[[1, 2]] * 4], max_optimizer_steps=0, callback=lambda _: 1 / 0
    ),
    "numpy's integers and bools": solved(
        lambda: H,
        [ROWS],
        max_optimizer_steps=np.int8(2),
        keep_states=np.False_,
        grad=np.True_,
        loss=lambda y, h: (square(y, h), 2 * (y - h)),
    ),
    "integer tolerances": solved(lambda: H, [[[1, 2]] * 4], gtol=100),
    "tolerances of numpy": solved(lambda: H, [ROWS], gtol=np.float32(0.5), rtol=0),
    # |2 - h| is half of the gradient: it is small in lanes 2 and 3.
    "a tolerance in some lanes": solved(
        lambda: H,
        [[[0, 0], [1, 1], [1, 2], [1, 2]]],
        gtol=lambda h: jnp.where(h < 2, 0.0, 4.0),
    ),
    "a tolerance that is the same": solved(
        lambda: H, [[[1, 2]] * 4], atol=lambda _: 0, gtol=lambda _: 100
    ),
    "an optimizer of a lane": solved(
        lambda: {"lr": np.array([0.0, 0.25, 0.5])},
        [[[1, 2], [2, 2.5], [3, 3]]],
        loss=lambda y, _: square(y, 3.0),
        optimizer=lambda h: optax.sgd(h["lr"]),
        max_optimizer_steps=1,
    ),
    "an optimizer that is the same": solved(lambda: H, [ROWS], optimizer=lambda _: SGD),
    "a constant loss": solved(lambda: H, [[[1, 2]] * 4], loss=lambda y, h: 1.0),
    "a callable object": solved(
        lambda: H, [ROWS], loss=eqx.Partial(lambda a, y, h: a * square(y, h), 1.0)
    ),
    "a loss of more, by default": solved(
        lambda: H, [ROWS], loss=lambda y, h, scale=1.0: scale * square(y, h)
    ),
    "a loss of any arguments": solved(lambda: H, [ROWS], loss=lambda *a: square(*a)),
    "a state as a list": Good(
        lambda: (
            sweep(square, Y, H, optimizer=SGD, state=jax.tree.leaves(state())).value
        ),
        [ROWS],
        ["float64"],
    ),
}


def report() -> dict[str, Any]:
    """Makes all the calls and writes down what came of them."""
    state()  # also compiles what makes an array of zeros: not to be counted below
    with compilations() as events:

        def refusal(call: Callable[[], Any]) -> list[Any]:
            before = (len(events), evaluations)
            refused = said(call)
            return [*refused, len(events) - before[0], evaluations - before[1]]

        refusals = {name: refusal(bad.call) for name, bad in BAD.items()}
        # Of a size that no other call has compiled anything for.
        early = refusal(lambda: sweep(lambda y, h: y, np.ones(7), H, batch_size=2))
        before = len(events)
        results = {name: numbers(good.call) for name, good in GOOD.items()}
        return {
            "refusals": refusals,
            "refusal with a batch size": early,
            "results": results,
            "compiled for good calls": len(events) - before,
            "devices": jax.device_count(),
        }


@pytest.fixture(scope="module")
def reported() -> dict[str, Any]:
    return report_of(__file__, devices=DEVICES)


@pytest.mark.parametrize("case", BAD)
def test_refused_by_name(case: str, reported: dict[str, Any]):
    assert_refused(reported["refusals"][case], BAD[case])


@pytest.mark.parametrize("case", TRACES_NOTHING)
def test_nothing_is_compiled_or_evaluated(case: str, reported: dict[str, Any]):
    error, _, *counts = reported["refusals"][case]
    assert error != "no error"
    assert counts == [0, 0]


def test_what_a_loss_returns_is_seen_without_compiling(reported: dict[str, Any]):
    of_loss = [case for case, bad in BAD.items() if "`loss_fn`" in bad.words[0]]
    assert len(of_loss) > 15
    assert all(reported["refusals"][case][2] == 0 for case in of_loss)


def test_also_with_a_batch_size(reported: dict[str, Any]):
    error, message, compilations, _ = reported["refusal with a batch size"]
    assert error == "ValueError"
    assert "`loss_fn`" in message
    assert compilations == 0


def test_counters_count(reported: dict[str, Any]):
    """The same counters, where there is something to count."""
    assert reported["compiled for good calls"] > 20
    late = reported["refusals"]["state of another loss"]
    assert min(late[2:]) > 0
    assert reported["devices"] == DEVICES


@pytest.mark.parametrize("case", GOOD)
def test_accepted(case: str, reported: dict[str, Any]):
    values, dtypes = reported["results"][case]
    assert dtypes == GOOD[case].dtypes
    for got, want in zip(values, GOOD[case].values, strict=True):
        want = np.asarray(want, float)
        assert np.shape(got)[:2] == want.shape[:2]
        np.testing.assert_allclose(got, np.reshape(want, np.shape(got)), rtol=1e-6)


if __name__ == "__main__":
    print(json.dumps(report()))
