"""Being asked to stop: at once noticed, acted on between steps, a second signal exits."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from corrector_jax import preemption as module
from corrector_jax.preemption import PreemptedError, Preemption

ROOT = Path(__file__).resolve().parents[1]


def wait_for(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_said_and_raised_where_it_is_asked_for(number):
    said: list[str] = []
    before = signal.getsignal(number)
    with Preemption(say=said.append) as preemption:
        preemption.check()
        os.kill(os.getpid(), number)
        wait_for(lambda: preemption.reason)
        with pytest.raises(PreemptedError, match=number.name):
            preemption.check()
    assert len(said) == 1
    assert signal.getsignal(number) == before


def test_other_signals_ask_for_nothing():
    with Preemption() as preemption:
        before = signal.signal(signal.SIGUSR1, lambda *_: None)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.1)
        signal.signal(signal.SIGUSR1, before)
        preemption.check()


def test_a_second_signal_exits_at_once_even_while_the_main_thread_is_busy_elsewhere():
    # One call of C code that lasts: the main thread runs no handler of Python's meanwhile.
    script = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from corrector_jax.preemption import Preemption
libc = ctypes.CDLL(None)
with Preemption():
    print("ready", flush=True)
    left = 30
    while left:
        left = libc.sleep(left)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert "asked to stop by SIGTERM" in process.stdout.readline()
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 5
    process.stdout.close()


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google Cloud's metadata server, as far as notices go."""

    answers: dict[str, str] = {}  # noqa: RUF012 - set by the tests

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        content = self.answers.get(self.path.removeprefix("/computeMetadata/v1/instance/"), "")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def metadata(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    Metadata.answers = {"maintenance-event": "NONE", "preempted": "FALSE"}
    yield Metadata.answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "value"),
    [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")],
)
def test_a_notice_that_the_machine_goes_away_is_heard(metadata, name, value):
    with Preemption() as preemption:
        time.sleep(0.3)
        preemption.check()
        metadata[name] = value
        wait_for(lambda: preemption.reason)
        with pytest.raises(PreemptedError, match=name):
            preemption.check()


def test_the_signal_that_follows_a_notice_is_the_first(metadata):
    with Preemption() as preemption:
        metadata["preempted"] = "TRUE"
        wait_for(lambda: preemption.reason)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one would end this very process
        time.sleep(0.2)
        with pytest.raises(PreemptedError):
            preemption.check()


def test_a_terminal_that_is_gone_makes_nobody_deaf():
    def say(text: str) -> None:
        raise BrokenPipeError

    with Preemption(say=say) as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: preemption.reason)


def test_a_live_migration_is_no_reason_to_stop(metadata):
    metadata["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    with Preemption() as preemption:
        time.sleep(0.3)
        preemption.check()


def test_no_metadata_server_is_no_reason_to_stop(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    with Preemption() as preemption:
        time.sleep(0.2)
        preemption.check()
