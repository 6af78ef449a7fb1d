"""How fast are the losses, and how good are the mechanisms, beside jax-privacy 2.0.0's?

* One value and gradient, ours / upstream's, each the least of several calls in turn.
  Upstream has no loss for banded inverses: its functions are put together for one.
* Crossover: seconds of a value and gradient by blocks and by transforms, by bands.
* Many digits: the loss of banded Toeplitz against substitution in mpmath, relatively.
* Optimized mechanisms: the error (root of the loss) and seconds of a whole call with
  defaults, compilation included, of jax-privacy's functions and of ours. Both errors
  are computed by our loss.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from jax_privacy.matrix_factorization import (
    buffered_toeplitz,
    dense,
    optimization,
    toeplitz,
)

from jaxmf_opt import DEFAULT_OPTIMIZER, ROBUST_OPTIMIZER, optimize
from jaxmf_opt.mechanisms import (
    BandedInverseToeplitz,
    BandedToeplitz,
    BufferedToeplitz,
    Dense,
    _toeplitz,
)

from .common import seconds

SIZES = (256, 1000, 10_000, 100_000)
MILLION = 1_000_000
BANDS, BUFFERS, REPEATS = 64, 4, 5


def _least(calls: list[Callable[[], Any]], repeats: int = REPEATS) -> list[float]:
    """The least time of each call; the first, which compiles, does not count."""
    times = [[seconds(call) for call in calls] for _ in range(repeats + 1)]
    return np.min(times[1:], axis=0).tolist()


def _upstream_of_inverse(n: int, participations: int) -> Callable[..., Any]:
    def loss(noising_coef: jax.Array) -> jax.Array:
        noising_coef = jnp.pad(noising_coef, (0, n - noising_coef.size))
        errors = toeplitz.per_query_error(
            noising_coef=noising_coef, n=n, skip_checks=True
        )
        strategy_coef = toeplitz.inverse_coef(noising_coef, n)
        sensitivity_squared = toeplitz.minsep_sensitivity_squared(
            strategy_coef, n // participations, participations, n=n, skip_checks=True
        )
        return jnp.mean(errors) * sensitivity_squared

    return loss


def _upstream_of_blt(n: int, participations: int) -> tuple[Any, Any]:
    """Upstream's loss of its own parameters, and where they start."""
    kind = buffered_toeplitz.Parameterization.buf_decay_pair()
    blt = buffered_toeplitz.get_init_blt(BUFFERS)
    if participations == 1:
        loss = buffered_toeplitz.LossFn.build_closed_form_single_participation(n)
    else:
        loss = buffered_toeplitz.LossFn.build_min_sep(
            n,
            "mean",
            min_sep=n // participations,
            max_participations=participations,
        )
    return kind.get_loss_fn(loss), kind.params_from_blt(blt)


def _losses(n: int) -> dict[str, tuple[tuple[Any, Any], tuple[Any, Any]]]:
    """For each family: our loss and point, and upstream's."""
    banded = BandedToeplitz(n, BANDS)
    of_banded = functools.partial(toeplitz.loss, n=n)
    inverse = BandedInverseToeplitz(n, BANDS, min_sep=n // 4, max_participations=4)
    start = banded.initial_params(), inverse.initial_params()
    closed = BufferedToeplitz(n, BUFFERS, max_error=True)
    summed = BufferedToeplitz(n, BUFFERS, min_sep=n // 4, max_participations=4)
    return {
        "banded Toeplitz": ((banded.loss, start[0]), (of_banded, start[0])),
        "banded inverse, 4 epochs": (
            (inverse.loss, start[1]),
            (_upstream_of_inverse(n, 4), start[1]),
        ),
        "BLT, largest error": (
            (closed.loss, closed.initial_params()),
            _upstream_of_blt(n, 1),
        ),
        "BLT, 4 epochs": (
            (summed.loss, summed.initial_params()),
            _upstream_of_blt(n, 4),
        ),
    }


def _compare_losses() -> None:
    print(f"value and gradient, {BANDS} bands or {BUFFERS} buffers: ours / upstream's")
    for n in SIZES:
        for name, pair in _losses(n).items():
            calls = [
                functools.partial(jax.jit(jax.value_and_grad(f)), p) for f, p in pair
            ]
            ours, theirs = _least(calls)
            print(
                f"  n = {n:7d}  {name:25} {ours / theirs:7.4f}   "
                f"({1e3 * ours:8.3f} ms / {1e3 * theirs:8.3f} ms)"
            )
    for n in (64, 256, 512):
        mechanism = Dense(n)
        start = mechanism.initial_params()
        of_dense = jax.jit(
            functools.partial(dense._mean_loss_and_gradient, A=jnp.tri(n))
        )
        calls = [
            functools.partial(jax.jit(mechanism.loss_and_gradient), start),
            functools.partial(of_dense, start),
        ]
        ours, theirs = _least(calls)
        print(
            f"  n = {n:7d}  {'dense':25} {ours / theirs:7.4f}   "
            f"({1e3 * ours:8.3f} ms / {1e3 * theirs:8.3f} ms)"
        )
    for kind in (BandedToeplitz, BandedInverseToeplitz):
        mechanism = kind(MILLION, BANDS)
        both = jax.jit(jax.value_and_grad(mechanism.loss))
        (ours,) = _least([functools.partial(both, mechanism.initial_params())])
        print(f"  n = {MILLION}  {kind.__name__:25} {1e3 * ours:8.3f} ms")


def _compare_blocks_and_transforms() -> None:
    print("value and gradient of banded Toeplitz by blocks, by transforms [ms]")
    chosen = _toeplitz._MANY
    for n in (4096, 100_000):
        for bands in (64, 128, 256, 512, 1024):
            mechanism = BandedToeplitz(n, bands)
            calls, point = [], mechanism.initial_params()
            for many in (n, 1):
                # As read when the loss is traced, at once.
                _toeplitz._MANY = many
                both = jax.jit(jax.value_and_grad(mechanism.loss))
                calls.append(functools.partial(both.lower(point).compile(), point))
            _toeplitz._MANY = chosen
            blocks, transforms = (1e3 * t for t in _least(calls))
            print(f"  n = {n:6d}, {bands:4d} bands {blocks:9.3f} {transforms:9.3f}")


def _many_digits(coef: np.ndarray, n: int) -> Any:
    """The loss of prefix sums in 40 digits, by substitution."""
    with mpmath.workdps(40):
        exact = np.array([mpmath.mpf(x) for x in coef.tolist()])
        decoder = np.full(n, mpmath.mpf(0))
        for t in range(n):
            known = decoder[max(0, t - coef.size + 1) : t][::-1]
            decoder[t] = (1 - exact[1 : 1 + known.size] @ known) / exact[0]
        weights = (n - np.arange(n)).tolist()
        return (decoder**2 @ np.array(weights) / n) * (exact @ exact)


def _compare_with_many_digits() -> None:
    print("loss of banded Toeplitz against 40 digits")
    for n, bands in ((100_000, 64), (10_000, 512), (4096, 4096)):
        mechanism = BandedToeplitz(n, bands)
        # Any coefficients that decrease: nothing cancels by chance.
        coef = np.arange(1, bands + 1) ** -0.6
        value = float(mechanism.loss(jnp.asarray(coef)))
        way = "transforms" if bands > _toeplitz._MANY else "blocks"
        relative = abs(float(value / _many_digits(coef, n) - 1))
        print(f"  n = {n:6d}, {bands:4d} bands, by {way:10} {relative:.1e}")


def _of_banded(n: int, bands: int) -> tuple[Any, Any, Any]:
    mechanism = BandedToeplitz(n, bands)
    return (
        mechanism.loss,
        lambda: toeplitz.optimize_banded_toeplitz(n, bands),
        lambda: optimize(mechanism.loss, mechanism.initial_params(), rtol=1e-6),
    )


def _of_inverse(n: int, bands: int, participations: int) -> tuple[Any, Any, Any]:
    mechanism = BandedInverseToeplitz(
        n, bands, min_sep=n // participations, max_participations=participations
    )
    start = mechanism.initial_params()
    # What a user of jax-privacy writes, as there is no function for it.
    loss = _upstream_of_inverse(n, participations)
    return (
        mechanism.loss,
        lambda: optimization.optimize(loss, start),
        lambda: optimize(mechanism.loss, start, optimizer=ROBUST_OPTIMIZER, rtol=1e-6),
    )


def _of_blt(n: int, buffers: int, participations: int) -> tuple[Any, Any, Any]:
    options: Any = {
        "min_sep": n // participations,
        "max_participations": participations,
    }
    is_max = participations == 1
    mechanism = BufferedToeplitz(n, buffers, max_error=is_max, **options)
    if is_max:
        loss = buffered_toeplitz.LossFn.build_closed_form_single_participation(n)
    else:
        loss = buffered_toeplitz.LossFn.build_min_sep(n, "mean", **options)

    def theirs() -> jax.Array:
        blt, _ = buffered_toeplitz.optimize_loss(loss, buffers)
        rates = jnp.stack([blt.buf_decay, blt.inverse().buf_decay], axis=1)
        return jnp.log(jnp.diff(-jnp.log(rates.ravel()), prepend=0.0))

    def ours() -> jax.Array:
        start = mechanism.initial_params()
        return optimize(mechanism.loss, start, optimizer=ROBUST_OPTIMIZER, rtol=1e-9)

    return mechanism.loss, theirs, ours


def _of_dense(n: int, participations: int) -> tuple[Any, Any, Any]:
    mechanism = Dense(n, min_sep=n // participations, max_participations=participations)

    def loss(params: jax.Array) -> jax.Array:
        error = mechanism.loss_and_gradient(params)[0]
        return error * mechanism.sensitivity_squared(params)

    def theirs() -> jax.Array:
        strategy = dense.optimize(n, epochs=participations)
        return strategy.T @ strategy

    def ours() -> jax.Array:
        return optimize(
            mechanism.loss_and_gradient,
            mechanism.initial_params(),
            grad=True,
            optimizer=DEFAULT_OPTIMIZER,
            gtol=1e-4,
            max_optimizer_steps=10_000,
        )

    return loss, theirs, ours


PROBLEMS = {
    "banded Toeplitz n=500 b=16": lambda: _of_banded(500, 16),
    "banded Toeplitz n=4000 b=64": lambda: _of_banded(4000, 64),
    "banded inverse n=500 b=8": lambda: _of_inverse(500, 8, 1),
    "banded inverse n=500 b=8 k=4": lambda: _of_inverse(500, 8, 4),
    "BLT max n=1000 d=3": lambda: _of_blt(1000, 3, 1),
    "BLT max n=10^7 d=4": lambda: _of_blt(10**7, 4, 1),
    "BLT max n=10^7 d=6": lambda: _of_blt(10**7, 6, 1),
    "BLT mean n=1000 d=3 k=4": lambda: _of_blt(1000, 3, 4),
    "dense n=64": lambda: _of_dense(64, 1),
    "dense n=64 k=4": lambda: _of_dense(64, 4),
}


def _compare_mechanisms() -> None:
    print(
        f"{'optimized mechanisms':30} {'upstream':>12} {'ours':>12} "
        f"{'ours / up. - 1':>15} {'seconds':>14}"
    )
    for name, problem in PROBLEMS.items():
        loss, theirs, ours = problem()
        results: dict[Callable[[], Any], Any] = {}

        def call(of: Callable[[], Any], results: dict = results) -> Any:
            results[of] = of()
            return results[of]

        times = [seconds(functools.partial(call, of)) for of in (theirs, ours)]
        errors = [float(jnp.sqrt(loss(results[of]))) for of in (theirs, ours)]
        print(
            f"{name:30} {errors[0]:12.6f} {errors[1]:12.6f} "
            f"{errors[1] / errors[0] - 1:15.1e} {times[0]:6.1f} / {times[1]:.1f}"
        )


def main() -> None:
    with jax.enable_x64():
        _compare_losses()
        _compare_blocks_and_transforms()
        _compare_with_many_digits()
        _compare_mechanisms()


if __name__ == "__main__":
    main()
