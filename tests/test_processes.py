"""What one number of processes saves, another reads: real processes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[1]

# Saves at `step`, or resumes what is there and says whether it is what the step's saver had.
WORKER = """
import sys
from pathlib import Path
import jax, numpy as np
number, count, port, workdir, action, step = sys.argv[1:]
if int(count) > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(number))
from corrector_jax import cache as caches
from corrector_jax.checkpoint import Checkpoints, Position
from corrector_jax.sharding import make_placement

N, D, step = 67, 6, int(step)
place = make_placement()

def state(seed):
    values = np.random.default_rng(seed)
    whole, split = (values.normal(size=(16, 3)).astype(np.float32) for _ in range(2))
    return {
        "whole": jax.make_array_from_callback(whole.shape, place.everywhere, lambda i: whole[i]),
        "split": jax.make_array_from_callback(split.shape, place.rows, lambda i: split[i]),
    }

def cache(seed):
    rows = np.random.default_rng(seed).normal(size=(N, D)).astype(np.float32)
    empty = caches.create(N, D, dtype="float32", block_rows=4, place=place)
    write = jax.jit(lambda c, i, r: caches.write(c, i, r, seed, place), out_shardings=place.rows)
    return write(empty, np.arange(N, dtype=np.int32), rows)

def same(one, other):
    return all(
        np.array_equal(a.data, b.data)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
    )

opened = Checkpoints.writable(Path(workdir))
with opened as checkpoints:
    if action == "save":
        position = Position(step=step, data="data")
        position.cache = checkpoints.save_cache(cache(step), step=step, made_by={"pooling": "mean"})
        checkpoints.save(state(step), position)
    else:
        found = checkpoints.resume(state(99), cache(99), data="data", made_by={"pooling": "mean"})
        print("same:", same(found[0], state(step)), same(found[1], cache(step)), found[2].step)
"""


def run(processes: int, devices: int, workdir: Path, action: str, step: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": tiny.xla_flags(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, (i, processes, port, workdir, action, step))],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    said = []
    for process in started:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
        said += [line for line in out.splitlines() if line.startswith("same:")]
    return said


@pytest.mark.parametrize(
    ("saving", "reading"), [((2, 2), (1, 1)), ((1, 1), (2, 2))], ids=["2-to-1", "1-to-2"]
)
def test_another_number_of_processes_reads_state_and_cache(tmp_path, saving, reading):
    run(*saving, tmp_path, "save", 5)
    assert run(*reading, tmp_path, "read", 5) == ["same: True True 5"] * reading[0]
