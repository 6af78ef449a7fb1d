"""Dense strategies: upstream's numbers, sensitivities by brute force, and batches."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax_privacy.matrix_factorization import dense, optimization, sensitivity

import jaxmf_opt
from jaxmf_opt.mechanisms import Dense, workloads

pytestmark = pytest.mark.mixes  # upstream's code

MAX_N = 12


@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with jax.enable_x64():
        yield


class SetUp(NamedTuple):
    """The arguments of `Dense`."""

    n: int = MAX_N
    bands: int = MAX_N
    min_sep: int = 1
    max_participations: int = 1
    equal_norm: bool = False
    max_error: bool = False

    @property
    def in_order(self) -> bool:
        """Whether examples take part in epochs of a fixed order."""
        return self.min_sep * self.max_participations == self.n

    @property
    def workload(self) -> np.ndarray:
        """Not prefix sums: those are the default, and have a test of their own."""
        return WORKLOAD[: self.n, : self.n]


_RNG = np.random.default_rng(0)
WORKLOAD = np.tril(_RNG.uniform(0.5, 2.0, (MAX_N, MAX_N)))

# Only two sizes, as upstream compiles each of its operations for each.
SET_UPS = {
    "once": SetUp(),
    "once, equal norm": SetUp(bands=5, equal_norm=True),
    "once, short": SetUp(n=7, bands=4),
    "epochs": SetUp(min_sep=4, max_participations=3),
    "epochs, bands": SetUp(bands=6, min_sep=4, max_participations=3),
    "epochs, equal norm": SetUp(min_sep=4, max_participations=3, equal_norm=True),
    "epochs of one step": SetUp(n=7, bands=7, min_sep=1, max_participations=7),
    "apart": SetUp(bands=4, min_sep=4, max_participations=3, equal_norm=True),
    "apart, rarely": SetUp(bands=3, min_sep=4, max_participations=2, equal_norm=True),
    "max, epochs": SetUp(bands=6, min_sep=4, max_participations=3, max_error=True),
    "max, apart": SetUp(7, 2, 3, 2, True, True),
}
of_set_ups = pytest.mark.parametrize("name", SET_UPS)


def made(n: Any, *args: Any, workload: Any) -> Dense:
    names = SetUp._fields[1:]
    kwargs: dict[str, Any] = dict(zip(names, args, strict=True))
    return Dense(n, workload_matrix=workload, **kwargs)


def results(m: Dense, params: jax.Array) -> dict[str, jax.Array]:
    """All that a mechanism says of a matrix."""
    loss, gradient = m.loss_and_gradient(params)
    return {
        "loss": loss,
        "gradient": gradient,
        "per_query_error": m.per_query_error(params),
        "sensitivity_squared": m.sensitivity_squared(params),
        "strategy_matrix": m.strategy_matrix(params),
        "noising_matrix": m.noising_matrix(params),
        "initial_params": m.initial_params(),
    }


_single = eqx.filter_jit(results)


@jax.jit
@jax.vmap
def lanes(
    set_up: tuple[Any, ...], params: jax.Array, workload: jax.Array
) -> dict[str, jax.Array]:
    """One program for all set-ups: everything is an operand."""
    return results(made(*set_up, workload=workload), params)


def arrays_of(set_ups: list[SetUp]) -> tuple[jax.Array, ...]:
    return tuple(map(jnp.array, zip(*set_ups, strict=True)))


def gram(n: int, seed: int = 0, bands: int | None = None) -> np.ndarray:
    """Of a random lower-triangular strategy, with products of both signs."""
    rng = np.random.default_rng([n, seed])
    off_diagonal = np.tril(rng.uniform(-1, 1, (n, n)), -1)
    if bands is not None:
        off_diagonal = np.triu(off_diagonal, 1 - bands)
    strategy = np.diag(rng.uniform(0.5, 1.5, n)) + off_diagonal / n**0.5
    return strategy.T @ strategy


@functools.cache
def single(name: str) -> dict[str, jax.Array]:
    """The results for a random matrix."""
    s = SET_UPS[name]
    return _single(made(*s, workload=s.workload), jnp.array(gram(s.n)))


def assert_close(got: Any, want: Any, rtol: float) -> None:
    """Relative to the largest element: elements of a gradient may cancel."""
    want = np.asarray(want)
    atol = rtol * np.max(np.abs(want))
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


class Upstream(NamedTuple):
    """A run of upstream: what its callback saw, and the error in the end.

    Attributes:
      scale: What our loss is, as a multiple of upstream's. With columns of the same
        norm, upstream makes that norm 1, and we the sensitivity.
    """

    steps: list[optimization.CallbackArgs]
    error: jax.Array
    scale: int


@functools.cache
def upstream(name: str) -> Upstream:
    s = SET_UPS[name]
    epochs, scale = (s.max_participations, 1) if s.in_order else (1, 1)
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
    return Upstream(steps, jnp.mean(errors), scale)


class TestAgainstUpstream:
    @of_set_ups
    def test_loss_and_gradient(self, name: str):
        """At upstream's starting point, independent noise, and after a step."""
        s, (steps, _, scale) = SET_UPS[name], upstream(name)
        m = made(*s, workload=s.workload)
        starts = [jnp.eye(s.n) * scale / s.max_participations, steps[0].params]
        for params, step in zip(starts, steps, strict=False):
            got = _single(m, params / scale)
            np.testing.assert_allclose(got["loss"], scale * step.loss, rtol=1e-10)
            assert_close(got["gradient"], scale**2 * np.asarray(step.grad), 1e-10)

    @of_set_ups
    def test_strategy_and_errors(self, name: str):
        s, got = SET_UPS[name], single(name)
        strategy = dense.strategy_from_X(jnp.array(gram(s.n)))
        errors = dense.per_query_error(
            strategy_matrix=strategy, workload_matrix=jnp.array(s.workload)
        )
        assert_close(got["strategy_matrix"], strategy, 1e-12)
        np.testing.assert_allclose(got["per_query_error"], errors, rtol=1e-10)
        reduce = np.max if s.max_error else np.mean
        np.testing.assert_allclose(got["loss"], reduce(errors), rtol=1e-10)


def plain(s: SetUp, params: jax.Array) -> jax.Array:
    """The definition of the loss."""
    a = jnp.array(s.workload)
    errors = jnp.diag(a @ jnp.linalg.inv(params) @ a.T)
    return jnp.max(errors) if s.max_error else jnp.mean(errors)


def projected(s: SetUp, gradient: np.ndarray) -> np.ndarray:
    """Orthogonally, onto the changes that a set-up allows."""
    once = s.max_participations == 1
    result = np.zeros_like(gradient)
    for i, j in itertools.product(range(s.n), repeat=2):
        together = not once and (i - j) % s.min_sep == 0
        if i == j and not once and not s.equal_norm:
            # The squared norms of these columns keep their sum.
            same = np.arange(i % s.min_sep, s.n, s.min_sep)
            result[i, i] = gradient[i, i] - np.mean(gradient[same, same])
        elif i != j and not together and abs(i - j) < s.bands:
            result[i, j] = gradient[i, j]
    return result


class TestAgainstDefinitions:
    @of_set_ups
    def test_gradient(self, name: str):
        s = SET_UPS[name]
        gradient = jax.grad(plain, argnums=1)(s, jnp.array(gram(s.n)))
        want = projected(s, np.asarray(gradient))
        assert_close(single(name)["gradient"], want, 1e-10)

    def test_gradient_of_errors_that_are_as_large(self):
        s = SetUp(n=3, bands=3, min_sep=1, max_participations=3, max_error=True)
        workload = np.array([[5.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, 3.0, 4.0]])
        loss, gradient = made(*s, workload=workload).loss_and_gradient(jnp.eye(3))
        np.testing.assert_allclose(loss, 25, rtol=1e-14)
        # A third of each: minus the mean of the diagonal of A^T A, all else is fixed.
        want = -np.diag([34.0, 25.0, 16.0]) / 3 + 25 / 3 * np.eye(3)
        np.testing.assert_allclose(gradient, want, rtol=1e-13)

    @of_set_ups
    def test_matrices(self, name: str):
        s, got = SET_UPS[name], single(name)
        strategy, noising = (
            np.asarray(got[k]) for k in ("strategy_matrix", "noising_matrix")
        )
        assert_close(strategy.T @ strategy, gram(s.n), 1e-13)
        np.testing.assert_allclose(strategy @ noising, np.eye(s.n), atol=1e-12)
        for matrix in (strategy, noising):
            np.testing.assert_array_equal(matrix, np.tril(matrix))
            assert np.all(np.diag(matrix) > 0)

    def test_prefix_sums_by_default(self):
        params = jnp.array(gram(6))
        got, want = (
            _single(Dense(6), params),
            _single(
                Dense(workload_matrix=workloads.matrix(workloads.prefix_sum(6))), params
            ),
        )
        for name, value in got.items():
            np.testing.assert_allclose(value, want[name], rtol=1e-14)

    def test_participations_by_default(self):
        """None means as many as fit."""
        for n, want in ((9, 3), (8, 2)):
            m = Dense(n, bands=2, equal_norm=True, min_sep=4, max_participations=None)
            np.testing.assert_allclose(m.sensitivity_squared(jnp.eye(n)), want)

    def test_not_positive_definite(self):
        params = gram(6)
        params[5, 5] = 0.0
        got = _single(Dense(6), jnp.array(params))
        for name in ("loss", "gradient", "per_query_error"):
            assert np.all(np.isnan(got[name])), name
        lower = np.tril_indices(6)
        for name in ("strategy_matrix", "noising_matrix"):
            assert np.all(np.isnan(np.asarray(got[name])[lower])), name

    def test_float32(self):
        params = gram(6)
        want = _single(Dense(6), jnp.array(params))
        with jax.enable_x64(False):
            got = _single(Dense(6), jnp.array(params, jnp.float32))
            for name, value in got.items():
                assert value.dtype == jnp.float32, name
                assert_close(value, want[name], 1e-4)


def patterns(s: SetUp) -> Iterator[tuple[int, ...]]:
    """The steps in which one example can take part."""
    if not s.equal_norm and s.max_participations > 1:
        yield from (tuple(range(i, s.n, s.min_sep)) for i in range(s.min_sep))
        return
    for count in range(1, s.max_participations + 1):
        for pattern in itertools.combinations(range(s.n), count):
            if all(b - a >= s.min_sep for a, b in itertools.pairwise(pattern)):
                yield pattern


def largest(
    s: SetUp, x: np.ndarray, of_pattern: Callable[[np.ndarray], float]
) -> float:
    return max(of_pattern(x[np.ix_(p, p)]) for p in patterns(s))


def with_signs(x: np.ndarray) -> float:
    """The squared norm of the sum of columns, with the worst signs."""
    signs = itertools.product((-1, 1), repeat=len(x))
    return max(float(np.array(u) @ x @ np.array(u)) for u in signs)


def without_signs(x: np.ndarray) -> float:
    return float(np.sum(np.abs(x)))


def once_of(x: jax.Array, _: SetUp) -> float:
    return float(sensitivity.single_participation_sensitivity(dense.strategy_from_X(x)))


def in_order_of(x: jax.Array, s: SetUp) -> float:
    return sensitivity.fixed_epoch_sensitivity_for_X(x, s.max_participations)


def banded_of(x: jax.Array, s: SetUp) -> float:
    return sensitivity.get_sensitivity_banded_for_X(x, s.min_sep, s.max_participations)


def bound_of(x: jax.Array, s: SetUp) -> float:
    return sensitivity.get_min_sep_sensitivity_upper_bound_for_X(
        x, s.min_sep, s.max_participations
    )


class Sensitivity(NamedTuple):
    """A set-up, its sensitivity in upstream, and whether that is exact.

    Attributes:
      bands: Those of the random strategy; all by default.
    """

    set_up: SetUp
    upstream: Callable[[jax.Array, SetUp], float]
    is_exact: bool = True
    bands: int | None = None


SENSITIVITIES = {
    "once": Sensitivity(SetUp(8, 8), once_of),
    "once, equal norm": Sensitivity(SetUp(8, 8, 1, 1, True), bound_of),
    "epochs": Sensitivity(SetUp(8, 8, 4, 2), in_order_of),
    "more epochs": Sensitivity(SetUp(8, 8, 2, 4), in_order_of),
    "epochs of one step": Sensitivity(SetUp(8, 8, 1, 8), in_order_of),
    "apart, orthogonal": Sensitivity(SetUp(8, 2, 2, 4, True), banded_of, bands=2),
    "apart, orthogonal, rarely": Sensitivity(
        SetUp(8, 3, 3, 2, True), banded_of, bands=3
    ),
    "apart, fewer bands": Sensitivity(SetUp(8, 2, 3, 3, True), banded_of, bands=2),
    "apart, not orthogonal": Sensitivity(SetUp(8, 2, 2, 4, True), bound_of, False),
    "apart, not orthogonal, rarely": Sensitivity(
        SetUp(8, 3, 3, 2, True), bound_of, False
    ),
    "apart, one band too many": Sensitivity(
        SetUp(8, 2, 2, 3, True), bound_of, False, bands=3
    ),
}


class TestSensitivity:
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize("name", SENSITIVITIES)
    def test_upstream_and_brute_force(self, name: str, seed: int):
        s, theirs, is_exact, bands = SENSITIVITIES[name]
        x = gram(s.n, seed, bands)
        m = made(*s, workload=None)
        got = float(m.sensitivity_squared(jnp.array(x)))
        np.testing.assert_allclose(got, theirs(jnp.array(x), s) ** 2, rtol=1e-12)
        # Contributions that are vectors can be worse than any signs.
        assert got >= largest(s, x, with_signs) * (1 - 1e-12)
        want = largest(s, x, without_signs)
        if is_exact:
            np.testing.assert_allclose(got, want, rtol=1e-12)
        else:
            assert got >= want * (1 - 1e-12)

    @pytest.mark.parametrize("name", SENSITIVITIES)
    def test_traced_equals_static(self, name: str):
        s, *_, bands = SENSITIVITIES[name]
        x = gram(s.n, 0, bands)
        m = made(*s, workload=None)
        padded = np.pad(x, (0, MAX_N - s.n))
        got = lanes(arrays_of([s]), jnp.array([padded]), jnp.array([WORKLOAD]))
        want = m.sensitivity_squared(jnp.array(x))
        np.testing.assert_allclose(got["sensitivity_squared"], [want], rtol=1e-14)


@jax.jit
@jax.vmap
def optimized(set_up: tuple[Any, ...]) -> dict[str, jax.Array]:
    """Each set-up's optimum, and a few steps along the gradient toward it."""
    m = made(*set_up, workload=WORKLOAD)
    start = m.initial_params()

    def step(params: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        gradient = m.loss_and_gradient(params)[1]
        size *= jnp.max(start) / jnp.max(jnp.abs(gradient))
        params -= size * gradient
        return params, m.sensitivity_squared(params)

    best = jaxmf_opt.optimize(m.loss_and_gradient, start, grad=True, gtol=1e-9)
    return {
        "start": m.sensitivity_squared(start),
        "steps": jax.lax.scan(step, start, jnp.array([0.1, 0.05, -0.03]))[1],
        "end": m.sensitivity_squared(best),
        "moved": jnp.max(jnp.abs(best - start)),
        "loss": m.loss_and_gradient(best)[0],
    }


class TestInitialParams:
    @of_set_ups
    def test_square_root_of_the_first_column(self, name: str):
        s = SET_UPS[name]
        root = scipy.linalg.sqrtm(
            scipy.linalg.toeplitz(s.workload[:, 0], np.zeros(s.n))
        )
        period = s.n if s.max_participations == 1 else s.min_sep
        strategy = np.triu(np.tril(root), 1 - min(s.bands, period))
        strategy /= np.linalg.norm(strategy, axis=0)
        want = strategy.T @ strategy / s.max_participations
        got = single(name)["initial_params"]
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-13)
        # What the gradient leaves as it is has to be right to the bit.
        np.testing.assert_array_equal(np.diag(got), 1 / s.max_participations)
        may_move = projected(s._replace(equal_norm=False), np.ones((s.n, s.n))) != 0
        np.fill_diagonal(may_move, True)
        assert np.all(np.asarray(got)[~may_move] == 0)

    @pytest.mark.parametrize("first", [0.0, -1.0])
    def test_no_root(self, first: float):
        workload = np.tri(6)
        workload[0, 0] = first
        m = Dense(min_sep=2, max_participations=3, workload_matrix=workload)
        np.testing.assert_allclose(m.initial_params(), np.eye(6) / 3, rtol=1e-15)


class TestOptimization:
    @pytest.fixture(scope="class")
    @staticmethod
    def found() -> dict[str, dict[str, Any]]:
        """All set-ups are optimized in one program."""
        with jax.enable_x64():
            batch = optimized(arrays_of(list(SET_UPS.values())))
        return {
            name: {k: np.asarray(v)[i] for k, v in batch.items()}
            for i, name in enumerate(SET_UPS)
        }

    @of_set_ups
    def test_steps_keep_the_sensitivity(
        self, name: str, found: dict[str, dict[str, Any]]
    ):
        assert found[name]["moved"] > 0.01
        for where in ("start", "steps"):
            np.testing.assert_allclose(found[name][where], 1, rtol=1e-12)
        # Where a loss is not smooth, steps of L-BFGS can be thousands of gradients
        # that nearly cancel, with rounding errors as large.
        rtol = 1e-8 if SET_UPS[name].max_error else 1e-12
        np.testing.assert_allclose(found[name]["end"], 1, rtol=rtol)

    @pytest.mark.parametrize("name", [k for k, s in SET_UPS.items() if not s.max_error])
    def test_error_is_as_low_as_upstreams(
        self, name: str, found: dict[str, dict[str, Any]]
    ):
        theirs = upstream(name)
        got, want = found[name]["loss"], float(theirs.scale * theirs.error)
        assert got <= want * (1 + 1e-9)
        # Both are the minimum of a convex problem.
        np.testing.assert_allclose(got, want, rtol=1e-3)

    def test_published_optimum(self):
        """Of three prefix sums: https://arxiv.org/abs/2202.08312, lemma 3.4."""
        m = Dense(3)
        best = jaxmf_opt.optimize(m.loss_and_gradient, m.initial_params(), grad=True)
        np.testing.assert_allclose(m.sensitivity_squared(best), 1, rtol=1e-12)
        total = 3 * m.loss_and_gradient(best)[0]
        np.testing.assert_allclose(total, 4.607861648439669, rtol=1e-10)


def padded(s: SetUp, beyond: float) -> tuple[np.ndarray, np.ndarray]:
    """Random parameters and the workload, with something beyond `n`."""
    params, workload = np.full((2, MAX_N, MAX_N), beyond)
    n = min(s.n, MAX_N)
    params[:n, :n], workload[:n, :n] = gram(n), s.workload
    return params, workload


def in_one_batch(set_ups: list[SetUp], beyond: float) -> dict[str, np.ndarray]:
    pairs = [padded(s, beyond) for s in set_ups]
    operands = (jnp.array(x) for x in zip(*pairs, strict=True))
    batch = lanes(arrays_of(set_ups), *operands)
    return {k: np.asarray(v) for k, v in batch.items()}


RESULTS = (
    "loss",
    "gradient",
    "per_query_error",
    "sensitivity_squared",
    "strategy_matrix",
    "noising_matrix",
    "initial_params",
)


class TestBatches:
    # What is beyond n shows in a batch of set-ups that differ in n. The matrices with
    # zeros are not positive definite, so they would be noticed too.
    @pytest.mark.parametrize("beyond", [0.0, 5.0, -1e300, np.inf, np.nan])
    @pytest.mark.parametrize("result", RESULTS)
    def test_equals_single_set_ups_whatever_is_beyond(self, result: str, beyond: float):
        batch = in_one_batch(list(SET_UPS.values()), beyond)[result]
        for (name, s), lane in zip(SET_UPS.items(), batch, strict=True):
            inside = lane[tuple(slice(s.n) for _ in lane.shape)]
            want = single(name)[result]
            scale = 1e-11 * float(jnp.max(jnp.abs(want)))
            np.testing.assert_allclose(
                inside, want, rtol=1e-11, atol=scale, err_msg=name
            )

    @pytest.mark.parametrize("beyond", [5.0, np.nan])
    @pytest.mark.parametrize(
        "result", [x for x in RESULTS if x not in ("loss", "sensitivity_squared")]
    )
    def test_results_beyond(self, result: str, beyond: float):
        s = SET_UPS["once, short"]
        lane = in_one_batch([s], beyond)[result][0]
        outside = lane[s.n :], lane[..., s.n :]
        if result in ("gradient", "per_query_error"):
            assert all(np.all(x == 0) for x in outside)
        else:
            # The matrices stay diagonal, and so invertible.
            assert np.all(np.diag(lane)[s.n :] > 0)
            lane = lane - np.diag(np.diag(lane))
            assert np.all(lane[s.n :] == 0)
            assert np.all(lane[:, s.n :] == 0)

    def test_a_batch_of_mechanisms(self):
        """Modules that differ in arrays, mapped over."""
        seps = jnp.array([2, 3, 6])

        @jax.vmap
        def make(min_sep: jax.Array) -> Dense:
            return Dense(6, min_sep=min_sep, max_participations=6 // min_sep)

        params = jnp.array(gram(6))
        evaluate = eqx.filter_vmap(results, in_axes=(eqx.if_array(0), None))
        batch = eqx.filter_jit(evaluate)(jax.jit(make)(seps), params)
        for i, sep in enumerate(seps.tolist()):
            want = _single(Dense(6, min_sep=sep, max_participations=6 // sep), params)
            for name, value in batch.items():
                assert_close(value[i], want[name], 1e-12)

    def test_impossible_set_ups_are_nan_in_their_lane(self):
        good = SET_UPS["epochs, bands"]
        bad = [
            # Neither once, nor in epochs, nor with columns that are orthogonal.
            good._replace(max_participations=2),
            good._replace(equal_norm=True, max_participations=2),
            good._replace(n=0),
            good._replace(n=MAX_N + 1),
            good._replace(bands=0),
            good._replace(min_sep=-4, max_participations=-3),
        ]
        batch = in_one_batch([good, *bad], 0.0)
        for name in RESULTS:
            assert_close(batch[name][0], single("epochs, bands")[name], 1e-11)
            assert np.all(np.isnan(batch[name][1:])), name
