"""Reads files row by row: what was read, what was refused, and where it stands.

Every layout reads through `Rows`, which counts. A bad row is refused with a sentence that names
file and line: the first one stops everything, unless so many are allowed. What is wrong with a
whole file (it is missing, or its compression is cut short) always stops.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, Protocol, TypeVar

from corrector_jax.data.dataset import SPLITS, Refused
from corrector_jax.paths import AnyPath, is_local
from corrector_jax.types import UserError, brief, shown
from corrector_jax.writer import say

MAX_ROW = 8 * 2**20
"""Bytes of the longest row: a longer one is a missing line break, and memory stays bounded."""

MAX_BLANK = 2**16
"""Blank lines in a row: more of them are no text but a small file that unpacks to gigabytes."""

WINDOW = 2**16
"""Bytes of a JSON array read at once, or more where an item is longer."""

COMPRESSED = ("", ".gz", ".zst")
"""What may follow a file's name."""

_DAMAGED = (EOFError, OSError, zlib.error)
_SPLIT_WORDS = {
    "train": {"train"},
    "dev": {"dev", "val", "valid", "validation"},
    "test": {"test"},
}

_OPENED = re.compile(r"\ufeff?\s*\[\s*")
_COMMA = re.compile(r"\s*,\s*")
_CLOSED = re.compile(r"\s*\]")
_PART = re.compile(r"-\d+-of-\d+\.")  # how the Hugging Face hub cuts a file up

T = TypeVar("T")


class Target(NamedTuple):
    """A row of a corpus, or a passage that stands inside of a query's row.

    Attributes:
      where: 'file:line', and more where several rows share a line; no other row has it.
      id: its name; '' = it has none, and is known by its title and text.
      title: '' where there is none.
      text: what it says.
    """

    where: str
    id: str
    title: str
    text: str


class Judged(NamedTuple):
    """A target as a query's judgement names it.

    Attributes:
      where: 'file:line' of the judgement.
      id: the target's name, '' where only its content is known.
      content: the passage, where the judgement holds it; a corpus that has the id comes first.
      grade: how relevant it is, 1 where nobody said; of hard negatives 0.
    """

    where: str
    id: str
    content: Target | None = None
    grade: int = 1


class Query(NamedTuple):
    """A query with what is known about it.

    Attributes:
      where: 'file:line'.
      id: its name; '' = it has none, and all rows of a split with its text are one query.
      text: what it asks.
      positives: in any order; a query without any is left out, and counted.
      negatives: hard negatives, in the order of the file.
      answers: short answers, where the source has them.
    """

    where: str
    id: str
    text: str
    positives: tuple[Judged, ...]
    negatives: tuple[Judged, ...] = ()
    answers: tuple[str, ...] = ()


class Reader(Protocol):
    """A source in one layout, as a stream of rows; it holds no corpus in memory.

    Attributes:
      layout: the word of config.data.layout.
      files: everything that is read; their content is the source's fingerprint.
      splits: which of train, dev and test there are, in this order.
    """

    layout: str
    files: tuple[AnyPath, ...]
    splits: tuple[str, ...]

    def targets(self, rows: Rows) -> Iterator[Target]:
        """The corpus, in the order of its files; empty where all targets stand in the queries."""
        ...

    def queries(self, split: str, rows: Rows) -> Iterator[Query]:
        """The queries of a split, in the order of its files."""
        ...


class Rows:
    """Counts rows, and decides what happens to a bad one.

    Attributes:
      total: rows seen, refused ones included; blank lines are no rows.
      refused: 'file:line' -> what is wrong there.
    """

    def __init__(self, max_bad: int = 0, advance: Callable[[int], None] | None = None) -> None:
        """Starts at nothing.

        Args:
          max_bad: how many bad rows are skipped before one stops everything.
          advance: told how many more bytes of files were read.
        """
        self.total = 0
        self.refused: dict[str, Refused] = {}
        self._max_bad = max_bad
        self._advance = advance or (lambda count: None)

    def refuse(self, where: str, error: UserError, kind: str = "malformed row") -> None:
        """Skips the row at `where`, or raises `error` where no more may be skipped."""
        if where in self.refused:
            return
        if len(self.refused) >= self._max_bad:
            if not self._max_bad:
                raise error
            raise UserError(
                f"{str(error).rstrip('.')} ({self._max_bad} bad row(s) above were skipped: raise "
                "config.data.max_bad_rows to skip more)."
            ) from error
        self.refused[where] = Refused(kind, str(error))

    def lines(self, path: AnyPath) -> Iterator[tuple[str, str]]:
        """('file:line', content) of every line that is not blank.

        Raises:
          UserError: the file cannot be read to its end, a line is no UTF-8 or too long, or blank
            lines go on and on.
        """
        with _opened(path) as (file, raw):
            at = number = blank = 0
            while True:
                number += 1
                where = f"{path}:{number}"
                content = _read(file, where, line=True)
                if not content:
                    break
                error = None
                too_long = len(content) > MAX_ROW
                if too_long:
                    error = f"the line is longer than {MAX_ROW // 2**20} MiB: break it up"
                else:
                    try:
                        line = content.decode("utf-8-sig" if number == 1 else "utf-8")
                    except UnicodeDecodeError:
                        error = "not UTF-8: save it as UTF-8"
                if error:
                    self.total += 1
                    self.refuse(where, UserError(f"{where}: {error}."))
                    # Behind the refusal: what stops everything need not be read to its end.
                    while too_long and content and not content.endswith(b"\n"):
                        content = _read(file, where, line=True)
                elif line.strip():
                    self.total += 1
                    blank = 0
                    yield where, line.rstrip("\r\n")
                else:
                    blank += 1
                    if blank > MAX_BLANK:
                        raise UserError(
                            f"{where}: {MAX_BLANK:,} blank lines stand before this one: fetch or "
                            "write the file again."
                        )
                if number % 4096 == 0:
                    at, before = raw.tell(), at
                    self._advance(at - before)
            self._advance(raw.tell() - at)

    def whole(self, path: AnyPath) -> str:
        """The text of a file that is one row.

        Raises:
          UserError: it cannot be read, is no UTF-8, or too long.
        """
        self.total += 1
        with _opened(path) as (file, _):
            content = _read(file, f"{path}:1")
        self._advance(len(content))
        if len(content) > MAX_ROW:
            raise UserError(f"{path}:1: longer than {MAX_ROW // 2**20} MiB: break it up.")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            number = 1 + content.count(b"\n", 0, error.start)
            raise UserError(f"{path}:{number}: not UTF-8: save it as UTF-8.") from None

    def records(self, path: AnyPath) -> Iterator[tuple[str, dict[str, Any]]]:
        """('file:line', object) of every row of a file: .parquet, .csv, .json or one a line.

        A .json file may also hold one array of objects; it is never held as a whole. The first
        line of a .csv names the columns; what stands in an empty cell is None.

        Raises:
          UserError: the file cannot be read to its end, or a row is not an object.
        """
        name = plain_name(path)
        if name.endswith(".parquet"):
            found: Iterator[tuple[str, Any]] = self._parquet(path)
        elif name.endswith(".csv"):
            found = self._csv(path)
        elif name.endswith(".json") and _first_byte(path) == b"[":
            found = self._array(path)
        else:
            found = ((where, _loads(line)) for where, line in self.lines(path))
        before = self.total
        for where, record in found:
            if isinstance(record, dict):
                yield where, record
            else:
                error = UserError(f"{where}: not a JSON object: write one object a line.")
                self.refuse(where, error)
        if self.total == before:
            raise UserError(f"{path} is empty: write one row a line.")

    def parse(self, found: Iterator[tuple[str, Any]], make: Callable[[Any, str], T]) -> Iterator[T]:
        """What `make(content, where)` makes of rows; those it raises UserError for are refused."""
        for where, content in found:
            try:
                made = make(content, where)
            except UserError as error:
                self.refuse(where, error)
            else:
                yield made

    def _array(self, path: AnyPath) -> Iterator[tuple[str, Any]]:
        """The items of a JSON array, decoded one by one from a window of the file."""
        decoder, decode = json.JSONDecoder(), _utf8(path)
        with _opened(path) as (file, raw):
            window, at, line, number, ended, expected = "", 0, 1, 0, False, _OPENED
            while True:
                try:
                    if _CLOSED.match(window, at) and expected is _COMMA:
                        break
                    before = expected.match(window, at)
                    if before is None:
                        raise ValueError("no comma")
                    begin = before.end()
                    if expected is _OPENED and window[begin : begin + 1] == "]":
                        break
                    item, end = decoder.raw_decode(window, begin)
                    if end == len(window) and not ended:
                        raise ValueError("it may go on")
                except (ValueError, RecursionError):
                    before = expected.match(window, at)
                    begin = before.end() if before else at
                    where = f"{path}:{line + window.count(chr(10), at, begin)}"
                    if ended or len(window) - at > MAX_ROW:
                        raise UserError(
                            f"{where}: the JSON breaks in the row that begins here: mend it, or "
                            "write one JSON object a line."
                        ) from None
                    # Twice as much each time: a long row is tried a few times, not a thousand.
                    position = raw.tell()
                    more = _read(file, where, count=max(WINDOW, len(window) - at))
                    window, at, ended = window[at:] + decode(more, where), 0, not more
                    self._advance(raw.tell() - position)
                else:
                    line += window.count("\n", at, begin)
                    self.total += 1
                    number += 1  # many rows may stand in one line
                    yield f"{path}:{line} (row {number})", item
                    line += window.count("\n", begin, end)
                    at, expected = end, _COMMA
            rest = window[at:].strip().lstrip("\ufeff[").strip() + decode(_read(file, ""), "")
            if rest.strip() != "]":
                raise UserError(
                    f"{path}:{line}: something follows the array: write one array a file."
                )

    def _csv(self, path: AnyPath) -> Iterator[tuple[str, Any]]:
        """Rows as csv writes them: a cell may go over several lines; an empty one is None."""
        csv.field_size_limit(MAX_ROW)
        decode = _utf8(path)
        with _opened(path) as (file, raw):
            ended = held = 0  # lines of whole rows, and bytes of the row that is being read

            def lines() -> Iterator[str]:
                nonlocal held
                number = 0
                while content := _read(file, f"{path}:{number + 1}", line=True):
                    number += 1
                    held = len(content) + (held if number - 1 > ended else 0)
                    if held > MAX_ROW:
                        raise UserError(
                            f"{path}:{ended + 1}: the row that begins here is longer than "
                            f"{MAX_ROW // 2**20} MiB: break it up, or end a quote that is open."
                        )
                    text = decode(content, f"{path}:{number}")
                    yield text.removeprefix("\ufeff") if number == 1 else text
                decode(b"", f"{path}:{number}")  # or the file ends within a character

            rows = csv.reader(lines(), strict=True)
            names: list[str] = []
            at = blank = 0
            while True:
                where = f"{path}:{ended + 1}"
                try:
                    cells = next(rows, None)
                except csv.Error as error:
                    raise UserError(
                        f"{where}: the row that begins here breaks ({brief(error)}): a cell that "
                        "holds a comma, a quote or a line break stands in quotes, every quote in "
                        "it twice."
                    ) from error
                if cells is None:
                    break
                ended = rows.line_num
                blank = 0 if any(cells) else blank + 1
                if blank > MAX_BLANK:
                    raise UserError(
                        f"{where}: {MAX_BLANK:,} blank rows stand before this one: fetch or write "
                        "the file again."
                    )
                if blank:
                    continue
                if not names:
                    names = cells
                    if len(set(names)) < len(names):
                        raise UserError(
                            f"{where}: the columns are {brief(', '.join(names))}: write each once."
                        )
                    continue
                self.total += 1
                if len(cells) == len(names):
                    yield where, {k: v or None for k, v in zip(names, cells, strict=True)}
                else:
                    said = f"{where}: {len(cells)} cell(s) under {len(names)} columns"
                    self.refuse(where, UserError(f"{said}: write one for each, empty or not."))
                if self.total % 4096 == 0:
                    at, before = raw.tell(), at
                    self._advance(at - before)
            self._advance(raw.tell() - at)

    def _parquet(self, path: AnyPath) -> Iterator[tuple[str, Any]]:
        import pyarrow
        import pyarrow.parquet

        with _opened(path) as (file, raw):
            number = 0
            try:
                for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
                    for record in batch.to_pylist():
                        number += 1
                        self.total += 1
                        yield f"{path}:{number}", record
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number + 1}: this row, or one of the 1,023 behind it, holds a text "
                    "that is not UTF-8: write the file again."
                ) from error
            except (pyarrow.ArrowException, ArithmeticError, OSError, ValueError) as error:
                raise UserError(
                    f"{path}:{number + 1}: not a whole parquet file ({brief(error)}): fetch or "
                    "write it again."
                ) from error
            self._advance(raw.tell())


def field(record: dict[str, Any], key: str, where: str) -> str:
    """The text under a key.

    Raises:
      UserError: it is missing, or not a text.
    """
    return text(_value(record, key, where), key, where)


def named(record: dict[str, Any], key: str, where: str) -> str:
    """The id under a key.

    Raises:
      UserError: it is missing, or no id.
    """
    return identifier(_value(record, key, where), key, where)


def text(value: Any, key: str, where: str) -> str:
    """A value that must be a text; `key` names it in the message.

    Raises:
      UserError: it is not.
    """
    if not isinstance(value, str):
        shown = json.dumps(value, default=str)[:40]
        raise UserError(f'{where}: "{key}" is {shown}: write a text in quotes.')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f'{where}: "{key}" holds half of a surrogate pair: remove it.') from None
    return value


def query_text(value: str, where: str) -> str:
    """A query's text.

    Raises:
      UserError: it says nothing.
    """
    if not value.strip():
        raise UserError(f"{where}: the query is empty: write its text, or remove the row.")
    return value


def identifier(value: Any, key: str, where: str) -> str:
    """An id: one word, or an integer.

    Raises:
      UserError: it is something else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = text(value, key, where)
    if name.split() != [name]:  # run files separate their columns by blanks
        raise UserError(f"{where}: the {key} {shown(name)} is empty or has blanks: write one word.")
    return name


def listed(record: dict[str, Any], key: str, where: str, *, missing: bool = False) -> list[Any]:
    """The list under a key; `missing` allows that there is none, and gives an empty one.

    Raises:
      UserError: it is missing, or not a list.
    """
    if missing and record.get(key) is None:
        return []
    value = _value(record, key, where)
    if not isinstance(value, list):
        shown = json.dumps(value, default=str)[:40]
        raise UserError(f'{where}: "{key}" is {shown}: write a list in square brackets.')
    return value


def grade(score: str, where: str) -> int:
    """A judgement's score.

    Raises:
      UserError: it is no integer, or negative.
    """
    try:
        value = int(score)
    except ValueError:
        raise UserError(
            f"{where}: the score {shown(score)} is not an integer: write one."
        ) from None
    if not 0 <= value < 2**31:
        raise UserError(
            f"{where}: the score {shown(value)} is negative or huge: write 0 for a target that is "
            "not relevant, 1 or more for one that is."
        )
    return value


def columns(line: str, names: list[str], where: str) -> list[str]:
    """The tab-separated columns of a line.

    Raises:
      UserError: they are more or fewer than `names`.
    """
    found = line.split("\t")
    if len(found) != len(names):
        raise UserError(
            f"{where}: {len(found)} column(s) instead of {len(names)}: write {', '.join(names)}, "
            "separated by tabs."
        )
    return found


def plain_name(path: AnyPath) -> str:
    """A file's name in lower case, without what says how it is compressed."""
    name = path.name.lower()
    return name.removesuffix(".gz").removesuffix(".zst")


def find(folder: AnyPath, name: str) -> AnyPath | None:
    """A file of a folder by its plain name, as it is or compressed; None where there is none.

    Raises:
      UserError: it is there twice.
    """
    found = [folder / (name + end) for end in COMPRESSED if (folder / (name + end)).exists()]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name} are both there: remove one of them.")
    return found[0] if found else None


def needed(folder: AnyPath, name: str, what: str) -> AnyPath:
    """A file that a folder must hold.

    Args:
      folder: where it is looked for.
      name: its plain name.
      what: the folder in words, for the message.

    Raises:
      UserError: it is missing.
    """
    found = find(folder, name)
    if found is None:
        raise UserError(f"{folder / name} is missing: {what} holds one, as it is, .gz or .zst.")
    return found


def listing(folder: AnyPath, *ends: str) -> list[AnyPath]:
    """The files of a folder whose plain names end with one of `ends`, in order of name."""
    return sorted(
        (path for path in folder.iterdir() if plain_name(path).endswith(ends) and path.is_file()),
        key=lambda path: path.name,
    )


def split_of(path: AnyPath) -> str | None:
    """The split that a file's name speaks of, as `nq-dev.json.gz` does; None where none."""
    words = set(re.split(r"[^a-z0-9]+", plain_name(path)))
    found = [split for split in SPLITS if words & _SPLIT_WORDS[split]]
    return found[0] if len(found) == 1 else None


def by_split(files: list[AnyPath]) -> dict[str, tuple[AnyPath, ...]]:
    """Split -> its files, in the order train, dev, test; files that name no split are passed over.

    Raises:
      UserError: two files are of one split, and not parts as in `train-00000-of-00002.parquet`.
    """
    found: dict[str, list[AnyPath]] = {}
    for path in files:
        split = split_of(path)
        if split:
            found.setdefault(split, []).append(path)
    for split, of_split in found.items():
        if len(of_split) > 1 and not all(_PART.search(plain_name(path)) for path in of_split):
            raise UserError(
                f"{of_split[0]} and {of_split[1].name} are both of the {split} split: remove one "
                "of them."
            )
    return {split: tuple(found[split]) for split in SPLITS if split in found}


def say_passed_over(files: list[AnyPath]) -> None:
    """Says which files are not read, because their names speak of no split."""
    if files:
        names = ", ".join(file.name for file in files[:5]) + (", ..." if files[5:] else "")
        say(
            f"{files[0].parent}: passed over {names}: no name of a split is in it; put one of "
            f"{', '.join(SPLITS)} there to have it read"
        )


@contextlib.contextmanager
def _opened(path: AnyPath) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file to read, decompressed by its name, and the file on the disk below it."""
    with contextlib.ExitStack() as stack:
        try:
            if path.is_dir():
                raise UserError(f"{path} is a folder: put a file in its place.")
            raw = stack.enter_context(path.open("rb"))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{path} cannot be read ({reason}): give a readable file.") from error
        file: Any = raw
        if path.name.endswith(".gz"):
            file = stack.enter_context(gzip.open(raw))
        elif path.name.endswith(".zst"):
            import pyarrow

            stream = pyarrow.CompressedInputStream(raw, "zstd")
            file = stack.enter_context(io.BufferedReader(stream, 2**20))
        elif not is_local(path):  # an object's own readline takes no limit
            file = stack.enter_context(io.BufferedReader(raw, 2**20))  # type: ignore[type-var]
        yield file, raw


def _read(file: IO[bytes], where: str, *, line: bool = False, count: int = MAX_ROW + 1) -> bytes:
    try:
        return file.readline(count) if line else file.read(count)
    except _DAMAGED as error:
        raise UserError(
            f"{where}: the file is damaged or cut short from here on ({brief(error)}): fetch or "
            "write it again."
        ) from error


def _utf8(path: AnyPath) -> Callable[[bytes, str], str]:
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()

    def decode(content: bytes, where: str) -> str:
        try:
            return decoder.decode(content, not content)
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8 from here on: save it as UTF-8.") from None

    return decode


def _first_byte(path: AnyPath) -> bytes:
    with _opened(path) as (file, _):
        return _read(file, f"{path}:1", count=1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _value(record: dict[str, Any], key: str, where: str) -> Any:
    if key not in record:
        raise UserError(f'{where}: the key "{key}" is missing: add it.')
    return record[key]


def _loads(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
