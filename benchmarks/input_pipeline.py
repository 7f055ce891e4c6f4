"""Does a run ever wait for its input? Examples per second of the pipeline alone, against the step.

    python benchmarks/input_pipeline.py [--batch_sizes=32] [--steps=8] [--path=DIR]

For every batch size: how many examples per second the host makes (`order.make_batch`), how many it
makes and places on the devices (`order.ahead`), how many the train step takes when its input is
already there, and how many it takes when fed by the pipeline. Beside it: how much of the queries
and targets that are encoded is padding. Leaves benchmarks/results/input_pipeline.json, with a key
for each platform it was run on.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from runpy import run_path
from typing import Any

import jax
import numpy as np

from corrector_jax import rng
from corrector_jax.data import order
from corrector_jax.job import Job, make_job
from corrector_jax.train import make_batch, place_batch
from corrector_jax.types import Batch

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "input_pipeline.json"


def per_second(examples: int, work: Callable[[], object]) -> float:
    """Examples per second while `work` handles so many."""
    started = time.perf_counter()
    work()
    return examples / (time.perf_counter() - started)


def host_alone(job: Job, steps: int) -> float:
    """The collator: NumPy only, in one thread."""
    batch_size = job.config.train.batch_size
    return per_second(steps * batch_size, lambda: [make_batch(job, step) for step in range(steps)])


def placed_alone(job: Job, steps: int) -> float:
    """The collator and the copy to the devices, ahead in a thread of their own."""

    def work() -> None:
        for batch in order.ahead(lambda step: place_batch(job, step), range(steps)):
            jax.block_until_ready(batch)

    return per_second(steps * job.config.train.batch_size, work)


def trained(job: Job, steps: int) -> tuple[float, float]:
    """The train step, from batches that are on the devices already, and fed by the pipeline.

    The best of three rounds each, in turns: other work on the machine slows both alike.
    """
    step_fn = job.train_step()
    state, cache = job.init_state(), job.empty_cache()
    ready = [place_batch(job, step) for step in range(steps)]
    keys = [job.place.put_everywhere(rng.key(job.config.seed, "step", s)) for s in range(steps)]
    # Every width is compiled before the clock starts.
    for batch in {batch.query_tokens.shape[1]: batch for batch in ready}.values():
        state, cache, measured = step_fn(state, cache, job.tokens, batch, keys[0])
    jax.block_until_ready(measured)

    def work(batches: Iterable[Batch]) -> None:
        nonlocal state, cache
        for step, batch in enumerate(batches):
            state, cache, measured = step_fn(state, cache, job.tokens, batch, keys[step])
        jax.block_until_ready(measured)

    examples = steps * job.config.train.batch_size
    unfed, fed = [], []
    for _ in range(3):
        unfed.append(per_second(examples, lambda: work(ready)))
        source = order.ahead(lambda step: place_batch(job, step), range(steps))
        fed.append(per_second(examples, functools.partial(work, source)))
    return max(unfed), max(fed)


def padding(job: Job, steps: int) -> dict[str, Any]:
    """Shares of encoded tokens that are padding, and what two widths for queries save."""
    table = job.query_tokens["train"].shape[1]
    widths = [make_batch(job, step).query_tokens.shape[1] for step in range(steps)]
    targets = job.embedder.lengths
    width = job.tokens.ids.shape[1]
    drawn = np.random.default_rng(0).choice(targets, (200, job.encoded_per_step))
    return {
        "query_widths": list(job.query_widths),
        "query_table_width": table,
        "query_tokens": round(float(job.query_lengths.mean()), 1),
        "query_mean_width": round(float(np.mean(widths)), 1),
        "target_table_width": width,
        "target_tokens": round(float(targets.mean()), 1),
        # What a single width for the targets of a step could be cut to, if it were known.
        "target_longest_of_a_step": round(float(drawn.max(axis=1).mean()), 1),
        "queries_share_of_encoded_tokens": round(
            job.config.train.batch_size
            * table
            / (job.config.train.batch_size * table + job.encoded_per_step * width),
            3,
        ),
    }


def measure(path: str, batch_size: int, steps: int) -> dict[str, Any]:
    """Everything for one batch size."""
    config = run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.data.path = path
    config.train.batch_size = batch_size
    job = make_job(config)
    host, placed = host_alone(job, 20 * steps), placed_alone(job, 20 * steps)
    need, fed = trained(job, steps)
    return {
        "batch_size": batch_size,
        "host_examples_per_second": round(host),
        "placed_examples_per_second": round(placed),
        "step_examples_per_second": round(need, 1),
        "step_fed_examples_per_second": round(fed, 1),
        "times_faster_than_needed": round(placed / need, 1),
        "padding": padding(job, 200),
    }


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_sizes", default="32")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--path", default="")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    device = jax.devices()[0]
    found: dict[str, Any] = {
        "data": Path(arguments.path).name or "code-search",
        "device": f"{len(jax.devices())} x {device.device_kind}, {os.cpu_count()} host cores",
        "measured": [],
    }
    for size in arguments.batch_sizes.split(","):
        found["measured"].append(measure(arguments.path, int(size), arguments.steps))
        print(json.dumps(found["measured"][-1], indent=1), flush=True)
        held = json.loads(arguments.result.read_text()) if arguments.result.exists() else {}
        arguments.result.write_text(json.dumps(held | {device.platform: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
