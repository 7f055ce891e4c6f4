"""The one place that turns a path as a user writes it into something to read and write.

A path without a scheme is local and a plain `pathlib.Path`. `gs://bucket/folder`, `s3://...`,
`memory://...` become a `UPath`, which has the same methods over fsspec. Object stores have no
rename and no append: nothing here or above relies on either, except on local disks.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any, TypeAlias

from upath import UPath

from corrector_jax.types import UserError

AnyPath: TypeAlias = Path | UPath

_INSTALL = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}


def make(text: str | AnyPath) -> AnyPath:
    """The path a user wrote.

    Args:
      text: a local path, where ~ is the home folder, or SCHEME://...

    Returns:
      A path; a local one is absolute.

    Raises:
      UserError: the scheme is unknown, or what reads it is not installed.
    """
    if not isinstance(text, str):
        return text
    if "://" not in text:
        return Path(text).expanduser().absolute()
    scheme = text.split("://")[0]
    try:
        path = UPath(text)
        path.fs  # noqa: B018 - made on first use, and made of what has to be installed
    except ImportError as error:
        raise UserError(
            f"{text} needs the package {_INSTALL.get(scheme, error.name)}: "
            f"pip install {_INSTALL.get(scheme, error.name)}"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{text}: {scheme}:// is not known here: write a local path, gs://BUCKET/FOLDER or "
            "s3://BUCKET/FOLDER"
        ) from error
    return path


def is_local(path: AnyPath) -> bool:
    """Whether a path is on a disk of this machine: rename, append and file locks work there."""
    return isinstance(path, Path)


def is_plain(name: str) -> bool:
    """Whether a name, as a file on the disk gives it, leads to nothing but a file beside it."""
    return name not in ("", ".", "..") and name == PurePath(name).name


def read_json(path: AnyPath) -> Any:
    """What a JSON file holds.

    Args:
      path: the file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not JSON, not UTF-8, or nested deeper than anybody writes.
    """
    return parse_json(path.read_bytes())


def parse_json(content: bytes) -> Any:
    """The same of a file's content."""
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write(path: AnyPath, content: str | bytes, *, together: bool = False) -> None:
    """Writes a file whole or not at all.

    Args:
      path: the file; folders that are missing on the way to it are made.
      content: what it holds from now on; a text is written as UTF-8.
      together: whether another process may be writing the same file.
    """
    with writing(path, together=together) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing(path: AnyPath, *, together: bool = False) -> Iterator[IO[bytes]]:
    """A file to write that is there once the block ends without an error, and not before.

    Args:
      path: the file; folders that are missing on the way to it are made.
      together: whether another process may be writing the same file.

    Yields:
      The open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(path, Path):
        content = io.BytesIO()
        yield content
        path.write_bytes(content.getvalue())  # an object appears whole, once its upload ends
        return
    # Beside it first, then over it: a reader sees the old file or the new one.
    # One name, so that what a killed process leaves is written over, unless two would share it.
    beside = path.with_name(f".{path.name}{'.' + secrets.token_hex(4) if together else ''}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def remove(path: AnyPath) -> None:
    """Removes a file or a folder with all it holds; one that is not there is no error."""
    if isinstance(path, Path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)


def move(source: AnyPath, target: AnyPath) -> None:
    """Moves a file or a folder within one file system; on an object store this copies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, Path):
        os.replace(source, str(target))
    else:
        source.fs.mv(source.path, UPath(target).path, recursive=True)


def free_bytes(path: AnyPath) -> int | None:
    """Bytes that can still be written below a path; None where there is no such limit."""
    if not isinstance(path, Path):
        return None
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
