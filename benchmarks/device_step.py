"""A training step of configs/nq.py on the device at hand: its time, its floor, the sweep's share.

    python -m benchmarks.device_step

for one GPU or TPU, in one go: a base-size encoder in bfloat16, a made-up cache of 1 and of 4
million rows x 768, made-up tokens, 128 queries x 8 draws. Nothing is read or downloaded. Of each
size it prints and writes

  step_seconds     of the whole step: the median, and the fastest and the slowest of --steps
  draw_seconds     of the sweep and the draws alone, likewise; sweep_share, of the medians
  floor_seconds    what public peak rates allow (corrector_jax.chips); share_of_floor, how near it
                   the step comes
  share_of_peak    floating-point operations of the step, over its time and the peak

to benchmarks/results/device_step_DEVICE.json.

  --targets=N,M       other sizes of the cache
  --steps=20          steps that are timed, after two that are not
  --config.KEY=VALUE  changes the setting; as a try on a CPU: --targets=20000 --steps=2
                      --config.train.batch_size=8 --config.train.chunk=0 --config.model.layers=1
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.strategies import parse_changes
from configs import nq
from corrector_jax import chips, compile_ahead, hlo, paths, rng
from corrector_jax import config as configs
from corrector_jax.cache import TargetCache, TargetTokens
from corrector_jax.chips import Chip
from corrector_jax.program import Program, make_program, placement
from corrector_jax.types import Array, Batch, UserError

RESULTS = Path(__file__).parent / "results"
WARM_UP = 2


def setting(changes: dict[str, Any]) -> ConfigDict:
    """configs/nq.py with a batch for one device."""
    config = nq.get_config()
    config.train.batch_size, config.train.chunk = 128, 384
    config.update_from_flattened_dict(changes)
    configs.validate(config)
    return config


def world(program: Program, lengths: tuple[int, int]) -> tuple[TargetCache, TargetTokens, Batch]:
    """A made-up cache of unit rows, tokens without padding, and a batch of queries."""
    config, place, size = program.config, program.place, program.size
    rows, dim = place.pad(size, config.negatives.block_rows), program.model.dim
    words = program.model.encoder.config.vocab_size

    def filled(key: Array) -> tuple[Array, Array]:
        cached = jax.random.normal(key, (rows, dim), config.cache.dtype) * dim**-0.5
        ids = jax.random.randint(key, (rows, lengths[1]), 10, words, jnp.int32)
        return cached, ids.astype(jnp.uint16 if words <= 2**16 else jnp.int32)

    cached, ids = place.jit_step(filled, place.rows)(rng.key(0, "world"))
    written_at = place.put_rows(np.zeros(rows, np.int32))
    made, count = np.random.default_rng(0), config.train.batch_size
    positive = made.integers(0, size, count).astype(np.int32)
    batch = Batch(
        query_tokens=made.integers(10, words, (count, lengths[0])).astype(np.int32),
        positive=positive,
        known=positive[:, None],
        valid=np.ones(count, bool),
    )
    cache = TargetCache(cached, None, written_at, size)
    return cache, TargetTokens(ids, size, ""), place.put(batch, place.examples)


def measure(config: ConfigDict, size: int, steps: int, chip: Chip) -> dict[str, Any]:
    """Times the step and its draws over a cache of `size` rows."""
    place = placement(config)
    encoder, lengths = compile_ahead.find_encoder(config)
    program = make_program(config, encoder, size, place)
    program.require_shares()
    state = program.start(None)
    cache, tokens, batch = world(program, lengths)
    key = place.put_everywhere(rng.key(0, "step", 0))
    queries = jnp.ones((config.train.batch_size, program.model.dim), jnp.float32)
    proposal, psi = program.method.proposal, state.corrector.gated

    draw = jax.jit(proposal.draw).lower(queries, psi, cache, batch, key).compile()
    drawing = timed(lambda: draw(queries, psi, cache, batch, key), steps)

    step = program.train_step().lower(state, cache, tokens, batch, key).compile()
    held: list[Any] = [state, cache]

    def one() -> Any:
        held[0], held[1], measured = step(held[0], held[1], tokens, batch, key)
        return measured

    stepping = timed(one, steps)
    cost = hlo.cost(step.as_text(), scopes=("sweep",))
    floor = chips.floor_seconds(cost, chip)
    seconds = stepping["median"]
    found = {
        "targets": size,
        "step_seconds": stepping,
        "draw_seconds": drawing,
        "sweep_share": drawing["median"] / seconds,
        "flops": cost.flops,
        "flops_of_sweep": cost.flops_of["sweep"],
        "bytes_moved": cost.bytes,
        "floor_seconds": floor,
        "loops_of_unknown_length": list(cost.unknown_loops),
    }
    if floor:
        found["share_of_floor"] = max(floor.values()) / seconds
        found["share_of_peak"] = floor["compute"] / seconds
    return found


def timed(run: Callable[[], Any], count: int) -> dict[str, float]:
    """Seconds of one run, each waited for."""
    seconds = []
    for number in range(WARM_UP + count):
        started = time.perf_counter()
        jax.block_until_ready(run())
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - started)
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default="1000000,4000000")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments, changes = parser.parse_known_args(argv)
    try:
        config = setting(parse_changes(changes))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chips.find_devices()
    chip = chips.of(jax.devices()[0])
    name = re.sub(r"\W+", "_", chip.name).lower()
    record: dict[str, Any] = {
        "command": "python -m benchmarks.device_step",
        "device": chip.name,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "setting": {"config": "configs/nq.py", **dict(configs.flat(config.train))},
        "sizes": [],
    }
    for size in map(int, arguments.targets.split(",")):
        record["sizes"].append(measure(config, size, arguments.steps, chip))
        print(json.dumps(record["sizes"][-1]), flush=True)
        path = arguments.results / f"device_step_{name}.json"
        paths.write(path, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
