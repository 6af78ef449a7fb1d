"""Files of mechanisms, and noising matrices as jax-privacy takes them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_privacy import noise_addition
from numpy.testing import assert_allclose
from scipy.linalg import toeplitz as matrix_of

from jaxmf_opt.mechanisms import (
    BandedInverseToeplitz,
    BandedToeplitz,
    BufferedToeplitz,
    Dense,
    NormalizedBandedToeplitz,
    load,
    save,
    workloads,
)
from jaxmf_opt.privacy import Budget

pytestmark = pytest.mark.mixes  # jax-privacy's code

EPOCHS: Any = {"min_sep": 5, "max_participations": 3}
# (It is quick to find much noise.)
BUDGET = Budget(examples=50, batch_size=10, epochs=3, epsilon=0.3, delta=1e-5)
MECHANISMS: list[Any] = [
    BandedToeplitz(15, 4, **EPOCHS),
    BandedToeplitz(15, 1, max_bands=3, **EPOCHS),
    BandedInverseToeplitz(
        15,
        4,
        workload_coef=workloads.momentum(15, 0.5),
        fixed_epochs=True,
        max_error=True,
        **EPOCHS,
    ),
    NormalizedBandedToeplitz(15, 5, **EPOCHS),
    BufferedToeplitz(15, 2, **EPOCHS),
    Dense(15, workload_matrix=np.tri(15), **EPOCHS),
    Dense(15, bands=3, **EPOCHS),
]
NAMES = ["banded", "one band", "inverse", "normalized", "buffered", "dense", "few"]
KEPT = [3, 0, 3, 4, 2, 14, 2]
of_mechanisms = pytest.mark.parametrize("m", MECHANISMS, ids=NAMES)


def noising_matrix(m: Any, params: Any) -> np.ndarray:
    """That of the strategy whose sensitivity is 1."""
    scale = np.sqrt(m.sensitivity_squared(params))
    if isinstance(m, Dense):
        return scale * np.asarray(m.noising_matrix(params))
    matrix = scale * matrix_of(m.noising_coef(params), np.zeros(15))
    if isinstance(m, NormalizedBandedToeplitz):
        return np.asarray(m.column_norms(params))[:, None] * matrix
    return matrix


@of_mechanisms
def test_what_is_loaded_is_what_was_saved(m: Any, tmp_path: Path):
    params = m.initial_params()
    budget = BUDGET if m is MECHANISMS[0] else None
    save(tmp_path / "m.npz", m, params, budget=budget)
    loaded = load(tmp_path / "m.npz")
    assert type(loaded.mechanism) is type(m)
    assert jax.tree.structure(loaded.mechanism) == jax.tree.structure(m)
    for x, y in zip(*map(jax.tree.leaves, (loaded.mechanism, m)), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(loaded.params, params)
    assert (loaded.budget, loaded.amplified) == (budget, False)
    want = None if budget is None else budget.noise_multiplier()
    assert loaded.noise_multiplier == want
    # And for readers without this library:
    with np.load(tmp_path / "m.npz") as file:
        assert_allclose(file["sensitivity"] ** 2, m.sensitivity_squared(params))
        name = "noising_matrix" if isinstance(m, Dense) else "noising_coef"
        want = noising_matrix(m, params)
        got = (
            matrix_of(file[name], np.zeros(15)) if file[name].ndim == 1 else file[name]
        )
        assert_allclose(file.get("column_norms", np.ones(15))[:, None] * got, want)


@of_mechanisms
def test_the_streaming_matrix_is_the_inverse_of_the_strategy(m: Any):
    params = m.initial_params()
    got = m.streaming_matrix(params).materialize(15)
    assert_allclose(got, noising_matrix(m, params), atol=1e-12)


@pytest.mark.parametrize(
    ("m", "kept"), list(zip(MECHANISMS, KEPT, strict=True)), ids=NAMES
)
def test_no_more_vectors_are_kept_than_it_takes(m: Any, kept: int):
    state = m.streaming_matrix(m.initial_params()).init_multiply(jnp.zeros(1000))
    assert sum(x.size for x in jax.tree.leaves(state)) // 1000 == kept


@pytest.mark.parametrize("m", MECHANISMS[-2:], ids=NAMES[-2:])
def test_there_is_no_noise_after_the_last_step(m: Any):
    got = m.streaming_matrix(m.initial_params()).materialize(16)
    assert np.isfinite(got[:15]).all() and np.isnan(got[15]).any()


def test_of_fewer_steps_than_there_might_be(tmp_path: Path):
    m = Dense(np.array(5), workload_matrix=np.tri(7), bands=3)
    save(tmp_path / "m.npz", m, m.initial_params())
    got = load(tmp_path / "m.npz").streaming_matrix().materialize(5)
    assert_allclose(got, m.streaming_matrix(m.initial_params()).materialize(5))


def test_there_is_none_after_the_last_of_fewer_steps_than_there_might_be():
    """Noise that is 0 would be taken for noise."""
    n, coef = jnp.array(6), np.ones(12)
    m = NormalizedBandedToeplitz(n, 3, workload_coef=coef, min_sep=3)
    got = m.streaming_matrix(m.initial_params()).materialize(9)
    assert np.isfinite(got[:6]).all() and np.isnan(got[6:]).any(axis=1).all()


@pytest.mark.parametrize("kind", ["banded", "buffered", "dense"])
def test_noise_in_training_has_the_promised_covariance(kind: str):
    """By jax-privacy's own noise, of pytrees in the dtypes of gradients."""
    m = MECHANISMS[NAMES.index(kind)]
    params, size = m.initial_params(), 20_000
    like = {"a": jnp.zeros(size, "float32"), "b": jnp.zeros((size, 2))}
    privatizer = noise_addition.matrix_factorization_privatizer(
        m.streaming_matrix(params), stddev=2.0, prng_key=jax.random.key(0)
    )

    def step(state: Any, _: Any) -> tuple[Any, Any]:
        noise, state = privatizer.update(like, state)
        return state, noise

    _, noise = jax.jit(lambda s: jax.lax.scan(step, s, length=15))(
        privatizer.init(like)
    )
    matrix = noising_matrix(m, params)
    want = 4 * matrix @ matrix.T
    for name, x in noise.items():
        assert x.dtype == like[name].dtype
        x = np.asarray(x, float).reshape(15, -1)
        unit = np.sqrt(np.outer(np.diag(want), np.diag(want)) / x.shape[1])
        assert np.max(np.abs(x @ x.T / x.shape[1] - want) / unit) < 6


def test_a_multiplier_of_sampling_needs_a_mechanism_for_it(tmp_path: Path):
    path = tmp_path / "m.npz"
    m = BandedToeplitz(15, 4)
    save(path, m, m.initial_params(), budget=BUDGET, amplified=True)
    assert load(path).noise_multiplier == BUDGET.noise_multiplier(4)
    for wrong, of in (
        (MECHANISMS[0], "for one participation"),
        (BandedInverseToeplitz(15, 4), "must be a `BandedToeplitz` or `Dense`"),
        (BandedToeplitz(14, 4), "must have the 15 steps"),
    ):
        with pytest.raises(ValueError, match=of):
            save(path, wrong, wrong.initial_params(), budget=BUDGET, amplified=True)
    closer: Any = {"min_sep": 3, "max_participations": 5}
    save(path, BandedToeplitz(15, 3, **closer), np.ones(3), budget=BUDGET)
    for wrong in (
        m,
        BandedToeplitz(15, 4, min_sep=6, max_participations=3),
        # Exactly three steps apart is not five.
        BandedInverseToeplitz(15, 4, fixed_epochs=True, **closer),
        Dense(15, **closer),
    ):
        with pytest.raises(ValueError, match="3 participations, 5 steps apart"):
            save(path, wrong, wrong.initial_params(), budget=BUDGET)


def test_bad_input(tmp_path: Path):
    m, path = MECHANISMS[0], tmp_path / "m.npz"
    with pytest.raises(TypeError, match="`mechanism` must be one of this module"):
        save(path, "banded", np.ones(4))
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda k: save(path, BandedToeplitz(9, k, max_bands=3), np.ones(3)))(2)
    with pytest.raises(ValueError, match=r"`params` must have shape \(4,\)"):
        save(path, m, np.ones(5))
    with pytest.raises(TypeError, match="`path` must be a path"):
        load(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="it is no file"):
        load(path)
    np.savez(path, x=1)
    with pytest.raises(ValueError, match="no file of `save`"):
        load(path)
