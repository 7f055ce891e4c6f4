"""Checkpoints: the training state, and beside it the cache, saved once per refresh.

    checkpoints/STEP/   state, and its position: step, ledger, seconds, which cache
    cache/STEP/         one snapshot of the cache, referred to by step and digest

A checkpoint never holds the cache: under `never` it would save the same gigabytes every time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from corrector_jax.cache import TargetCache
from corrector_jax.types import PyTree, UserError


@dataclasses.dataclass
class Position:
    """How far a run is, beside its state: saved with every checkpoint as JSON.

    Attributes:
      step: training steps done.
      seconds: wall-clock seconds of the run, earlier parts included.
      train_seconds: of those, in the training steps.
      metrics: bytes of metrics.jsonl; what is beyond them belongs to steps that are lost.
      data: fingerprint of the targets, queries and judgements trained on.
      cache: which snapshot of the cache the state was trained on.
      ledger: targets encoded, by purpose (docs/method.md, 7).
    """

    step: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    metrics: int = 0
    data: str = ""
    cache: dict[str, Any] | None = None
    ledger: dict[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(
            ("initial", "refresh", "encoded_with_grad", "encoded_without_grad", "evaluation"), 0
        )
    )


class Checkpoints:
    """The checkpoints of one workdir; saving is asynchronous and atomic."""

    def __init__(self, workdir: Path, *, keep: int = 2) -> None:
        """Opens the folder; what is there stays.

        Args:
          workdir: the run's folder.
          keep: how many checkpoints to keep, newest first.

        Raises:
          UserError: the folder cannot be written.
        """
        self._caches = workdir.absolute() / "cache"
        folder = workdir.absolute() / "checkpoints"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--workdir={workdir} cannot be written ({error.strerror}): name a folder that can"
            ) from error
        self._manager = ocp.CheckpointManager(
            folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )

    def latest(self) -> int | None:
        """The newest step that was saved whole, or None."""
        return self._manager.latest_step()

    def save(self, state: PyTree, position: Position) -> None:
        """Starts saving; returns once the arrays are copied, so that they may be donated.

        Args:
          state: the training state.
          position: everything else that resuming needs; its step names the checkpoint.
        """
        # Dropped while everything listed is whole: the step being written is listed too.
        self._manager.wait_until_finished()
        self._drop_unused_caches()
        self._manager.save(
            position.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                position=ocp.args.JsonSave(dataclasses.asdict(position)),
            ),
        )

    def position(self, step: int) -> Position:
        """The position of a checkpoint, without its state."""
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        return Position(**self._manager.restore(step, args=args)["position"])

    def resume(
        self, state: PyTree, cache: TargetCache | None, *, step: int
    ) -> tuple[PyTree, TargetCache | None, Position]:
        """Reads a checkpoint and the cache snapshot it refers to.

        Args:
          state: a state of the same shapes, dtypes and shardings.
          cache: a cache likewise, or None where the strategy has none.
          step: which checkpoint.

        Returns:
          The state, the cache and the position.

        Raises:
          UserError: the snapshot is missing or damaged.
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_abstract(state)), position=ocp.args.JsonRestore()
            ),
        )
        position = Position(**restored["position"])
        if cache is not None and position.cache is not None:
            cache = self.restore_cache(cache, position.cache)
        return restored["state"], cache, position

    def save_cache(self, cache: TargetCache, *, step: int) -> dict[str, Any]:
        """Saves a snapshot and waits for it: a checkpoint may refer to it from now on.

        Args:
          cache: the cache.
          step: the step before which it was made.

        Returns:
          The reference that `restore_cache` takes: step, rows with padding, and digest.
        """
        reference = {
            "step": step,
            "rows": cache.embeddings.shape[0],
            "digest": digest(cache),
        }
        path = self._caches / str(step)
        if path.exists():
            shutil.rmtree(path)  # left by a run that was cut off before it could refer to it
        with ocp.StandardCheckpointer() as saver:
            saver.save(path, cache)
        return reference

    def restore_cache(self, like: TargetCache, reference: dict[str, Any]) -> TargetCache:
        """Reads the snapshot a checkpoint refers to.

        Args:
          like: a cache of the same shapes, dtypes and shardings.
          reference: of `save_cache`.

        Returns:
          The cache, placed as `like` is.

        Raises:
          UserError: it is missing, of another mesh, or not the one that was saved.
        """
        path = self._caches / str(reference["step"])
        if not path.exists():
            raise UserError(
                f"{path} is missing, the cache snapshot the checkpoint was trained on: put it back "
                "or start anew in another --workdir"
            )
        if like.embeddings.shape[0] != reference["rows"]:
            raise UserError(
                f"{path} was saved on another number of devices ({reference['rows']} rows with "
                f"padding there, {like.embeddings.shape[0]} here): set --config.mesh.devices to "
                "the number the run began with"
            )
        with ocp.StandardCheckpointer() as saver:
            cache: TargetCache = saver.restore(path, _abstract(like))
        if digest(cache) != reference["digest"]:
            raise UserError(
                f"{path} does not have the digest its checkpoint names, so it was damaged or "
                "replaced: put the right snapshot back or start anew in another --workdir"
            )
        return cache

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        """Waits for what is being saved."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _drop_unused_caches(self) -> None:
        """Removes snapshots that no kept checkpoint refers to; the newest always stays."""
        if not self._caches.exists():
            return
        # A refresh before step t comes after the checkpoint of step t was saved, so a checkpoint
        # refers to the last snapshot of an earlier step than its own (or to the first).
        steps = sorted(int(path.name) for path in self._caches.iterdir() if path.name.isdigit())
        oldest = min(self._manager.all_steps(), default=0)
        needed = max((s for s in steps if s < oldest), default=0)
        for step in steps:
            if step < needed:
                shutil.rmtree(self._caches / str(step))


def digest(cache: TargetCache) -> str:
    """Sha256, in hex, of the cache's targets (padding left out): their bytes in row order."""
    seen = hashlib.sha256()
    for array in (cache.embeddings, cache.scale, cache.written_at):
        if array is None:
            continue
        shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
        for start, shard in sorted(shards.items()):
            # A copy: a live view would make the next donation of the cache copy it, silently.
            rows = np.array(shard.data[: max(0, cache.size - start)])
            seen.update(rows.tobytes())
    return seen.hexdigest()


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
