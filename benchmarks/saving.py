"""What saving costs: a checkpoint beside running steps, and a snapshot of a large cache.

    python -m benchmarks.saving

A state of all-MiniLM-L6-v2's size with two optimizer moments (273 MB) is stepped, every step longer
than a save, with and without one save in the middle, in turns; the ratio of the two times is what
an asynchronous save adds. Then a cache of 1M x 384 float32 is saved once, and checkpoints after it:
their bytes show that none holds it. Writes `benchmarks/results/saving.json`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corrector_jax import cache as caches
from corrector_jax import paths
from corrector_jax.checkpoint import Checkpoints, Position
from corrector_jax.sharding import make_placement

PARAMETERS = 22_713_216  # of all-MiniLM-L6-v2
STEPS, PAIRS = 10, 6
ROWS, DIM = 1_000_000, 384
WORK = 1024  # width of the matrices that make a step long


def main() -> None:
    """Measures, prints and writes."""
    place = make_placement(1)
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "command": "python -m benchmarks.saving",
            "device": jax.devices()[0].device_kind,
            "checkpoint": checkpoints(Path(folder) / "steps", place),
            "snapshot": snapshots(Path(folder) / "cache", place),
        }
    path = Path(__file__).parent / "results" / "saving.json"
    paths.write(path, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def checkpoints(workdir: Path, place: Any) -> dict[str, Any]:
    """Steps with and without a save in their middle."""

    def step(state: dict[str, jax.Array], work: jax.Array, times: jax.Array) -> Any:
        work = jax.lax.fori_loop(0, times, lambda _, w: jnp.tanh(w @ w * 1e-3), work)
        return jax.tree.map(lambda x: x + 1e-3 * work[0, 0], state), work

    jitted = jax.jit(step, donate_argnums=(0, 1))

    def start() -> Any:
        shape = (PARAMETERS // 1024, 1024)
        keys = jax.random.split(jax.random.key(0), 3)
        names = ("params", "first", "second")
        state = {name: jax.random.normal(k, shape) for name, k in zip(names, keys, strict=True)}
        return state, jnp.ones((WORK, WORK))

    number = iter(range(1, 1000))
    with Checkpoints.writable(workdir, keep=1) as saver:

        def run(times: int, saves: bool) -> float:
            state, work = jax.block_until_ready(start())
            begun = time.monotonic()
            for at in range(STEPS):
                state, work = jitted(state, work, times)
                if saves and at == STEPS // 2:
                    saver.save(state, Position(step=next(number)))
            jax.block_until_ready((state, work))
            return time.monotonic() - begun

        run(1, saves=True)
        saver.wait()
        begun = time.monotonic()
        state, _ = jax.block_until_ready(start())
        begun = time.monotonic()
        saver.save(state, Position(step=next(number)))
        blocked = time.monotonic() - begun
        saver.wait()
        save = time.monotonic() - begun
        size = sum(leaf.nbytes for leaf in state.values())
        del state
        one = run(20, saves=False) / STEPS / 20
        times = int(1.5 * save / one) + 1
        pairs = []
        for pair in range(PAIRS):
            both = {}
            for saves in (False, True) if pair % 2 else (True, False):
                both[saves] = run(times, saves)
                saver.wait()
            pairs.append(both)
    ratios = [both[True] / both[False] for both in pairs]
    return {
        "bytes": size,
        "save_seconds": round(save, 3),
        "of_which_blocking": round(blocked, 3),
        "step_seconds": round(statistics.median(b[False] for b in pairs) / STEPS, 3),
        "steps": STEPS,
        "with_one_save_over_without": [round(ratio, 4) for ratio in ratios],
        "median": round(statistics.median(ratios), 4),
    }


def snapshots(workdir: Path, place: Any) -> dict[str, Any]:
    """A large cache, saved once and referred to by several checkpoints."""
    cache = caches.create(ROWS, DIM, dtype="float32", block_rows=64, place=place)
    noise = jax.random.normal(jax.random.key(0), cache.embeddings.shape)
    cache = jax.block_until_ready(cache.replace(embeddings=noise))
    with Checkpoints.writable(workdir, keep=3) as saver:
        begun = time.monotonic()
        reference = saver.save_cache(cache, step=0, made_by={})
        seconds = time.monotonic() - begun
        for step in (1, 2, 3):
            saver.save({"x": jnp.ones((1000, 1000))}, Position(step=step, cache=reference))
        saver.wait()
        begun = time.monotonic()
        restored = saver.resume(
            {"x": jnp.ones((1000, 1000))}, cache, data="", made_by={}, say=lambda line: None
        )[1]
        read = time.monotonic() - begun
        assert restored is not None
        same = bool(np.array_equal(np.asarray(restored.embeddings), np.asarray(cache.embeddings)))
    sizes = {
        name: sum(path.stat().st_size for path in (workdir / name).rglob("*") if path.is_file())
        for name in ("cache", "checkpoints")
    }
    return {
        "rows": ROWS,
        "dim": DIM,
        "array_bytes": int(cache.embeddings.nbytes),
        "cache_bytes_on_disk": sizes["cache"],
        "bytes_of_three_checkpoints": sizes["checkpoints"],
        "save_seconds": round(seconds, 2),
        "restore_seconds": round(read, 2),
        "restored_equal": same,
    }


if __name__ == "__main__":
    main()
