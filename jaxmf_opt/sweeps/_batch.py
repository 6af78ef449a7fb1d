"""Programs for a batch of lanes: vectorised, split over devices, compiled once."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    Sharding,
    SingleDeviceSharding,
)
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from .._jax.debugging import no_alarms, own_transfers
from .._jax.keys import as_numpy
from .._jax.lapack import evaluate_one_by_one
from .._jax.loss_callbacks import has_callbacks
from .._jax.staging import hoist, inside_region, struct
from .._jax.structure import CACHE_SIZE, Structure

# The name of the axis that is mapped on each device. A loss may not use it.
AXIS = "lanes of a sweep"

_DEVICES = "devices of a sweep"


def local_mesh(devices: list[Any]) -> Mesh:
    """The mesh over which the lanes of a batch are split.

    Inside of `jax.set_mesh` types may name that mesh, so its programs must run on it,
    and lanes are not split: all its devices work on each.
    """
    if not mesh_around().empty:
        devices = devices[:1]
    return Mesh(np.array(devices), (_DEVICES,))


class BatchProgram:
    """A function of a lane, compiled for all lanes of a batch.

    Each device runs a loop of its own over its part of the batch: there is nothing in
    the program that communicates between devices.

    Attributes:
      structs: What it returns, per lane.
      asks_python: Whether values are computed by Python functions, which are not told
        apart by `digest`.
    """

    def __init__(
        self,
        fn: Callable[..., PyTree],
        mapped: PyTree,
        shared: PyTree,
        mesh: Mesh,
    ):
        """Compiles it, unless the process has a program of the same structure.

        Args:
          fn: Takes `mapped` and `shared`, for one lane.
          mapped: Arrays, or their `jax.ShapeDtypeStruct`s, axis 0 over the lanes.
          shared: The same without such an axis.
          mesh: The devices, by whose number the lanes can be divided.
        """
        leaves, in_tree = jax.tree.flatten((mapped, shared))
        num_mapped = len(jax.tree.leaves(mapped))
        self.structs: PyTree = None
        out_tree: Any = None

        def one(mapped: PyTree, shared: PyTree) -> PyTree:
            out = fn(mapped, shared)
            self.structs = jax.tree.map(struct, out)
            return out

        def flat(*leaves: Any) -> list[Any]:
            nonlocal out_tree
            args = jax.tree.unflatten(in_tree, leaves)
            out = jax.vmap(one, in_axes=(0, None), axis_name=AXIS)(*args)
            out, out_tree = jax.tree.flatten(out)
            return out

        def on_a_device(x: Any) -> jax.ShapeDtypeStruct:
            shape = (x.shape[0] // mesh.size, *x.shape[1:])
            return struct(jax.ShapeDtypeStruct(shape, x.dtype))

        structs = [*map(on_a_device, leaves[:num_mapped])]
        structs += [struct(x) for x in leaves[num_mapped:]]
        with inside_region():
            closed, consts = hoist(jax.make_jaxpr(flat)(*structs))
            _check_consts(consts, mesh)
            self._consts = [_place(const, mesh) for const in consts]
            self._out_tree = out_tree
            self.asks_python = has_callbacks(closed.jaxpr, debug=False)
            is_mapped = [False] * len(consts) + [True] * num_mapped
            is_mapped += [False] * (len(leaves) - num_mapped)
            where = tuple(const.sharding for const in self._consts)
            program = _compile(Structure(closed), tuple(is_mapped), mesh, where)
        self._run, self._text_digest = program

    def __call__(self, mapped: PyTree, shared: PyTree) -> PyTree:
        """Runs it, on arrays of the shapes and dtypes that it was compiled for."""
        with no_alarms(), own_transfers():
            out = self._run(*self._consts, *jax.tree.leaves((mapped, shared)))
        return jax.tree.unflatten(self._out_tree, out)

    @property
    def digest(self) -> str:
        """Equal for programs that compute the same thing of the same constants."""
        return digest_of(self._text_digest, *self._consts)


def mesh_around() -> Mesh:
    """The mesh of `jax.set_mesh`; none while a program is traced."""
    try:
        return jax.sharding.get_mesh()
    except (AssertionError, ValueError):
        return Mesh(np.empty((), object), ())


def digest_of(*parts: Any) -> str:
    """A digest of texts and arrays."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            sha.update(part.encode())
        else:
            array = as_numpy(part)
            sha.update(f"{array.dtype}{array.shape}".encode())
            sha.update(array.tobytes())
    return sha.hexdigest()[:16]


def _sharding(mesh: Mesh, spec: P) -> Sharding:
    if mesh.size > 1:
        return NamedSharding(mesh, spec)
    around = mesh_around()
    if not around.empty:  # each of its devices does the same, on its part of the data
        return NamedSharding(around, P())
    return SingleDeviceSharding(mesh.devices.flat[0])


def _place(const: Array, mesh: Mesh) -> Array:
    """Puts what all lanes share on all devices; leaves what a mesh around has split."""
    if mesh.size == 1 and const.sharding.device_set == set(mesh_around().devices.flat):
        return const
    return jax.device_put(const, _sharding(mesh, P()))


def _check_consts(consts: list[Array], mesh: Mesh) -> None:
    """Refuses arrays whose types name another mesh, as those of loops over them do."""
    if not mesh_around().empty:
        return
    for const in consts:
        of_const = jax.typeof(const).sharding.mesh
        is_split = mesh.size > 1 or AxisType.Explicit in of_const.axis_types
        if not of_const.empty and is_split:
            raise ValueError(
                "sweep: `loss_fn` or an option closes over an array that is on a mesh, "
                f"{jax.typeof(const)} on {of_const.shape}. Make it a NumPy array, or "
                "call `sweep` inside `jax.set_mesh` of that mesh."
            )


@functools.lru_cache(maxsize=CACHE_SIZE)
def _compile(
    structure: Structure,
    is_mapped: tuple[bool, ...],
    mesh: Mesh,
    where: tuple[Sharding, ...],
) -> tuple[Callable[..., list[Any]], str]:
    """The compiled program, and a digest of the text of its part for one device."""
    lowered = part = _lower(structure, is_mapped, mesh, where)
    if mesh.size > 1:
        part = _lower(structure, is_mapped, local_mesh([mesh.devices.flat[0]]))
    return lowered.compile(), digest_of(part.as_text())


def _lower(
    structure: Structure,
    is_mapped: tuple[bool, ...],
    mesh: Mesh,
    where: tuple[Sharding, ...] = (),
) -> Any:
    fn = evaluate_one_by_one(structure.jaxpr)
    specs = tuple(P(_DEVICES) if m else P() for m in is_mapped)
    if mesh.size > 1:
        fn = jax.shard_map(
            fn, mesh=mesh, in_specs=specs, out_specs=P(_DEVICES), check_vma=False
        )
    shardings = [_sharding(mesh, spec) for spec in specs]
    shardings[: len(where)] = where
    structs = [
        jax.ShapeDtypeStruct(
            (a.shape[0] * mesh.size, *a.shape[1:]) if m else a.shape,
            a.dtype,
            sharding=sharding,
        )
        for a, m, sharding in zip(
            structure.jaxpr.in_avals, is_mapped, shardings, strict=True
        )
    ]
    out = _sharding(mesh, P(_DEVICES))
    return jax.jit(fn, out_shardings=out).lower(*structs)
