"""The corpus as tokens, made once: a table on the local disk that is read in place.

A table is known by all it depends on: tokenizer, prefix, length, and the corpus' content, which the
template is a part of. It is written shard by shard; a process that is killed loses the shard it was
at.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corrector_jax import paths
from corrector_jax.data.prepared import SHARD, enough_disk, writing
from corrector_jax.data.tables import damaged
from corrector_jax.data.tokenize import TextTokenizer, lengths, token_fingerprint
from corrector_jax.writer import progress, say

_CHUNK = 2**13  # texts between two signs of progress


class TokenTable(NamedTuple):
    """A corpus as tokens.

    Attributes:
      ids: [N, T] uint16 or int32, padded with the tokenizer's pad id; on the disk, not in memory.
      lengths: [N] int32, tokens of each target.
      fingerprint: hex digest of all that the table depends on.
    """

    ids: np.ndarray
    lengths: np.ndarray
    fingerprint: str


def token_table(
    texts: Sequence[str],
    tokenizer: TextTokenizer,
    *,
    name: str,
    content_fingerprint: str,
    template: str,
    prefix: str,
    max_len: int,
    folder: Path,
    keys: str = "data.target",
) -> TokenTable:
    """Tokenizes a corpus, unless that was done before.

    Args:
      texts: N texts, as `RetrievalData.target_texts`.
      tokenizer: turns them to tokens, in parallel.
      name: of the data; an earlier table of that name is what a new one is compared with.
      content_fingerprint: of ids and texts, as `RetrievalData.fingerprint`.
      template: what the texts were made with, named where it explains why a table is new.
      prefix: put before every text.
      max_len: T; longer texts lose their end.
      folder: where tables are kept, on a local disk.
      keys: what the configuration's keys of prefix and length begin with; a table is compared
        with those of its own.

    Returns:
      The table, [N, T].

    Raises:
      UserError: T leaves no room for text, or the disk is too small; whole shards are kept.
    """
    key = token_fingerprint(
        tokenizer, prefix=prefix, max_len=max_len, content_fingerprint=content_fingerprint
    )
    place = folder / key[:32]
    section, text = keys.split(".")
    made_of = {
        "name": name,
        "tokenizer": tokenizer.fingerprint,
        "target_template": template,
        f"{text}_prefix": prefix,
        f"{text}_max_len": max_len,
        "corpus": content_fingerprint,
    }
    if not (place / "manifest.json").exists():
        with writing(place):
            if not (place / "manifest.json").exists():  # another process may have made it
                changed = _changed(folder, made_of, section)
                if changed:
                    say(f"{name} is tokenized anew: {changed}")
                _write(place, texts, tokenizer, prefix=prefix, max_len=max_len)
                paths.write(place / "manifest.json", json.dumps(made_of, indent=1))
                (place / "progress.json").unlink(missing_ok=True)
    ids, lengths_of = (_opened(place / name) for name in ("ids.npy", "lengths.npy"))
    kind = tokenizer.encode([], max_len=max_len).dtype
    if (ids.shape, ids.dtype) != ((len(texts), max_len), kind):
        raise damaged(place / "ids.npy")
    counts = np.array(lengths_of)
    if (counts.shape, counts.dtype) != ((len(texts),), np.dtype("<i4")):
        raise damaged(place / "lengths.npy")
    if not 0 <= counts.min(initial=0) <= counts.max(initial=0) <= max_len:
        raise damaged(place / "lengths.npy")
    # A plain array: every slice of a memmap object costs microseconds.
    return TokenTable(np.asarray(ids), counts, key)


def _opened(path: Path) -> np.ndarray:
    """An array on the disk; of a .npy file alone, never of an archive or of objects."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # its header is parsed as Python, with all that Python may raise
        raise damaged(path, error) from error


def _write(
    place: Path, texts: Sequence[str], tokenizer: TextTokenizer, *, prefix: str, max_len: int
) -> None:
    example = tokenizer.encode([], max_len=max_len)
    shape = (len(texts), max_len)
    enough_disk(place, len(texts) * (max_len * example.itemsize + 4), "the tokens")
    file = place / "progress.json"
    done = _done(file, len(texts)) if file.exists() else 0
    with (
        (place / "ids.npy").open("ab") as ids_file,
        (place / "lengths.npy").open("ab") as lengths_file,
        progress("tokenizing", len(texts), "targets", done=done) as advance,
    ):
        # Written, not mapped: a disk that fills up is an error then, not the end of the process.
        for table, dtype, row in ((ids_file, example.dtype, max_len), (lengths_file, "<i4", 0)):
            header = _header(shape if row else shape[:1], np.dtype(dtype))
            if not done:
                table.truncate(0)
                table.write(header)
            else:
                end = len(header) + done * (row or 1) * np.dtype(dtype).itemsize
                if table.tell() < end:
                    raise damaged(file)
                table.truncate(end)
        for start in range(done, len(texts), SHARD):
            shard = texts[start : start + SHARD]
            for at in range(0, len(shard), _CHUNK):
                tokens = tokenizer.encode(shard[at : at + _CHUNK], max_len=max_len, prefix=prefix)
                ids_file.write(tokens.tobytes())
                lengths_file.write(lengths(tokens, tokenizer.pad_id).astype("<i4").tobytes())
                advance(len(tokens))
            for table in (ids_file, lengths_file):
                table.flush()
                os.fsync(table.fileno())
            paths.write(file, json.dumps({"done": start + len(shard)}))


def _done(file: Path, most: int) -> int:
    """How many texts a process tokenized that was killed."""
    try:
        done = paths.read_json(file)["done"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise damaged(file, error) from error
    if type(done) is not int or not 0 <= done <= most:
        raise damaged(file)
    return done


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What stands in front of an array of a .npy file."""
    buffer = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(buffer, {**described, "shape": shape})
    return buffer.getvalue()


def _changed(folder: Path, made_of: dict[str, Any], section: str) -> str:
    """How this table differs from the most similar one of the same name; '' = there is none."""
    before = []
    for file in folder.glob("*/manifest.json"):
        try:
            other = paths.read_json(file)
        except (OSError, ValueError):
            continue  # only what is needed has to be whole
        alike = isinstance(other, dict) and other.keys() == made_of.keys()
        if alike and other["name"] == made_of["name"]:
            keys = [key for key in made_of if other[key] != made_of[key]]
            before.append((len(keys), -file.stat().st_mtime, keys, other))
    if not before:
        return ""
    _, _, keys, other = min(before, key=lambda found: found[:2])
    if "target_template" in keys and "corpus" in keys:
        keys.remove("corpus")  # it is made with the template
    said = []
    for key in keys:
        if key in ("tokenizer", "corpus"):
            said.append(f"the {key} changed")
        else:
            of = "data" if key == "target_template" else section
            said.append(f"config.{of}.{key} was {other[key]!r} and is {made_of[key]!r}")
    return ", ".join(said)
