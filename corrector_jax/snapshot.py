"""Snapshots of the cache on disk: rows in safetensors files, and a manifest that vouches for them.

    manifest.json              what made the rows, which rows lie where, sha256 of every file
    rows-FIRST.safetensors     "embeddings" [n, D], "written_at" [n], and "scale" [n] where used

Files hold whole rows of the corpus in order, without padding, so that any mesh, device count and
storage dtype can read them. The manifest is written last: a folder without one is no snapshot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from corrector_jax import cache as caches
from corrector_jax import distributed, paths
from corrector_jax.cache import TargetCache
from corrector_jax.paths import AnyPath
from corrector_jax.sharding import own_rows
from corrector_jax.types import UserError

FORMAT = 1
FILE_BYTES = 256 << 20
"""A file holds no more: it is what a host needs at once for writing and for reading."""

_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "I8": np.int8, "I32": np.int32}


class DamagedError(Exception):
    """Something saved is missing or no longer what was saved; says what, and no remedy."""


def save(
    folder: AnyPath, cache: TargetCache, *, step: int, made_by: dict[str, Any]
) -> dict[str, Any]:
    """Writes a snapshot; when this returns, it can be referred to.

    All processes call it together, and each writes the rows its own devices hold.

    Args:
      folder: what is there goes: it was left by a run cut off before it could refer to it.
      cache: the cache, [rows, D] split by row; it may be donated afterwards.
      step: the step before which it was made.
      made_by: field -> word or number, everything the rows depend on.

    Returns:
      The reference that `load` takes: step, and sha256 of the manifest.
    """
    if distributed.is_lead():
        paths.remove(folder)
    distributed.wait_for_all("the snapshot's folder is empty")
    files = []
    for start, rows in _pieces(cache):
        content = safetensors.numpy.save(rows)
        name = f"rows-{start:012d}.safetensors"
        paths.write(folder / name, content)
        files.append(
            {
                "file": name,
                "start": start,
                "stop": start + len(rows["written_at"]),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    if not distributed.is_alone():
        files = _of_all_processes(folder, files)
    if distributed.is_lead():
        manifest = {
            "format": FORMAT,
            "step": step,
            "size": cache.size,
            "dim": cache.embeddings.shape[1],
            "dtype": str(cache.embeddings.dtype),
            "made_by": made_by,
            "files": files,
        }
        paths.write(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    distributed.wait_for_all("the snapshot is whole")
    content = (folder / "manifest.json").read_bytes()
    return {"step": step, "sha256": hashlib.sha256(content).hexdigest()}


def load(
    folder: AnyPath,
    like: TargetCache,
    *,
    made_by: dict[str, Any],
    sha256: str = "",
    remedy: str,
) -> TargetCache:
    """Reads a snapshot onto any mesh, into any storage dtype.

    Args:
      folder: of `save`.
      like: a cache of the wanted shape, dtype and sharding; it is not touched.
      made_by: the fields the rows must agree with; a field that is not named here may differ.
      sha256: of the manifest, where it is known.
      remedy: ends the sentence of a refusal: what to write instead.

    Returns:
      The cache; its lengths are 1, as before any is measured.

    Raises:
      UserError: it is of another encoder or corpus: the message names the field.
      DamagedError: it is missing or not what was saved.
    """
    manifest = read_manifest(folder, sha256=sha256)
    expected = {"size": like.size, "dim": like.embeddings.shape[1]} | made_by
    there = {"size": manifest["size"], "dim": manifest["dim"]} | manifest["made_by"]
    for field, value in expected.items():
        if there.get(field) != value:
            raise UserError(
                f"{folder} was made with {field} {there.get(field)!r} but this run has {value!r}: "
                f"{remedy}"
            )
    reader = _Reader(folder, manifest)
    sharding = like.embeddings.sharding
    indices = sharding.addressable_devices_indices_map(like.embeddings.shape)
    parts: dict[str, list[jax.Array]] = {}
    for device, index in indices.items():
        assert index is not None
        start, stop, _ = index[0].indices(like.embeddings.shape[0])
        for name, rows in _share(reader, like, start, stop).items():
            parts.setdefault(name, []).append(jax.device_put(rows, device))

    def whole(name: str, of: Any) -> Any:
        if of is None:
            return None
        return jax.make_array_from_single_device_arrays(of.shape, of.sharding, parts[name])

    return TargetCache(
        embeddings=whole("embeddings", like.embeddings),
        scale=whole("scale", like.scale),
        written_at=whole("written_at", like.written_at),
        size=like.size,
        lengths=_ones(like.lengths),
    )


def _ones(like: jax.Array | None) -> jax.Array | None:
    if like is None:
        return None

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        (part,) = index or (slice(None),)
        return np.ones(len(range(*part.indices(like.shape[0]))), np.float32)

    return jax.make_array_from_callback(like.shape, like.sharding, shard)


def read_manifest(folder: AnyPath, *, sha256: str = "") -> dict[str, Any]:
    """The manifest of a snapshot.

    Args:
      folder: of `save`.
      sha256: what it must hash to; empty = not known.

    Raises:
      UserError: it is of a format this version does not read.
      DamagedError: it is missing or not what was saved.
    """
    path = folder / "manifest.json"
    try:
        content = path.read_bytes()
        manifest: dict[str, Any] = paths.parse_json(content)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise DamagedError(f"{path} is not JSON") from error
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise DamagedError(f"{path} is not the one its checkpoint was saved with")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(
            f"{path} has format {found!r} and this version reads {FORMAT}: use the version of "
            "corrector_jax that wrote it"
        )
    _check_files(path, manifest)
    return manifest


def _check_files(path: AnyPath, manifest: dict[str, Any]) -> None:
    """The files must hold every row once, and lie in the folder itself."""
    try:
        stops = [0, *(entry["stop"] for entry in manifest["files"])]
        starts = [*(entry["start"] for entry in manifest["files"]), manifest["size"]]
        named = all(
            paths.is_plain(entry["file"]) and isinstance(entry["sha256"], str)
            for entry in manifest["files"]
        )
        counts = [*stops, manifest["step"], manifest["dim"]]
        counts += [entry["bytes"] for entry in manifest["files"]]
        whole = starts == stops == sorted(stops) and isinstance(manifest["made_by"], dict)
        plain = all(type(count) is int and count >= 0 for count in counts)
    except KeyError as error:
        raise DamagedError(f"{path} lacks {error}") from error
    except TypeError as error:
        raise DamagedError(f"{path} is not what was saved ({error})") from error
    if not (named and whole and plain and isinstance(manifest.get("dtype"), str)):
        raise DamagedError(f"{path} does not name files of its own for every row")


def check(folder: AnyPath, *, sha256: str = "") -> Iterator[tuple[str, int, str]]:
    """Reads every file of a snapshot and holds it against the manifest.

    Args:
      folder: of `save`.
      sha256: of the manifest, where it is known.

    Yields:
      (file, its bytes, what is wrong with it or "").
    """
    reader = _Reader(folder, read_manifest(folder, sha256=sha256))
    for number, entry in enumerate(reader.files):
        try:
            reader.read(number)
            problem = ""
        except DamagedError as error:
            problem = str(error)
        yield entry["file"], entry["bytes"], problem


class _Reader:
    """Files of a snapshot, each read whole and held against its sha256; the last one is kept."""

    def __init__(self, folder: AnyPath, manifest: dict[str, Any]) -> None:
        self._folder, self._dim = folder, manifest["dim"]
        self.files: list[dict[str, Any]] = manifest["files"]
        self._held: tuple[int, dict[str, np.ndarray]] = (-1, {})

    def read(self, number: int) -> dict[str, np.ndarray]:
        if self._held[0] == number:
            return self._held[1]
        entry = self.files[number]
        path = self._folder / entry["file"]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DamagedError(f"{path} cannot be read ({error.strerror or error})") from error
        except ValueError as error:  # no file system has a file of that name
            raise DamagedError(f"{self._folder} has no file {entry['file']!r}") from error
        # Before anything in it is looked at.
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise DamagedError(f"{path} is not what was saved: its sha256 differs")
        try:
            tensors = {
                name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(
                    tensor["shape"]
                )
                for name, tensor in safetensors.deserialize(content)
            }
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise DamagedError(f"{path} holds no rows ({error})") from error
        rows = entry["stop"] - entry["start"]
        shapes = {"embeddings": (rows, self._dim), "written_at": (rows,), "scale": (rows,)}
        if tensors.keys() - {"scale"} != {"embeddings", "written_at"} or any(
            tensor.shape != shapes[name] for name, tensor in tensors.items()
        ):
            raise DamagedError(f"{path} holds other rows than its manifest says")
        self._held = (number, tensors)
        return tensors


def _pieces(cache: TargetCache) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(first row, arrays of some rows) of all targets in order, of at most FILE_BYTES each."""
    arrays = {
        "embeddings": cache.embeddings,
        "scale": cache.scale,
        "written_at": cache.written_at,
    }
    held = {name: own_rows(array) for name, array in arrays.items() if array is not None}
    row_bytes = cache.embeddings.dtype.itemsize * cache.embeddings.shape[1] + 8
    most = max(1, FILE_BYTES // row_bytes)
    for start in sorted(held["embeddings"]):
        count = min(held["embeddings"][start].shape[0], cache.size - start)
        for at in range(0, count, most):
            stop = min(at + most, count)
            # A copy: a live view would make the next donation of the cache copy it, silently.
            rows = {name: np.array(shards[start][at:stop]) for name, shards in held.items()}
            yield start + at, rows


def _of_all_processes(folder: AnyPath, files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The files that all processes wrote, in the order of their rows."""
    names = [folder / f"process-{number}.json" for number in range(jax.process_count())]
    paths.write(names[jax.process_index()], json.dumps(files))
    distributed.wait_for_all("every process wrote its rows")
    every = [entry for name in names for entry in paths.read_json(name)]
    distributed.wait_for_all("every process knows all files")
    paths.remove(names[jax.process_index()])
    return sorted(every, key=lambda entry: int(entry["start"]))


def _share(reader: _Reader, like: TargetCache, start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows [start, stop) of a padded cache, as one device holds them; padding is never written."""
    rows = stop - start
    share: dict[str, np.ndarray] = {
        "embeddings": np.zeros((rows, like.embeddings.shape[1]), like.embeddings.dtype),
        "written_at": np.full(rows, -1, np.int32),
    }
    if like.scale is not None:
        share["scale"] = np.ones(rows, np.float32)
    for number, entry in enumerate(reader.files):
        first, last = max(start, entry["start"]), min(stop, entry["stop"])
        if first >= last:
            continue
        held = {
            name: array[first - entry["start"] : last - entry["start"]]
            for name, array in reader.read(number).items()
        }
        if held["embeddings"].dtype != like.embeddings.dtype:
            values = caches.read(held["embeddings"], held.pop("scale", None))
            embeddings, scale = caches.stored(values, like.embeddings.dtype)
            held["embeddings"] = np.asarray(embeddings)
            if scale is not None:
                held["scale"] = np.asarray(scale)
        for name, array in held.items():
            share[name][first - start : last - start] = array
    return share
