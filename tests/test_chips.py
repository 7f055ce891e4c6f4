from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from corrector_jax import chips
from corrector_jax.hlo import Collective, Cost
from corrector_jax.types import UserError
from tests.conftest import ROOT

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: nothing compiles for a TPU"
)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [("v4:2x2x1", 4, "v4"), ("v5e:4x4", 16, "v5e"), ("v5p:2x2x2", 8, "v5p"), ("v6e:2x4", 8, "v6e")],
)
def test_a_topology_has_a_device_for_each_chip(name, count, kind):
    devices, chip = chips.topology(name)
    assert len(devices) == count
    assert chip == chips.TPUS[kind] == chips.of(devices[0])
    # One device with both cores, where a chip has two: the figures are those of whole chips.
    assert devices[0].num_cores == (2 if kind in ("v4", "v5p") else 1)


def test_cpu_devices_are_the_first_that_there_are():
    devices, chip = chips.topology("cpu:3")
    assert devices == jax.devices("cpu")[:3]
    assert chip == chips.CPU


def test_a_device_without_figures_has_a_name():
    assert chips.of(jax.devices("cpu")[0]) == chips.CPU


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("v5e", "write v4:2x2x1, v5e:4x4"),
        ("v5e:4by4", "write v4:2x2x1, v5e:4x4"),
        ("v5e:0x4", "write v4:2x2x1, v5e:4x4"),
        ("v9:4x4", "write v4:2x2x1, v5e:4x4"),
        ("cpu:0", "or cpu:8"),
        ("v5e:2x2x1", "write v5e:4x4"),
        ("v4:2x2", "write v4:2x2x1"),
        ("cpu:64", "write XLA_FLAGS=--xla_force_host_platform_device_count=64"),
        pytest.param("v5e:1x1", "write v5e:4x4", marks=needs_libtpu),
        pytest.param("v5e:3x4", "write v5e:4x4", marks=needs_libtpu),
    ],
)
def test_a_topology_that_cannot_be_is_refused(name, advice):
    with pytest.raises(UserError, match="topology") as refused:
        chips.topology(name)
    message = str(refused.value)
    assert name in message
    assert advice in message
    assert "\n" not in message


def test_without_libtpu_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match="write pip install libtpu"):
        chips.topology("v5e:4x4")


@needs_libtpu
def test_what_a_compiler_writes_to_stderr_is_dropped_and_the_rest_comes_back(capfd):
    devices, _ = chips.topology("v5e:2x2")

    def fail():
        os.write(2, b"from C++\n")
        raise KeyError

    with pytest.raises(KeyError), chips.compiling(devices):
        fail()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


@needs_libtpu
def test_nothing_compiled_for_a_tpu_enters_the_persistent_cache(tmp_path):
    devices, _ = chips.topology("v5e:2x2")
    folder = jax.config.jax_compilation_cache_dir
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=SingleDeviceSharding(devices[0]))
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        compilation_cache.reset_cache()
        with chips.compiling(devices):
            jax.jit(jnp.cos).lower(x).compile()
        assert list(tmp_path.iterdir()) == []
        jax.jit(jnp.cos).lower(jnp.ones((3, 5))).compile()
        assert list(tmp_path.iterdir())  # And it is on again.
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


COMPILES = """
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from corrector_jax import chips

devices, _ = chips.topology("v5e:2x2")
x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=SingleDeviceSharding(devices[0]))
with chips.compiling(devices):
    jax.jit(jnp.sin).lower(x).compile()
print("compiled", flush=True)
input()
"""


@needs_libtpu
def test_two_processes_compile_for_a_tpu_at_once_and_in_silence():
    started = [
        subprocess.Popen(
            [sys.executable, "-c", COMPILES],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    # Both hold libtpu when the second has compiled: they end only now.
    assert [process.stdout.readline() for process in started] == ["compiled\n"] * 2
    assert [process.communicate("\n", timeout=60)[1] for process in started] == ["", ""]


COST = Cost(
    flops=100.0,
    bytes=30.0,
    collectives={"all-gather": Collective(2, 8, 6), "all-reduce": Collective(1, 8, 14)},
    largest=None,
    flops_of={},
    unknown_loops=(),
)


def test_the_floor_is_work_over_peak():
    chip = chips.Chip("toy", 1.0, flops_bf16=10.0, hbm_bytes_per_s=2.0, ici_bytes_per_s=4.0)
    floor = chips.floor_seconds(COST, chip)
    assert floor == {"compute": 10.0, "memory": 15.0, "network": 5.0}
    assert chips.binding(floor) == "memory"


def test_where_no_peak_is_known_there_is_no_floor():
    assert chips.floor_seconds(COST, chips.CPU) == {}
    assert chips.binding({}) == ""
    only = chips.Chip("one", flops_bf16=50.0)
    assert chips.floor_seconds(COST, only) == {"compute": 2.0}


def test_every_tpu_has_all_its_figures():
    for name, chip in chips.TPUS.items():
        assert chip.name == name
        assert None not in (chip.memory_bytes, chip.flops_bf16)
        # A second of products, a second of memory, a second of links: each slower than the last.
        assert chip.flops_bf16 > 100 * chip.hbm_bytes_per_s > 100 * chip.ici_bytes_per_s
