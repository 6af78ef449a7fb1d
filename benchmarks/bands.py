"""The number of bands for a privacy budget: one sweep, or jax-privacy's threads.

    python -m benchmarks.bands

100,000 examples, batches of 512, 20 epochs, and all 26 numbers of bands that divide the
3,900 steps: DP-BandMF's strategies for amplification by cyclic Poisson sampling. Each
way has a process of its own, so it is cold, as it is for whoever asks once. Accounting
is left out on both sides: theirs is by Renyi differential privacy, ours is tight.

A run on two cores:

    jax-privacy, a solve in a thread for each: 121.8 s
    jaxmf_opt, one sweep:                        7.5 s, 0.06 of it
    largest loss over the other's:             1.0000000
"""

import concurrent.futures
import multiprocessing
import time

import jax
import jax.numpy as jnp
import numpy as np

STEPS = 3900
BANDS = [b for b in range(1, 196) if STEPS % b == 0]


def theirs() -> list[np.ndarray]:
    """As `toeplitz.optimize_coefs_for_amplifications` does it."""
    from jax_privacy.matrix_factorization import toeplitz

    with concurrent.futures.ThreadPoolExecutor() as pool:
        coefs = pool.map(lambda b: toeplitz.optimize_banded_toeplitz(STEPS, b), BANDS)
        return [np.asarray(coef) for coef in coefs]


def ours() -> list[np.ndarray]:
    """All numbers of bands as lanes."""
    from jaxmf_opt import ROBUST_OPTIMIZER, sweep
    from jaxmf_opt.mechanisms import BandedToeplitz

    def mechanism(bands: jax.Array | int) -> BandedToeplitz:
        return BandedToeplitz(STEPS, bands, max_bands=max(BANDS))

    found = sweep(
        lambda coef, bands: mechanism(bands).loss(coef),
        mechanism(max(BANDS)).initial_params(),
        jnp.array(BANDS),
        optimizer=ROBUST_OPTIMIZER,
        rtol=1e-6,
        progress=False,
    )
    return [np.asarray(x)[:b] for x, b in zip(found.value, BANDS, strict=True)]


def _timed(way: str) -> tuple[float, np.ndarray]:
    """The seconds of one way, and the losses that it finds."""
    jax.config.update("jax_enable_x64", True)
    started = time.perf_counter()
    coefs = {"theirs": theirs, "ours": ours}[way]()
    took = time.perf_counter() - started
    from jaxmf_opt.mechanisms import BandedToeplitz

    losses = [BandedToeplitz(STEPS, c.size).loss(c) for c in coefs]
    return took, np.array(losses)


def main() -> None:
    """Times both ways, and prints how they compare."""
    # (Spawned, so that nothing is compiled yet.)
    results = {}
    for way in ("theirs", "ours"):
        with concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn")
        ) as pool:
            results[way] = pool.submit(_timed, way).result()
    (slow, want), (quick, got) = results["theirs"], results["ours"]
    print(f"jax-privacy, a solve in a thread for each: {slow:5.1f} s")
    print(f"jaxmf_opt, one sweep:                      {quick:5.1f} s, ", end="")
    print(f"{quick / slow:.2f} of it")
    print(f"largest loss over the other's:             {np.max(got / want):9.7f}")


if __name__ == "__main__":
    main()
