"""MS MARCO: tab-separated files without headers.

    collection.tsv     id, text
    queries.NAME.tsv   id, text
    qrels.NAME.tsv     query id, 0, target id, score; NAME is train, dev, dev.small or test

The queries of a split come in the order in which its judgements name them; queries that nobody
judged are passed over. A score of 0 makes a hard negative.
"""

from __future__ import annotations

from collections.abc import Iterator

from corrector_jax.data import rows as row
from corrector_jax.data.layouts.judgements import Judgement, join, read_queries
from corrector_jax.data.rows import Query, Rows, Target
from corrector_jax.paths import AnyPath
from corrector_jax.types import UserError

_QRELS = ["query id", "0", "target id", "score"]


class MsMarco:
    """A `Reader` of this layout."""

    layout = "msmarco"
    files: tuple[AnyPath, ...]
    splits: tuple[str, ...]

    def __init__(self, path: AnyPath) -> None:
        """Finds the files.

        Raises:
          UserError: one is missing.
        """
        self._collection = row.needed(path, "collection.tsv", "an MS MARCO folder")
        self._qrels = row.by_split(_qrels(path))
        if not self._qrels:
            raise UserError(
                f"{path} holds no judgements: write at least one of qrels.train.tsv, "
                "qrels.dev.tsv and qrels.test.tsv."
            )
        row.say_passed_over([file for file in _qrels(path) if row.split_of(file) is None])
        self._queries = {}
        for split, (qrels,) in self._qrels.items():
            name = row.plain_name(qrels).replace("qrels.", "queries.", 1)
            self._queries[split] = row.needed(path, name, "an MS MARCO folder")
        self.splits = tuple(self._qrels)
        judged = [file for files in self._qrels.values() for file in files]
        self.files = (self._collection, *self._queries.values(), *judged)

    @staticmethod
    def found_in(path: AnyPath) -> bool:
        """Whether the path looks like this layout."""
        return path.is_dir() and row.find(path, "collection.tsv") is not None and bool(_qrels(path))

    def targets(self, rows: Rows) -> Iterator[Target]:
        """The lines of collection.tsv."""

        def target(line: str, where: str) -> Target:
            name, text = row.columns(line, ["id", "text"], where)
            return Target(where, row.identifier(name, "id", where), "", text)

        return rows.parse(rows.lines(self._collection), target)

    def queries(self, split: str, rows: Rows) -> Iterator[Query]:
        """The queries that a split's judgements name."""

        def query(line: str, where: str) -> tuple[str, str, str]:
            name, text = row.columns(line, ["id", "text"], where)
            return where, row.identifier(name, "id", where), row.query_text(text, where)

        file, (qrels,) = self._queries[split], self._qrels[split]
        texts = read_queries(rows.parse(rows.lines(file), query), rows)
        return join(rows.parse(rows.lines(qrels), _judgement), texts, file.name, rows)


def _qrels(path: AnyPath) -> list[AnyPath]:
    return [file for file in row.listing(path, ".tsv") if row.plain_name(file).startswith("qrels.")]


def _judgement(line: str, where: str) -> Judgement:
    # Some of the published files are separated by blanks.
    query, _, target, score = row.columns("\t".join(line.split()), _QRELS, where)
    return Judgement(where, query, target, row.grade(score, where))
