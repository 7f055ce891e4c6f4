"""The training loop: the order of things, and nothing else.

Before step t: refresh if due, probe if due. Then the step. After it: log, evaluate if due, save if
due. Every decision is a function of the step, so that a resumed run makes the same ones, and a
batch is made from the step alone, after the save, so that a resumed run sees the same one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from corrector_jax import config as configs
from corrector_jax import report, rng
from corrector_jax.cache import TargetCache
from corrector_jax.checkpoint import Checkpoints, Position
from corrector_jax.data import order
from corrector_jax.embed import go_over
from corrector_jax.evaluate import evaluate, references, write
from corrector_jax.job import Job, make_job
from corrector_jax.metrics import means
from corrector_jax.ranking import METRICS, paired_bootstrap, read_trec
from corrector_jax.refresh import CacheWriter, is_due
from corrector_jax.state import TrainState
from corrector_jax.steps.probe_step import probe_step
from corrector_jax.steps.train_step import train_step
from corrector_jax.types import Batch, UserError
from corrector_jax.writer import StepLog, Writer, progress, replace, say

EXAMPLES = 5
"""Queries whose results before and after are shown in the report."""


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
    open_workdir(config, workdir)
    job = make_job(config)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    latest = checkpoints.latest()
    state = job.init_state()
    cache = job.empty_cache() if job.uses_cache else None
    position = Position()
    if latest is not None:
        state, cache, position = checkpoints.resume(state, cache, step=latest)
        say(f"resumed {workdir} at step {latest:,}")
    started -= position.seconds  # the run began that long before this process
    writer = Writer(
        workdir, step=position.step, started=started, tensorboard=config.log.tensorboard
    )
    log = StepLog(writer, every=config.log.every, batch_size=config.train.batch_size)

    def save() -> None:
        log.flush()
        position.seconds = time.monotonic() - started
        checkpoints.save(state, position)

    if latest is None:
        cache = before(job, workdir, writer, checkpoints, position, state, cache)
        save()
    step_fn, probe_fn = compile_steps(job)
    refresh = configs.chosen(config)["refresh"]
    with progress("training", config.train.steps, "steps", done=position.step) as advance:
        for step in range(position.step, config.train.steps):
            if cache is not None and is_due(step, policy=refresh, every=config.refresh.every):
                state, cache = refresh_cache(job, checkpoints, position, state, cache)
            every = config.corrector.probe_every
            # Right after a snapshot there is nothing to measure: h is the identity, drift is 0.
            if cache is not None and every and step % every == 0 and is_stale(position):
                state = probe(job, probe_fn, writer, position, state, cache)
            entered = time.monotonic()
            batch = jax.device_put(make_batch(job, step), job.place.rows)
            key = job.place.put_everywhere(rng.key(config.seed, "step", step))
            # Nothing moves between host and device unasked: a step that waits is a bug.
            with jax.transfer_guard("disallow"):
                state, cache, measured = step_fn(state, cache, job.tokens, batch, key)
            position.step = step + 1
            encoded = config.train.batch_size * (1 + job.method.proposal.draws)
            position.ledger["encoded_with_grad"] += encoded
            position.ledger["encoded_without_grad"] += job.method.uniform_rows
            # Reads the metrics of the step before, while this one runs.
            rate = {"learning_rate": float(job.learning_rate(step // config.train.accumulate))}
            note = log.add(position.step, measured, rate, position.train_seconds)
            last = position.step == config.train.steps
            if last:
                note = log.flush()
            position.train_seconds += time.monotonic() - entered
            advance(1, note)
            if config.eval.every and position.step % config.eval.every == 0 and not last:
                during(job, writer, position, state, cache)
            if last or position.step % config.checkpoint.every == 0:
                save()
    after(job, workdir, writer, position, state, cache)
    checkpoints.close()
    writer.close()
    return finish(job, workdir, position, started)


def open_workdir(config: ConfigDict, workdir: Path) -> None:
    """Makes the workdir and its config.json, or checks that it holds this very run.

    Args:
      config: validated.
      workdir: the run's folder.

    Raises:
      UserError: it holds another run, or cannot be written.
    """
    saved = workdir / "config.json"
    if saved.is_file():
        configs.refuse_other_run(config, configs.from_json(saved.read_text()), str(workdir))
    try:
        replace(saved, configs.to_json(config))
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written ({error.strerror}): name a folder that can"
        ) from error


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


def before(
    job: Job,
    workdir: Path,
    writer: Writer,
    checkpoints: Checkpoints,
    position: Position,
    state: TrainState,
    cache: TargetCache | None,
) -> TargetCache | None:
    """What the result stands beside, then the first evaluation and the first snapshot in one pass.

    Args:
      job: the job.
      workdir: the run's folder.
      writer: gets the metrics of step 0.
      checkpoints: get the snapshot.
      position: its ledger and its reference to the snapshot are filled in.
      state: step 0.
      cache: empty, or None; it is taken over.

    Returns:
      The filled cache.
    """
    position.ledger["evaluation"] += references(job, workdir)
    fill = [] if cache is None else [CacheWriter(cache, step=0, place=job.place)]
    result = evaluate(
        job, state.params, step=0, splits=splits(job), also=fill, label="embedding the corpus"
    )
    final = job.final_split
    write(job, workdir, "before", result.records[final], result.rankings[final])
    writer.scalars(0, result.scalars(job.data.name))
    position.ledger["initial" if fill else "evaluation"] += result.encoded
    if not fill:
        return None
    position.cache = checkpoints.save_cache(fill[0].cache, step=0)
    return fill[0].cache


def refresh_cache(
    job: Job,
    checkpoints: Checkpoints,
    position: Position,
    state: TrainState,
    cache: TargetCache,
) -> tuple[TrainState, TargetCache]:
    """Re-embeds the corpus and resets the corrector: h maps from one snapshot to now.

    Args:
      job: the job.
      checkpoints: get the snapshot.
      position: its ledger and its reference to the snapshot are filled in.
      state: the training state.
      cache: taken over.

    Returns:
      The state with a corrector at the identity, and the fresh cache.
    """
    writer = CacheWriter(cache, step=position.step, place=job.place)
    with progress("refreshing the cache", job.size, "targets") as advance:
        encoded = go_over(job.embedder, state.params, np.arange(job.size), [writer], advance)
    position.ledger["refresh"] += encoded
    position.cache = checkpoints.save_cache(writer.cache, step=position.step)
    corrector = job.place.put_everywhere(job.init_corrector(position.step))
    return dataclasses.replace(state, corrector=corrector), writer.cache


def probe(
    job: Job,
    probe_fn: Callable[..., Any],
    writer: Writer,
    position: Position,
    state: TrainState,
    cache: TargetCache,
) -> TrainState:
    """Measures staleness and correction on the fixed probe; may open the corrector's gate.

    Args:
      job: gives the probe's queries and targets.
      probe_fn: of `compile_steps`.
      writer: gets the metrics.
      position: its ledger counts the probe's targets.
      state: taken over.
      cache: the cache.

    Returns:
      The state.
    """
    state, measured = probe_fn(state, cache, job.tokens, job.probe_queries, job.probe_ids)
    values = means(jax.device_get(measured))
    writer.scalars(position.step, {f"probe/{name}": value for name, value in values.items()})
    position.ledger["encoded_without_grad"] += job.probe_ids.size
    return state


def during(
    job: Job, writer: Writer, position: Position, state: TrainState, cache: TargetCache | None
) -> None:
    """An evaluation on dev in the middle of training, by `eval.corpus`.

    Args:
      job: the job.
      writer: gets the metrics.
      position: its ledger counts what was encoded.
      state: the training state.
      cache: the cache, or None.
    """
    result = evaluate(
        job,
        state.params,
        step=position.step,
        splits=[job.dev_split],
        corpus=job.config.eval.corpus,
        cache=cache,
        psi=state.corrector.gated,
    )
    position.ledger["evaluation"] += result.encoded
    writer.scalars(position.step, result.scalars(job.data.name))


def after(
    job: Job,
    workdir: Path,
    writer: Writer,
    position: Position,
    state: TrainState,
    cache: TargetCache | None,
) -> None:
    """The last evaluation: always the full corpus, and exact divergences where there is a cache.

    Args:
      job: the job.
      workdir: the run's folder.
      writer: gets the metrics.
      position: its ledger counts what was encoded.
      state: the trained state.
      cache: the cache, or None.
    """
    result = evaluate(
        job,
        state.params,
        step=position.step,
        splits=splits(job),
        cache=cache,
        psi=state.corrector.gated,
    )
    position.ledger["evaluation"] += result.encoded
    final = job.final_split
    write(job, workdir, "after", result.records[final], result.rankings[final])
    writer.scalars(position.step, result.scalars(job.data.name))


def is_stale(position: Position) -> bool:
    """Whether steps were done since the cache was last written as a whole."""
    return position.cache is not None and position.cache["step"] < position.step


def splits(job: Job) -> list[str]:
    """The final split, and dev where it is another."""
    return list(dict.fromkeys([job.final_split, job.dev_split]))


def finish(job: Job, workdir: Path, position: Position, started: float) -> Path:
    """results.json, examples.json, the report, and the last lines that are printed.

    Args:
      job: the job.
      workdir: the run's folder, with its evaluations.
      position: the ledger and the times.
      started: when the run began, by `time.monotonic()`.

    Returns:
      The path of report.html.
    """
    replace(workdir / "examples.json", json.dumps(examples(job, workdir)) + "\n")
    summary = results(job, workdir, position)
    # The report shows wall_seconds up to itself; results.json then counts the report too.
    stamp(summary, workdir, started)
    path = report.write_report(workdir)
    stamp(summary, workdir, started)
    say("\n" + report.summary_table(summary))
    say(f"\nreport: {path}")
    return path


def stamp(summary: dict[str, Any], workdir: Path, started: float) -> None:
    """Writes results.json with the wall-clock seconds up to now."""
    summary["wall_seconds"] = round(time.monotonic() - started, 1)
    replace(workdir / "results.json", json.dumps(summary, indent=2) + "\n")


def results(job: Job, workdir: Path, position: Position) -> dict[str, Any]:
    """What results.json holds but for wall_seconds, from the workdir's evaluations.

    Args:
      job: the job.
      workdir: the run's folder.
      position: the ledger and the times.

    Returns:
      A JSON-able dict.
    """
    records = {
        name: json.loads((workdir / "eval" / f"{name}.json").read_text())
        for name in ("before", "after", "bm25", "pretrained")
        if (workdir / "eval" / f"{name}.json").exists()
    }
    passes = (position.ledger["initial"] + position.ledger["refresh"]) / job.size
    distribution = records["after"]["distribution"]
    nothing = dict.fromkeys(("kl_stale", "kl_corrected", "drift", "corrected_error"))
    return {
        "strategy": job.config.strategy,
        "seed": job.config.seed,
        "steps": position.step,
        "dataset": {
            "name": job.data.name,
            "targets": job.size,
            "train_queries": len(job.data.splits["train"].texts),
            "eval_queries": records["after"]["queries"],
            "eval_split": job.final_split,
        },
        "encoder": {
            "source": job.encoder_source,
            "layers": job.model.encoder.config.num_layers,
            "dim": job.model.dim,
        },
        "eval": {name: record["metrics"] for name, record in records.items()},
        "comparison": {
            name: paired_bootstrap(
                np.array(records["before"]["per_query"][name]),
                np.array(records["after"]["per_query"][name]),
                seed=job.config.seed,
            )._asdict()
            for name in METRICS
        },
        "distribution": distribution or nothing,
        "ledger": {**position.ledger, "corpus_passes": round(passes, 4)},
        "wall_seconds": 0.0,
        "examples_per_second": round(
            position.step * job.config.train.batch_size / max(position.train_seconds, 1e-9), 2
        ),
    }


def examples(job: Job, workdir: Path) -> list[dict[str, Any]]:
    """A few queries with their first results before and after, spread evenly over the split.

    Args:
      job: the job.
      workdir: the run's folder, with its runs.

    Returns:
      What examples.json holds.
    """
    split = job.data.splits[job.final_split]
    chosen = np.unique(np.linspace(0, len(split.texts) - 1, EXAMPLES).astype(int))
    found = {
        name: read_trec(workdir / "runs" / f"{name}.trec", split, job.data.target_ids)
        for name in ("before", "after")
    }

    def top(name: str, query: int) -> list[dict[str, Any]]:
        rows, scores = found[name].rows[query][:3], found[name].scores[query][:3]
        return [
            {
                "rank": rank,
                "score": round(float(score), 4),
                "text": job.data.target_texts[row],
                "relevant": bool(row in split.positives[query]),
            }
            for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1)
            if row >= 0
        ]

    return [
        {
            "query": split.texts[query],
            "positives": [job.data.target_texts[row] for row in split.positives[query]],
            "before": top("before", query),
            "after": top("after", query),
        }
        for query in chosen
    ]
