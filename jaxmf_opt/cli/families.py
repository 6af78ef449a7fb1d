"""The families of mechanisms that the job offers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..mechanisms import (
    BandedInverseToeplitz,
    BandedToeplitz,
    BufferedToeplitz,
    Dense,
    NormalizedBandedToeplitz,
    workloads,
)


class SetUp(NamedTuple):
    """A training, and the size of a mechanism for it.

    Attributes:
      n: Training steps.
      epochs: How often each example takes part, `n // epochs` steps apart.
      momentum: Momentum of the training algorithm.
      size: Bands, buffers, or for a matrix its rows.
    """

    n: Any
    epochs: Any
    momentum: Any
    size: Any


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of mechanisms as the job offers it.

    Attributes:
      sizes: What its sizes are.
      make: Makes a mechanism of a set-up, whose members may be traced, of the static
        sizes of arrays, and of a workload and other options.
      static: The part of a set-up that may not be traced.
      needed: What training needs, of a mechanism and its parameters.
      kept: How many vectors of noise, as large as the model, training keeps, of a size
        and of what training needs.
      is_matrix: Whether parameters are matrices over steps, and the loss comes with its
        gradient.
      grows: Whether the optimum of one size is the start for the next larger one, which
        need not be of use.
      can_be_amplified: Whether sampling amplifies its privacy, with as many bands as an
        epoch has steps at most.
      starts_in_closed_form: Whether where it starts is a mechanism of the literature.
      batch_size: As in `sweep`.
    """

    sizes: str
    make: Callable[..., Any]
    static: Callable[[SetUp], Any]
    needed: Callable[[Any, Array], dict[str, Array]]
    kept: Callable[[int, dict[str, Array]], int]
    is_matrix: bool = False
    grows: bool = False
    can_be_amplified: bool = False
    starts_in_closed_form: bool = False
    batch_size: int | None = None

    @property
    def has_fixed_order(self) -> bool:
        """Whether several epochs have to be of one length and one order."""
        return self.is_matrix and not self.can_be_amplified


def make_banded(kind: Any) -> Callable[..., Any]:
    """What makes Toeplitz mechanisms of a kind, up to the most bands."""

    def make(s: SetUp, most: SetUp, workload_coef: Array, **options: Any) -> Any:
        bands = {"bands": s.size, "max_bands": most.size}
        return kind(s.n, **bands, workload_coef=workload_coef, **options)

    return make


def _make_buffered(
    s: SetUp, most: SetUp, workload_coef: Array, **options: Any
) -> BufferedToeplitz:
    return BufferedToeplitz(s.n, most.size, workload_coef=workload_coef, **options)


def _make_dense(s: SetUp, most: SetUp, workload_coef: Array, **options: Any) -> Dense:
    del s  # of which all have the same number of rows
    del options["fixed_epochs"]  # which are what it is for
    matrix = workloads.matrix(workload_coef)
    return Dense(most.n, workload_matrix=matrix, **options)


def _make_banded_matrix(*, equal_norm: bool) -> Callable[..., Any]:
    def make(s: SetUp, most: SetUp, workload_coef: Array, **options: Any) -> Dense:
        banded = {"bands": s.size, "equal_norm": equal_norm}
        return _make_dense(s, most, workload_coef, **banded, **options)

    return make


def _strategy_of_norm_1(m: Any, params: Array) -> dict[str, Array]:
    coef = m.strategy_coef(params)[: params.size]
    return {"strategy_coef": coef / jnp.linalg.norm(coef)}


_family_of_matrices = functools.partial(
    Family,
    static=lambda s: s.n,
    needed=lambda m, p: {"strategy_matrix": m.strategy_matrix(p)},
    kept=lambda size, parts: size - 1,
    is_matrix=True,
    # Steps are long, so no lane should wait for another.
    batch_size=1,
)

FAMILIES = {
    "banded-toeplitz": Family(
        sizes="bands",
        make=make_banded(BandedToeplitz),
        static=lambda s: None,
        needed=_strategy_of_norm_1,
        kept=lambda size, parts: size - 1,
        can_be_amplified=True,
        starts_in_closed_form=True,
    ),
    "normalized-banded-toeplitz": Family(
        sizes="bands",
        make=make_banded(NormalizedBandedToeplitz),
        static=lambda s: None,
        needed=_strategy_of_norm_1,
        kept=lambda size, parts: size - 1,
        can_be_amplified=True,
        starts_in_closed_form=True,
    ),
    "banded-inverse-toeplitz": Family(
        sizes="bands",
        make=make_banded(BandedInverseToeplitz),
        static=lambda s: None,
        needed=lambda m, p: {"noising_coef": m.noising_coef(p)[: p.size] / p[0]},
        kept=lambda size, parts: size - 1,
        starts_in_closed_form=True,
    ),
    "blt": Family(
        sizes="buffers",
        make=_make_buffered,
        static=lambda s: s.size,
        needed=lambda m, p: m.buffers(p)._asdict(),
        kept=lambda size, parts: int(np.count_nonzero(parts["output_scale"])),
        grows=True,
    ),
    "column-normalized-banded": _family_of_matrices(
        sizes="bands",
        make=_make_banded_matrix(equal_norm=True),
        can_be_amplified=True,
    ),
    "banded": _family_of_matrices(
        sizes="bands", make=_make_banded_matrix(equal_norm=False)
    ),
    "dense": _family_of_matrices(sizes="rows", make=_make_dense),
}


def make_mechanism(
    make: Callable[..., Any], s: SetUp, most: SetUp, max_error: bool
) -> Any:
    """The mechanism of a set-up."""
    return make(
        s,
        most,
        workloads.momentum(most.n, s.momentum),
        max_error=max_error,
        min_sep=s.n // s.epochs,
        max_participations=1 if most.epochs == 1 else s.epochs,
        fixed_epochs=True,
    )
