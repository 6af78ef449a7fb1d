"""DP-MF mechanisms whose hyperparameters are arrays, so that set-ups can be batched.

A mechanism factorises the workload `A` of a training, which takes gradients to models,
as `A = B C`, and adds the noise `C^{-1} Z` to the gradients, or `B Z` to the models. An
object of one of the classes here is a set-up. It has a good starting point and a loss
for `optimize`, and what training needs of the parameters that come out.

* `BandedToeplitz` can be amplified by sampling; it takes many bands to be good.
* `NormalizedBandedToeplitz` has the same memory, and a smaller error.
* `BandedInverseToeplitz` has small errors with few bands.
* `BufferedToeplitz` (BLT) has nearly the smallest errors of Toeplitz strategies with
  a few buffers, however long the training is.
* `Dense` has the smallest error of all, in O(n^3) time: up to about 1,000 steps.

Take `ROBUST_OPTIMIZER` for all of them, and `minimax` for a `Dense` of the least
largest error. `save` and `load` keep what comes out in files.
"""

from . import workloads
from ._saved import SavedMechanism, load, save
from .banded_inverse_toeplitz import BandedInverseToeplitz
from .banded_toeplitz import BandedToeplitz
from .buffered_toeplitz import BufferedToeplitz, Buffers
from .dense import Dense
from .normalized_banded_toeplitz import (
    NormalizedBandedToeplitz,
)

__all__ = [
    "BandedInverseToeplitz",
    "BandedToeplitz",
    "BufferedToeplitz",
    "Buffers",
    "Dense",
    "NormalizedBandedToeplitz",
    "SavedMechanism",
    "load",
    "save",
    "workloads",
]


def __dir__() -> list[str]:
    return __all__
