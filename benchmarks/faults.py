"""Kills small runs at random moments and holds what they end in against a run left alone.

    python -m benchmarks.faults --kills=20 --terms=10

Every run goes through the command line. A moment is drawn within the time the run left alone took,
or is the one at which a save, a snapshot or the last evaluation begins. The same command is run
again until it ends; then the digests of every leaf, the cache, the rankings, the results and the
rows of metrics.jsonl must equal those of the run left alone, times apart. Writes
`benchmarks/results/faults.json`, or what `--output` names.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from corrector_jax import paths
from corrector_jax.checkpoint import Checkpoints
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
    moments: Sequence[str] = MOMENTS,
    say: Callable[[str], None] = print,
) -> Campaign:
    """Runs, kills and compares.

    Args:
      folder: for data and workdirs.
      kills: SIGKILLs that end a process.
      terms: SIGTERMs that make one save and exit.
      seed: of the moments.
      moments: which ones, each as likely as it is often named.
      say: told of every process that ended.

    Returns:
      What happened.
    """
    chosen, done = random.Random(seed), Campaign()
    config = write_config(folder)
    begun = time.monotonic()
    alone = start(config, folder / "alone")
    code, errors = end(alone)
    if code:
        raise RuntimeError(f"the run left alone ended with {code}: {errors}")
    done.seconds = time.monotonic() - begun
    expected = outcome(folder / "alone")
    wanted = {signal.SIGKILL: kills, signal.SIGTERM: terms}
    workdir = folder / "run-0"
    while any(wanted.values()):
        number = chosen.choice([number for number, left in wanted.items() if left])
        process = start(config, workdir)
        moment = chosen.choice(moments)
        wait_until(moment, workdir, process, chosen.uniform(0.1, 1.0) * done.seconds)
        if process.poll() is None:
            process.send_signal(number)
        code, errors = end(process)
        name = f"{number.name} {moment}"
        done.exits[name, code] += 1
        say(f"{name}: exit {code}, {sum(wanted.values())} signals left")
        if code in (-signal.SIGKILL, EXIT_CODE):
            wanted[number] -= 1
        elif code:
            done.different.append(f"exit {code} after {name}: {errors[-2000:]}")
        if code == 0 or not any(wanted.values()):
            compare(done, config, workdir, expected)
            workdir = folder / f"run-{done.runs}"
    return done


def compare(done: Campaign, config: Path, workdir: Path, expected: dict[str, Any]) -> None:
    """Lets a run end, undisturbed, and holds it against the run left alone."""
    code, errors = end(start(config, workdir))
    if code:
        done.different.append(f"{workdir.name}: exit {code}: {errors[-2000:]}")
    found = outcome(workdir)
    done.different += [f"{workdir.name}: {key}" for key in expected if found[key] != expected[key]]
    done.runs += 1


def write_config(folder: Path) -> Path:
    """A configuration file of a tiny run whose data lies in the folder."""
    keys = tiny.overrides(folder) | RUN
    path = folder / "config.py"
    path.write_text(
        "from corrector_jax import config\n\n\ndef get_config():\n"
        f"    c = config.default()\n    c.update_from_flattened_dict({keys!r})\n    return c\n"
    )
    return path


def start(config: Path, workdir: Path) -> subprocess.Popen[bytes]:
    """The command a user would write."""
    command = [sys.executable, "-m", "corrector_jax.main", f"--config={config}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def end(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Waits; the exit code and what was said on standard error."""
    _, errors = process.communicate(timeout=600)
    return process.returncode, errors.decode(errors="replace")


def wait_until(
    moment: str, workdir: Path, process: subprocess.Popen[bytes], seconds: float
) -> None:
    """Waits until a moment of the run, its end, or some seconds."""
    pattern = PATTERNS.get(moment)
    seen = set(workdir.glob(pattern)) if pattern else set()
    limit = time.monotonic() + (600 if pattern else seconds)
    while process.poll() is None and time.monotonic() < limit:
        if pattern and set(workdir.glob(pattern)) - seen:
            return
        time.sleep(0.002)


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
    looked_at = [*(workdir / "runs").iterdir(), *(workdir / "drift").iterdir()]
    for path in [*sorted(looked_at, key=str), workdir / "softmax.json"]:
        found[path.name] = path.read_bytes()
    return found


def main() -> None:
    """The campaign, and its summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", default=",".join(MOMENTS))
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "faults.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = campaign(
            Path(folder),
            kills=arguments.kills,
            terms=arguments.terms,
            seed=arguments.seed,
            moments=arguments.moments.split(","),
        )
    exits = {f"{name}: exit {code}": count for (name, code), count in sorted(done.exits.items())}
    summary = {
        "command": f"python -m benchmarks.faults --kills={arguments.kills} "
        f"--terms={arguments.terms} --seed={arguments.seed} --moments={arguments.moments}",
        "run": RUN,
        "runs_compared": done.runs,
        "different": done.different,
        "exits": exits,
    }
    paths.write(Path(arguments.output), json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    sys.exit(bool(done.different))


if __name__ == "__main__":
    main()
