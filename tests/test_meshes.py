"""All that the README shows works inside `jax.set_mesh`, as it does outside."""

from processes import report_of


def test_inside_a_mesh():
    failures = report_of(
        "tests/mesh_cases.py", devices=4, JAX_NUMPY_DTYPE_PROMOTION="standard"
    )
    assert len(failures) == 16
    assert not {name: why for name, why in failures.items() if why}
