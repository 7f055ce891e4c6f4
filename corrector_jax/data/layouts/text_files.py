"""A plain directory of text files with a file of queries.

**/*.txt        one target each, in UTF-8; its id is the path below the folder
queries.jsonl   {"query", "positives": [path, ...]}, one a line, and where wanted "negatives",
"answers" and "split": train (where nothing is written), dev or test
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corrector_jax.data import rows as row
from corrector_jax.data.dataset import SPLITS
from corrector_jax.data.rows import Judged, Query, Rows, Target
from corrector_jax.paths import AnyPath
from corrector_jax.types import UserError, shown

_MEANING = "a folder of text files"


class TextFiles:
    """A `Reader` of this layout."""

    layout = "text_files"
    files: tuple[AnyPath, ...]
    splits: tuple[str, ...]

    def __init__(self, path: AnyPath) -> None:
        """Finds the files.

        Raises:
          UserError: there is no text, or no query.
        """
        self._queries = row.needed(path, "queries.jsonl", _MEANING)
        files: list[AnyPath] = sorted(path.rglob("*.txt"), key=str)
        self._texts = {file.as_posix()[len(path.as_posix()) + 1 :]: file for file in files}
        if not self._texts:
            raise UserError(f"{path} holds no .txt file: write one a target.")
        self._held: dict[str, list[Query]] | None = None
        held = self._by_split(Rows(max_bad=10**9))
        self.splits = tuple(split for split in SPLITS if held[split])
        if not self.splits:
            raise UserError(f"{self._queries} holds no good query: write one a line.")
        self.files = (self._queries, *self._texts.values())

    @staticmethod
    def found_in(path: AnyPath) -> bool:
        """Whether the path looks like this layout."""
        if not path.is_dir() or row.find(path, "queries.jsonl") is None:
            return False
        return not (path / "qrels").is_dir() and next(iter(path.rglob("*.txt")), None) is not None

    def targets(self, rows: Rows) -> Iterator[Target]:
        """The text files, in order of their paths."""

        def target(name: str, where: str) -> Target:
            return Target(where, name, "", rows.whole(self._texts[name]))

        return rows.parse(((f"{file}:1", name) for name, file in self._texts.items()), target)

    def queries(self, split: str, rows: Rows) -> Iterator[Query]:
        """The lines of queries.jsonl that are of a split."""
        if self._held is None:
            self._held = self._by_split(rows)
        return iter(self._held[split])

    def _by_split(self, rows: Rows) -> dict[str, list[Query]]:
        held: dict[str, list[Query]] = {split: [] for split in SPLITS}
        for split, query in rows.parse(rows.records(self._queries), _query):
            held[split].append(query)
        return held


def _query(record: dict[str, Any], where: str) -> tuple[str, Query]:
    split = row.field({"split": "train"} | record, "split", where)
    if split not in SPLITS:
        raise UserError(f"{where}: the split is {shown(split)}: write train, dev or test.")
    answers = row.listed(record, "answers", where, missing=True)
    return split, Query(
        where,
        "",
        row.query_text(row.field(record, "query", where), where),
        _judged(row.listed(record, "positives", where), "positives", where, 1),
        _judged(row.listed(record, "negatives", where, missing=True), "negatives", where, 0),
        tuple(row.text(answer, "answers", where) for answer in answers),
    )


def _judged(names: list[Any], key: str, where: str, grade: int) -> tuple[Judged, ...]:
    return tuple(Judged(where, row.text(name, key, where), grade=grade) for name in names)
