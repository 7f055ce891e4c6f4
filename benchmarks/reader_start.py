"""What the start of a random reader is worth: how soon it copies an answer out of a passage.

    python -m benchmarks.reader_start

A reader with `Reader.init`'s two changes to T5's own start, with each alone and with neither, goes
through the given steps of configs/rlm_quickstart.py: the same batches, the same schedule. Measured
is exact match on dev questions, which are never given, reading their known positive. Writes
benchmarks/results/reader_start.json; four runs, about two minutes each on two cores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import rlm_quickstart
from corrector_jax import answering, rng
from corrector_jax import config as configs
from corrector_jax.job import Job, make_job
from corrector_jax.models.reader import Reader
from corrector_jax.reading import GIVEN
from corrector_jax.train import place_batch
from corrector_jax.types import PyTree

RESULTS = Path(__file__).parent / "results" / "reader_start.json"
EVERY = 100


def started(reader: Reader, key: jax.Array, *, biases: bool, transposed: bool) -> PyTree:
    """Random parameters, with T5's own start in place of what is not asked for."""
    params = reader.init(key)
    sizes, numbers = reader.config.encoder, np.random.default_rng(0)

    def normal(shape: tuple[int, ...], fan: int) -> jax.Array:
        return jnp.asarray(numbers.normal(0, fan**-0.5, shape), jnp.float32)

    if not biases:
        for half in ("encoder", "decoder"):
            table = params[half]["position_bias"]
            params[half]["position_bias"] = normal(table.shape, sizes.hidden_size)
    if not transposed:
        for layer in range(reader.config.decoder_layers):
            cross = params["decoder"][f"layer_{layer}"]["cross"]
            for part in ("value", "output"):
                shape = cross[part]["kernel"].shape
                cross[part]["kernel"] = normal(shape, shape[0])
    return params


def measure(job: Job, *, biases: bool, transposed: bool) -> dict[str, Any]:
    """Runs the given steps of a job from one start."""
    assert job.questions is not None
    key = rng.key(job.config.seed, "reader")
    reader = started(job.questions.loaded.reader, key, biases=biases, transposed=transposed)
    state, cache = job.start(job.encoder_params, reader), None
    step, found = job.stages()[0].step, []
    for number in range(job.config.reader.given_steps):
        key = job.place.put_everywhere(rng.key(job.config.seed, "step", number))
        state, cache, _ = step(state, cache, job.tables, place_batch(job, number), key)
        if (number + 1) % EVERY == 0:
            read = answering.compare(job, state.params, job.dev_split, beat=lambda: None)
            found.append(round(read["known_positives"]["em"], 4))
    return {"biases": biases, "transposed": transposed, "em_every_100_steps": found}


def main() -> None:
    """Trains, prints and writes."""
    config = rlm_quickstart.get_config()
    configs.validate(config)
    job, runs = make_job(config), []
    for biases, transposed in ((False, False), (True, False), (False, True), (True, True)):
        runs.append(measure(job, biases=biases, transposed=transposed))
        print(json.dumps(runs[-1]), flush=True)
    result = {
        "command": "python -m benchmarks.reader_start",
        "config": "configs/rlm_quickstart.py",
        "given_questions": len(job.data.splits[GIVEN].texts),
        "dev_questions": len(job.data.splits[job.dev_split].texts),
        "seed": config.seed,
        "runs": runs,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
