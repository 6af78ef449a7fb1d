"""Ready-made callbacks, to be given to `optimize` alone or in a `combine`.

`small_gradient` is compiled into the solve. The others run in Python: between the steps
of an eager solve; called from the compiled loop inside `jax.jit`, `jax.vmap` and the
like, where they keep apart what they know of each lane.

All of them can be pickled, for other processes. What they know of the lanes of solves
that are running stays behind.
"""

import itertools
import math
import os
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from .._files import read_npz, write_npz
from .._jax.keys import as_numpy
from .._jax.pickling import reduced
from .._validation import check_path, check_positive, check_tolerance
from ._args import CallbackArgs, Lane, traced


def small_gradient(gtol: float | Float[Array, ""]) -> traced:
    """Stops when the max-norm of the gradient is at most a limit.

    It is the rule of jax-privacy's `dense.pg_tol_termination_fn`. The argument `gtol`
    of `optimize` stops before the step instead of after it.

    Args:
      gtol: The limit. It may be an array, and be batched.

    Returns:
      A traced callback.

    Raises:
      TypeError: If `gtol` is not a real scalar.
      ValueError: If it is negative or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import optimize
      >>> optimize(jnp.cosh, jnp.array(1.0), callback=small_gradient(1e-6)) < 1e-6
      Array(True, dtype=bool)
    """
    check_tolerance("gtol", gtol)
    return traced(_SmallGradient(gtol))


class _SmallGradient:
    def __init__(self, gtol: float | Float[Array, ""]):
        self._gtol = gtol

    def __call__(self, info: CallbackArgs) -> Bool[Array, ""]:
        norm = optx.max_norm(info.grad)
        return norm <= jnp.asarray(self._gtol, norm.dtype)

    def __reduce__(self) -> tuple[Any, Any]:
        return reduced(type(self), [self._gtol])


_T = TypeVar("_T")


class _ByLane(weakref.WeakKeyDictionary[Lane, _T]):
    """What a callback keeps of each solve. A pickled one has none of the solves."""

    def __reduce__(self) -> tuple[Any, Any]:
        return type(self), ()


class NoProgress:
    """Stops when the loss has not improved for some steps.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import solve
      >>> solution = solve(jnp.cosh, 1.0, callback=NoProgress(steps=3, rtol=1e-9))
      >>> bool(solution.stats["num_steps"] < 20)
      True
    """

    def __init__(self, steps: int, rtol: float = 0.0):
        """Sets the limits.

        Args:
          steps: After how many steps without an improvement to stop.
          rtol: What counts as one: a loss below the best one so far by more than
            `rtol * abs(best)`.
        """
        check_positive("steps", steps, whole=True)
        check_tolerance("rtol", rtol)
        if rtol == math.inf:
            raise ValueError(f"`rtol` must be finite, got {rtol}.")
        self._steps, self._rtol = steps, rtol
        self._best = _ByLane[tuple[float, int]]()

    def __call__(self, info: CallbackArgs) -> bool:
        """Whether to stop."""
        loss = float(info.loss)
        best, since = self._best.get(info.lane, (math.inf, info.step))
        enough = self._rtol * abs(best) if math.isfinite(best) else 0.0
        if loss < best - enough:
            best, since = loss, info.step
        self._best[info.lane] = (best, since)
        return info.step - since >= self._steps


class TimeLimit:
    """Stops when a solve has run for some time, counted from its first step.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import optimize
      >>> y = optimize(jnp.cosh, 1.0, callback=TimeLimit(seconds=60.0))
    """

    def __init__(self, seconds: float):
        """Sets the limit.

        Args:
          seconds: The time. The first step is not counted, so neither is compilation.
        """
        check_positive("seconds", seconds)
        self._seconds = seconds
        self._started = _ByLane[float]()

    def __call__(self, info: CallbackArgs) -> bool:
        """Whether to stop."""
        now = time.monotonic()
        return now - self._started.setdefault(info.lane, now) >= self._seconds


class Progress:
    """A progress bar: steps, steps per second, loss and gradient norm.

    Of a batch, it shows the steps of all lanes together, and the loss and gradient norm
    of the lane that it heard of last.

    Example:
      As a context manager, which ends the line:

      >>> import io
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import optimize
      >>> with Progress(total=10, file=io.StringIO()) as progress:
      ...     y = optimize(jnp.cosh, 1.0, max_optimizer_steps=10, callback=progress)
    """

    def __init__(self, total: int | None = None, **options: Any):
        """Shows an empty bar.

        Args:
          total: The number of steps if it is known: `max_optimizer_steps`, times the
            lanes of a batch.
          **options: For `tqdm.tqdm`.

        Raises:
          ModuleNotFoundError: If tqdm is not installed.
        """
        if total is not None:
            check_positive("total", total, whole=True)
        self._options = {"total": total, "unit": "step", **options}
        self._bar = self._empty_bar()

    def _empty_bar(self) -> Any:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError(
                "Progress needs tqdm: pip install 'jaxmf_opt[progress]'"
            ) from e
        return tqdm(**self._options)

    def __getstate__(self) -> dict[str, Any]:
        """Without the bar: in another process it shows one from its first step on."""
        return self.__dict__ | {"_bar": None}

    def __call__(self, info: CallbackArgs) -> None:
        """Shows a step."""
        if self._bar is None:
            self._bar = self._empty_bar()
        self._bar.set_postfix_str(
            f"loss {float(info.loss):.6g}, gradient {_max_norm(info.grad):.1e}",
            refresh=False,
        )
        self._bar.update()

    def close(self) -> None:
        """Leaves the bar as it is, and ends its line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Record(NamedTuple):
    """The losses, gradient norms and times of the steps of one solve.

    Attributes:
      lane: Where the solve is in its batch; () outside of one.
      step: The numbers of the steps.
      loss: The losses before the steps.
      grad_norm: The max-norms of the gradients before the steps.
      seconds: When the steps had been made, since the recorder was.
    """

    lane: tuple[int, ...]
    step: Int[np.ndarray, " steps"]
    loss: Float[np.ndarray, " steps"]
    grad_norm: Float[np.ndarray, " steps"]
    seconds: Float[np.ndarray, " steps"]


class Recorder:
    """Collects loss and gradient norm of each step of each solve that it is given to.

    Example:
      To plot how two solves converge:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import optimize
      >>> from matplotlib.figure import Figure
      >>> recorder = Recorder()
      >>> def closest(c):
      ...     return optimize(lambda y: jnp.cosh(y - c), 0.0, callback=recorder)
      >>> y = jax.vmap(closest)(jnp.array([1.0, 2.0]))
      >>> ax = Figure().subplots()
      >>> for record in recorder.records:
      ...     _ = ax.semilogy(record.step, record.grad_norm, label=str(record.lane))
    """

    def __init__(self):
        """Starts the clock."""
        self._started = time.monotonic()
        self._rows: list[tuple[tuple[int, ...], list[tuple[float, ...]]]] = []
        self._of_lane = _ByLane[list[tuple[float, ...]]]()

    def __call__(self, info: CallbackArgs) -> None:
        """Adds a step."""
        rows = self._of_lane.get(info.lane)
        if rows is None:
            rows = self._of_lane[info.lane] = []
            self._rows.append((info.lane.index, rows))
        seconds = time.monotonic() - self._started
        rows.append((info.step, float(info.loss), _max_norm(info.grad), seconds))

    def __getstate__(self) -> dict[str, Any]:
        """With the time since the start: each process has a clock of its own."""
        return self.__dict__ | {"_started": self._started - time.monotonic()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts the clock as long ago as it was."""
        self.__dict__ |= state
        self._started += time.monotonic()

    @property
    def records(self) -> list[Record]:
        """The records, in the order in which the solves made their first step."""
        return [
            Record(lane, np.asarray(step, int), *map(np.asarray, others))
            for lane, rows in self._rows
            for step, *others in [zip(*rows, strict=True)]
        ]


class Checkpoint:
    """Keeps the state of a solve in a file, for a run that may be killed.

    A solve that goes on from it takes the steps that it would have taken, to the bit.
    What other callbacks remember of the steps before is not kept: a `NoProgress` starts
    to count anew. One solve at a time: for several, take several files.

    Example:
      The same lines start a run and continue it:

      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from jaxmf_opt import solve
      >>> path = tempfile.mkdtemp() + "/run.npz"
      >>> checkpoint = Checkpoint(path, every=2)
      >>> options = {"callback": checkpoint, "state": checkpoint.load()}
      >>> solution = solve(jnp.cosh, 1.0, max_optimizer_steps=6, **options)
    """

    def __init__(self, path: str | os.PathLike[str], every: int = 1):
        """Names the file; touches nothing.

        Args:
          path: Where to keep the state. Missing directories are made.
          every: After how many steps to keep it again.
        """
        check_path("path", path)
        check_positive("every", every, whole=True)
        self.path, self._every = Path(path), every
        self._lanes = _ByLane[bool]()  # whether it is the latest

    def __call__(self, info: CallbackArgs) -> None:
        """Writes the state, in a way that leaves the old file or the new one whole."""
        if info.lane not in self._lanes:
            for earlier in self._lanes:
                self._lanes[earlier] = False
            self._lanes[info.lane] = True
        if info.lane.index or not self._lanes[info.lane]:
            raise ValueError(
                "Checkpoint keeps the state of one solve, not of the lanes of a batch "
                "or of several at a time."
            )
        if (info.step + 1) % self._every:
            return
        leaves = map(as_numpy, jax.tree.leaves(info.solver_state))
        write_npz(self.path, {f"arr_{i}": x for i, x in enumerate(leaves)})

    def load(self) -> list[np.ndarray] | None:
        """Reads the state, for the argument `state` of `solve`.

        Returns:
          The state, or None if there is no file yet.

        Raises:
          ValueError: If the file is not one that a `Checkpoint` wrote.
        """
        if not self.path.exists():
            return None
        try:
            arrays = read_npz(self.path)
        except ValueError as e:
            raise ValueError(f"{self.path} is not a checkpoint: {e}") from e
        names = (f"arr_{i}" for i in itertools.count())
        return [arrays[n] for n in itertools.takewhile(arrays.__contains__, names)]


def _max_norm(grad: Any) -> float:
    """In NumPy, as JAX may not be called from a compiled program."""
    arrays = map(np.asarray, jax.tree.leaves(grad))
    return float(np.max([np.abs(x).max(initial=0.0) for x in arrays], initial=0.0))
