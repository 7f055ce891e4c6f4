"""What a retriever found: retrieval measures, TREC run files, BM25, and paired intervals.

A `Ranking` holds rows of the targets, best first. Everything here is NumPy on the host; ids appear
only where a file or a measuring package wants names instead of rows.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from corrector_jax import paths
from corrector_jax.data.rows import Rows
from corrector_jax.paths import AnyPath
from corrector_jax.types import UserError, shown

METRICS = ("recall@1", "recall@20", "recall@100", "mrr@10", "ndcg@10")
_MOST = float(np.finfo(np.float32).max)
# Characters that would break a line of a TREC file, or that UTF-8 cannot hold.
_UNSAFE = re.compile(r"[\s\x00-\x1f\x7f\ud800-\udfff]")


class Judged(Protocol):
    """The part of a data split that measuring needs."""

    @property
    def query_ids(self) -> Sequence[str]:
        """Q names, all different."""

    @property
    def positives(self) -> Sequence[np.ndarray]:
        """Q arrays [n] of target rows, the known positives of each query."""

    @property
    def grades(self) -> Sequence[np.ndarray]:
        """Q arrays [n] of whole numbers, how relevant each known positive is."""


class Ranking(NamedTuple):
    """The best targets of every query.

    Attributes:
      rows: [Q, k] int32, target rows, best first; -1 pads the end where fewer than k were found.
      scores: [Q, k] float32, never rising along a row; 0 where padded.
    """

    rows: np.ndarray
    scores: np.ndarray


class Entry(NamedTuple):
    """A target that a file names for a query.

    Attributes:
      where: 'file:line'.
      query: its name, as `trec_name` writes it.
      target: likewise.
      rank: its place among the query's targets; the lowest is the best.
      score: what it was ranked by.
    """

    where: str
    query: str
    target: str
    rank: int
    score: float


class Measured(NamedTuple):
    """Measures of some queries by name; those of `METRICS` are between 0 and 1.

    Attributes:
      metrics: means over the queries.
      per_query: [Q] float64 each, in the order of the split.
    """

    metrics: dict[str, float]
    per_query: dict[str, np.ndarray]

    def join(self, more: Measured) -> Measured:
        """Both, of the same queries [Q]."""
        return Measured(self.metrics | more.metrics, self.per_query | more.per_query)


class Interval(NamedTuple):
    """A difference of means and the interval that holds it."""

    difference: float
    low: float
    high: float


def measure(split: Judged, ranking: Ranking, target_ids: Sequence[str]) -> Measured:
    """Measures a ranking with ir_measures: R@1, R@20, R@100, RR@10 and nDCG@10.

    The order of `ranking.rows` is what is measured. Evaluators sort by score and break ties by
    name, so the score they are given here is minus the rank; equal scores cannot reorder anything.

    Args:
      split: Q queries with at least one known positive each.
      ranking: [Q, k] rows; a row may occur once per query. k < 100 makes recall@100 a recall@k.
      target_ids: N names, by row.

    Raises:
      ValueError: the split and the ranking disagree in Q, a query has no known positive, or a query
        was given the same target twice.
    """
    import ir_measures
    from ir_measures import RR, R, nDCG

    count = len(split.query_ids)
    if len(ranking.rows) != count:
        raise ValueError(f"The ranking holds {len(ranking.rows)} queries, the split {count}.")
    name = _names(target_ids, [*split.positives, ranking.rows])
    qrels, run = {}, {}
    for i, row in enumerate(ranking.rows):
        if not len(split.positives[i]):
            raise ValueError(f"Query {split.query_ids[i]!r} has no known positive to look for.")
        found = row[row >= 0].tolist()
        # Queries go by their number: nothing they are called can disturb the evaluator.
        run[str(i)] = {name[target]: -rank for rank, target in enumerate(found)}
        if len(run[str(i)]) < len(found):
            raise ValueError(f"Query {split.query_ids[i]!r} was given the same target twice.")
        judged = zip(split.positives[i].tolist(), split.grades[i].tolist(), strict=True)
        qrels[str(i)] = {name[target]: int(grade) for target, grade in judged}

    measures = dict(zip((R @ 1, R @ 20, R @ 100, RR @ 10, nDCG @ 10), METRICS, strict=True))
    per_query = {metric: np.zeros(count) for metric in METRICS}
    for result in ir_measures.iter_calc(list(measures), qrels, run):
        per_query[measures[result.measure]][int(result.query_id)] = result.value
    means = {metric: float(values.mean()) for metric, values in per_query.items()}
    return Measured(means, per_query)


def write_trec(
    path: AnyPath, split: Judged, ranking: Ranking, target_ids: Sequence[str], tag: str
) -> None:
    """Writes a TREC run file, whole or not at all: `query Q0 target rank score tag` a line.

    Ranks start at 1; scores are the true ones, with the nine digits that give a float32 back. A
    blank or control character in a name is written as `%` and its code (`a b` becomes `a%20b`). A
    query for which nothing was found has no line. (Tools that sort by score may order ties anew.)

    Args:
      path: the file; folders that are missing on the way to it are made.
      split: Q queries.
      ranking: [Q, k].
      target_ids: N names, by row.
      tag: the name of the run.

    Raises:
      UserError: a name is empty, or two names are written the same way.
    """
    name = _names(target_ids, [ranking.rows])
    query_name = _names(split.query_ids)
    tag = trec_name(tag)
    with paths.writing(path) as file:
        for i, (rows, scores) in enumerate(zip(ranking.rows, ranking.scores, strict=True)):
            found = rows >= 0
            pairs = zip(rows[found].tolist(), scores[found].tolist(), strict=True)
            file.writelines(
                f"{query_name[i]} Q0 {name[row]} {rank} {score:.9g} {tag}\n".encode()
                for rank, (row, score) in enumerate(pairs, start=1)
            )


def read_trec(
    path: AnyPath, split: Judged, target_ids: Sequence[str], rows: Rows | None = None
) -> Ranking:
    """Reads a TREC run file back, ordered by its ranks; .gz and .zst are unpacked.

    Args:
      path: the file.
      split: Q queries; those the file leaves out get no target.
      target_ids: N names, by row.
      rows: counts the lines, and says how many bad ones are skipped; None = no bad one is.

    Returns:
      [Q, k], k the most targets any query has in the file.

    Raises:
      UserError: a line is not a TREC line, or names a query or a target that is not there.
    """
    rows = rows or Rows()
    return gather(rows.parse(rows.lines(path), _entry), split, target_ids, rows)


def gather(
    entries: Iterable[Entry], split: Judged, target_ids: Sequence[str], rows: Rows
) -> Ranking:
    """What a file names, as rows of targets.

    Args:
      entries: in any order; of a target that a query has twice, the better rank counts.
      split: Q queries; those without an entry get no target.
      target_ids: N names, by row.
      rows: refuses entries that name a query or a target that is not there.

    Returns:
      [Q, k], k the most targets any query has.

    Raises:
      UserError: more such entries than `rows` allows.
    """
    query_of = {name: i for i, name in _names(split.query_ids).items()}
    # Only names that occur are held: a corpus has many more.
    numbers: dict[str, int] = {}
    first: list[str] = []
    queries, named, ranks, scores = array("i"), array("i"), array("q"), array("f")
    for where, query, target, rank, score in entries:
        if query not in query_of:
            error = UserError(f"{where} names query {shown(query)}, which this split lacks.")
            rows.refuse(where, error)
            continue
        number = numbers.setdefault(target, len(numbers))
        if number == len(first):
            first.append(where)
        queries.append(query_of[query])
        named.append(number)
        ranks.append(rank)
        scores.append(score)
    row_of = np.full(len(numbers), -1, np.int32)
    for row, identifier in enumerate(target_ids):
        name = trec_name(identifier)
        if name in numbers:
            if (before := row_of[numbers[name]]) >= 0:
                raise _alike(target_ids[before], identifier, name)
            row_of[numbers[name]] = row
    for name, number in numbers.items():
        if row_of[number] < 0:
            where = first[number]
            rows.refuse(
                where,
                UserError(
                    f"{where} names target {shown(name)}, which is not in the corpus: correct the "
                    "id, or drop the row."
                ),
            )
    return _ranking(
        len(split.query_ids),
        *(np.asarray(column) for column in (queries, ranks, scores)),
        targets=row_of[np.asarray(named)],
    )


def _ranking(
    count: int, queries: np.ndarray, ranks: np.ndarray, scores: np.ndarray, *, targets: np.ndarray
) -> Ranking:
    """[Q, k] of parallel columns [n]; a target of -1 is left out, and so is a second copy."""
    order = np.lexsort((ranks, queries))
    order = order[targets[order] >= 0]
    pairs = queries[order].astype(np.int64) << 32 | targets[order]
    order = order[np.sort(np.unique(pairs, return_index=True)[1])]
    lengths = np.bincount(queries[order], minlength=count)
    width = int(lengths.max(initial=0))
    place = np.arange(len(order)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    found = np.full((count, width), -1, np.int32)
    found[queries[order], place] = targets[order]
    given = np.zeros((count, width), np.float32)
    given[queries[order], place] = scores[order]
    return Ranking(found, given)


def _entry(line: str, where: str) -> Entry:
    """A line of a TREC file."""
    try:
        query, _, target, rank, score, _ = line.split()
        entry = Entry(where, query, target, int(rank), float(score))
        if not abs(entry.score) <= _MOST or abs(entry.rank) >= 2**63:
            raise ValueError
    except ValueError:
        raise UserError(
            f"{where} is not a TREC line, write `query Q0 target rank score tag`."
        ) from None
    return entry


def bm25(
    target_texts: Sequence[str],
    query_texts: Sequence[str],
    k: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Ranking:
    """Ranks by BM25 as Lucene scores it (package bm25s, k1 = 1.5, b = 0.75).

    Words are runs of two or more letters, digits or underscores, lower-cased, without English stop
    words, and stemmed (worth up to two points of recall@20 on English questions). Code is read the
    same way: an identifier is one word, so `read_file` is not found by "file".

    Args:
      target_texts: N texts.
      query_texts: Q texts.
      k: how many targets to keep.
      advance: told how many more queries are done.

    Returns:
      [Q, min(k, N)]; targets that share no word with the query are left out, and the lower row wins
      a tie.
    """
    with jax.transfer_guard("allow"):  # on import it tries jax.lax.top_k on a NumPy array
        import bm25s
    import Stemmer

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index it builds
    k = min(k, len(target_texts))
    rows = np.full((len(query_texts), k), -1, np.int32)
    scores = np.zeros((len(query_texts), k), np.float32)
    words, queries = (
        bm25s.tokenize(
            list(texts),
            stopwords="english",
            stemmer=Stemmer.Stemmer("english"),
            return_ids=False,
            show_progress=False,
        )
        for texts in (target_texts, query_texts)
    )
    if not any(words):  # an index without a word divides by its mean length, 0
        return Ranking(rows, scores)
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(words, show_progress=False)
    for i, query in enumerate(queries):
        advance(1)
        if not query:
            continue
        # Its own top-k partitions all N scores, nearly all of them 0, which is 50 times slower.
        score = index.get_scores(query)
        found = np.flatnonzero(score)
        if len(found) > k:
            found = found[score[found] >= np.partition(score[found], -k)[-k]]
        found = found[np.argsort(-score[found], kind="stable")][:k]
        rows[i, : len(found)] = found
        scores[i, : len(found)] = score[found]
    return Ranking(rows, scores)


def paired_bootstrap(
    before: np.ndarray,
    after: np.ndarray,
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of mean(after) - mean(before), over the same queries drawn together.

    Args:
      before: [Q] a measure of every query.
      after: [Q] the same measure of the same queries, in the same order.
      samples: how many times Q queries are drawn with replacement.
      seed: of the draws; the interval is a function of the arguments alone.
      level: share of the samples inside the interval.

    Raises:
      ValueError: the two differ in shape, or hold no query.
    """
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise ValueError(
            f"Paired measures need one value per query on both sides, not {before.shape} and "
            f"{after.shape}."
        )
    gain = after.astype(np.float64) - before
    rng = np.random.default_rng(seed)
    at_once = max(1, 2**21 // gain.size)  # 16 MB of indices, however many queries there are
    means = np.concatenate(
        [
            gain[rng.integers(gain.size, size=(min(at_once, samples - start), gain.size))].mean(1)
            for start in range(0, samples, at_once)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(gain.mean()), float(low), float(high))


def trec_name(text: str) -> str:
    """A name as one field of a TREC line.

    Raises:
      UserError: it is empty.
    """
    if not text:
        raise UserError("An empty id cannot stand in a TREC file, give every query and target one.")
    return _UNSAFE.sub(lambda match: f"%{ord(match.group()):02X}", text)


def _names(ids: Sequence[str], used: Iterable[np.ndarray] | None = None) -> dict[int, str]:
    """{row: name as written in a TREC file} of all ids, or of the rows in `used` (-1 is no row)."""
    rows: Iterable[int] = range(len(ids))
    if used is not None:  # a ranking touches few of many million targets
        flat = np.unique(np.concatenate([np.ravel(array) for array in used]))
        rows = flat[flat >= 0].tolist()
    names = {row: trec_name(ids[row]) for row in rows}
    seen: dict[str, int] = {}
    for row, name in names.items():
        if seen.setdefault(name, row) != row:
            raise _alike(ids[seen[name]], ids[row], name)
    return names


def _alike(one: str, other: str, name: str) -> UserError:
    return UserError(
        f"The ids {shown(one)} and {shown(other)} would both be written {shown(name)} in a TREC "
        "file, rename one of them."
    )
