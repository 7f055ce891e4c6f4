"""The ScaNN path: how many of the likely targets it finds, how good log Z is, and what it costs.

    python -m benchmarks.scann_candidates --data=DIR --part=small   # a data set of some 16k targets
    python -m benchmarks.scann_candidates --part=large              # a million rows, made up

`small` embeds a data set with the first two layers of MiniLM, at 32 tokens, and trains on it for
some steps, with the search and without it; `large` is made of clusters. Queries are held-out ones,
or rows moved a little. Recall is of the best K by corrected score; log Z is held against the sweep
of `two_level`, whose seconds stand beside those of a draw. A moved mlp corrector is a random one,
so large that rows move by `MOVED` (squared): the index knows nothing of it. A few minutes each on
two idle cores; the load of the machine is in the result. Writes
`benchmarks/results/scann_candidates.json`, each part its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corrector_jax import cache as caches
from corrector_jax import config as configs
from corrector_jax import index, rng
from corrector_jax.cache import TargetCache
from corrector_jax.embed import go_over
from corrector_jax.job import Job, make_job
from corrector_jax.lookahead import make_lookahead
from corrector_jax.models.corrector import Corrector, Identity, Mlp
from corrector_jax.negatives import Candidates, Gated, TwoLevel
from corrector_jax.refresh import CacheWriter
from corrector_jax.sharding import Placement, make_placement
from corrector_jax.train import place_batch
from corrector_jax.types import Batch

RESULTS = Path(__file__).parent / "results" / "scann_candidates.json"
BETA, DRAWS, BATCH, QUERIES = 20.0, 8, 32, 128
CANDIDATES, TAILS = (64, 256, 1024), (256, 1024, 4096)
MOVED = 0.3
KEYS = 3  # tails per batch of queries
STEPS = 8  # of training, each way, twice
LARGE, DIM, CLUSTERS = 1_000_000, 384, 5_000


def moved_mlp(rows: np.ndarray) -> tuple[Corrector, Gated]:
    """An mlp with |h(c) - c|^2 = MOVED on average."""
    corrector = Mlp()
    params = corrector.init(jax.random.key(0), rows.shape[1])
    noise = jax.random.normal(jax.random.key(1), params["outer"]["kernel"].shape)
    low, high = 0.0, 1.0
    for _ in range(20):
        scale = (low + high) / 2
        params["outer"]["kernel"] = scale * noise
        moved = corrector.apply(params, jnp.asarray(rows[:2000]), 1.0) - rows[:2000]
        far = float(jnp.square(moved).sum(axis=1).mean()) > MOVED
        low, high = (low, scale) if far else (scale, high)
    return corrector, Gated(params, jnp.float32(1.0))


def batches(queries: np.ndarray) -> list[Batch]:
    """The queries in batches; nothing is known of them."""
    known = np.full((BATCH, 1), -1, np.int32)
    tokens, there = np.zeros((BATCH, 1), np.int32), np.ones(BATCH, bool)
    return [Batch(tokens, known[:, 0], known, there)] * (len(queries) // BATCH)


def seconds(work: Callable[..., Any], *arguments: Any, times: int = 3) -> float:
    """Median wall-clock seconds, after one call that is not counted."""
    jax.block_until_ready(work(*arguments))
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        jax.block_until_ready(work(*arguments))
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def measure(
    cache: TargetCache, rows: np.ndarray, queries: np.ndarray, place: Placement, moved: bool
) -> dict[str, Any]:
    """Recall and log Z over K and M, and seconds of a draw, a search and a sweep.

    Args:
      cache: the rows, on the mesh.
      rows: the same [N, D] float32 on the host.
      queries: [Q, D] float32.
      place: the mesh.
      moved: also with a corrector that the index knows nothing of.
    """
    size = len(rows)
    started = time.perf_counter()
    made = index.parameters(size, max(CANDIDATES))
    if made.leaves == 1:
        raise ValueError("so few rows are searched exactly: nothing to measure")
    built = index.build(np.arange(size, dtype=np.int32), rows, k=max(CANDIDATES), made=made)
    found: dict[str, Any] = {
        "targets": size,
        "dim": rows.shape[1],
        "leaves": made.leaves,
        "build_seconds": round(time.perf_counter() - started, 1),
        "search": [],
    }
    for k in CANDIDATES:
        tuned = for_k(built, k)
        taken = round(seconds(tuned.search, queries[:BATCH], k), 4)
        found["search"].append({"K": k, **tuned.parameters._asdict(), "seconds": taken})
    correctors: list[tuple[str, Corrector, Gated]] = [
        ("identity", Identity(), Gated({}, jnp.float32(1.0)))
    ]
    if moved:
        correctors.append((f"mlp moved by {MOVED}", *moved_mlp(rows)))
    for name, corrector, psi in correctors:
        found[name] = with_corrector(cache, queries, built, corrector, psi, size, place)
    return found


def for_k(built: index.Index, k: int) -> index.Index:
    """The index, searched as one that was built for K targets would be."""
    return dataclasses.replace(built, parameters=index.parameters(len(built.ids), k))


def with_corrector(
    cache: TargetCache,
    queries: np.ndarray,
    built: index.Index,
    corrector: Corrector,
    psi: Gated,
    size: int,
    place: Placement,
) -> dict[str, Any]:
    """The table over K and M for one corrector, held against the sweep."""
    parts = np.split(queries, len(queries) // BATCH)
    plain = batches(queries)
    sweep = TwoLevel(DRAWS, BETA, corrector, block_rows=64, tile_rows=16_384, place=place)
    swept = jax.jit(sweep.draw)
    key = jax.random.key(0)
    exact_z = np.concatenate(
        [swept(q, psi, cache, b, key).log_z for q, b in zip(parts, plain, strict=True)]
    )
    logits = jax.jit(lambda q, psi, cache: BETA * q @ corrector.apply(
        psi.params, caches.read(cache.embeddings, cache.scale), psi.gate
    )[: size].T)  # fmt: skip
    best = np.concatenate([jax.lax.top_k(logits(q, psi, cache), max(CANDIDATES))[1] for q in parts])
    rows = []
    for k in CANDIDATES:
        candidates, _ = for_k(built, k).search(queries, k)
        hits = [np.isin(b[:k], c).mean() for b, c in zip(best, candidates, strict=True)]
        given = [
            b._replace(candidates=c)
            for b, c in zip(plain, np.split(candidates, len(parts)), strict=True)
        ]
        for tail in TAILS:
            draw = jax.jit(Candidates(DRAWS, BETA, corrector, tail, size, 16_384, place).draw)
            drawn = [
                [draw(q, psi, cache, b, jax.random.key(seed)) for q, b in
                 zip(parts, given, strict=True)]
                for seed in range(KEYS)
            ]  # fmt: skip
            z = np.stack([np.concatenate([d.log_z for d in each]) for each in drawn])
            share = np.concatenate([d.tail.share for each in drawn for d in each])
            off = np.abs(z - exact_z)
            rows.append({
                "K": k,
                "M": tail,
                "recall": round(float(np.mean(hits)), 4),
                "log_z_median": round(float(np.median(off)), 4),
                "log_z_95": round(float(np.quantile(off, 0.95)), 4),
                "tail_share": round(float(share.mean()), 4),
                "draw_seconds": round(
                    seconds(draw, parts[0], psi, cache, given[0], key), 4
                ),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return {
        "sweep_seconds": round(seconds(swept, parts[0], psi, cache, plain[0], key), 4),
        "table": rows,
    }


def filled(job: Job, params: Any) -> TargetCache:
    """The cache of a job, embedded with its parameters."""
    writer = CacheWriter(job.empty_cache(), step=0, place=job.place)
    go_over(job.embedder, params, np.arange(job.size), [writer])
    return writer.cache


def overlap(job: Job, cache: TargetCache, folder: Path) -> dict[str, Any]:
    """Seconds of a training step whose candidates are given, and of one that also searches.

    Both keep the device as the loop does: a step is read once the next one is dispatched.
    """
    lookahead, step_fn = make_lookahead(job), job.train_step()
    lookahead.renew(cache, folder, {"sha256": ""})
    state = job.init_state()
    given = [lookahead.join(place_batch(job, step), state, cache) for step in range(STEPS + 1)]
    keys = [job.place.put_everywhere(rng.key(0, "step", step)) for step in range(STEPS)]
    taken: dict[bool, list[float]] = {False: [], True: []}
    state, cache, _ = step_fn(state, cache, job.tokens, given[0], keys[0])  # compiled, not counted
    for _ in range(2):
        for searches in (False, True):
            batch, held = given[0], None
            jax.block_until_ready(state)
            started = time.perf_counter()
            for step in range(STEPS):
                if searches:
                    batch = lookahead.join(given[step]._replace(candidates=None), state, cache)
                    lookahead.start(given[step + 1]._replace(candidates=None), state, cache)
                else:
                    batch = given[step]
                state, cache, measured = step_fn(state, cache, job.tokens, batch, keys[step])
                if held is not None:
                    jax.device_get(held)
                held = measured
            jax.block_until_ready(state)
            taken[searches].append((time.perf_counter() - started) / STEPS)
            lookahead.candidates()
    lookahead.close()
    given_only, searching = min(taken[False]), min(taken[True])
    return {
        "batch": job.config.train.batch_size,
        "draws": job.config.negatives.draws,
        "K": job.num_candidates,
        "step_seconds": round(given_only, 3),
        "step_and_search_seconds": round(searching, 3),
        "added": round(searching / given_only - 1, 3),
    }


def small(data: str) -> dict[str, Any]:
    """A data set embedded for real."""
    config = configs.default()
    config.data.path = data
    config.model.layers, config.train.batch_size, config.negatives.draws = 2, BATCH, DRAWS
    config.negatives.proposal, config.mesh.devices = "scann", 1
    config.data.target_max_len = 32
    configs.validate(config)
    job = make_job(config)
    params = job.init_state().params
    queries = np.asarray(job.embedder.queries(params, job.query_tokens[job.dev_split]))[:QUERIES]
    cache = filled(job, params)
    _, rows = index.rows_here(cache)
    found = {"data": job.data.name, **measure(cache, rows, queries, job.place, moved=True)}
    with tempfile.TemporaryDirectory() as folder:
        found["overlap"] = overlap(job, cache, Path(folder))
    return found


def large() -> dict[str, Any]:
    """A million rows in clusters: a random tanh net of a few hidden directions, and noise."""
    made = np.random.default_rng(0)
    centers = made.normal(size=(CLUSTERS, 24)).astype(np.float32)
    net = made.normal(size=(24, DIM)).astype(np.float32) / 24**0.5
    rows = np.empty((LARGE, DIM), np.float32)
    for at in range(0, LARGE, 50_000):
        hidden = centers[made.integers(CLUSTERS, size=50_000)]
        hidden += 0.4 * made.normal(size=hidden.shape).astype(np.float32)
        part = np.tanh(hidden @ net) + 0.15 * made.normal(size=(50_000, DIM)).astype(np.float32)
        rows[at : at + 50_000] = part / np.linalg.norm(part, axis=1, keepdims=True)
    queries = rows[made.choice(LARGE, QUERIES, replace=False)]
    queries = queries + 0.02 * made.normal(size=queries.shape).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    place = make_placement(1)
    held = np.zeros((place.pad(LARGE, 64), DIM), np.float32)
    held[:LARGE] = rows
    written = place.put_rows(np.zeros(len(held), np.int32))
    cache = TargetCache(place.put_rows(held), None, written, LARGE)
    return measure(cache, rows, queries, place, moved=False)


def main() -> None:
    """Measures one part and writes it beside the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("small", "large"), required=True)
    parser.add_argument("--data", default="", help="a data set, as config.data.path")
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    started = time.monotonic()
    found = small(arguments.data) if arguments.part == "small" else large()
    found["machine"] = {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "load_before": round(before, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "seconds": round(time.monotonic() - started),
    }
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    content[arguments.part] = found
    content["settings"] = {
        "beta": BETA, "draws": DRAWS, "batch": BATCH, "queries": QUERIES, "keys": KEYS,
        "jax": jax.__version__,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
