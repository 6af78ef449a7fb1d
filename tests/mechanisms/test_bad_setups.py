"""Impossible set-ups are refused by name; where they are traced, a lane is NaN."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxmf_opt import mechanisms
from jaxmf_opt.mechanisms import workloads

# Most calls below are wrong, as a type checker would say.
Banded: Any = mechanisms.BandedToeplitz
Inverse: Any = mechanisms.BandedInverseToeplitz
Buffered: Any = mechanisms.BufferedToeplitz
Dense: Any = mechanisms.Dense
of: Any = workloads

ONES, EYE = np.ones(6), np.eye(6)
COUNT = jax.ShapeDtypeStruct((), np.int32)

# What messages say, and calls that raise them: each check once or twice.
WRONG_TYPES: dict[str, Callable[[], Any]] = {
    "`n` must be a whole number, or an integer array of shape (); got 2.5.": (
        lambda: Banded(2.5, 2)
    ),
    "`n` must be a Python integer where no array over steps, as a workload, has": (
        lambda: jax.eval_shape(lambda n: Buffered(n).valid, COUNT)
    ),
    "`n` must be given where no array is of that length.": Dense,
    "`min_sep` must be a whole number": lambda: Dense(6, min_sep=True),
    "`max_error` must be True, False, or a bool array of shape (); got 1.": (
        lambda: Banded(6, 2, max_error=1)
    ),
    "`equal_norm` must be True, False": lambda: Dense(6, equal_norm="no"),
    "`bands` must be given, or `max_bands`.": lambda: Banded(6),
    "`max_bands`, the number of coefficients, must": lambda: Banded(6, np.array(2)),
    "`max_n` must be a Python integer, as it is the size of arrays; got array(6)": (
        lambda: of.linear_cooldown(np.array(6))
    ),
    "`workload_coef` must be an array, got [2.0].": lambda: of.matrix([2.0]),
    "`workload_coef` must hold real floating-point numbers, got dtype complex128": (
        lambda: Buffered(workload_coef=ONES.astype(complex))
    ),
    "`workload_matrix` must hold real": lambda: Dense(workload_matrix=EYE.astype(int)),
    "`decay` must be a real number, got True.": lambda: Banded(6, 2, decay=True),
}
IMPOSSIBLE_VALUES: dict[str, Callable[[], Any]] = {
    "`n` must be at least 1, got -3.": lambda: of.prefix_sum(-3),
    "`n` must be at most the length of the arrays over steps, 6; got 7.": (
        lambda: Inverse(7, 2, workload_coef=ONES)
    ),
    "`min_sep` must be at least 1, got 0.": lambda: Banded(6, 2, min_sep=jnp.array(0)),
    "`max_participations` must be at least": lambda: Dense(6, max_participations=0),
    "`max_participations` must be at most 3, as no more fit into 6 steps with a "
    "separation of 2; got 4. None means as many as fit.": (
        lambda: Buffered(6, max_participations=4, min_sep=2)
    ),
    "`max_participations` times `min_sep` must be `n`, unless `equal_norm` is True and "
    "`bands` at most `min_sep`; got 2 times 2 for 6 steps, 3 bands and equal_norm=": (
        lambda: Dense(6, max_participations=2, min_sep=2, bands=3, equal_norm=True)
    ),
    "`bands` must be at least 1, got 0.": lambda: Inverse(6, 0),
    "`bands` must be at most the number of training": lambda: Dense(6, bands=7),
    "`bands` must be at most the number of coefficients, 2; got 3.": (
        lambda: Inverse(6, np.array(3), max_bands=2)
    ),
    "`num_buffers` must be at least 1, got 0.": lambda: Buffered(6, 0),
    "`learning_rate` must have shape (6,), got (5,).": (
        lambda: Banded(bands=2, workload_coef=ONES, learning_rate=np.ones(5))
    ),
    "must have shape (n, n), got (2, 3).": lambda: Dense(
        workload_matrix=np.ones((2, 3))
    ),
    "`decay` must be more than 0 and at most 1, got 0.": lambda: of.weight_decay(6, 0),
    "`momentum` must be at least 0 and less than 1, got 1.": lambda: of.momentum(6, 1),
    "`fraction` must be at least 0": lambda: of.linear_cooldown(6, fraction=-0.1),
    "`final` must be finite, got inf.": lambda: of.linear_cooldown(6, final=np.inf),
    "`final` must be more than 0, got 0.": lambda: of.exponential_decay(6, final=0),
}


@pytest.mark.parametrize("message", [*WRONG_TYPES, *IMPOSSIBLE_VALUES])
def test_refused_by_name(message: str):
    error = TypeError if message in WRONG_TYPES else ValueError
    with pytest.raises(error, match=re.escape(message)):
        (WRONG_TYPES | IMPOSSIBLE_VALUES)[message]()


OF_TOEPLITZ = "loss per_query_error sensitivity_squared strategy_coef noising_coef"
METHODS = {
    Banded: OF_TOEPLITZ,
    Inverse: OF_TOEPLITZ,
    Buffered: f"{OF_TOEPLITZ} buffers",
    Dense: "loss_and_gradient per_query_error sensitivity_squared strategy_matrix "
    "noising_matrix",
}


@pytest.mark.parametrize("m", [Banded(6, 2), Buffered(6, 1), Dense(6)])
def test_params_are_checked_by_every_method(m: Any):
    wanted = "(6, 6)" if isinstance(m, Dense) else "(2,)"
    message = f"`params` must have shape {wanted}, got (6, 5)."
    for method in METHODS[type(m)].split():
        with pytest.raises(ValueError, match=re.escape(message)):
            getattr(m, method)(np.ones((6, 5)))


# Set-ups in a compiled batch, where values cannot be seen.


class SetUp(NamedTuple):
    """Hyperparameters that can be traced. These are possible, everywhere."""

    n: int = 8
    bands: int = 3
    min_sep: int = 2
    max_participations: int = 4
    equal_norm: bool = False
    decay: float = 0.9


MAX_N = 9
IMPOSSIBLE: list[dict[str, Any]] = [
    *({"n": x} for x in (0, MAX_N + 1, 2**40 + 8)),  # which is no int32
    *({"min_sep": x} for x in (0, 2**32 + 2)),
    *({"max_participations": x} for x in (0, 5)),
    {"min_sep": -2, "max_participations": -4},
    *({"bands": x} for x in (0, MAX_N + 1)),
    {"bands": 4, "n": 3, "min_sep": 3, "max_participations": 1},
    {"bands": 5, "decay": 0.9},  # possible with dense, which has no decay
    *({"decay": x} for x in (0.0, 1.01, np.nan)),
    # Neither once, nor in epochs, nor apart with columns that are orthogonal.
    *({"max_participations": 3, "equal_norm": x} for x in (False, True)),
]
ARRAYS: dict[str, Any] = {
    "workload_coef": np.linspace(1, 2, MAX_N),
    "learning_rate": np.linspace(1, 0.1, MAX_N),
}
GRAM = np.eye(MAX_N) + 0.1 * np.tri(MAX_N) @ np.tri(MAX_N).T
# Mechanisms, what they take from a set-up beside participations, their other
# arguments, and their parameters.
MECHANISMS: list[tuple[Any, str, dict[str, Any], Any]] = [
    (Banded, "n bands decay", ARRAYS | {"max_bands": 4}, [1.0, 0.5, 0.4, 0.3]),
    (Inverse, "bands decay", {"n": 8, "max_bands": 4}, [1.0, -0.5, -0.1, -0.05]),
    (Buffered, "decay", {"n": 8, "num_buffers": 2}, [-3.0, -1.0, -0.5, 0.1]),
    (Dense, "n bands equal_norm", {"workload_matrix": np.tri(MAX_N)}, GRAM),
]


@pytest.mark.parametrize(("family", "names", "others", "params"), MECHANISMS)
def test_lanes(family: Any, names: str, others: dict[str, Any], params: Any):
    """Those of impossible set-ups are NaN; the one beside them is as by itself."""
    fields = {"min_sep", "max_participations", *names.split()}

    def results(s: SetUp) -> dict[str, Any]:
        m = family(**{field: getattr(s, field) for field in fields}, **others)
        x = jnp.array(params)[(slice(m.max_n),) * np.ndim(params)]
        found = {method: getattr(m, method)(x) for method in METHODS[family].split()}
        return {"initial_params": m.initial_params(), **found}

    bad = [SetUp(**x) for x in IMPOSSIBLE if x.keys() <= fields]
    operands = jax.tree.map(lambda *xs: jnp.array(xs), SetUp(), *bad)
    batch = jax.jit(jax.vmap(results))(operands)
    single = jax.jit(lambda: results(SetUp()))()
    for method, want in single.items():
        for lanes, x in zip(*map(jax.tree.leaves, (batch[method], want)), strict=True):
            first = lanes[0][tuple(map(slice, x.shape))]
            atol = 1e-12 * float(np.max(np.abs(x)))
            assert_allclose(first, x, rtol=1e-12, atol=atol, err_msg=method)
            assert np.all(np.isfinite(lanes[0])), method
            assert np.all(np.isnan(lanes[1:])), method


@pytest.mark.parametrize(
    ("fn", "possible", "impossible"),
    [
        (lambda x: of.momentum(5, x), 0.9, [1.0, -0.1, np.nan, np.inf]),
        (lambda x: of.weight_decay(5, x), 1.0, [0.0, -0.5, 1.1, np.nan]),
        (lambda x: of.linear_cooldown(5, x), 5, [0, -1, 6, 2**40]),
        (lambda x: of.linear_cooldown(5, fraction=x), 0.4, [-0.1, 1.1, np.nan]),
        (lambda x: of.exponential_decay(5, x), 1, [0, -(2**31), 6]),
        (lambda x: of.exponential_decay(5, final=x), 2.0, [0.0, -0.1, np.nan]),
        (lambda x: of.matrix(ONES, ONES, decay=x), 1.0, [0.0, 2.0]),
        (lambda x: of.matrix(ONES, decay=x), 1.0, [0.0, 2.0]),
    ],
)
def test_lanes_of_workloads(fn: Any, possible: float, impossible: list[float]):
    lanes = jax.jit(jax.vmap(fn))(jnp.array([possible, *impossible]))
    assert_allclose(lanes[0], fn(possible), rtol=1e-14)
    assert np.all(np.isnan(lanes[1:]))
