"""How far a sweep has come, on the terminal."""

import math
from typing import Any

import numpy as np
import optimistix as optx
from jaxtyping import Bool

from .._solver.solution import Solution


class ProgressBar:
    """A progress bar: lanes done, failed, lanes a second, time left, least loss."""

    def __init__(self, total: int, *, show: bool):
        """Shows an empty bar, if it is to be shown.

        Args:
          total: The number of lanes.
          show: Whether to show anything.

        Raises:
          ModuleNotFoundError: If it is to be shown and tqdm is not installed.
        """
        self._bar: Any = None
        self._failed, self._best = 0, math.inf
        if show:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError as e:
                raise ModuleNotFoundError(
                    "`progress` needs tqdm: pip install 'jaxmf_opt[progress]'"
                ) from e
            # (Nobody knows how long the next block takes, so each is shown at once.)
            self._bar = tqdm(total=total, unit="lane", miniters=1, mininterval=0)

    def add(self, solution: Solution, ended: Bool[np.ndarray, " lanes"]) -> None:
        """Counts lanes.

        Args:
          solution: The solution of a block.
          ended: Which of its lanes have ended.
        """
        if self._bar is None:
            return
        failed = np.asarray(solution.result != optx.RESULTS.successful)
        self._failed += int(np.sum(failed & ended))
        losses = np.asarray(solution.stats["loss"])[ended]
        losses = losses[np.isfinite(losses)]
        self._best = min(self._best, losses.min(initial=math.inf))
        text = f"{self._failed} failed, least loss {self._best:.6g}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(int(ended.sum()))

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
