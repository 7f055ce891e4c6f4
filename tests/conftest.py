"""The strict harness: eight CPU devices, and silent rank promotion is an error.

It speaks through the environment, before jax is imported, so that processes started by a test run
under it too.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import pytest

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 8

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set it up")
# Tiny programs are not worth LLVM's optimisations, nor the newer way to emit fusions: without both
# a train step is compiled in a quarter of the CPU time. A flag that XLA does not know ends the
# process, and 0.11 has no other way any more.
_FLAGS = [
    f"--xla_force_host_platform_device_count={DEVICES}",
    "--xla_backend_optimization_level=0",
]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Compiling is most of a test's time, small programs more than large ones: keep all of them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Tracing makes gigabytes of objects that stay: going through all of them takes seconds each time,
# and was a quarter of the time of the tests that train; going through the youngest every 700 is a
# twentieth of tracing.
gc.set_threshold(100_000, 10, 1000)


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    import jax

    assert jax.device_count() == DEVICES, f"tests need {DEVICES} devices, jax has {jax.devices()}"


SHAPING = [
    *("seed", "strategy", "model", "train", "reader"),
    *("corrector", "negatives", "loss", "cache"),
]
"""What `program.make_program` reads of a configuration, but for refresh.rows."""


@pytest.fixture(scope="session", autouse=True)
def _runs_alike_compile_once() -> Iterator[None]:
    """Jobs of one shape share a program, and equal steps of equal parts one jitted function.

    Tracing and lowering what the run before has traced is most of a tiny run's time.
    """
    from corrector_jax import job, sharding
    from corrector_jax.program import Program

    programs: dict[object, Any] = {}
    jitted: dict[object, Any] = {}
    make_program, jit_step = job.make_program, sharding.Placement.jit_step

    def made_once(config: Any, *parts: Any) -> Any:
        shaping = [config[key] for key in SHAPING]
        shaping = [each.to_json() if hasattr(each, "to_json") else each for each in shaping]
        key = (*shaping, config.refresh.rows, *parts)
        if key not in programs:
            programs[key] = make_program(config, *parts)
        program = copy.copy(programs[key])
        object.__setattr__(program, "config", config)
        return program

    def jitted_once(
        place: Any, step: Callable[..., Any], out: Any, donate: Any = (), static: Any = ()
    ) -> Any:
        import jax

        leaves, tree = jax.tree.flatten(out)
        if owner := getattr(step, "__self__", None):  # equal methods of equal models are not equal
            step = functools.partial(step.__func__, owner)
        bound = step if isinstance(step, functools.partial) else functools.partial(step)
        given = (bound.func, bound.args, *sorted(bound.keywords.items()))
        key = (*given, *leaves, tree, donate, static)
        if key not in jitted:
            jitted[key] = jit_step(place, step, out, donate, static)
        return jitted[key]

    def known_once(made: functools.cached_property[Any]) -> property:
        """Of all copies of a program and the jobs made of them: they have its optimizer."""
        found: dict[object, Any] = {}

        def known(program: Program) -> Any:
            if program.tx not in found:
                found[program.tx] = made.func(program)
            return found[program.tx]

        return property(known)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "make_program", made_once)
        patch.setattr(sharding.Placement, "jit_step", jitted_once)
        for name, made in list(vars(Program).items()):
            if isinstance(made, functools.cached_property):
                patch.setattr(Program, name, known_once(made))
        yield


@pytest.fixture(scope="session")
def folder_of_finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `tiny.config`, with the data of a finished tiny run of the method, and `run` itself.

    One of its targets, t0, is hostile to whoever shows it; its environment held `tiny.SECRETS`.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # made once, by whoever asks first
        folder = folder.parent
    with filelock.FileLock(folder / "finished.lock"):
        if not (folder / "finished" / "run" / "report.html").exists():
            _finish(folder / "finished")
    return folder / "finished"


@pytest.fixture(scope="session")
def finished(folder_of_finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of that run; who changes it makes a copy."""
    return shutil.copytree(folder_of_finished / "run", tmp_path_factory.mktemp("own") / "run")


def _finish(folder: Path) -> None:
    from corrector_jax.train import train
    from tests import tiny

    folder.mkdir()
    tiny.overrides(folder)
    corpus = folder / "data" / "corpus.jsonl"
    first, *others = corpus.read_text().splitlines(keepends=True)
    record = json.loads(first)
    record["text"] += f" {tiny.HOSTILE}"
    corpus.write_text("".join([json.dumps(record) + "\n", *others]))
    config = tiny.config(folder, profile__steps="5:7", log__report=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in tiny.SECRETS.items():
            patch.setenv(name, value)
        train(config, folder / "run", started=time.monotonic())


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real retrieval data beside the checkout; skips where there is none."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return path
