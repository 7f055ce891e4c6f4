"""Queries and judgements that stand in files of their own, joined by the query's id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from corrector_jax.data.rows import Judged, Query, Rows
from corrector_jax.types import UserError, shown


class Judgement(NamedTuple):
    """A line of a file of judgements.

    Attributes:
      where: 'file:line'.
      query: the query's id.
      target: the target's id.
      grade: 0 = judged and not relevant.
    """

    where: str
    query: str
    target: str
    grade: int


def read_queries(found: Iterable[tuple[str, str, str]], rows: Rows) -> dict[str, str]:
    """Query id -> text, of ('file:line', id, text); an id that occurred before is refused."""
    texts: dict[str, str] = {}
    for where, name, text in found:
        if name in texts:
            error = f"{where}: the id {shown(name)} occurred before: write each id once."
            rows.refuse(where, UserError(error), "duplicate id")
        else:
            texts[name] = text
    return texts


def join(
    judgements: Iterable[Judgement], texts: dict[str, str], file: str, rows: Rows
) -> Iterator[Query]:
    """Groups judgements by query.

    Args:
      judgements: of one split.
      texts: query id -> text.
      file: the file of the queries, for messages.
      rows: refuses a judgement of an unknown query, and one that contradicts another.

    Yields:
      The queries, in the order in which the judgements first name them.
    """
    grouped: dict[str, dict[str, Judgement]] = {}
    for line in judgements:
        error = None
        held = grouped.get(line.query, {}).get(line.target, line)
        if line.query not in texts:
            error = f"query {shown(line.query)} is not in {file}: add it there."
        elif held.grade != line.grade:
            error = (
                f"{shown(line.query)} and {shown(line.target)} had another score above: keep one "
                "of the two."
            )
        if error:
            rows.refuse(line.where, UserError(f"{line.where}: {error}"))
        else:
            grouped.setdefault(line.query, {})[line.target] = held
    for query, of_query in grouped.items():
        judged = [Judged(line.where, line.target, grade=line.grade) for line in of_query.values()]
        yield Query(
            where=judged[0].where,
            id=query,
            text=texts[query],
            positives=tuple(one for one in judged if one.grade > 0),
            negatives=tuple(one for one in judged if one.grade == 0),
        )
