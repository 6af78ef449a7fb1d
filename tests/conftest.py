"""Settings for the whole suite."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import hypothesis
import jax
import pytest

from benchmarks.flags import COMPILE_QUICKLY, as_flag, known

hypothesis.settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=25
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(params=[False, True], ids=["x64-off", "x64-on"])
def x64(request: pytest.FixtureRequest):
    """Runs a test in a float32 program and again in a float64 program."""
    with jax.enable_x64(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def settings_of_users(request: pytest.FixtureRequest):
    """Lets tests that are marked so mix types and ranks of arrays."""
    if not request.node.get_closest_marker("mixes"):
        yield
        return
    # For all threads: upstream has some.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    _set(_STRICT)


@pytest.fixture(autouse=True)
def no_open_figures():
    """Closes the figures that an example leaves open, as users' examples do."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets compiled programs before they are too many for the process.

    Each takes a few of the 65,530 memory maps that Linux gives to a process, and XLA
    crashes where it gets no more.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()


def pytest_addoption(parser: pytest.Parser):
    parser.addoption(
        "--optimized",
        action="store_true",
        help="let XLA optimize what it compiles, as users do; takes twice the time",
    )


# Types and ranks of arrays are not to be mixed without saying so.
_STRICT = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}

# Many tests compile what others have compiled, in other processes too. JAX's cache of
# compiled programs is theirs for one run of the suite.
_CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def _set(options: Mapping[str, str | int]) -> None:
    """Here, and in processes that tests start."""
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_configure(config: pytest.Config):
    # What JAX keeps of all these programs is large, and no garbage: to look through it
    # as often as Python does by default takes a tenth of the time.
    gc.set_threshold(50_000, 20, 50)
    config.addinivalue_line(
        "markers", "bits: needs optimized programs; test_elsewhere.py runs it in some"
    )
    config.addinivalue_line(
        "markers", "annotated: test_elsewhere.py runs it, with annotations checked"
    )
    config.addinivalue_line(
        "markers", "mixes: runs code that mixes types or ranks of arrays"
    )
    if hasattr(config, "workerinput"):  # the environment of the first process is ours
        return
    flags = os.environ.get("XLA_FLAGS", "").split()
    ours = {as_flag(*option) for option in COMPILE_QUICKLY.items()}
    flags = [flag for flag in flags if flag not in ours]  # if inherited
    if not config.option.optimized:
        flags += [as_flag(*option) for option in known(COMPILE_QUICKLY).items()]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    directory = tempfile.mkdtemp()
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    _set(_STRICT | _CACHE | {"jax_compilation_cache_dir": directory})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    """Leaves to `test_elsewhere.py` what needs other settings, and starts with it."""
    elsewhere: list[pytest.Item] = []
    if not config.option.optimized:
        elsewhere += [item for item in items if item.get_closest_marker("bits")]
    if not config.option.jaxtyping_packages:
        elsewhere += [item for item in items if item.get_closest_marker("annotated")]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]
    items.sort(key=lambda item: "test_elsewhere" not in item.nodeid)
