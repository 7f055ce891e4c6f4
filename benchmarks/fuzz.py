"""Damages everything that is read from disk, and reads it: nothing but named errors may come out.

    python -m benchmarks.fuzz --cases=10000 --seed=0

A case is one damaged copy of files that the package wrote, or reads, and one look at them. It must
be read, or be refused with a `UserError` or a `DamagedError` of one sentence that names a file; it
must take neither long nor much memory, write nothing outside of what it was given, and open no file
beside it that a name in the files leads to. A case is known by seed, target and number:
`--only=TARGET --case=NUMBER` shows it again. Writes `benchmarks/results/fuzz.json`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import mutations
from benchmarks.fuzz_targets import TARGETS, Target
from corrector_jax import paths
from corrector_jax.snapshot import DamagedError
from corrector_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60
"""A case that takes longer hangs; this machine may be busy with something else."""

CPU_SECONDS = 10
MEMORY = 1 << 30
"""Bytes that a case may need beyond what the process had before."""

LONGEST = 600
"""Characters of a refusal, but for paths: it is to be read."""


class Hanging(BaseException):
    """A case took too long; nothing in the package may take it for a problem of its own."""


@dataclasses.dataclass
class Outcome:
    """What became of the cases of a target.

    Attributes:
      cases: how many.
      refused: of these, how many with one sentence.
      accepted: how many were read.
      errors: what should not have happened -> how often, and the first case.
      seconds: of all cases.
      slowest: CPU seconds of one case.
      peak_mib: most memory that the process held, above what it had before.
    """

    cases: int = 0
    refused: int = 0
    accepted: int = 0
    errors: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    slowest: float = 0.0
    peak_mib: float = 0.0

    def note(self, what: str, number: int, done: str) -> None:
        """Counts something wrong."""
        self.errors.setdefault(what, [0, number, done])[0] += 1


def fuzz(target: Target, folder: Path, *, cases: Iterator[int], seed: int) -> Outcome:
    """Runs cases of one target.

    Args:
      target: what is read.
      folder: an empty one to work in.
      cases: their numbers.
      seed: of all of them.

    Returns:
      What happened.
    """
    given, outside = folder / "given", folder / "outside"
    outside.mkdir()
    (outside / mutations.SECRET).write_text('{"secret": "of somebody else"}')
    (folder / mutations.SECRET).write_text('{"secret": "of somebody else"}')
    given.mkdir()
    target.write(given)
    valid = _contents(given)
    with contextlib.redirect_stdout(io.StringIO()):
        target.read(given)  # what is not damaged is read
    kept = _contents(folder, without=("given", "cache"))
    found = Outcome()
    begun = time.monotonic()
    with _limits() as limits, _Opened(folder) as opened:
        for number in cases:
            _restore(given, valid)
            shutil.rmtree(folder / "cache", ignore_errors=True)
            rng = random.Random(f"{seed} {target.name} {number}")
            done = mutations.damage(rng, given, outside)
            if target.forge is not None and rng.random() < 0.5:
                with contextlib.suppress(Exception):  # what is damaged too much stays as it is
                    target.forge(given)
            changed = _contents(given) != valid
            found.cases += 1
            cpu = time.process_time()
            opened.clear()
            try:
                with limits.of_one_case(), contextlib.redirect_stdout(io.StringIO()):
                    target.read(given)
            except (UserError, DamagedError) as error:
                found.refused += 1
                if problem := _bad_sentence(str(error), folder, valid):
                    found.note(f"{problem}: {_place(error)}", number, f"{done}: {error}"[:500])
            except (Exception, Hanging) as error:
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                found.note(f"{what} ({_place(error)})", number, done)
            else:
                found.accepted += 1
                if changed and target.gate and target.gate(given, valid):
                    found.note("a changed file was taken", number, done)
            cpu = time.process_time() - cpu
            found.slowest = max(found.slowest, cpu)
            if cpu > CPU_SECONDS:
                found.note("too slow", number, f"{done}: {cpu:.0f} s")
            found.peak_mib = max(found.peak_mib, limits.grown() / 2**20)
            if limits.grown() > MEMORY:
                found.note("too much memory", number, f"{done}: {limits.grown() >> 20} MiB")
                limits.forget()
            for path in opened.paths:
                found.note(f"opened {path.replace(str(folder), '')}", number, done)
            there = _contents(folder, without=("given", "cache"))
            if there != kept:
                found.note("something was written outside of the folder", number, done)
                _restore(outside, {mutations.SECRET: kept[f"outside/{mutations.SECRET}"]})
                kept = _contents(folder, without=("given", "cache"))
    found.seconds = time.monotonic() - begun
    return found


class _Opened:
    """Notes what Python opens beside the given folder, by names as they were written.

    A link in the folder may lead anywhere, as the links in a model's cache do; names may not.
    """

    _now: _Opened | None = None
    _hooked = False

    def __init__(self, folder: Path) -> None:
        self._root = str(folder)
        # The last two are what prepared data and tokens are made of.
        names = ("given", "cache", "source", "tokenizer")
        self._free = tuple(str(folder / name) + os.sep for name in names)
        self.paths: list[str] = []

    def __enter__(self) -> _Opened:
        _Opened._now = self
        if not _Opened._hooked:  # a hook cannot be taken away
            sys.addaudithook(_Opened._saw)
            _Opened._hooked = True
        return self

    def __exit__(self, *exception: object) -> None:
        _Opened._now = None

    def clear(self) -> None:
        """Forgets what a mutation opened."""
        self.paths.clear()

    @staticmethod
    def _saw(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and _Opened._now is not None:
            _Opened._now._look(*arguments)

    def _look(self, path: object, mode: object, flags: int) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor
        name = os.path.normpath(os.fsdecode(path))
        beside = name.startswith(self._root + os.sep) and not name.startswith(self._free)
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR)) and not name.startswith(
            (self._root, "/dev/", "/proc/", tempfile.gettempdir(), str(ROOT / ".cache"))
        )
        if beside or writes:
            self.paths.append(name)


class _Limits:
    """Time and memory of a case."""

    def __init__(self) -> None:
        self._before = 0
        self.forget()

    @contextlib.contextmanager
    def of_one_case(self) -> Iterator[None]:
        """Ends a case that takes too long."""
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def grown(self) -> int:
        """Bytes of the most memory held since `forget`, above what was held then."""
        return _status("VmHWM") - self._before

    def forget(self) -> None:
        """Begins anew with what is held now."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS")


@contextlib.contextmanager
def _limits() -> Iterator[_Limits]:
    def hanging(number: int, frame: object) -> None:
        raise Hanging(f"more than {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, hanging)
    # What asks for more than this fails at once instead of bringing the machine down.
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 4 * MEMORY, hard))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            yield _Limits()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)


def _status(key: str) -> int:
    """A number of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _contents(folder: Path, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Path -> content of every file; what a link leads to is not looked at."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in without:
            continue
        if path.is_symlink():
            found[name] = b"link to " + os.fsencode(os.readlink(path))
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def _restore(folder: Path, valid: dict[str, bytes]) -> None:
    shutil.rmtree(folder)
    for folder_of in {(folder / name).parent for name in valid}:
        folder_of.mkdir(parents=True, exist_ok=True)
    for name, content in valid.items():
        (folder / name).write_bytes(content)


def _bad_sentence(message: str, folder: Path, valid: dict[str, bytes]) -> str:
    """What is wrong with a refusal as a sentence."""
    short = message.replace(str(folder), "")
    names = {Path(name).name.removesuffix(".gz") for name in valid}
    if "\n" in message or not message.isprintable():
        return "more than one line, or unprintable"
    if len(short) > LONGEST:
        return "too long"
    if str(folder / "given") not in message and not any(name in message for name in names):
        return "names no file"
    return ""


def _place(error: BaseException) -> str:
    """Where in the package an error came up."""
    frames = traceback.extract_tb(error.__traceback__)
    here = [frame for frame in frames if "/corrector_jax/" in frame.filename]
    frame = here[-1] if here else frames[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"


def main() -> None:
    """All targets, and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of targets, separated by commas")
    parser.add_argument("--case", type=int, help="one case alone")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "fuzz.json"))
    arguments = parser.parse_args()
    faulthandler.enable()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    only = arguments.only.split(",") if arguments.only else list(TARGETS)
    shares = sum(TARGETS[name].share for name in only)
    found: dict[str, Outcome] = {}
    for name in only:
        target = TARGETS[name]
        count = -(-arguments.cases * target.share // shares)
        first = arguments.case or 0
        cases = iter(range(first, first + 1) if arguments.case is not None else range(count))
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder).resolve()
            found[name] = outcome = fuzz(target, place, cases=cases, seed=arguments.seed)
        print(
            f"{name:<24}{outcome.cases:>6} cases, {outcome.refused:>6} refused, "
            f"{outcome.accepted:>6} read, {sum(e[0] for e in outcome.errors.values()):>4} errors, "
            f"{outcome.seconds:>6.1f} s, slowest {outcome.slowest:.2f} s, "
            f"+{outcome.peak_mib:.0f} MiB",
            flush=True,
        )
        for what, (times, number, done) in outcome.errors.items():
            print(f"    {times} x {what}\n        --only={name} --case={number}: {done}"[:700])
    totals = collections.Counter[str]()
    for outcome in found.values():
        totals.update(cases=outcome.cases, refused=outcome.refused, accepted=outcome.accepted)
        totals.update(errors=sum(error[0] for error in outcome.errors.values()))
    record = {
        "command": f"python -m benchmarks.fuzz --cases={arguments.cases} --seed={arguments.seed}"
        + (f" --only={arguments.only}" if arguments.only else ""),
        **totals,
        "seconds": round(sum(outcome.seconds for outcome in found.values()), 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "targets": {
            name: {
                key: round(value, 2) if isinstance(value, float) else value
                for key, value in dataclasses.asdict(outcome).items()
            }
            for name, outcome in found.items()
        },
    }
    print(f"{totals['cases']:,} cases, {totals['errors']} errors")
    if arguments.case is None:
        paths.write(Path(arguments.output), json.dumps(record, indent=2) + "\n")
    sys.exit(bool(totals["errors"]))


if __name__ == "__main__":
    main()
