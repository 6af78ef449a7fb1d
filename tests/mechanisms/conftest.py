"""Mechanisms are computed in float64 here, unless a test says otherwise."""

from collections.abc import Iterator

import jax
import pytest


# Of the module, so that hypothesis may run many examples in it.
@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with jax.enable_x64():
        yield
