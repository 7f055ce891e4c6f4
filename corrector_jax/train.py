"""The training loop: the order of things, and nothing else.

Before step t, as far as they are due: evaluate, save, refresh, probe. Then the step. Every decision
is a function of the step, so that a resumed run makes the same ones, and a batch is made from the
step alone, so that a resumed run sees the same one. A run that is asked to stop saves between two
steps, wherever it is, and what was due and not done is done by the run that goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from corrector_jax import config as configs
from corrector_jax import distributed, paths, rng, staleness
from corrector_jax.cache import TargetCache
from corrector_jax.checkpoint import Checkpoints, Position
from corrector_jax.data import order
from corrector_jax.embed import Consumer, go_over
from corrector_jax.evaluate import Evaluated, evaluate, match_words, references, saved_config, write
from corrector_jax.job import Job, make_job
from corrector_jax.lock import Lock
from corrector_jax.lookahead import Lookahead, make_lookahead
from corrector_jax.metrics import means
from corrector_jax.paths import AnyPath
from corrector_jax.preemption import PreemptedError, Preemption
from corrector_jax.refresh import CacheWriter
from corrector_jax.results import finish
from corrector_jax.state import TrainState
from corrector_jax.trace import Trace
from corrector_jax.types import Array, Batch, UserError
from corrector_jax.writer import Silence, StepLog, Writer, progress, say


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run works with and writes to.

    Attributes:
      job: everything that stays the same.
      workdir: the run's folder.
      lock: held while the run is alive.
      preemption: whether the run was asked to stop.
      watch: ends this process if the others leave it waiting.
      checkpoints: checkpoints and cache snapshots.
      lookahead: finds candidates of the next batch, where the strategy has them.
      position: how far the run is; each part of the loop brings its own share up to date.
      writer: metrics.
      log: metrics of training steps.
      started: when the run began, by `time.monotonic()`; for a resumed run, long before now.
    """

    job: Job
    workdir: AnyPath
    lock: Lock
    preemption: Preemption
    watch: distributed.Watch
    checkpoints: Checkpoints
    lookahead: Lookahead
    position: Position
    writer: Writer
    log: StepLog
    started: float

    @contextlib.contextmanager
    def timed(self, purpose: str) -> Iterator[None]:
        """Counts the seconds of a block in the position, under what they are spent on."""
        began = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - began
            self.position.times[purpose] = self.position.times.get(purpose, 0.0) + spent

    def check(self) -> None:
        """Called between two steps and two blocks, by all processes equally often.

        Raises:
          PreemptedError: the run was asked to stop.
        """
        self.watch.beat()
        self.preemption.check()

    def add(self, ids: Array, fresh: Array) -> None:
        """Takes part in a pass over the corpus to end it when the run is asked to stop.

        Args:
          ids: [b] int32, not looked at.
          fresh: [b, D] float32, not looked at.

        Raises:
          PreemptedError: the run was asked to stop.
        """
        self.check()


def train(config: ConfigDict, workdir: AnyPath, *, started: float) -> None:
    """Trains, evaluates before and after, and leaves the report; resumes what is there.

    Args:
      config: validated.
      workdir: the run's folder; made if it is not there.
      started: `time.monotonic()` when the process began.

    Raises:
      UserError: the workdir holds another run or is in use, data, weights and configuration do
        not fit, or training went wrong in a way that a user can mend.
      PreemptedError: the run was asked to stop; the same call goes on with it.
    """
    checkpoint, lead = config.checkpoint, distributed.is_lead()
    notices = jax.default_backend() == "tpu"
    with contextlib.ExitStack() as open_while_it_runs:
        enter = open_while_it_runs.enter_context
        preemption = enter(Preemption(say=say, notices=notices, vote=distributed.Vote()))
        distributed.require_same("configuration", configs.to_json(config))
        with distributed.same_fate():
            lock = enter(Lock(workdir, say=say, lead=lead))
        distributed.require_same("--workdir", lock.holder())
        with distributed.same_fate():
            checkpoints = enter(
                Checkpoints.writable(
                    workdir,
                    keep=checkpoint.keep,
                    keep_every=checkpoint.keep_every,
                    keep_best=checkpoint.keep_best,
                )
            )
            resumes = bool(checkpoints.steps())
            if resumes:
                configs.refuse_other_run(config, saved_config(workdir), str(workdir))
            elif (workdir / "results.json").exists():
                raise UserError(
                    f"{workdir} holds the results of a run but none of its checkpoints: put "
                    "checkpoints/ back, or name another --workdir"
                )
        with distributed.same_fate():
            job = make_job(config)
            job.require_shares()
            say(configs.in_words(config))
        distributed.require_same("data", job.fingerprint)
        preemption.check()
        state = job.init_state()
        cache = job.empty_cache() if job.uses_cache else None
        lookahead = enter(contextlib.closing(make_lookahead(job)))
        position = Position(data=job.fingerprint)
        if resumes:
            state, cache, position = checkpoints.resume(
                state, cache, data=job.fingerprint, made_by=job.made_by, say=say, set_aside=True
            )
            say(f"resumed {workdir} at step {position.step:,}")
            if cache is not None and state.corrector.measured is not None:
                cache = job.measure_lengths()(state.corrector.measured, cache)
            if cache is not None and position.cache is not None:
                lookahead.resume(
                    cache,
                    checkpoints.cache_folder(position.cache),
                    position.cache,
                    position.candidates,
                )
        started -= position.seconds
        watch = enter(distributed.Watch(config.mesh.timeout))
        with distributed.same_fate():
            writer: Writer = Silence()
            if lead:
                paths.write(workdir / "config.json", configs.to_json(config))
                writer = Writer(
                    workdir,
                    step=position.step,
                    size=position.metrics,
                    started=started,
                    tensorboard=config.log.tensorboard,
                )
        with writer:
            log = StepLog(
                writer,
                every=config.log.every,
                batch_size=config.train.batch_size,
                saved=position.log,
                on_skipped=functools.partial(skipped, job, workdir, position),
            )
            run = Run(
                job, workdir, lock, preemption, watch, checkpoints, lookahead, position, writer,
                log, started,
            )  # fmt: skip
            if not resumes:
                with run.timed("evaluate"):
                    cache = before(run, state, cache)
                save(run, state, cache)
            state, cache = loop(run, state, cache)
            with run.timed("evaluate"):
                after(run, state, cache)
        params = job.place.fetch(state.params)
        with watch.resting():
            if lead:
                finish(job, params, workdir, position, started)
            distributed.wait_for_all("the run is over")


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

    Raises:
      PreemptedError: the run was asked to stop; everything up to here is saved.
    """
    job, config, position = run.job, run.job.config, run.position
    stages, probe_fn = job.stages(), job.probe_step()
    fit_fn = job.fit_step() if job.method.corrector.landmarks else None
    lengths_fn = job.lengths_step() if job.method.corrector.has_lengths else None
    # All at once: computed in the loop, each would queue behind the step and wait for it.
    updates = np.arange(config.train.steps // config.train.accumulate)
    rates = np.asarray(jax.vmap(job.learning_rate)(updates))
    # One more than there are steps: a run that is prolonged goes on with its candidates.
    batches = order.ahead(
        lambda step: place_batch(job, step), range(position.step, config.train.steps + 1)
    )
    upcoming = next(batches)
    traced = configs.profiled(config) if distributed.is_lead() else range(0)
    with (
        contextlib.closing(batches),
        Trace(run.workdir, traced) as trace,
        progress("training", config.train.steps, "steps", done=position.step) as advance,
    ):
        while True:
            step = position.step
            try:
                state, cache = between(run, state, cache)
            except PreemptedError:
                save(run, state, cache)
                run.checkpoints.wait()  # what goes wrong here is worse news than being stopped
                raise
            if step == config.train.steps:
                return state, cache
            with run.timed("probe"):
                if fit_fn and is_fit_due(run):
                    state = fit(run, fit_fn, state, cache)
                if cache is not None and is_probe_due(run):
                    state = probe(run, probe_fn, state, cache)
                if lengths_fn and is_measuring_due(run):
                    state, cache = lengths_fn(state, cache)
            trace.begin(step)
            entered = time.monotonic()
            with run.timed("wait for the batch"):
                batch = run.lookahead.join(upcoming, state, cache)
                upcoming = next(batches)
                run.lookahead.start(upcoming, state, cache)
            stage = next(one for one in stages[::-1] if one.start <= step)
            with run.timed("step"):
                key = job.place.put_everywhere(rng.key(config.seed, "step", step))
                # Nothing moves between host and device unasked: a step that waits is a bug.
                with jax.transfer_guard("disallow"), trace.annotated(step):
                    state, cache, measured = stage.step(state, cache, job.tables, batch, key)
                position.step = step + 1
                position.ledger["encoded_with_grad"] += stage.with_grad
                position.ledger["encoded_without_grad"] += stage.without_grad
                position.ledger["refresh"] += stage.rewritten
                # Reads the metrics of the step before, while this one runs.
                rate = float(rates[step // config.train.accumulate])
                note = run.log.add(
                    position.step, measured, {"learning_rate": rate}, position.train_seconds
                )
                if is_boundary(run) or trace.is_last(step):
                    note = run.log.flush()  # what follows takes long: the step's own time ends here
            position.train_seconds += time.monotonic() - entered
            if trace.is_last(step):
                made = stage.step.lower(state, cache, job.tables, batch, key).compile()
                trace.end(step, made.as_text() or "")
            advance(1, note)


def is_boundary(run: Run) -> bool:
    """Whether something other than a step follows: an evaluation, a save, a probe, the end."""
    config, step = run.job.config, run.position.step
    if step and step == config.reader.given_steps:
        return True  # other steps follow, which measure other things
    every = (config.eval.every, config.checkpoint.every)
    if step == config.train.steps or any(each and step % each == 0 for each in every):
        return True
    # The row of a step comes before that of a probe, whether or not the run was stopped between.
    return is_probe_due(run)


def between(
    run: Run, state: TrainState, cache: TargetCache | None
) -> tuple[TrainState, TargetCache | None]:
    """What is due between two steps: evaluate, save, refresh, in this order.

    Args:
      run: the run.
      state: not taken over: it can be saved if this is interrupted.
      cache: taken over; a refresh that is interrupted is begun anew from the snapshot before.

    Returns:
      The state and the cache.

    Raises:
      PreemptedError: the run was asked to stop. Nothing is half done that a resumed run would not
        do again from its beginning.
    """
    config, position, step = run.job.config, run.position, run.position.step
    run.check()
    ends, every = step == config.train.steps, config.eval.every
    if every and step and step % every == 0 and not ends and str(step) not in position.dev:
        with run.timed("evaluate"):
            position.dev[str(step)] = during(run, state, cache)
    if step and (ends or step % config.checkpoint.every == 0):
        save(run, state, cache)
    if cache is None or ends or not run.job.refresh_policy.is_due(step, position.error):
        return state, cache
    with run.timed("refresh"):
        return refresh_cache(run, state, cache)


def save(run: Run, state: TrainState, cache: TargetCache | None) -> None:
    """Starts saving a checkpoint; one that is there already is left as it is."""
    if run.position.step in run.checkpoints.steps():
        return
    run.lock.verify()
    saved = run.position.cache
    changed = saved is None or saved["step"] != run.position.step
    with run.timed("save"):
        if cache is not None and run.job.method.cache_policy.rewrites and changed:
            run.position.cache = save_cache(run, state, cache)
        run.log.flush()
        run.position.log = run.log.state()
        run.position.candidates = run.lookahead.candidates()
        run.position.seconds = time.monotonic() - run.started
        run.position.metrics = run.writer.sync()
        run.checkpoints.save(state, run.position)


def skipped(job: Job, workdir: AnyPath, position: Position, step: int) -> None:
    """Counts a step whose loss or gradients were not finite, and keeps its batch for inspection.

    Args:
      job: the job.
      workdir: `skipped/STEP.json` goes here.
      position: holds the steps skipped so far.
      step: steps done, the skipped one included.

    Raises:
      UserError: there are more of them than `train.max_skipped`.
    """
    position.skipped.append(step)
    path = workdir / "skipped" / f"{step}.json"
    if distributed.is_lead():
        keep_batch(job, path, step)
    say(f"WARNING: step {step:,} was skipped: its loss or gradients were not finite ({path})")
    count, most = len(position.skipped), job.config.train.max_skipped
    if count > most:
        raise UserError(
            f"loss or gradients were not finite at {count} steps, more than config.train."
            f"max_skipped={most}; the last batch is in {path}: train anew with a lower "
            "config.train.learning_rate, or resume with a larger config.train.max_skipped"
        )


def keep_batch(job: Job, path: AnyPath, step: int) -> None:
    """Writes which queries and positives the batch before `step` had."""
    split, rows = job.queries_of(step - 1)
    positive = np.asarray(make_batch(job, step - 1).positive)
    record = {
        "step": step,
        "queries": [job.data.splits[split].query_ids[row] for row in rows],
        "positives": [job.data.target_ids[row] for row in positive[positive >= 0]],
    }
    paths.write(path, json.dumps(record, indent=2) + "\n")


def place_batch(job: Job, step: int) -> Batch:
    """The batch of a step on the devices, its examples split over them."""
    placed: Batch = job.place.put(make_batch(job, step), job.place.examples)
    return placed


def make_batch(job: Job, step: int) -> Batch:
    """The batch of a step on the host: a function of the seed and the step alone."""
    return job.batch(step)


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
    if distributed.is_lead():
        for name in ("eval", "drift"):
            paths.remove(run.workdir / name)  # of a run that never got to step 0
    with run.watch.resting():
        match_words(job, run.workdir)
    position.ledger["evaluation"] += references(job, run.workdir, also=[run])
    run.check()
    fill: list[Consumer] = [run]
    corpus, psi = "full", None
    if cache is not None and job.config.cache.path:
        # Rows of these very weights are what a pass would make; h is the identity until it opens.
        cache, corpus, psi = job.load_cache(cache, state.params), "corrected", state.corrector.gated
    elif cache is not None:
        filled = CacheWriter(cache, step=0, place=job.place)
        fill.append(filled)
    result = evaluate(
        job,
        state.params,
        step=0,
        splits=splits(job),
        corpus=corpus,
        cache=cache if psi is not None else None,
        psi=psi,
        also=fill,
        label="embedding the corpus",
        beat=run.check,
    )
    if cache is not None and psi is None:
        cache = filled.cache
    keep(run, "before", result)
    position.ledger["evaluation" if cache is None else "initial"] += result.encoded
    if cache is not None:
        position.cache = save_cache(run, state, cache)
    return cache


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
        encoded = go_over(job.embedder, state.params, np.arange(job.size), [fill, run], advance)
    position.ledger["refresh"] += encoded
    position.embedded_at, position.error = position.step, None
    position.cache = save_cache(run, state, fill.cache)
    corrector = job.place.put_everywhere(job.init_corrector(position.step))
    return dataclasses.replace(state, corrector=corrector), fill.cache


def save_cache(run: Run, state: TrainState, cache: TargetCache) -> dict[str, Any]:
    """Saves a snapshot, and what is made of it to look candidates up; returns the reference."""
    run.lock.verify()
    whole = run.position.step == run.position.embedded_at
    weights = run.job.weights_digest(state.params) if whole else "those of several steps"
    made_by = {**run.job.made_by, "weights": weights}
    with run.watch.resting():
        saved = run.checkpoints.save_cache(cache, step=run.position.step, made_by=made_by)
        run.lookahead.renew(cache, run.checkpoints.cache_folder(saved), saved)
        return saved


def is_probe_due(run: Run) -> bool:
    """Whether the probe is due; right after a snapshot there is nothing to measure."""
    every = run.job.config.corrector.probe_every if run.job.uses_cache else 0
    return is_time(run, every)


def is_time(run: Run, every: int) -> bool:
    """Whether it is a multiple of so many steps since the cache was embedded; 0 = never."""
    # Counted from the snapshot: a refresh that falls on a probe must not leave the gate closed.
    age = run.position.step - run.position.embedded_at
    return bool(every and age > 0 and age % every == 0)


def is_fit_due(run: Run) -> bool:
    """Whether a kernel corrector's landmarks are encoded anew."""
    return is_time(run, run.job.config.corrector.fit_every)


def is_measuring_due(run: Run) -> bool:
    """Whether the lengths beside the cache are measured anew.

    Right after a probe, which may have opened the gate, and before the first step that a new
    snapshot is drawn from, too.
    """
    age = run.position.step - run.position.embedded_at
    return age == 0 or is_probe_due(run) or is_time(run, run.job.config.corrector.lengths_every)


def fit(
    run: Run, fit_fn: Callable[..., TrainState], state: TrainState, cache: TargetCache | None
) -> TrainState:
    """Fits a kernel corrector to the drift of uniform landmarks.

    Args:
      run: the run; its ledger counts the landmarks.
      fit_fn: the jitted step.
      state: taken over.
      cache: the cache.

    Returns:
      The state.
    """
    job, step = run.job, run.position.step
    key = job.place.put_everywhere(rng.key(job.config.seed, "landmarks", step))
    run.position.ledger["encoded_without_grad"] += job.method.corrector.landmarks
    return fit_fn(state, cache, job.tokens, key)


def probe(
    run: Run, probe_fn: Callable[..., Any], state: TrainState, cache: TargetCache
) -> TrainState:
    """Measures staleness and correction on the fixed probe; may open the corrector's gate.

    Args:
      run: the run; its ledger counts the probe's targets.
      probe_fn: the jitted probe step.
      state: taken over.
      cache: the cache.

    Returns:
      The state.
    """
    job, config = run.job, run.job.config
    state, *out = probe_fn(state, cache, job.tokens, job.probe_queries, job.probe_ids)
    measured, sample = jax.device_get(out)
    every, steps = config.corrector.probe_every, config.train.steps
    if staleness.is_kept(run.position.step, every=every, steps=steps):
        staleness.keep_sample(run.workdir, run.position.step, sample)
    values = means(measured)
    named = {f"probe/{name}": value for name, value in values.items()}
    run.writer.scalars(run.position.step, named)
    run.position.ledger["encoded_without_grad"] += job.probe_ids.size
    run.position.error = values["corrected_error" if values["gate"] else "drift"]
    return state


def during(run: Run, state: TrainState, cache: TargetCache | None) -> float:
    """An evaluation on dev in the middle of training, by `eval.corpus`.

    Args:
      run: the run; its ledger counts what was encoded.
      state: the training state.
      cache: the cache, or None.

    Returns:
      mrr@10, by which the best checkpoint is chosen.
    """
    result = evaluate(
        run.job,
        state.params,
        step=run.position.step,
        splits=[run.job.dev_split],
        corpus=run.job.config.eval.corpus,
        cache=cache,
        psi=state.corrector.gated,
        also=[run],
        beat=run.check,
    )
    run.position.ledger["evaluation"] += result.encoded
    run.writer.scalars(run.position.step, result.scalars(run.job.data.name))
    return float(result.records[run.job.dev_split]["metrics"]["mrr@10"])


def after(run: Run, state: TrainState, cache: TargetCache | None) -> None:
    """The last evaluation: always the full corpus, and exact divergences where there is a cache.

    Args:
      run: the run; its ledger counts what was encoded.
      state: the trained state.
      cache: the cache, or None.
    """
    watched = None if cache is None else staleness.Watched(run.job, state)
    result = evaluate(
        run.job,
        state.params,
        step=run.position.step,
        splits=splits(run.job),
        cache=cache,
        psi=state.corrector.gated,
        also=[run] if watched is None else [run, watched],
        compare=True,
        beat=run.check,
    )
    run.position.ledger["evaluation"] += result.encoded
    keep(run, "after", result)
    if watched is not None and cache is not None:
        watched.write(run.workdir, run.position.step, state, cache)


def keep(run: Run, name: str, result: Evaluated) -> None:
    """Writes an evaluation of the final split to the workdir, and all its metrics as scalars."""
    split = run.job.final_split
    write(run.job, run.workdir, name, result.records[split], result.rankings[split])
    run.writer.scalars(run.position.step, result.scalars(run.job.data.name))


def splits(job: Job) -> list[str]:
    """The final split, and dev where it is another."""
    return list(dict.fromkeys([job.final_split, job.dev_split]))
