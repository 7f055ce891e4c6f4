"""Gradient bias and spread of the task-loss estimators, against the loss over all targets.

    python benchmarks/estimator_bias.py

prints two Markdown tables (docs/method.md, 4) and writes `benchmarks/results/estimator_bias.json`.
The problem: B queries and N targets are random vectors, the logits s of spread `SPREAD`; draws come
from the softmax of l, which is s of the stale targets, so far away that s - l has the standard
deviation asked for. The gradient is that of the batch's mean loss in the embeddings of queries and
targets. "bias" is |E g_hat - g| / |g|, freed of its own noise by subtracting the noise's expected
square; "sd" is sqrt(E |g_hat - E g_hat|^2) / |g|. Standard errors come from a jackknife over groups
of keys. Deterministic for a given version of jax; about a minute on one core.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from corrector_jax import losses
from corrector_jax.losses import ESTIMATORS, Pool
from corrector_jax.types import Array, Draws

QUERIES = 16
TARGETS = 500
DIM = 16
SPREAD = 2.0
"""Standard deviation of s over targets."""
GAPS = (0.0, 0.95, 1.93)
"""Standard deviations of s - l."""
DRAWS = 8
DRAWS_OF_BALANCED = (4, 8, 16, 32)
SEED = 0
GROUPS, KEYS = 32, 1024
"""Groups for the jackknife, and keys in each."""
RESULTS = Path(__file__).parent / "results" / "estimator_bias.json"


Sums = tuple[tuple[Array, Array], Array]
"""The summed error of a gradient (queries, targets), and its summed square."""


class World(NamedTuple):
    """One problem.

    Attributes:
      queries: [B, D] float32.
      targets: [N, D] float32, fresh.
      logits: [B, N] float32, l, of the stale targets.
      known: [B, N] bool; the labelled positive of query i is target i.
    """

    queries: Array
    targets: Array
    logits: Array
    known: Array


def make_world(gap: float) -> World:
    """A problem whose s - l has this standard deviation over all pairs."""
    rng = np.random.default_rng(SEED)
    queries = rng.normal(size=(QUERIES, DIM)) / np.sqrt(DIM)
    targets = rng.normal(size=(TARGETS, DIM))
    targets[:QUERIES] += 2 * queries  # a positive is nearer than chance
    targets *= SPREAD / (queries @ targets.T).std()
    drift = rng.normal(size=(TARGETS, DIM))
    drift *= gap / (queries @ drift.T).std()
    known = np.zeros((QUERIES, TARGETS), bool)
    known[np.arange(QUERIES), np.arange(QUERIES)] = True
    known[0, 100:103] = True  # one query has several positives
    logits = queries @ (targets - drift).T
    return World(*(jnp.asarray(x, jnp.float32) for x in (queries, targets, logits)), known)


def dense(queries: Array, targets: Array, world: World) -> Array:
    """The mean over queries of the loss over all targets."""
    scores = queries @ targets.T
    return losses.dense(jnp.diagonal(scores[:, :QUERIES]), scores, world.known).mean()


def estimate(
    queries: Array, targets: Array, world: World, ids: Array, name: str, shared: bool
) -> Array:
    """The mean over queries of an estimator's loss for draws [B, m]."""
    positive = jnp.sum(queries * targets[:QUERIES], axis=1)
    masked = jnp.where(world.known, -jnp.inf, world.logits)
    log_z = jax.nn.logsumexp(masked, axis=1)
    log_p = masked - log_z[:, None]
    if shared:
        pool_ids = ids.reshape(-1)
        if name == "truncated":  # the paper's shared pool holds the batch's positives too
            pool_ids = jnp.concatenate([jnp.arange(QUERIES), pool_ids])
        scores = queries @ targets[pool_ids].T
        pool = Pool(pool_ids, scores, log_p[:, pool_ids], ~world.known[:, pool_ids])
    else:
        scores = jnp.einsum("bd,bmd->bm", queries, targets[ids])
        given = jnp.take_along_axis(log_p, ids, axis=1)
        pool = Pool(ids, scores, given, jnp.ones_like(scores, bool))
    drawn = Draws(ids, jnp.zeros(ids.shape), ids >= 0, log_z)
    return ESTIMATORS[name](positive, pool, drawn).mean()


@functools.partial(jax.jit, static_argnames=("name", "shared", "draws"))
def sums(
    world: World, exact: tuple[Array, Array], keys: Array, *, name: str, shared: bool, draws: int
) -> Sums:
    """Over one group of keys: the summed error of the gradient, and its summed square."""
    # Draws by inversion: the problem is small, and Gumbel noise for all targets takes far longer.
    weight = jax.nn.softmax(jnp.where(world.known, -jnp.inf, world.logits))
    below = jnp.cumsum(weight, axis=1)

    def error(key: Array) -> tuple[Array, Array]:
        level = below[:, -1:] * jax.random.uniform(key, (QUERIES, draws))
        ids = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(below, level)
        found = jax.grad(estimate, (0, 1))(world.queries, world.targets, world, ids, name, shared)
        return jax.tree.map(jnp.subtract, found, exact)

    def step(total: Sums, key: Array) -> tuple[Sums, None]:
        gap = error(key)
        square = sum(jnp.sum(jnp.square(leaf)) for leaf in gap)
        return (jax.tree.map(jnp.add, total[0], gap), total[1] + square), None

    nothing = (jax.tree.map(jnp.zeros_like, exact), jnp.zeros(()))
    return jax.lax.scan(step, nothing, keys)[0]


def jackknife(statistic: Callable[[np.ndarray], float], groups: int) -> tuple[float, float]:
    """A statistic of which groups [n] are kept, and its standard error."""
    everything = np.arange(groups)
    without = [statistic(np.delete(everything, i)) for i in range(groups)]
    spread = np.sqrt((groups - 1) * np.var(without))
    return statistic(everything), float(spread)


def measure(gap: float, name: str, *, shared: bool, draws: int) -> dict[str, float]:
    """Bias and spread of one estimator on one problem, with standard errors."""
    world = make_world(gap)
    exact = jax.grad(dense, (0, 1))(world.queries, world.targets, world)
    size = float(sum(np.square(leaf, dtype=np.float64).sum() for leaf in map(np.asarray, exact)))
    errors, squares = [], []
    for group in range(GROUPS):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(SEED), group), KEYS)
        error, square = sums(world, exact, keys, name=name, shared=shared, draws=draws)
        errors.append(np.concatenate([np.ravel(leaf) for leaf in error]).astype(np.float64))
        squares.append(float(square))
    by_group, of_squares = np.stack(errors), np.array(squares)

    def parts(kept: np.ndarray) -> tuple[float, float]:
        """|bias|^2 without its noise, and the variance, over |g|^2."""
        count = len(kept) * KEYS
        mean = by_group[kept].sum(axis=0) / count
        variance = (of_squares[kept].sum() / count - (mean**2).sum()) * count / (count - 1)
        return ((mean**2).sum() - variance / count) / size, variance / size

    bias, of_bias = jackknife(lambda kept: float(np.sqrt(max(parts(kept)[0], 0.0))), GROUPS)
    spread, of_spread = jackknife(lambda kept: float(np.sqrt(parts(kept)[1])), GROUPS)
    return {"bias": bias, "bias_error": of_bias, "sd": spread, "sd_error": of_spread}


def main() -> None:
    """Measures, prints and writes."""
    forms = [(name, False) for name in ("single", "weighted")]
    forms += [("balanced", True), ("truncated", False), ("truncated", True)]
    table = [
        {"estimator": name, "pool": "shared" if shared else "own", "gap": gap, "draws": DRAWS}
        | measure(gap, name, shared=shared, draws=DRAWS)
        for name, shared in forms
        for gap in GAPS
    ]
    growth = [
        {"estimator": "balanced", "pool": "shared", "gap": 0.0, "draws": draws}
        | measure(0.0, "balanced", shared=True, draws=draws)
        for draws in DRAWS_OF_BALANCED
    ]
    print(f"Bias / sd of the gradient, m = {DRAWS}, B = {QUERIES}, N = {TARGETS}:\n")
    print("| estimator | pool | " + " | ".join(f"sd(s - l) = {gap}" for gap in GAPS) + " |")
    print("|---|---|" + "---|" * len(GAPS))
    for start in range(0, len(table), len(GAPS)):
        row = table[start : start + len(GAPS)]
        cells = " | ".join(f"{r['bias']:.4f} ± {r['bias_error']:.4f} / {r['sd']:.2f}" for r in row)
        print(f"| {row[0]['estimator']} | {row[0]['pool']} | {cells} |")
    print("\n`balanced` with an exact corrector:\n")
    print("| m | B m | bias | falls by |\n|---|---|---|---|")
    for before, row in zip([None, *growth], growth, strict=False):
        falls = f"{before['bias'] / row['bias']:.2f}" if before and row["bias"] else ""
        cell = f"{row['bias']:.5f} ± {row['bias_error']:.5f}"
        print(f"| {row['draws']} | {QUERIES * row['draws']} | {cell} | {falls} |")
    problem = {
        "queries": QUERIES, "targets": TARGETS, "dim": DIM, "spread": SPREAD, "seed": SEED,
        "keys": GROUPS * KEYS, "jax": jax.__version__,
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    content = {"problem": problem, "table": table, "balanced_by_draws": growth}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
