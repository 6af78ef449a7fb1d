"""Settings for the whole suite."""

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=25
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(params=[False, True], ids=["x64-off", "x64-on"])
def x64(request: pytest.FixtureRequest):
    """Runs a test in a float32 program and again in a float64 program."""
    with jax.enable_x64(request.param):
        yield request.param
