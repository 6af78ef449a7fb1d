"""The two ways to run a solve: as one loop, or step by step from Python.

Both are pure functions of arrays. What is not an array (the loss's program, the
optimizer, dtypes) makes up a `Recipe`, and each recipe is compiled once.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._minimiser import LeanOptaxMinimiser, MinimiserState, SolverState, Tolerance
from ._objective import Program
from ._optimizer import optimizer_key
from ._stall import minimiser_for
from ._structure import CACHE_SIZE
from ._watch import Watch, WatchedMinimiser, with_interrupt


class Tolerances(NamedTuple):
    """When to stop: see `LeanOptaxMinimiser`.

    Attributes:
      rtol: Relative tolerance of the Cauchy criterion.
      atol: Absolute tolerance of the Cauchy criterion.
      gtol: Tolerance for the max-norm of the gradient.
    """

    rtol: Tolerance = 0.0
    atol: Tolerance = 0.0
    gtol: Tolerance = 0.0

    @property
    def off(self) -> bool:
        """Whether all are known to be 0, so that no test needs to be compiled."""
        return all(not isinstance(t, jax.Array) and t == 0 for t in self)


class Memory(NamedTuple):
    """What a step leaves, beside the point and the optimizer's state.

    Attributes:
      loss: The loss where the step started.
      grad: The gradient there.
      update: The step itself, if tolerances are looked at.
    """

    loss: Float[Array, ""]
    grad: PyTree
    update: PyTree | None

    def put_into(self, state: MinimiserState) -> MinimiserState:
        """The state with these in it."""
        parts = lambda s: (s.loss, s.grad, s.update)  # noqa: E731
        return eqx.tree_at(parts, state, tuple(self), is_leaf=lambda x: x is None)


class Recipe:
    """All of a solve but its arrays.

    Recipes are equal, and hashable, where they compute the same thing. One whose
    optimizer cannot be compared equals only itself.

    Attributes:
      program: What the loss computes.
      optimizer: The optax transformation.
      cacheable: Whether another recipe can ever be equal to this one.
    """

    def __init__(
        self,
        program: Program,
        optimizer: optax.GradientTransformation,
        dtypes: Sequence[Any],
        int_dtype: Any,
        *,
        tests: bool,
        watch: Watch | None = None,
    ):
        """Puts the parts together.

        Args:
          program: What the loss computes.
          optimizer: The optax transformation.
          dtypes: The dtype that each leaf of the parameters gets in the end.
          int_dtype: The dtype that numbers of steps get in the end.
          tests: Whether the tolerances are looked at.
          watch: Who is told of each step of a whole solve.
        """
        self.program = program
        self.optimizer = optimizer
        self._dtypes = tuple(dtypes)
        self._int_dtype = int_dtype
        self._tests = tests
        self._watch = watch
        optimizer_id = optimizer_key(optimizer)
        self.cacheable = optimizer_id is not None
        self._key: Hashable = (
            program,
            optimizer_id,
            self._dtypes,
            int_dtype,
            tests,
            watch,
        )

    def __hash__(self) -> int:
        return hash(self._key) if self.cacheable else id(self)

    def __eq__(self, other: object) -> bool:
        if not (isinstance(other, Recipe) and self.cacheable):
            return self is other
        return self._key == other._key

    def with_optimizer(self, optimizer: optax.GradientTransformation) -> "Recipe":
        """The same recipe with other arrays in its optimizer."""
        return Recipe(
            self.program,
            optimizer,
            self._dtypes,
            self._int_dtype,
            tests=self._tests,
            watch=self._watch,
        )

    def solve(self, *operands: Any) -> optx.Solution:
        """The same as `solve_in_float64`, with the value in the recipe's dtypes."""
        solution = self.solve_in_float64(*operands)
        value = self.in_dtypes(solution.value)
        return eqx.tree_at(lambda s: s.value, solution, value)

    def solve_in_float64(
        self,
        params: PyTree,
        captured: Sequence[Array],
        max_steps: Int[Array, ""] | int,
        tolerances: Tolerances,
        watched: Sequence[Array] = (),
        start: SolverState | None = None,
    ) -> optx.Solution:
        """The whole solve. To be called, or traced, with 64-bit types.

        Args:
          params: The starting point, of any real dtypes.
          captured: What the loss closes over.
          max_steps: The limit of steps.
          tolerances: When to stop before it.
          watched: What traced callbacks close over.
          start: Where to go on, instead of at `params`.

        Returns:
          The solution.
        """
        limit = jnp.asarray(max_steps)
        tolerances = self._tolerances(tolerances)
        if self._watch is None:
            minimiser = minimiser_for(self.optimizer, tolerances)
        else:
            minimiser = WatchedMinimiser(
                self.optimizer, tolerances, limit, self._watch, watched
            )
        first = jnp.zeros_like(limit) if start is None else start.minimiser.step
        solution = optx.minimise(
            self.program.loss,
            minimiser,
            _as_float64(params) if start is None else start.params,
            captured,
            options={} if start is None else {"state": start.minimiser},
            max_steps=None,
            adjoint=_WhileBelow(
                limit, first.astype(limit.dtype), self._watch is not None
            ),
            throw=False,
        )
        state = solution.state
        if isinstance(minimiser, WatchedMinimiser):
            state = with_interrupt(state, None)
        value = _pin(solution.value, state)
        whole = optx.Solution(
            value=value,
            result=solution.result,
            aux=solution.aux,
            stats=self.stats(state, limit),
            state=SolverState(value, state),
        )
        if isinstance(minimiser, WatchedMinimiser):
            return minimiser.closed(whole, solution.state)
        return whole

    def stats(
        self, state: MinimiserState, limit: Int[Array, ""]
    ) -> dict[str, Int[Array, ""]]:
        """What is told of a run, in the caller's integers."""
        most = jnp.iinfo(self._int_dtype).max
        steps = {"num_steps": state.step, "max_steps": limit}
        return {
            k: jnp.minimum(n, most).astype(self._int_dtype) for k, n in steps.items()
        }

    def start(self, params: PyTree) -> SolverState:
        """The float64 point and the state before the first step."""
        return start(self.optimizer, params, tests=self._tests)

    def step(
        self,
        y: PyTree,
        opt_state: PyTree,
        memory: Memory | None,
        captured: Sequence[Array],
        tolerances: Tolerances | None,
    ) -> tuple[PyTree, PyTree, Memory, Bool[Array, ""] | None]:
        """One step, of no more arrays than it takes: each of them costs at a call.

        Args:
          y: The point.
          opt_state: The state of the optax transformation.
          memory: What the last step has left; None if no tolerances are looked at.
          captured: What the loss closes over.
          tolerances: When to stop, or None.

        Returns:
          The new `y`, `opt_state` and `memory`, and whether a tolerance has been met.
        """
        state = self.start(y).minimiser
        state = eqx.tree_at(lambda s: s.opt_state, state, opt_state)
        if memory is not None:
            state = memory.put_into(state)
        minimiser = LeanOptaxMinimiser(
            self.optimizer, *self._tolerances(tolerances or Tolerances())
        )
        y, state, _ = minimiser.step(
            lambda y, captured: (self.program.loss(y, captured), None),
            y,
            captured,
            {},
            state,
            frozenset(),
        )
        stopped = state.stopped if self._tests else None
        return y, state.opt_state, Memory(state.loss, state.grad, state.update), stopped

    def in_dtypes(self, y: PyTree) -> PyTree:
        """The point in the dtypes of the caller's parameters."""
        leaves, treedef = jax.tree.flatten(y)
        cast = [x.astype(d) for x, d in zip(leaves, self._dtypes, strict=True)]
        return jax.tree.unflatten(treedef, cast)

    def _tolerances(self, tolerances: Tolerances) -> Tolerances:
        if not self._tests:
            return Tolerances()
        return Tolerances(*map(jnp.float64, tolerances))


def start(
    optimizer: optax.GradientTransformation, params: PyTree, *, tests: bool
) -> SolverState:
    """The state before the first step.

    Args:
      optimizer: The optax transformation.
      params: The starting point, of any real dtypes.
      tests: Whether tolerances are looked at.

    Returns:
      The point, float64, and the state.
    """
    y = _as_float64(params)
    minimiser = LeanOptaxMinimiser(optimizer, rtol=float(tests))
    loss = jax.ShapeDtypeStruct((), jnp.float64)
    return SolverState(y, minimiser.init(_unused, y, None, {}, loss, None, frozenset()))


class Compiled(NamedTuple):
    """The methods of a recipe under `jax.jit`; each is compiled when first called."""

    solve: Callable[..., optx.Solution]
    start: Callable[..., SolverState]
    step: Callable[..., tuple[PyTree, PyTree, Memory, Any]]
    in_dtypes: Callable[..., PyTree]


@functools.lru_cache(maxsize=CACHE_SIZE)
def compiled(recipe: Recipe) -> Compiled:
    """The compiled form of a recipe, shared by all that are equal to it."""
    return Compiled(*(jax.jit(getattr(recipe, name)) for name in Compiled._fields))


def _as_float64(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)


def _pin(y: PyTree, state: MinimiserState) -> PyTree:
    """Returns `y`, in a way that keeps all of `state` in the compiled program.

    XLA drops from a loop what its caller does not use, and then fuses and rounds the
    rest differently. Near a minimum rounding decides how long a line search takes, and
    which of the equally good points it ends at. Nobody should get other bits, or six
    times the evaluations, for not having looked at the state.
    """
    never = state.step < 0
    leaves = [x for x in jax.tree.leaves(state) if x.size]
    numbers = [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
    witness = sum(x.ravel()[0].astype(jnp.float64) for x in numbers)
    return jax.tree.map(lambda x: jnp.where(never, witness, x), y)


def _unused(*_: Any) -> Any:
    raise AssertionError("the minimiser evaluates nothing before its first step")


class _WhileBelow(optx.AbstractAdjoint):
    """Runs optimistix's loop from one step to another, which may be arrays.

    In the place of an adjoint, because that is where optimistix lets one choose the
    loop. Derivatives are taken around a solve, never through it.
    """

    limit: Int[Array, ""]
    first: Int[Array, ""]
    goes_on_from_nonfinite: bool = eqx.field(static=True)

    def apply(
        self, primal_fn: Callable, rewrite_fn: Callable, inputs: Any, tags: Any
    ) -> Any:
        """Runs `primal_fn`, which takes the loop as the last of its inputs."""
        del rewrite_fn, tags

        def goes_on(cond: Callable, carry: Any) -> Bool[Array, ""]:
            if not self.goes_on_from_nonfinite:
                return cond(carry)
            # A callback is told of all steps, as upstream's is. optimistix would end a
            # run that is no longer finite; all else that ends one is in the state.
            *_, terminate, _ = carry
            return ~terminate

        def while_loop(cond: Callable, body: Callable, init: Any, **_: Any) -> Any:
            return jax.lax.while_loop(
                lambda carry: (carry[0] < self.limit) & goes_on(cond, carry[1]),
                lambda carry: (carry[0] + 1, body(carry[1])),
                (self.first, init),
            )[1]

        return primal_fn((*inputs, while_loop))
