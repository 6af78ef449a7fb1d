"""DP-MF losses whose hyperparameters are arrays, so that set-ups can be batched."""

from . import banded_toeplitz as banded_toeplitz
