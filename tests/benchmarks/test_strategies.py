"""The runner of the comparison, through real processes."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import grid_data, grids, strategies
from tests import tiny


def arguments(folder: Path, *more: str) -> list[str]:
    """One cell of a grid on tiny data."""
    keys = tiny.overrides(folder) | {"eval.bm25": False}
    source = keys.pop("data.path")
    return [
        *("--grid=small", "--name=tiny", "--cells=corrected", "--seeds=3", f"--data={source}"),
        *(f"--runs={folder / 'runs'}", f"--results={folder / 'results'}"),
        *(f"--config.{key}={value}" for key, value in keys.items()),
        *more,
    ]


def kill_after(checkpoint: Path, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        if checkpoint.exists():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_comparison_goes_on(tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "runs" / "tiny" / "corrected-3"
    started = []

    def start(command, **options):
        process = real(command, **options)
        if "corrector_jax.main" in command:
            started.append(command)
            if len(started) == 1:
                watched = workdir / "checkpoints" / "4"
                threading.Thread(target=kill_after, args=(watched, process)).start()
        return process

    real = subprocess.Popen
    monkeypatch.setattr(strategies.subprocess, "Popen", start)

    assert strategies.main(arguments(tmp_path, "--list")) == 0
    assert capsys.readouterr().out == "corrected-3: missing\n"
    assert strategies.main(arguments(tmp_path)) == 1
    path = tmp_path / "results" / "strategies" / "tiny" / "corrected-3.json"
    assert not path.exists()
    strategies.main(arguments(tmp_path, "--list"))
    assert "corrected-3: step 4 of 8\n" in capsys.readouterr().out

    assert strategies.main(arguments(tmp_path)) == 0
    assert "resumed" in (workdir / "log.txt").read_text()
    assert not (workdir / "checkpoints").exists()
    capsys.readouterr()
    strategies.main(arguments(tmp_path, "--list"))
    assert capsys.readouterr().out == "corrected-3: done\n"
    assert strategies.main(arguments(tmp_path)) == 0
    assert len(started) == 2
    assert started[0] == started[1]

    record = json.loads(path.read_text())
    results = json.loads((workdir / "results.json").read_text())
    assert record["settings"]["train.steps"] == 8
    assert record["steps"] == 8
    assert record["ledger"] == results["ledger"]
    for name, values in record["per_query"].items():
        assert len(values) == tiny.HELD_OUT
        assert sum(values) / len(values) == pytest.approx(record["eval"]["after"][name], abs=1e-4)
    assert record["series"]["probe/kl_stale"][0] == [3, 6]
    summary = json.loads((tmp_path / "results" / "strategies_tiny_summary.json").read_text())
    assert summary["missing"] == []
    assert summary["cells"]["corrected"]["re-embedded"]["mean"] == tiny.TARGETS

    capsys.readouterr()
    assert strategies.main(arguments(tmp_path, "--config.train.steps=9")) == 2
    assert "another train.steps than this grid" in capsys.readouterr().err


def test_what_cannot_be_run_is_said_before_anything_runs(tmp_path, capsys):
    for wrong, said in (
        ("--cells=stale,fresh", "no cell 'fresh'"),
        ("--cells=oracle", "oracle embeds every target at every step"),
        ("--config.negatives.draws=0", "config.negatives.draws is 0"),
        ("--config.draws=1", "--config.draws=1 is not known"),
        ("--data=", "--data is missing"),
    ):
        assert strategies.main(arguments(tmp_path, wrong)) == 2
        assert said in capsys.readouterr().err
    assert strategies.main([]) == 2
    assert not (tmp_path / "runs").exists()


def test_negatives_are_mined_once_by_the_command_and_are_no_positives(tmp_path, monkeypatch):
    folder = grid_data.write(str(tiny.write_data(tmp_path / "whole")), tmp_path / "data")
    keys = {"data.path": str(folder), "data.cache_dir": str(tmp_path / "cache")}
    found = strategies.mined(keys)
    monkeypatch.setattr(strategies.subprocess, "run", lambda *a, **k: pytest.fail("mined again"))
    assert strategies.mined(keys) == found
    judged = (folder / "qrels" / "train.tsv").read_text().splitlines()[1:]
    positives = {tuple(line.split("\t")[:2]) for line in judged}
    ranked = [line.split() for line in Path(found["negatives.path"]).read_text().splitlines()]
    assert not positives & {(row[0], row[2]) for row in ranked}
    assert max(collections.Counter(row[0] for row in ranked).values()) <= strategies.MINED
    assert {row[0] for row in ranked} == {query for query, _ in positives}

    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("train1\tt1\t0\n")
    assert strategies.mined(keys) == {}  # the data's own


def one_cell(folder: Path) -> strategies.Cell:
    grid = grids.Grid(setting={}, cells=("stale",), seeds=(0,))
    return strategies.plan(grid, "x", runs=folder, results=folder)[0]


def test_a_comparison_that_is_asked_to_stop_asks_its_run(tmp_path, monkeypatch):
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "print('ready', flush=True); time.sleep(60)"
    )
    real, cell, here = subprocess.Popen, one_cell(tmp_path), []
    monkeypatch.setattr(
        strategies.subprocess,
        "Popen",
        lambda command, **options: real([sys.executable, "-c", code], **options),
    )

    def ask() -> None:
        log = cell.workdir / "log.txt"
        while not (log.exists() and "ready" in log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: here.append("told"))
    try:
        threading.Thread(target=ask).start()
        assert strategies.run(cell, {}) == 75
        assert not here
        os.kill(os.getpid(), signal.SIGTERM)
        assert here  # whoever listened before does again
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_that_outlived_its_benchmark_is_waited_for(tmp_path, monkeypatch):
    cell = one_cell(tmp_path)
    holder = strategies.filelock.FileLock(cell.workdir / "lock.held")
    cell.workdir.mkdir(parents=True)
    monkeypatch.setattr(
        strategies.subprocess, "Popen", lambda *a, **k: pytest.fail("started beside the other")
    )
    holder.acquire()
    failed = []

    def try_to_run() -> None:
        try:
            strategies.run(cell, {})
        except BaseException as error:
            failed.append(type(error))

    thread = threading.Thread(target=try_to_run)
    thread.start()
    time.sleep(0.3)
    waited = not failed
    holder.release()
    thread.join()
    assert waited
    assert failed
