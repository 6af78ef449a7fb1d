"""The derivative of a minimum, by every transformation and for every kind of loss."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from compiling import calls_host
from jax.dtypes import float0
from jax.experimental.jet import jet

from jaxmf_opt import ROBUST_OPTIMIZER, optimize, solve
from jaxmf_opt._solver.optimizers import DEFAULT_OPTIMIZER
from jaxmf_opt.mechanisms import BandedToeplitz, workloads

Map = Callable[[jax.Array], jax.Array]

# Exact in float32, so that programs of both precisions differentiate at one point.
C = np.array([0.25, -0.75])
A = np.array([[2.0, 0.5], [0.5, 1.0]])
SKEW = np.array([[1.5, 0.5], [-0.25, 1.0]])
KEY = jax.random.key(7)

MATRIX_FREE = lx.LSMR(rtol=1e-14, atol=0.0, conlim=1e12)

# Compiles in a third of the time of L-BFGS, and these losses are well conditioned.
PLAIN = optax.sgd(0.4)


def point(x64: bool = False, c: Any = C) -> jax.Array:
    return jnp.asarray(c, jnp.float64 if x64 else jnp.float32)


def assert_close(got: Any, want: Any, x64: bool = False, scale: float = 1.0) -> None:
    """Equal, up to what float32, or the solve in float64, leaves over."""
    rtol = scale * (1e-8 if x64 else 2e-6)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=rtol, atol=rtol), got, want
    )


def assert_dtype(tree: Any, x64: bool = False) -> None:
    want = jnp.float64 if x64 else jnp.float32
    assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype(want)}


def central_difference(fn: Callable[[Any], Any], at: Any, step: float) -> Any:
    """The derivative in float64 of a function of a number, exact to `step**4`."""

    def slope(step: float) -> Any:
        up, down = fn(jnp.asarray(at + step)), fn(jnp.asarray(at - step))
        return (np.asarray(up) - np.asarray(down)) / (2 * step)

    with jax.enable_x64():
        return (4 * slope(step / 2) - slope(step)) / 3


class Case(NamedTuple):
    """A loss `sum(cosh(x)) - c.x`, least where `x = arcsinh(c)`, for some `x(y, c)`.

    Attributes:
      x: Invertible in `y`.
      y: Its inverse `y(x, c)`, which makes the minimum a closed form in `c`.
      optimizer: What finds it.
    """

    x: Callable[[jax.Array, jax.Array], jax.Array]
    y: Callable[[jax.Array, jax.Array], jax.Array]
    optimizer: optax.GradientTransformation = PLAIN

    def minimum(self, c: jax.Array, start: Any = 0.0) -> jax.Array:
        def loss(y: jax.Array) -> jax.Array:
            x = self.x(y, c.astype(y.dtype))
            return jnp.sum(jnp.cosh(x)) - c.astype(y.dtype) @ x

        start = jnp.full(2, start, c.dtype)
        return optimize(loss, start, optimizer=self.optimizer, max_optimizer_steps=600)

    def closed_form(self, c: jax.Array) -> jax.Array:
        return self.y(jnp.arcsinh(c), c)


class Quadratic(Case):
    """`y.Ay / 2 - c.y`, with upstream's optimizer."""

    def minimum(self, c: jax.Array, start: Any = 0.0) -> jax.Array:
        start = jnp.full(2, start, c.dtype)
        return optimize(lambda y: y @ A @ y / 2 - c.astype(y.dtype) @ y, start)

    def closed_form(self, c: jax.Array) -> jax.Array:
        return jnp.linalg.inv(A) @ c


def decayed(y: jax.Array) -> jax.Array:
    def step(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return y + x / 2, y + x / 2

    return jax.lax.scan(step, jnp.zeros((), y.dtype), y)[1]


def undecayed(x: jax.Array) -> jax.Array:
    return x - jnp.array([0.0, 0.5]) * jnp.roll(x, 1)


def convolved(y: jax.Array) -> jax.Array:
    return jnp.convolve(jnp.pad(y, (1, 0)), jnp.array([1.0, 0.5]))[1:3]


def spd(c: jax.Array) -> jax.Array:
    return jnp.outer(c, c) / 4 + A


def random_matrix() -> jax.Array:
    return jnp.eye(2) + jax.random.uniform(KEY, (2, 2), jnp.float64) / 8


def circulant(c: jax.Array) -> jax.Array:
    return jnp.array([[1.0, 0.25], [0.25, 1.0]]) + c[0] * jnp.eye(2)


def filtered(y: jax.Array, c: jax.Array) -> jax.Array:
    spectrum = jnp.fft.fft(
        jnp.array([1.0, 0.25], y.dtype) + c[0] * jnp.array([1.0, 0.0], y.dtype)
    )
    return jnp.fft.ifft(jnp.fft.fft(y) * spectrum).real


LOSSES: dict[str, Case] = {
    "cosh": Case(lambda y, c: y, lambda x, c: x),
    "quadratic": Quadratic(lambda y, c: y, lambda x, c: x, DEFAULT_OPTIMIZER),
    "scan": Case(lambda y, c: decayed(y), lambda x, c: undecayed(x)),
    "pad, convolve": Case(lambda y, c: convolved(y), lambda x, c: undecayed(x)),
    "solve": Case(lambda y, c: jnp.linalg.solve(spd(c), y), lambda x, c: spd(c) @ x),
    "cholesky": Case(
        lambda y, c: jnp.linalg.cholesky(spd(c)) @ y,
        lambda x, c: jnp.linalg.inv(jnp.linalg.cholesky(spd(c))) @ x,
    ),
    "fft": Case(filtered, lambda x, c: jnp.linalg.inv(circulant(c)) @ x),
    "random key": Case(
        lambda y, c: random_matrix() @ y,
        lambda x, c: jnp.linalg.inv(random_matrix()) @ x,
    ),
}


def scalar(f: Map) -> Map:
    """Something that is not linear in the minimum."""
    return lambda c: jnp.sum(jnp.sin(f(c)) * jnp.array([1.0, 2.0], c.dtype))


def stacked(c: jax.Array) -> jax.Array:
    return jnp.stack([c, -c / 2, c + 0.25])


def later(f: Map) -> Map:
    """Two cotangents, pulled back after the solve."""

    def fn(c: jax.Array) -> jax.Array:
        _, pull = jax.vjp(f, c)
        return jnp.stack([*pull(jnp.ones_like(c)), *pull(c)])

    return fn


def linearized(f: Map) -> Any:
    def fn(c: jax.Array) -> Any:
        y, push = jax.linearize(f, c)
        return y, push(jnp.ones_like(c)), push(c)

    return fn


def scanned(f: Map) -> Map:
    """Each minimum shifts what the next loss captures."""

    def step(total: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = f(c + total / 8)
        return total + y, y

    return lambda c: jnp.sum(jax.lax.scan(step, 0 * c, stacked(c))[1] ** 2)


def chained(f: Map) -> Map:
    def step(x: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = f(x / 2 + row)
        return y, y

    return lambda c: jax.lax.scan(step, c, stacked(c))[1]


def branched(f: Map) -> Map:
    return lambda c: jnp.sum(jax.lax.cond(c[0] > 0, f, jnp.cos, c) ** 2)


def with_vjp_rule(f: Map) -> Map:
    """The solve both in the forward pass of the rule and around it."""
    rule = jax.custom_vjp(lambda c: f(c))
    rule.defvjp(lambda c: jax.vjp(f, c), lambda pull, ct: pull(ct))
    return lambda c: scalar(rule)(jnp.sin(c)) + scalar(f)(c)


VALUES: dict[str, Callable[[Map], Any]] = {
    "vmap": lambda f: lambda c: jax.vmap(f)(stacked(c)),
    "jit of vmap of jit": lambda f: lambda c: jax.jit(jax.vmap(jax.jit(f)))(stacked(c)),
    "vmap of scan": lambda f: lambda c: jax.vmap(chained(f))(stacked(c)),
}
DERIVATIVES: dict[str, Callable[[Map], Any]] = {
    "grad": lambda f: jax.grad(scalar(f)),
    "vjp, pulled back later": later,
    "linearize": linearized,
    "jvp": lambda f: lambda c: jax.jvp(f, (c,), (jnp.cos(c),)),
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    "hessian": lambda f: jax.hessian(scalar(f)),
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f)),
    "vmap of grad": lambda f: lambda c: jax.vmap(jax.grad(scalar(f)))(stacked(c)),
    "jit of vmap of grad of jit": lambda f: (
        lambda c: jax.jit(jax.vmap(jax.grad(jax.jit(scalar(f)))))(stacked(c))
    ),
    "grad of scan": lambda f: jax.grad(scanned(f)),
    "grad of map": lambda f: jax.grad(
        lambda c: jnp.sum(jax.lax.map(f, stacked(c)) ** 2)
    ),
    "grad of cond": lambda f: jax.grad(branched(f)),
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(scalar(f))),
    "grad around custom_vjp": lambda f: jax.grad(with_vjp_rule(f)),
}
WAYS = {**VALUES, **DERIVATIVES}


def cells() -> Iterator[tuple[str, str, bool]]:
    """Ways, losses and whether x64 is on: each way once, and each loss twice.

    (All ways with all losses take many times as long.)
    """
    losses = list(LOSSES)
    for i, way in enumerate(WAYS):
        yield way, losses[i % len(losses)], i % 2 == 0


CELLS = list(dict.fromkeys(cells()))


@functools.cache
def of_closed_form(way: str, loss: str) -> Any:
    with jax.enable_x64():
        return jax.jit(WAYS[way](LOSSES[loss].closed_form))(jnp.asarray(C))


class TestEveryWay:
    """A table of transformations, losses, and the two settings."""

    @pytest.mark.parametrize(("way", "loss", "x64"), CELLS)
    def test_against_the_closed_form(self, way: str, loss: str, x64: bool):
        """The same transformation of the closed form, in float64."""
        case = LOSSES[loss]
        with jax.enable_x64(x64):
            got = WAYS[way](case.minimum)(point(x64))
        assert_dtype(got, x64)
        assert_close(got, of_closed_form(way, loss), x64, scale=10)


def invariant_minimum(c: jax.Array) -> jax.Array:
    """Of a loss without a scale. Its direction is `c**(1/4)`, normalised."""

    def loss(y: jax.Array) -> jax.Array:
        return jnp.sum(c.astype(y.dtype) / y**2) * jnp.sum(y**2)

    return optimize(loss, jnp.ones(c.shape, c.dtype))


def direction(y: jax.Array) -> jax.Array:
    return y / jnp.linalg.norm(y)


WEIGHTS = np.array([0.5, 1.0, 2.0])


MOMENTUM = 0.5


def toeplitz_error(momentum: jax.Array, y: jax.Array) -> jax.Array:
    return banded(momentum).loss(y)


def banded(momentum: jax.Array) -> BandedToeplitz:
    workload_coef = workloads.momentum(8, momentum)
    return BandedToeplitz(bands=3, max_bands=4, workload_coef=workload_coef)


def toeplitz(momentum: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The least error, the direction of a strategy that has it, and the strategy."""
    start = BandedToeplitz(8, 3, max_bands=4).initial_params()
    y = optimize(lambda y: toeplitz_error(momentum, y), start)
    return toeplitz_error(momentum, y), direction(y), y


@functools.cache
def toeplitz_differences() -> tuple[Any, Any]:
    solve = jax.jit(toeplitz)
    error, turn = (
        central_difference(lambda m, i=i: solve(m)[i], MOMENTUM, 2e-3) for i in range(2)
    )
    return error, turn


class TestSingularHessian:
    def test_the_derivative_is_the_one_of_smallest_norm(self):
        """The minimum turns with `c`, and keeps the length that it happens to have."""
        c = point(c=WEIGHTS)
        y, got = jax.jit(
            lambda c: (invariant_minimum(c), jax.jacfwd(invariant_minimum)(c))
        )(c)
        with jax.enable_x64():
            turn = jax.jacfwd(lambda c: direction(c**0.25))(jnp.asarray(WEIGHTS))
            want = np.linalg.norm(y) * np.asarray(turn)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.asarray(y) @ np.asarray(got), 0.0, atol=1e-6)

    @pytest.mark.parametrize("second", [jax.hessian, lambda f: jax.grad(jax.grad(f))])
    def test_second_derivatives_without_a_matrix(self, second: Callable[..., Any]):
        """In reverse, too. The minimum is a multiple of a unit vector that turns."""
        e, f = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0].T

        def total(t: jax.Array) -> jax.Array:
            def loss(y: jax.Array) -> jax.Array:
                unit = jnp.cos(t) * e + jnp.sin(t) * f
                return jnp.sum((direction(y) - unit.astype(y.dtype)) ** 2)

            start = 2 * (np.cos(0.5) * e + np.sin(0.5) * f)
            solver = lx.CG(rtol=1e-12, atol=1e-12)
            options: Any = {"max_optimizer_steps": 0, "linear_solver": solver}
            return jnp.sum(optimize(loss, jnp.asarray(start), **options))

        with jax.enable_x64():
            got = jax.jit(jax.vmap(second(total)))(jnp.array([0.5]))
        want = -2 * np.sum(np.cos(0.5) * e + np.sin(0.5) * f)
        np.testing.assert_allclose(got, [want], rtol=1e-9)

    def test_banded_toeplitz_by_the_momentum(self):
        at = point(c=MOMENTUM)
        (_, _, y), got = jax.jit(
            lambda m: jax.jvp(toeplitz, (m,), (jnp.ones_like(m),))
        )(at)
        # At a minimum, what the strategy does with the momentum changes nothing.
        envelope = jax.jit(jax.grad(toeplitz_error))(at, y)
        np.testing.assert_allclose(got[0], envelope, rtol=1e-5)
        error, turn = toeplitz_differences()
        np.testing.assert_allclose(got[0], error, rtol=1e-6)
        # The direction of a minimum is known to 1e-8, its difference to 1e-5.
        np.testing.assert_allclose(got[1], turn, rtol=1e-5, atol=1e-5)
        # The fourth coefficient is outside of the bands.
        assert got[1][3] == 0


COUPLED = [
    np.diag([1.0, 0.0]),  # a mask
    np.eye(2) - 0.5,  # keeps the sum of the parameters
]


class TestProjectedGradient:
    """The minimum that the iteration finds keeps what the projection takes away."""

    START = np.array([0.5, 0.25])

    def minimum(
        self, c: jax.Array, projection: np.ndarray, solver: Any = None
    ) -> jax.Array:
        def loss(y: jax.Array) -> tuple[jax.Array, jax.Array]:
            return y @ A @ y / 2 - c.astype(y.dtype) @ y, jnp.asarray(projection) @ (
                A @ y - c.astype(y.dtype)
            )

        start = jnp.asarray(self.START, c.dtype)
        return optimize(loss, start, grad=True, optimizer=PLAIN, linear_solver=solver)

    @pytest.mark.parametrize(
        ("projection", "solver", "jacobian"),
        [
            (COUPLED[0], None, jax.jacfwd),
            (COUPLED[1], None, jax.jacrev),
            (COUPLED[0], MATRIX_FREE, jax.jacrev),
        ],
        ids=["mask", "sum", "mask, matrix-free"],
    )
    def test_of_a_coupled_loss(
        self, projection: np.ndarray, solver: Any, jacobian: Callable[..., Any]
    ):
        # Along the one direction that is left, a quadratic function of one number.
        along = np.linalg.eigh(projection)[1][:, 1]
        want = np.outer(along, along) / (along @ A @ along)
        held = np.eye(2) - projection
        with jax.enable_x64():
            y = self.minimum(jnp.asarray(C), projection)
        np.testing.assert_allclose(held @ np.asarray(y), held @ self.START, atol=1e-12)
        minimum = functools.partial(self.minimum, projection=projection, solver=solver)
        assert_close(jax.jit(jacobian(minimum))(point()), want)


def solve_root(c: jax.Array) -> Any:
    """With the "gradient" of no function: its Jacobian is skewed."""

    def loss(y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(y**2), jnp.asarray(SKEW) @ y - jnp.sin(c.astype(y.dtype))

    options: dict[str, Any] = {"optimizer": PLAIN, "max_optimizer_steps": 200}
    return solve(loss, jnp.zeros(2, c.dtype), grad=True, rtol=0.0, **options)


def root(c: jax.Array) -> Any:
    return solve_root(c).value


ROOT_JACOBIAN = np.linalg.inv(SKEW) @ np.diag(np.cos(C))


class TestTheUsersGradient:
    """With `grad=True` the derivative is that of its root."""

    @pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
    def test_jacobian(self, jacobian: Callable[..., Any]):
        np.testing.assert_allclose(
            root(point()), np.linalg.inv(SKEW) @ np.sin(C), rtol=1e-6
        )
        got = jacobian(root)(point())
        assert_dtype(got)
        assert_close(got, ROOT_JACOBIAN)

    def test_second_derivative(self):
        got = jax.jit(jax.hessian(lambda c: jnp.sum(root(c))))(point())
        rows = np.linalg.inv(SKEW).sum(axis=0)
        assert_close(got, np.diag(-rows * np.sin(C)))


class TestTheLoss:
    """The loss at the minimum has a derivative, too."""

    @staticmethod
    def least(c: jax.Array, **options: Any) -> Any:
        def loss(y: jax.Array) -> jax.Array:
            wide = c.astype(y.dtype)
            return jnp.sum(jnp.cosh(y - jnp.sin(wide))) + wide @ y

        start = jnp.zeros(2, c.dtype)
        return solve(loss, start, optimizer=ROBUST_OPTIMIZER, **options)

    @pytest.mark.parametrize(
        ("loss", "x64"),
        [(lambda s: s.loss, True), (lambda s: s.stats["loss"], False)],
        ids=["loss", "stats"],
    )
    def test_of_both_orders(self, loss: Callable[[Any], Any], x64: bool):
        # The slope is -c at y = sin(c) - arcsinh(c).
        want = np.sin(C) - np.arcsinh(C) + C * np.cos(C)
        curved = 2 * np.cos(C) - 1 / np.sqrt(1 + C**2) - C * np.sin(C)
        least = lambda c: loss(self.least(c))  # noqa: E731
        with jax.enable_x64(x64):
            cs = jnp.stack([point(x64), 2 * point(x64)])
            got = jax.jit(jax.vmap(jax.grad(least)))(cs)
            assert_dtype(got, x64)
            assert_close(got[0], want, x64)
            assert_close(got[1], jax.jacfwd(least)(cs[1]), x64)
            assert_close(jax.jit(jax.hessian(least))(cs[0]), np.diag(curved), x64)

    def test_is_nan_where_that_of_the_minimum_is(self):
        coarse = lambda c: self.least(c, max_optimizer_steps=0).loss  # noqa: E731
        assert np.all(np.isnan(jax.grad(coarse)(point())))
        assert np.all(np.isnan(jax.jvp(coarse, (point(),), (point(),))[1]))

    def test_with_a_rule_of_the_users(self):
        """That is not linear in the cotangent; or that closes over what is traced."""

        def least(c: jax.Array, scale: jax.Array | float) -> Any:
            @jax.custom_vjp
            def squared(r: jax.Array) -> jax.Array:
                return jnp.sum(r**2)

            def back(r: jax.Array, ct: jax.Array) -> tuple[jax.Array]:
                return (jnp.nan_to_num(2 * ct * r) * jnp.asarray(scale, r.dtype),)

            squared.defvjp(lambda r: (squared(r), r), back)

            def loss(y: jax.Array) -> jax.Array:
                wide = c.astype(y.dtype)
                return squared(y - wide) + jnp.sum(wide**3)

            return solve(loss, jnp.zeros(2), optimizer=PLAIN)

        got = jax.grad(lambda c: least(c, 1.0).loss)(point())
        assert_close(got, 3 * C**2)
        of_both = lambda c, scale: least(c, scale).loss  # noqa: E731
        got = jax.grad(jax.jit(of_both))(point(), jnp.asarray(1.0))
        assert np.all(np.isnan(got))
        value = lambda c, scale: jnp.sum(least(c, scale).value)  # noqa: E731
        assert_close(jax.grad(jax.jit(value))(point(), jnp.asarray(1.0)), np.ones(2))

    def test_at_the_root_of_a_gradient(self):
        got = jax.grad(lambda c: solve_root(c).loss)(point())
        assert_close(got, 2 * np.asarray(root(point())) @ ROOT_JACOBIAN)


class TestLinearSolver:
    @pytest.mark.parametrize("chosen", [lx.SVD(), lx.CG(rtol=1e-10, atol=1e-10)])
    def test_given_by_the_caller(self, chosen: lx.AbstractLinearSolver):
        def minimum(c: jax.Array) -> jax.Array:
            return optimize(
                lambda y: jnp.sum(jnp.cosh(y)) - c.astype(y.dtype) @ A @ y,
                jnp.zeros(2, c.dtype),
                optimizer=PLAIN,
                linear_solver=chosen,
            )

        got = jax.jit(jax.grad(lambda c: jnp.sum(minimum(c))))(point())
        want = A.T @ (1 / np.sqrt(1 + (A @ C) ** 2))
        assert_dtype(got)
        assert_close(got, want)

    @pytest.fixture
    def never_direct(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("jaxmf_opt._solver.implicit.DIRECT_SIZE", 0)

    def test_many_parameters_without_a_matrix(self, never_direct: None):
        n = 600
        diagonal = np.linspace(1.0, 2.0, n)
        u = np.linspace(-1.0, 1.0, n) / 16
        c = np.cos(np.arange(n))

        def minimum(c: jax.Array) -> jax.Array:
            def loss(y: jax.Array) -> jax.Array:
                return (
                    jnp.sum(diagonal * y**2 + (u @ y) ** 2 / n) / 2
                    - c.astype(y.dtype) @ y
                )

            return optimize(loss, jnp.zeros(n, c.dtype), optimizer=PLAIN)

        # Of the weights, the first is exactly 0.
        weights = np.sin(np.arange(n) / 7)
        program = jax.jit(jax.grad(lambda c: minimum(c) @ weights.astype(c.dtype)))
        got = program(point(c=c))
        want = np.linalg.solve(np.diag(diagonal) + np.outer(u, u), weights)
        assert_dtype(got)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        lowered = program.lower(point(c=c))
        assert f"{n}x{n}" not in lowered.as_text()
        compiled_text = lowered.compile().as_text()
        assert compiled_text is not None
        assert not calls_host(compiled_text)

    def test_a_cotangent_outside_of_the_range(self, never_direct: None):
        """The length of the minimum does not move, and no solver goes astray."""
        n = 30
        length = lambda c: jnp.sum(invariant_minimum(c) ** 2)  # noqa: E731
        got = jax.jit(jax.grad(length))(jnp.linspace(1.0, 2.0, n))
        np.testing.assert_allclose(got, 0.0, atol=1e-5)


class TestZeroDerivative:
    """With respect to all that a minimum does not depend on."""

    def test_start_tolerances_and_learning_rate(self):
        def total(
            start: jax.Array, rtol: jax.Array, rate: jax.Array, c: jax.Array
        ) -> jax.Array:
            y = optimize(
                lambda y: jnp.sum(jnp.cosh(y)) - c.astype(y.dtype) @ y,
                start,
                optimizer=optax.sgd(rate),
                rtol=rtol,
                atol=rtol,
                gtol=rtol,
            )
            return jnp.sum(y)

        args = [point(c=x) for x in ([0.5, 0.1], 1e-10, 0.4, C)]
        got = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*args)
        assert_dtype(got)
        assert not np.any(jnp.concatenate([x.ravel() for x in got[:3]]))
        assert_close(got[3], 1 / np.sqrt(1 + C**2))
        moves = [jnp.ones_like(x) for x in args[:3]]
        frozen = jax.jvp(
            lambda a, b, d: total(a, b, d, args[3]), tuple(args[:3]), tuple(moves)
        )
        assert frozen[1] == 0


def total_of(tree: dict[str, Any]) -> jax.Array:
    """The sum of a minimum at `n * c / (n + flag)`, of leaves of all kinds."""

    def loss(y: jax.Array) -> jax.Array:
        assert tree["nothing"] is None
        n, c = (tree[name].astype(y.dtype) for name in ("n", "c"))
        noise = 0.0 * jax.random.normal(tree["key"], (2,))
        pull = jnp.where(tree["flag"], y**2, 0.0)
        return jnp.sum(n * (y - c) ** 2 + pull + noise)

    start = jnp.zeros(2, tree["c"].dtype)
    return jnp.sum(optimize(loss, start, optimizer=optax.sgd(0.2)))


class TestLeavesThatDoNotMove:
    """Integers, bools, keys and None in what the loss closes over."""

    WANT = np.array([0.5, 1.0])

    def tree(self) -> dict[str, Any]:
        return {
            "c": point(),
            "n": jnp.array([1, 2]),
            "flag": jnp.array([True, False]),
            "key": jax.random.key(3),
            "nothing": None,
        }

    def test_grad(self):
        tree = self.tree()
        key = tree.pop("key")

        def total(tree: dict[str, Any], key: jax.Array) -> jax.Array:
            return total_of({**tree, "key": key})

        got = jax.jit(jax.grad(total, allow_int=True))(tree, key)
        assert_close(got["c"], self.WANT)
        assert_dtype(got["c"])
        assert got["n"].dtype == got["flag"].dtype == float0
        assert got["nothing"] is None


def test_no_parameters():
    none = lambda c: jnp.sum(optimize(lambda y: c + jnp.sum(y), jnp.zeros(0)))  # noqa: E731
    assert jax.grad(none)(1.0) == 0


class TestOneSolve:
    """No iteration is differentiated, so a derivative costs one solve."""

    def test_evaluations(self):
        """Counted where they are executed, in solves of different lengths."""
        evaluations = traces = 0

        def count() -> None:
            nonlocal evaluations
            evaluations += 1

        def minimum(c: jax.Array, steps: int) -> jax.Array:
            def loss(y: jax.Array) -> jax.Array:
                nonlocal traces
                traces += 1
                jax.debug.callback(count)
                return jnp.sum(jnp.cosh(y)) - c.astype(y.dtype) @ y

            start = jnp.zeros(2, c.dtype)
            return optimize(loss, start, max_optimizer_steps=steps, optimizer=PLAIN)

        def executed(fn: Callable[..., Any]) -> int:
            nonlocal evaluations
            evaluations = 0
            jax.block_until_ready(fn(point(False)))
            jax.effects_barrier()
            return evaluations

        extra = []
        for steps in (20, 50):
            solve = lambda c, steps=steps: minimum(c, steps)  # noqa: E731
            plain = executed(jax.jit(solve))
            assert plain >= steps
            derivative = jax.grad(lambda c, solve=solve: jnp.sum(solve(c)))
            extra.append(executed(jax.jit(derivative)) - plain)
        # One pass through the linear system, of 2 parameters and 2 right-hand sides,
        # and a look at it from where a step of Newton's method leads. (The derivative
        # of the loss, of which nothing is used here, is not dropped where it counts.)
        assert 0 < extra[0] == extra[1] <= 11
        assert traces < 20


class TestNothingLeaks:
    def test_parameters_keep_their_dtypes(self):
        """A pytree of several: none is that of the loss, nor of what it captures."""
        half = jnp.bfloat16

        def minimum(c: jax.Array) -> dict[str, jax.Array]:
            start = {"half": jnp.zeros(2, half), "single": jnp.zeros(2, jnp.float32)}
            return optimize(
                lambda y: (
                    jnp.sum(jnp.cosh(y["half"]) + jnp.cosh(y["single"]))
                    - c.astype(y["half"].dtype) @ (y["half"] + y["single"])
                ),
                start,
                optimizer=PLAIN,
            )

        c = point()
        y, moved = jax.jvp(minimum, (c,), (jnp.ones_like(c),))
        for tree in (y, moved):
            assert tree["half"].dtype == half
            assert tree["single"].dtype == jnp.float32
        want = 1 / np.sqrt(1 + C**2)
        np.testing.assert_allclose(moved["single"], want, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(moved["half"], float), want, rtol=1e-2)
        grad = jax.grad(lambda c: jnp.sum(minimum(c)["single"]))(c)
        assert_dtype(grad)
        assert_close(grad, want)


def cubic(c: jax.Array) -> jax.Array:
    """The `y` of `y**3 + y = c`."""

    def loss(y: jax.Array) -> jax.Array:
        return (y - c.astype(y.dtype)) ** 2 / 2 + y**4 / 4

    return optimize(loss, jnp.zeros_like(c), optimizer=optax.sgd(0.2), gtol=1e-13)


def root_of_cubic(c: jax.Array, p: float = 1.0) -> jax.Array:
    """The `y` of `y**3 + p y = c`, by Cardano's formula."""
    part = jnp.sqrt(c**2 / 4 + p**3 / 27)
    return jnp.cbrt(c / 2 + part) + jnp.cbrt(c / 2 - part)


def trajectory(y: Map) -> Map:
    """Each step is a solve from where the last one has led."""
    steps = jnp.array([1.0, 0.5, 0.25])

    def step(x: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = y(x + s.astype(x.dtype))
        return x, x

    return lambda c: jnp.sum(jax.lax.scan(step, c, steps)[1])


def bilevel(y: Map) -> Map:
    """A solve whose loss contains a solve."""

    def outer(c: jax.Array) -> jax.Array:
        def loss(x: jax.Array) -> jax.Array:
            return jnp.cosh(x - y(c.astype(x.dtype) + x / 4))

        return optimize(loss, jnp.zeros_like(c), optimizer=PLAIN, gtol=1e-12)

    return outer


LOOPS: dict[str, Callable[[Map], Map]] = {
    "map": lambda y: lambda c: jax.lax.map(y, c[None])[0],
    "trajectory": trajectory,
    "cond in scan": lambda y: (
        lambda c: jax.lax.scan(
            lambda x, _: (jax.lax.cond(x > 0, y, jnp.sin, x), None), c, length=2
        )[0]
    ),
    "solve in solve": bilevel,
}


class TestHigherOrders:
    """Against closed forms; the solve in a solve is that of `x**3 + x = c + x / 4`."""

    @pytest.mark.parametrize(
        ("loop", "order"),
        [
            ("map", "frf"),
            ("trajectory", "rr"),
            ("cond in scan", "rf"),
            ("solve in solve", "r"),
        ],
    )
    def test_of_loops(self, loop: str, order: str):
        def derivative(y: Map) -> Map:
            for name in order:
                y = {"f": jax.jacfwd, "r": jax.jacrev}[name](y)
            return y

        got = jax.jit(derivative(LOOPS[loop](cubic)))(point(False, 2.0))
        plain = LOOPS[loop](root_of_cubic)
        if loop == "solve in solve":
            plain = functools.partial(root_of_cubic, p=0.75)
        with jax.enable_x64():
            want = derivative(plain)(jnp.asarray(2.0))
        np.testing.assert_allclose(got, want, rtol=1e-5)

    def test_a_tangent_that_is_a_number(self):
        program = jax.jit(lambda c: jax.jvp(cubic, (c,), (1.0,))[1])
        np.testing.assert_allclose(program(point(c=2.0)), 0.25, rtol=1e-6)

    def test_jet_is_refused(self):
        with pytest.raises(NotImplementedError, match=r"jax\.experimental\.jet"):
            jet(cubic, (2.0,), ((1.0, 0.0),))
