"""Checkpoints: the training state, and beside it the cache.

    checkpoints/STEP/   state, and its position: step, ledger, seconds, which cache (Orbax)
    cache/STEP/         one snapshot of the cache, referred to by step and sha256 (snapshot.py)
    damaged/            checkpoints that turned out not to be what was saved, set aside

A checkpoint refers to a snapshot: under `never` all of them to the same gigabytes, saved once.
Where steps write rows, each has a snapshot of its own.
Orbax commits a step with a rename on disks and with a marker file on object stores; either way a
step that is listed is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from corrector_jax import digest, distributed, paths, snapshot
from corrector_jax.cache import TargetCache
from corrector_jax.paths import AnyPath
from corrector_jax.snapshot import DamagedError
from corrector_jax.types import PyTree, UserError, brief

FORMAT = 1


@dataclasses.dataclass
class Position:
    """How far a run is, beside its state: saved with every checkpoint as JSON.

    Attributes:
      step: training steps done.
      seconds: wall-clock seconds of the run, earlier parts included.
      train_seconds: of those, in the training steps.
      times: of those, by what they were spent on.
      metrics: bytes of metrics.jsonl; what is beyond them belongs to steps that are lost.
      log: the row of metrics.jsonl that is not full yet, as `writer.StepLog` keeps it.
      dev: step -> mrr@10 of the evaluations during training: a run that is stopped before one
        that is due makes it when it goes on.
      skipped: the steps whose loss or gradients were not finite, which changed nothing.
      data: fingerprint of the targets, queries and judgements trained on.
      cache: which snapshot of the cache the state was trained on: its step and sha256.
      embedded_at: the step before which the whole cache was embedded last.
      error: relative squared error of what selection uses, at the newest probe since then.
      candidates: rows found for each query of the next batch, [B][K], where there are any.
      ledger: targets encoded, by purpose (docs/method.md, 7).
    """

    step: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    times: dict[str, float] = dataclasses.field(default_factory=dict)
    metrics: int = 0
    log: dict[str, Any] = dataclasses.field(default_factory=dict)
    dev: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped: list[int] = dataclasses.field(default_factory=list)
    data: str = ""
    cache: dict[str, Any] | None = None
    embedded_at: int = 0
    error: float | None = None
    candidates: list[list[int]] | None = None
    ledger: dict[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(
            ("initial", "refresh", "encoded_with_grad", "encoded_without_grad", "evaluation"), 0
        )
    )


class _Best(preservation_policy.PreservationPolicy):
    """Keeps the checkpoint with the largest metric, which may be known only after it was saved."""

    def __init__(self) -> None:
        self.metrics: dict[int, float] = {}

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        known = [step for step in steps if step in self.metrics]
        best = max(known, key=lambda step: self.metrics[step], default=None)
        return [step == best for step in steps]


class Checkpoints:
    """The checkpoints of one workdir; saving is asynchronous and atomic."""

    def __init__(
        self,
        workdir: AnyPath,
        policy: preservation_policy.PreservationPolicy | None,
        best: _Best | None = None,
    ) -> None:
        """Opens the folder; use `writable` or `readable`."""
        self._workdir, self._best = workdir, best or _Best()
        self._folder = workdir / "checkpoints"
        self._caches = workdir / "cache"
        self._snapshots: dict[int, int | None] = {}
        self._gave_up = False
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quiet())
        options = ocp.CheckpointManagerOptions(
            read_only=policy is None,
            create=False,
            preservation_policy=policy,
            cleanup_tmp_directories=policy is not None,
        )
        handlers = {
            # Weights hardly compress (8 %), and it would take half of a save's time on the host.
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),
            "position": ocp.JsonCheckpointHandler(),
        }
        try:
            self._manager = ocp.CheckpointManager(
                str(self._folder), options=options, item_handlers=handlers
            )
        except Exception as error:
            self._quiet.close()
            of_a_file = isinstance(error, ArithmeticError | RecursionError | TypeError | ValueError)
            if not of_a_file or distributed.is_loss(error):
                raise
            # Orbax reads this file of every checkpoint here.
            raise UserError(
                f"{self._folder}/*/_CHECKPOINT_METADATA: one of them is not what was saved "
                f"({brief(error)}): remove it, the rest of its checkpoint is read without"
            ) from error

    @classmethod
    def writable(
        cls, workdir: AnyPath, *, keep: int = 2, keep_every: int = 0, keep_best: bool = False
    ) -> Checkpoints:
        """Opens a workdir to save in, and makes it if need be; what is there stays.

        Args:
          workdir: the run's folder: local or gs://.
          keep: how many checkpoints to keep, newest first.
          keep_every: keep also those of every so many steps; 0 = none of them.
          keep_best: keep also the one with the largest metric in `Position.dev`.

        Raises:
          UserError: the folder cannot be written.
        """
        if not paths.is_local(workdir) and not str(workdir).startswith("gs://"):
            raise UserError(
                f"--workdir={workdir}: checkpoints are written to local disks and to gs:// only: "
                "name a folder there"
            )
        try:
            (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--workdir={workdir} cannot be written ({error.strerror or error}): name a folder "
                "that can"
            ) from error
        policies: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(keep)]
        if keep_every:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        best = _Best()
        if keep_best:
            policies.append(best)
        return cls(workdir, preservation_policy.AnyPreservationPolicy(policies), best)

    @classmethod
    def readable(cls, workdir: AnyPath) -> Checkpoints:
        """Opens a workdir to read from; nothing in it is touched, whoever else writes there.

        Raises:
          UserError: it holds no checkpoints.
        """
        if not (workdir / "checkpoints").is_dir():
            raise UserError(f"{workdir} holds no checkpoint: --workdir must be the folder of a run")
        return cls(workdir, None)

    def steps(self) -> list[int]:
        """The steps that were saved whole, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: PyTree, position: Position) -> None:
        """Starts saving; returns once the arrays are copied, so that they may be donated.

        Args:
          state: the training state.
          position: everything else that resuming needs; its step names the checkpoint.

        Raises:
          UserError: the disk is full, or the workdir cannot be written any more.
        """
        with self._writing():
            # Dropped while everything listed is whole: the step being written is listed too.
            self._manager.wait_until_finished()
            self._require_space(state)
            self._drop_unused_snapshots({position.cache["step"] if position.cache else None})
            self._best.metrics = {int(step): metric for step, metric in position.dev.items()}
            content = {
                "format": FORMAT,
                "position": dataclasses.asdict(position),
                "leaves": digest.leaves(state),
            }
            self._manager.save(
                position.step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    position=ocp.args.JsonSave({**content, "sha256": _sha256(content)}),
                ),
            )
        self._snapshots[position.step] = position.cache["step"] if position.cache else None

    def wait(self) -> None:
        """Waits until what is being saved is whole.

        Raises:
          UserError: as `save`.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def read(self, step: int) -> tuple[Position, dict[str, Any]]:
        """A checkpoint without its arrays.

        Args:
          step: which one.

        Returns:
          Its position, and of every leaf of its state the dtype, shape and digest.

        Raises:
          UserError: it is of a format this version does not read.
          DamagedError: it is missing or not what was saved.
        """
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        content = self._restore(step, args)["position"]
        if not isinstance(content, dict) or "sha256" not in content:
            if isinstance(content, dict) and {"step", "ledger"} <= content.keys():
                raise UserError(
                    f"{self._folder / str(step)} has format 0 and this version reads {FORMAT}: use "
                    "corrector_jax before checkpoints had digests, or train anew in another "
                    "--workdir"
                )
            raise DamagedError(f"{self._folder / str(step)} holds no position")
        if content.get("format") != FORMAT:
            raise UserError(
                f"{self._folder / str(step)} has format {content.get('format')!r} and this version "
                f"reads {FORMAT}: use the version of corrector_jax that wrote it"
            )
        sha256 = content.pop("sha256")
        if _sha256(content) != sha256:
            raise DamagedError(f"{self._folder / str(step)}: its position is not what was saved")
        held: Any = content.get("position")
        known = {field.name for field in dataclasses.fields(Position)}
        if isinstance(held, dict) and (strange := held.keys() - known):
            raise UserError(
                f"{self._folder / str(step)} has {brief(min(strange))}, which this version does "
                "not know: use the version of corrector_jax that wrote it"
            )
        try:
            # Before any step wrote rows, a snapshot was always the whole cache embedded anew.
            held.setdefault("embedded_at", held["cache"]["step"] if held["cache"] else 0)
            position = Position(**held)
            self._snapshots[step] = int(position.cache["step"]) if position.cache else None
            leaves = {path: [*leaf] for path, leaf in content["leaves"].items()}
            if position.cache and not isinstance(position.cache["sha256"], str):
                raise TypeError("sha256")
            if any(len(leaf) != 3 for leaf in leaves.values()):
                raise TypeError("leaves")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedError(
                f"{self._folder / str(step)}: its position is not what was saved ({brief(error)})"
            ) from error
        return position, leaves

    def resume(
        self,
        state: PyTree,
        cache: TargetCache | None,
        *,
        data: str,
        made_by: dict[str, Any],
        step: int | None = None,
        say: Callable[[str], None] = print,
        set_aside: bool = False,
    ) -> tuple[PyTree, TargetCache | None, Position]:
        """Reads the newest checkpoint that is what was saved, and the snapshot it refers to.

        Args:
          state: a state of the same leaves, in the wanted shardings.
          cache: a cache of the wanted shape, storage dtype and sharding, or None where the
            strategy has none.
          data: fingerprint of the data at hand.
          made_by: what the rows of the cache must agree with.
          step: this checkpoint and no other; None = the newest that is good.
          say: told of every checkpoint that is not.
          set_aside: whether to move those that are newer to `damaged/`, so that their steps can
            be saved again.

        Returns:
          The state, the cache and the position.

        Raises:
          UserError: the checkpoint is of another run, version or data, or none is good.
        """
        problems: dict[int, str] = {}
        if step is not None and step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self._folder} has no checkpoint of step {step}: there is {there}")
        for candidate in [step] if step is not None else self.steps()[::-1]:
            read = functools.partial(
                self._resume, state, cache, step=candidate, data=data, made_by=made_by
            )
            for _ in range(2):  # a store that fails once is no damage: what fails twice is
                problem = ""
                try:
                    found = read()
                except DamagedError as error:
                    problem = str(error)
                problem = distributed.first_of(problem)  # of any process: they read together
                if not problem:
                    break
            if problem:
                problems[candidate] = problem
                say(f"WARNING: the checkpoint of step {candidate:,} is damaged: {problem}")
                continue
            # Not before: if none is good, a file that is put back makes all of them good again.
            for damaged in problems if set_aside else ():
                say(f"WARNING: {self._set_aside(damaged)} holds the one of step {damaged:,} now")
            return found
        raise UserError(
            f"no checkpoint in {self._folder} can be used "
            f"({'; '.join(problems.values()) or 'none is there'}): put a good copy back or train "
            "anew in another --workdir"
        )

    def save_cache(
        self, cache: TargetCache, *, step: int, made_by: dict[str, Any]
    ) -> dict[str, Any]:
        """Saves a snapshot and waits for it: a checkpoint may refer to it from now on.

        Args:
          cache: the cache.
          step: the step before which it was made.
          made_by: what its rows depend on.

        Returns:
          The reference that a position keeps.

        Raises:
          UserError: as `save`.
        """
        with self._writing():
            self._require_space(cache)
            saved = snapshot.save(self._caches / str(step), cache, step=step, made_by=made_by)
            # A refresh at every step must not fill the disk before the next checkpoint.
            self._drop_unused_snapshots({step, *self._snapshots.values()})
            return saved

    def cache_folder(self, reference: dict[str, Any]) -> AnyPath:
        """Where the snapshot is that a position refers to."""
        return self._caches / str(reference["step"])

    def check(self, step: int) -> Iterator[tuple[str, int, str]]:
        """Reads everything a checkpoint stands on and holds it against its digests.

        Args:
          step: which checkpoint.

        Yields:
          (what, its bytes, what is wrong with it or "").
        """
        position, leaves = self.read(step)
        size = 0
        try:
            restored = self._restore_here(step)
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(restored))
            self._compare(step, leaves, digest.leaves(restored))
            yield "state", size, ""
        except DamagedError as error:
            yield "state", size, str(error)
        if position.cache is not None:
            folder = self._caches / str(position.cache["step"])
            name = f"cache/{position.cache['step']}"
            try:
                for file, size, problem in snapshot.check(folder, sha256=position.cache["sha256"]):
                    yield f"{name}/{file}", size, problem
            except DamagedError as error:
                yield name, 0, str(error)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        """Waits for what is being saved."""
        try:
            self.wait()
        except UserError:
            if kind is None:  # what is already on its way says more
                raise
        finally:
            self.close()

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()
        # What was given up complains when it is collected: now, and unheard. Nothing else is worth
        # going through every object of the process.
        if self._gave_up:
            gc.collect()
        self._quiet.close()

    def _resume(
        self,
        state: PyTree,
        cache: TargetCache | None,
        *,
        step: int,
        data: str,
        made_by: dict[str, Any],
    ) -> tuple[PyTree, TargetCache | None, Position]:
        position, leaves = self.read(step)
        if position.data != data:
            raise UserError(
                f"{self._workdir} was trained on other data than there is now (texts, queries or "
                "judgements changed): put them back or start anew in another --workdir"
            )
        self._refuse_other_leaves(step, leaves, state)
        args = ocp.args.Composite(state=_wanted(_abstract(state)))
        restored = self._restore(step, args)["state"]
        self._compare(step, leaves, digest.leaves(restored))
        if cache is not None and position.cache is not None:
            cache = snapshot.load(
                self._caches / str(position.cache["step"]),
                cache,
                made_by=made_by,
                sha256=position.cache["sha256"],
                remedy="put the right snapshot back or start anew in another --workdir",
            )
        return restored, cache, position

    def _restore(self, step: int, args: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:  # Orbax and TensorStore raise nothing more precise
            self._gave_up = True
            if distributed.is_loss(error):
                raise
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DamagedError(f"{self._folder / str(step)} cannot be read ({problem})")

    def _restore_here(self, step: int) -> PyTree:
        """The state on one device, whatever it was saved on and without knowing its make."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        try:
            described = self._manager.item_metadata(step)["state"]
            wanted = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), described
            )
        except Exception as error:  # as in `_restore`
            self._gave_up = True
            raise DamagedError(f"{self._folder / str(step)} does not describe its state") from error
        return self._restore(step, ocp.args.Composite(state=_wanted(wanted)))["state"]

    def _compare(self, step: int, saved: dict[str, Any], found: dict[str, Any]) -> None:
        for path, leaf in saved.items():
            if list(found.get(path, ())) != leaf:
                raise DamagedError(
                    f"{self._folder / str(step)}: {path} does not have the digest it was saved with"
                )

    def _refuse_other_leaves(self, step: int, saved: dict[str, Any], state: PyTree) -> None:
        """A state of another make is no damage: falling back would not help."""
        flat, _ = jax.tree_util.tree_flatten_with_path(state)
        here = {
            jax.tree_util.keystr(path, simple=True, separator="/"): (
                str(leaf.dtype),
                list(leaf.shape),
            )
            for path, leaf in flat
        }
        there = {path: (dtype, shape) for path, (dtype, shape, _) in saved.items()}
        for path in sorted(here.keys() | there.keys()):
            if here.get(path) != there.get(path):
                raise UserError(
                    f"{self._folder / str(step)} holds {_shown(there.get(path))} as {path} but "
                    f"this run has {_shown(here.get(path))}: resume with the configuration and the "
                    "version of corrector_jax it was saved with"
                )

    def _set_aside(self, step: int) -> AnyPath:
        number = 0
        while (target := self._workdir / "damaged" / f"{step}-{number}").exists():
            number += 1
        distributed.wait_for_all("every process knows where it goes")
        if distributed.is_lead():
            paths.move(self._folder / str(step), target)
        distributed.wait_for_all("the damaged checkpoint is out of the way")
        self._manager.reload()
        return target

    def _require_space(self, tree: PyTree) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        free = paths.free_bytes(self._workdir)
        if free is not None and free < 1.1 * needed:
            raise OSError(
                None, f"{needed / 1e9:.2f} GB are to be saved and {free / 1e9:.2f} GB are free"
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Whatever goes wrong while saving, in one sentence that says what is still there."""
        try:
            # Orbax would make it anew, with nothing else in it. An object store has no folders.
            if paths.is_local(self._folder) and not self._folder.is_dir():
                raise OSError(None, "the folder has vanished")
            yield
        except UserError:
            raise
        except Exception as error:  # Orbax hands on what its threads raised, of any kind
            self._gave_up = True
            if distributed.is_loss(error):
                raise  # nothing is wrong with the disk
            words = " ".join(str(getattr(error, "strerror", None) or error).split())
            there = f"; the newest there is of step {max(s):,}" if (s := self._listed()) else ""
            raise UserError(
                f"{self._workdir}: saving failed ({words[:300]}){there}: make room or make it "
                "writable, then run the same command again"
            ) from error

    def _listed(self) -> list[int]:
        try:
            return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())
        except OSError:
            return []

    def _drop_unused_snapshots(self, needed: set[int | None]) -> None:
        """Removes snapshots that no kept checkpoint refers to and that are not `needed`.

        The newest always stays: a refresh may have made it for the next checkpoint.
        """
        if not self._caches.is_dir():
            return
        there = {int(path.name) for path in self._caches.iterdir() if path.name.isdigit()}
        for step in self.steps():
            if step not in self._snapshots:
                try:
                    self.read(step)
                except DamagedError:
                    return  # it may need any of them
        needed = needed | {self._snapshots[step] for step in self.steps()}
        for step in there - needed - {max(there, default=0)} if distributed.is_lead() else ():
            paths.remove(self._caches / str(step))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what Orbax logs: pages around an error that is said in a sentence.

    Its threads and loops outlive the call that failed, so this lasts as long as `Checkpoints` do.
    """
    loggers = [logging.getLogger(name) for name in ("asyncio", "absl")]
    levels = [logger.level for logger in loggers]
    hook = sys.unraisablehook
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        sys.unraisablehook = lambda unraisable: None
        yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _shown(leaf: tuple[str, list[int]] | None) -> str:
    return "nothing" if leaf is None else f"{leaf[0]}{leaf[1]}"


def _wanted(tree: Any) -> ocp.args.PyTreeRestore:
    """Shapes, dtypes and shardings, as Orbax is asked for them."""
    return ocp.args.PyTreeRestore(
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
    )


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
