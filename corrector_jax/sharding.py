"""The mesh and where values live on it; the only place that calls jit with shardings and donation.

Rows (the cache, the token table) and examples (the batch) are split over the same axis; parameters
are on every device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from corrector_jax.types import PyTree

AXIS = "data"
ROWS = PartitionSpec(AXIS)
EVERYWHERE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and the shardings of everything that lives on it."""

    mesh: Mesh

    @property
    def num_devices(self) -> int:
        """Devices that rows and examples are split over."""
        return self.mesh.size

    @property
    def rows(self) -> NamedSharding:
        """First axis split over the devices: cache rows, token rows, examples of a batch."""
        return NamedSharding(self.mesh, ROWS)

    @property
    def everywhere(self) -> NamedSharding:
        """A full copy on every device: parameters, optimizer state, scalars."""
        return NamedSharding(self.mesh, EVERYWHERE)

    def pad(self, count: int, multiple: int = 1) -> int:
        """The smallest number >= count that every device can hold an equal, whole share of.

        Args:
          count: rows needed, >= 0.
          multiple: each device's share is a multiple of this.

        Returns:
          The padded number of rows, at least one share per device.
        """
        share = self.num_devices * multiple
        return max(1, -(-count // share)) * share

    def put_rows(self, tree: PyTree) -> PyTree:
        """Host arrays [rows, ...] -> device arrays split by row; rows must divide evenly."""
        return jax.device_put(tree, self.rows)

    def put_everywhere(self, tree: PyTree) -> PyTree:
        """Host arrays -> one copy on every device."""
        return jax.device_put(tree, self.everywhere)

    def split(self, x: jax.Array) -> jax.Array:
        """Inside jit: asks for the first axis of [n, ...] to be split, so that work on it is.

        An n that the devices do not divide stays where it is.
        """
        if x.shape[0] % self.num_devices:
            return x
        return jax.lax.with_sharding_constraint(x, self.rows)

    def per_device(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """`jax.shard_map` on this mesh: `function` sees each device's own rows."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def jit_step(
        self, step: Callable[..., Any], out: PyTree, donate: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """Compiles a step for this mesh.

        Args:
          step: a pure function of positional arrays.
          out: shardings of what it returns (a prefix of its tree).
          donate: positions of arguments whose buffers the results reuse.

        Returns:
          The jitted function.
        """
        return jax.jit(step, out_shardings=out, donate_argnums=donate)


def make_placement(devices: int = 0) -> Placement:
    """A one-axis mesh over the first `devices` devices (0 = all).

    Raises:
      ValueError: more devices are asked for than jax sees.
    """
    available = jax.devices()
    if devices > len(available):
        raise ValueError(f"{devices} devices are asked for but jax sees {len(available)}")
    chosen = np.array(available[: devices or len(available)])
    # Auto: jax.make_mesh defaults to Explicit axes, in which gathers from sharded rows are refused.
    return Placement(Mesh(chosen, (AXIS,), axis_types=(AxisType.Auto,)))


def local_start(rows: int) -> jax.Array:
    """Inside `per_device`: the global number, a scalar, of this device's first row of `rows`."""
    return jax.lax.axis_index(AXIS) * rows
