"""What a run says: metrics.jsonl, TensorBoard events, and one live line in the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from corrector_jax import distributed, paths
from corrector_jax.metrics import Mean, means
from corrector_jax.paths import AnyPath
from corrector_jax.preemption import PreemptedError
from corrector_jax.types import UserError


class Writer:
    """Owns the metrics of a run and the terminal.

    A row of metrics.jsonl is one JSON object with "step", "seconds" (since the run began, earlier
    parts of a resumed run included) and some of the metrics. Files that grow are kept on a local
    disk; those of a workdir on an object store, which cannot append, are copied there by `sync`.
    """

    def __init__(
        self, workdir: AnyPath, *, step: int, size: int, started: float, tensorboard: bool = True
    ) -> None:
        """Opens the files; rows written after the checkpoint that is resumed are dropped.

        Args:
          workdir: where metrics.jsonl and the events go.
          step: steps done by the checkpoint that is resumed; 0 = a new run.
          size: bytes of metrics.jsonl at that checkpoint.
          started: when the run began, by `time.monotonic()`.
          tensorboard: whether to write events too.

        Raises:
          UserError: metrics.jsonl is shorter than it was at that checkpoint.
        """
        self._workdir, self._started = workdir, started
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if isinstance(workdir, Path):
            self._local = workdir
        else:
            self._scratch = tempfile.TemporaryDirectory()
            self._local = Path(self._scratch.name)
        self._copied: dict[str, tuple[int, float]] = {}
        path = workdir / "metrics.jsonl"
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            raise UserError(
                f"{path} has {there:,} bytes but had {size:,} at the checkpoint of step {step:,}: "
                "put it back or train anew in another --workdir"
            )
        if self._scratch is not None and size:
            (self._local / "metrics.jsonl").write_bytes(path.read_bytes()[:size])
        self._file = (self._local / "metrics.jsonl").open("ab")
        self._file.truncate(size)
        self._events = (
            _Events(self._local, purge=step + 1 if step else None) if tensorboard else None
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one row.

        Args:
          step: training steps done.
          values: metric name -> number; not-a-number is written as null.
        """
        row: dict[str, Any] = {"step": step, "seconds": round(time.monotonic() - self._started, 3)}
        for name, value in values.items():
            row[name] = float(f"{value:.6g}") if np.isfinite(value) else None
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        if self._events is not None:
            self._events.scalars(step, values)

    def sync(self) -> int:
        """Makes sure that what was written survives this machine.

        Returns:
          Bytes of metrics.jsonl so far.
        """
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()
        if self._scratch is not None:
            for path in sorted(self._local.iterdir()):
                seen = path.stat()
                if self._copied.get(path.name) != (seen.st_size, seen.st_mtime):
                    paths.write(self._workdir / path.name, path.read_bytes())
                    self._copied[path.name] = (seen.st_size, seen.st_mtime)
        return self._file.tell()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Closes the files; after an error the workdir may be another job's, and gets no copy."""
        try:
            if kind is None or issubclass(kind, PreemptedError):
                self.sync()
        finally:
            if self._events is not None:
                self._events.close()
            self._file.close()
            if self._scratch is not None:
                self._scratch.cleanup()


class Silence(Writer):
    """The writer of a process that is not the first: the same calls, and nothing is written."""

    def __init__(self) -> None:
        pass

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes nothing."""

    def sync(self) -> int:
        """0 bytes."""
        return 0

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        pass


class _Events:
    """A TensorBoard events file, written by the caller's thread.

    tensorboardX's SummaryWriter has a thread of its own, which dies when the disk is full; the run
    would wait for it for ever.
    """

    def __init__(self, folder: Path, *, purge: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._writer = EventsWriter(str(folder / "events"))
        if purge is not None:  # TensorBoard hides what an earlier part wrote from this step on
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=purge, wall_time=time.time(), session_log=start))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        # TensorBoard allows no "@" in a name.
        of = [
            Summary.Value(tag=name.replace("@", "_at_"), simple_value=value)
            for name, value in values.items()
        ]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=of))
        self._writer.write_event(event)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: said already
            self._writer.close()


def write_pictures(workdir: AnyPath, pictures: Iterable[tuple[int, str, bytes]]) -> None:
    """Writes pictures for TensorBoard, in place of those that were there.

    Args:
      workdir: where events go.
      pictures: (step, name, content of a PNG file) of each.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    for there in [path for path in workdir.iterdir() if path.name.startswith("pictures.out.")]:
        paths.remove(there)
    with tempfile.TemporaryDirectory() as folder:
        events = EventsWriter(f"{folder}/pictures")
        for step, name, content in pictures:
            width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=content
            )
            value = Summary.Value(tag=name, image=image)
            events.write_event(
                Event(step=step, wall_time=time.time(), summary=Summary(value=[value]))
            )
        events.close()
        for path in Path(folder).iterdir():
            paths.write(workdir / path.name, path.read_bytes())


class StepLog:
    """Metrics of training steps, each read once the next step was dispatched: no step waits.

    Rows are means over `every` steps; the note for the progress line is of the last step read.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        every: int,
        batch_size: int,
        saved: dict[str, Any],
        on_skipped: Callable[[int], None],
    ) -> None:
        """Starts with what a checkpoint kept.

        Args:
          writer: gets the rows.
          every: steps of a row.
          batch_size: B, for examples per second.
          saved: of `state`; empty = a new run.
          on_skipped: told the number of a step that was skipped, once its metrics are read.
        """
        self._writer, self._every, self._batch = writer, every, batch_size
        self._on_skipped = on_skipped
        self._held: tuple[int, dict[str, Mean], dict[str, float]] | None = None
        self._note = ""
        self._steps: int = saved.get("steps", 0)
        self._seconds = self._counted = saved.get("counted", 0.0)
        self._sums = {
            name: Mean(total, weight) for name, (total, weight) in saved.get("sums", {}).items()
        }

    def state(self) -> dict[str, Any]:
        """The row that is not full yet, as JSON; a resumed run goes on with it."""
        return {"steps": self._steps, "counted": self._counted, "sums": self._sums}

    def add(
        self, step: int, measured: dict[str, Mean], values: dict[str, float], seconds: float
    ) -> str:
        """Holds a step's metrics, and reads those of the step before.

        Args:
          step: steps done, this one included.
          measured: metrics on the device.
          values: numbers known on the host, such as the learning rate.
          seconds: spent in training steps so far: evaluations and probes do not slow the rate.

        Returns:
          A note on the last step read.
        """
        note = self.flush()
        self._held, self._seconds = (step, measured, values), seconds
        return note

    def flush(self) -> str:
        """Reads what is held, waiting for it.

        Returns:
          A note on the last step read.
        """
        if self._held is None:
            return self._note
        step, measured, values = self._held
        self._held = None
        measured = jax.device_get(measured)
        skipped = measured.pop("skipped")
        if skipped.total:
            self._on_skipped(step)
            measured = {}  # whatever was not finite would make the whole row so
        measured["skipped"] = skipped
        for name, value in measured.items():
            held = self._sums.get(name, Mean(0.0, 0.0))
            self._sums[name] = Mean(
                held.total + float(value.total), held.weight + float(value.weight)
            )
        self._steps += 1
        now = means(measured)
        self._note = ", ".join(
            f"{name.replace('_', ' ')} {now[name]:.3g}"
            for name in ("loss", "drift", "corrected_error")
            if name in now
        )
        if step % self._every == 0:
            rate = self._steps * self._batch / max(self._seconds - self._counted, 1e-9)
            row = {**means(self._sums), **values, "examples_per_second": rate}
            self._writer.scalars(step, {f"train/{name}": value for name, value in row.items()})
            self._sums, self._steps, self._counted = {}, 0, self._seconds
        return self._note


def say(text: str) -> None:
    """One line on standard output, above a progress bar if one is shown; the first process's."""
    if not distributed.is_lead():
        return
    tqdm.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def progress(label: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
    """Shows how far long work is, its rate and the time left.

    A terminal gets a live bar; anything else gets a plain line now and then.

    Args:
      label: what is being done.
      total: how much there is to do.
      unit: of what, such as "targets".
      done: how much was done before.

    Yields:
      advance(count, note=""): tells that `count` more are done.
    """
    if not distributed.is_lead():
        yield lambda count, note="": None
        return

    if sys.stderr.isatty():
        with tqdm(
            total=total, initial=done, desc=label, unit=f" {unit}", dynamic_ncols=True, leave=True
        ) as bar:

            def advance(count: int, note: str = "") -> None:
                if note:
                    bar.set_postfix_str(note, refresh=False)
                bar.update(count)

            yield advance
        return

    start = said = time.monotonic()
    first: tuple[float, int] | None = None

    def advance_plainly(count: int, note: str = "") -> None:
        nonlocal done, said, first
        done += count
        now = time.monotonic()
        if now - said >= _EVERY_SECONDS or done >= total:
            said = now
            if first is None:
                speed = f" in {_clock(now - start)}"
            else:
                speed = ", " + _speed(now - first[0], done - first[1], total - done)
            shown = f"{label}: {done:,}/{total:,} {unit}{speed}"
            print(shown + (f"  {note}" if note else ""), file=sys.stderr, flush=True)
        if first is None:  # it compiles: those after it say how long the rest takes
            first = (now, done)

    yield advance_plainly


_EVERY_SECONDS = 10.0


def _speed(seconds: float, count: int, left: int) -> str:
    """How fast it goes, and how long `left` more take."""
    each = seconds / max(count, 1)
    speed = f"{each:.1f} s each" if each > 1 else f"{1 / max(each, 1e-9):,.1f}/s"
    return f"{speed}, {_clock(each * left)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
