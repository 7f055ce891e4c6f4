"""Devices that need not be at hand: what they can do at most, and how to compile for them.

A program is compiled for a named TPU topology by the TPU's compiler (libtpu), on any Linux machine.
Its cost (`hlo.cost`) over the peak rates here is a floor under the time of a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from corrector_jax.hlo import Cost
from corrector_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """The public figures of one device as jax lists it; None where there are none.

    Attributes:
      name: as in the name of a topology.
      memory_bytes: main memory.
      flops_bf16: peak of dense bfloat16 products, per second.
      hbm_bytes_per_s: peak between the chip and its main memory.
      ici_bytes_per_s: peak that it sends to other chips over all its links together, one direction.
    """

    name: str
    memory_bytes: float | None = None
    flops_bf16: float | None = None
    hbm_bytes_per_s: float | None = None
    ici_bytes_per_s: float | None = None


CPU = Chip("cpu")

# Of the TPUs each device is one chip: the two cores of v4 and v5p work as one ("megacore"). Where a
# page gives the links' bandwidth in both directions, half of it is here.
TPUS = {
    chip.name: chip
    for chip in (
        # https://cloud.google.com/tpu/docs/v4, but for the links: six of 50 GB/s, table 4 of
        # https://arxiv.org/abs/2304.01433.
        Chip("v4", 32 * 2**30, 275e12, 1200e9, 300e9),
        # https://docs.cloud.google.com/tpu/docs/v5e: links 400 GBps, both directions.
        Chip("v5e", 16e9, 197e12, 819e9, 200e9),
        # https://docs.cloud.google.com/tpu/docs/v5p: links 1200 GBps, both directions.
        Chip("v5p", 95 * 2**30, 459e12, 2765e9, 600e9),
        # https://docs.cloud.google.com/tpu/docs/v6e: links 800 GBps, both directions.
        Chip("v6e", 32e9, 918e12, 1600e9, 400e9),
    )
}

# By the kind that jax names. GPUs are the SXM modules by NVIDIA's data sheets: peaks without
# sparsity, NVLink in one direction.
_KINDS = {
    "TPU v4": TPUS["v4"],
    "TPU v5 lite": TPUS["v5e"],
    "TPU v5e": TPUS["v5e"],
    "TPU v5": TPUS["v5p"],
    "TPU v5p": TPUS["v5p"],
    "TPU v6 lite": TPUS["v6e"],
    "TPU v6e": TPUS["v6e"],
    "NVIDIA A100-SXM4-80GB": Chip("A100", 80e9, 312e12, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 80e9, 989e12, 3350e9, 450e9),
    "NVIDIA H200": Chip("H200", 141e9, 989e12, 4800e9, 450e9),
}
_EXAMPLE = {"v4": "v4:2x2x1", "v5e": "v5e:4x4", "v5p": "v5p:2x2x1", "v6e": "v6e:4x4"}


def of(device: jax.Device) -> Chip:
    """The figures of a device at hand; one without figures is a Chip with its name only."""
    return _KINDS.get(device.device_kind, Chip(device.device_kind))


def topology(name: str) -> tuple[list[jax.Device], Chip]:
    """Devices to compile for.

    Args:
      name: 'v5e:4x4', 'v4:2x2x1', 'v5p:2x2x1', 'v6e:4x4' (chips along each axis), or 'cpu:8', the
        first eight CPU devices.

    Returns:
      The devices, which can be compiled for but hold nothing (those of a CPU are real), and what
      each of them can do.

    Raises:
      UserError: the name means nothing, is refused, or libtpu is not installed.
    """
    kind, _, size = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        return _cpus(int(size)), CPU
    if kind not in TPUS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        examples = ", ".join(_EXAMPLE.values())
        raise UserError(f"no topology is called {name!r}: write {examples} or cpu:8")
    if size.count("x") != _EXAMPLE[kind].count("x"):
        raise UserError(
            f"topology {name!r} has the wrong number of axes for {kind}: write {_EXAMPLE[kind]}"
        )
    if not os.environ.get("TPU_LIBRARY_PATH") and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"topology {name!r} needs the TPU compiler, which is not installed: "
            f"write pip install libtpu (Linux x86-64 only), or cpu:8 for the topology"
        )
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        with quiet():
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"topology {name!r} is refused by the TPU compiler ({_first_line(error)}): "
            f"the first two axes are even, write {_EXAMPLE[kind]}"
        ) from error
    return list(found.devices), TPUS[kind]


@contextlib.contextmanager
def compiling(devices: list[jax.Device]) -> Iterator[None]:
    """Around lowering and compiling for the devices of a `topology`.

    For a TPU: in silence, and past jax's persistent cache, which would keep what it cannot read
    back without a TPU. Elsewhere nothing changes.
    """
    if devices[0].platform != "tpu":
        yield
        return
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # It decides once whether it is on.
    try:
        with quiet():
            yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Around a call into libtpu: what it writes to stderr from C++ is dropped.

    It complains that there is no TPU. Several processes may compile at once, and no metadata server
    is asked.
    """
    # A TPU has one owner, and libtpu a lock; who only compiles needs neither.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def floor_seconds(cost: Cost, chip: Chip) -> dict[str, float]:
    """The least time that each part of a device needs for a program, were it alone.

    Args:
      cost: of one run on one device.
      chip: that device.

    Returns:
      'compute', 'memory' and 'network' -> seconds; the largest of them binds, and is the floor of
      the whole where the three overlap perfectly. 'memory' takes `cost.bytes`, an upper estimate:
      a step may beat it. Without the parts whose rate is not known.
    """
    parts = {
        "compute": (cost.flops, chip.flops_bf16),
        "memory": (cost.bytes, chip.hbm_bytes_per_s),
        "network": (sum(c.sent for c in cost.collectives.values()), chip.ici_bytes_per_s),
    }
    return {part: work / rate for part, (work, rate) in parts.items() if rate}


def find_devices() -> None:
    """Lets jax look for devices; libtpu where there is no TPU does not tell everybody so."""
    tpu = any(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists()
    if tpu or importlib.util.find_spec("libtpu") is None:
        return
    with quiet():
        jax.devices()


def binding(floor: dict[str, float]) -> str:
    """Which part of `floor_seconds` is the slowest; '' where nothing is known."""
    return max(floor, key=lambda part: floor[part], default="")


def _cpus(count: int) -> list[jax.Device]:
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(
            f"topology 'cpu:{count}' needs {count} CPU devices but jax has {len(found)}: write "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before the command"
        )
    return found[:count]


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0].rstrip(".")
