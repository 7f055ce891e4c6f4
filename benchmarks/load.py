"""Does memory stay flat in a process that runs for long? A server under load, a training run.

    python -m benchmarks.load --serve=runs/quickstart --minutes=30 --clients=20
    python -m benchmarks.load --train=3000

The first serves a finished run and lets clients ask its dev queries, each as soon as it has read
the answer to the one before and has waited for `--pause` seconds. The second trains the tests' tiny
run for so many steps, with refreshes, probes, evaluations and checkpoints on the way, and looks
from a quarter of them to the last: what compiles before and draws after is not training. Either is
a process of its own, whose memory (anonymous pages: mapped files do not count) is read every
second. It is flat if the median of the last quarter of that time is at most 5 % above that of the
second; the first is left out, in which caches fill. Each leaves its part of
benchmarks/results/load.json. Exit code 1: it grew, or an answer was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from corrector_jax import paths
from corrector_jax.evaluate import saved_config
from corrector_jax.job import load_data
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "load.json"
FLAT = 1.05
"""How many times its earlier memory a process may hold that leaks nothing."""

LONG = {
    "refresh.every": 500,
    "checkpoint.every": 250,
    "eval.every": 500,
    "eval.bm25": False,
    "corrector.probe_every": 50,
}
"""What a long run does between its steps."""


@contextlib.contextmanager
def watched(process: subprocess.Popen[str]) -> Iterator[list[float]]:
    """Reads the memory of a process every second, in MiB, while the block runs."""
    found: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            with contextlib.suppress(OSError, StopIteration):  # it has just ended
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                kib = next(line.split()[1] for line in lines if line.startswith("RssAnon:"))
                found.append(int(kib) / 1024)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def summary(mib: Sequence[float]) -> dict[str, Any]:
    """What memory did.

    Args:
      mib: a value a second, four or more.

    Returns:
      Medians of its quarters, in MiB, the most, and whether it is flat.
    """
    edges = [len(mib) * quarter // 4 for quarter in range(5)]
    quarters = [statistics.median(mib[a:b]) for a, b in itertools.pairwise(edges)]
    return {
        "seconds": len(mib),
        "mib_by_quarter": [round(quarter, 1) for quarter in quarters],
        "mib_most": round(max(mib), 1),
        "flat": quarters[3] <= FLAT * quarters[1],
    }


def serve(workdir: Path, *, seconds: float, clients: int, pause: float) -> dict[str, Any]:
    """Serves a run and asks it.

    Args:
      workdir: of a finished run.
      seconds: how long.
      clients: how many ask at a time.
      pause: seconds between an answer and the next question of a client.

    Returns:
      A JSON-able dict: memory, searches, wrong answers, seconds a search took.
    """
    queries = load_data(saved_config(workdir)).splits["dev"].texts
    command = [sys.executable, "-m", "corrector_jax.main", "--mode=serve", f"--workdir={workdir}"]
    process = subprocess.Popen(
        [*command, "--config.serve.port=0"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    took: list[float] = []
    wrong: list[str] = []
    ends = 0.0

    def ask(port: int, first: int) -> None:
        for number in range(first, sys.maxsize, clients):
            if time.monotonic() >= ends:
                return
            query = queries[number % len(queries)]
            began = time.monotonic()
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
                with contextlib.closing(connection):
                    connection.request("GET", f"/search?query={quote(query)}")
                    reply = connection.getresponse()
                    body = json.loads(reply.read())
                if reply.status != 200 or body["query"] != query:
                    wrong.append(f"{query}: {reply.status}")
            except (OSError, ValueError, http.client.HTTPException, KeyError) as error:
                wrong.append(f"{query}: {error!r}")
            took.append(time.monotonic() - began)
            time.sleep(pause)

    try:
        assert process.stdout is not None
        ready = next((m for m in map(_address.match, process.stdout) if m), None)
        if ready is None:
            raise RuntimeError("the server ended before it was ready: it said why")
        ends = time.monotonic() + seconds
        asking = [
            threading.Thread(target=ask, args=(int(ready[1]), first)) for first in range(clients)
        ]
        with watched(process) as mib:
            for thread in asking:
                thread.start()
            for thread in asking:
                thread.join()
    finally:
        process.kill()
        process.communicate()
    return {
        **summary(mib),
        "clients": clients,
        "pause_seconds": pause,
        "searches": len(took),
        "wrong": wrong[:10],
        "search_seconds": {
            "median": round(statistics.median(took), 3),
            "p95": round(statistics.quantiles(took, n=20)[-1], 3),
            "most": round(max(took), 3),
        },
    }


_address = re.compile(r"http://127\.0\.0\.1:(\d+) ")


def train(steps: int) -> dict[str, Any]:
    """Trains the tests' tiny run for so many steps.

    Returns:
      A JSON-able dict: memory, and whether the run ended well.
    """
    with tempfile.TemporaryDirectory() as folder:
        keys = tiny.overrides(Path(folder)) | LONG | {"train.steps": steps}
        flags = [f"--config.{key}={value}" for key, value in keys.items()]
        config = ROOT / "corrector_jax" / "config.py"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "corrector_jax.main", f"--config={config}"),
                *(f"--workdir={folder}/run", *flags),
            ],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": tiny.xla_flags(keys["mesh.devices"])},
            stdout=subprocess.DEVNULL,
            text=True,
        )
        saved = Path(folder) / "run" / "checkpoints"

        def train_to(step: int) -> None:
            while process.poll() is None and not (saved / str(step)).exists():
                time.sleep(0.1)

        train_to(max(250 * (steps // 1000), 250))
        with watched(process) as mib:
            train_to(steps)
        code = process.wait()
        wrong = [f"exit {code}"] if code else []
    return {**summary(mib), "steps": steps, "doing": LONG, "wrong": wrong}


def main() -> None:
    """One of the two, and its part of the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", type=Path, help="the folder of a finished run")
    parser.add_argument("--train", type=int, default=0, help="steps")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--pause", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if bool(arguments.serve) == bool(arguments.train):
        parser.error("write --serve=DIR or --train=STEPS")
    if arguments.serve:
        seconds, clients = 60 * arguments.minutes, arguments.clients
        found = serve(arguments.serve, seconds=seconds, clients=clients, pause=arguments.pause)
    else:
        found = train(arguments.train)
    before = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    name = "serve" if arguments.serve else "train"
    record = {"command": f"python -m benchmarks.load {' '.join(sys.argv[1:])}", **found}
    record["cores"] = os.cpu_count()
    paths.write(arguments.output, json.dumps(before | {name: record}, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    sys.exit(bool(found["wrong"]) or not found["flat"])


if __name__ == "__main__":
    main()
