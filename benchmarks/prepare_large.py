"""Prepares a generated corpus of millions of passages: how fast, in how much memory, how resumable.

    python benchmarks/prepare_large.py [--targets=2000000] [--folder=DIR]

Writes a BEIR folder of made-up passages of 40 words, then reads and tokenizes it in processes of
their own, which are killed (SIGKILL) in the middle and started again. Reports the peak resident
memory of every one of them, rates, and what the restarts found. Leaves
benchmarks/results/prepare_large.json. Needs about 1 KB of disk a passage.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from corrector_jax.data.prepared import SHARD

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "prepare_large.json"
MAX_LEN = 48
WORDS = 40


def write_source(folder: Path, targets: int) -> None:
    """A BEIR folder of `targets` passages and one query in a thousand of them."""
    from corrector_jax import weights

    rng = np.random.default_rng(0)
    vocabulary = json.loads(weights.find_tokenizer("all-MiniLM-L6-v2"))["model"]["vocab"]
    words = [word for word in vocabulary if word.isascii() and word.isalpha()]
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w") as file:
        for start in range(0, targets, 10_000):
            # Words as frequent as in a language: the n-th a share of 1/n.
            drawn = np.minimum(rng.zipf(1.3, (10_000, WORDS)) - 1, len(words) - 1)
            for row, numbers in enumerate(drawn[: targets - start].tolist(), start):
                text = " ".join([words[n] for n in numbers])
                file.write(f'{{"_id": "t{row}", "title": "{words[row % len(words)]}", ')
                file.write(f'"text": "{text}"}}\n')
    with (folder / "queries.jsonl").open("w") as file:
        for row in range(0, targets, 1000):
            file.write(f'{{"_id": "q{row}", "text": "{words[row % len(words)]}"}}\n')
    for split in ("train", "dev"):
        lines = [f"q{row}\tt{row}\t1\n" for row in range(0, targets, 1000)]
        (folder / "qrels" / f"{split}.tsv").write_text(
            "query-id\tcorpus-id\tscore\n" + "".join(lines)
        )


def work(source: str, cache: str, stage: str) -> None:
    """In a process of its own: prepares, or prepares and tokenizes; prints what it took."""
    from corrector_jax import weights
    from corrector_jax.data import sources
    from corrector_jax.data.token_table import token_table
    from corrector_jax.data.tokenize import TextTokenizer

    started = time.monotonic()
    data = sources.load(source, cache_dir=cache)
    if stage == "tokens":
        token_table(
            data.target_texts,
            TextTokenizer(weights.find_tokenizer("all-MiniLM-L6-v2")),
            name=data.name,
            content_fingerprint=data.fingerprint(),
            template="{title} {text}",
            prefix="",
            max_len=MAX_LEN,
            folder=Path(cache) / "tokens",
        )
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": round(seconds, 1), "peak_rss_bytes": peak}))


def start(source: Path, cache: Path, stage: str) -> subprocess.Popen[str]:
    """Starts `work` in a process of its own."""
    command = [sys.executable, __file__, "--work", str(source), str(cache), stage]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What the process measured."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a process ended with code {process.returncode}")
    return dict(json.loads(out.strip().splitlines()[-1]))


def done(cache: Path, part: str) -> int:
    """How many targets a part of the cache holds for good."""
    for state in (cache / part).rglob("progress.json"):
        found = json.loads(state.read_text())
        return int(found.get("size", found.get("done", 0)))
    return 0


def kill_at(process: subprocess.Popen[str], cache: Path, part: str, count: int) -> dict[str, Any]:
    """Kills the process once `count` targets are on the disk."""
    while done(cache, part) < count:
        if process.poll() is not None:
            raise SystemExit("the process ended before it could be killed: write more --targets")
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stdout is not None
    process.stdout.close()
    return {"kept": done(cache, part), "peak_rss_bytes": used.ru_maxrss * 1024}


def main() -> None:
    """Runs it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--work", nargs=3, metavar=("SOURCE", "CACHE", "STAGE"))
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work)
        return
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        source, cache = folder / "source", folder / "cache"
        write_source(source, arguments.targets)
        half = arguments.targets // 2
        runs = {
            "reading_killed": kill_at(start(source, cache, "texts"), cache, "data", half),
            "reading_resumed": finish(start(source, cache, "texts")),
            "tokenizing_killed": kill_at(start(source, cache, "tokens"), cache, "tokens", half),
            "tokenizing_resumed": finish(start(source, cache, "tokens")),
            "nothing_left_to_do": finish(start(source, cache, "tokens")),
        }
        left = arguments.targets - runs["tokenizing_killed"]["kept"]
        result = {
            "targets": arguments.targets,
            "source_bytes": (source / "corpus.jsonl").stat().st_size,
            "shard": SHARD,
            "max_len": MAX_LEN,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs.values()),
            "tokenized_per_second": round(left / runs["tokenizing_resumed"]["seconds"]),
            **runs,
        }
        arguments.result.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
