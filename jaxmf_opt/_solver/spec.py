"""All of a solve but its arrays: a frozen, hashable value."""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import optax

from .._typing import Tolerance
from .compiled_callbacks import CompiledCallbacks
from .objective import Program
from .optimizers import optimizer_key


class Tolerances(NamedTuple):
    """When to stop: see `LeanOptaxMinimiser`.

    Attributes:
      rtol: Relative tolerance of the Cauchy criterion.
      atol: Absolute tolerance of the Cauchy criterion.
      gtol: Tolerance for the max-norm of the gradient.
    """

    rtol: Tolerance = 0.0
    atol: Tolerance = 0.0
    gtol: Tolerance = 0.0

    @property
    def off(self) -> bool:
        """Whether all are known to be 0, so that no test needs to be compiled."""
        return all(not isinstance(t, jax.Array) and t == 0 for t in self)


@dataclasses.dataclass(frozen=True, eq=False)
class SolveSpec:
    """All of a solve but its arrays.

    Specifications are equal, and hashable, where they compute the same thing. One whose
    optimizer cannot be compared equals only itself.

    Attributes:
      program: What the loss computes.
      optimizer: The optax transformation.
      dtypes: The dtype that each leaf of the parameters gets in the end.
      int_dtype: The dtype that counts get in the end.
      float_dtype: The dtype that losses and norms get in the end.
      tests: Whether the tolerances are looked at.
      history: How many steps to record, if any.
      callbacks: What is called after each step of a compiled solve. None if nobody
        sees the steps, so that those that change nothing can be left out.
    """

    program: Program
    optimizer: optax.GradientTransformation
    dtypes: tuple[Any, ...]
    int_dtype: Any
    float_dtype: Any
    tests: bool
    history: int | None = None
    callbacks: CompiledCallbacks | None = None

    @property
    def is_seen(self) -> bool:
        """Whether there are callbacks, which see each step."""
        return self.callbacks is not None

    @property
    def cacheable(self) -> bool:
        """Whether another specification can ever be equal to this one."""
        return self._key is not None

    @functools.cached_property
    def _key(self) -> Hashable | None:
        optimizer_id = optimizer_key(self.optimizer)
        if optimizer_id is None:
            return None
        of = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return tuple((of | {"optimizer": optimizer_id}).values())

    def __hash__(self) -> int:
        return id(self) if self._key is None else hash(self._key)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SolveSpec) or self._key is None:
            return self is other
        return self._key == other._key
