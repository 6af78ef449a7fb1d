"""Processes forked off one that has used JAX are refused, and do not hang."""

import os

import pytest
from processes import report_of

from jaxmf_opt._jax import fork

# A pool that forks before JAX is used, and one that does after that: what `solve` and
# `sweep` say in each.
PROGRAM = """
import json, multiprocessing, warnings
import jax.numpy as jnp
import numpy as np
from jaxmf_opt import solve, sweep

def solved(c):
    return float(solve(lambda y: jnp.cosh(y - c), 0.0, gtol=1e-9).value)

def swept(c):
    return sweep(lambda y, c: jnp.cosh(y - c), 0.0, c, gtol=1e-9).value.tolist()

def said(fn, *args):
    try:
        return fn(*args)
    except RuntimeError as e:
        return str(e)

def in_pool(kind):
    with multiprocessing.get_context(kind).Pool(1) as pool:
        calls = [(solved, 2.0), (swept, np.array([1.0, 3.0]))]
        return [pool.apply_async(said, call).get(60) for call in calls]

if __name__ == "__main__":
    # JAX warns of every fork.
    warnings.simplefilter("ignore", RuntimeWarning)
    before = in_pool("fork")
    jnp.ones(2).block_until_ready()
    print(json.dumps([before, in_pool("fork")]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_refused_after_jax_was_used_and_not_before():
    before, after = report_of("-c", PROGRAM)
    assert before == [pytest.approx(2.0), pytest.approx([1.0, 3.0])]
    for said in after:
        assert "forked" in said
        assert "get_context('spawn')" in said


def test_the_switch_of_jax_is_where_it_was():
    assert fork.backends_are_initialized.__module__ == "jax._src.xla_bridge"
