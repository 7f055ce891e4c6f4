"""Ways to damage files: bytes and lines, values of JSON, headers, archives, and whole folders.

Everything is drawn from a `random.Random`, so that a case is known by its seed.
"""

from __future__ import annotations

import copy
import functools
import gzip
import io
import json
import os
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow

SECRET = "secret.json"
"""A file beside the folder that is read, which no name in that folder may lead to."""

_ODD = (
    *(b"", b" ", b"\0", b"\t", b"\r", b"\r\n", b"\n\n", b"\xef\xbb\xbf", b"\xff\xfe"),
    *(b"\xed\xa0\x80", b"\x1f", b"\x7f", b"\xc2\xa0"),
    *(b"\xe2\x80\xa8", b"\xc2\x85", b"\x1c", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b","),
    *(b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"null", b"true", b"1_0"),
    *(b"\xd9\xa3", b"9" * 5000, b"A" * 5000, b"[" * 50_000, b'{"a":' * 50_000, b"\\ud800"),
    *(b"../secret.json", b"../../secret.json", b"/", b".", b"..", b"(1,", b"9223372036854775808"),
)  # fmt: skip


def values(outside: Path) -> list[Any]:
    """What a value of JSON may be instead; some name a file beside the folder."""
    deep: Any = 0
    for _ in range(200):
        deep = [deep]
    return [
        *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308),
        *(float("nan"), float("inf"), "", " ", "a b", "\0", "\n", "\ud800", "A" * 3000, "1", "NaN"),
        *([], {}, [[]], [None], {"a": 1}, ["a", "a"], [1, "2"], [{}], deep, {"": {}}, "train"),
        *(f"../{SECRET}", f"../outside/{SECRET}", str(outside / SECRET), "..", ".", "/", "~", "//"),
        *("gs://bucket/file", "a/b", "lock", "manifest.json", "ids.pkl"),
    ]  # fmt: skip


def damage(rng: random.Random, folder: Path, outside: Path) -> str:
    """Damages one file of a folder, or the folder.

    Args:
      rng: decides how.
      folder: with files.
      outside: a folder beside it, with a file `SECRET`.

    Returns:
      What was done, in words.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    name = path.relative_to(folder).as_posix()
    if rng.random() < 0.12:
        how = rng.choice(_OF_FILES)
        how(rng, path, files, outside)
        return f"{how.__name__.lstrip('_')} {name}"
    content = path.read_bytes()
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind, content = _changed(rng, path.name, content, outside)
        done.append(kind)
    path.write_bytes(content)
    return f"{' and '.join(done)} in {name}"


def _changed(rng: random.Random, name: str, content: bytes, outside: Path) -> tuple[str, bytes]:
    """Damaged content, in a way that suits the file's name about half of the time."""
    for end, change in _OF_KIND.items():
        if name.endswith(end) and rng.random() < 0.6:
            try:
                return end, change(rng, content, outside)
            except Exception:  # by a mutation before, so much that its library cannot open it
                break
    if rng.random() < 0.4:
        return "text", text(rng, content, outside)
    how = rng.choice(_OF_BYTES)
    return how.__name__.lstrip("_"), how(rng, content)


def text(rng: random.Random, content: bytes, outside: Path) -> bytes:
    """JSON or columns, as a whole or one of the lines."""
    if rng.random() < 0.5 and len(content) < 2**16:
        try:
            return _json(rng, content, outside)
        except (ValueError, RecursionError):
            pass
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        lines[at] = _json(rng, lines[at], outside)
    except (ValueError, RecursionError):
        by = rng.choice((b"\t", b" ", b","))
        columns = lines[at].split(by)
        columns[rng.randrange(len(columns))] = rng.choice(_ODD)
        lines[at] = by.join(columns)
    return b"\n".join(lines)


def _json(rng: random.Random, content: bytes, outside: Path) -> bytes:
    """One value, key or item of JSON becomes another, goes, or stands twice."""
    tree = [json.loads(content)]  # a list around it: the outermost value has a place too
    places: list[tuple[Any, Any]] = []
    pending: list[Any] = [tree]
    while pending:
        node = pending.pop()
        inside = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in inside:
            places.append((node, key))
            if isinstance(value, dict | list):
                pending.append(value)
    node, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.6 or node is tree:
        node[key] = copy.deepcopy(rng.choice(values(outside)))
    elif kind < 0.75:
        del node[key]
    elif kind < 0.9:
        other, place = rng.choice(places)
        node[key] = copy.deepcopy(other[place])
    elif isinstance(node, dict):
        node[str(rng.choice(values(outside)))] = node[key]
    else:
        node.insert(key, copy.deepcopy(node[key]))
    return json.dumps(tree[0], ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")


def _safetensors(rng: random.Random, content: bytes, outside: Path) -> bytes:
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.2:
        huge = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1))
        return (huge % 2**64).to_bytes(8, "little") + content[8:]
    header = _json(rng, content[8 : 8 + length], outside)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _npy(rng: random.Random, content: bytes, outside: Path) -> bytes:
    end = content.index(b"\n") + 1
    header = content[10:end]
    word = rng.choice((b"descr", b"False", b"shape", b"<", b"(", b",", b")", b"4", b"i", b"u"))
    new = rng.choice((b"|O", b"99999999999999999999", b"(2,", b"-1", b"True", b"V8", b"'", b""))
    header = header.replace(word, new, 1)
    if rng.random() < 0.5:
        header = header[: end - 10].ljust(end - 10)
        return content[:10] + header + content[end:]
    return content[:8] + min(len(header), 2**16 - 1).to_bytes(2, "little") + header + content[end:]


def _gz(rng: random.Random, content: bytes, outside: Path) -> bytes:
    if rng.random() < 0.1:
        return bomb(rng.choice((0, ord("\n"), ord("["), ord("a"))))
    if len(content) > 2**17:
        raise ValueError("a bomb already: not unpacked here")
    inner = gzip.decompress(content)
    inner = text(rng, inner, outside) if rng.random() < 0.5 else rng.choice(_OF_BYTES)(rng, inner)
    return gzip.compress(inner, 1)


@functools.cache
def bomb(byte: int) -> bytes:
    """A .gz of 300 kB that unpacks to 256 MiB of one byte."""
    return gzip.compress(bytes([byte]) * 2**24, 9) * 16


def _zst(rng: random.Random, content: bytes, outside: Path) -> bytes:
    inner = pyarrow.CompressedInputStream(io.BytesIO(content), "zstd").read()
    if rng.random() < 0.1:
        inner = bytes([rng.choice((0, 10, 91))]) * 2**26
    else:
        inner = text(rng, inner, outside)
    buffer = io.BytesIO()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as file:
        file.write(inner)
        file.flush()
        return buffer.getvalue()


def _tar(rng: random.Random, content: bytes, outside: Path) -> bytes:
    """Members under other names, as links or devices, twice, or bombs."""
    buffer = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as old,
        tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as new,
    ):
        members = old.getmembers()
        chosen = rng.randrange(len(members))
        for number, member in enumerate(members):
            # By a mutation before it may be a link by now, or a device.
            data = old.extractfile(member) if member.isfile() else None
            inner = data.read() if data else b""
            if number == chosen:
                kind = rng.choice(("name", "absolute", "link", "device", "bomb", "text", "twice"))
                evil = tarfile.TarInfo(f"../{SECRET}")
                evil.size = 4
                if kind == "absolute":
                    evil.name = str(outside / SECRET)
                new.addfile(evil, io.BytesIO(b"evil"))
                if kind == "link":
                    member.type, member.linkname = tarfile.SYMTYPE, str(outside / SECRET)
                    member.size, inner = 0, b""
                elif kind == "device":
                    member.type, member.size, inner = tarfile.CHRTYPE, 0, b""
                elif kind == "bomb":
                    inner = b"\0" * 2**28
                elif kind == "text":
                    inner = text(rng, inner, outside)
                elif kind == "twice":
                    member.size = len(inner)
                    new.addfile(member, io.BytesIO(inner))
            member.size = len(inner)
            new.addfile(member, io.BytesIO(inner))
    return buffer.getvalue()


def _zip(rng: random.Random, content: bytes, outside: Path) -> bytes:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        names = sorted(set(old.namelist()))
        chosen = rng.choice(names)
        for name in names:
            inner = old.read(name)
            if name == chosen:
                kind = rng.choice(("evil", "bomb", "text", "gone"))
                new.writestr(f"../{SECRET}", "evil")
                new.writestr(str(outside / SECRET), "evil")
                if kind == "gone":
                    continue
                if kind == "bomb":
                    inner = b"\0" * 2**28
                elif kind == "text":
                    inner = text(rng, inner, outside)
            new.writestr(name, inner)
    packed = bytearray(buffer.getvalue())
    if rng.random() < 0.2:  # encrypted, or packed in a way that nobody knows
        at = rng.choice((6, 8))
        packed[at] ^= 1 << rng.randrange(8)
        central = packed.find(b"PK\1\2")
        packed[central + at + 2] = packed[at]
    return bytes(packed)


_OF_KIND: dict[str, Callable[[random.Random, bytes, Path], bytes]] = {
    ".tar.gz": _tar,
    ".zip": _zip,
    ".gz": _gz,
    ".zst": _zst,
    ".safetensors": _safetensors,
    ".npy": _npy,
    ".json": _json,
}


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(rng.choice((1, 1, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _behead(rng: random.Random, content: bytes) -> bytes:
    return content[rng.randrange(len(content) + 1) :]


def _empty(rng: random.Random, content: bytes) -> bytes:
    return b""


def _splice(rng: random.Random, content: bytes) -> bytes:
    """A piece goes, or comes again somewhere else."""
    one, other, at = (rng.randrange(len(content) + 1) for _ in range(3))
    piece = content[min(one, other) : max(one, other)]
    if rng.random() < 0.5:
        return content[: min(one, other)] + content[max(one, other) :]
    return content[:at] + piece + content[at:]


def _insert(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(_ODD) + content[at:]


def _overwrite(rng: random.Random, content: bytes) -> bytes:
    """Some bytes become a length nobody has, or noise."""
    at = rng.randrange(len(content) + 1)
    count = rng.choice((1, 4, 8, 8))
    new = rng.choice((b"\xff" * count, b"\0" * count, b"\x7f" * count, rng.randbytes(count)))
    return content[:at] + new + content[at + count :]


def _lines(rng: random.Random, content: bytes) -> bytes:
    """Lines change places, stand twice, or go."""
    lines = content.split(b"\n")
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(3)
    if kind == 0:
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == 1:
        lines.insert(other, lines[one])
    else:
        del lines[one]
    return b"\n".join(lines)


def _noise(rng: random.Random, content: bytes) -> bytes:
    return rng.randbytes(rng.choice((1, 16, 1000)))


_OF_BYTES = (_flip, _truncate, _behead, _empty, _splice, _insert, _overwrite, _lines, _noise)


def _remove(rng: random.Random, path: Path, files: list[Path], outside: Path) -> None:
    path.unlink()


def _folder(rng: random.Random, path: Path, files: list[Path], outside: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(rng: random.Random, path: Path, files: list[Path], outside: Path) -> None:
    path.unlink()
    path.symlink_to(rng.choice((outside / SECRET, outside / "nowhere", path, outside)))


def _exchange(rng: random.Random, path: Path, files: list[Path], outside: Path) -> None:
    shutil.copyfile(rng.choice(files), beside := path.with_name("beside"))
    os.replace(beside, path)


def _twin(rng: random.Random, path: Path, files: list[Path], outside: Path) -> None:
    end = rng.choice((".gz", ".zst", ".pkl", ".tmp", ".jsonl", ".json", "~"))
    shutil.copyfile(path, path.with_name(path.name + end))


_OF_FILES = (_remove, _folder, _link, _exchange, _twin)
