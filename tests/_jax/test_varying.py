"""Solves and regions under `shard_map`, on four devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_cases
from jax.sharding import PartitionSpec as P
from processes import report_of

from jaxmf_opt import optimize


@pytest.fixture(scope="module")
def results() -> dict[str, float | str]:
    """What the script says, which has a process, and so devices, of its own."""
    return report_of(
        sharded_cases.__file__, devices=sharded_cases.DEVICES, warnings="error"
    )


@pytest.mark.parametrize("case", sharded_cases.CASES)
def test_on_four_devices(case: str, results: dict[str, float | str]):
    result = results[case]
    assert isinstance(result, float), result
    assert result < 1e-6


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_loss_that_communicates_is_refused(check_vma: bool):
    """Its solves, of different lengths, would wait for each other."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def solve(c: jax.Array) -> jax.Array:
        return optimize(
            lambda y: jax.lax.psum(jnp.sum((y - c.astype(y.dtype)) ** 2), "d"), c
        )

    sharded = jax.shard_map(
        solve, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=check_vma
    )
    with pytest.raises(ValueError, match=r"`loss_fn` uses a mapped axis, 'd'"):
        jax.jit(sharded)(jnp.ones(2))
    with pytest.raises(ValueError, match=r"`loss_fn` uses a mapped axis, 'lanes'"):
        jax.vmap(
            lambda c: optimize(
                lambda y: (y - jax.lax.pmean(c.astype(y.dtype) * y, "lanes")) ** 2, c
            ),
            axis_name="lanes",
        )(jnp.ones(2))


def test_a_loss_may_map_and_sum_inside():
    def loss(y: jax.Array) -> jax.Array:
        centred = jax.vmap(lambda y: y - jax.lax.pmean(y, "i"), axis_name="i")(y)
        return jnp.sum((centred - jnp.array([1.0, -1.0])) ** 2) + jnp.sum(y) ** 2

    np.testing.assert_allclose(optimize(loss, jnp.zeros(2)), [1.0, -1.0], rtol=1e-6)
