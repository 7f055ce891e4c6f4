"""Tables on the local disk that are read in place: texts, and lists of numbers.

A table is two files: what all rows hold, back to back, and where each row ends. It is written by
appending; after a crash, whatever was written behind the last commit is cut off.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, overload

import numpy as np

from corrector_jax.types import UserError

_CHUNK = 2**24  # bytes hashed at once


class Texts(Sequence[str]):
    """A list of texts on disk: a text is decoded when it is asked for.

    Raises:
      UserError: a text is no UTF-8, and so not what was written.
    """

    def __init__(self, path: Path, known_digest: str = "") -> None:
        """Opens a table.

        Args:
          path: of its files, without .data and .ends.
          known_digest: in hex, what `digest` gives; '' = it is made when asked for.

        Raises:
          UserError: the files do not fit together.
        """
        self._path = path
        self._data, self._ends = _open(path, np.uint8)
        try:
            self._digest = bytes.fromhex(known_digest)
        except (TypeError, ValueError) as error:
            raise damaged(_data(path)) from error

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(start, stop, step)]
            return list(self._between(start, stop))
        found = range(len(self))[index]  # as a list has it: counts from the end, IndexError
        start = self._ends[found - 1] if found else 0
        return self._decoded(self._data[start : self._ends[found]].tobytes())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 4096):
            yield from self._between(start, min(start + 4096, len(self)))

    def digest(self) -> bytes:
        """That of `digest(list(self))`, without decoding anything."""
        if self._digest:
            return self._digest
        content, lengths = hashlib.sha256(), hashlib.sha256()
        for start in range(0, len(self._data), _CHUNK):
            content.update(self._data[start : start + _CHUNK].tobytes())
        before = 0
        for start in range(0, len(self._ends), _CHUNK // 8):
            ends = self._ends[start : start + _CHUNK // 8]
            lengths.update(np.diff(ends, prepend=before).astype("<i8").tobytes())
            before = ends[-1]
        return hashlib.sha256(content.digest() + lengths.digest()).digest()

    def _between(self, start: int, stop: int) -> Iterator[str]:
        at = int(self._ends[start - 1]) if start else 0
        ends = self._ends[start:stop].tolist()
        content = self._data[at : ends[-1] if ends else at].tobytes()
        begin = at
        for end in ends:
            yield self._decoded(content[begin - at : end - at])
            begin = end

    def _decoded(self, content: bytes) -> str:
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError as error:
            raise damaged(_data(self._path)) from error


class Numbers(Sequence[np.ndarray]):
    """A list of arrays int32 on disk, of any lengths."""

    def __init__(self, path: Path, *, below: int | None = None) -> None:
        """Opens the table whose files are `path`.data and `path`.ends.

        Args:
          path: of its files, without .data and .ends.
          below: all numbers are at least 0 and below it; None = they are any.

        Raises:
          UserError: they do not fit together, or hold another number.
        """
        self._data, self._ends = _open(path, np.int32)
        least, most = self._data.min(initial=0), self._data.max(initial=0)
        if below is not None and not 0 <= least <= most < max(below, 1):
            raise damaged(_data(path))

    def lengths(self) -> np.ndarray:
        """How many numbers each row holds: [n] int64."""
        return np.diff(self._ends, prepend=0)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        """Row `index`: [any] int32."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        found = range(len(self))[index]
        start = self._ends[found - 1] if found else 0
        return np.asarray(self._data[start : self._ends[found]])


class Appender:
    """Writes a table by appending to it."""

    def __init__(self, path: Path, position: Sequence[int] = (0, 0)) -> None:
        """Opens or makes the table `path`.{data,ends}.

        Args:
          path: without the ends of the two files.
          position: as `commit` returned it; what was written later is cut off.

        Raises:
          UserError: less is there than at that position.
        """
        self._files: list[IO[bytes]] = []
        for end, size in zip(("data", "ends"), position, strict=True):
            file = path.with_name(f"{path.name}.{end}").open("ab")
            self._files.append(file)
            if file.tell() < size:  # longer it may be: what a killed process wrote behind
                self.close()
                raise damaged(_data(path))
            file.truncate(size)
            file.seek(size)
        self._size = position[0]

    def texts(self, texts: Iterable[str]) -> None:
        """Appends texts."""
        self.blobs([text.encode() for text in texts])

    def numbers(self, rows: Iterable[Iterable[int]]) -> None:
        """Appends rows of numbers."""
        self.blobs([np.array(list(row), np.int32).tobytes() for row in rows], width=4)

    def blobs(self, contents: list[bytes], width: int = 1) -> None:
        """Appends rows as they are; `width` is the bytes of an entry."""
        data, ends = self._files
        data.write(b"".join(contents))
        found = self._size + np.cumsum([len(content) for content in contents], dtype=np.int64)
        ends.write((found // width).astype("<i8").tobytes())
        if len(found):
            self._size = int(found[-1])

    def commit(self) -> list[int]:
        """Brings everything to the disk, and says where the table ends: bytes of the two files."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return [file.tell() for file in self._files]

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            file.close()


def digest(texts: Sequence[str]) -> bytes:
    """Sha256 of texts and their order, the same for a list and for a table that holds it."""
    if isinstance(texts, Texts):
        return texts.digest()
    content, lengths = hashlib.sha256(), hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        content.update(encoded)
        lengths.update(len(encoded).to_bytes(8, "little"))
    return hashlib.sha256(content.digest() + lengths.digest()).digest()


def _open(path: Path, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    try:
        data, ends = (
            _mapped(path.with_name(f"{path.name}.{end}"), np.dtype(kind))
            for end, kind in (("data", dtype), ("ends", "<i8"))
        )
    except (OSError, ValueError) as error:  # gone, or not of whole numbers
        raise damaged(_data(path), error) from error
    fits = len(data) == (ends[-1] if len(ends) else 0)
    if not fits or (len(ends) and ends[0] < 0) or (ends[1:] < ends[:-1]).any():
        raise damaged(_data(path))
    return data, ends


def _data(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def damaged(path: Path, error: Exception | None = None) -> UserError:
    """What is said of a table that is not as it was written, or of a file beside it.

    Args:
      path: the file.
      error: how that came up; a file that cannot be read just now is not damaged.
    """
    if isinstance(error, OSError | MemoryError) and not isinstance(error, FileNotFoundError):
        reason = getattr(error, "strerror", None) or type(error).__name__
        return UserError(f"{path} cannot be read ({reason}): make it readable, or try again.")
    return UserError(
        f"{path} is damaged: remove the folder {path.parent}, so that it is made anew."
    )


def _mapped(file: Path, dtype: np.dtype) -> np.ndarray:
    if not file.stat().st_size:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    # A plain array: every slice of a memmap object costs microseconds.
    return np.asarray(np.memmap(file, dtype, "r"))
