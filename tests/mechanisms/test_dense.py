"""Dense strategies: upstream's numbers, sensitivities by brute force, and batches."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax_privacy.matrix_factorization import dense, optimization, sensitivity
from numpy.testing import assert_allclose, assert_array_equal

import jaxmf_opt
from jaxmf_opt.mechanisms import Dense, workloads

pytestmark = pytest.mark.mixes  # upstream's code

MAX_N = 12
# Not prefix sums: those are the default, and have a test of their own.
WORKLOAD = np.tril(np.random.default_rng(0).uniform(0.5, 2.0, (MAX_N, MAX_N)))


class SetUp(NamedTuple):
    """The arguments of `Dense`."""

    n: int = MAX_N
    bands: int = MAX_N
    min_sep: int = 1
    max_participations: int = 1
    equal_norm: bool = False
    max_error: bool = False

    @property
    def workload(self) -> np.ndarray:
        return WORKLOAD[: self.n, : self.n]


# Only two sizes, as upstream compiles each of its operations for each.
SET_UPS = {
    "once": SetUp(),
    "once, short, equal norm": SetUp(n=7, bands=4, equal_norm=True),
    "epochs, bands": SetUp(bands=6, min_sep=4, max_participations=3),
    "epochs, equal norm": SetUp(min_sep=4, max_participations=3, equal_norm=True),
    "epochs of one step": SetUp(n=7, bands=7, min_sep=1, max_participations=7),
    "apart": SetUp(bands=3, min_sep=4, max_participations=2, equal_norm=True),
    "max, apart": SetUp(7, 2, 3, 2, True, True),
}
of_set_ups = pytest.mark.parametrize("name", SET_UPS)


def made(n: Any, *args: Any, workload: Any) -> Dense:
    kwargs: dict[str, Any] = dict(zip(SetUp._fields[1:], args, strict=True))
    return Dense(n, workload_matrix=workload, **kwargs)


@eqx.filter_jit
def results(m: Dense, params: Any) -> dict[str, jax.Array]:
    """All that a mechanism says of a matrix."""
    loss, gradient = m.loss_and_gradient(params)
    methods = "per_query_error sensitivity_squared strategy_matrix noising_matrix"
    found = {name: getattr(m, name)(params) for name in methods.split()}
    start = m.initial_params()
    return {"loss": loss, "gradient": gradient, "initial_params": start, **found}


def gram(n: int, bands: int | None = None) -> np.ndarray:
    """Of a random lower-triangular strategy, with products of both signs."""
    rng = np.random.default_rng(n)
    off_diagonal = np.triu(np.tril(rng.uniform(-1, 1, (n, n)), -1), 1 - (bands or n))
    strategy = np.diag(rng.uniform(0.5, 1.5, n)) + off_diagonal / n**0.5
    return strategy.T @ strategy


@functools.cache
def single(name: str) -> dict[str, jax.Array]:
    """The results for a random matrix."""
    s = SET_UPS[name]
    return results(made(*s, workload=s.workload), gram(s.n))


def assert_close(got: Any, want: Any, rtol: float, err_msg: str = "") -> None:
    """Relative to the largest element: elements of a gradient may cancel."""
    want = np.asarray(want)
    atol = rtol * np.max(np.abs(want))
    assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=err_msg)


@functools.cache
def upstream(name: str) -> tuple[list[optimization.CallbackArgs], float, int]:
    """A run of upstream: what its callback saw, the error in the end, and a scale.

    With columns of the same norm, upstream makes that norm 1, and we the sensitivity:
    our loss is upstream's times the scale.
    """
    s = SET_UPS[name]
    epochs, scale = s.max_participations, 1
    if s.equal_norm and s.bands <= s.min_sep:
        epochs, scale = 1, s.max_participations
    steps = []

    def callback(args: optimization.CallbackArgs) -> bool:
        steps.append(args)
        return dense.pg_tol_termination_fn(args)

    workload = jnp.array(s.workload)
    strategy = dense.optimize(
        s.n,
        epochs=epochs,
        bands=s.bands,
        equal_norm=s.equal_norm,
        A=workload,
        # The largest error is not smooth, and upstream's optimizer not made for that.
        max_optimizer_steps=2 if s.max_error else 1000,
        reduction_fn=jnp.max if s.max_error else jnp.mean,
        callback=callback,
    )
    errors = dense.per_query_error(strategy_matrix=strategy, workload_matrix=workload)
    return steps, float(jnp.mean(errors)), scale


@of_set_ups
def test_values_are_upstreams(name: str):
    s, (steps, _, scale) = SET_UPS[name], upstream(name)
    # At upstream's starting point, independent noise, and after a step.
    starts = [jnp.eye(s.n) * scale / s.max_participations, steps[0].params]
    for params, step in zip(starts, steps, strict=False):
        got = results(made(*s, workload=s.workload), params / scale)
        assert_allclose(got["loss"], scale * step.loss, rtol=1e-10)
        assert_close(got["gradient"], scale**2 * np.asarray(step.grad), 1e-10)
    # At random.
    got, workload = single(name), jnp.array(s.workload)
    strategy = dense.strategy_from_X(jnp.array(gram(s.n)))
    errors = dense.per_query_error(strategy_matrix=strategy, workload_matrix=workload)
    assert_close(got["strategy_matrix"], strategy, 1e-12)
    assert_close(got["noising_matrix"] @ strategy, np.eye(s.n), 1e-12)
    for matrix in (got["strategy_matrix"], got["noising_matrix"]):
        assert_array_equal(matrix, np.tril(matrix))
    assert_allclose(got["per_query_error"], errors, rtol=1e-10)
    reduce = np.max if s.max_error else np.mean
    assert_allclose(got["loss"], reduce(errors), rtol=1e-10)


class TestValues:
    def test_gradient_of_errors_that_are_as_large(self):
        s = SetUp(n=3, bands=3, min_sep=1, max_participations=3, max_error=True)
        workload = np.array([[5.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, 3.0, 4.0]])
        loss, gradient = made(*s, workload=workload).loss_and_gradient(jnp.eye(3))
        assert_allclose(loss, 25, rtol=1e-14)
        # A third of each: minus the mean of the diagonal of A^T A, all else is fixed.
        want = -np.diag([34.0, 25.0, 16.0]) / 3 + 25 / 3 * np.eye(3)
        assert_allclose(gradient, want, rtol=1e-13)

    def test_prefix_sums_are_the_default(self):
        prefix_sums = workloads.matrix(workloads.prefix_sum(6))
        want, _ = Dense(workload_matrix=prefix_sums).loss_and_gradient(gram(6))
        assert_allclose(Dense(6).loss_and_gradient(gram(6))[0], want, rtol=1e-14)

    def test_not_positive_definite(self):
        """All is NaN, but for the zeros above a diagonal."""
        params = gram(6)
        params[5, 5] = 0.0
        for name, value in results(Dense(6), params).items():
            if name not in ("sensitivity_squared", "initial_params"):
                is_matrix = name in ("strategy_matrix", "noising_matrix")
                counts = value[np.tril_indices(6)] if is_matrix else value
                assert np.all(np.isnan(counts)), name


def patterns(s: SetUp) -> Iterator[tuple[int, ...]]:
    """The steps in which one example can take part."""
    if not s.equal_norm and s.max_participations > 1:
        yield from (tuple(range(i, s.n, s.min_sep)) for i in range(s.min_sep))
        return
    for count in range(1, s.max_participations + 1):
        for pattern in itertools.combinations(range(s.n), count):
            if all(b - a >= s.min_sep for a, b in itertools.pairwise(pattern)):
                yield pattern


@pytest.mark.parametrize(
    ("s", "bands"),
    [
        pytest.param(SetUp(8, 8), 8, id="once"),
        pytest.param(SetUp(8, 8, 4, 2), 8, id="epochs"),
        pytest.param(SetUp(8, 8, 1, 8), 8, id="epochs of one step"),
        pytest.param(SetUp(8, 2, 2, 4, True), 2, id="apart, orthogonal"),
        pytest.param(SetUp(8, 3, 3, 2, True), 3, id="apart, orthogonal, rarely"),
        pytest.param(SetUp(8, 2, 2, 4, True), 8, id="apart, not orthogonal"),
        pytest.param(SetUp(8, 2, 2, 3, True), 3, id="apart, one band too many"),
    ],
)
def test_sensitivity(s: SetUp, bands: int):
    """By upstream, and by brute force, of a random strategy with some bands."""
    x = gram(s.n, bands)
    got = float(made(*s, workload=None).sensitivity_squared(jnp.array(x)))
    if s.equal_norm or s.max_participations == 1:
        theirs = sensitivity.get_min_sep_sensitivity_upper_bound_for_X
        if bands <= s.min_sep:
            theirs = sensitivity.get_sensitivity_banded_for_X
        want = theirs(jnp.array(x), s.min_sep, s.max_participations)
    else:
        want = sensitivity.fixed_epoch_sensitivity_for_X(
            jnp.array(x), s.max_participations
        )
    assert_allclose(got, want**2, rtol=1e-12)
    largest = max(np.sum(np.abs(x[np.ix_(p, p)])) for p in patterns(s))
    assert got >= largest * (1 - 1e-12)
    if not s.equal_norm or bands <= s.min_sep:
        assert_allclose(got, largest, rtol=1e-12)


class TestInitialParams:
    @of_set_ups
    def test_square_root_of_the_first_column(self, name: str):
        s = SET_UPS[name]
        first = scipy.linalg.toeplitz(s.workload[:, 0], np.zeros(s.n))
        period = s.n if s.max_participations == 1 else s.min_sep
        root = np.tril(scipy.linalg.sqrtm(first))
        strategy = np.triu(root, 1 - min(s.bands, period))
        strategy /= np.linalg.norm(strategy, axis=0)
        want = strategy.T @ strategy / s.max_participations
        got = np.asarray(single(name)["initial_params"])
        assert_allclose(got, want, rtol=1e-9, atol=1e-13)
        # What the gradient leaves as it is has to be right to the bit.
        assert_array_equal(np.diag(got), 1 / s.max_participations)
        fixed = np.asarray(single(name)["gradient"]) == 0
        np.fill_diagonal(fixed, False)
        assert np.all(got[fixed] == 0)

    def test_no_root(self):
        workload = np.tri(6)
        for workload[0, 0] in (0.0, -1.0):
            m = Dense(min_sep=2, max_participations=3, workload_matrix=workload)
            assert_allclose(m.initial_params(), np.eye(6) / 3, rtol=1e-15)


class TestBatches:
    """Where everything is an operand."""

    def test_optima(self):
        """Steps keep the sensitivity, and the errors are as low as upstream's."""

        @jax.jit
        @jax.vmap
        def best(set_up: tuple[Any, ...]) -> tuple[jax.Array, ...]:
            m = made(*set_up, workload=WORKLOAD)
            start = m.initial_params()
            found = jaxmf_opt.optimize(m.loss_and_gradient, start, grad=True, gtol=1e-9)
            loss, _ = m.loss_and_gradient(found)
            return loss, *(m.sensitivity_squared(x) for x in (start, found))

        losses, before, after = best(
            tuple(jnp.array(x) for x in zip(*SET_UPS.values(), strict=True))
        )
        assert_allclose(before, 1, rtol=1e-12)
        for i, (name, s) in enumerate(SET_UPS.items()):
            # Near the optimum, and where a loss is not smooth, steps of L-BFGS can be
            # thousands of gradients that nearly cancel, with rounding errors as large.
            # (How large depends on the release of XLA.)
            assert_allclose(after[i], 1, rtol=1e-8)
            if not s.max_error:
                _, error, scale = upstream(name)
                assert losses[i] <= scale * error * (1 + 1e-9)
                # Both are the minimum of a convex problem.
                assert_allclose(losses[i], scale * error, rtol=1e-3)

    @pytest.mark.parametrize("beyond", [5.0, np.nan])
    def test_equal_single_set_ups_whatever_is_beyond_n(self, beyond: float):
        set_ups = list(SET_UPS.values())
        params, workload = np.full((2, len(set_ups), MAX_N, MAX_N), beyond)
        for i, s in enumerate(set_ups):
            params[i, : s.n, : s.n], workload[i, : s.n, : s.n] = gram(s.n), s.workload
        columns = tuple(jnp.array(x) for x in zip(*set_ups, strict=True))
        batch = jax.jit(
            jax.vmap(lambda s, workload, x: results(made(*s, workload=workload), x))
        )(columns, workload, params)
        for result, values in batch.items():
            for (name, s), lane in zip(SET_UPS.items(), np.array(values), strict=True):
                inside = lane[tuple(slice(s.n) for _ in lane.shape)]
                assert_close(inside, single(name)[result], 1e-11, f"{result}, {name}")
                # Matrices stay diagonal, and so invertible.
                if result not in ("gradient", "per_query_error") and lane.ndim:
                    assert np.all(np.diag(lane)[s.n :] > 0)
                    np.fill_diagonal(lane, 0)
                assert not lane.ndim or np.all(lane[s.n :] == 0), result


def test_published_optimum():
    """Of three prefix sums: https://arxiv.org/abs/2202.08312, lemma 3.4."""
    m = Dense(3)
    best = jaxmf_opt.optimize(m.loss_and_gradient, m.initial_params(), grad=True)
    assert_allclose(m.sensitivity_squared(best), 1, rtol=1e-12)
    total = 3 * m.loss_and_gradient(best)[0]
    assert_allclose(total, 4.607861648439669, rtol=1e-10)
