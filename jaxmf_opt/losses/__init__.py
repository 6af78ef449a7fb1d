"""DP-MF losses whose hyperparameters are arrays, so that set-ups can be batched."""

from . import workloads as workloads
from .banded_inverse_toeplitz import BandedInverseToeplitz as BandedInverseToeplitz
from .banded_toeplitz import BandedToeplitz as BandedToeplitz
from .buffered_toeplitz import BufferedToeplitz as BufferedToeplitz
from .buffered_toeplitz import Buffers as Buffers
from .dense import Dense as Dense
