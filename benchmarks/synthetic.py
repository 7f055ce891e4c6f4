"""What a corrector can mend, where everything is known: width x staleness x pairs.

    python -m benchmarks.synthetic

Targets are a Gaussian mixture on the unit sphere; drift is a smooth random map of strength s (a
rotation and a small network) and a part that no map can know. Correctors learn from pairs (C[y],
g(y)) whose targets were drawn by score, as in training, and are judged on targets held out: drawn
uniformly, and drawn by score; and by KL(P || P_h) of held-out queries over all targets. Settings
are those of configs/synthetic.py; writes benchmarks/results/synthetic.json and
docs/images/synthetic.png. What it says is docs/theory.md.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from configs import synthetic
from corrector_jax import losses
from corrector_jax.metrics import Divergence
from corrector_jax.models import corrector as correctors
from corrector_jax.models.corrector import Corrector
from corrector_jax.types import Array, PyTree

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "synthetic.json"
PICTURE = ROOT / "docs" / "images" / "synthetic.png"
TOP = 10


class World(NamedTuple):
    """Targets before and after they drifted, and queries.

    Attributes:
      stale: [N, D] unit rows; the last `held_out` of them are in no pair.
      fresh: [N, D] unit rows, g(y).
      queries: [Q, D] unit rows that pairs are drawn for.
      others: [Q, D] unit rows held out.
    """

    stale: Array
    fresh: Array
    queries: Array
    others: Array


def make_world(key: Array, strength: Array, *, c: ConfigDict) -> World:
    """A corpus and its drift.

    Args:
      key: a PRNG key: it fixes corpus, queries and directions, whatever the strength.
      strength: s, scalar.
      c: the settings.

    Returns:
      The world.
    """
    center_key, which_key, spread_key, turn_key, net_key, noise_key, query_key = jax.random.split(
        key, 7
    )
    centers = jax.random.normal(center_key, (c.clusters, c.dim))
    cluster = jax.random.randint(which_key, (c.targets,), 0, c.clusters)
    stale = unit(centers[cluster] + c.spread * jax.random.normal(spread_key, (c.targets, c.dim)))
    # A rotation by about s radians in every plane of a random choice.
    skew = jax.random.normal(turn_key, (c.dim, c.dim)) / jnp.sqrt(c.dim)
    turn = jax.scipy.linalg.expm(strength * (skew - skew.T) / 2)
    inner, outer = jax.random.normal(net_key, (2, c.dim, c.dim))
    bent = jnp.tanh(stale @ inner) @ outer / c.dim
    noise = jax.random.normal(noise_key, stale.shape) / jnp.sqrt(c.dim)
    fresh = unit(stale @ turn + strength * (bent + c.unpredictable * noise))
    ids = jax.random.randint(query_key, (2 * c.queries,), 0, c.targets)
    near = jax.random.normal(jax.random.fold_in(query_key, 1), (2 * c.queries, c.dim))
    queries = unit(fresh[ids] + c.spread * near / jnp.sqrt(c.dim))
    return World(stale, fresh, queries[: c.queries], queries[c.queries :])


def unit(rows: Array) -> Array:
    """[..., D] divided by its length."""
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def draw_pairs(key: Array, world: World, count: int, *, c: ConfigDict) -> Array:
    """Ids [count] of targets that may be in pairs, by the stale softmax of some query each."""
    query_key, draw_key = jax.random.split(key)
    rows = world.stale[: c.targets - c.held_out]
    ids = jax.random.randint(query_key, (count,), 0, c.queries)
    logits = c.beta * world.queries @ rows.T
    return jax.random.categorical(draw_key, logits[ids], axis=-1)


def fit(key: Array, stale: Array, fresh: Array, *, corrector: Corrector, c: ConfigDict) -> PyTree:
    """A corrector's parameters after Adam on pairs [P, D], from the identity."""
    init_key, order_key = jax.random.split(key)
    params = corrector.init(init_key, c.dim)
    tx = optax.adam(optax.cosine_decay_schedule(c.learning_rate, c.steps))
    size = min(c.batch_size, len(stale))

    def loss(params: PyTree, rows: Array) -> Array:
        estimate = corrector.apply(params, stale[rows], 1.0)
        return losses.drift_mse(estimate, fresh[rows], jnp.ones(size))

    def step(carry: tuple[PyTree, PyTree], number: Array) -> tuple[tuple[PyTree, PyTree], None]:
        params, opt_state = carry
        key = jax.random.fold_in(order_key, number)
        rows = (
            jax.random.permutation(key, len(stale))[:size]
            if size < len(stale)
            else (jnp.arange(size))
        )
        updates, opt_state = tx.update(jax.grad(loss)(params, rows), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(c.steps))
    return params


def judge(params: PyTree, world: World, ids: Array, *, corrector: Corrector, c: ConfigDict) -> Any:
    """Errors (relative, squared), divergences over all targets in nats, and the bounds on them."""
    corrected = corrector.apply(params, world.stale, 1.0)
    errors = jnp.sum(jnp.square(corrected - world.fresh), axis=1)
    drift = jnp.sum(jnp.square(world.stale - world.fresh), axis=1)
    held = jnp.arange(c.targets) >= c.targets - c.held_out
    fresh = c.beta * world.others @ world.fresh.T  # [Q, N]

    def against(rows: Array) -> dict[str, Array]:
        logits = c.beta * world.others @ rows.T
        gap = logits - fresh
        kl = Divergence.of(fresh, logits, jnp.ones(c.targets, bool)).kl()
        delta = jnp.abs(gap).max(axis=1)
        width = gap.max(axis=1) - gap.min(axis=1)
        tops = [jax.lax.top_k(x, TOP)[1] for x in (fresh, logits)]
        return {
            "kl": kl.mean(),
            "delta": delta.max(),
            # Per query, so that no slack of another hides a violation.
            "kl_over_bound": (kl / (delta**2 / 2)).max(),
            "kl_over_sharper_bound": (kl / (width**2 / 8)).max(),
            "overlap": (tops[0][:, :, None] == tops[1][:, None, :]).any(-1).mean(),
        }

    # By score, as pairs are: what the same queries would draw among the targets that no pair has.
    mass = jax.nn.softmax(c.beta * world.queries @ world.stale.T, axis=1)
    mass = jnp.where(held, mass.sum(axis=0), 0.0)
    mass = mass / mass.sum()
    return {
        "distinct": (jnp.bincount(ids, length=c.targets) > 0).sum(),
        "error_pairs": errors[ids].mean(),
        "error_uniform": (errors * held).sum() / held.sum(),
        "error_selected": (errors * mass).sum(),
        "drift_uniform": (drift * held).sum() / held.sum(),
        "drift_selected": (drift * mass).sum(),
        "corrected": against(corrected),
        "stale": against(world.stale),
    }


def cell(width: int, pairs: int, *, c: ConfigDict) -> dict[str, np.ndarray]:
    """One width and number of pairs, for every strength and seed: name -> [strengths, seeds]."""
    kind = "mlp" if width else "linear"
    # The linear one without its lengths: what leaving them out costs is part of the study.
    corrector = correctors.make(kind, hidden=width, normalize=bool(width))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))  # strengths
    @functools.partial(jax.vmap, in_axes=(None, 0))  # seeds
    def run(strength: Array, seed: Array) -> Any:
        world_key, pair_key, fit_key = jax.random.split(jax.random.key(seed), 3)
        world = make_world(world_key, strength, c=c)
        ids = draw_pairs(pair_key, world, pairs, c=c)
        params = fit(fit_key, world.stale[ids], world.fresh[ids], corrector=corrector, c=c)
        return judge(params, world, ids, corrector=corrector, c=c)

    found = run(jnp.asarray(c.strengths), jnp.arange(c.seeds))
    flat, _ = jax.tree_util.tree_flatten_with_path(found)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in flat
    }


def parameters(width: int, dim: int) -> int:
    """How many numbers a corrector learns."""
    return 2 * dim * width + width + dim if width else dim * dim + dim


def exponents(rows: list[dict[str, Any]], c: ConfigDict) -> list[dict[str, Any]]:
    """How the gap between held-out and training error falls: gap ~ (distinct pairs)^exponent.

    Over the numbers of pairs that give more equations than there are parameters; None where fewer
    than three of them are left, or a gap is not above 0.
    """
    found = []
    for width in c.widths:
        for strength in c.strengths:
            cells = [
                row
                for row in rows
                if (row["width"], row["strength"]) == (width, strength)
                and row["distinct"] * c.dim > parameters(width, c.dim)
            ]
            gaps = np.array([row["error_selected"] - row["error_pairs"] for row in cells])
            slope = None
            if len(gaps) > 2 and (gaps > 0).all():
                pairs = np.log([row["distinct"] for row in cells])
                slope = round(float(np.polyfit(pairs, np.log(gaps), 1)[0]), 2)
            found.append({"width": width, "strength": strength, "exponent": slope})
    return found


def draw(result: dict[str, Any], c: ConfigDict) -> None:
    """The picture: errors and KL over pairs for every width, and KL against its bound."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    middle = c.strengths[len(c.strengths) // 2]
    for color, width in zip(("#5d6670", "#e69f00", "#0072b2", "#009e73"), c.widths, strict=True):
        rows = [
            row for row in result["cells"] if (row["width"], row["strength"]) == (width, middle)
        ]
        pairs = [row["pairs"] for row in rows]
        name = f"mlp, H = {width}" if width else "linear"
        axes[0].loglog(pairs, [row["error_selected"] for row in rows], color=color, label=name)
        axes[0].loglog(pairs, [row["error_pairs"] for row in rows], "--", color=color, lw=1)
        axes[1].loglog(pairs, [row["corrected/kl"] for row in rows], color=color, label=name)
    axes[0].axhline(rows[0]["drift_selected"], color="#d55e00", lw=1)
    axes[0].annotate("stale", (pairs[0], rows[0]["drift_selected"]), va="bottom", color="#d55e00")
    axes[1].axhline(rows[0]["stale/kl"], color="#d55e00", lw=1)
    axes[1].annotate("stale", (pairs[0], rows[0]["stale/kl"]), va="bottom", color="#d55e00")
    axes[0].set(
        xlabel="pairs", title=f"|h(C) - g|² on held-out draws (dashed: on the pairs), s = {middle}"
    )
    axes[1].set(xlabel="pairs", title=f"KL(P ‖ P_h) in nats, s = {middle}")
    for row in result["cells"]:
        axes[2].loglog(row["corrected/delta"] ** 2 / 2, row["corrected/kl"], ".", color="#0072b2")
        axes[2].loglog(row["stale/delta"] ** 2 / 2, row["stale/kl"], ".", color="#d55e00")
    axes[0].set_ylim(bottom=1e-4)  # a wide one learns few pairs by heart, to the last bit
    ends = np.array(axes[2].get_xlim())
    axes[2].loglog(ends, ends, color="#1d2126", lw=1)
    axes[2].set(xlabel="δ² / 2", title="KL and its bound (blue: corrected, orange: stale)")
    axes[1].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.title.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=110)


def study(c: ConfigDict) -> dict[str, Any]:
    """Every cell, and what follows from all of them."""
    cells = []
    for width in c.widths:
        for pairs in c.pairs:
            found = cell(width, pairs, c=c)
            for number, strength in enumerate(c.strengths):
                row: dict[str, Any] = {"width": width, "strength": strength, "pairs": pairs}
                for name, values in found.items():
                    row[name] = float(f"{values[number].mean():.4g}")
                row["kl_sd"] = float(f"{values_sd(found['corrected/kl'][number]):.2g}")
                cells.append(row)
            print(json.dumps(cells[-2 if len(c.strengths) > 1 else -1]), flush=True)
    names = [f"{which}/kl_over_bound" for which in ("corrected", "stale")]
    sharper = [f"{which}/kl_over_sharper_bound" for which in ("corrected", "stale")]
    return {
        "command": "python -m benchmarks.synthetic",
        "settings": c.to_dict(),
        "largest_kl_over_bound": max(row[name] for row in cells for name in names),
        "largest_kl_over_sharper_bound": max(row[name] for row in cells for name in sharper),
        "gap_falls_as_pairs_to_the": exponents(cells, c),
        "cells": cells,
    }


def values_sd(values: np.ndarray) -> float:
    """Standard deviation over seeds; 0 for one."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def main() -> None:
    """Runs the study, writes and draws."""
    c = synthetic.get_config()
    result = study(c)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, c)
    print(f"KL / (delta^2 / 2) is at most {result['largest_kl_over_bound']:.3f}")


if __name__ == "__main__":
    main()
