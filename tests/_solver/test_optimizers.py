"""When two optimizers are one; and that whatever upstream takes is taken."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxmf_opt import DEFAULT_OPTIMIZER, optimize, solve
from jaxmf_opt._solver.optimizers import optimizer_key
from jaxmf_opt.robust import robust_lbfgs


def schedule(count: jax.typing.ArrayLike) -> jax.Array:
    return 0.1 / (1 + jnp.asarray(count))


MAKERS = {
    "default": lambda: optax.lbfgs(
        memory_size=1, linesearch=optax.scale_by_backtracking_linesearch(128)
    ),
    "memory": lambda: optax.lbfgs(memory_size=2),
    "patience": lambda: optax.lbfgs(
        memory_size=1, linesearch=optax.scale_by_backtracking_linesearch(64)
    ),
    "zoom": lambda: optax.lbfgs(
        memory_size=2, linesearch=optax.scale_by_zoom_linesearch(9)
    ),
    "robust": robust_lbfgs,
    "robust, memory": lambda: robust_lbfgs(memory_size=5),
    "adam": lambda: optax.adam(1e-2),
    "other rate": lambda: optax.adam(1e-3),
    "array rate": lambda: optax.adam(jnp.array(1e-3)),
    "other array rate": lambda: optax.adam(jnp.array(1e-2)),
    "optax schedule": lambda: optax.sgd(optax.linear_schedule(0.0, 1.0, 5)),
    "other schedule": lambda: optax.sgd(optax.linear_schedule(0.0, 1.0, 6)),
    "noise": lambda: optax.add_noise(0.1, 0.5, jax.random.key(1)),
    "other noise": lambda: optax.add_noise(0.1, 0.5, jax.random.key(2)),
    "masked": lambda: optax.masked(optax.sgd(0.1), {"a": True, "b": False}),
    "mask swapped": lambda: optax.masked(optax.sgd(0.1), {"a": False, "b": True}),
}


def test_same_making_same_key():
    for name, make in MAKERS.items():
        key = optimizer_key(make())
        assert key is not None, name
        assert key == optimizer_key(make()), name
        assert hash(key) == hash(optimizer_key(make())), name


def test_other_making_other_key():
    keys = [optimizer_key(make()) for make in MAKERS.values()]
    assert len(set(keys)) == len(keys)


def test_default_is_upstreams():
    optimization = pytest.importorskip("jax_privacy.matrix_factorization.optimization")
    assert optimizer_key(DEFAULT_OPTIMIZER) == optimizer_key(MAKERS["default"]())
    assert optimizer_key(DEFAULT_OPTIMIZER) == optimizer_key(
        optimization.DEFAULT_OPTIMIZER
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(schedule),
        optax.sgd(lambda step: 0.1),
        optax.chain(optax.sgd(0.1), optax.stateless(lambda u, p: u)),
    ],
)
def test_users_functions_cannot_be_told(optimizer: optax.GradientTransformation):
    # They may read globals that are rebound later.
    assert optimizer_key(optimizer) is None


def test_tracers_cannot_be_told():
    keys = []

    @jax.jit
    def trace(rate: jax.Array) -> jax.Array:
        keys.append(optimizer_key(optax.sgd(rate)))
        return rate

    trace(1.0)
    assert keys == [None]


def test_a_name_that_is_copied_from_a_library_is_not_the_library():
    """`functools.wraps` copies `__module__`; what the function computes it does not."""

    @functools.wraps(optax.constant_schedule(0.1))
    def schedule(count: Any) -> float:
        return globals()["rate"]

    globals()["rate"] = 0.1
    assert optimizer_key(optax.sgd(schedule)) is None
    first = optimize(jnp.square, 1.0, optimizer=optax.sgd(schedule))
    globals()["rate"] = 0.0
    second = optimize(jnp.square, 1.0, optimizer=optax.sgd(schedule))
    assert (float(first), float(second)) == (pytest.approx(0.0, abs=1e-9), 1.0)


def test_a_variable_that_is_not_set():
    for optimizer in (
        optax.adam(optax.exponential_decay(0.2, 100, 0.6)),  # has one
        optax.adam(_with_unset_variable()),
    ):
        for wrap in (lambda f: f), jax.jit:
            minimum = wrap(
                lambda c, optimizer=optimizer: optimize(
                    lambda x: (x - c.astype(x.dtype)) ** 2,
                    jnp.zeros(()),
                    optimizer=optimizer,
                )
            )
            assert float(minimum(jnp.ones(()))) == pytest.approx(1.0, abs=1e-3)


def _with_unset_variable() -> Any:
    def schedule(count: Any) -> Any:
        return 0.1 if True else unset

    if False:
        unset = 0.0
    return schedule


OTHERS = optax.sgd(0.1)
# What the makers of optax want, by the names of their arguments.
ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(
        ("learning_rate", "step_size", "eta", "init_value", "value", "weight_decay"),
        0.1,
    ),
    **dict.fromkeys(("max_delta", "max_norm", "threshold", "power"), 1.0),
    **dict.fromkeys(("decay", "decay_rate", "gamma", "peak_value", "end_value"), 0.5),
    **dict.fromkeys(
        ("inner", "opt", "base_optimizer", "optimizer", "inner_optimizer", "tx"), OTHERS
    ),
    **dict.fromkeys(
        ("max_consecutive_errors", "every_k_schedule", "transition_steps", "seed"), 2
    ),
    **dict.fromkeys(("decay_steps", "warmup_steps", "max_linesearch_steps"), 3),
    "max_backtracking_steps": 3,
    "clipping": 0.1,
    "mask": True,
    "key": jax.random.key(0),
    "step_size_fn": optax.constant_schedule(0.1),
    "schedule": optax.constant_schedule(0.1),
    "schedules": [optax.constant_schedule(0.1), optax.constant_schedule(0.2)],
    "boundaries": [2],
    "boundaries_and_scales": {2: 0.5},
    "interpolate_type": "linear",
    "update_fn": lambda u, p: u,
    "f": lambda u, p: u,
}


def exported() -> Iterator[tuple[str, optax.GradientTransformation]]:
    """The transformations and schedules of optax that these arguments can make."""
    for name, make in inspect.getmembers(optax, inspect.isfunction):
        parameters = inspect.signature(make).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty and p.kind < 2]
        if not set(needed) <= set(ARGUMENTS):
            continue
        try:
            made = make(**{n: ARGUMENTS[n] for n in needed})
        except (TypeError, ValueError):
            continue
        if isinstance(made, optax.GradientTransformation):
            yield name, made
        elif callable(made) and _is_schedule(made):
            yield name, optax.sgd(cast(Any, made))


def _is_schedule(fn: Any) -> bool:
    try:
        return jnp.shape(fn(0)) == ()
    except (TypeError, AttributeError):
        return False


@pytest.mark.mixes
@pytest.mark.filterwarnings("ignore")
def test_all_that_optax_exports():
    """What a plain loop can trace, a solve can, and of the same type."""

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum((x - 1) ** 2)

    def plain(optimizer: optax.GradientTransformation) -> Any:
        optimizer = optax.with_extra_args_support(optimizer)
        x = jnp.zeros(2)
        value, grad = jax.value_and_grad(loss)(x)
        extra = {"value": value, "grad": grad, "value_fn": loss}
        return optimizer.update(grad, optimizer.init(x), x, **extra)

    names = []
    for name, optimizer in exported():
        with jax.enable_x64():
            try:
                _, state = jax.eval_shape(functools.partial(plain, optimizer))
            except Exception:  # nor would upstream take it
                continue
        solution = jax.eval_shape(
            functools.partial(solve, loss, optimizer=optimizer, rtol=1e-3), jnp.zeros(2)
        )
        of_solve = solution.state.minimiser.opt_state
        assert jax.tree.structure(of_solve) == jax.tree.structure(state), name
        names.append(name)
    assert {"lbfgs", "adam", "linear_schedule", "cosine_decay_schedule"} <= {*names}
    assert len(names) > 80
