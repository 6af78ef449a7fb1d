"""Derivatives that a float64 region brings, and those of a batch of regions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class Rule(NamedTuple):
    """The derivative of a region that brings its own.

    Attributes:
      tangent: As in `x64_region`.
      num_consts: How many operands stand in front of the arguments. They have none.
      in_tree: The structure of the arguments.
      out_tree: The structure of the results.
    """

    tangent: Any
    num_consts: int
    in_tree: Any
    out_tree: Any

    def jvp(
        self, primals: Sequence[Any], out: Sequence[Any], tangents: Sequence[Any]
    ) -> list[Any]:
        """The tangents of the results `out`, None where they are zero."""
        dots = self.tangent(
            *jax.tree.unflatten(self.in_tree, primals[self.num_consts :]),
            jax.tree.unflatten(self.out_tree, out),
            jax.tree.unflatten(self.in_tree, tangents[self.num_consts :]),
        )
        return self.out_tree.flatten_up_to(dots)

    @property
    def transposes(self) -> bool:
        """Whether the tangent has a method that does."""
        return hasattr(self.tangent, "transpose")

    def transpose(
        self, operands: Sequence[Any], cotangents: Sequence[Any]
    ) -> list[Any]:
        """Cotangents of the operands that are None."""
        args = jax.tree.unflatten(self.in_tree, operands[self.num_consts :])
        cts = jax.tree.unflatten(self.out_tree, cotangents)
        return jax.tree.leaves(self.tangent.transpose(*args, cts))

    @property
    def look(self) -> Callable[[Sequence[Array]], None] | None:
        """Looks at the results, if the tangent has a method that does."""
        look = getattr(self.tangent, "look", None)
        if look is None:
            return None
        return lambda out: look(jax.tree.unflatten(self.out_tree, out))


class BatchedRule(NamedTuple):
    """The derivative of a batch of such regions: the batch of the derivatives."""

    rule: "Rule | BatchedRule"
    dims: tuple[int | None, ...]
    axis: tuple[Any, Any, Any]

    def _lanes(self, fn: Callable[..., Any], in_axes: Any) -> Callable[..., Any]:
        size, name, spmd_name = self.axis
        return jax.vmap(
            fn, in_axes, axis_size=size, axis_name=name, spmd_axis_name=spmd_name
        )

    def _dims(self, given: Sequence[Any]) -> list[int | None]:
        """Those of what is given."""
        return [None if x is None else d for x, d in zip(given, self.dims, strict=True)]

    def jvp(
        self, primals: Sequence[Any], out: Sequence[Any], tangents: Sequence[Any]
    ) -> list[Any]:
        """The tangents of the results `out`, None where they are zero."""
        in_axes = (list(self.dims), 0, self._dims(tangents))
        with jax.enable_x64():  # (and no more: this binds regions, it is in none)
            return self._lanes(self.rule.jvp, in_axes)(
                list(primals), list(out), list(tangents)
            )

    @property
    def transposes(self) -> bool:
        """Whether the tangent has a method that does."""
        return self.rule.transposes

    def transpose(
        self, operands: Sequence[Any], cotangents: Sequence[Any]
    ) -> list[Any]:
        """Cotangents of the operands that are None."""
        with jax.enable_x64():
            of_lanes = self._lanes(self.rule.transpose, (self._dims(operands), 0))(
                list(operands), list(cotangents)
            )
            linear = [d for x, d in zip(operands, self.dims, strict=True) if x is None]
            return [
                jnp.sum(ct, axis=0) if d is None else jnp.moveaxis(ct, 0, d)
                for ct, d in zip(of_lanes, linear, strict=True)
            ]

    @property
    def look(self) -> Callable[[Sequence[Array]], None] | None:
        """Looks at the results of all lanes."""
        return self.rule.look
