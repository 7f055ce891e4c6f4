"""Approximate search over the stale cache on the host: a ScaNN index of the rows it holds.

    cache/STEP/index-P-of-PROCESSES/   what ScaNN wrote, and index.json with the sha256 of each file

An index finds the likeliest targets of a query without a sweep (docs/method.md, 3, ScaNN path).
Building is deterministic, whatever the number of threads, and so is searching: an index that is
lost is made anew from the same rows, and nothing changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from corrector_jax import cache as caches
from corrector_jax import paths
from corrector_jax.cache import TargetCache
from corrector_jax.paths import AnyPath
from corrector_jax.sharding import own_rows
from corrector_jax.snapshot import DamagedError

FORMAT = 1
SMALL = 10_000
"""Fewer rows than these are scored one by one: that takes as long as looking for their leaves."""

_AT_ONCE = 1 << 16  # rows converted at once while they are read
_PER_THREAD = 16  # queries


class Parameters(NamedTuple):
    """How an index is built and searched.

    Attributes:
      leaves: parts that rows are clustered into; 1 = none, every row is scored exactly.
      searched: leaves looked into for a query.
      reorder: rows of these leaves, the best by quantised score, that are scored exactly.
    """

    leaves: int
    searched: int
    reorder: int


def parameters(
    size: int, k: int, *, leaves: int = 0, searched: int = 0, reorder: int = 0
) -> Parameters:
    """What suits some number of rows, where it is not said.

    sqrt(size) leaves, of which twice the square root are looked into, 36 of 316 at 100,000 rows and
    135 of 4,584 at 21 million, but no fewer than hold eight times as many rows as are wanted. Four
    times as many as are wanted are scored exactly.

    Args:
      size: rows; 0 where a process's devices hold padding alone.
      k: how many of them a query wants.
      leaves: 0 = from `size`.
      searched: 0 = from `leaves` and `k`.
      reorder: 0 = from `k`.

    Returns:
      The parameters, none of them more than there is.
    """
    size = max(size, 1)
    leaves = min(leaves or (1 if size < SMALL else round(size**0.5)), size)
    if leaves == 1:
        return Parameters(1, 1, 0)
    searched = min(searched or max(round(2 * leaves**0.5), -(-8 * k * leaves // size)), leaves)
    return Parameters(leaves, searched, min(max(reorder or 4 * k, k), size))


@dataclasses.dataclass(frozen=True)
class Index:
    """Rows to search by inner product, of `build` or `load`.

    Attributes:
      searcher: ScaNN's; None where there are no rows.
      ids: [n] int32, the numbers of its rows among all targets.
      parameters: of these `leaves` is how it was built, the others how it is searched.
    """

    searcher: Any
    ids: np.ndarray
    parameters: Parameters

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows with the largest inner products, or nearly so.

        A query's results depend on nothing but the query.

        Args:
          queries: [B, D] float32; one that is not finite finds nothing.
          k: at most the k the index was built for.

        Returns:
          Ids [B, k] int32, best first, -1 where there are no more; scores [B, k] float32, -inf
          there.
        """
        if not len(self.ids):
            nothing = np.full((len(queries), k), -1, np.int32)
            return nothing, np.full(nothing.shape, -np.inf, np.float32)
        finite = np.isfinite(queries).all(axis=1, keepdims=True)
        leaves, searched, reorder = self.parameters
        found, scored = self.searcher.search_batched_parallel(
            np.where(finite, queries, 0).astype(np.float32),
            final_num_neighbors=k,
            leaves_to_search=searched if leaves > 1 else None,
            pre_reorder_num_neighbors=reorder if leaves > 1 else None,
            batch_size=_PER_THREAD,
        )
        there = finite & np.isfinite(scored)
        ids = np.full((len(queries), k), -1, np.int32)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        ids[:, : found.shape[1]] = np.where(there, self.ids[found], -1)
        scores[:, : found.shape[1]] = np.where(there, scored, -np.inf)
        return ids, scores

    def save(self, folder: AnyPath, *, cache: str) -> None:
        """Writes the index, if it takes time to build; `index.json` comes last.

        Args:
          folder: what is there goes.
          cache: sha256 of the manifest of the snapshot it was built from.
        """
        paths.remove(folder)
        if self.parameters.leaves == 1:
            return
        folder.mkdir(parents=True)
        with _on_disk(folder) as place:
            self.searcher.serialize(str(place), relative_path=True)
            files = {path.name: _sha256(path) for path in sorted(place.iterdir())}
            if place != folder:
                for name in files:
                    paths.write(folder / name, (place / name).read_bytes())
        manifest = {"format": FORMAT, **_named(self.parameters, self.ids, cache), "files": files}
        paths.write(folder / "index.json", json.dumps(manifest, indent=2) + "\n")


def merge(ids: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
    """The best of what several indices of different rows found.

    Args:
      ids: [P, B, k'] int32, of P indices; -1 = none.
      scores: [P, B, k'] float32, -inf where there is none.
      k: how many are kept.

    Returns:
      [B, k] int32, best first; of equal scores the lower row.
    """
    ids, scores = (np.moveaxis(x, 0, 1).reshape(x.shape[1], -1) for x in (ids, scores))
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(ids, order, axis=1)


def why_not() -> str:
    """Why ScaNN cannot be used here, in a few words; empty where it can."""
    try:
        _scann()
    except Exception as error:  # beside another TensorFlow than its own it is no ImportError
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return ""


def build(ids: np.ndarray, rows: np.ndarray, *, k: int, made: Parameters) -> Index:
    """Clusters and quantises rows: seconds for 100,000 of them, minutes for millions.

    Args:
      ids: [n] int32, their numbers among all targets.
      rows: [n, D] float32; ScaNN keeps a copy.
      k: the most results a query will want.
      made: of `parameters`.
    """
    if not len(rows):
        return Index(None, ids, made)
    builder = _scann().builder(rows, min(k, len(rows)), "dot_product")
    if made.leaves == 1:
        return Index(builder.score_brute_force().build(), ids, made)
    searcher = (
        builder.tree(
            num_leaves=made.leaves,
            num_leaves_to_search=made.searched,
            training_sample_size=min(len(rows), 100_000),
            random_init=False,  # k-means++ has a seed; the other start depends on addresses
        )
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(made.reorder)
        .build()
    )
    return Index(searcher, ids, made)


def load(folder: AnyPath, ids: np.ndarray, *, cache: str, made: Parameters) -> Index:
    """Reads an index back; it finds what it found when it was saved.

    Args:
      folder: of `Index.save`.
      ids: [n] int32, the rows it must be of.
      cache: sha256 of the manifest of the snapshot it must be of.
      made: the parameters it must have.

    Raises:
      DamagedError: it is missing, of something else, or not what was saved.
    """
    manifest, files = _manifest(folder)
    if manifest != {"format": FORMAT, **_named(made, ids, cache)}:
        raise DamagedError(f"{folder} is an index of something else")
    _require_whole(folder, files)
    with _on_disk(folder) as place:
        if place != folder:
            for name in files:
                (place / name).write_bytes((folder / name).read_bytes())
        return Index(_scann().load_searcher(str(place)), ids, made)


def check(folder: AnyPath) -> int:
    """Holds the files of a saved index against their digests.

    Args:
      folder: of `Index.save`.

    Returns:
      Their bytes.

    Raises:
      DamagedError: it is not what was saved.
    """
    _, files = _manifest(folder)
    _require_whole(folder, files)
    return sum((folder / name).stat().st_size for name in files)


def _manifest(folder: AnyPath) -> tuple[dict[str, Any], dict[str, str]]:
    """What index.json says, and the files it names with their digests."""
    try:
        manifest = paths.read_json(folder / "index.json")
        return manifest, dict(manifest.pop("files"))
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder} holds no index ({type(error).__name__})") from error


def _require_whole(folder: AnyPath, files: dict[str, str]) -> None:
    there = {path.name for path in folder.iterdir()} - {"index.json"}
    # Nothing but what was written: ScaNN would unpickle a file of ids, which is never one of ours.
    if there != set(files) or any(name.endswith(".pkl") for name in there):
        raise DamagedError(f"{folder} does not hold the files that were saved")
    for name, digest in files.items():
        try:
            same = _sha256(folder / name) == digest
        except OSError as error:
            raise DamagedError(f"{folder / name} cannot be read ({error.strerror})") from error
        if not same:
            raise DamagedError(f"{folder / name} is not what was saved: its sha256 differs")


def rows_here(cache: TargetCache) -> tuple[np.ndarray, np.ndarray]:
    """The targets whose rows are on this process's devices.

    Args:
      cache: the cache, split by row.

    Returns:
      Ids [n] int32, rising, and their rows [n, D] float32 on the host, copied.
    """
    ids = [np.zeros(0, np.int32)]
    parts = [np.zeros((0, cache.embeddings.shape[1]), np.float32)]
    scales = {} if cache.scale is None else own_rows(cache.scale)
    for first, shard in sorted(own_rows(cache.embeddings).items()):
        count = min(shard.shape[0], cache.size - first)
        for at in range(0, count, _AT_ONCE):
            stop = min(at + _AT_ONCE, count)
            scale = scales[first][at:stop] if scales else None
            # A copy: a live view would make the next donation of the cache copy it, silently.
            parts.append(np.array(caches.read(shard[at:stop], scale)))
            ids.append(np.arange(first + at, first + stop, dtype=np.int32))
    return np.concatenate(ids), np.concatenate(parts)


def _scann() -> Any:
    # With TensorFlow beside it, ScaNN also loads operations that fit one version alone.
    hide = "tensorflow" not in sys.modules
    if hide:
        sys.modules["tensorflow"] = None  # type: ignore[assignment]
    try:
        import scann
    finally:
        if hide:
            del sys.modules["tensorflow"]
    return scann.scann_ops_pybind


def _named(made: Parameters, ids: np.ndarray, cache: str) -> dict[str, Any]:
    """What an index is an index of."""
    return {
        "parameters": made._asdict(),
        "rows": hashlib.sha256(ids.tobytes()).hexdigest(),
        "cache": cache,
    }


@contextlib.contextmanager
def _on_disk(folder: AnyPath) -> Iterator[Path]:
    """The folder itself where it is local, else one to copy from or to: ScaNN knows files alone."""
    if isinstance(folder, Path):
        yield folder
    else:
        with tempfile.TemporaryDirectory() as place:
            yield Path(place)


def _sha256(path: AnyPath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
