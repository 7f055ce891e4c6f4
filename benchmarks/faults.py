"""Kills small runs at random moments and holds what they end in against a run left alone.

    python -m benchmarks.faults --kills=20 --terms=10
    python -m benchmarks.faults --campaign                # every kind below: hours; goes on

Every run goes through the command line. A moment is drawn within the time the run left alone took,
or is the one at which a save, a snapshot or the last evaluation begins. The same command is run
again until it ends; then the digests of every leaf, the cache, the rankings, the results and the
rows of metrics.jsonl must equal those of the run left alone, times apart. Writes
`benchmarks/results/faults.json`, or what `--output` names.

`--campaign` does so to every kind of `KINDS`: training by every strategy, with a reader and on two
processes, and embedding, exporting and preparing data, whose files must be equal byte for byte.
Everything that was done is a line of `--log`; what stands there is not done again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from corrector_jax import paths
from corrector_jax.checkpoint import Checkpoints
from corrector_jax.distributed import LOST
from corrector_jax.paths import AnyPath
from corrector_jax.preemption import EXIT_CODE
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]

RUN = {
    "refresh.every": 4,
    "train.steps": 10,
    "checkpoint.every": 3,
    "eval.every": 5,
    "eval.corpus": "corrected",
    "log.every": 2,
    "corrector.probe_every": 2,
    "eval.bm25": False,
}
"""Saves at 3, 6, 9 and 10, refreshes before 4 and 8, evaluates at 5: no two at the same step."""


PATTERNS = {
    "saving": "checkpoints/*tmp*",
    "snapshot": "cache/*/rows*",
    "evaluating": f"checkpoints/{RUN['train.steps']}",
}
"""Moment -> the file whose appearance it is; the last evaluation follows the last save."""

MOMENTS = ("any", "any", *PATTERNS)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Something that is killed.

    Attributes:
      keys: of the configuration, beside those of the tiny run and `RUN`.
      flags: of the command; {workdir} stands for the run's folder.
      moments: word -> the file whose appearance it is; beside any moment.
      kills: share of the SIGKILLs of a campaign.
      terms: share of its SIGTERMs; 0 = it does not listen to them.
      processes: that work together on this machine.
      needs: a finished run of this kind, whose copy is the workdir; empty = it begins with nothing.
      leaves: patterns of the files that are compared byte for byte; none = it trains, and
        `outcome` says what it ends in.
    """

    keys: dict[str, Any] = dataclasses.field(default_factory=dict)
    flags: tuple[str, ...] = ()
    moments: dict[str, str] = dataclasses.field(default_factory=lambda: PATTERNS)
    kills: int = 8
    terms: int = 3
    processes: int = 1
    needs: str = ""
    leaves: tuple[str, ...] = ()


_NO_REFRESH = {"refresh.every": 0}
_NO_CACHE = {**_NO_REFRESH, "eval.corpus": "full", "eval.every": 5}
_SAVES = {name: PATTERNS[name] for name in ("saving", "evaluating")}

KINDS = {
    "corrected": Kind(),
    "in_batch": Kind({"strategy": "in_batch", **_NO_CACHE}, moments=_SAVES),
    "uniform": Kind({"strategy": "uniform", **_NO_CACHE}, moments=_SAVES),
    "mined": Kind({"strategy": "mined", "negatives.path": "MINED", **_NO_CACHE}, moments=_SAVES),
    "stale": Kind({"strategy": "stale", **_NO_REFRESH}),
    "nystrom": Kind(
        {
            **{"strategy": "nystrom", "corrector.landmarks": 12, "corrector.fit_every": 2},
            **_NO_REFRESH,
        }
    ),
    "refreshed": Kind({"strategy": "refreshed"}),
    "oracle": Kind({"strategy": "oracle", **_NO_REFRESH}),
    "streaming": Kind({"strategy": "streaming", **_NO_REFRESH}),
    "rolling": Kind({"strategy": "rolling", "refresh.rows": 20, **_NO_REFRESH}),
    "scann": Kind(
        {
            **{"negatives.proposal": "scann", "negatives.candidates": 16, "negatives.tail": 8},
            **{"index.leaves": 8, "index.searched": 4},
        }
    ),
    "reader": Kind({"READER": True, "strategy": "corrected"}),
    "two processes": Kind(processes=2, kills=20, terms=4),
    "two processes, rolling": Kind(
        {"strategy": "rolling", "refresh.rows": 20, **_NO_REFRESH}, processes=2, kills=6, terms=2
    ),
    "embed": Kind(
        flags=("--mode=embed", "--config.embed.shard_rows=8"),
        moments={"shard": "embeddings/*/*.npy"},
        terms=0,
        needs="corrected",
        leaves=("embeddings/*/*",),
    ),
    "export": Kind(
        flags=("--mode=export", "--config.export.path={workdir}/exported"),
        moments={"writing": "exported/*"},
        terms=0,
        needs="corrected",
        leaves=("exported/**/*",),
    ),
    "prepare_data": Kind(
        {"data.path": "LARGE", "train.warmup": 2},
        flags=("--mode=prepare_data", "--config.data.cache_dir={workdir}/cache"),
        moments={
            "reading": "cache/data/*/progress.json",
            "judged": "cache/data/*/manifest.json",
            "tokens": "cache/tokens/*/progress.json",
        },
        terms=0,
        leaves=("cache/*/*/*",),
    ),
}
"""What a campaign kills."""

_LARGE = 150_000
"""Targets of the data that are prepared: three shards, of texts and of tokens."""


@dataclasses.dataclass
class Campaign:
    """What was done to the runs.

    Attributes:
      exits: (what was done, how the process ended) -> how often.
      runs: runs that ended and were compared.
      different: what differed in them from the run left alone.
      seconds: of the run left alone.
    """

    exits: collections.Counter[tuple[str, int]] = dataclasses.field(
        default_factory=collections.Counter
    )
    runs: int = 0
    different: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def campaign(
    folder: Path,
    *,
    kills: int,
    terms: int,
    seed: int = 0,
    moments: Sequence[str] = (),
    kind: str = "corrected",
    say: Callable[[str], None] = print,
    note: Callable[[dict[str, Any]], None] = lambda line: None,
) -> Campaign:
    """Runs, kills and compares.

    Args:
      folder: for data and workdirs.
      kills: SIGKILLs that end a process.
      terms: SIGTERMs that make one save and exit.
      seed: of the moments.
      moments: which ones, each as likely as it is often named; empty = all of the kind's.
      kind: what is killed, of `KINDS`.
      say: told of every process that ended.
      note: told of every signal, and of every run that was compared.

    Returns:
      What happened.
    """
    chosen, done, what = random.Random(f"{seed} {kind}"), Campaign(), KINDS[kind]
    moments = moments or ("any", "any", *what.moments)
    config = write_config(folder, kind)
    before = None
    if what.needs:
        before = folder / "needed" / "run"
        end_well(Job(write_config(folder, what.needs), before, KINDS[what.needs]))
    begun = time.monotonic()
    alone = begin(folder / "alone", before)
    end_well(Job(config, alone, what))
    done.seconds = time.monotonic() - begun
    expected = ending(alone, what)
    wanted = {signal.SIGKILL: kills, signal.SIGTERM: terms}
    workdir = begin(folder / "0", before)
    while any(wanted.values()):
        number = chosen.choice([number for number, left in wanted.items() if left])
        job = Job(config, workdir, what)
        moment = chosen.choice(moments)
        wait_until(what.moments.get(moment), workdir, job, chosen.uniform(0.1, 1.0) * done.seconds)
        job.send_signal(number, chosen)
        code, errors = job.end()
        name = f"{number.name} {moment}"
        done.exits[name, code] += 1
        say(f"{kind}: {name}: exit {code}, {sum(wanted.values())} signals left")
        counts = code in (-signal.SIGKILL, EXIT_CODE)
        note({"signal": number.name, "moment": moment, "exit": code, "counts": counts})
        if counts:
            wanted[number] -= 1
        elif code:
            done.different.append(f"exit {code} after {name}: {errors[-2000:]}")
        if code == 0 or not any(wanted.values()):
            before_it = len(done.different)
            compare(done, Job(config, workdir, what), expected)
            note({"compared": done.runs, "different": done.different[before_it:]})
            shutil.rmtree(workdir)
            workdir = begin(folder / str(done.runs), before)
    return done


def begin(folder: Path, before: Path | None) -> Path:
    """A run's folder: a copy of a finished one where that is needed, else not there yet.

    All are called alike: a run's name stands in what it embeds.
    """
    if before is not None:
        shutil.copytree(before, folder / "run")
    return folder / "run"


def end_well(job: Job) -> None:
    """Lets a run end that is left alone."""
    code, errors = job.end()
    if code:
        raise RuntimeError(f"the run left alone ended with {code}: {errors}")


def compare(done: Campaign, job: Job, expected: dict[str, Any]) -> None:
    """Lets a run end, undisturbed, and holds it against the run left alone."""
    code, errors = job.end()
    name = f"run {done.runs}"
    if code:
        done.different.append(f"{name}: exit {code}: {errors[-2000:]}")
    else:
        found = ending(job.workdir, job.kind)
        names = sorted(expected.keys() | found.keys())
        done.different += [f"{name}: {k}" for k in names if expected.get(k) != found.get(k)]
    done.runs += 1


def write_config(folder: Path, kind: str = "corrected") -> Path:
    """A configuration file of a tiny run whose data lies in the folder."""
    keys = tiny.overrides(folder) | RUN | KINDS[kind].keys
    if keys.pop("READER", False):
        keys = tiny.overrides(folder) | tiny.reader_overrides(folder) | RUN
    if keys.get("negatives.path") == "MINED":
        keys["negatives.path"] = str(_write_mined(folder / "mined.jsonl"))
    if keys["data.path"] == "LARGE":
        keys["data.path"] = str(_write_large(folder / "large"))
    path = folder / ("config.py" if kind == "corrected" else f"config {kind}.py")
    path.write_text(
        "from corrector_jax import config\n\n\ndef get_config():\n"
        f"    c = config.default()\n    c.update_from_flattened_dict({keys!r})\n    return c\n"
    )
    return path


def _write_mined(path: Path) -> Path:
    """Negatives of every training query."""
    lines = [
        {"query_id": f"train{i}", "negatives": [f"t{(i * 7 + k) % tiny.TARGETS}" for k in range(9)]}
        for i in range(tiny.TRAIN)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _write_large(folder: Path) -> Path:
    """The tiny data with many more targets behind its own."""
    if not folder.exists():
        tiny.write_data(folder)
        draw = random.Random(0)
        with (folder / "corpus.jsonl").open("a") as file:
            for row in range(tiny.TARGETS, _LARGE):
                text = " ".join(draw.choices(tiny.WORDS, k=6))
                file.write(json.dumps({"_id": f"t{row}", "text": f"{text} {row}"}) + "\n")
    return folder


class Job:
    """The command a user would write, in as many processes as it takes.

    Attributes:
      workdir: the run's folder.
      kind: what it is.
    """

    def __init__(self, config: Path, workdir: Path, kind: Kind) -> None:
        """Starts it."""
        self.workdir, self.kind = workdir, kind
        own = "--mode=embed" in kind.flags or "--mode=export" in kind.flags
        command = [sys.executable, "-m", "corrector_jax.main", f"--workdir={workdir}"]
        command += [] if own else [f"--config={config}"]
        command += [flag.format(workdir=workdir) for flag in kind.flags]
        together: list[str] = []
        if kind.processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            together = [f"--coordinator=127.0.0.1:{port}", f"--processes={kind.processes}"]
            together += ["--config.mesh.timeout=60"]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": tiny.xla_flags(2 // kind.processes),
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._processes = [
            subprocess.Popen(
                [*command, *together, *([f"--process={i}"] if together else [])],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for i in range(kind.processes)
        ]

    def is_running(self) -> bool:
        """Whether all of its processes are."""
        return all(process.poll() is None for process in self._processes)

    def send_signal(self, number: int, chosen: random.Random) -> None:
        """Sends a signal to one of the processes, if they are still there."""
        if self.is_running():
            chosen.choice(self._processes).send_signal(number)

    def end(self) -> tuple[int, str]:
        """Waits; the exit code and what was said on standard error.

        Of several processes the code is one that nobody foresaw, or that of the one that was
        killed: that the others lost it is no news, nor that jax ended them (docs/scale.md).
        """
        ended = [process.communicate(timeout=900)[1] for process in self._processes]
        codes = [process.returncode for process in self._processes]
        # The first of them that is there counts.
        known = (-signal.SIGKILL, LOST, -signal.SIGABRT, EXIT_CODE, 0)
        strange = [code for code in codes if code not in known]
        code = [*strange, *(code for code in known if code in codes)][0]
        return code, b"\n".join(ended).decode(errors="replace")


def wait_until(pattern: str | None, workdir: Path, job: Job, seconds: float) -> None:
    """Waits until a file of a pattern appears, the run ends, or, without one, some seconds."""
    seen = set(workdir.glob(pattern)) if pattern else set()
    limit = time.monotonic() + (600 if pattern else seconds)
    while job.is_running() and time.monotonic() < limit:
        if pattern and set(workdir.glob(pattern)) - seen:
            return
        time.sleep(0.002)


def ending(workdir: Path, kind: Kind) -> dict[str, Any]:
    """What a job leaves: the outcome of a training run, or the files it was to make."""
    if not kind.leaves:
        return outcome(workdir)
    found = {}
    for pattern in kind.leaves:
        for path in workdir.glob(pattern):
            # What begins with a dot is what a killed process was writing.
            kept = not path.name.startswith(".") and path.name not in ("lock", "progress.json")
            if path.is_file() and kept:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                found[path.relative_to(workdir).as_posix()] = content
    return found


def outcome(workdir: AnyPath) -> dict[str, Any]:
    """Everything a run leaves, but for times."""
    with Checkpoints.readable(workdir) as checkpoints:
        step = checkpoints.steps()[-1]
        position, leaves = checkpoints.read(step)
        problems = [problem for _, _, problem in checkpoints.check(step) if problem]
    results = json.loads((workdir / "results.json").read_text())
    for name in ("wall_seconds", "examples_per_second", "times"):
        results.pop(name)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
        row.pop("train/examples_per_second", None)
    found = {
        "step": step,
        "state": leaves,
        "cache": position.cache,
        "ledger": position.ledger,
        "problems": problems,
        "results": results,
        "metrics.jsonl": rows,
    }
    # Without a cache there is no drift to look at.
    folders = [folder for name in ("runs", "drift") if (folder := workdir / name).is_dir()]
    looked_at = [path for folder in folders for path in folder.iterdir()]
    looked_at += [path] if (path := workdir / "softmax.json").exists() else []
    for path in sorted(looked_at, key=str):
        found[path.name] = path.read_bytes()
    return found


class Log:
    """A line of JSON for everything that was done; a campaign that was cut off goes on from it."""

    def __init__(self, path: Path) -> None:
        """Reads what is there."""
        self._path = path
        text = path.read_text() if path.exists() else ""
        self.lines = [json.loads(line) for line in text.splitlines()]

    def add(self, line: dict[str, Any]) -> None:
        """Writes one more."""
        self.lines.append(line)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def done(self, kind: str, number: signal.Signals) -> int:
        """How many signals of a number reached a run of a kind that was compared thereafter."""
        count = waiting = 0
        for line in self.lines:
            if line["kind"] != kind:
                continue
            if line.get("begun"):
                waiting = 0  # the one before it was cut off, its last run never compared
            waiting += bool(line.get("counts")) and line["signal"] == number.name
            if "compared" in line:
                count, waiting = count + waiting, 0
        return count

    def summary(self) -> dict[str, Any]:
        """What was done, by kind, and everything that differed."""
        kinds: dict[str, Any] = {}
        for line in self.lines:
            kind = kinds.setdefault(
                line["kind"], {"exits": {}, "runs_compared": 0, "different": [], "seconds": 0.0}
            )
            kind["seconds"] = round(kind["seconds"] + line.get("seconds", 0.0), 1)
            if "signal" in line:
                name = f"{line['signal']} {line['moment']}: exit {line['exit']}"
                kind["exits"][name] = kind["exits"].get(name, 0) + 1
            if "compared" in line:
                kind["runs_compared"] += 1
            kind["different"] += line.get("different", [])
        for name, kind in kinds.items():
            for number in (signal.SIGKILL, signal.SIGTERM):
                kind[number.name] = self.done(name, number)
        return kinds


@contextlib.contextmanager
def _timed(log: Log, kind: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Notes lines of a kind, each with the seconds since the one before."""
    before = time.monotonic()

    def note(line: dict[str, Any]) -> None:
        nonlocal before
        now = time.monotonic()
        log.add({"kind": kind, **line, "seconds": round(now - before, 2)})
        before = now

    note({"begun": True})
    yield note


def whole_campaign(
    log: Log, *, kinds: Sequence[str], kills: int, terms: int, seed: int
) -> dict[str, Any]:
    """Kills every kind, and goes on where an earlier campaign with the same log was cut off.

    Args:
      log: what was done.
      kinds: words of `KINDS`.
      kills: SIGKILLs for each of a kind's share of 8, and so on.
      terms: SIGTERMs, likewise for each of a share of 3.
      seed: of the moments.

    Returns:
      Kind -> what was done to it.
    """
    for kind in kinds:
        wanted = {
            signal.SIGKILL: -(-KINDS[kind].kills * kills // 8),
            signal.SIGTERM: -(-KINDS[kind].terms * terms // 3),
        }
        left = {number: max(0, n - log.done(kind, number)) for number, n in wanted.items()}
        if not any(left.values()):
            continue
        with tempfile.TemporaryDirectory() as folder, _timed(log, kind) as note:
            done = campaign(
                Path(folder),
                kills=left[signal.SIGKILL],
                terms=left[signal.SIGTERM],
                seed=seed + len(log.lines),  # other moments than before
                kind=kind,
                note=note,
            )
        if different := [line for line in done.different if line.startswith("exit ")]:
            log.add({"kind": kind, "different": different})
    return log.summary()


def main() -> None:
    """The campaign, and its summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, help="SIGKILLs: 20, of a campaign 8 a kind")
    parser.add_argument("--terms", type=int, help="SIGTERMs: 10, of a campaign 3 a kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", default=",".join(MOMENTS))
    parser.add_argument("--campaign", action="store_true", help="every kind")
    parser.add_argument(
        "--kinds", default="", help="of a campaign, separated by semicolons; empty = all"
    )
    parser.add_argument("--log", default=str(ROOT / "runs" / "faults.jsonl"), help="of a campaign")
    parser.add_argument("--output", help="faults.json, of a campaign fault_campaign.json")
    arguments = parser.parse_args()
    results = ROOT / "benchmarks" / "results"
    if arguments.campaign:
        kinds = arguments.kinds.split(";") if arguments.kinds else list(KINDS)
        kills, terms = arguments.kills or 8, 3 if arguments.terms is None else arguments.terms
        found = whole_campaign(
            Log(Path(arguments.log)),
            kinds=kinds,
            kills=kills,
            terms=terms,
            seed=arguments.seed,
        )
        several = [name for name in found if KINDS[name].processes > 1]
        summary: dict[str, Any] = {
            "command": f"python -m benchmarks.faults --campaign --kills={kills} --terms={terms}",
            "SIGKILL": sum(kind["SIGKILL"] for kind in found.values()),
            "SIGTERM": sum(kind["SIGTERM"] for kind in found.values()),
            "with two processes": sum(
                found[name][number] for name in several for number in ("SIGKILL", "SIGTERM")
            ),
            "runs_compared": sum(kind["runs_compared"] for kind in found.values()),
            "different": [line for kind in found.values() for line in kind["different"]],
            "kinds": found,
        }
        output = arguments.output or results / "fault_campaign.json"
    else:
        kills, terms = arguments.kills or 20, 10 if arguments.terms is None else arguments.terms
        with tempfile.TemporaryDirectory() as folder:
            done = campaign(
                Path(folder),
                kills=kills,
                terms=terms,
                seed=arguments.seed,
                moments=arguments.moments.split(","),
            )
        exits = {
            f"{name}: exit {code}": count for (name, code), count in sorted(done.exits.items())
        }
        summary = {
            "command": f"python -m benchmarks.faults --kills={kills} --terms={terms} "
            f"--seed={arguments.seed} --moments={arguments.moments}",
            "run": RUN,
            "runs_compared": done.runs,
            "different": done.different,
            "exits": exits,
        }
        output = arguments.output or results / "faults.json"
    paths.write(Path(output), json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    sys.exit(bool(summary["different"]))


if __name__ == "__main__":
    main()
