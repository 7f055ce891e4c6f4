"""BEIR: a folder with a corpus, queries and judgements in files of their own.

    corpus.jsonl       {"_id", "title", "text"}, one target a line; the title may be missing
    queries.jsonl      {"_id", "text"}, the queries of all splits; where {"metadata": {"answer"}} is
                       there, as in HotpotQA, it is the query's answer
    qrels/SPLIT.tsv    query-id, corpus-id, score, separated by tabs: this header, then one
                       judgement a line; SPLIT is train, dev or test, not all need be there

A score above 0 is the grade of a positive; 0: judged and not relevant, a hard negative. The
queries of a split come in the order in which its file names them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corrector_jax.data import rows as row
from corrector_jax.data.dataset import SPLITS
from corrector_jax.data.layouts.judgements import Judgement, join, read_queries
from corrector_jax.data.rows import Query, Rows, Target
from corrector_jax.paths import AnyPath
from corrector_jax.types import UserError, shown

_COLUMNS = ["query-id", "corpus-id", "score"]


class Beir:
    """A `Reader` of this layout."""

    layout = "beir"
    files: tuple[AnyPath, ...]
    splits: tuple[str, ...]

    def __init__(self, path: AnyPath) -> None:
        """Finds the files.

        Raises:
          UserError: one is missing.
        """
        self._corpus = row.needed(path, "corpus.jsonl", "a BEIR folder")
        self._queries = row.needed(path, "queries.jsonl", "a BEIR folder")
        qrels = {split: row.find(path / "qrels", f"{split}.tsv") for split in SPLITS}
        self._qrels = {split: file for split, file in qrels.items() if file is not None}
        if not self._qrels:
            raise UserError(
                f"{path / 'qrels'} holds no judgements: write at least one of train.tsv, dev.tsv "
                "and test.tsv."
            )
        self.splits = tuple(self._qrels)
        self.files = (self._corpus, self._queries, *self._qrels.values())
        self._texts: dict[str, str] | None = None
        self._answers: dict[str, str] = {}

    @staticmethod
    def found_in(path: AnyPath) -> bool:
        """Whether the path looks like this layout."""
        return row.find(path, "queries.jsonl") is not None and (path / "qrels").is_dir()

    def targets(self, rows: Rows) -> Iterator[Target]:
        """The lines of corpus.jsonl."""
        return read_corpus(self._corpus, rows)

    def queries(self, split: str, rows: Rows) -> Iterator[Query]:
        """The queries that qrels/SPLIT.tsv names."""
        if self._texts is None:
            found = rows.parse(rows.records(self._queries), self._query)
            self._texts = read_queries(found, rows)
        path = self._qrels[split]
        lines = rows.lines(path)
        where, header = next(lines, (f"{path}:1", ""))
        if header.split("\t") != _COLUMNS:
            raise UserError(
                f"{where}: the header is {shown(header)}: write {', '.join(_COLUMNS)} in the first "
                "line, separated by tabs."
            )
        for query in join(rows.parse(lines, _judgement), self._texts, self._queries.name, rows):
            answer = self._answers.get(query.id)
            yield query._replace(answers=(answer,)) if answer else query

    def _query(self, record: dict[str, Any], where: str) -> tuple[str, str, str]:
        text = row.query_text(row.field(record, "text", where), where)
        name, more = row.named(record, "_id", where), record.get("metadata")
        # Every data set puts something else there: what is no answer is none of our business.
        answer = more.get("answer") if isinstance(more, dict) else None
        if isinstance(answer, str) and answer.strip():
            self._answers[name] = answer
        return where, name, text


def read_corpus(path: AnyPath, rows: Rows) -> Iterator[Target]:
    """The lines of a corpus.jsonl, which may also stand alone.

    Raises:
      UserError: a row is malformed, and no more may be skipped.
    """
    return rows.parse(rows.records(path), _target)


def _target(record: dict[str, Any], where: str) -> Target:
    name = row.named(record, "_id", where)
    title = row.field({"title": ""} | record, "title", where)
    return Target(where, name, title, row.field(record, "text", where))


def _judgement(line: str, where: str) -> Judgement:
    query, target, score = row.columns(line, _COLUMNS, where)
    return Judgement(where, query, target, row.grade(score, where))
