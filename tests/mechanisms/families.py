"""The Toeplitz families in tests: set-ups, and upstream's numbers for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy.matrix_factorization import buffered_toeplitz, toeplitz

from jaxmf_opt.mechanisms import (
    BandedInverseToeplitz,
    BandedToeplitz,
    BufferedToeplitz,
    workloads,
)

MAX_N, MAX_SIZE = 40, 6


class SetUp(NamedTuple):
    """Hyperparameters, all of which can be arrays."""

    n: Any
    bands: Any
    min_sep: Any
    participations: Any
    momentum: Any
    max_error: Any


SET_UPS = [
    SetUp(1, 1, 1, 1, 0.0, False),
    SetUp(12, 6, 5, 1, 0.0, True),
    SetUp(33, 3, 11, 3, 0.9, False),
    SetUp(40, 6, 6, 7, 0.5, True),
    SetUp(40, 4, 1, 40, 0.0, False),  # an example takes part in each step
    SetUp(39, 5, 2, 4, 0.95, False),  # columns have rows in common
]


def columns(setups: list[SetUp]) -> SetUp:
    return SetUp(*(jnp.array(column) for column in zip(*setups, strict=True)))


def mechanism(family: str, s: SetUp) -> Any:
    """A mechanism whose set-up is in arrays, which are as long as the longest."""
    options = {
        "n": s.n,
        "workload_coef": workloads.momentum(MAX_N, s.momentum),
        "min_sep": s.min_sep,
        "max_participations": s.participations,
        "max_error": s.max_error,
    }
    if family == "buffered":
        return BufferedToeplitz(num_buffers=MAX_SIZE // 2, **options)
    kind = {"banded": BandedToeplitz, "inverse": BandedInverseToeplitz}[family]
    return kind(bands=s.bands, max_bands=MAX_SIZE, **options)


def params(family: str, i: int) -> np.ndarray:
    """Random parameters; banded ones decrease, or their inverse does."""
    rng = np.random.default_rng(i)
    if family == "buffered":
        return rng.uniform(-4, 0, MAX_SIZE)
    if family == "banded":
        return np.sort(rng.uniform(0.1, 1, MAX_SIZE))[::-1]
    # Of (1 - a x)^{1/2}, cut: then the strategy's are positive and decrease.
    k = np.arange(1, MAX_SIZE)
    root = np.append(1.0, np.cumprod((k - 1.5) / k))
    return root * rng.uniform(0.7, 1) ** np.arange(MAX_SIZE)


def upstream(family: str, s: SetUp) -> Callable[[jax.Array], jax.Array]:
    """jax-privacy's loss of our parameters, by its own definitions."""
    workload_coef = jnp.array(
        [sum(s.momentum**i for i in range(t + 1)) for t in range(s.n)]
    )

    def pieces(p: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The strategy's coefficients, and what errors are computed from."""
        if family == "banded":
            return p[: s.bands], {"strategy_coef": p[: s.bands]}
        if family == "inverse":
            noising_coef = jnp.pad(p[: s.bands], (0, s.n - s.bands))
            inverse = toeplitz.inverse_coef(noising_coef, s.n)
            return inverse, {"noising_coef": noising_coef}
        rates = jnp.cumsum(jnp.exp(p))
        pair = buffered_toeplitz.blt_pair_from_theta_pair(
            jnp.exp(-rates[::2]), jnp.exp(-rates[1::2])
        )
        strategy, noising = (blt.toeplitz_coefs(max(s.n, 2))[: s.n] for blt in pair)
        return strategy, {"noising_coef": noising}

    def loss(p: jax.Array) -> jax.Array:
        strategy_coef, known = pieces(p)
        errors = toeplitz.per_query_error(
            n=s.n, workload_coef=workload_coef, skip_checks=True, **known
        )
        sensitivity_squared = toeplitz.minsep_sensitivity_squared(
            strategy_coef, s.min_sep, s.participations, n=s.n, skip_checks=True
        )
        return (errors[-1] if s.max_error else jnp.mean(errors)) * sensitivity_squared

    return loss
