"""Mechanisms in files, with what a training has to know of them."""

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from .._files import read_npz, write_npz
from .._validation import check_path
from ..privacy import Budget
from .banded_inverse_toeplitz import BandedInverseToeplitz
from .banded_toeplitz import BandedToeplitz
from .buffered_toeplitz import BufferedToeplitz
from .dense import Dense
from .normalized_banded_toeplitz import NormalizedBandedToeplitz

_FAMILIES = {
    kind.__name__: kind
    for kind in (
        BandedInverseToeplitz,
        BandedToeplitz,
        BufferedToeplitz,
        Dense,
        NormalizedBandedToeplitz,
    )
}


class SavedMechanism(NamedTuple):
    """A mechanism as it was saved: parameters, sensitivity, budget, noise multiplier.

    Attributes:
      mechanism: The set-up: participation, objective and workload are in it.
      params: The parameters.
      budget: The privacy budget, or None.
      amplified: Whether the noise multiplier is that of cyclic Poisson sampling.
      noise_multiplier: The standard deviation of the noise over clipping norm and
        sensitivity, or None.
    """

    mechanism: Any
    params: Any
    budget: Budget | None
    amplified: bool
    noise_multiplier: float | None

    def streaming_matrix(self) -> Any:
        """The noising matrix as jax-privacy takes it, for a sensitivity of 1.

        Returns:
          What `mechanism.streaming_matrix(params)` is.
        """
        return self.mechanism.streaming_matrix(self.params)


def save(
    path: str | os.PathLike[str],
    mechanism: Any,
    params: Float[Array, "..."] | Float[np.ndarray, "..."],
    *,
    budget: Budget | None = None,
    amplified: bool = False,
) -> None:
    """Writes a mechanism into a file, for `load`, or for `numpy.load`.

    Beside what `load` needs it has the `sensitivity` of the strategy in it, and the
    `noising_coef` (of `Dense` the `noising_matrix`) of the multiple of the strategy
    whose sensitivity is 1, whatever the family is. Of `NormalizedBandedToeplitz` it has
    the `column_norms`, too, which multiply the rows of the noising matrix.

    Args:
      path: The file, an `.npz`.
      mechanism: One of the mechanisms here, of values that are not traced.
      params: Its parameters.
      budget: The privacy budget, for which the noise multiplier is computed.
      amplified: Whether batches are drawn by cyclic Poisson sampling: then the noise
        multiplier is that of a `BandedToeplitz` or `Dense` for one participation.

    Raises:
      ModuleNotFoundError: If there is a budget, and dp-accounting is not installed.
      TypeError: If an argument is of the wrong type.
      ValueError: If the mechanism is none for the budget.

    Example:
      >>> import pathlib, tempfile
      >>> from jaxmf_opt.mechanisms import BandedToeplitz
      >>> mechanism = BandedToeplitz(20, 4, min_sep=5, max_participations=4)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = pathlib.Path(directory, "banded.npz")
      ...     save(path, mechanism, mechanism.initial_params())
      ...     np.load(path)["noising_coef"].shape
      (20,)
    """
    check_path("path", path)
    name = type(mechanism).__name__
    if _FAMILIES.get(name) is not type(mechanism):
        raise TypeError(f"`mechanism` must be one of this module, got {mechanism!r}.")
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(mechanism)):
        raise TypeError("`mechanism` must not have traced values in it.")
    noise_multiplier = None
    if budget is not None:
        bands = _amplified_bands(mechanism, budget, amplified)
        noise_multiplier = budget.noise_multiplier(bands)
    write(Path(path), mechanism, params, budget, amplified, noise_multiplier)


def write(
    path: Path,
    mechanism: Any,
    params: Any,
    budget: Budget | None,
    amplified: bool,
    noise_multiplier: float | None,
) -> None:
    """Writes what `save` has checked, with a noise multiplier that is known."""
    params = np.asarray(params, float)
    arrays: dict[str, Any] = {"family": type(mechanism).__name__, "params": params}
    for argument in inspect.signature(type(mechanism)).parameters:
        value = getattr(mechanism, argument)
        if value is not None:
            arrays[f"mechanism/{argument}"] = value
    with jax.enable_x64():
        sensitivity = jnp.sqrt(mechanism.sensitivity_squared(params))
        arrays["sensitivity"] = sensitivity
        for part in ("noising_coef", "noising_matrix"):
            if hasattr(mechanism, part):
                arrays[part] = sensitivity * getattr(mechanism, part)(params)
        if isinstance(mechanism, NormalizedBandedToeplitz):
            arrays["column_norms"] = mechanism.column_norms(params)
    if budget is not None:
        arrays["amplified"] = amplified
        arrays["noise_multiplier"] = noise_multiplier
        for key, value in dataclasses.asdict(budget).items():
            arrays[f"budget/{key}"] = value
    write_npz(path, {key: np.asarray(x) for key, x in arrays.items()})


def load(path: str | os.PathLike[str]) -> SavedMechanism:
    """Reads a mechanism from a file of `save`, or of `python -m jaxmf_opt`.

    Args:
      path: The file.

    Returns:
      The mechanism, its parameters and the privacy budget.

    Raises:
      ValueError: If it is no such file.

    Example:
      >>> import pathlib, tempfile
      >>> from jaxmf_opt.mechanisms import BandedToeplitz
      >>> mechanism = BandedToeplitz(20, 4, min_sep=5, max_participations=4)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = pathlib.Path(directory, "banded.npz")
      ...     save(path, mechanism, mechanism.initial_params())
      ...     load(path).mechanism.bands
      4
    """
    check_path("path", path)
    arrays = read_npz(Path(path))
    if "family" not in arrays or str(arrays["family"]) not in _FAMILIES:
        raise ValueError(f"{path} is no file of `save`: it has no mechanism in it.")

    def part(name: str) -> dict[str, Any]:
        prefix = f"{name}/"
        return {
            key.removeprefix(prefix): x if x.ndim else x.item()
            for key, x in arrays.items()
            if key.startswith(prefix)
        }

    budget, family, set_up = part("budget"), str(arrays["family"]), part("mechanism")
    if family == "Dense" and set_up["n"] < len(arrays["params"]):
        set_up["n"] = np.asarray(set_up["n"])  # as it was: a number is their shape
    return SavedMechanism(
        _FAMILIES[family](**set_up),
        arrays["params"],
        Budget(**budget) if budget else None,
        bool(arrays.get("amplified", False)),
        float(arrays["noise_multiplier"]) if budget else None,
    )


def _amplified_bands(mechanism: Any, budget: Budget, amplified: bool) -> int | None:
    """What `budget.noise_multiplier` takes; refuses a mechanism that is none for it."""
    n, count = int(mechanism.n), int(mechanism.max_participations)
    if n != budget.steps:
        raise ValueError(
            f"`mechanism` must have the {budget.steps} steps of `budget`, got {n}."
        )
    if not amplified:
        # For steps that are exactly so far apart a sensitivity says nothing of others.
        fixed = bool(getattr(mechanism, "fixed_epochs", True))
        apart, wanted = int(mechanism.min_sep), budget.steps_per_epoch
        if count < budget.epochs or apart > wanted or (fixed and apart != wanted):
            raise ValueError(
                f"`mechanism` must be for {budget.epochs} participations, {wanted} "
                f"steps apart, as in `budget`; got {count}, {apart} steps apart."
            )
        return None
    if not isinstance(mechanism, BandedToeplitz | Dense) or count != 1:
        raise ValueError(
            "`mechanism` must be a `BandedToeplitz` or `Dense` for one participation "
            f"where `amplified` is True, got {mechanism!r}."
        )
    return int(mechanism.bands)
