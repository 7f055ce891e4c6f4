"""Evaluation: exact search, exact divergences, and what they are compared with."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.stages import Wrapped
from ml_collections import ConfigDict

from corrector_jax import answering, distributed, index, paths
from corrector_jax import config as configs
from corrector_jax.cache import TargetCache
from corrector_jax.checkpoint import Checkpoints, Position
from corrector_jax.embed import Consumer, Embedder, cached_blocks, go_over
from corrector_jax.job import Job, full_encoder, make_job
from corrector_jax.negatives import Gated
from corrector_jax.paths import AnyPath
from corrector_jax.ranking import Measured, Ranking, bm25, measure, write_trec
from corrector_jax.sharding import Placement
from corrector_jax.state import TrainState
from corrector_jax.steps.eval_step import (
    Best,
    Gap,
    Softmax,
    gap_step,
    search_step,
    softmax_step,
)
from corrector_jax.steps.method import Method
from corrector_jax.types import Array, PyTree, UserError
from corrector_jax.writer import progress, say


class Search:
    """Exact top-k of some queries over every block that is added."""

    def __init__(self, queries: Array, count: int, *, k: int, place: Placement) -> None:
        """Starts with nothing found.

        Args:
          queries: [Q', D] float32 split by row.
          count: Q, how many of them are real.
          k: results kept per query.
          place: the mesh.
        """
        self._queries, self._count = queries, count
        self._place, self._step = place, jit_search(place)
        self._best = place.put_rows(jax.device_get(Best.empty(queries.shape[0], k)))

    def add(self, ids: Array, fresh: Array) -> None:
        """Merges one block: ids [b] int32 (-1 = empty place), embeddings [b, D] float32."""
        self._best = self._step(self._best, self._queries, fresh, ids)

    def ranking(self) -> Ranking:
        """The top-k of the real queries, on the host: rows and scores [Q, k]."""
        scores, ids = self._place.fetch(self._best)
        ids = ids[: self._count]
        return Ranking(ids, np.where(ids >= 0, scores[: self._count], 0.0).astype(np.float32))


class IndexSearch:
    """The same through a ScaNN index, built over every block once all of them were added."""

    def __init__(
        self, queries: Array, count: int, *, k: int, size: int, place: Placement, **keys: int
    ) -> None:
        """Starts with nothing added.

        Args:
          queries: [Q', D] float32 split by row.
          count: Q, how many of them are real.
          k: results kept per query.
          size: N.
          place: the mesh.
          **keys: of `index.parameters`.
        """
        self._queries, self._k = place.fetch(queries)[:count], k
        self._rows = np.zeros((size, queries.shape[1]), np.float32)
        self._made = index.parameters(size, k, **keys)

    def add(self, ids: Array, fresh: Array) -> None:
        """Keeps one block: ids [b] int32 (-1 = empty place), embeddings [b, D] float32."""
        block, rows = jax.device_get((ids, fresh))
        self._rows[block[block >= 0]] = rows[block >= 0]

    def ranking(self) -> Ranking:
        """What the index finds for the real queries: rows and scores [Q, k]."""
        ids = np.arange(len(self._rows), dtype=np.int32)
        built = index.build(ids, self._rows, k=self._k, made=self._made)
        found, scores = built.search(self._queries, self._k)
        return Ranking(found, np.where(found >= 0, scores, 0.0))

    def record(self, found: Ranking, exact: Ranking) -> dict[str, Any]:
        """How it searched, and how much of the exact top-k, [Q, k] likewise, it found."""
        pairs = zip(found.rows, exact.rows, strict=True)
        hits = [np.isin(one[one >= 0], other).mean() for other, one in pairs]
        return {"kind": "scann", **self._made._asdict(), "recall_of_exact": float(np.mean(hits))}


class LossMeter:
    """The loss over all targets of every query, over every block that is added."""

    def __init__(
        self, queries: Array, count: int, *, known: np.ndarray, beta: float, place: Placement
    ) -> None:
        """Starts with nothing seen.

        Args:
          queries: [Q', D] float32 split by row, fresh.
          count: Q, how many of them are real.
          known: [Q, K] int32, their known positives, -1 pads.
          beta: inverse temperature.
          place: the mesh.
        """
        self._queries, self._count = queries, count
        self._place, self._step = place, jit_softmax(beta, place)
        padded = np.full((len(queries), known.shape[1]), -1, np.int32)
        padded[:count] = known
        self._known = place.put_rows(padded)
        self._seen = place.put_rows(jax.device_get(Softmax.empty(*padded.shape)))

    def add(self, ids: Array, fresh: Array) -> None:
        """Adds one block: ids [b] int32 (-1 = empty place), embeddings [b, D] float32."""
        self._seen = self._step(self._seen, self._queries, self._known, fresh, ids)

    def result(self) -> Measured:
        """Under "exact_loss", nats, of the real queries."""
        seen: Softmax = self._place.fetch(self._seen)
        each = np.asarray(seen.loss()[: self._count], np.float64)
        return Measured({"exact_loss": float(each.mean())}, {"exact_loss": each})


class GapMeter:
    """KL(P || P_stale), KL(P || P_h), drift and corrected error over every block that is added."""

    def __init__(
        self,
        queries: Array,
        count: int,
        *,
        cache: TargetCache,
        psi: Gated,
        method: Method,
        place: Placement,
    ) -> None:
        """Starts with nothing seen.

        Args:
          queries: [Q', D] float32 split by row, fresh.
          count: Q, how many of them are real.
          cache: the cache to hold against fresh embeddings; it must live as long as this does.
          psi: the corrector as selection uses it.
          method: gives beta and h.
          place: the mesh.
        """
        self._queries, self._count = queries, count
        self._cache, self._psi = cache, psi
        self._place, self._step = place, jit_gap(method, place)
        empty = jax.device_get(Gap.empty(queries.shape[0]))
        self._gap = Gap(
            place.put_rows(empty.stale),
            place.put_rows(empty.corrected),
            place.put_everywhere(empty.drift),
            place.put_everywhere(empty.corrected_error),
        )

    def add(self, ids: Array, fresh: Array) -> None:
        """Adds one block: ids [b] int32 (-1 = empty place), fresh embeddings [b, D] float32."""
        self._gap = self._step(self._gap, self._queries, fresh, ids, self._cache, self._psi)

    def result(self) -> dict[str, float]:
        """kl_stale and kl_corrected (nats, means over queries), drift and corrected_error."""
        gap: Gap = self._place.fetch(self._gap)
        return {
            "kl_stale": float(np.mean(gap.stale.kl()[: self._count])),
            "kl_corrected": float(np.mean(gap.corrected.kl()[: self._count])),
            "drift": float(gap.drift.total / gap.drift.weight),
            "corrected_error": float(gap.corrected_error.total / gap.corrected_error.weight),
        }


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One pass over targets, seen by the queries of some splits.

    Attributes:
      records: split -> what `eval/NAME.json` holds.
      rankings: split -> top-k.
      encoded: targets encoded for it.
    """

    records: dict[str, dict[str, Any]]
    rankings: dict[str, Ranking]
    encoded: int

    def scalars(self, dataset: str) -> dict[str, float]:
        """The metrics under the names of metrics.jsonl: eval/DATASET-SPLIT/METRIC."""
        values = {}
        for split, record in self.records.items():
            for name, value in {**record["metrics"], **(record["distribution"] or {})}.items():
                values[f"eval/{dataset}-{split}/{name}"] = value
        return values


def evaluate(
    job: Job,
    params: PyTree,
    *,
    step: int,
    splits: list[str],
    corpus: str = "full",
    embedder: Embedder | None = None,
    cache: TargetCache | None = None,
    psi: Gated | None = None,
    also: Sequence[Consumer] = (),
    label: str = "evaluating",
    search: str = "exact",
    compare: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> Evaluated:
    """Ranks targets for the queries of some splits in one pass, and answers from the best.

    Args:
      job: the job.
      params: the encoders' parameters.
      step: training steps done.
      splits: whose queries.
      corpus: "full" embeds all targets, "sample" the judged and some uniform ones, "corrected"
        ranks h(C) and embeds none.
      embedder: another model's, to compare with; None = the job's own.
      cache: with `psi`, and unless it is ranked itself, measured against fresh embeddings.
      psi: the corrector as selection uses it.
      also: other users of the same pass.
      label: what the progress line says.
      search: "exact", or "scann" to rank by an index of all targets and measure what it misses.
      compare: where there is a reader, what it answers to the first of the splits from known
        positives, from nothing and from any passages.
      beat: called between two blocks of answers, as `also` is between two of targets.

    Returns:
      Records and rankings by split.
    """
    source = embedder or job.embedder
    ids = _targets_to_rank(job, splits, corpus)
    read = answering.passages_read(job) if job.questions else 0
    searches: dict[str, Search] = {}
    indexed: dict[str, IndexSearch] = {}
    exact_losses: dict[str, LossMeter] = {}
    gaps: dict[str, GapMeter] = {}
    for split in splits:
        tokens = job.query_tokens[split]
        queries = source.queries(params, tokens)
        k = min(max(job.config.eval.top_k, read), len(ids))
        searches[split] = Search(queries, len(tokens), k=k, place=job.place)
        if search == "scann":
            indexed[split] = IndexSearch(
                queries, len(tokens), k=k, size=job.size, place=job.place, **job.config.index
            )
        if corpus == "full":
            exact_losses[split] = LossMeter(
                queries,
                len(tokens),
                known=job.data.known_positives(split),
                beta=job.method.beta,
                place=job.place,
            )
        if cache is not None and psi is not None and corpus == "full":
            gaps[split] = GapMeter(
                queries, len(tokens), cache=cache, psi=psi, method=job.method, place=job.place
            )
    consumers: list[Consumer] = [*searches.values(), *indexed.values()]
    consumers += [*exact_losses.values(), *gaps.values(), *also]
    encoded = 0
    if corpus == "corrected":
        if cache is None or psi is None:
            raise ValueError("ranking the corrected cache needs a cache and a corrector")
        blocks = cached_blocks(
            cache,
            psi,
            ids,
            corrector=job.method.corrector,
            block=job.config.eval.batch_size,
            place=job.place,
        )
        for block, rows in blocks:
            for consumer in consumers:
                consumer.add(block, rows)
    else:
        with progress(label, len(ids), "targets") as advance:
            encoded = go_over(source, params, ids, consumers, advance)
    rankings = {split: exact.ranking() for split, exact in searches.items()}
    found = {split: approximate.ranking() for split, approximate in indexed.items()}
    how = {split: indexed[split].record(found[split], rankings[split]) for split in found}
    rankings |= found
    records = {}
    for split in splits:
        measured = measure(job.data.splits[split], rankings[split], job.data.target_ids)
        texts = None
        if job.questions and embedder is None:
            texts, of_answers = answering.answer(job, params, split, rankings[split], beat=beat)
            measured = measured.join(of_answers)
        if split in exact_losses:
            measured = measured.join(exact_losses[split].result())
        records[split] = _record(
            step=step,
            split=split,
            corpus=corpus,
            ranked=len(ids),
            measured=measured,
            distribution=gaps[split].result() if split in gaps else None,
        )
        if split in how:
            records[split]["search"] = how[split]
        if texts is not None:
            records[split]["answers"] = texts
    if compare and job.questions:
        records[splits[0]]["read"] = answering.compare(job, params, splits[0], beat=beat)
    return Evaluated(records, rankings, encoded)


def write(
    job: Job, workdir: AnyPath, name: str, record: dict[str, Any], found: Ranking
) -> dict[str, Any]:
    """Leaves an evaluation in the workdir: `eval/NAME.json` and `runs/NAME.trec`.

    Of several processes the first one writes.

    Args:
      job: the job.
      workdir: the run's folder.
      name: of the evaluation.
      record: of `evaluate`.
      found: its ranking.

    Returns:
      The record, with its name and the path of its run.
    """
    record = {"name": name, **record, "run": f"runs/{name}.trec"}
    if not distributed.is_lead():
        return record
    split = job.data.splits[record["split"]]
    write_trec(workdir / record["run"], split, found, job.data.target_ids, name)
    paths.write(workdir / "eval" / f"{name}.json", json.dumps(record) + "\n")
    return record


def evaluate_run(
    workdir: AnyPath, *, name: str = "", step: int | None = None, search: str = "exact"
) -> AnyPath:
    """Evaluates a checkpoint of a run on its final split, with the full corpus.

    Args:
      workdir: the run's folder.
      name: of the evaluation; empty = SPLIT-step-STEP, and -scann behind it.
      step: which checkpoint; None = the newest.
      search: "exact" or "scann".

    Returns:
      The path of `eval/NAME.json`; results.json is left alone.

    Raises:
      UserError: there is no run or no checkpoint, the name is taken by the run itself, or ScaNN
        cannot be used here.
    """
    _require_search(search)
    if name in ("before", "after", "bm25", "pretrained") or "/" in name:
        raise UserError(f"--name is {name!r}, which names a part of the run itself: write another")
    job, state, cache, position = restored(workdir, step=step, with_cache=True)
    step, split = position.step, job.final_split
    with distributed.Watch(job.config.mesh.timeout) as watch:
        result = evaluate(
            job,
            state.params,
            step=step,
            splits=[split],
            cache=cache,
            psi=state.corrector.gated,
            also=[watch],
            search=search,
            compare=True,
            beat=watch.beat,
        )
    name = name or f"{split}-step-{step}" + ("" if search == "exact" else f"-{search}")
    record = write(job, workdir, name, result.records[split], result.rankings[split])
    for metric, value in {**record["metrics"], **(record["distribution"] or {})}.items():
        say(f"{metric:>16} {value:.4f}")
    for what, values in record.get("read", {}).items():
        say(f"{'em, ' + what.replace('_', ' '):>24} {values['em']:.4f}")
    if how := record.get("search"):
        say(f"{'recall of exact':>16} {how['recall_of_exact']:.4f}")
    path = workdir / "eval" / f"{name}.json"
    say(f"{split} of {job.data.name} at step {step:,}: {path}")
    return path


def _require_search(search: str) -> None:
    if search not in configs.WORDS["eval.search"]:
        words = " or ".join(configs.WORDS["eval.search"])
        raise UserError(f"config.eval.search is {search!r}: write {words}")
    if search == "exact":
        return
    if not distributed.is_alone():
        raise UserError(
            "config.eval.search 'scann' searches on one host: start --mode=evaluate as one "
            "process, or write --config.eval.search=exact"
        )
    if reason := index.why_not():
        raise UserError(
            f"config.eval.search is 'scann' but ScaNN cannot be imported ({reason}): pip install "
            "scann and import no TensorFlow before it, or write --config.eval.search=exact"
        )


def trained(workdir: AnyPath, *, step: int | None = None) -> tuple[Job, TrainState, Position]:
    """A checkpoint of a run, without its cache.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None = the newest.

    Returns:
      The job, the state and the position.

    Raises:
      UserError: there is no run or no checkpoint, or the data is not what it was trained on.
    """
    job, state, _, position = restored(workdir, step=step, with_cache=False)
    return job, state, position


def restored(
    workdir: AnyPath, *, step: int | None, with_cache: bool
) -> tuple[Job, TrainState, TargetCache | None, Position]:
    """A checkpoint of a run on the devices at hand.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None = the newest.
      with_cache: whether to read the snapshot of the cache it was trained on, if it has one.

    Returns:
      The job, the state, the cache or None, and the position.

    Raises:
      UserError: there is no run or no checkpoint, or the data is not what it was trained on.
    """
    config = here(saved_config(workdir))
    with Checkpoints.readable(workdir) as checkpoints:
        with distributed.same_fate():
            job = make_job(config)
        state, cache, position = checkpoints.resume(
            job.init_state(),
            job.empty_cache() if with_cache and job.uses_cache else None,
            data=job.fingerprint,
            made_by=job.made_by,
            step=step,
            say=say,
        )
    return job, state, cache, position


def saved_config(workdir: AnyPath) -> ConfigDict:
    """The configuration a workdir was made with.

    Raises:
      UserError: there is none, or it is not what a run wrote.
    """
    saved = workdir / "config.json"
    if not saved.is_file():
        raise UserError(f"{workdir} holds no config.json: --workdir must be the folder of a run")
    try:
        config = configs.from_json(saved.read_text(encoding="utf-8"))
        configs.check_values(config)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{saved} cannot be read ({error}): put it back") from error
    except UserError as error:
        raise UserError(f"{saved}: {error}") from error
    return config


def here(config: ConfigDict) -> ConfigDict:
    """A run's configuration on the devices at hand: its mesh only where they can form it."""
    mesh = config.mesh
    if mesh.devices > jax.device_count():
        mesh.devices = 0
    if (mesh.devices or jax.device_count()) % (mesh.fsdp * mesh.tensor):
        mesh.fsdp = mesh.tensor = 1
    config.train.chunk = 0
    return config


def match_words(job: Job, workdir: AnyPath) -> None:
    """BM25 on the final split, where it is asked for: `eval/bm25.json`."""
    if not job.config.eval.bm25:
        return
    split = job.final_split
    queries = job.data.splits[split]
    found = bm25(job.data.target_texts, queries.texts, min(job.config.eval.top_k, job.size))
    measured = measure(queries, found, job.data.target_ids)
    record = _record(
        step=0, split=split, corpus="full", ranked=job.size, measured=measured, distribution=None
    )
    write(job, workdir, "bm25", record, found)


def references(job: Job, workdir: AnyPath, also: Sequence[Consumer] = ()) -> int:
    """What the final split's result stands beside: the encoder with all its layers.

    Args:
      job: the job.
      workdir: where `eval/pretrained.json` goes, if it is asked for.
      also: other users of the pass.

    Returns:
      Targets encoded.
    """
    if not job.config.eval.full_encoder:
        return 0
    split = job.final_split
    embedder, params = full_encoder(job)
    result = evaluate(
        job, params, step=0, splits=[split], embedder=embedder, also=also, label="all layers"
    )
    write(job, workdir, "pretrained", result.records[split], result.rankings[split])
    return result.encoded


def _targets_to_rank(job: Job, splits: list[str], corpus: str) -> np.ndarray:
    if corpus != "sample":
        return np.arange(job.size)
    judged = [row for split in splits for row in job.data.splits[split].positives]
    drawn = np.random.default_rng([job.config.seed, 1]).choice(
        job.size, min(job.config.eval.sample_targets, job.size), replace=False
    )
    return np.union1d(np.concatenate(judged), drawn)


def _record(
    *,
    step: int,
    split: str,
    corpus: str,
    ranked: int,
    measured: Measured,
    distribution: dict[str, float] | None,
) -> dict[str, Any]:
    return {
        "step": step,
        "split": split,
        "corpus": corpus,
        "queries": len(next(iter(measured.per_query.values()))),
        "targets_ranked": ranked,
        "metrics": measured.metrics,
        "distribution": distribution,
        "per_query": {key: values.tolist() for key, values in measured.per_query.items()},
    }


@functools.cache
def jit_search(place: Placement) -> Wrapped:
    """`search_step`, jitted: what was found is donated, and split like the queries."""
    return place.jit_step(search_step, place.rows, donate=(0,))


@functools.cache
def jit_softmax(beta: float, place: Placement) -> Wrapped:
    """`softmax_step`, jitted: what was seen is donated, and split like the queries."""
    step = functools.partial(softmax_step, beta=beta)
    return place.jit_step(step, place.rows, donate=(0,))


@functools.lru_cache(maxsize=4)
def jit_gap(method: Method, place: Placement) -> Wrapped:
    """`gap_step`, jitted: the sums are donated, and split like the queries."""
    step = functools.partial(gap_step, beta=method.beta, corrector=method.corrector, place=place)
    shardings = (place.rows, place.rows, place.everywhere, place.everywhere)
    out = Gap._make(shardings)  # a prefix of the tree
    return place.jit_step(step, out, donate=(0,))
