"""Many solves as one job: checks the call, and says how it is to be run."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .._jax.debugging import no_alarms
from .._jax.fork import check_process
from .._jax.staging import inside_region
from .._jax.x64 import caller_dtype, float64_struct
from .._solver.compiled_callbacks import compile_callbacks
from .._solver.optimizers import DEFAULT_OPTIMIZER, closed_over
from .._solver.solution import Solution, throw_failure
from .._solver.spec import Tolerances
from .._solver.state import SolverState
from .._typing import PyTree, Tolerance
from .._validation import (
    check_callable,
    check_flag,
    check_history,
    check_optimizer,
    check_params,
    check_path,
    check_state,
    check_steps,
    check_tolerance,
    check_untraced,
)
from ..callbacks._args import (
    CallbackFnType,
    combine,
    flatten_callbacks,
    traced,
)
from ._batch import digest_of, local_mesh
from ._checkpoints import CheckpointStore, Layout, check_directory, is_kept
from ._collect import as_arrays, solve_lanes
from ._lane import LaneSetting, is_function
from ._lanes import Lanes, as_pair, axis_of_each_leaf, lanes_of
from ._processes import gather, lanes_by_process, own_devices
from ._progress import ProgressBar
from ._runner import BatchRunner, CallbackStopIterationError
from ._width import default_width, num_workers

# What lowers and compiles a loss.
_COMPILERS = ("jax", "jaxlib")


def sweep(
    loss_fn: Callable[..., Any],
    params: PyTree,
    hyperparams: PyTree,
    *,
    in_axes: Any = (None, 0),
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    keep_states: bool = True,
    max_optimizer_steps: int = 250,
    grad: bool = False,
    callback: CallbackFnType | None = None,
    optimizer: Any = DEFAULT_OPTIMIZER,
    rtol: Tolerance | Callable[[PyTree], Any] = 1e-8,
    atol: Tolerance | Callable[[PyTree], Any] = 0.0,
    gtol: Tolerance | Callable[[PyTree], Any] = 0.0,
    state: SolverState | Sequence[Any] | None = None,
    history: bool = False,
    throw: bool = False,
) -> Solution:
    """Minimises a loss for each of many hyperparameters, in batches.

    Each lane is a `solve` of its own, of `lambda params: loss_fn(params, hyperparam)`.
    Lanes run in batches of one compiled program. A batch stops when most of its lanes
    have ended, and the others go on together, so that no lane waits long for another.
    On CPUs as many batches run at a time as there are cores.

    It is called from ordinary Python, and has no derivative. Inside of a compiled
    program, `jax.vmap` a `solve` instead.

    Args:
      loss_fn: Takes parameters and a hyperparameter, and returns what `solve` expects
        of its loss. What it closes over is shared by all lanes.
      params: The starting points.
      hyperparams: The hyperparameters, any pytree.
      in_axes: Where the axes over lanes are in `params` and `hyperparams`, as in
        `jax.vmap`: by default all lanes start at the same point, and every array of
        `hyperparams` has its lanes in front. `(0, None)` is many starts of one problem.
      batch_size: How many lanes are in a batch, on all devices of the mesh together. By
        default as many as suit the size of loss and state, and fit.
      mesh: Devices over which lanes are split, in the order of their axes. Their number
        must divide the number of lanes. Each device works by itself. If the mesh spans
        the processes of `jax.distributed`, each solves the lanes of its devices, and
        all of them return the whole. By default it is JAX's default device. Inside of
        `jax.set_mesh` lanes are not split; the mesh set there does all the work.
      progress: Whether to show lanes done, lanes failed, rate, time left and the least
        loss so far. (Of several processes, the first shows its own part.)
      checkpoint_dir: A directory in which to keep the batches that are done. The same
        call goes on from there, after whatever has ended the process, also with another
        number of devices or cores: it keeps the width of batches, and how they were
        split, that the directory says. Lanes that have ended keep their bits. The
        others get the bits that they would have got without an interruption, as long
        as the compiler (the release of jaxlib, `XLA_FLAGS`) and the kind of processor
        are the same; else they may differ as the results of any two programs that XLA
        rounds differently. (XLA splits single large operations, such as products of
        large matrices, over cores: then their number is part of that.) Another minor
        release of JAX, or another platform, is refused; so are values that a loss asks
        of Python functions, which may be other ones the next time.
      keep_states: Whether the solution has the state of each lane, which is most of its
        size. Without, `state` is None.
      max_optimizer_steps: As in `solve`.
      grad: As in `solve`.
      callback: As in `solve`. A Python one is called on the calling thread, between
        compiled steps, once for each lane that made one; `info.lane.index` has the
        number of the lane, and arrays are NumPy's. Batches then run one after the
        other, and it cannot be together with `checkpoint_dir`.
      optimizer: An optax transformation, or a function that makes one of a lane's
        hyperparameter, which is traced: learning rates and constants of the line search
        can be swept, but not sizes of arrays.
      rtol: As in `solve`, or a function of a lane's hyperparameter.
      atol: Likewise.
      gtol: Likewise.
      state: The `state` of an earlier sweep of the same lanes, to go on from.
      history: As in `solve`.
      throw: As in `solve`; all lanes are solved before.

    Returns:
      A solution as that of `solve`, with an axis over lanes in front of every array.

    Raises:
      TypeError: If an argument is of the wrong kind, or traced.
      ValueError: If an argument has an impossible value; if there are no lanes, arrays
        disagree about their number, or the mesh does not divide it; if `checkpoint_dir`
        belongs to another sweep, or does not say to which.
      RuntimeError: If the process was forked off one that had used JAX.
      OSError: If `checkpoint_dir` cannot be written, or another sweep is at work in it.
      ModuleNotFoundError: With `progress`, if tqdm is not installed.
      SweepInterrupted: A `KeyboardInterrupt` that has the lanes which have ended.
      equinox.EquinoxRuntimeError: With `throw`, if a lane has failed.

    Warns:
      UserWarning: If a file of `checkpoint_dir` is damaged, or of another sweep, so
        that lanes are solved again. The file is left as it is.

    Example:
      >>> loss = lambda x, target: jnp.sum((x - target) ** 2)
      >>> solution = sweep(loss, jnp.zeros(2), jnp.arange(3.0), gtol=1e-9)
      >>> solution.value[:, 0]
      Array([0., 1., 2.], dtype=float32)
    """
    check_process()
    check_callable("loss_fn", loss_fn, arguments=2)
    check_params(params)
    max_steps = check_steps(max_optimizer_steps)
    if callback is not None:
        check_callable("callback", callback)
    flags = {"grad": grad, "history": history, "throw": throw, "progress": progress}
    for name, value in (flags | {"keep_states": keep_states}).items():
        check_flag(name, value)
    check_history(history, max_steps)
    tolerances = Tolerances(*cast(Any, (rtol, atol, gtol)))
    check_untraced("its arguments", params, hyperparams, state, tolerances)
    problems = [("params", params), ("hyperparams", hyperparams)]
    axes = as_pair(in_axes)
    lanes = lanes_of(problems, axes)
    mesh = _check_mesh(mesh, lanes.count)
    width = _check_batch_size(batch_size, mesh)
    _check_options(lanes, optimizer, tolerances)
    if checkpoint_dir is not None:
        check_path("checkpoint_dir", checkpoint_dir)
    compiled, on_host = _split(callback)
    if on_host and checkpoint_dir is not None:
        raise ValueError(
            "`checkpoint_dir` cannot keep what a Python `callback` remembers of its "
            "lanes; mark it as `traced`, or give a sweep only one of the two."
        )
    setting = LaneSetting(
        loss_fn,
        grad,
        optimizer,
        tolerances,
        max_steps,
        callbacks=None,
        callback_consts=(),
        params=jax.tree.map(float64_struct, lanes.first(0)),
        dtypes=[caller_dtype(x, in_program=False) for x in jax.tree.leaves(params)],
        int_dtype=jnp.result_type(int),
        float_dtype=jnp.result_type(float),
        tests=any(is_function(t) or not Tolerances(t).off for t in tolerances),
        history=max_steps if history else None,
    )
    like = _state_structs(setting, lanes)
    if compiled or on_host:
        callbacks, callback_consts = compile_callbacks(combine(*compiled), like[0])
        check_untraced("what `callback` closes over", callback_consts)
        setting = setting._replace(callbacks=callbacks, callback_consts=callback_consts)
    if state is not None:
        count = lanes.count
        in_lanes = [
            jax.tree.map(lambda s: jax.ShapeDtypeStruct((count, *s.shape), s.dtype), s)
            for s in like
        ]
        state = check_state(state, *in_lanes)
    lanes = lanes.with_state(state)

    everyone = lanes_by_process(mesh, lanes.count)
    mine = everyone[jax.process_index() if len(everyone) > 1 else 0]
    lanes = Lanes(mine.size, lanes.take(mine), lanes.shared)
    local = local_mesh(own_devices(mesh))
    host_callback = combine(*on_host) if on_host else None
    workers = num_workers(local)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64())
        # (Which traces the loss, before anything is compiled.)
        suitable = default_width(setting, lanes, local, workers)
        if width is not None:
            width = min(width * local.size // mesh.size, mine.size)
        store, begun = None, None
        if checkpoint_dir is not None:
            check_directory(checkpoint_dir)
            directory = _own_directory(checkpoint_dir, len(everyone))
            check_directory(directory)
            store = stack.enter_context(CheckpointStore(directory))
            begun = store.layout
        layout = begun or Layout(width or suitable, local.size)
        runner = BatchRunner(setting, lanes, mine, local, host_callback, workers)
        if store is not None:
            identity = _identity(runner, lanes, layout, width, keep_states)
            releases = {name: version(name) for name in _COMPILERS}
            store.begin(identity, layout, releases)
        show = progress and not jax.process_index()
        progress_bar = stack.enter_context(ProgressBar(lanes.count, show=show))
        try:
            solution = solve_lanes(
                runner, lanes.count, layout, store, progress_bar, keep_states
            )
        except CallbackStopIterationError as e:
            raise e.original from None
        with no_alarms():  # NaN are the rows of steps that were not taken
            solution = as_arrays(gather(solution, everyone), like[0])
    of_leaves = axis_of_each_leaf("hyperparams", hyperparams, axes[1])
    if any(axis != 0 for axis in of_leaves):
        solution = dataclasses.replace(solution, hyperparam_axes=tuple(of_leaves))
    return throw_failure(solution) if throw else solution


def _check_mesh(mesh: Any, count: int) -> Mesh:
    """The mesh, or one of JAX's default device."""
    if mesh is None:
        return local_mesh([next(iter(jnp.zeros(()).devices()))])
    if not isinstance(mesh, Mesh):
        raise TypeError(
            "`mesh` must be None or a `jax.sharding.Mesh` of devices, such as "
            f"`jax.make_mesh((jax.device_count(),), ('lanes',))`, got {mesh!r}."
        )
    if not mesh.size or count % mesh.size:
        raise ValueError(
            f"`mesh` must have a number of devices that divides the {count} lanes, got "
            f"{mesh.size}. Take fewer of them, or fill up the lanes with copies."
        )
    if len({d.id for d in mesh.devices.flat}) < mesh.size:
        raise ValueError("`mesh` must have each device once, got one several times.")
    owners = {d.process_index for d in mesh.devices.flat}
    if owners not in ({jax.process_index()}, set(range(jax.process_count()))):
        raise ValueError(
            "`mesh` must have devices of this process alone, or of every one of the "
            f"{jax.process_count()} processes; got those of {sorted(owners)}."
        )
    return mesh


def _check_batch_size(batch_size: Any, mesh: Mesh) -> int | None:
    if batch_size is None:
        return None
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)):
        raise TypeError(
            f"`batch_size` must be None or an integer, got {batch_size!r} of type "
            f"{type(batch_size).__name__}."
        )
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(
            f"`batch_size` must be a positive multiple of {mesh.size}, the number of "
            f"devices, got {batch_size}."
        )
    return int(batch_size)


def _check_options(lanes: Lanes, optimizer: Any, tolerances: Tolerances) -> None:
    """Checks the options of all lanes that depend on their hyperparameters."""
    mapped = lanes.mapped[1]
    if is_function(optimizer):
        check_callable("optimizer", optimizer)
        optimizer = optimizer(lanes.first(1))
    check_optimizer(optimizer)
    check_untraced("`optimizer`", closed_over(optimizer))
    for name, tolerance in tolerances._asdict().items():
        if not is_function(tolerance):
            check_tolerance(name, tolerance)
            continue
        check_callable(name, tolerance)

        def of_lane(m: PyTree, name: str = name, tolerance: Any = tolerance) -> Any:
            value = tolerance(lanes.argument(1, m))
            check_tolerance(name, value)
            return jnp.asarray(value)

        with jax.enable_x64():
            is_mapped = bool(jax.tree.leaves(mapped))
            every = jax.vmap(of_lane)(mapped) if is_mapped else of_lane(mapped)
            check_untraced(f"`{name}`", every)
            for value in np.ravel(every):
                check_tolerance(name, value)


def _split(
    callback: CallbackFnType | None,
) -> tuple[list[traced], list[CallbackFnType]]:
    """The callbacks that are compiled, and those that are not."""
    callbacks = flatten_callbacks(callback)
    compiled = [c for c in callbacks if isinstance(c, traced)]
    return compiled, [c for c in callbacks if not isinstance(c, traced)]


def _state_structs(setting: LaneSetting, lanes: Lanes) -> list[SolverState]:
    """The state of a lane; and the other kind that a lane can go on from."""
    hyperparam = lanes.first(1)
    with inside_region():
        return [
            jax.eval_shape(
                lambda params, tests=tests: setting._replace(
                    tests=tests, history=None
                ).first(params, hyperparam),
                setting.params,
            )
            for tests in (setting.tests, not setting.tests)
        ]


def _own_directory(directory: str | os.PathLike[str], processes: int) -> Path:
    """The directory of this process; refuses that of other numbers of processes."""
    of_one, of_first = Path(directory), Path(directory) / "0"
    is_one = processes == 1
    if is_kept(of_first if is_one else of_one):
        there, here = ("several", "one") if is_one else ("one", "several")
        raise ValueError(
            f"`checkpoint_dir` {str(directory)!r} belongs to another sweep, which "
            f"differs in: processes (there {there}, here {here}). Repeat that call, "
            "remove the directory, or give another."
        )
    return of_one if is_one else of_one / f"{jax.process_index()}"


def _identity(
    runner: BatchRunner,
    lanes: Lanes,
    layout: Layout,
    width: int | None,
    keep_states: bool,
) -> dict[str, str]:
    """What has to be the same where a sweep goes on: all that its bits depend on.

    They do not depend on how many batches run at a time, nor on which device. The
    number of devices and a default width are those of the run that began.
    """
    of_device = layout.width // layout.devices
    programs = runner.programs(of_device * runner.mesh.size)
    if any(program.asks_python for program in programs):
        raise ValueError(
            "`checkpoint_dir` cannot tell whether Python functions have changed, and "
            "`loss_fn` asks some by `jax.pure_callback` or `io_callback`. Compute in "
            "JAX, or give a sweep only one of the two."
        )
    return {
        # Another minor release may round otherwise, a patch release should not.
        **{name: ".".join(version(name).split(".")[:2]) for name in _COMPILERS},
        "loss, options and what all lanes share": digest_of(
            *(program.digest for program in programs)
        ),
        "what differs between lanes": digest_of(*jax.tree.leaves(lanes.mapped)),
        "lanes of this process": str(lanes.count),
        "batch_size of this process": str(width or layout.width),
        "platform": runner.mesh.devices.flat[0].platform,
        "keep_states": str(keep_states),
    }
