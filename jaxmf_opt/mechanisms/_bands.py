"""What the two banded families have in common: a coefficient for each band."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from . import _toeplitz
from ._mechanism import ToeplitzMechanism
from ._setup import (
    Count,
    Flag,
    Number,
    Requirements,
    Static,
    Vector,
    check_bands,
    known,
    steps,
)


class BandedMechanism(ToeplitzMechanism):
    """Mechanisms with a number of bands.

    Attributes:
      bands: The number of bands.
      max_bands: The number of parameters. Those from `bands` on are not looked at.
    """

    bands: Any
    max_bands: int = eqx.field(static=True)

    def __init__(
        self,
        n: Count | None = None,
        bands: Count | None = None,
        *,
        max_bands: Static | None = None,
        workload_coef: Vector | None = None,
        learning_rate: Vector | None = None,
        decay: Number = 1.0,
        min_sep: Count = 1,
        max_participations: Count | None = 1,
        fixed_epochs: Flag = False,
        max_error: Flag = False,
    ):
        """Describes the mechanism that is wanted.

        Args:
          n: Training steps, by default as many as there are in `workload_coef`. An
            array only if `workload_coef` or `learning_rate` is given.
          bands: The number of bands, at most `n` and by default `max_bands`.
          max_bands: The number of parameters, by default `bands`.
          workload_coef: The first column of the workload, shape (max_n,), by default
            that of prefix sums: see `workloads`. Elements from `n` on are not looked
            at.
          learning_rate: That of each step, shape (max_n,), by default 1: see
            `workloads.linear_cooldown`. Errors then take O(n^2) time.
          decay: By what each step multiplies the model before it updates it. It is a
            part of `workload_coef`, and has to be given with a `learning_rate`.
          min_sep: Number of steps from one participation of an example to its next, at
            least.
          max_participations: How often an example takes part, at most; None for as
            often as fits.
          fixed_epochs: Whether participations are exactly `min_sep` steps apart, as in
            epochs of a fixed order.
          max_error: Whether the error is the largest of all steps, and not their mean.

        Raises:
          TypeError: If an argument is of the wrong type.
          ValueError: If an argument is impossible. Where one is traced this cannot be
            seen, and every result of the mechanism is NaN.
        """
        super().__init__(
            n,
            workload_coef=workload_coef,
            learning_rate=learning_rate,
            decay=decay,
            min_sep=min_sep,
            max_participations=max_participations,
            fixed_epochs=fixed_epochs,
            max_error=max_error,
        )
        requirements = Requirements(self.valid)
        self.bands, self.max_bands = check_bands(requirements, bands, max_bands, self.n)
        self.valid = requirements.valid

    @property
    def _num_params(self) -> int:
        return self.max_bands

    def _cut(self, coef: Array) -> Array:
        """Coefficients, 0 from `bands` on."""
        return jnp.where(steps(coef.size) < self.bands, coef, 0.0)

    def _of_bands(self, coef: Array) -> Array:
        """Coefficients, as few as can be known."""
        return self._cut(coef)[: known(self.bands, coef.size)]

    def _padded(self, coef: Array) -> Array:
        """A column of the right length."""
        return jnp.pad(coef[: self.max_n], (0, max(0, self.max_n - coef.size)))

    def _root_of_workload(self) -> Array:
        """The leading coefficients of the square root of the workload as a matrix."""
        if self.workload_coef is None:
            k = np.arange(1, self.max_bands)
            return jnp.cumprod(jnp.append(jnp.ones(1), 1 - 0.5 / k))
        coef = jnp.asarray(self.workload_coef)[: self.max_bands]
        coef = jnp.pad(coef, (0, self.max_bands - coef.size))
        return _toeplitz.square_root(coef)
