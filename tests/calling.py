"""What comes of calls, in a form that one process can tell another."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np


class Refusal(Protocol):
    """The exception that a call must raise, and what that has to say."""

    @property
    def error(self) -> type[Exception]: ...

    @property
    def words(self) -> tuple[str, ...]: ...


def said(call: Callable[[], Any]) -> list[str]:
    """The name and the message of the exception that a call raises."""
    try:
        call()
    except Exception as e:
        return [type(e).__name__, str(e)]
    return ["no error", ""]


def numbers(call: Callable[[], Any]) -> list[Any]:
    """The values and the dtypes of the arrays that a call returns."""
    leaves = jax.tree.leaves(call())
    values = [np.asarray(x, float).tolist() for x in leaves]
    return [values, [str(x.dtype) for x in leaves]]


def assert_refused(outcome: list[Any], bad: Refusal) -> None:
    """That this exception was raised, with all these words."""
    error, message, *_ = outcome
    assert error == bad.error.__name__, message
    for word in bad.words:
        assert word in message
