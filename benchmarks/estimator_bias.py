"""Gradient bias and spread of the task-loss estimators, against the loss over all targets.

    python -m benchmarks.estimator_bias
    python -m benchmarks.estimator_bias --data=DIR_OR_FILE

The problem: B queries, N targets, and their logits s and l; draws come from the softmax of l. The
first command makes both up: random vectors, s of spread `SPREAD`, and l is s of the stale targets,
so far away that s - l has the standard deviation asked for. The second trains in the setting of
the grid `small` (benchmarks/grids.py) with a linear corrector, and takes dev queries, their
positives and a sample of the other targets as the encoder has them at the end: l is s itself, s of
the corrected cache, or s of the stale one.

The gradient is that of the batch's mean loss in the embeddings of queries and targets. "bias" is
|E g_hat - g| / |g|, freed of its own noise by subtracting the noise's expected square; "sd" is
sqrt(E |g_hat - E g_hat|^2) / |g|. Standard errors come from a jackknife over groups of keys.

Prints Markdown tables (docs/method.md, 4) and writes benchmarks/results/estimator_bias.json, of the
second command estimator_bias_real.json and a picture beside it. Deterministic for a given version
of jax; minutes on one core.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import grid_data
from benchmarks.comparison import COLOURS, canvas
from benchmarks.corrector_study import embedded, training
from benchmarks.grids import GRIDS, config_of
from corrector_jax import chips, losses, paths
from corrector_jax.job import make_job
from corrector_jax.losses import ESTIMATORS, Pool
from corrector_jax.report.plots import LIGHT
from corrector_jax.types import Array, Draws, UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

QUERIES, TARGETS, DIM = 16, 500, 16
"""Of the problem that is made up."""
SPREAD = 2.0
"""Standard deviation of s over its targets."""
GAPS = (0.0, 0.95, 1.93)
"""Standard deviations of s - l."""
DRAWS = 8
DRAWS_OF_BALANCED = (4, 8, 16, 32)
SEED = 0
GROUPS, KEYS = 32, 1024
"""Groups for the jackknife, and keys in each."""

REAL_QUERIES, REAL_TARGETS, REAL_DRAWS, REAL_KEYS = 32, 2048, 4, 32
"""Of real embeddings, as many queries and draws as the grid's; fewer keys, longer vectors."""
REAL_SEED = 101
"""Not one of the grid's."""

FORMS = (
    ("single", False),
    ("weighted", False),
    ("kool", False),
    ("balanced", True),
    ("truncated", False),
    ("truncated", True),
)
"""Estimators, and whether all draws of the batch are one pool."""

Sums = tuple[tuple[Array, Array], Array]
"""The summed error of a gradient (queries, targets), and its summed square."""


class World(NamedTuple):
    """One problem.

    Attributes:
      queries: [B, D] float32.
      targets: [N, D] float32, fresh.
      logits: [B, N] float32, l.
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


def real_worlds(source: str, runs: Path) -> tuple[dict[str, World], dict[str, Any]]:
    """The same problem thrice, draws by exact, corrected and stale logits, after a training run.

    Args:
      source: a data set in any layout, with a dev split.
      runs: where the grid's data go.

    Returns:
      Which logits -> the problem, and what it was made from.

    Raises:
      UserError: the data cannot be had.
    """
    grid = GRIDS["small"]
    config = config_of(grid.setting, "corrected-linear", REAL_SEED)
    config.data.path = str(grid_data.write(source, runs / "data", targets=grid.targets))
    job = make_job(config)
    for trained in training(job):  # noqa: B007 - the last one counts
        pass
    state, cache = trained
    rng, asked = np.random.default_rng(REAL_SEED), job.data.splits[job.dev_split]
    # Their labelled positives are different targets: row i of the problem is query i's.
    _, once = np.unique([rows[0] for rows in asked.positives], return_index=True)
    chosen = rng.choice(once, REAL_QUERIES, replace=False)
    positives = np.array([asked.positives[i][0] for i in chosen])
    others = np.setdiff1d(np.arange(job.size), positives)
    ids = np.concatenate(
        [positives, rng.choice(others, REAL_TARGETS - REAL_QUERIES, replace=False)]
    )
    rows = embedded(job, jax.jit(job.model.encode_targets), state.params, cache, ids)
    tokens = jnp.asarray(job.query_tokens[job.dev_split][chosen])
    # Half of beta on either side: scores are products of the two.
    scale = config.model.beta**0.5
    queries = scale * jax.jit(job.model.encode_queries)(state.params, tokens)
    corrected = job.method.corrector.apply(state.corrector.params, rows["stale"], 1.0)
    known = np.stack([np.isin(ids, asked.positives[i]) for i in chosen])
    targets = scale * jnp.asarray(rows["fresh"])
    worlds = {
        name: World(queries, targets, scale * queries @ jnp.asarray(drawn_by).T, known)
        for name, drawn_by in (
            ("exact", rows["fresh"]),
            ("corrected", corrected),
            ("stale", rows["stale"]),
        )
    }
    return worlds, {"steps": config.train.steps, "corpus": job.size, "seed": REAL_SEED}


def dense(queries: Array, targets: Array, world: World) -> Array:
    """The mean over queries of the loss over all targets."""
    scores = queries @ targets.T
    return losses.dense(jnp.diagonal(scores), scores, world.known).mean()


class Proposal(NamedTuple):
    """What a problem's draws come from, the same for every key.

    Attributes:
      log_z: [B] float32, of the targets that are no known positives.
      log_p: [B, N] float32, -inf at those.
      below: [B, N] float32, the sum of the probabilities up to each target.
    """

    log_z: Array
    log_p: Array
    below: Array


def proposal_of(world: World) -> Proposal:
    """The softmax of a problem's logits, over what may be drawn."""
    masked = jnp.where(world.known, -jnp.inf, world.logits)
    log_z = jax.nn.logsumexp(masked, axis=1)
    log_p = masked - log_z[:, None]
    return Proposal(log_z, log_p, jnp.cumsum(jnp.exp(log_p), axis=1))


def estimate(
    queries: Array,
    targets: Array,
    world: World,
    proposal: Proposal,
    drawn: Draws,
    name: str,
    shared: bool,
) -> Array:
    """The mean over queries of an estimator's loss for draws [B, m]."""
    positives = len(queries)
    positive = jnp.sum(queries * targets[:positives], axis=1)
    if shared:
        pool_ids = drawn.ids.reshape(-1)
        if name == "truncated":  # the paper's shared pool holds the batch's positives too
            pool_ids = jnp.concatenate([jnp.arange(positives), pool_ids])
        scores = queries @ targets[pool_ids].T
        pool = Pool(pool_ids, scores, proposal.log_p[:, pool_ids], ~world.known[:, pool_ids])
    else:
        scores = jnp.einsum("bd,bmd->bm", queries, targets[drawn.ids])
        given = jnp.take_along_axis(proposal.log_p, drawn.ids, axis=1)
        pool = Pool(drawn.ids, scores, given, jnp.ones_like(scores, bool))
    return ESTIMATORS[name](positive, pool, drawn).mean()


def draw(proposal: Proposal, key: Array, draws: int, *, replacing: bool) -> Draws:
    """m draws of every query, with replacement or without."""
    log_p, below, kappa = proposal.log_p, proposal.below, None
    if replacing:
        # By inversion: the problem is small, and Gumbel noise for all targets takes far longer.
        level = below[:, -1:] * jax.random.uniform(key, (len(log_p), draws))
        ids = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(below, level)
    else:
        best, ids = jax.lax.top_k(log_p + jax.random.gumbel(key, log_p.shape), draws + 1)
        kappa, ids = best[:, -1], ids[:, :-1]
    return Draws(ids, jnp.zeros(ids.shape), ids >= 0, proposal.log_z, kappa)


@functools.partial(jax.jit, static_argnames=("name", "shared", "draws"))
def sums(
    world: World, exact: tuple[Array, Array], keys: Array, *, name: str, shared: bool, draws: int
) -> Sums:
    """Over one group of keys: the summed error of the gradient, and its summed square."""
    proposal = proposal_of(world)

    def step(total: Sums, key: Array) -> tuple[Sums, None]:
        drawn = draw(proposal, key, draws, replacing=name != "kool")
        found = jax.grad(estimate, (0, 1))(
            world.queries, world.targets, world, proposal, drawn, name, shared
        )
        gap = jax.tree.map(jnp.subtract, found, exact)
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


def measure(
    world: World, name: str, *, shared: bool, draws: int, keys: int = KEYS
) -> dict[str, float]:
    """Bias and spread of one estimator on one problem, with standard errors."""
    exact = jax.grad(dense, (0, 1))(world.queries, world.targets, world)
    size = float(sum(np.square(leaf, dtype=np.float64).sum() for leaf in map(np.asarray, exact)))
    errors, squares = [], []
    for group in range(GROUPS):
        of_group = jax.random.split(jax.random.fold_in(jax.random.key(SEED), group), keys)
        error, square = sums(world, exact, of_group, name=name, shared=shared, draws=draws)
        errors.append(np.concatenate([np.ravel(leaf) for leaf in error]).astype(np.float64))
        squares.append(float(square))
    # What the jackknife asks is of sums and their products alone.
    by_group, of_squares = np.stack(errors), np.array(squares)
    products = by_group @ by_group.T

    def parts(kept: np.ndarray) -> tuple[float, float]:
        """|bias|^2 without its noise, and the variance, over |g|^2."""
        count = len(kept) * keys
        mean = products[np.ix_(kept, kept)].sum() / count**2
        variance = (of_squares[kept].sum() / count - mean) * count / (count - 1)
        return (mean - variance / count) / size, variance / size

    bias, of_bias = jackknife(lambda kept: float(np.sqrt(max(parts(kept)[0], 0.0))), GROUPS)
    spread, of_spread = jackknife(lambda kept: float(np.sqrt(parts(kept)[1])), GROUPS)
    return {"bias": bias, "bias_error": of_bias, "sd": spread, "sd_error": of_spread}


def rows_of(table: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Measures of every form as Markdown, a column for each kind of logits."""
    lines = [f"| estimator | pool | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    rows: dict[tuple[str, str], list[str]] = {}
    for r in table:
        cell = f"{r['bias']:.4f} ± {r['bias_error']:.4f} / {r['sd']:.2f}"
        rows.setdefault((r["estimator"], r["pool"]), []).append(cell)
    lines += [f"| `{name}` | {pool} | {' | '.join(of)} |" for (name, pool), of in rows.items()]
    return "\n".join(lines)


def pool_of(shared: bool) -> str:
    """The word for it in tables."""
    return "shared" if shared else "own"


def made_up() -> dict[str, Any]:
    """Measures the problem that is made up, and prints its tables."""
    table = [
        {"estimator": name, "pool": pool_of(shared), "gap": gap, "draws": DRAWS}
        | measure(make_world(gap), name, shared=shared, draws=DRAWS)
        for name, shared in FORMS
        for gap in GAPS
    ]
    growth = [
        {"estimator": "balanced", "pool": "shared", "gap": 0.0, "draws": draws}
        | measure(make_world(0.0), "balanced", shared=True, draws=draws)
        for draws in DRAWS_OF_BALANCED
    ]
    print(f"Bias / sd of the gradient, m = {DRAWS}, B = {QUERIES}, N = {TARGETS}:\n")
    print(rows_of(table, [f"sd(s - l) = {gap}" for gap in GAPS]))
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
    return {"problem": problem, "table": table, "balanced_by_draws": growth}


def real(source: str, runs: Path) -> dict[str, Any]:
    """Measures real embeddings, and prints the table.

    Raises:
      UserError: the data cannot be had.
    """
    worlds, origin = real_worlds(source, runs)
    table = []
    for name, shared in FORMS:
        for drawn_by, world in worlds.items():
            found = measure(world, name, shared=shared, draws=REAL_DRAWS, keys=REAL_KEYS)
            table.append({"estimator": name, "pool": pool_of(shared), "drawn_by": drawn_by} | found)
    gaps = {
        name: float(jnp.std(world.queries @ world.targets.T - world.logits))
        for name, world in worlds.items()
    }
    shape = f"m = {REAL_DRAWS}, B = {REAL_QUERIES}, N = {REAL_TARGETS}"
    print(f"Bias / sd of the gradient, {shape}:\n")
    print(rows_of(table, [f"{name}, sd(s - l) = {gap:.2f}" for name, gap in gaps.items()]))
    return {
        "command": "python -m benchmarks.estimator_bias --data=DIR_OR_FILE",
        **origin,
        **{"queries": REAL_QUERIES, "targets": REAL_TARGETS, "draws": REAL_DRAWS},
        **{"keys": GROUPS * REAL_KEYS, "jax": jax.__version__, "sd_of_s_minus_l": gaps},
        "table": table,
    }


def picture(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Bias against spread: a colour for each estimator, a marker for what draws are made by."""
    figure, ax = canvas(6.4, 4.0)
    markers = {"exact": "o", "corrected": "s", "stale": "^"}
    for (name, shared), colour in zip(FORMS, COLOURS, strict=False):
        of = [r for r in table if (r["estimator"], r["pool"]) == (name, pool_of(shared))]
        sd, bias = [r["sd"] for r in of], [r["bias"] for r in of]
        ax.plot(sd, bias, "-", color=colour, linewidth=1, label=f"{name}, {pool_of(shared)} pool")
        for r in of:
            ax.plot(r["sd"], r["bias"], markers[r["drawn_by"]], color=colour, markersize=6)
    for name, marker in markers.items():
        ax.plot([], [], marker, color=LIGHT.ink, label=f"drawn by {name} logits")
    ax.set_xlabel("standard deviation of one estimate / length of the gradient")
    ax.set_ylabel("bias / length of the gradient")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="", help="real embeddings of this data set instead")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "estimator_bias")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    chips.find_devices()
    try:
        found = real(arguments.data, arguments.runs.resolve()) if arguments.data else made_up()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = "estimator_bias_real" if arguments.data else "estimator_bias"
    paths.write(arguments.results / f"{name}.json", json.dumps(found, indent=1) + "\n")
    if arguments.data:
        picture(found["table"]).savefig(arguments.results / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
