"""Random losses whose minimum has a closed form.

A loss is `value(x) * factor` for `x = forward(y, c)`: `value` is least at `argmin(c)`,
and `forward` has the inverse `back`, so the minimum in `y` is a closed form in `c`. It
can be differentiated as often as one likes, with nothing but JAX.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss of a flat vector `y` and a vector `c`, and where it is least.

    Attributes:
      name: What it is made of.
      size: How many elements `c` has, and the result.
      length: How many elements `y` has.
      start: Where to start.
      loss: The loss of `y` and `c`, or with `grad` a pair with the gradient.
      read: The result, of a minimum in `y`.
      closed_form: The result, of `c`.
      least: The loss there, of `c`; None where it is not known.
      grad: Whether the loss returns its gradient.
      symmetric: Whether the gradient is that of the loss.
      regular: Whether the minimum is unique.
      condition: About the condition number of the Hessian.
      optimizer: One that finds the minimum to the last bits, None for any.
      max_order: How many derivatives can be taken.
    """

    name: str
    size: int
    length: int
    start: np.ndarray
    loss: Callable[[Any, Any], Any]
    read: Callable[[Any], Any]
    closed_form: Callable[[Any], Any]
    least: Callable[[Any], Any] | None = None
    grad: bool = False
    symmetric: bool = True
    regular: bool = True
    condition: float = 10.0
    optimizer: optax.GradientTransformation | None = None
    max_order: int = 3


class _Base(NamedTuple):
    """A function of `x` and `c`, and the `x` where it is least."""

    name: str
    value: Callable[[Any, Any], Any]
    argmin: Callable[[Any], Any]


class _Change(NamedTuple):
    """A change of variables, `x = forward(y, c)` and `read(y) = back(x, c)`."""

    name: str
    forward: Callable[[Any, Any], Any]
    back: Callable[[Any, Any], Any]
    read: Callable[[Any], Any] = lambda y: y
    length: int | None = None
    condition: float = 10.0
    precondition: Any = None


def captured(value: Any, rng: Rng) -> Any:
    """A number or an array as one of the kinds of things that a loss closes over."""
    value = np.asarray(value)
    if value.ndim == 0:
        kinds: list[Any] = [float, np.float64, np.asarray, jnp.asarray, np.float32]
    else:
        kinds = [np.asarray, jnp.asarray, np.ndarray.tolist, jax.device_put]
    return kinds[rng.integers(len(kinds))](value)


def typed(data: Any, like: Any) -> Any:
    """What a loss closes over, in the type of its parameters."""
    return data if isinstance(data, float) else jnp.asarray(data).astype(like.dtype)


def root_of_cubic(t: Any) -> Any:
    """The `x` with `x**3 + x = t`."""
    return 2 / 3**0.5 * jnp.sinh(jnp.arcsinh(1.5 * 3**0.5 * t) / 3)


@jax.custom_jvp
def _cosh_by_jvp(x: Any) -> Any:
    return jnp.cosh(x)


_cosh_by_jvp.defjvps(lambda t, _, x: jnp.sinh(x) * t)


@jax.custom_vjp
def _cosh_by_vjp(x: Any) -> Any:
    return jnp.cosh(x)


_cosh_by_vjp.defvjp(lambda x: (jnp.cosh(x), x), lambda x, ct: (jnp.sinh(x) * ct,))


@jax.custom_vjp
def _sinh_by_vjp(x: Any) -> Any:
    return jnp.sinh(x)


_sinh_by_vjp.defvjp(lambda x: (jnp.sinh(x), x), lambda x, ct: (jnp.cosh(x) * ct,))


@jax.custom_vjp
def _cosh_by_vjps(x: Any) -> Any:
    """Whose gradient has no forward mode either."""
    return jnp.cosh(x)


_cosh_by_vjps.defvjp(lambda x: (jnp.cosh(x), x), lambda x, ct: (_sinh_by_vjp(x) * ct,))


def _bases(rng: Rng, n: int) -> list[Callable[[], _Base]]:
    def of_cosh(name: str, cosh: Callable[[Any], Any]) -> _Base:
        return _Base(name, lambda x, t: jnp.sum(cosh(x)) - t @ x, jnp.arcsinh)

    def quartic() -> _Base:
        fn = lambda x, t: jnp.sum(x**4 / 4 + (x - t) ** 2 / 2)  # noqa: E731
        return _Base("quartic", fn, root_of_cubic)

    def exponential() -> _Base:
        return _Base("exp", lambda x, t: jnp.sum(jnp.exp(x - t) - (x - t)), lambda t: t)

    def square() -> _Base:
        return _Base("square", lambda x, t: jnp.sum((x - t) ** 2) / 2, lambda t: t)

    def loop() -> _Base:
        """The same as a cosh, summed up by a loop."""

        def value(x: Any, t: Any) -> Any:
            def add(total: Any, row: Any) -> tuple[Any, None]:
                return total + jnp.cosh(row[0]) - row[0] * row[1], None

            zero = jnp.zeros((), x.dtype)
            return jax.lax.scan(add, zero, (x, t.astype(x.dtype)))[0]

        return _Base("loop", value, jnp.arcsinh)

    def branch() -> _Base:
        """Another loss on each side, and another one in a switch."""

        def value(x: Any, t: Any) -> Any:
            low = lambda x: jnp.sum(jnp.cosh(x)) - t @ x  # noqa: E731
            high = lambda x: jnp.sum(x**4 / 4 + (x - t) ** 2 / 2)  # noqa: E731
            return jax.lax.cond(t[0] > 0, high, low, x)

        def argmin(t: Any) -> Any:
            return jnp.where(t[0] > 0, root_of_cubic(t), jnp.arcsinh(t))

        return _Base("cond", value, argmin)

    del rng, n
    return [
        functools.partial(of_cosh, "cosh", jnp.cosh),
        functools.partial(of_cosh, "custom_jvp", _cosh_by_jvp),
        functools.partial(of_cosh, "custom_vjp", _cosh_by_vjp),
        functools.partial(of_cosh, "custom_vjps", _cosh_by_vjps),
        functools.partial(of_cosh, "jit", jax.jit(jnp.cosh)),
        quartic,
        exponential,
        square,
        loop,
        branch,
    ]


def _changes(rng: Rng, n: int) -> list[Callable[[], _Change]]:
    def same() -> _Change:
        return _Change("same", lambda y, c: y, lambda x, c: x)

    def units() -> _Change:
        reach = int(rng.choice([3, 10, 13]))
        scale = 2.0 ** rng.integers(-reach, reach + 1, n)
        data = captured(scale, rng)
        return _Change(
            f"units 2**{reach}",
            lambda y, c: typed(data, y) * y,
            lambda x, c: x,
            read=lambda y: y * jnp.asarray(scale, y.dtype),
            condition=10 * float(np.max(scale) / np.min(scale)) ** 2,
            precondition=np.diag(scale**-2),
        )

    def matrix() -> _Change:
        m = np.eye(n) + rng.integers(-8, 9, (n, n)) / 32 / max(1, n / 4)
        data = captured(m, rng)
        return _Change(
            "matrix",
            lambda y, c: typed(data, y) @ y,
            lambda x, c: jnp.asarray(np.linalg.inv(m), x.dtype) @ x,
        )

    def cubic() -> _Change:
        return _Change(
            "cubic", lambda y, c: y + y**3, lambda x, c: root_of_cubic(x), condition=40
        )

    def spd(c: Any) -> Any:
        return jnp.outer(c, c) / 4 + jnp.eye(n, dtype=c.dtype) * 1.25

    def solve() -> _Change:
        return _Change(
            "solve",
            lambda y, c: jnp.linalg.solve(spd(c), y),
            lambda x, c: spd(c) @ x,
        )

    def cholesky() -> _Change:
        return _Change(
            "cholesky",
            lambda y, c: jnp.linalg.cholesky(spd(c)) @ y,
            lambda x, c: jnp.linalg.solve(jnp.linalg.cholesky(spd(c)), x),
        )

    def triangular() -> _Change:
        def lower(c: Any) -> Any:
            return jnp.linalg.cholesky(spd(c))

        return _Change(
            "solve_triangular",
            lambda y, c: jax.scipy.linalg.solve_triangular(lower(c), y, lower=True),
            lambda x, c: lower(c) @ x,
        )

    def fft() -> _Change:
        kernel = np.zeros(n)
        kernel[:2] = 1.0, 0.25

        def spectrum(c: Any) -> Any:
            first = jnp.asarray(np.eye(n)[0], c.dtype)
            return jnp.fft.fft(jnp.asarray(kernel, c.dtype) + jnp.sin(c[0]) / 4 * first)

        return _Change(
            "fft",
            lambda y, c: jnp.fft.ifft(jnp.fft.fft(y) * spectrum(c)).real,
            lambda x, c: jnp.fft.ifft(jnp.fft.fft(x) / spectrum(c)).real,
        )

    def scan() -> _Change:
        def forward(y: Any, c: Any) -> Any:
            def step(x: Any, y: Any) -> tuple[Any, Any]:
                return y + x / 2, y + x / 2

            return jax.lax.scan(step, jnp.zeros((), y.dtype), y)[1]

        shift = np.eye(n, k=-1) / 2
        return _Change(
            "scan", forward, lambda x, c: x - jnp.asarray(shift, x.dtype) @ x
        )

    def associative() -> _Change:
        return _Change(
            "cumsum",
            lambda y, c: (
                y + jax.lax.associative_scan(jnp.add, y) / (4 * jnp.asarray(n, y.dtype))
            ),
            lambda x, c: (
                jnp.asarray(
                    np.linalg.inv(np.eye(n) + np.tri(n) / (4 * n)),
                    x.dtype,
                )
                @ x
            ),
        )

    def keys() -> _Change:
        seed = int(rng.integers(1000))
        key = jax.random.key(seed) if rng.random() < 0.5 else jax.random.PRNGKey(seed)

        def noise() -> Any:
            return jnp.eye(n, dtype=jnp.float64) + (
                jax.random.uniform(key, (n, n), jnp.float64) / (4 * n)
            )

        return _Change(
            "random key",
            lambda y, c: noise() @ y,
            lambda x, c: jnp.linalg.solve(noise(), x),
        )

    def redundant() -> _Change:
        """One variable too many: the Hessian is singular, the result is not."""
        q = np.linalg.qr(rng.normal(size=(n + 1, n)))[0].T
        return _Change(
            "redundant",
            lambda y, c: jnp.asarray(q, y.dtype) @ y,
            lambda x, c: x,
            read=lambda y: jnp.asarray(q, y.dtype) @ y,
            length=n + 1,
        )

    few = [same, units, matrix, cubic, solve, cholesky, triangular, fft, scan]
    few += [associative, keys, redundant]
    return few if n <= 8 else [same, units, fft, associative]


def _with_factor(rng: Rng) -> Callable[[Any, Any, Any], Any]:
    """A positive factor, which moves no minimum and has a part in all derivatives."""
    weight = captured(rng.integers(1, 9) / 4, rng)
    match rng.integers(3):
        case 0:
            return lambda loss, y, c: loss
        case 1:
            return lambda loss, y, c: loss * typed(weight, loss)
        case _:
            return lambda loss, y, c: (
                loss * typed(weight, loss) * (1.5 + jnp.cos(c[0]) / 2)
            )


def _with_wrapper(fn: Callable[[Any, Any], Any], rng: Rng) -> tuple[str, Any]:
    match rng.integers(5):
        case 0:
            return ", jit", jax.jit(fn)
        case 1:
            return ", checkpoint", jax.checkpoint(fn)
        case 2:  # a closure that is compiled by itself
            return ", jit of y", lambda y, c: jax.jit(lambda y: fn(y, c))(y)
        case _:
            return "", fn


def _precondition(matrix: Any) -> optax.GradientTransformation:
    """Gradient descent in better units, by functions that are not optax's own."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        flat = jnp.concatenate([x.ravel() for x in leaves])
        flat = -0.25 * (jnp.asarray(matrix, flat.dtype) @ flat)
        ends = np.cumsum([x.size for x in leaves])[:-1]
        new = [
            x.reshape(old.shape)
            for x, old in zip(jnp.split(flat, ends), leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, new), state

    return optax.GradientTransformation(lambda params: (), update)


def _composed(rng: Rng, n: int) -> Problem:
    bases, changes = _bases(rng, n), _changes(rng, n)
    base = bases[rng.integers(len(bases))]()
    change = changes[rng.integers(len(changes))]()
    factor = _with_factor(rng)
    length = change.length or n

    def value(y: Any, c: Any) -> Any:
        x = change.forward(y, c)
        return factor(base.value(x, c), y, c)

    def least(c: Any) -> Any:
        return factor(base.value(base.argmin(c), c), None, c)

    wrapper, value = _with_wrapper(value, rng)

    def loss(y: Any, c: Any) -> Any:
        return value(y, c.astype(y.dtype))

    name = f"{base.name} of {change.name}{wrapper}"
    grad = False
    read = change.read
    if rng.random() < 0.25:
        grad, of_value = True, loss
        if change.length is None and change.precondition is None and rng.random() < 0.5:
            # A parameter that is held by the gradient, though the loss is not free of
            # it: the loss is not what its minimum is.
            name, length = name + ", masked", n + 1
            mask = np.arange(n + 1) < n
            read = lambda y: y[:n]  # noqa: E731

            def masked(y: Any, c: Any) -> tuple[Any, Any]:
                small, gradient = jax.value_and_grad(of_value)(y[:n], c)
                gradient = jnp.pad(gradient, (0, 1))
                return small, jnp.where(mask, gradient, 0.0)

            loss = masked
        else:
            name += ", gradient"
            loss = jax.value_and_grad(of_value)
    precondition = change.precondition
    return Problem(
        name=f"{name}, n={n}",
        size=n,
        length=length,
        start=np.zeros(length),
        loss=loss,
        read=read,
        closed_form=lambda c: change.back(base.argmin(c), c),
        least=None if "vjp" in base.name else least,
        grad=grad,
        symmetric=not grad,
        regular=length == n,
        condition=change.condition,
        optimizer=None if precondition is None else _precondition(precondition / 1.5),
        max_order=3 if n <= 8 and base.name != "custom_vjps" else 1,
    )


def _ill_conditioned(rng: Rng, n: int) -> Problem:
    decades = int(rng.integers(1, 8))
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    curvature = np.logspace(0, -decades, n)
    a, inverse = (q * curvature) @ q.T, (q / curvature) @ q.T
    factor = _with_factor(rng)

    def loss(y: Any, c: Any) -> Any:
        c = c.astype(y.dtype)
        rest = y - jnp.sin(c)
        return factor(rest @ jnp.asarray(a, y.dtype) @ rest / 2, y, c)

    return Problem(
        name=f"quadratic of condition 1e{decades}, n={n}",
        size=n,
        length=n,
        start=np.zeros(n),
        loss=loss,
        read=lambda y: y,
        closed_form=jnp.sin,
        condition=10.0**decades,
        optimizer=_precondition(inverse / 2),
        max_order=3 if n <= 8 else 1,
    )


def _scale_invariant(rng: Rng, n: int) -> Problem:
    """No scale: the minimum is a direction, `w**(1/4)` for weights `w`."""
    del rng

    def weights(c: Any) -> Any:
        return jnp.exp(jnp.sin(c))

    def direction(y: Any) -> Any:
        return y / jnp.linalg.norm(y)

    def loss(y: Any, c: Any) -> Any:
        return jnp.sum(weights(c.astype(y.dtype)) / y**2) * jnp.sum(y**2)

    return Problem(
        name=f"scale-invariant, n={n}",
        size=n,
        length=n,
        start=np.ones(n),
        loss=loss,
        read=direction,
        closed_form=lambda c: direction(weights(c) ** 0.25),
        regular=False,
        condition=50.0,
        max_order=3 if n <= 8 else 1,
    )


def _root(rng: Rng, n: int) -> Problem:
    """A "gradient" that is the gradient of nothing: its Jacobian is skewed."""
    skew = rng.integers(-8, 9, (n, n)) / 32 / max(1, n / 4)
    skew = np.eye(n) + skew - skew.T

    def loss(y: Any, c: Any) -> tuple[Any, Any]:
        c = c.astype(y.dtype)
        x = jnp.asarray(skew, y.dtype) @ y
        return jnp.sum(y**2), x + (x**3) / 8 - jnp.sin(c)

    def closed_form(c: Any) -> Any:
        x = 8**0.5 * root_of_cubic(jnp.sin(c) / 8**0.5)
        return jnp.asarray(np.linalg.inv(skew), c.dtype) @ x

    return Problem(
        name=f"skewed root, n={n}",
        size=n,
        length=n,
        start=np.zeros(n),
        loss=loss,
        read=lambda y: y,
        closed_form=closed_form,
        grad=True,
        symmetric=False,
        optimizer=optax.sgd(0.25),
        max_order=3 if n <= 8 else 1,
    )


def draw(rng: Rng) -> Problem:
    """A random problem, mostly of 2 to 5 parameters, sometimes of 40 or 300."""
    many = rng.random()
    n = int(rng.integers(2, 6)) if many < 0.94 else 40 if many < 0.98 else 300
    kinds = [_composed, _ill_conditioned, _scale_invariant, _root]
    return kinds[rng.choice(4, p=[0.76, 0.1, 0.07, 0.07])](rng, n)
