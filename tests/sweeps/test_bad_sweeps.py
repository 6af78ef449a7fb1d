"""Bad sweeps are refused by name before anything is compiled; odd ones are not."""

import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compilations
from jax.sharding import Mesh

import jaxmf_opt
from jaxmf_opt import combine, traced

# Most calls below are wrong, as a type checker would say.
sweep: Any = jaxmf_opt.sweep

Y, H = np.array([1.0, 2.0]), np.arange(4.0)
# Half a step along the gradient of `square` is all the way.
SGD, ADAM = optax.sgd(0.5), optax.adam(0.1)

evaluations = 0


def square(y: Any, h: Any) -> Any:
    global evaluations
    evaluations += 1
    return jnp.sum((y - jnp.asarray(h, y.dtype)) ** 2)


def swept(**changes: Any) -> Any:
    """A sweep that would be a good one without these."""
    arguments = {"loss_fn": square, "params": Y, "hyperparams": H, "optimizer": SGD}
    return sweep(**(arguments | {"max_optimizer_steps": 3} | changes))


@pytest.fixture(scope="module")
def state() -> Any:
    return swept().state


def devices(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:1] * count), ("i",))


# What is wrong, and what is said of it.
TYPES: list[tuple[dict[str, Any], str]] = [
    ({"loss_fn": 3.5}, "`loss_fn` must be callable, got 3.5."),
    ({"loss_fn": lambda y: y}, "`loss_fn` must be callable with two arguments; its"),
    ({"params": {"b": ["x"]}}, "`params['b'][0]` must be an array or a number"),
    ({"callback": "log"}, "`callback` must be callable, got 'log'."),
    ({"max_optimizer_steps": 2.5}, "`max_optimizer_steps` must be an integer, got 2.5"),
    *(
        ({name: 1}, f"`{name}` must be True or False, got 1 of type int.")
        for name in ("progress", "keep_states", "grad", "history", "throw")
    ),
    ({"rtol": "x"}, "`rtol` must be a number, got 'x' of type str."),
    ({"atol": lambda: 0.1}, "`atol` must be callable with one argument; its signature"),
    ({"gtol": lambda h: "x"}, "`gtol` must be a number, got 'x' of type str."),
    ({"optimizer": "adam"}, "`optimizer` must be an optax gradient"),
    ({"optimizer": lambda h: h}, "`optimizer` must be an optax gradient"),
    ({"optimizer": lambda: 1}, "`optimizer` must be callable with one argument; its"),
    ({"batch_size": True}, "`batch_size` must be None or an integer, got True of type"),
    ({"mesh": "all"}, "`mesh` must be None or a `jax.sharding.Mesh` of devices, such"),
    ({"checkpoint_dir": b"x"}, "`checkpoint_dir` must be a path, got b'x' of type"),
    ({"in_axes": (0,)}, "`in_axes` must be a pair, of an entry for `params` and one"),
    ({"in_axes": (None, 0.5)}, "`in_axes` must be made of ints and None, got 0.5 for"),
    # What functions return.
    ({"loss_fn": lambda y, h: 1j}, "`loss_fn` must return a real floating-point"),
    ({"loss_fn": lambda y, h: 1.0, "grad": True}, "`loss_fn` must return a pair"),
    ({"callback": traced(lambda _: 1.0)}, "`callback` must return None or a boolean"),
    ({"hyperparams": np.array(["x"])}, "`hyperparams` must hold numbers to be mapped"),
]
VALUES: list[tuple[dict[str, Any], str]] = [
    ({"params": {}}, "`params` must have at least one array in it, got {}."),
    ({"max_optimizer_steps": -1}, "`max_optimizer_steps` must be at least 0 and fit"),
    (
        {"history": True, "max_optimizer_steps": 2**40},
        "`history` must be False, or `max_optimizer_steps` at most 134217728:",
    ),
    ({"gtol": -1}, "`gtol` must be at least 0, got -1.0."),
    ({"rtol": lambda h: 2.5 - h}, "`rtol` must be at least 0, got -0.5."),  # in a lane
    ({"batch_size": 0}, "`batch_size` must be a positive multiple of 1, the number of"),
    ({"mesh": devices(3)}, "`mesh` must have a number of devices that divides the 4"),
    ({"mesh": devices(2)}, "`mesh` must have each device once, got one several times."),
    ({"params": 1.5, "in_axes": 0}, "`params` must be an array to be mapped, got 1.5"),
    ({"hyperparams": [0.1]}, "`hyperparams[0]` must be an array to be mapped, got 0.1"),
    ({"hyperparams": None}, "`in_axes` must map an array of `params`, `hyperparams`"),
    ({"hyperparams": np.ones((0, 3))}, "a sweep must have at least one lane, got none"),
    (
        {"hyperparams": {"a": np.ones(3), "b": {"c": np.ones((4, 2))}}},
        "all mapped arrays must have the same number of lanes, got 3 in "
        "`hyperparams['a']`, 4 in `hyperparams['b']['c']`.",
    ),
    ({"in_axes": (None, {"a": 0})}, "`in_axes` must have the structure of"),
    ({"in_axes": (None, 1)}, "`hyperparams` must have the axis 1 that `in_axes` maps"),
    ({"in_axes": (None, -2)}, "`hyperparams` must have the axis -2 that `in_axes`"),
    *(
        (
            {"checkpoint_dir": "never", "callback": callback},
            "`checkpoint_dir` cannot keep what a Python `callback` remembers of its",
        )
        for callback in (print, combine(traced(lambda info: None), print))
    ),
]


@pytest.mark.usefixtures("state")  # by then small things of JAX have been compiled
class TestRefused:
    @pytest.mark.parametrize(
        ("error", "changes", "says"),
        [*((TypeError, *x) for x in TYPES), *((ValueError, *x) for x in VALUES)],
    )
    def test_at_once(self, error: type[Exception], changes: Any, says: str):
        before = evaluations
        with compilations() as compiled, pytest.raises(error, match=re.escape(says)):
            swept(**changes)
        assert evaluations == before
        # (A tolerance of lanes is made with JAX.)
        assert not compiled or {*changes} <= {"rtol", "atol", "gtol"}

    def test_states(self, state: Any):
        form = "`state` must be that of a solve of the same problem, by the same kind"
        shorter = jax.tree.map(lambda x: np.asarray(x)[:3], state)
        for changes in ({"state": shorter}, {"state": state, "optimizer": ADAM}):
            with pytest.raises(ValueError, match=form):
                swept(**changes)
        # Whether it is of the same lanes is seen when they are begun.
        other = np.array([0.0, 1.5, 2.0, 7.0])
        with pytest.raises(ValueError, match=r"`state` .* lanes 1, 3\."):
            swept(hyperparams=other, state=state, keep_states=False)
        many = {"params": np.ones((7, 2)), "in_axes": (0, None)}
        state = swept(**many, hyperparams=3.0).state
        with pytest.raises(ValueError, match=r"lanes 0, 1, 2, 3, 4, \.\.\.\."):
            swept(**many, hyperparams=4.0, state=state)

    def test_progress_without_tqdm(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)
        message = "`progress` needs tqdm: pip install 'jaxmf_opt[progress]'"
        with pytest.raises(ModuleNotFoundError, match=re.escape(message)):
            swept(progress=True)
        swept()  # needs it not


INSIDE: dict[str, Callable[[], Any]] = {
    "jit": lambda: jax.jit(lambda h: swept(hyperparams=h).value)(H),
    "jit, nothing traced": lambda: jax.jit(lambda: swept().value)(),
    "vmap": lambda: jax.vmap(lambda y: swept(params=y).value)(np.ones((3, 2))),
    "grad": lambda: jax.grad(lambda c: swept(gtol=c).value.sum())(1.0),
}
# Functions that close over something traced.
CLOSED: list[tuple[str, Callable[[Any], dict[str, Any]]]] = [
    ("`gtol`", lambda c: {"gtol": lambda h: c}),
    ("`optimizer`", lambda c: {"optimizer": optax.sgd(c)}),
    ("`optimizer`", lambda c: {"optimizer": lambda h: optax.sgd(c)}),
    ("what `callback` closes over", lambda c: {"callback": traced(lambda _: c > 0)}),
    ("what `loss_fn` closes over", lambda c: {"loss_fn": lambda y, h: c}),
]


@pytest.mark.parametrize("case", INSIDE)
def test_inside_of_a_program(case: str):
    message = (
        "`sweep` is a job of ordinary Python: its arguments must not be traced. Inside "
        "of a compiled program, use `jax.vmap` of `solve`."
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        INSIDE[case]()


@pytest.mark.parametrize(("what", "changes"), CLOSED)
def test_closures_over_something_traced(what: str, changes: Callable[[Any], Any]):
    with pytest.raises(TypeError, match=f"ordinary Python: {what} must not be traced"):
        jax.vmap(lambda c: swept(**changes(c)).value)(np.ones(2))


# Where all lanes go, where nothing else is said.
ROWS = [[x, x] for x in H.tolist()]
ODD: dict[str, tuple[dict[str, Any], Any]] = {
    "leaves of all kinds": (
        {
            "params": [None, np.ones((0, 2)), Y.astype(np.int8)],
            "loss_fn": lambda y, h: square(y[2], h) + jnp.sum(y[1]),
        },
        [[[]] * 4, ROWS],
    ),
    "hyperparameters of all kinds": (
        {
            "hyperparams": [
                *(H.astype(np.int8), H > 1, H.astype(jnp.bfloat16), H * 1j),
                *(np.ones((4, 0)), np.arange(8.0)[::-2], np.broadcast_to(3.0, (4,))),
            ],
            "loss_fn": lambda y, h: square(
                y, sum((x.sum().real + x.sum().imag).astype(float) for x in h)
            ),
        },
        [[[x, x] for x in (10, 11, 13, 14)]],
    ),
    "NumPy's numbers and bools": (
        {
            "batch_size": np.int16(2),
            "max_optimizer_steps": np.int8(2),
            "keep_states": np.False_,
            "gtol": np.float32(0.5),
        },
        [ROWS],
    ),
    # |2 - h| is half of the gradient: it is small in lanes 2 and 3.
    "a tolerance in some lanes": (
        {"gtol": lambda h: jnp.where(h < 2, 0.0, 4.0), "atol": 0},
        [[[0, 0], [1, 1], [1, 2], [1, 2]]],
    ),
    "no steps": (
        {"max_optimizer_steps": 0, "callback": lambda _: 1 / 0},
        [[[1, 2]] * 4],
    ),
    "a constant loss": ({"loss_fn": lambda y, h, more=1.0: more}, [[[1, 2]] * 4]),
}


@pytest.mark.parametrize("case", ODD)
def test_accepted(case: str):
    changes, want = ODD[case]
    got = jax.tree.leaves(swept(**changes).value)
    params = jax.tree.leaves(changes.get("params", Y))
    assert [x.dtype for x in got] == [x.dtype for x in params]
    for x, values in zip(got, want, strict=True):
        np.testing.assert_allclose(x, np.reshape(values, x.shape), rtol=1e-6)
