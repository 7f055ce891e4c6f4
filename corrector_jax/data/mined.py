"""Negatives that were found before training: a file of them, per training query.

    negatives.trec    `query Q0 target rank score tag` a line, as every TREC run
    negatives.jsonl   {"query_id": ..., "negatives": [ids of targets, the best first]} a line

`--mode=mine` writes the first; both may be .gz or .zst.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from corrector_jax import ranking
from corrector_jax.data import rows as row
from corrector_jax.data.dataset import Split
from corrector_jax.data.rows import Rows
from corrector_jax.paths import AnyPath
from corrector_jax.ranking import Entry, trec_name
from corrector_jax.types import UserError

_RECORDS = (".jsonl", ".json", ".parquet")


def read(
    path: AnyPath, split: Split, target_ids: Sequence[str], max_bad_rows: int = 0
) -> tuple[list[np.ndarray], Rows]:
    """Reads the mined negatives of a split.

    Known positives are left out in silence: a file ranks them like all others.

    Args:
      path: the file; its name says its format.
      split: the n queries.
      target_ids: N names, by row.
      max_bad_rows: how many bad rows are skipped; one more is an error.

    Returns:
      Per query the rows of its negatives, the best first, all different: n arrays [any] int32,
      empty for a query that is not in the file. And what was read and refused.

    Raises:
      UserError: the file cannot be read, a row is malformed or names a query or a target that is
        not there; the message names file and line.
    """
    rows = Rows(max_bad_rows)
    if row.plain_name(path).endswith(_RECORDS):
        found = ranking.gather(_entries(path, rows), split, target_ids, rows)
    else:
        found = ranking.read_trec(path, split, target_ids, rows)
    of_query = zip(found.rows, split.positives, strict=True)
    return [ids[(ids >= 0) & ~np.isin(ids, known)] for ids, known in of_query], rows


def _entries(path: AnyPath, rows: Rows) -> Iterator[Entry]:
    for where, query, targets in rows.parse(rows.records(path), _record):
        for rank, target in enumerate(targets, start=1):
            yield Entry(where, query, target, rank, 0.0)


def _record(record: dict[str, Any], where: str) -> tuple[str, str, list[str]]:
    if "query_id" not in record:
        raise UserError(f'{where}: the key "query_id" is missing: add it.')
    targets = row.listed(record, "negatives", where)
    names = [_name(target, "negatives", where) for target in targets]
    return where, _name(record["query_id"], "query_id", where), names


def _name(value: Any, key: str, where: str) -> str:
    written = str(value) if isinstance(value, int) else row.text(value, key, where)
    if not written:
        raise UserError(f'{where}: an id under "{key}" is empty: write one.')
    return trec_name(written)
