"""What a trained run finds for any query, and what it would have found when it was younger.

Four models answer, two where a strategy has no cache:

    before      the weights of step 0, over targets embedded with them
    stale       the trained query tower, over the cache as it is
    corrected   the trained query tower, over h(C)
    final       the trained query tower, over targets embedded by the trained weights

Targets are embedded once and kept in `search/` of the workdir, named by the weights that made them;
the cache's own first snapshot serves as `before` where it is whole. Ranking is the evaluation's own
`Search`, over the same rows in the same order.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from corrector_jax import cache as caches
from corrector_jax import snapshot
from corrector_jax.cache import TargetCache
from corrector_jax.checkpoint import Position
from corrector_jax.embed import cached_blocks, go_over
from corrector_jax.evaluate import Search, restored
from corrector_jax.job import Job
from corrector_jax.models.corrector import Identity
from corrector_jax.negatives import Gated
from corrector_jax.paths import AnyPath
from corrector_jax.ranking import Ranking
from corrector_jax.refresh import CacheWriter
from corrector_jax.state import TrainState
from corrector_jax.types import PyTree, UserError
from corrector_jax.writer import progress, say

MODELS = ("before", "stale", "corrected", "final")

AT_ONCE = 8
"""Queries embedded and ranked together; fewer are filled up, so that one shape is compiled."""

DEPTH = 100
"""Targets ranked for a query: as deep as one model is told where another has a target."""

LONGEST = 1000
"""Characters of a query; encoders read a few hundred at most."""

_ROWS_AT_ONCE = 8192


class Found(NamedTuple):
    """What one model found for some queries.

    Attributes:
      ranking: [Q, k] rows and scores.
      seconds: embedding the queries and ranking all targets took so long.
    """

    ranking: Ranking
    seconds: float


class Hit(NamedTuple):
    """One target of an answer.

    Attributes:
      rank: from 1.
      score: inner product of the embeddings.
      target: the target's id.
      text: the target's text.
      relevant: whether it is a known positive of this query.
      ranks: model -> its rank there, None where it is not among the first `DEPTH`.
    """

    rank: int
    score: float
    target: str
    text: str
    relevant: bool
    ranks: dict[str, int | None]


class Answer(NamedTuple):
    """What every model found for one query.

    Attributes:
      query: the query.
      hits: model -> its first targets.
      seconds: model -> how long it took.
    """

    query: str
    hits: dict[str, list[Hit]]
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Model:
    """A query tower and the rows it is held against."""

    params: PyTree
    rows: TargetCache


class Searcher:
    """The models of one checkpoint, ready to answer.

    Attributes:
      job: the job.
      position: which checkpoint.
      models: names of the models there are, in the order of `MODELS`.
    """

    def __init__(self, workdir: AnyPath, *, step: int | None = None) -> None:
        """Reads a checkpoint; embeds the targets where that was not done before.

        Args:
          workdir: the run's folder.
          step: which checkpoint; None = the newest.

        Raises:
          UserError: there is no run or no checkpoint, or the data is not what it was trained on.
        """
        self.job, state, cache, self.position = restored(workdir, step=step, with_cache=True)
        job = self.job
        self._order = job.embedder.in_order(np.arange(job.size))
        self._embedder = dataclasses.replace(job.embedder, block=AT_ONCE)
        self._as_they_are = Gated({}, job.place.put_everywhere(np.float32(1.0)))
        made = _models(job, state, cache, self.position, workdir)
        self._made = {name: made[name] for name in MODELS if name in made}
        self.models = tuple(self._made)
        self.find(self.examples(1))  # compiled now: what is measured later is searching

    def find(self, texts: Sequence[str], models: Sequence[str] = ()) -> dict[str, Found]:
        """Ranks all targets for some queries.

        Args:
          texts: Q queries.
          models: which of `models`; none = all of them.

        Returns:
          Model -> what it found, the best `DEPTH` of each query.
        """
        return {name: self._find(self._made[name], texts) for name in models or self.models}

    def answers(
        self, texts: Sequence[str], *, count: int, models: Sequence[str] = ()
    ) -> list[Answer]:
        """The first targets of every model for some queries.

        Args:
          texts: Q queries.
          count: targets of an answer.
          models: which of `models`; none = all of them.

        Returns:
          Q answers.
        """
        found = self.find(texts, models)
        return [self._answer(query, found, i, count) for i, query in enumerate(texts)]

    def examples(self, count: int) -> list[str]:
        """A few held-out queries, spread evenly over the final split."""
        texts = self.job.data.splits[self.job.final_split].texts
        return [texts[i] for i in np.unique(np.linspace(0, len(texts) - 1, count).astype(int))]

    def _find(self, model: _Model, texts: Sequence[str]) -> Found:
        started = time.perf_counter()
        parts = [
            self._rank(model, texts[at : at + AT_ONCE]) for at in range(0, len(texts), AT_ONCE)
        ]
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Found(Ranking(*columns), time.perf_counter() - started)

    def _rank(self, model: _Model, texts: Sequence[str]) -> Ranking:
        place, size = self.job.place, self.job.size
        queries = self._embedder.queries(model.params, self._tokens(texts))
        search = Search(queries, len(texts), k=min(DEPTH, size), place=place)
        # In the order of the evaluation, so that equal scores come in the same order.
        blocks = cached_blocks(
            model.rows,
            self._as_they_are,
            self._order,
            corrector=Identity(),
            block=min(_ROWS_AT_ONCE, size),
            place=place,
        )
        for ids, rows in blocks:
            search.add(ids, rows)
        return search.ranking()

    def _tokens(self, texts: Sequence[str]) -> np.ndarray:
        """[Q, T]: as wide as the run's own queries, unless one is longer."""
        tokens = self.job.tokenization.queries(texts)
        width = self.job.query_tokens[self.job.final_split].shape[1]
        pad_id = self.job.tokenization.tokenizer.pad_id
        return tokens[:, :width] if (tokens[:, width:] == pad_id).all() else tokens

    def _answer(self, query: str, found: dict[str, Found], i: int, count: int) -> Answer:
        positives = self._known.get(_spaced(query), set())
        data = self.job.data
        ranks = {
            name: {int(row): rank for rank, row in enumerate(one.ranking.rows[i], 1) if row >= 0}
            for name, one in found.items()
        }
        hits = {
            name: [
                Hit(
                    rank=rank,
                    score=float(one.ranking.scores[i, rank - 1]),
                    target=data.target_ids[row],
                    text=data.target_texts[row],
                    relevant=row in positives,
                    ranks={other: ranks[other].get(row) for other in found},
                )
                for row, rank in ranks[name].items()
                if rank <= count
            ]
            for name, one in found.items()
        }
        return Answer(query, hits, {name: one.seconds for name, one in found.items()})

    @functools.cached_property
    def _known(self) -> dict[str, set[int]]:
        """Query of any split, as `require_query` leaves it -> rows of its known positives."""
        known: dict[str, set[int]] = {}
        for split in self.job.data.splits.values():
            for text, rows in zip(split.texts, split.positives, strict=True):
                known.setdefault(_spaced(text), set()).update(rows.tolist())
        return known


def require_query(text: str) -> str:
    """A query with one blank between its words and none around them.

    Raises:
      UserError: it is empty or too long.
    """
    query = _spaced(text.encode(errors="replace").decode())  # of half a character a "?" is left
    if not query:
        raise UserError("the query is empty: write a few words")
    if len(query) > LONGEST:
        raise UserError(
            f"the query has {len(query):,} characters: write {LONGEST:,} or fewer, an encoder "
            "reads no more"
        )
    return query


def require_count(key: str, count: int) -> int:
    """How many targets an answer shows.

    Raises:
      UserError: fewer than 1 or more than are ranked.
    """
    if not 1 <= count <= DEPTH:
        raise UserError(f"{key} is {count}: write 1 to {DEPTH}")
    return count


def _models(
    job: Job, state: TrainState, cache: TargetCache | None, position: Position, workdir: AnyPath
) -> dict[str, _Model]:
    """The models, by name."""
    first = job.init_state().params
    places = [workdir / "search" / "before", workdir / "cache" / "0"]
    models = {"before": _Model(first, _embedded(job, first, 0, places))}
    if cache is not None:
        psi = state.corrector.gated
        rows = cached_blocks(
            cache,
            psi,
            np.arange(job.size),
            corrector=job.method.corrector,
            block=_ROWS_AT_ONCE,
            place=job.place,
        )
        filled = CacheWriter(_empty(job), step=position.step, place=job.place)
        for ids, corrected in rows:
            filled.add(ids, corrected)
        models["stale"] = _Model(state.params, cache)
        models["corrected"] = _Model(state.params, filled.cache)
    places = [workdir / "search" / "final"]
    rows_now = _embedded(job, state.params, position.step, places)
    models["final"] = _Model(state.params, rows_now)
    return models


def _embedded(job: Job, params: PyTree, step: int, places: Sequence[AnyPath]) -> TargetCache:
    """All targets under some weights: read from one of the places, or embedded and kept there.

    Rows that are not float32, or of other weights, are not what the evaluation ranks.
    """
    made_by = {**job.made_by, "weights": job.weights_digest(params)}
    for folder in places:
        try:
            manifest = snapshot.read_manifest(folder)
            if manifest["dtype"] == "float32" and manifest["made_by"] == made_by:
                return snapshot.load(folder, _empty(job), made_by=made_by, remedy="remove it")
        except (snapshot.DamagedError, UserError):
            continue  # not there, or not whole: made anew
    filled = CacheWriter(_empty(job), step=step, place=job.place)
    with progress(f"embedding the targets at step {step:,}, once", job.size, "targets") as advance:
        go_over(job.embedder, params, np.arange(job.size), [filled], advance)
    try:
        snapshot.save(places[0], filled.cache, step=step, made_by=made_by)
    except OSError as error:
        say(f"WARNING: {places[0]} cannot be written ({error.strerror or error}): not kept")
    return filled.cache


def _empty(job: Job) -> TargetCache:
    """A float32 cache with nothing in it."""
    return caches.create(
        job.size,
        job.model.dim,
        dtype="float32",
        block_rows=job.config.negatives.block_rows,
        place=job.place,
    )


def _spaced(text: str) -> str:
    return " ".join(text.split())
