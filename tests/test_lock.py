"""One job per workdir: refused while its holder lives, free once it is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corrector_jax import paths
from corrector_jax.lock import Lock
from corrector_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]


def store(tmp_path):
    return paths.make(f"memory://{tmp_path.name}/run")


def test_a_second_job_is_refused_and_told_who_holds_it(tmp_path):
    refused = pytest.raises(UserError, match=f"in use by process {os.getpid()} on ")
    with Lock(tmp_path / "run"), refused:
        Lock(tmp_path / "run").__enter__()
    with Lock(tmp_path / "run") as lock:
        lock.verify()


def test_a_killed_holder_holds_nothing(tmp_path):
    script = (
        "import pathlib, sys, time; from corrector_jax.lock import Lock\n"
        "with Lock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {process.pid} "):
        Lock(tmp_path / "run").__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with Lock(tmp_path / "run") as lock:
        lock.verify()


def test_a_workdir_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Lock(tmp_path / "file" / "run").__enter__()


def test_a_removed_workdir_is_noticed(tmp_path):
    with Lock(tmp_path / "run") as lock:
        (tmp_path / "run" / "lock").unlink()
        with pytest.raises(UserError, match="no longer this job's"):
            lock.verify()


def test_on_a_store_a_living_holder_is_refused(tmp_path):
    said: list[str] = []
    with Lock(store(tmp_path), beat=0.2), pytest.raises(UserError, match="in use by process"):
        Lock(store(tmp_path), beat=0.2, say=said.append).__enter__()
    assert "waiting to see whether its job is alive" in said[0]
    with Lock(store(tmp_path), beat=0.2) as lock:  # released: nothing to wait for
        lock.verify()


def test_on_a_store_a_silent_holder_loses_the_lock(tmp_path):
    path = store(tmp_path) / "lock"
    paths.write(path, '{"host": "gone", "pid": 1, "token": "x", "beats": 7}')
    begun = time.monotonic()
    with Lock(store(tmp_path), beat=0.2) as lock:
        assert time.monotonic() - begun > 3 * 0.2
        lock.verify()
    assert not path.exists()


def test_on_a_store_a_job_that_was_taken_over_does_not_save(tmp_path):
    with Lock(store(tmp_path), beat=0.2) as lock:
        paths.write(store(tmp_path) / "lock", '{"token": "another"}')
        time.sleep(0.5)  # a beat must not take it back
        with pytest.raises(UserError, match="another job took"):
            lock.verify()
    assert (store(tmp_path) / "lock").exists()  # it is not this job's to remove


def test_on_a_store_a_read_that_fails_once_is_no_news(tmp_path, monkeypatch):
    plain = Lock._read

    with Lock(store(tmp_path), beat=0.2) as lock:
        fails = iter([True])

        def flaky(self: Lock) -> dict[str, object]:
            if next(fails, False):
                raise RuntimeError("503")
            return plain(self)

        monkeypatch.setattr(Lock, "_read", flaky)
        lock.verify()
        fails = iter([True])
        with pytest.raises(UserError, match="in use by process"):
            Lock(store(tmp_path), beat=0.2, say=lambda line: None).__enter__()


@pytest.mark.parametrize(
    "content", ["[" * 100_000, json.dumps({"host": "a\n\x1b[31mb" + "c" * 1000, "pid": {"x": 1}})]
)
def test_a_lock_of_somebody_elses_making_is_told_in_one_line(tmp_path, content):
    with Lock(tmp_path / "run"):
        (tmp_path / "run" / "lock").write_text(content)
        with pytest.raises(UserError, match=r"in use by process .* on ") as error:
            Lock(tmp_path / "run").__enter__()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_a_folder_in_its_place_is_no_lock(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match="lock is a folder and no lock: remove it"):
        Lock(tmp_path).holder()
