"""Any source, prepared once: tables on the local disk that `RetrievalData` reads in place.

A source is known by the content of its files. Its targets are written shard by shard: a process
that is killed loses the shard it was at, and the next one goes on behind those before it. What is
kept of a target in memory is two hashes of 64 bits, by which judgements find it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corrector_jax import paths
from corrector_jax.data.dataset import SPLITS, Reading, Refused, RetrievalData, Split, render_target
from corrector_jax.data.rows import Judged, Query, Reader, Rows, Target
from corrector_jax.data.tables import Appender, Numbers, Texts, damaged
from corrector_jax.paths import AnyPath
from corrector_jax.types import UserError, shown
from corrector_jax.writer import progress, say

SHARD = 2**16
"""Targets written at once: what is lost with a killed process, and held in memory."""

_FORMAT = 1  # one more whenever the tables change
_PACKED = 3  # English text takes so many times its size in a .gz or .zst, or a little less
_SHOWN = 64  # MiB of files from which on progress is shown


def prepare(
    reader: Reader, *, name: str, target_template: str, folder: Path, max_bad_rows: int = 0
) -> RetrievalData:
    """Reads a source, unless that was done before, and opens what was read.

    Args:
      reader: the source.
      name: of the data.
      target_template: how a target's text is made of its `{title}` and `{text}`.
      folder: where prepared sources are kept, on a local disk.
      max_bad_rows: how many bad rows are skipped; one more is an error.

    Returns:
      The data; its texts stay on the disk.

    Raises:
      UserError: a row is bad, or the disk is too small; what was written stays, and is used.
    """
    place = folder / _fingerprint(reader, target_template)[:32]
    if not (place / "manifest.json").exists():
        with writing(place):
            if not (place / "manifest.json").exists():  # another process may have made it
                enough_disk(place, sum(map(_unpacked, reader.files)), "the texts")
                with _shown("reading", reader.files) as advance:
                    rows = Rows(max_bad_rows, advance)
                    _build(reader, place, target_template, rows)
    data = _open(place, name)
    assert data.reading is not None
    refused = data.reading.refused
    if len(refused) > max_bad_rows:  # prepared when more were allowed
        raise UserError(refused[max_bad_rows].message)
    if refused:
        say(f"{name}: skipped {len(refused):,} bad row(s); the first: {refused[0].message}")
    for split, count in data.reading.without_positives.items():
        if count:
            say(f"{name}: left out {count:,} {split} queries that have no positive")
    return data


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """While a folder is filled: waits, and says so, until no other process fills it.

    Args:
      path: of the lock, a file in the folder.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that fills {path.parent}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """While a folder of the cache is filled: no other process fills it, and errors are explained.

    Args:
      place: the folder; made if it is not there.

    Raises:
      UserError: it cannot be written.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        with alone(place / "lock"):
            yield
    except OSError as error:
        raise UserError(
            f"{place} cannot be written ({error.strerror or error}): free some of that disk, or "
            "name a folder on another in config.data.cache_dir; what is whole there is kept."
        ) from error


def enough_disk(place: Path, needed: int, what: str) -> None:
    """Refuses to begin what the disk cannot hold.

    Args:
      place: the folder to fill; what a killed process left in it counts as written.
      needed: bytes of it when it is whole.
      what: is to be written, in words.

    Raises:
      UserError: how much is needed and how much is there.
    """
    free = paths.free_bytes(place)
    needed -= sum(file.stat().st_size for file in place.iterdir())
    if free is not None and free < needed:
        raise UserError(
            f"{place}: {what} need {needed / 1e9:.1f} GB but the disk has {free / 1e9:.1f} GB "
            "left: free some, or name a folder on another disk in config.data.cache_dir."
        )


class Index:
    """Row numbers by 64-bit key: sorted arrays, merged as they grow; 12 bytes a row."""

    def __init__(self) -> None:
        self._levels: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, keys: np.ndarray, first: int) -> None:
        """Adds [n] uint64 keys of the rows from `first` on."""
        rows = np.arange(first, first + len(keys), dtype=np.int32)
        while self._levels and len(self._levels[-1][0]) <= 2 * len(keys):
            before = self._levels.pop()
            keys, rows = np.concatenate([before[0], keys]), np.concatenate([before[1], rows])
        order = np.argsort(keys, kind="stable")  # of equal keys the first row stays in front
        self._levels.append((keys[order], rows[order]))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """[n] uint64 keys -> [n] int32, the first row that has the key; -1 = none has."""
        found = np.full(len(keys), -1, np.int32)
        for level, rows in reversed(self._levels):  # the oldest last: its rows come first
            if len(level):
                at = np.minimum(np.searchsorted(level, keys), len(level) - 1)
                found = np.where(level[at] == keys, rows[at], found)
        return found

    def find_one(self, key: int) -> int:
        """The first row that has the key, -1 = none has."""
        return int(self.find(np.array([key], np.uint64))[0])


_TABLES = ("target_ids", "target_texts", "target_keys")
_NOTHING: dict[str, Any] = {
    **dict.fromkeys(_TABLES, (0, 0)),
    **{"size": 0, "taken": 0, "whole": False, "rows": 0, "refused": {}, "keys": ""},
}


def _progress(file: Path) -> dict[str, Any]:
    """How far a process came that was killed, as `_write_corpus` wrote it."""
    try:
        state = _NOTHING | paths.read_json(file)
        counts = [state[key] for key in ("size", "taken", "rows")]
        counts += [size for name in _TABLES for size in state[name]]
        good = all(type(count) is int and 0 <= count < 2**63 for count in counts)
        good = good and all(len(state[name]) == 2 for name in _TABLES)
        # Whatever was taken was written or refused.
        good = good and state["size"] <= state["taken"] <= state["size"] + len(state["refused"])
        good = good and all(list(map(type, one)) == [str, str] for one in state["refused"].values())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise damaged(file, error) from error
    if not good or not isinstance(state["whole"], bool):
        raise damaged(file)
    return state


class _Targets:
    """The tables of targets while they are written, and what finds a target in them."""

    def __init__(self, place: Path, template: str, rows: Rows) -> None:
        self._place, self._template, self._rows = place, template, rows
        file = place / "progress.json"
        state = _progress(file) if file.exists() else _NOTHING
        self._size, self._taken, self._whole = state["size"], state["taken"], state["whole"]
        self._names, self._contents = Index(), Index()
        self._digest = hashlib.sha256()  # of all keys: what finds a target has to be right
        rows.refused |= {where: Refused(*one) for where, one in state["refused"].items()}
        if self._whole:
            rows.total = state["rows"]
        with contextlib.ExitStack() as opened:
            self._tables = {
                name: opened.enter_context(contextlib.closing(Appender(place / name, state[name])))
                for name in _TABLES
            }
            if self._size:
                say(f"{self._size:,} targets were read before: going on behind them")
                keys = np.fromfile(place / "target_keys.data", np.uint64)
                self._digest.update(keys.tobytes())
                # Progress of an earlier version says nothing of its keys.
                if len(keys) != 2 * self._size or state["keys"] not in ("", self._said()):
                    raise damaged(place / "target_keys.data")
                keys = keys.reshape(-1, 2)
                self._names.add(keys[:, 0], 0)
                self._contents.add(keys[:, 1], 0)
            self._close = opened.pop_all().close
        # Of passages that stand in queries: id -> (row, text), and text -> row, all by key.
        self._new_names: dict[int, tuple[int, int]] = {}
        self._new_contents: dict[int, int] = {}
        self._pending: list[tuple[str, str]] = []

    def __enter__(self) -> _Targets:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def read(self, reader: Reader) -> None:
        """Writes the corpus, shard by shard."""
        if self._whole:
            return
        shard: dict[int, tuple[str, str, str]] = {}
        count = 0
        for count, target in enumerate(reader.targets(self._rows), 1):
            if count <= self._taken:
                continue  # its shard is there
            key = key_of(target.id)
            if key in shard:
                self._refuse_twice(target.where, target.id)
            else:
                try:
                    shard[key] = target.where, target.id, self._render(target)
                except UserError as error:
                    self._rows.refuse(target.where, error, "empty text")
            if len(shard) == SHARD:
                self._write_corpus(shard, count, whole=False)
                shard = {}
        self._write_corpus(shard, count, whole=True)

    def rows(self, judgements: list[Judged]) -> list[int]:
        """The rows of judged targets; those whose content stands in the judgement are added.

        Raises:
          UserError: nobody has an id, a text is empty, or an id had another text before; then none
            of them is added.
        """
        texts = [self._text(judged) for judged in judgements]
        here: dict[str, str] = {}
        for judged, text in zip(judgements, texts, strict=True):
            if judged.id and here.setdefault(judged.id, text) != text:
                raise _another_text(judged)
        return [self._row(*one) for one in zip(judgements, texts, strict=True)]

    def _text(self, judged: Judged) -> str:
        """The text of a judged target that the corpus does not hold; '' where it does."""
        name = key_of(judged.id)
        if judged.id and name not in self._new_names and self._names.find_one(name) >= 0:
            return ""
        if judged.content is None:
            raise UserError(
                f"{judged.where}: target {shown(judged.id)} is not in the corpus: add it "
                "there, or correct the id."
            )
        text = self._render(judged.content)
        if judged.id and name in self._new_names and self._new_names[name][1] != key_of(text):
            raise _another_text(judged)
        return text

    def _row(self, judged: Judged, text: str) -> int:
        name = key_of(judged.id)
        if not text:
            return self._names.find_one(name)
        if judged.id and name in self._new_names:
            return self._new_names[name][0]
        content = key_of(text)
        if not judged.id:
            row = self._contents.find_one(content)
            row = self._new_contents.get(content, -1) if row < 0 else row
            if row >= 0:
                return row
        row = self._size + len(self._pending)
        self._pending.append((judged.id or f"p{content:016x}", text))
        self._new_contents.setdefault(content, row)
        if judged.id:
            self._new_names[name] = row, content
        if len(self._pending) == SHARD:
            self._write(self._pending)
            self._pending = []
        return row

    def finish(self) -> None:
        """Writes what is left."""
        self._write(self._pending)
        for table in self._tables.values():
            table.commit()

    def _write_corpus(
        self, shard: dict[int, tuple[str, str, str]], taken: int, *, whole: bool
    ) -> None:
        keys = list(shard)
        before = self._names.find(np.array(keys, np.uint64)) >= 0
        for key, twice in zip(keys, before.tolist(), strict=True):
            if twice:
                where, name, _ = shard.pop(key)
                self._refuse_twice(where, name)
        written = self._write([(name, text) for _, name, text in shard.values()])
        self._names.add(written[:, 0], self._size - len(written))
        self._contents.add(written[:, 1], self._size - len(written))
        state = {
            **{name: table.commit() for name, table in self._tables.items()},
            "size": self._size,
            "taken": taken,
            "whole": whole,
            "rows": self._rows.total,
            "refused": self._rows.refused,
            "keys": self._said(),
        }
        paths.write(self._place / "progress.json", json.dumps(state))

    def _write(self, targets: list[tuple[str, str]]) -> np.ndarray:
        """Appends (id, text) pairs; returns their keys, [n, 2] uint64."""
        keys = np.array([(key_of(name), key_of(text)) for name, text in targets], np.uint64)
        keys = keys.reshape(-1, 2)
        self._tables["target_ids"].texts(name for name, _ in targets)
        self._tables["target_texts"].texts(text for _, text in targets)
        self._tables["target_keys"].blobs([row.tobytes() for row in keys])
        self._digest.update(keys.tobytes())
        self._size += len(targets)
        return keys

    def _said(self) -> str:
        return self._digest.hexdigest()

    def _render(self, target: Target) -> str:
        text = render_target(self._template, title=target.title, text=target.text)
        if not text:
            raise UserError(f"{target.where}: the target has no text: write one, or drop the row.")
        return text

    def _refuse_twice(self, where: str, name: str) -> None:
        error = UserError(f"{where}: the id {shown(name)} occurred before: write each id once.")
        self._rows.refuse(where, error, "duplicate id")


class _Judgements(NamedTuple):
    """What is known about a query while its split is read."""

    name: str
    text: str
    positives: dict[int, int]  # row -> grade
    negatives: array[int]
    answers: list[str]


def _build(reader: Reader, place: Path, template: str, rows: Rows) -> None:
    """Writes all tables of a source, and last of all its manifest."""
    without, counts = {}, {}
    with _Targets(place, template, rows) as targets:
        targets.read(reader)
        for split in reader.splits:
            before = len(rows.refused)
            found = _read_split(reader.queries(split, rows), targets, rows)
            kept = [query for query in found if query.positives]
            without[split], counts[split] = len(found) - len(kept), len(kept)
            if not kept:
                if not found and (refused := list(rows.refused.values())[before:]):
                    raise UserError(
                        f"no row of the {split} split of {reader.files[-1].parent} can be read; "
                        f"the first: {refused[0].message}"
                    )
                raise UserError(
                    f"the {split} split of {reader.files[-1].parent} holds no positive: write at "
                    "least one judgement with a score above 0, or remove the split."
                )
            _write_split(kept, place, split)
        targets.finish()
    digests = {name: Texts(place / name).digest().hex() for name in ("target_ids", "target_texts")}
    manifest = {
        "layout": reader.layout,
        "files": [str(path) for path in reader.files[:100]],
        "rows": rows.total,
        "refused": list(rows.refused.values()),
        "without_positives": without,
        "queries": counts,
        "digests": digests,
    }
    paths.write(place / "manifest.json", json.dumps(manifest, indent=1))


def _read_split(found: Iterator[Query], targets: _Targets, rows: Rows) -> list[_Judgements]:
    """The queries of a split; rows of one text are one query, where queries have no ids."""
    held: dict[tuple[bool, str], _Judgements] = {}
    for query in found:
        key = (True, query.id) if query.id else (False, query.text)
        if query.id and key in held:
            error = f"{query.where}: the id {shown(query.id)} occurred before: write each id once."
            rows.refuse(query.where, UserError(error), "duplicate id")
            continue
        resolved: list[tuple[Judged, int]] = []
        bad = set()
        judgements = (*query.positives, *query.negatives)
        # Those of one line are taken or refused together.
        for where, line in itertools.groupby(judgements, lambda judged: judged.where):
            judged = list(line)
            try:
                resolved += zip(judged, targets.rows(judged), strict=True)
            except UserError as error:
                missing = any(one.content is None for one in judged)
                rows.refuse(where, error, "missing target" if missing else "malformed row")
                bad.add(where)
        if query.where in bad:
            continue
        name = query.id or f"q{key_of(query.text):016x}"
        entry = held.setdefault(key, _Judgements(name, query.text, {}, array("i"), []))
        for one, row in resolved:
            if one.grade > 0:
                entry.positives[row] = max(one.grade, entry.positives.get(row, 0))
            else:
                entry.negatives.append(row)
        entry.answers.extend(query.answers)
    return list(held.values())


def _write_split(queries: list[_Judgements], place: Path, split: str) -> None:
    def write(name: str, append: Callable[[Appender], None]) -> None:
        with contextlib.closing(Appender(place / f"{split}_{name}")) as table:
            append(table)
            table.commit()

    judged = [sorted(query.positives.items()) for query in queries]
    write("ids", lambda table: table.texts(query.name for query in queries))
    write("texts", lambda table: table.texts(query.text for query in queries))
    write("positives", lambda table: table.numbers([row for row, _ in q] for q in judged))
    write("grades", lambda table: table.numbers([grade for _, grade in q] for q in judged))
    negatives = [[row for row in q.negatives if row not in q.positives] for q in queries]
    if any(negatives):
        write("negatives", lambda table: table.numbers(dict.fromkeys(q) for q in negatives))
    if any(query.answers for query in queries):
        lists = [json.dumps(list(dict.fromkeys(query.answers))) for query in queries]
        write("answers", lambda table: table.texts(lists))


def _open(place: Path, name: str) -> RetrievalData:
    """Opens what `_build` wrote.

    Raises:
      UserError: it is not what was written.
    """
    file = place / "manifest.json"
    try:
        manifest = paths.read_json(file)
        digests = [manifest["digests"][table] for table in ("target_ids", "target_texts")]
        counts, without = dict(manifest["queries"]), dict(manifest["without_positives"])
        refused = tuple(Refused(*map(str, one)) for one in manifest["refused"])
        reading = Reading(str(manifest["layout"]), int(manifest["rows"]), refused, without)
        known = set(counts) <= set(SPLITS) and bool(counts)
        plain = all(type(count) is int for count in (*counts.values(), *without.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise damaged(file, error) from error
    if not known or not plain:
        raise damaged(file)
    ids, texts = (
        Texts(place / table, digest)
        for table, digest in zip(("target_ids", "target_texts"), digests, strict=True)
    )
    if len(ids) != len(texts):
        raise damaged(place / "target_texts")
    splits = {split: _open_split(place, split, len(ids), counts[split]) for split in counts}
    return RetrievalData(
        name=name, target_ids=ids, target_texts=texts, splits=splits, reading=reading
    )


def _open_split(place: Path, split: str, targets: int, count: int) -> Split:
    """The tables of a split, which must name targets that are there."""
    answers, negatives = place / f"{split}_answers", place / f"{split}_negatives"
    positives = Numbers(place / f"{split}_positives", below=targets)
    grades = Numbers(place / f"{split}_grades", below=2**31)
    found = Split(
        query_ids=Texts(place / f"{split}_ids"),
        texts=Texts(place / f"{split}_texts"),
        positives=positives,
        grades=grades,
        negatives=Numbers(negatives, below=targets) if _there(negatives) else (),
        answers=_answers(answers) if _there(answers) else (),
    )
    for name, column in found._asdict().items():
        if len(column) != count and (name not in ("negatives", "answers") or len(column)):
            raise damaged(place / f"{split}_{name}")
    if not positives.lengths().all() or (positives.lengths() != grades.lengths()).any():
        raise damaged(place / f"{split}_grades")
    return found


def _answers(path: Path) -> list[list[str]]:
    """The short answers of every query."""
    try:
        found = [paths.parse_json(one.encode()) for one in Texts(path)]
        if all(isinstance(one, list) and all(isinstance(a, str) for a in one) for one in found):
            return found
    except ValueError as error:
        raise damaged(path) from error
    raise damaged(path)


def _unpacked(path: AnyPath) -> int:
    """Bytes of a file's texts, about."""
    return int(path.stat().st_size) * (_PACKED if path.name.endswith((".gz", ".zst")) else 1)


def _there(path: Path) -> bool:
    return path.with_name(f"{path.name}.ends").exists()


def _fingerprint(reader: Reader, template: str) -> str:
    """Sha256, in hex, of what is read and how."""
    parts: list[Any] = [_FORMAT, reader.layout, template]
    above = len(os.path.commonpath([path.parent.as_posix() for path in reader.files]))
    with _shown("looking for changes in", reader.files) as advance:
        for path in reader.files:
            content = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while chunk := file.read(2**22):
                        content.update(chunk)
                        advance(len(chunk))
            except OSError as error:
                reason = error.strerror or str(error)
                raise UserError(
                    f"{path} cannot be read ({reason}): give a readable file."
                ) from error
            parts.append([path.as_posix()[above:], content.hexdigest()])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@contextlib.contextmanager
def _shown(label: str, files: tuple[AnyPath, ...]) -> Iterator[Callable[[int], None]]:
    """Shows how much of some files is read, if that takes long."""
    total = sum(path.stat().st_size for path in files if path.exists()) // 2**20
    if total < _SHOWN:
        yield lambda count: None
        return
    with progress(f"{label} {files[0].parent.name}", total, "MiB") as advance:
        read = 0

        def count_bytes(count: int) -> None:
            nonlocal read
            before, read = read >> 20, read + count
            if read >> 20 > before:
                advance((read >> 20) - before)

        yield count_bytes


def _another_text(judged: Judged) -> UserError:
    return UserError(
        f"{judged.where}: the passage {shown(judged.id)} had another text above: give each "
        "text an id of its own."
    )


def key_of(text: str) -> int:
    """64 bits that stand for an id or a text in an `Index`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
