"""Set-ups of a mechanism: what is refused by name, and what makes a lane NaN.

A hyperparameter that is a Python number is static, a part of the program. One that is
a JAX array is an operand, so that set-ups can be batched. What is impossible raises
where it can be seen. Of traced values it cannot: the numbers that depend on them are
NaN.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

Static = int | np.integer
"""A number that is a part of the program, as the size of an array is."""
Count = Static | Int[Array, ""] | Int[np.ndarray, ""]
"""A number of something: static, or an operand."""
Flag = bool | np.bool_ | Bool[Array, ""] | Bool[np.ndarray, ""]
"""Yes or no: static, or an operand."""
Number = (
    float
    | int
    | np.floating
    | np.integer
    | Float[Array, ""]
    | Int[Array, ""]
    | Float[np.ndarray, ""]
    | Int[np.ndarray, ""]
)
"""A real number: static, or an operand."""
Vector = Float[Array, " size"] | Float[np.ndarray, " size"]
"""Real numbers in a row."""
Matrix = Float[Array, "n n"] | Float[np.ndarray, "n n"]
"""A square matrix of real numbers."""


def steps(max_n: int) -> np.ndarray:
    """The numbers of the steps."""
    return np.arange(max_n, dtype=np.int32)


def known(count: Any, most: int) -> int:
    """A count that sizes arrays; where it is traced, the most that it can be."""
    return most if isinstance(count, Tracer) else min(int(count), most)


class Requirements:
    """Conditions on values, some of which may be traced.

    Attributes:
      valid: Whether those on traced values hold: True, or a bool array.
    """

    def __init__(self, valid: Any = True):
        """Begins with what is known already."""
        self.valid = valid

    def add(self, condition: Any, message: str) -> None:
        """Adds a condition.

        Args:
          condition: A bool, or an array of one; possibly traced.
          message: What is wrong if it does not hold.

        Raises:
          ValueError: With the message, if the condition is known not to hold.
        """
        if isinstance(condition, Tracer):
            self.valid = jnp.logical_and(self.valid, condition)
        elif not condition:
            raise ValueError(message)

    def or_nan(self, x: Array) -> Array:
        """A result, or NaN where a condition does not hold."""
        return _or_nan(self.valid, x)


def _or_nan(valid: Any, x: Array) -> Array:
    # A factor, so that derivatives are NaN too.
    return x if valid is True else x * jnp.where(valid, 1.0, jnp.nan).astype(x.dtype)


def check_count(name: str, value: Any) -> Any:
    """A whole number: an int, or a scalar int32 array.

    That is the type of counts whatever the x64 setting is, and wherever it changes.

    Raises:
      TypeError: If it is something else.
    """
    if isinstance(value, (jax.Array, np.ndarray)):
        if jnp.issubdtype(value.dtype, jnp.integer) and value.shape == ():
            most = jnp.iinfo(jnp.int32).max
            return jnp.clip(jnp.asarray(value), -most, most).astype(jnp.int32)
    elif not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(
        f"`{name}` must be a whole number, or an integer array of shape (); got "
        f"{value!r}."
    )


def check_static_count(name: str, value: Any) -> int:
    """A whole number that sizes arrays.

    Raises:
      TypeError: If it is an array, or no whole number.
      ValueError: If it is less than 1.
    """
    if isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(
            f"`{name}` must be a Python integer, as it is the size of arrays; got "
            f"{value!r}."
        )
    count = check_count(name, value)
    if count < 1:
        raise ValueError(f"`{name}` must be at least 1, got {count}.")
    return count


def check_flag(name: str, value: Any) -> Any:
    """A bool, or a scalar bool array.

    Raises:
      TypeError: If it is something else.
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    is_array = isinstance(value, (jax.Array, np.ndarray))
    if is_array and value.dtype == jnp.bool_ and value.shape == ():
        return jnp.asarray(value)
    raise TypeError(
        f"`{name}` must be True, False, or a bool array of shape (); got {value!r}."
    )


def check_number(name: str, value: Any) -> Array:
    """A real number as a scalar of the default floating-point type.

    Raises:
      TypeError: If it is something else.
    """
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        kinds = (jnp.floating, jnp.integer)
        is_number = value.shape == () and any(
            jnp.issubdtype(value.dtype, kind) for kind in kinds
        )
    else:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"`{name}` must be a real number, got {value!r}.")
    return jnp.asarray(value).astype(float)


def check_decay(requirements: "Requirements", decay: Any) -> Array:
    """A factor by which the model decays.

    Args:
      requirements: Gets that on a traced value.
      decay: More than 0 and at most 1.

    Raises:
      TypeError: If it is no real number.
      ValueError: If it is known to be impossible.
    """
    decay = check_number("decay", decay)
    requirements.add(
        (decay > 0) & (decay <= 1),
        f"`decay` must be more than 0 and at most 1, got {decay}.",
    )
    return decay


def check_vector(name: str, value: Any, size: int | None = None) -> Any:
    """A vector of real floating-point numbers.

    Raises:
      TypeError: If it is no array of such numbers.
      ValueError: If it is not a vector, or not of this size.
    """
    _check_reals(name, value)
    if value.ndim != 1 or not value.size or (size or value.size) != value.size:
        wanted = "(size,) with a size of at least 1" if size is None else f"({size},)"
        raise ValueError(f"`{name}` must have shape {wanted}, got {value.shape}.")
    return value


def check_matrix(name: str, value: Any, size: int | None = None) -> Any:
    """A square matrix of real floating-point numbers.

    Raises:
      TypeError: If it is no array of such numbers.
      ValueError: If it is not a square matrix, or not of this size.
    """
    _check_reals(name, value)
    wanted = (size, size) if size is not None else value.shape[:1] * 2
    if value.ndim != 2 or not value.size or value.shape != wanted:
        wanted = "(n, n)" if size is None else f"({size}, {size})"
        raise ValueError(f"`{name}` must have shape {wanted}, got {value.shape}.")
    return value


def _check_reals(name: str, value: Any) -> None:
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"`{name}` must be an array, got {value!r}.")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must hold real floating-point numbers, got dtype {value.dtype}."
        )


def check_n(requirements: Requirements, n: Any, max_n: int | None) -> tuple[Any, int]:
    """The number of training steps, and the length of arrays over steps.

    Args:
      requirements: Gets those on traced values.
      n: The number, or None for `max_n`.
      max_n: The length of the arrays over steps that there are, or None.

    Raises:
      TypeError: If `n` is no whole number, or has to be a Python integer.
      ValueError: If it is known to be impossible.
    """
    if n is None:
        if max_n is None:
            raise TypeError("`n` must be given where no array is of that length.")
        return max_n, max_n
    n = check_count("n", n)
    require = requirements.add
    require(n >= 1, f"`n` must be at least 1, got {n}.")
    if max_n is not None:
        require(
            n <= max_n,
            f"`n` must be at most the length of the arrays over steps, {max_n}; got "
            f"{n}.",
        )
    if isinstance(n, int):
        return n, n
    if max_n is None:
        raise TypeError(
            "`n` must be a Python integer where no array over steps, as a workload, "
            f"has the length of the largest n; got {n!r}."
        )
    return n, max_n


def check_participation(
    requirements: Requirements, n: Any, min_sep: Any, max_participations: Any
) -> tuple[Any, Any]:
    """How often an example takes part, and how far apart.

    Args:
      requirements: Gets those on traced values.
      n: Training steps.
      min_sep: Least separation of two participations.
      max_participations: Most participations, or None for as many as fit.

    Returns:
      The separation and the number.

    Raises:
      TypeError: If one is no whole number.
      ValueError: If one is known to be impossible.
    """
    require = requirements.add
    min_sep = check_count("min_sep", min_sep)
    require(min_sep >= 1, f"`min_sep` must be at least 1, got {min_sep}.")
    # A traced 0 is impossible too, but must not be divided by.
    divisor = jnp.maximum(min_sep, 1) if isinstance(min_sep, jax.Array) else min_sep
    fit = (n - 1) // divisor + 1
    if max_participations is None:
        return min_sep, fit
    participations = check_count("max_participations", max_participations)
    require(
        participations >= 1,
        f"`max_participations` must be at least 1, got {participations}.",
    )
    require(
        participations <= fit,
        f"`max_participations` must be at most {fit}, as no more fit into {n} steps "
        f"with a separation of {min_sep}; got {participations}. None means as many as "
        "fit.",
    )
    return min_sep, participations


def check_bands(
    requirements: Requirements, bands: Any, max_bands: Any, n: Any
) -> tuple[Any, int]:
    """The number of bands, and that of coefficients.

    Args:
      requirements: Gets those on traced values.
      bands: The number, or None for `max_bands`.
      max_bands: The number of coefficients, or None for `bands`.
      n: Training steps.

    Raises:
      TypeError: If one is no whole number, or `max_bands` has to be given.
      ValueError: If one is known to be impossible.
    """
    if bands is None and max_bands is None:
        raise TypeError("`bands` must be given, or `max_bands`.")
    if max_bands is not None:
        max_bands = check_static_count("max_bands", max_bands)
    bands = max_bands if bands is None else check_count("bands", bands)
    if max_bands is None:
        if not isinstance(bands, int):
            raise TypeError(
                "`max_bands`, the number of coefficients, must be given where `bands` "
                f"is an array; got {bands!r}."
            )
        max_bands = bands
    require = requirements.add
    require(bands >= 1, f"`bands` must be at least 1, got {bands}.")
    for most, what in ((n, "training steps"), (max_bands, "coefficients")):
        require(
            bands <= most,
            f"`bands` must be at most the number of {what}, {most}; got {bands}.",
        )
    return bands, max_bands
