"""The layouts whose rows hold a query together with its passages.

    dpr             {"question", "answers", "positive_ctxs", "hard_negative_ctxs",
                    "negative_ctxs"}, a passage being {"title", "text", "passage_id"}
    tevatron        {"query_id", "query", "positive_passages", "negative_passages"}, a passage
                    being {"docid", "title", "text"}
    flag_embedding  {"query", "pos": [text, ...], "neg": [text, ...]}
    fid             {"question", "answers" or "target", "ctxs"}, a passage being {"id", "title",
                    "text", "has_answer"}; positive are those that hold an answer
    columns         sentence-transformers: "anchor", "positive", "negative", "negative_2", ...; or
                    "sentence1", "sentence2", "label" (1 = positive, 0 = hard negative)

One file is the train split. A folder has a file for each split, whose name speaks of it
(`nq-dev.json`, `test.jsonl.gz`, `train-00000-of-00002.parquet`), and may have a corpus: a file
whose name says corpus, collection, passages or psgs, as .jsonl {"id", "title", "text"} or as DPR's
.tsv (id, text, title). Files are .jsonl, .json (one object a line, or one array), .parquet, or .csv
with a header where no key holds a list; as they are, .gz or .zst.

A passage is known by its id, where it has one, and else by its title and text.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from corrector_jax.data import rows as row
from corrector_jax.data.rows import Judged, Query, Rows, Target
from corrector_jax.paths import AnyPath
from corrector_jax.types import UserError, brief, shown

_LOOKED_AT = 100
"""Rows that may be bad before a file is of no layout."""

_CORPUS_FILES = (".jsonl", ".json", ".parquet", ".tsv")
_FILES = (".jsonl", ".json", ".parquet", ".csv")
_ENDS = "one of .jsonl, .json, .parquet and .csv, as it is, .gz or .zst"
_CORPUS = re.compile(r"corpus|collection|passages|psgs")
_ID_KEYS = ("_id", "id", "docid", "passage_id", "psg_id")
_TEXT_KEYS = ("text", "contents")

_QUERY_COLUMNS = ("anchor", "query", "question", "sentence1")
_POSITIVE_COLUMNS = ("positive", "answer", "passage", "sentence2")
_LABEL_COLUMNS = ("label", "score")

Record = dict[str, Any]


class Inline:
    """A `Reader` of one of these layouts."""

    layout: str
    files: tuple[AnyPath, ...]
    splits: tuple[str, ...]
    parse: Callable[[Record, str], Query]
    """A row's content and its place -> the query; static."""

    def __init__(self, path: AnyPath) -> None:
        """Finds the files.

        Raises:
          UserError: none is there, or two are of one split.
        """
        self._corpus, self._queries, left = _files(path)
        if not self._queries:
            if path.is_file():
                raise UserError(f"{path} is not read: write it as {_ENDS}.")
            raise UserError(
                f"{path} holds no queries: write train.jsonl, and dev.jsonl or test.jsonl to "
                f"evaluate on, or each as {_ENDS}."
            )
        row.say_passed_over(left)
        self.splits = tuple(self._queries)
        of_splits = [file for files in self._queries.values() for file in files]
        self.files = (*([self._corpus] if self._corpus else []), *of_splits)

    @classmethod
    def found_in(cls, path: AnyPath) -> bool:
        """Whether the path looks like this layout: its first row has the keys."""
        if not path.is_file() and (path / "qrels").is_dir():
            return False  # corpus and queries are in files of their own
        for files in _files(path)[1].values():
            return cls.has_keys(set(_first(files[0], Rows(max_bad=_LOOKED_AT))))
        return False

    @staticmethod
    def has_keys(keys: set[str]) -> bool:
        """Whether a row with these keys is one of this layout."""
        raise NotImplementedError

    def targets(self, rows: Rows) -> Iterator[Target]:
        """The corpus that stands beside the queries, if there is one."""
        if self._corpus is None:
            return iter(())
        if row.plain_name(self._corpus).endswith(".tsv"):
            return tsv_corpus(self._corpus, rows)
        return rows.parse(rows.records(self._corpus), _json_target)

    def queries(self, split: str, rows: Rows) -> Iterator[Query]:
        """The rows of a split's files."""
        for path in self._queries[split]:
            yield from rows.parse(rows.records(path), type(self).parse)


class Dpr(Inline):
    """DPR's training files."""

    layout = "dpr"

    @staticmethod
    def has_keys(keys: set[str]) -> bool:
        """Whether a row with these keys is one of this layout."""
        return {"question", "positive_ctxs"} <= keys

    @staticmethod
    def parse(record: Record, where: str) -> Query:
        """One question."""
        hard = row.listed(record, "hard_negative_ctxs", where, missing=True)
        easy = row.listed(record, "negative_ctxs", where, missing=True)
        return Query(
            where,
            "",
            row.query_text(row.field(record, "question", where), where),
            _passages(row.listed(record, "positive_ctxs", where), where),
            _passages([*hard, *easy], where, grade=0),
            _texts(row.listed(record, "answers", where, missing=True), "answers", where),
        )


class Tevatron(Inline):
    """Tevatron's training files."""

    layout = "tevatron"

    @staticmethod
    def has_keys(keys: set[str]) -> bool:
        """Whether a row with these keys is one of this layout."""
        return {"query", "positive_passages"} <= keys

    @staticmethod
    def parse(record: Record, where: str) -> Query:
        """One query."""
        return Query(
            where,
            row.named(record, "query_id", where),
            row.query_text(row.field(record, "query", where), where),
            _passages(row.listed(record, "positive_passages", where), where),
            _passages(row.listed(record, "negative_passages", where, missing=True), where, grade=0),
            _texts(row.listed(record, "answers", where, missing=True), "answers", where),
        )


class FlagEmbedding(Inline):
    """FlagEmbedding's training files."""

    layout = "flag_embedding"

    @staticmethod
    def has_keys(keys: set[str]) -> bool:
        """Whether a row with these keys is one of this layout."""
        return {"query", "pos"} <= keys

    @staticmethod
    def parse(record: Record, where: str) -> Query:
        """One query."""
        positives = _texts(row.listed(record, "pos", where), "pos", where)
        negatives = _texts(row.listed(record, "neg", where, missing=True), "neg", where)
        text = row.query_text(row.field(record, "query", where), where)
        return Query(where, "", text, _plain(positives, where), _plain(negatives, where, grade=0))


class Fid(Inline):
    """Question answering files of FiD and Atlas, with the passages retrieved for each question."""

    layout = "fid"

    @staticmethod
    def has_keys(keys: set[str]) -> bool:
        """Whether a row with these keys is one of this layout."""
        return {"question", "ctxs"} <= keys and bool({"answers", "target"} & keys)

    @staticmethod
    def parse(record: Record, where: str) -> Query:
        """One question: a passage is positive if it says so, or else if it holds an answer."""
        answers = _texts(row.listed(record, "answers", where, missing=True), "answers", where)
        if not answers:
            answers = (row.field(record, "target", where),)
        words = [found for found in map(_words, answers) if found.strip()]
        positives: list[Target] = []
        negatives: list[Target] = []
        for passage in row.listed(record, "ctxs", where):
            target = _passage(passage, where)
            holds = passage.get("has_answer")
            if holds is None:
                text = _words(target.text)
                holds = any(answer in text for answer in words)
            elif not isinstance(holds, bool):
                raise UserError(f'{where}: "has_answer" is {shown(holds)}: write true or false.')
            (positives if holds else negatives).append(target)
        return Query(
            where,
            "",
            row.query_text(row.field(record, "question", where), where),
            _judged(positives, grade=1),
            _judged(negatives, grade=0),
            answers,
        )


class Columns(Inline):
    """The columns sentence-transformers trains on."""

    layout = "columns"

    @staticmethod
    def has_keys(keys: set[str]) -> bool:
        """Whether a row with these keys is one of this layout."""
        return _column(keys, _QUERY_COLUMNS) is not None and (
            _column(keys, _POSITIVE_COLUMNS) is not None
        )

    @staticmethod
    def parse(record: Record, where: str) -> Query:
        """One row: a pair, a triplet, or a pair with a label."""
        query, positive = _column(record, _QUERY_COLUMNS), _column(record, _POSITIVE_COLUMNS)
        if query is None or positive is None:
            raise UserError(
                f"{where}: the columns are {brief(', '.join(record))}: name the query's anchor, "
                "the positive's positive, and hard negatives negative, negative_2 and so on."
            )
        label = _column(record, _LABEL_COLUMNS)
        if label is not None and record[label] in ("0", "1", "0.0", "1.0"):  # as a .csv has them
            record = record | {label: float(record[label])}
        if label is not None and record[label] not in (0, 1):
            raise UserError(
                f"{where}: the {label} is {shown(record[label])}: write 1 for a positive, 0 for a "
                "hard negative."
            )
        names = [name for name in record if re.fullmatch(r"negative(_?\d+)?", name)]
        names = [name for name in names if record[name] is not None]  # rows may have fewer
        first = _plain([row.field(record, positive, where)], where)
        others = _plain([row.field(record, name, where) for name in names], where, grade=0)
        if label is not None and not record[label]:
            others, first = (first[0]._replace(grade=0), *others), ()
        text = row.query_text(row.field(record, query, where), where)
        return Query(where, "", text, first, others)


ALL = (Dpr, Tevatron, FlagEmbedding, Fid, Columns)


def seen(path: AnyPath) -> str:
    """What files that fit no layout look like, for a message; '' where there are none."""
    for files in _files(path)[1].values():
        rows = Rows(max_bad=_LOOKED_AT)
        if keys := ", ".join(_first(files[0], rows)):
            return f" (the rows of {files[0].name} have {brief(keys)})"
        first = next((one.message for one in rows.refused.values()), "")
        return f" ({first.rstrip('.')})" if first else ""
    return f" (it is not {_ENDS})" if path.is_file() else ""


def _files(
    path: AnyPath,
) -> tuple[AnyPath | None, dict[str, tuple[AnyPath, ...]], list[AnyPath]]:
    """The corpus, or None, the files of every split, and those that name none."""
    if path.is_file():
        known = row.plain_name(path).endswith(_FILES)
        return None, {row.split_of(path) or "train": (path,)} if known else {}, []
    corpora = [p for p in row.listing(path, *_CORPUS_FILES) if _CORPUS.search(row.plain_name(p))]
    if len(corpora) > 1:
        raise UserError(
            f"{corpora[0]} and {corpora[1].name} both look like the corpus: remove one of them."
        )
    others = [p for p in row.listing(path, *_FILES) if p not in corpora]
    # DPR's files have lists of questions beside them, nq-dev.qa.csv, which are no training data.
    others = [p for p in others if not row.plain_name(p).endswith(".csv")] or others
    splits = row.by_split(others)
    if not splits and len(others) == 1:
        splits = {"train": (others[0],)}
    taken = {p for of_split in splits.values() for p in of_split}
    return (corpora[0] if corpora else None), splits, [p for p in others if p not in taken]


def _first(path: AnyPath, rows: Rows) -> Record:
    """The first good row: enough to tell the layout."""
    return next((record for _, record in rows.records(path)), {})


def _json_target(record: Record, where: str) -> Target:
    key = _column(record, _ID_KEYS)
    if key is None:
        raise UserError(f'{where}: the key "id" is missing: add it.')
    return _passage(record, where)._replace(id=row.named(record, key, where))


def tsv_corpus(path: AnyPath, rows: Rows) -> Iterator[Target]:
    """The passages of DPR's .tsv, as csv writes it: what holds a tab or a quote is in quotes."""
    lines = rows.lines(path)
    where, header = next(lines, (f"{path}:1", ""))
    if header.split("\t") != ["id", "text", "title"]:
        raise UserError(
            f"{where}: the header is {shown(header)}: write id, text, title in the first line, "
            "separated by tabs."
        )

    def target(line: str, where: str) -> Target:
        name, text, title = csv_columns(line, ["id", "text", "title"], where)
        return Target(where, row.identifier(name, "id", where), title, text)

    yield from rows.parse(lines, target)


def csv_columns(line: str, names: list[str], where: str) -> list[str]:
    """The columns of a tab-separated line that csv wrote.

    Raises:
      UserError: they are more or fewer than `names`, or not as csv writes them.
    """
    csv.field_size_limit(row.MAX_ROW)  # a line is no longer than that
    try:
        # Strict: a column that begins with a quote of its own would lose it silently.
        fields = next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error as error:
        raise UserError(
            f"{where}: {brief(error)}: write one row a line, as csv does, and every quote inside "
            "of a column in quotes twice."
        ) from error
    if len(fields) != len(names):
        raise UserError(
            f"{where}: {len(fields)} column(s) instead of {len(names)}: write {', '.join(names)}, "
            "separated by tabs, and every quote inside of a column in quotes twice."
        )
    return fields


def _passage(record: Any, where: str) -> Target:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a passage is no object: write title and text in braces.")
    key = _column(record, _ID_KEYS)
    name = row.named(record, key, where) if key is not None and record[key] != "" else ""
    title = row.field({"title": ""} | record, "title", where)
    return Target(
        where, name, title, row.field(record, _column(record, _TEXT_KEYS) or "text", where)
    )


def _passages(records: list[Any], where: str, *, grade: int = 1) -> tuple[Judged, ...]:
    return _judged([_passage(record, where) for record in records], grade=grade)


def _plain(texts: Iterable[str], where: str, *, grade: int = 1) -> tuple[Judged, ...]:
    return _judged([Target(where, "", "", text) for text in texts], grade=grade)


def _judged(targets: list[Target], *, grade: int) -> tuple[Judged, ...]:
    return tuple(Judged(target.where, target.id, target, grade) for target in targets)


def _texts(values: list[Any], key: str, where: str) -> tuple[str, ...]:
    return tuple(row.text(value, key, where) for value in values)


def _column(keys: Iterable[str], names: tuple[str, ...]) -> str | None:
    there = set(keys)
    return next((name for name in names if name in there), None)


def _words(text: str) -> str:
    """Lower-case words between blanks, accents dropped: an answer is held if its words are."""
    bare = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
    return " ".join(["", *re.findall(r"[^\W_]+", bare.lower()), ""])
