"""Reads a folder in BEIR layout.

    corpus.jsonl       {"_id", "title", "text"}, one target a line; the title may be missing
    queries.jsonl      {"_id", "text"}, the queries of all splits
    qrels/SPLIT.tsv    query-id, corpus-id, score, separated by tabs: this header, then one
                       judgement a line; SPLIT is train, dev or test, not all need be there

A score above 0 is the grade of a positive; 0 or less: judged, and not a positive. The queries of a
split come in the order in which its file names them; those without a positive are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterator
from typing import Any

import numpy as np

from corrector_jax.data.dataset import SPLITS, RetrievalData, Split, render_target
from corrector_jax.types import UserError

_COLUMNS = ["query-id", "corpus-id", "score"]


def read(folder: str, *, target_template: str = "{title} {text}") -> RetrievalData:
    """Reads the folder.

    Args:
      folder: its path; the last part becomes the data's name.
      target_template: how a target's text is made of `{title}` and `{text}`.

    Raises:
      UserError: something is missing or malformed; the message names file and line.
    """
    if not os.path.isdir(folder):
        raise UserError(
            f"data.path={folder!r} is not a folder: write one that holds corpus.jsonl, "
            "queries.jsonl and qrels/, or '' for the embedded data."
        )
    target_texts: dict[str, str] = {}
    for where, record in _records(os.path.join(folder, "corpus.jsonl")):
        identifier = _new_id(record, target_texts, where)
        title = _string({"title": ""} | record, "title", where)
        text = _string(record, "text", where)
        target_texts[identifier] = render_target(target_template, title=title, text=text)
    query_texts: dict[str, str] = {}
    for where, record in _records(os.path.join(folder, "queries.jsonl")):
        identifier = _new_id(record, query_texts, where)
        query_texts[identifier] = _string(record, "text", where)

    rows = {identifier: row for row, identifier in enumerate(target_texts)}
    qrels = os.path.join(folder, "qrels")
    paths = {name: os.path.join(qrels, f"{name}.tsv") for name in SPLITS}
    splits = {
        name: _split(path, rows=rows, query_texts=query_texts)
        for name, path in paths.items()
        if os.path.exists(path)
    }
    if not splits:
        raise UserError(
            f"{qrels} holds no judgements: write at least one of train.tsv, dev.tsv and test.tsv."
        )
    return RetrievalData(
        name=os.path.basename(os.path.abspath(folder)),
        target_ids=list(target_texts),
        target_texts=list(target_texts.values()),
        splits=splits,
    )


def targets(path: str, *, target_template: str = "{title} {text}") -> Iterator[tuple[str, str]]:
    """(id, text) of every target of a corpus.jsonl, read as it is asked for.

    Args:
      path: the file.
      target_template: how a target's text is made of `{title}` and `{text}`.

    Raises:
      UserError: it is missing or malformed; the message names file and line.
    """
    taken: set[str] = set()
    for where, record in _records(path):
        identifier = _new_id(record, taken, where)
        taken.add(identifier)
        title = _string({"title": ""} | record, "title", where)
        yield (
            identifier,
            render_target(target_template, title=title, text=_string(record, "text", where)),
        )


def _split(path: str, *, rows: dict[str, int], query_texts: dict[str, str]) -> Split:
    lines = _lines(path)
    where, header = next(lines, (f"{path}:1", ""))
    if header.split("\t") != _COLUMNS:
        raise UserError(
            f"{where}: the header is missing: write {', '.join(_COLUMNS)} in the first line, "
            "separated by tabs."
        )
    grades: dict[str, dict[int, int]] = {}
    for where, line in lines:
        fields = line.split("\t")
        if len(fields) != len(_COLUMNS):
            raise UserError(
                f"{where}: {len(fields)} column(s) instead of 3: write {', '.join(_COLUMNS)}, "
                "separated by tabs."
            )
        query, target, score = fields
        if query not in query_texts:
            raise UserError(f"{where}: query {query!r} is not in queries.jsonl: add it there.")
        if target not in rows:
            raise UserError(f"{where}: target {target!r} is not in corpus.jsonl: add it there.")
        try:
            grade = int(score)
        except ValueError:
            raise UserError(f"{where}: the score {score!r} is not an integer: write one.") from None
        if grades.setdefault(query, {}).setdefault(rows[target], grade) != grade:
            raise UserError(
                f"{where}: {query!r} and {target!r} had another score above: keep one of the two."
            )
    judged = {
        query: sorted((row, grade) for row, grade in of_query.items() if grade > 0)
        for query, of_query in grades.items()
    }
    pairs = {query: np.array(found, np.int32) for query, found in judged.items() if found}
    if not pairs:
        raise UserError(f"{path} holds no positive: write at least one line with a score above 0.")
    return Split(
        query_ids=list(pairs),
        texts=[query_texts[query] for query in pairs],
        positives=[found[:, 0] for found in pairs.values()],
        grades=[found[:, 1] for found in pairs.values()],
    )


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """('file:line', content) of every line that is not blank."""
    try:
        with open(path, "rb") as file:
            for number, content in enumerate(file, 1):
                try:
                    line = content.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError:
                    raise UserError(f"{path}:{number}: not UTF-8: save it as UTF-8.") from None
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): a BEIR folder holds corpus.jsonl, "
            "queries.jsonl and qrels/."
        ) from error


def _records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """('file:line', object) of every line of a jsonl file, of which there must be one."""
    where = None
    for where, line in _lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object: write one object a line.")
        yield where, record
    if where is None:
        raise UserError(f"{path} is empty: write one JSON object a line.")


def _new_id(record: dict[str, Any], taken: Container[str], where: str) -> str:
    identifier = _string(record, "_id", where)
    if identifier.split() != [identifier]:  # run files separate their columns by blanks
        raise UserError(f"{where}: the _id {identifier!r} is empty or has blanks: write one word.")
    if identifier in taken:
        raise UserError(f"{where}: the _id {identifier!r} occurred before: write each id once.")
    return identifier


def _string(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise UserError(f'{where}: the key "{key}" is missing: add it.')
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}" is {json.dumps(value)[:40]}: write a text in quotes.')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f'{where}: "{key}" holds half of a surrogate pair: remove it.') from None
    return value
