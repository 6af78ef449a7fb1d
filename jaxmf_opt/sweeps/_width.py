"""How many lanes of a sweep run at the same time."""

import os
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from .._jax.keys import is_key
from .._jax.staging import inside_region
from .._validation import check_untraced
from ._lane import LaneSetting
from ._lanes import Lanes

# On a CPU, the arrays of a batch should stay in the cache of a core: a batch of four
# times as many lanes took 1.3 times as long per lane.
_CACHE = 2**20

# Below this many lanes each operation costs more to start than to do.
_NARROW, _WIDE = 16, 256

# The most that the batches of a CPU may take, and what part of an accelerator's memory.
_MEMORY, _MEMORY_PART = 2**29, 1 / 8
_WIDE_ON_ACCELERATOR = 2**14

# A lane's arrays are there more than once: a masked loop has old and new ones, and they
# are copied into and out of a program.
_COPIES = 4


def num_workers(mesh: Mesh) -> int:
    """How many batches run at a time: XLA runs a small program on one core."""
    if mesh.devices.flat[0].platform != "cpu":
        return 2 if mesh.size == 1 else 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // mesh.size)


def default_width(setting: LaneSetting, lanes: Lanes, mesh: Mesh, workers: int) -> int:
    """The width of a batch that suits the devices, and fits.

    Args:
      setting: What is solved.
      lanes: Where.
      mesh: The devices over which a batch is split.
      workers: How many batches run at a time.

    Returns:
      The width, a multiple of the number of devices.
    """
    device, each = mesh.devices.flat[0], _lane_bytes(setting, lanes)
    if device.platform == "cpu":
        best = np.clip(_CACHE // each, _NARROW, _WIDE)
        most = _MEMORY // (each * workers * mesh.size)
    else:
        limit = (device.memory_stats() or {}).get("bytes_limit", 2**33)
        best = _WIDE_ON_ACCELERATOR
        most = int(limit * _MEMORY_PART) // (each * workers)
    width = 2 ** int(np.log2(max(1, min(best, most))))
    # A few lanes are better shared between all than computed by one.
    of_device = lanes.count // mesh.size
    share = max(-(-of_device // workers), min(_NARROW, of_device))
    return mesh.size * min(width, share)


def narrower_widths(width: int, devices: int) -> list[int]:
    """The widths of batches in which the last lanes go on, widest first."""
    widths = [width]
    while widths[-1] // 8 >= 64 * devices:
        widths.append(widths[-1] // 8 // devices * devices)
    return widths


def _lane_bytes(setting: LaneSetting, lanes: Lanes) -> int:
    """About how much memory a lane takes."""
    hyperparam = lanes.first(1)

    def evaluate(params: PyTree) -> PyTree:
        return setting.value_and_grad(params, hyperparam), setting.first(
            params, hyperparam
        )

    with inside_region():
        closed, out = jax.make_jaxpr(evaluate, return_shape=True)(setting.params)
    check_untraced("what `loss_fn` closes over", closed.consts)
    state = sum(map(_bytes, jax.tree.leaves(out[1])))
    return _COPIES * state + _peak_bytes(closed.jaxpr) + 1


def _peak_bytes(jaxpr: Any) -> int:
    """The most that the results of equations take at the same time."""
    last_use: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for v in eqn.invars:
            if not isinstance(v, jex.Literal):
                last_use[v] = i
    for v in jaxpr.outvars:
        if not isinstance(v, jex.Literal):
            last_use[v] = len(jaxpr.eqns)
    ends: dict[int, int] = {}
    now = peak = 0
    for i, eqn in enumerate(jaxpr.eqns):
        inner = [_peak_bytes(j) for j in jex.jaxprs_in_params(eqn.params)]
        for v in eqn.outvars:
            size = _bytes(v.aval)
            now += size
            end = last_use.get(v, i)
            ends[end] = ends.get(end, 0) + size
        peak = max(peak, now + max(inner, default=0))
        now -= ends.pop(i, 0)
    return peak


def _bytes(aval: Any) -> int:
    return int(np.prod(aval.shape)) * (16 if is_key(aval) else aval.dtype.itemsize)
