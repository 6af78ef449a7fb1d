"""What is private in JAX and equinox, or differs between releases of JAX.

Nothing else in the package imports it from there. Each name says what it is for, what
happens where it has moved, and which test notices.
"""

import functools
import warnings

import equinox.internal as eqxi
import jax
import jaxlib.version

# The newest release of JAX with which the whole suite has been run. With others there
# is a warning. tests/_jax/test_compat.py
NEWEST_TESTED = (0, 12)
if jax.__version_info__[:2] > NEWEST_TESTED:
    warnings.warn(
        f"jaxmf_opt has not been tested with JAX {jax.__version__}: the newest release "
        f"that it is known to work with is {'.'.join(map(str, NEWEST_TESTED))}. If "
        "something fails deep inside of JAX, install that one.",
        stacklevel=2,
    )

try:
    # Whether JAX has started its threads, which it has no public way to say. Without
    # it no forked process is refused. tests/_jax/test_fork.py
    from jax._src.xla_bridge import (
        backends_are_initialized as backends_are_initialized,
    )
except ImportError:

    def backends_are_initialized() -> bool:
        """Whether JAX has started its threads."""
        return False


try:
    # Where a call to the host is made if a program runs on many devices. Without it
    # there are callbacks on one device only. tests/_jax/test_host_callback.py
    from jax._src.callback import _callback_op_sharding as callback_op_sharding
except ImportError:
    callback_op_sharding = None

try:
    # The switch of `shard_map`'s check of varying axes. Without it `shard_map` needs
    # check_vma=False. tests/_jax/test_varying.py
    from jax._src.config import _check_vma as check_vma
except ImportError:
    check_vma = None

try:
    # The same for the rule of a `jax.custom_vjp`. tests/_jax/test_varying.py
    from jax._src.config import disable_bwd_checks as disable_bwd_checks
except ImportError:
    disable_bwd_checks = None

try:
    # Expands in a program what JAX 0.12 has as primitives of a higher level, such
    # as `jnp.interp`. Earlier releases have none of them; without it, losses that use
    # them cannot be compiled. tests/_jax/test_lowering.py
    from jax._src.interpreters.partial_eval import lower_jaxpr2 as expand_jaxpr
except ImportError:
    expand_jaxpr = None

# The arrays that a function closes over, as leaves of a pytree. It has no public name
# in equinox; the import fails without it. tests/_solver/test_optimizers.py
closure_to_pytree = eqxi.closure_to_pytree

# What an adjoint gives to a minimiser of optimistix, and what raises where iterates are
# about to be differentiated. They have no public names in equinox; the import fails
# without them. tests/_solver/test_adjoint.py
lax_while_loop = functools.partial(eqxi.while_loop, kind="lax")
nondifferentiable = eqxi.nondifferentiable

# Batched LAPACK kernels of these releases can wait for ever. tests/_jax/test_lapack.py
LAPACK_CAN_HANG = jaxlib.version.__version_info__ < (0, 12)
