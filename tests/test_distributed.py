"""One job of several processes, on this machine: the same run, stopped together, never waiting."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from corrector_jax import config as configs
from corrector_jax import distributed
from corrector_jax.evaluate import here
from corrector_jax.lock import Lock
from corrector_jax.train import train
from corrector_jax.types import UserError
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 4  # of the whole job, however many processes share them
PATIENCE = 240


def config_of(folder: Path, devices: int):
    """Slow learning: rounding differs from mesh to mesh, and Adam makes the most of it."""
    changes = {"checkpoint__every": 100, "train__steps": 12, "train__learning_rate": 1e-3}
    return tiny.config(folder, **changes, mesh__devices=devices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, tokenizer, and a file of configs/ that names them."""
    folder = tmp_path_factory.mktemp("processes")
    saved = folder / "saved.json"
    saved.write_text(configs.to_json(config_of(folder, devices=0)))
    (folder / "run.py").write_text(
        "from pathlib import Path\n"
        "from corrector_jax import config\n"
        f"get_config = lambda: config.from_json(Path({str(saved)!r}).read_text())\n"
    )
    return folder


def start(folder: Path, workdir: Path, processes: int, *flags: str) -> list[subprocess.Popen]:
    """The same command in so many processes, which share `DEVICES` devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": tiny.xla_flags(DEVICES // processes),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable, "-m", "corrector_jax.main", f"--config={folder / 'run.py'}",
        f"--workdir={workdir}", *flags,
    ]  # fmt: skip
    return [
        subprocess.Popen(
            command, env=environment | {"JAX_PROCESS_ID": str(number)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(processes)
    ]  # fmt: skip


def ends(job: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit code and standard error of every process."""
    found = []
    try:
        for process in job:
            _, errors = process.communicate(timeout=PATIENCE)
            found.append((process.returncode, errors))
    finally:
        for process in job:
            process.kill()
    return found


def steps(workdir: Path) -> dict[int, dict]:
    """Step -> its row of metrics.jsonl, as far as it is written."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row for row in rows if "train/loss" in row}


def wait_for_step(workdir: Path, step: int, job: list[subprocess.Popen]) -> None:
    started = time.monotonic()
    while step not in steps(workdir):
        assert time.monotonic() - started < PATIENCE
        assert all(process.poll() is None for process in job), [p.communicate() for p in job]
        time.sleep(0.02)


def finish_here(folder: Path, workdir: Path) -> None:
    """The run, or what is left of it, in this process."""
    train(config_of(folder, DEVICES), workdir, started=time.monotonic())


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    """The run in one process."""
    finish_here(folder, folder / "alone")
    return folder / "alone"


# (processes, fsdp, the step after which it is told to stop, which of them is told)
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([(2, 4, 6, 1)], id="two-one"),
        pytest.param(
            [(2, 4, 2, 1), (1, 1, 6, 0), (4, 1, 12, None)],
            id="two-one-four",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_with_other_processes_on_the_way_a_run_ends_as_one_would(folder, alone, parts):
    """Told to stop in between, by a signal to one process; the first two share the parameters."""
    workdir = folder / f"changing-{len(parts)}"
    for processes, fsdp, step, told in parts:
        job = start(folder, workdir, processes, f"--config.mesh.fsdp={fsdp}")
        if told is not None:
            wait_for_step(workdir, step, job)
            job[told].send_signal(signal.SIGTERM)
        found = ends(job)
        expected = 75 if told is not None else 0
        assert [code for code, _ in found] == [expected] * processes, found
    if not (workdir / "results.json").exists():
        finish_here(folder, workdir)
    one, other = steps(alone), steps(workdir)
    assert list(other) == list(one) == list(range(1, 13))
    for step, row in one.items():
        for name, value in row.items():
            if name not in ("seconds", "train/examples_per_second"):
                rtol = 0.01 if name == "train/loss" else 0.1
                assert np.isclose(other[step][name], value, rtol=rtol, atol=1e-3), (step, name)
    for name in ("before", "after"):
        ours, theirs = (
            json.loads((path / "eval" / f"{name}.json").read_text()) for path in (workdir, alone)
        )
        # Ranks are the same to the last query; the loss is a sum over all targets.
        losses = [each["per_query"].pop("exact_loss") for each in (ours, theirs)]
        np.testing.assert_allclose(*losses, rtol=1e-2)
        assert ours["metrics"].pop("exact_loss") == pytest.approx(np.mean(losses[0]))
        assert theirs["metrics"].pop("exact_loss") == pytest.approx(np.mean(losses[1]))
        assert ours["metrics"] == theirs["metrics"]
        assert ours["per_query"] == theirs["per_query"]
    # Of the last evaluation; before the first step there is nothing to compare the cache with.
    # Adam makes a step of its own size of a gradient's last digit: twelve steps on three meshes
    # agree in every loss to a per cent, and to a few in what is left of the drift.
    for name, value in theirs["distribution"].items():
        assert np.isclose(ours["distribution"][name], value, rtol=5e-2), name
    ledgers = [
        json.loads((path / "results.json").read_text())["ledger"] for path in (workdir, alone)
    ]
    assert ledgers[0] == ledgers[1]


@pytest.mark.slow  # the evaluation before a first step is made by two processes above
def test_evaluate_by_two_processes_is_what_the_run_itself_found(folder, alone):
    assert [code for code, _ in ends(start(folder, alone, 2, "--mode=evaluate"))] == [0, 0]
    found, own = (
        json.loads((alone / "eval" / f"{name}.json").read_text())["metrics"]
        for name in ("test-step-12", "after")
    )
    assert found.pop("exact_loss") == pytest.approx(own.pop("exact_loss"), rel=1e-4)
    assert found == own


@pytest.mark.slow
def test_two_processes_search_their_own_rows_and_find_what_one_would(folder):
    flags = ("--config.negatives.proposal=scann", "--config.negatives.candidates=12")
    for processes in (1, 2):
        found = ends(start(folder, folder / f"scann-{processes}", processes, *flags))
        assert [code for code, _ in found] == [0] * processes, found
    one, two = (steps(folder / f"scann-{processes}") for processes in (1, 2))
    for step, row in one.items():
        assert np.isclose(two[step]["train/loss"], row["train/loss"], rtol=0.01), step
        assert np.isclose(two[step]["train/tail_share"], row["train/tail_share"], rtol=0.05), step


@pytest.mark.slow
def test_the_others_end_when_one_is_killed_and_a_checkpoint_is_left(folder):
    workdir = folder / "killed"
    job = start(folder, workdir, 2, "--config.train.steps=500", "--config.checkpoint.every=2")
    wait_for_step(workdir, 4, job)
    job[1].kill()
    started = time.monotonic()
    (code, said), _ = ends(job)
    # At once where a computation fails; where jax itself waits, it ends the process after 100 s.
    if code != -signal.SIGABRT:
        assert code == distributed.LOST, said
        assert "another process of this job cannot be reached" in said
        assert "Traceback" not in said
    else:
        assert "another task died" in said
    assert time.monotonic() - started < 150
    assert any(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())


@pytest.mark.slow
def test_the_others_end_when_one_hangs(folder):
    workdir = folder / "hanging"
    flags = ("--config.train.steps=500", "--config.mesh.timeout=45")
    job = start(folder, workdir, 2, *flags)
    wait_for_step(workdir, 2, job)
    job[1].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    code, said = job[0].wait(timeout=PATIENCE), ""
    job[1].kill()
    said = job[0].communicate()[1]
    job[1].communicate()
    assert code == distributed.LOST, said
    assert "config.mesh.timeout" in said
    assert time.monotonic() - started < 90


def test_what_one_process_alone_has_to_mend_ends_all(folder):
    """The workdir is in use: only process 0 looks."""
    workdir = folder / "taken"
    with Lock(workdir):
        found = ends(start(folder, workdir, 2))
    assert [code for code, _ in found] == [2, 2]
    assert "is in use by process" in found[0][1]
    assert "another process of this job cannot go on" in found[1][1]


@pytest.mark.parametrize(
    ("given", "environment", "said"),
    [
        ((), {"JAX_NUM_PROCESSES": "2"}, "--coordinator"),
        (("here:1", 2), {}, "--process "),
        (("here:1", 2, 2), {}, "from 0 to"),
        (("here", 2, 1), {}, "HOST:PORT"),
        ((), {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "x", "JAX_PROCESS_ID": "0"},
         "whole numbers"),
    ],
)  # fmt: skip
def test_half_an_address_is_refused(given, environment, said):
    with pytest.raises(UserError, match=said):
        distributed.start(*given, environment=environment)


def test_one_process_joins_nobody():
    assert not distributed.start(environment={"JAX_PLATFORMS": "cpu"})
    assert not distributed.start("here:1", 1, 0, environment={})
    assert distributed.is_alone()
    assert distributed.is_lead()
    assert [distributed.Vote()(wish) for wish in (False, True, False)] == [False, True, False]
    assert distributed.first_of("") == ""
    assert distributed.first_of("mine") == "mine"


@pytest.mark.parametrize(
    ("environment", "knows"),
    [
        ({"SLURM_NTASKS": "4"}, False),  # a batch script: its tasks are not started yet
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "a,b"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({}, False),
    ],
)
def test_who_finds_the_others_by_itself(environment, knows):
    assert distributed._knows_itself({"JAX_PLATFORMS": "cpu", **environment}) is knows


def test_the_loss_of_a_process_is_told_from_other_trouble(monkeypatch):
    monkeypatch.setattr(distributed, "is_alone", lambda: False)
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
    wrapped = OSError("saving failed")
    wrapped.__cause__ = lost
    for error in (lost, wrapped, TimeoutError("Timed out while waiting for a barrier.")):
        assert distributed.is_loss(error)
    for other in (UserError("gloo"), OSError("connection"), TimeoutError("a lock"), None):
        assert not distributed.is_loss(other)
    monkeypatch.setattr(distributed, "is_alone", lambda: True)
    assert not distributed.is_loss(lost)


def test_a_watch_gives_up_without_beats_and_not_while_resting(monkeypatch):
    given_up: list[str] = []
    monkeypatch.setattr(distributed, "is_alone", lambda: False)
    monkeypatch.setattr(distributed, "give_up", given_up.append)
    with distributed.Watch(0.2) as watch:
        for _ in range(8):
            watch.beat()
            time.sleep(0.05)
        with watch.resting():
            time.sleep(0.5)
        assert not given_up
        time.sleep(0.5)
    assert given_up
    assert "config.mesh.timeout" in given_up[0]


def test_a_mode_of_one_process_joins_nobody():
    done = subprocess.run(
        [sys.executable, "-m", "corrector_jax.main", "--mode=inspect", "--processes=2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--mode=inspect runs in one process" in done.stderr


def test_a_run_of_a_wide_mesh_is_read_on_one_device(folder):
    config = tiny.config(folder, mesh__devices=16, mesh__fsdp=16, train__chunk=48)
    found = here(config)
    assert (found.mesh.devices, found.mesh.fsdp, found.train.chunk) == (0, 1, 0)
    kept = here(tiny.config(folder, mesh__devices=4, mesh__fsdp=2, mesh__tensor=2))
    assert (kept.mesh.devices, kept.mesh.fsdp, kept.mesh.tensor) == (4, 2, 2)
