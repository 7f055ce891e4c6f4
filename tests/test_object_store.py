"""A whole run whose workdir is on Google Cloud Storage, as an emulator on this machine plays it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import faults
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]

# The emulator leaves out one header that the real store sends and TensorStore asks for.
SERVER = """
import contextlib, os, sys
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server
plain = objects.download
def download(request, response, storage, *rest, **more):
    plain(request, response, storage, *rest, **more)
    with contextlib.suppress(NotFound):
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["X-Goog-Generation"] = found["generation"]
objects.download = download
server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
server.start()
print(server._api._httpd.server_port, flush=True)
sys.stdin.read()
os._exit(0)  # its thread would keep it alive
"""


COPY = """
import sys
from pathlib import Path
from corrector_jax import paths
source = Path(sys.argv[1])
for file in source.rglob("*.*"):
    content = file.read_bytes()
    paths.write(paths.make(f"{sys.argv[2]}/{file.relative_to(source).as_posix()}"), content)
"""


@pytest.fixture
def store():
    """The environment in which gs://bucket is the emulator's."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    assert server.stdin is not None
    address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    yield {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    server.stdin.close()
    server.wait(timeout=10)
    server.stdout.close()


def command(store, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | store | {"XLA_FLAGS": tiny.xla_flags(2)}
    return subprocess.run(
        [sys.executable, "-m", "corrector_jax.main", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_on_an_object_store_is_the_run_on_a_disk(tmp_path, store):
    config, workdir = faults.write_config(tmp_path), "gs://bucket/runs/mine"
    keys = (
        "--config.train.steps=6", "--config.log.tensorboard=True", "--config.log.report=True",
    )  # fmt: skip
    # Two parts, for what grows is appended to, which an object store cannot do.
    constant = ("--config.train.schedule=constant", *keys[1:])
    for steps in (3, 6):
        done = command(
            store, f"--config={config}", f"--workdir={workdir}", *constant,
            f"--config.train.steps={steps}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert f"report: {workdir}/report.html" in done.stdout
    # On a disk, but the data is read from the store: the same data, and so the same run.
    copied = subprocess.run(
        [sys.executable, "-c", COPY, str(tmp_path / "data"), "gs://bucket/data"],
        cwd=ROOT, env=os.environ | store, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert copied.returncode == 0, copied.stderr
    local = command(
        store, f"--config={config}", f"--workdir={tmp_path / 'run'}", *constant, keys[0],
        "--config.data.path=gs://bucket/data", f"--config.data.cache_dir={tmp_path / 'other'}",
    )  # fmt: skip
    assert local.returncode == 0, local.stderr
    script = (
        "import json, sys; from benchmarks import faults; from corrector_jax import paths\n"
        "workdir = paths.make(sys.argv[1])\n"
        "found = faults.outcome(workdir)\n"
        # The first part ended there, and kept the sample of its end.
        "found.pop('3.safetensors', None)\n"
        "names = sorted(path.name for path in workdir.iterdir())\n"
        "print(json.dumps([repr(found), names]))"
    )
    outcomes = []
    for where in (workdir, str(tmp_path / "run")):
        read = subprocess.run(
            [sys.executable, "-c", script, where],
            cwd=ROOT, env=os.environ | store, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert read.returncode == 0, read.stderr
        outcomes.append(json.loads(read.stdout))
    assert outcomes[0][0] == outcomes[1][0]
    names = outcomes[0][1]
    assert {"report.html", "metrics.jsonl", "results.json"} <= set(names)
    assert any(name.startswith("events.") for name in names)
    assert "lock" not in names
    inspected = command(store, "--mode=inspect", f"--workdir={workdir}")
    assert inspected.returncode == 0, inspected.stdout
    assert "good" in inspected.stdout
