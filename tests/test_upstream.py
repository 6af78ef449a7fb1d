"""The numbers of upstream: jax-privacy's `optimize` and ours, run side by side.

Without tolerances a step of ours computes what a step of upstream computes, in the same
order, so with the default optimizer every value that a callback sees is compared to the
bit. Only a zoom line search gets a tolerance.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from jax_privacy.matrix_factorization import (
    buffered_toeplitz,
    dense,
    optimization,
    toeplitz,
)
from jaxtyping import Array, PyTree

import jaxmf_opt

pytestmark = pytest.mark.mixes  # upstream's code

UPSTREAM = optimization.optimize

# XLA makes the same fusions of programs that compute the same, up to jaxlib 0.11.
SAME_BITS = jaxlib.version.__version_info__ < (0, 12)


class Problem(NamedTuple):
    """The arguments of one call of `optimize`."""

    loss: Callable[..., Any]
    params: PyTree
    options: dict[str, Any]


class Step(NamedTuple):
    """What a callback sees, copied to NumPy."""

    step: int
    loss: np.ndarray
    grad: PyTree
    params: PyTree
    state: PyTree


class Run(NamedTuple):
    """All that can be seen of one call of `optimize`."""

    steps: list[Step]
    result: PyTree


class Comparison(NamedTuple):
    """The runs of upstream and ours, and ours without a callback: one compiled loop."""

    theirs: Run
    ours: Run
    loop: PyTree


class _Caught(Exception):  # noqa: N818 (no error: it carries a problem out of a call)
    def __init__(self, problem: Problem):
        self.problem = problem


def handed_over(strategy: Callable[[], object]) -> Problem:
    """What a strategy function of jax-privacy asks its `optimize` to do."""

    def catch(loss_fn: Callable[..., Any], params: PyTree, **options: Any) -> None:
        raise _Caught(Problem(loss_fn, params, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimization, "optimize", catch)
        with pytest.raises(_Caught) as caught:
            strategy()
    return caught.value.problem


def follow(optimize: Callable[..., PyTree], problem: Problem) -> Run:
    """Runs a problem and writes down every step."""
    steps: list[Step] = []
    options = dict(problem.options)
    verdict = options.pop("callback", lambda _: None)

    def callback(info: Any) -> Any:
        # As arrays of NumPy, since a buffer of a step might be reused for the next one.
        copied = jax.tree.map(np.array, (info.loss, info.grad, info.params, info.state))
        steps.append(Step(info.step, *copied))
        return verdict(info)

    result = optimize(problem.loss, problem.params, callback=callback, **options)
    return Run(steps, result)


def compare(problem: Problem) -> Comparison:
    theirs = follow(UPSTREAM, problem)
    ours = follow(jaxmf_opt.optimize, problem)
    # A loop has no callback that could stop it, so its limit is where upstream stopped.
    options = {k: v for k, v in problem.options.items() if k != "callback"}
    options["max_optimizer_steps"] = len(theirs.steps)
    loop = jaxmf_opt.optimize(problem.loss, problem.params, **options)
    return Comparison(theirs, ours, loop)


def assert_identical(ours: PyTree, theirs: PyTree) -> None:
    """Same structure, shapes and dtypes, and the same values to the bit.

    Or but for the last bits, and what steps make of them, where XLA rounds differently.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    if not SAME_BITS:
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert np.asarray(x).dtype == np.asarray(y).dtype
            assert np.shape(x) == np.shape(y)
        return assert_close(ours, theirs, 1e-6)
    theirs_by_path = jax.tree_util.tree_leaves_with_path(theirs)
    for x, (path, y) in zip(jax.tree.leaves(ours), theirs_by_path, strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(x, y, strict=True, err_msg=where)


def assert_close(ours: PyTree, theirs: PyTree, rtol: float) -> None:
    """Leaf by leaf, relative to the largest element of the leaf."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        atol = rtol * np.abs(y).max(initial=0.0)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


# --- The problems -------------------------------------------------------------------


def last(values: Array) -> Array:
    return values[-1]


def toeplitz_problem(
    n: int, bands: int, reduction_fn: Callable[[Array], Array]
) -> Problem:
    loss = functools.partial(toeplitz.loss, n=n, reduction_fn=reduction_fn)
    start = toeplitz.optimal_max_error_strategy_coefs(bands)
    return Problem(loss, start, {"max_optimizer_steps": 40})


def inverse_toeplitz_problem(
    n: int, bands: int, reduction_fn: Callable[[Array], Array]
) -> Problem:
    """The parameters are the coefficients of the noising matrix."""

    def loss(coef: Array) -> Array:
        error = toeplitz.per_query_error(noising_coef=coef, n=n, skip_checks=True)
        strategy = toeplitz.inverse_coef(coef, n)
        return reduction_fn(error) * toeplitz.sensitivity_squared(strategy)

    start = toeplitz.optimal_max_error_noising_coefs(bands)
    return Problem(loss, start, {"max_optimizer_steps": 40})


def dense_problem(epochs: int) -> Problem:
    """A loss with its own gradient, a projected one, and upstream's own callback."""
    with jax.enable_x64():
        problem = handed_over(functools.partial(dense.optimize, 16, epochs=epochs))
    assert problem.options["grad"]
    assert problem.options["callback"] is dense.pg_tol_termination_fn
    return problem


def mixed_tree() -> PyTree:
    with jax.enable_x64():
        return {
            "single": jnp.arange(3, dtype=jnp.float32),
            "nested": (
                jnp.full((2, 3), 0.1, jnp.float64),
                None,
                {"brain": jnp.array([2.5, -1.0], jnp.bfloat16)},
            ),
            "half": [jnp.linspace(0, 1, 4).astype(jnp.float16), jnp.float64(0.3)],
            "whole": jnp.array([4, -7], jnp.int32),
        }


def coupled_quartic(tree: PyTree) -> Array:
    """Convex, and no leaf can be minimised without the others."""
    leaves = jax.tree.leaves(tree)
    own = [
        jnp.sum((i + 1) * (x - 0.7 * i) ** 2 + 0.1 * (x - 1) ** 4)
        for i, x in enumerate(leaves)
    ]
    total = jnp.stack([jnp.sum(x) for x in leaves]).sum()
    return jnp.stack(own).sum() + 0.3 * total**2


def tree_problem() -> Problem:
    return Problem(coupled_quartic, mixed_tree(), {"max_optimizer_steps": 30})


EXACT: dict[str, Callable[[], Problem]] = {
    "inverse-last-128": lambda: inverse_toeplitz_problem(128, 16, last),
    "dense-2-epochs": lambda: dense_problem(2),
    "mixed-tree": tree_problem,
}


@functools.cache
def exact(name: str) -> Comparison:
    """One pair of runs for all the tests that look at it."""
    return compare(EXACT[name]())


# --- The interface ------------------------------------------------------------------


def test_takes_the_arguments_of_upstream():
    # Upstream's decorator hides the signature of what it wraps.
    wrapped = inspect.getclosurevars(UPSTREAM).nonlocals["fn"]
    theirs = inspect.signature(wrapped).parameters
    ours = inspect.signature(jaxmf_opt.optimize).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
    for name in ("loss_fn", "params", "max_optimizer_steps", "grad"):
        assert ours[name].default == theirs[name].default, name


def test_callback_args_have_the_fields_of_upstream():
    theirs = [f.name for f in dataclasses.fields(optimization.CallbackArgs)]
    assert [f.name for f in dataclasses.fields(jaxmf_opt.CallbackArgs)] == theirs


# --- The sequence of steps ----------------------------------------------------------


@pytest.mark.bits
@pytest.mark.parametrize("name", EXACT)
def test_every_step_and_the_result_are_those_of_upstream(name: str):
    """To the bit: loss, gradient, parameters and optimizer state of each step.

    And the result: with a callback, and without one, where the solve is one program.
    """
    theirs, ours, loop = exact(name)
    assert [s.step for s in ours.steps] == [s.step for s in theirs.steps]
    for of_ours, of_theirs in zip(ours.steps, theirs.steps, strict=True):
        for field in ("loss", "grad", "params", "state"):
            assert_identical(getattr(of_ours, field), getattr(of_theirs, field))
    for result in (ours.result, loop):
        assert_identical(result, theirs.result)
        types, theirs_types = (
            jax.tree.map(jax.typeof, x) for x in (result, theirs.result)
        )
        assert types == theirs_types
    # Else equal steps would say little: the run gets somewhere.
    steps = ours.steps
    assert all(type(s.step) is int for s in steps)
    assert steps[-1].loss < steps[0].loss
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(steps[-1].params))


@pytest.mark.bits
def test_the_default_callback_of_upstream_stops_both_at_the_same_step():
    theirs, ours, _ = exact("dense-2-epochs")
    assert len(ours.steps) == len(theirs.steps)
    # It is the callback that stopped, at the first gradient below its tolerance.
    largest = [np.abs(s.grad).max() for s in ours.steps]
    assert largest[-1] <= 1e-3 < min(largest[:-1])
    assert_identical(ours.result, ours.steps[-1].params)


# --- Callbacks ----------------------------------------------------------------------


def bowl(x: Array) -> Array:
    return jnp.sum(jnp.cosh(x - 1.5) + 0.2 * x**4)


BOWL_START = np.array([0.0, 4.0, -2.0], np.float32)


def test_a_truthy_verdict_ends_the_run_with_that_step():
    """And a falsy one does not."""
    options = {"callback": lambda info: "stop" if info.step == 4 else ""}
    problem = Problem(bowl, jnp.asarray(BOWL_START), options)
    theirs, ours = (follow(f, problem) for f in (UPSTREAM, jaxmf_opt.optimize))
    assert len(ours.steps) == len(theirs.steps) == 5
    assert_identical(ours.result, theirs.result)
    kept = jnp.asarray(ours.steps[-1].params.astype(np.float32))
    assert_identical(ours.result, kept)


def test_no_steps_at_all():
    """Upstream hands the parameters back in their dtypes, and calls nothing."""
    problem = Problem(coupled_quartic, mixed_tree(), {"max_optimizer_steps": 0})
    theirs, ours, loop = compare(problem)
    assert ours.steps == theirs.steps == []
    assert_identical(ours.result, theirs.result)
    assert_identical(loop, theirs.result)
    assert_identical(loop, mixed_tree())


# --- A zoom line search with much memory --------------------------------------------


def test_zoom_steps_are_those_of_upstream():
    """By the optimizer that upstream chooses for BLTs.

    It stores value and gradient at the point that it accepts, and ours takes them from
    there, while upstream computes them anew: the last bits may differ.
    """
    blt = handed_over(lambda: buffered_toeplitz.optimize(n=9))
    problem = toeplitz_problem(16, 4, jnp.mean)
    problem.options.update(optimizer=blt.options["optimizer"], max_optimizer_steps=20)
    theirs, ours, loop = compare(problem)
    for of_ours, of_theirs in zip(ours.steps, theirs.steps, strict=True):
        for field in ("loss", "grad", "params"):
            got, want = getattr(of_ours, field), getattr(of_theirs, field)
            assert_close(got, want, 1e-9)
        forms = [
            jax.tree.map(lambda x: (x.shape, x.dtype), s.state)
            for s in (of_ours, of_theirs)
        ]
        assert forms[0] == forms[1]
    for result in (ours.result, loop):
        assert jax.typeof(result) == jax.typeof(theirs.result)
        assert_close(result, theirs.result, 1e-9)


# --- The strategy functions of jax-privacy, on our `optimize` -----------------------


@pytest.mark.bits
def test_a_strategy_is_that_of_upstream(monkeypatch: pytest.MonkeyPatch):
    calls = 0

    def counting(*args: Any, **kwargs: Any) -> PyTree:
        nonlocal calls
        calls += 1
        return jaxmf_opt.optimize(*args, **kwargs)

    with jax.enable_x64():  # as upstream's dense code needs it
        theirs = dense.optimize(16, epochs=2)
        monkeypatch.setattr(optimization, "optimize", counting)
        ours = dense.optimize(16, epochs=2)
    assert calls == 1
    assert_identical(ours, theirs)


@pytest.mark.bits
@pytest.mark.parametrize("kind", ["host", "traced"])
def test_dense_inside_jit_with_a_callback(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Upstream's own callback, called from the program, and the traced one like it."""
    theirs, _, _ = exact("dense-2-epochs")
    steps = []

    def own(info: Any) -> bool:
        steps.append(info.step)
        return dense.pg_tol_termination_fn(info)

    callback: Any = own if kind == "host" else jaxmf_opt.callbacks.small_gradient(1e-3)
    monkeypatch.setattr(optimization, "optimize", jaxmf_opt.optimize)
    with jax.enable_x64():
        got = jax.jit(lambda: dense.optimize(16, epochs=2, callback=callback))()
        want = dense.strategy_from_X(theirs.result)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    if kind == "host":
        assert steps == list(range(len(theirs.steps)))
