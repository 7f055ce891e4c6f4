"""Looking into training steps: a trace that TensorBoard and xprof open, and a summary of it.

    profile/plugins/profile/TIME/   what jax.profiler wrote (TensorBoard's profile plug-in, xprof)
    profile.json                    where the time of a step went, by the parts of the method

Times are of what the devices ran, each instruction without those inside it, and are told apart by
the scopes in which the code made the instruction.
"""

from __future__ import annotations

import collections
import contextlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import jax
from jax.profiler import ProfileData

from corrector_jax import paths
from corrector_jax.paths import AnyPath

PARTS = {
    "sweep": "sweep of the cache",
    "encode_queries": "encode queries",
    "encode_targets": "encode targets",
    "reader": "read the passages",
    "train_corrector": "train the corrector",
    "update_encoders": "update encoders and reader",
}
"""Scope of the step -> what it is; the first that a path names counts."""

OTHER = "the rest: scores, losses, metrics"

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', re.M)


class Event(NamedTuple):
    """Something that ran.

    Attributes:
      name: of the instruction.
      start: nanoseconds.
      duration: nanoseconds, of what ran inside it too.
    """

    name: str
    start: float
    duration: float


class Trace:
    """Traces some steps, where any are asked for."""

    def __init__(self, workdir: AnyPath, steps: range) -> None:
        """Traces nothing yet.

        Args:
          workdir: the run's folder.
          steps: those to trace; empty = none.
        """
        self._workdir, self._steps = workdir, steps
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._first = 0

    def begin(self, step: int) -> None:
        """Called before every step, by its number."""
        if step in self._steps and self._folder is None:
            # On this disk first: an object store cannot be appended to.
            self._folder, self._first = tempfile.TemporaryDirectory(), step
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python's: megabytes a step
            jax.profiler.start_trace(self._folder.name, profiler_options=options)

    def annotated(self, step: int) -> AbstractContextManager[object]:
        """What a step is dispatched within, so that TensorBoard tells steps apart."""
        if self._folder is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def is_last(self, step: int) -> bool:
        """Whether the trace ends once this step is done: its results must be waited for."""
        return self._folder is not None and step + 1 not in self._steps

    def end(self, step: int, program: str) -> None:
        """Writes what was traced.

        Args:
          step: the last one, whose results were waited for.
          program: the compiled step as text.
        """
        if self._folder is None:
            return
        jax.profiler.stop_trace()
        with self._folder as name:
            self._folder = None
            for path in sorted(Path(name).rglob("*")):
                if path.is_file():
                    target = self._workdir / "profile" / str(path.relative_to(name))
                    paths.write(target, path.read_bytes())
            lines = [
                line for path in Path(name).rglob("*.xplane.pb") for line in events(path, program)
            ]
        parts = summary(lines, program, steps=step + 1 - self._first)
        record = {"steps": [self._first, step + 1], "seconds_per_step": parts}
        paths.write(self._workdir / "profile.json", json.dumps(record) + "\n")

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exception: object) -> None:
        """Drops a trace that was cut short: its last step is not whole."""
        if self._folder is not None:
            jax.profiler.stop_trace()
            self._folder.cleanup()


def events(path: Path, program: str) -> Iterator[list[Event]]:
    """What each thread or device of a trace ran of one program, by its instructions.

    Args:
      path: an .xplane.pb file.
      program: the compiled program as text.

    Yields:
      The events of one line of the trace.
    """
    module = next(iter(re.findall(r"HloModule ([\w.-]+)", program)), "")
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            found = []
            for event in line.events:
                stats = dict(event.stats)
                if stats.get("hlo_module", module) != module:
                    continue
                name = str(stats.get("hlo_op", ""))
                if not name and line.name == "XLA Ops":  # a TPU's, named by the whole instruction
                    name = event.name.split(" ")[0].lstrip("%")
                if name:
                    found.append(Event(name, event.start_ns, event.duration_ns))
            if found:
                yield found


def summary(lines: Iterable[list[Event]], program: str, *, steps: int) -> dict[str, float]:
    """Seconds of a step by the parts of the method, over all threads or devices together.

    Args:
      lines: what each of them ran.
      program: the compiled step as text; instructions that it does not name are left out.
      steps: how many steps were traced.

    Returns:
      Part -> seconds, those of `PARTS` that ran and `OTHER`.
    """
    paths_of = dict(_INSTRUCTION.findall(program))
    found: dict[str, float] = collections.defaultdict(float)
    for line in lines:
        for event, own in own_times(line):
            if event.name in paths_of:
                found[_part(paths_of[event.name])] += own
    order = [*PARTS.values(), OTHER]
    return {part: round(found[part] / 1e9 / steps, 6) for part in order if part in found}


def own_times(line: list[Event]) -> Iterator[tuple[Event, float]]:
    """Each event with the nanoseconds in which none that lies inside it ran.

    Args:
      line: events of one thread, which lie inside one another or apart.

    Yields:
      (event, nanoseconds).
    """
    around: list[tuple[Event, float]] = []
    for event in sorted(line, key=lambda event: (event.start, -event.duration)):
        # A picosecond, in which times are counted: as floats, ends and starts are not quite equal.
        while around and around[-1][0].start + around[-1][0].duration <= event.start + 1e-3:
            yield around.pop()
        if around:
            outer, own = around.pop()
            around.append((outer, own - event.duration))
        around.append((event, event.duration))
    yield from reversed(around)


def _part(path: str) -> str:
    """The part of the method that an instruction belongs to, by the path of its scopes."""
    scopes = re.split(r"[/()]", path)
    return next((words for scope, words in PARTS.items() if scope in scopes), OTHER)
