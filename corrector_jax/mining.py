"""`--mode=mine`: negatives of the train split, found by ranking all targets once."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from corrector_jax import paths
from corrector_jax.data.dataset import RetrievalData
from corrector_jax.data.rows import Rows
from corrector_jax.embed import go_over
from corrector_jax.evaluate import Search, trained
from corrector_jax.job import Job, load_data, make_job, require_train
from corrector_jax.paths import AnyPath
from corrector_jax.ranking import Ranking, bm25, read_trec, write_trec
from corrector_jax.types import Array, PyTree, UserError
from corrector_jax.writer import progress, say

NAME = "negatives.trec"

GROUP, TOGETHER = 8192, 16
"""Queries that meet so many blocks of targets at once: bounds what their scores take on a device.

One block after the other takes twice as long on a CPU: every merge sorts the top-k again.
"""


def mine(config: ConfigDict, workdir: AnyPath, *, step: int | None = None) -> AnyPath:
    """Ranks the targets for every training query, and writes which of them are negatives.

    Args:
      config: validated.
      workdir: where the file goes, unless `mine.output` names another place.
      step: which checkpoint, where a run ranks; None = the newest.

    Returns:
      The file.

    Raises:
      UserError: it is there already, there is nothing to rank by, or nothing is left of it.
    """
    wanted = config.mine
    output = paths.make(wanted.output) if wanted.output else workdir / NAME
    if output.exists():
        raise UserError(
            f"{output} is there already: remove it, or write another file as --config.mine.output"
        )
    if output.suffix in (".gz", ".zst", ".json", ".jsonl", ".parquet"):
        raise UserError(
            f"config.mine.output is {wanted.output!r} but a TREC file is written, as it is: write "
            "a name that ends with .trec"
        )
    data = load_data(config)
    require_train(data)
    split = data.splits["train"]
    found, tag = _rank(config, data, step)
    kept = choose(
        found,
        split.positives,
        skip=wanted.skip,
        keep=wanted.keep,
        max_relative_score=wanted.max_relative_score,
        margin=wanted.margin,
    )
    counts = (kept.rows >= 0).sum(axis=1)
    if not counts.any():
        raise UserError(
            f"config.mine.source={wanted.source} leaves no negative for any training query: raise "
            "config.mine.depth, lower config.mine.skip, or drop config.mine.max_relative_score and "
            "config.mine.margin"
        )
    write_trec(output, split, kept, data.target_ids, tag)
    say(
        f"{counts.sum():,} negatives for {(counts > 0).sum():,} of {len(counts):,} training "
        f"queries: {output}"
    )
    return output


def choose(
    found: Ranking,
    positives: Sequence[np.ndarray],
    *,
    skip: int,
    keep: int,
    max_relative_score: float = 0.0,
    margin: float = 0.0,
) -> Ranking:
    """Those targets of a ranking that are taken for negatives.

    Known positives never are. Then the best `skip` are left out, then whatever scores too close to
    the positive, and of the rest the best `keep` stay. The positive is the best known one; where
    the ranking holds none of them, all it holds scores above, and a query keeps nothing.

    Args:
      found: [Q, k].
      positives: Q arrays, the rows of each query's known positives.
      skip: how many of the best are left out.
      keep: how many are kept.
      max_relative_score: a share up to 1 of the positive's score s+, as 0.95: the limit is
        s+ - (1 - share) |s+|; 0 = there is none.
      margin: the limit is s+ - margin; 0 = there is none.

    Returns:
      [Q, keep], the best first.
    """
    rows = np.full((len(found.rows), keep), -1, np.int32)
    scores = np.zeros(rows.shape, np.float32)
    for i, (row, score) in enumerate(zip(found.rows, found.scores, strict=True)):
        known = np.isin(row, positives[i])
        left = np.flatnonzero((row >= 0) & ~known)[skip:]
        if max_relative_score or margin:
            best = score[known].max(initial=-np.inf)
            limits = [best - margin]
            if max_relative_score and known.any():
                limits.append(best - (1 - max_relative_score) * abs(best))
            left = left[score[left] <= min(limits)]
        left = left[:keep]
        rows[i, : len(left)] = row[left]
        scores[i, : len(left)] = score[left]
    return Ranking(rows, scores)


def _rank(config: ConfigDict, data: RetrievalData, step: int | None) -> tuple[Ranking, str]:
    """The best targets of every training query, and the name of what ranked them."""
    source, depth = config.mine.source, min(config.mine.depth, len(data.target_ids))
    split = data.splits["train"]
    if source == "bm25":
        say(f"indexing {len(data.target_ids):,} targets by their words")
        with progress("ranking by BM25", len(split.texts), "queries") as advance:
            return bm25(data.target_texts, split.texts, depth, advance), source
    if source == "encoder":
        untrained = config.copy_and_resolve_references()
        # Only encoders are wanted: a strategy that asks for no mined negatives.
        untrained.strategy, untrained.negatives.mined = "in_batch", 0
        job = make_job(untrained)
        return _search(job, job.init_state().params, depth), source
    path = paths.make(source)
    if path.is_dir():
        job, state, position = trained(path, step=step)
        if _named(job.data) != _named(data):
            raise UserError(
                f"config.mine.source={source} was trained on other targets or queries than "
                "config.data names: give the settings of data that it has in config.json"
            )
        return _search(job, state.params, depth), f"{path.name}-step-{position.step}"
    if path.is_file():
        found = read_trec(path, split, data.target_ids, Rows(config.data.max_bad_rows))
        return Ranking(found.rows[:, :depth], found.scores[:, :depth]), path.stem
    raise UserError(
        f"config.mine.source is {source!r}: write bm25, encoder, the folder of a run, or a TREC "
        "file of training queries"
    )


class _Together:
    """Hands on several blocks of targets as one."""

    def __init__(self, searches: Sequence[Search]) -> None:
        self._searches = searches
        self._held: list[tuple[Array, Array]] = []

    def add(self, ids: Array, fresh: Array) -> None:
        """Takes one block: ids [b] int32, embeddings [b, D] float32."""
        self._held.append((ids, fresh))
        if len(self._held) == TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Hands on what is held."""
        if self._held:
            ids, fresh = (jnp.concatenate(parts) for parts in zip(*self._held, strict=True))
            self._held.clear()
            for search in self._searches:
                search.add(ids, fresh)


def _search(job: Job, params: PyTree, depth: int) -> Ranking:
    """Exact top-k of the training queries, in one pass over the corpus."""
    tokens = job.query_tokens["train"]
    searches = []
    for start in range(0, len(tokens), GROUP):
        some = tokens[start : start + GROUP]
        queries = job.embedder.queries(params, some)
        searches.append(Search(queries, len(some), k=depth, place=job.place))
    together = _Together(searches)
    with progress("ranking by the encoder", job.size, "targets") as advance:
        go_over(job.embedder, params, np.arange(job.size), [together], advance)
    together.flush()
    rankings = [search.ranking() for search in searches]
    return Ranking(*(np.concatenate(parts) for parts in zip(*rankings, strict=True)))


def _named(data: RetrievalData) -> tuple[str, list[str]]:
    return data.fingerprint(), list(data.splits["train"].query_ids)
