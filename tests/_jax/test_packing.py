"""Packing a pytree into few arrays changes nothing in it."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmf_opt._jax.packing import pack, unpack


def test_what_is_unpacked_is_what_was_packed():
    with jax.enable_x64():
        tree = {
            "count": jnp.array(2**53 - 1),
            "unknown": jnp.array(-1, jnp.int32),
            "flag": jnp.array(True),
            "floats": (jnp.array(jnp.nan), jnp.array(-0.0), jnp.array(jnp.inf)),
            "half": jnp.array(1.5, jnp.float16),
            "vector": jnp.arange(3),
            "nothing": None,
            "empty": jnp.zeros((0, 2)),
        }
        packed = jax.jit(pack)(tree)
        again = jax.jit(unpack)(packed, tree)
    assert len(packed) == 3  # the scalars, and two that are none
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for old, new in zip(jax.tree.leaves(tree), jax.tree.leaves(again), strict=True):
        assert old.dtype == new.dtype
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
