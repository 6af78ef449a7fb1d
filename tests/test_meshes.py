"""All that the README shows works inside `jax.set_mesh`, as it does outside."""

import pytest
from processes import report_of


@pytest.mark.parametrize(("kind", "count"), [("Explicit", 12), ("Auto", 3)])
def test_inside_a_mesh(kind: str, count: int):
    failures = report_of(
        "tests/mesh_cases.py", kind, devices=4, JAX_NUMPY_DTYPE_PROMOTION="standard"
    )
    assert len(failures) == count
    assert not {name: why for name, why in failures.items() if why}
