"""Examples in docstrings give what they show, and nothing public is without one."""

import doctest
import importlib
import inspect
import pkgutil
import pydoc
import re
from types import ModuleType

import matplotlib
import pytest

import jaxmf_opt
from jaxmf_opt import callbacks, mechanisms, privacy, robust, sweeps
from jaxmf_opt.mechanisms import workloads
from jaxmf_opt.sweeps import plots

# Examples, with the settings of a user.
pytestmark = [pytest.mark.mixes, pytest.mark.annotated]

MODULES = [
    m.name
    for m in pkgutil.walk_packages(jaxmf_opt.__path__, "jaxmf_opt.")
    if not m.name.endswith("__main__")
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# What is handed out, and not called: the docstring of its maker has the example.
HANDED_OUT = {
    *(
        "Lane",
        "Solution",
        "Minimax",
        "History",
        "MinimiserState",
        "SolverState",
        "Record",
    ),
    *("SweepInterrupted", "SweepTable", "Buffers", "SavedMechanism"),
    *("SearchProgress", "RobustLBFGSState", "RobustOptimizer"),
}


def public(module: ModuleType) -> dict[str, object]:
    """The functions and classes of a module."""
    named = {f"{module.__name__}.{n}": getattr(module, n) for n in module.__all__}
    is_code = lambda x: inspect.isclass(x) or inspect.isfunction(x)  # noqa: E731
    return {name: x for name, x in named.items() if is_code(x)}


PUBLIC_MODULES = (
    *(jaxmf_opt, callbacks, mechanisms, robust, sweeps),
    *(privacy, workloads, plots),
)
PUBLIC = {name: x for module in PUBLIC_MODULES for name, x in public(module).items()}


@pytest.mark.parametrize("module", PUBLIC_MODULES, ids=lambda m: m.__name__)
def test_help_and_completion_show_what_is_public(module: ModuleType):
    shown = [name for name in dir(module) if not name.startswith("_")]
    assert shown == sorted(module.__all__)
    text = pydoc.plain(pydoc.render_doc(module))
    for name in shown:
        assert re.search(rf"\b{name}\b", text)


def test_options_have_one_order_and_one_default():
    """But for `optimize`, whose tolerances are off, as upstream has none."""
    functions = (jaxmf_opt.optimize, jaxmf_opt.solve, jaxmf_opt.sweep)
    of_optimize, of_solve, of_sweep = (
        inspect.signature(fn).parameters for fn in functions
    )
    for others in (of_optimize, of_sweep):
        shared = [name for name in others if name in of_solve]
        assert shared == [name for name in of_solve if name in others]
        for name in shared:
            if name == "rtol" and others is of_optimize:
                continue
            assert others[name].default == of_solve[name].default, name


@pytest.mark.parametrize("name", PUBLIC)
def test_has_a_docstring_with_an_example(name: str):
    doc = PUBLIC[name].__doc__
    assert doc
    assert (">>>" in doc) or name.rpartition(".")[2] in HANDED_OUT


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str):
    module = importlib.import_module(name)
    matplotlib.use("Agg", force=True)
    results = doctest.testmod(module, optionflags=FLAGS)
    assert not results.failed
    assert results.attempted == inspect.getsource(module).count(">>> ")
