"""The training loop: the order of things, and nothing else.

Before step t: refresh if due, probe if due. Then the step. After it: log, evaluate if due, save if
due. Every decision is a function of the step, so that a resumed run makes the same ones, and a
batch is made from the step alone, after the save, so that a resumed run sees the same one.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from corrector_jax import config as configs
from corrector_jax import paths, rng
from corrector_jax.cache import TargetCache
from corrector_jax.checkpoint import Checkpoints, Position
from corrector_jax.data import order
from corrector_jax.embed import go_over
from corrector_jax.evaluate import (
    Evaluated,
    evaluate,
    references,
    resume,
    saved_config,
    write,
)
from corrector_jax.job import Job, make_job
from corrector_jax.metrics import means
from corrector_jax.refresh import CacheWriter, is_due
from corrector_jax.results import finish
from corrector_jax.state import TrainState
from corrector_jax.steps.probe_step import probe_step
from corrector_jax.steps.train_step import train_step
from corrector_jax.types import Batch
from corrector_jax.writer import StepLog, Writer, progress, say


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run works with and writes to.

    Attributes:
      job: everything that stays the same.
      workdir: the run's folder.
      writer: metrics.
      checkpoints: checkpoints and cache snapshots.
      position: how far the run is; each part of the loop brings its own share up to date.
      started: when the run began, by `time.monotonic()`; for a resumed run, long before now.
    """

    job: Job
    workdir: Path
    writer: Writer
    checkpoints: Checkpoints
    position: Position
    started: float


def train(config: ConfigDict, workdir: Path, *, started: float) -> Path:
    """Trains, evaluates before and after, and leaves the report; resumes what is there.

    Args:
      config: validated.
      workdir: the run's folder; made if it is not there.
      started: `time.monotonic()` when the process began.

    Returns:
      The path of report.html.

    Raises:
      UserError: the workdir holds another run, or data, weights and configuration do not fit.
    """
    with Checkpoints(workdir, keep=config.checkpoint.keep) as checkpoints:
        latest = checkpoints.latest()
        if latest is not None:
            configs.refuse_other_run(config, saved_config(workdir), str(workdir))
        job = make_job(config)
        paths.write(workdir / "config.json", configs.to_json(config))
        state = job.init_state()
        cache = job.empty_cache() if job.uses_cache else None
        position = Position(data=job.fingerprint)
        if latest is not None:
            state, cache, position = resume(job, checkpoints, state, cache, latest)
            say(f"resumed {workdir} at step {latest:,}")
        started -= position.seconds
        with Writer(
            workdir,
            step=position.step,
            size=position.metrics,
            started=started,
            tensorboard=config.log.tensorboard,
        ) as writer:
            run = Run(job, workdir, writer, checkpoints, position, started)
            if latest is None:
                cache = before(run, state, cache)
                save(run, state)
            state, cache = loop(run, state, cache)
            after(run, state, cache)
    return finish(job, state.params, workdir, position, started)


def loop(
    run: Run, state: TrainState, cache: TargetCache | None
) -> tuple[TrainState, TargetCache | None]:
    """The training steps that are left.

    Args:
      run: the run.
      state: taken over.
      cache: taken over.

    Returns:
      The state and the cache after the last step, which are saved.
    """
    job, config, position = run.job, run.job.config, run.position
    step_fn, probe_fn = compile_steps(job)
    refresh = configs.chosen(config)["refresh"]
    # All at once: computed in the loop, each would queue behind the step and wait for it.
    updates = np.arange(config.train.steps // config.train.accumulate)
    rates = np.asarray(jax.vmap(job.learning_rate)(updates))
    log = StepLog(
        run.writer,
        every=config.log.every,
        batch_size=config.train.batch_size,
        seconds=position.train_seconds,
    )
    with progress("training", config.train.steps, "steps", done=position.step) as advance:
        for step in range(position.step, config.train.steps):
            if cache is not None and is_due(step, policy=refresh, every=config.refresh.every):
                state, cache = refresh_cache(run, state, cache)
            if cache is not None and is_probe_due(run):
                state = probe(run, probe_fn, state, cache)
            entered = time.monotonic()
            batch = jax.device_put(make_batch(job, step), job.place.rows)
            key = job.place.put_everywhere(rng.key(config.seed, "step", step))
            # Nothing moves between host and device unasked: a step that waits is a bug.
            with jax.transfer_guard("disallow"):
                state, cache, measured = step_fn(state, cache, job.tokens, batch, key)
            position.step = step + 1
            position.ledger["encoded_with_grad"] += job.encoded_per_step
            position.ledger["encoded_without_grad"] += job.method.uniform_rows
            # Reads the metrics of the step before, while this one runs.
            rate = float(rates[step // config.train.accumulate])
            note = log.add(position.step, measured, {"learning_rate": rate}, position.train_seconds)
            last = position.step == config.train.steps
            evaluates = config.eval.every and position.step % config.eval.every == 0 and not last
            saves = last or position.step % config.checkpoint.every == 0
            if evaluates or saves:
                note = log.flush(write=True)
            position.train_seconds += time.monotonic() - entered
            advance(1, note)
            if evaluates:
                during(run, state, cache)
            if saves:
                save(run, state)
    return state, cache


def save(run: Run, state: TrainState) -> None:
    """Starts saving a checkpoint."""
    run.position.seconds = time.monotonic() - run.started
    run.position.metrics = run.writer.size()
    run.checkpoints.save(state, run.position)


def compile_steps(job: Job) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The train step and the probe step, jitted for the job's mesh; state and cache are donated."""
    place = job.place
    step_fn = place.jit_step(
        functools.partial(
            train_step,
            model=job.model,
            method=job.method,
            tx=job.tx,
            corrector_tx=job.corrector_tx,
            place=place,
        ),
        (place.everywhere, place.rows, place.everywhere),
        donate=(0, 1),
    )
    probe_fn = place.jit_step(
        functools.partial(
            probe_step,
            beta=job.method.beta,
            model=job.model,
            corrector=job.method.corrector,
            place=place,
        ),
        (place.everywhere, place.everywhere),
        donate=(0,),
    )
    return step_fn, probe_fn


def make_batch(job: Job, step: int) -> Batch:
    """The batch of a step on the host: a function of the seed and the step alone."""
    return order.make_batch(
        step,
        query_tokens=job.query_tokens["train"],
        positives=job.data.splits["train"].positives,
        known=job.known,
        batch_size=job.config.train.batch_size,
        seed=job.config.seed,
    )


def before(run: Run, state: TrainState, cache: TargetCache | None) -> TargetCache | None:
    """What the result stands beside, then the first evaluation and the first snapshot in one pass.

    Args:
      run: the run; its ledger and its reference to the snapshot are filled in.
      state: step 0.
      cache: empty, or None; it is taken over.

    Returns:
      The filled cache.
    """
    job, position = run.job, run.position
    shutil.rmtree(run.workdir / "eval", ignore_errors=True)  # of a run that never got to step 0
    position.ledger["evaluation"] += references(job, run.workdir)
    fill = [] if cache is None else [CacheWriter(cache, step=0, place=job.place)]
    result = evaluate(
        job, state.params, step=0, splits=splits(job), also=fill, label="embedding the corpus"
    )
    keep(run, "before", result)
    position.ledger["initial" if fill else "evaluation"] += result.encoded
    if not fill:
        return None
    position.cache = run.checkpoints.save_cache(fill[0].cache, step=0)
    return fill[0].cache


def refresh_cache(
    run: Run, state: TrainState, cache: TargetCache
) -> tuple[TrainState, TargetCache]:
    """Re-embeds the corpus and resets the corrector: h maps from one snapshot to now.

    Args:
      run: the run; its ledger and its reference to the snapshot are brought up to date.
      state: the training state.
      cache: taken over.

    Returns:
      The state with a corrector at the identity, and the fresh cache.
    """
    job, position = run.job, run.position
    fill = CacheWriter(cache, step=position.step, place=job.place)
    with progress("refreshing the cache", job.size, "targets") as advance:
        encoded = go_over(job.embedder, state.params, np.arange(job.size), [fill], advance)
    position.ledger["refresh"] += encoded
    position.cache = run.checkpoints.save_cache(fill.cache, step=position.step)
    corrector = job.place.put_everywhere(job.init_corrector(position.step))
    return dataclasses.replace(state, corrector=corrector), fill.cache


def is_probe_due(run: Run) -> bool:
    """Whether the probe is due; right after a snapshot there is nothing to measure."""
    every, snapshot = run.job.config.corrector.probe_every, run.position.cache
    if not every or snapshot is None:
        return False
    # Counted from the snapshot: a refresh that falls on a probe must not leave the gate closed.
    age = run.position.step - snapshot["step"]
    return bool(age > 0 and age % every == 0)


def probe(
    run: Run, probe_fn: Callable[..., Any], state: TrainState, cache: TargetCache
) -> TrainState:
    """Measures staleness and correction on the fixed probe; may open the corrector's gate.

    Args:
      run: the run; its ledger counts the probe's targets.
      probe_fn: of `compile_steps`.
      state: taken over.
      cache: the cache.

    Returns:
      The state.
    """
    job = run.job
    state, measured = probe_fn(state, cache, job.tokens, job.probe_queries, job.probe_ids)
    values = means(jax.device_get(measured))
    named = {f"probe/{name}": value for name, value in values.items()}
    run.writer.scalars(run.position.step, named)
    run.position.ledger["encoded_without_grad"] += job.probe_ids.size
    return state


def during(run: Run, state: TrainState, cache: TargetCache | None) -> None:
    """An evaluation on dev in the middle of training, by `eval.corpus`.

    Args:
      run: the run; its ledger counts what was encoded.
      state: the training state.
      cache: the cache, or None.
    """
    result = evaluate(
        run.job,
        state.params,
        step=run.position.step,
        splits=[run.job.dev_split],
        corpus=run.job.config.eval.corpus,
        cache=cache,
        psi=state.corrector.gated,
    )
    run.position.ledger["evaluation"] += result.encoded
    run.writer.scalars(run.position.step, result.scalars(run.job.data.name))


def after(run: Run, state: TrainState, cache: TargetCache | None) -> None:
    """The last evaluation: always the full corpus, and exact divergences where there is a cache.

    Args:
      run: the run; its ledger counts what was encoded.
      state: the trained state.
      cache: the cache, or None.
    """
    result = evaluate(
        run.job,
        state.params,
        step=run.position.step,
        splits=splits(run.job),
        cache=cache,
        psi=state.corrector.gated,
    )
    run.position.ledger["evaluation"] += result.encoded
    keep(run, "after", result)


def keep(run: Run, name: str, result: Evaluated) -> None:
    """Writes an evaluation of the final split to the workdir, and all its metrics as scalars."""
    split = run.job.final_split
    write(run.job, run.workdir, name, result.records[split], result.rankings[split])
    run.writer.scalars(run.position.step, result.scalars(run.job.data.name))


def splits(job: Job) -> list[str]:
    """The final split, and dev where it is another."""
    return list(dict.fromkeys([job.final_split, job.dev_split]))
