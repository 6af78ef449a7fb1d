"""Which steps the same example takes part in, in epochs of a fixed order."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ._setup import steps


@dataclasses.dataclass(frozen=True)
class FixedOrder:
    """Participations exactly `min_sep` steps apart; any number may be traced.

    Attributes:
      n: Training steps.
      max_n: The size of arrays over steps.
      min_sep: Number of steps from one participation of an example to its next.
      max_participations: How often an example takes part.
    """

    n: Any
    max_n: int
    min_sep: Any
    max_participations: Any

    @property
    def inside(self) -> Bool[Array, " max_n"]:
        """Which steps there are."""
        return jnp.asarray(steps(self.max_n) < self.n)

    @property
    def both_inside(self) -> Bool[Array, "max_n max_n"]:
        """Which pairs of steps there are."""
        return self.inside[:, None] & self.inside[None, :]

    @property
    def apart(self) -> np.ndarray:
        """How many steps lie between the two of a pair, shape (max_n, max_n)."""
        return steps(self.max_n)[:, None] - steps(self.max_n)[None, :]

    @property
    def period(self) -> Any:
        """After how many steps the same example takes part; for one, never."""
        if isinstance(self.max_participations, int) and isinstance(self.n, int):
            return self.n if self.max_participations == 1 else self.min_sep
        once = self.max_participations == 1
        return jnp.maximum(jnp.where(once, self.n, self.min_sep), 1)

    @property
    def together(self) -> Bool[Array, "max_n max_n"]:
        """In which pairs of steps the same example takes part."""
        return jnp.asarray(self.apart % self.period == 0)

    def sums(self, of_steps: Float[Array, " max_n"]) -> Float[Array, " max_n"]:
        """For each step the sum over those in which the same example takes part."""
        classes = jnp.asarray(steps(self.max_n) % self.period)
        return jax.ops.segment_sum(of_steps, classes, self.max_n)[classes]
