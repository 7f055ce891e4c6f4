"""The mesh and where values live on it; the only place that calls jit with shardings and donation.

The mesh has three axes, any of which may be 1 wide:

    data     examples alone are split over it
    fsdp     examples, and the width of parameters, which are gathered where they are used
    tensor   heads and the inner width of parameters, whose partial results are summed

Rows (the cache, the token table) are split over all devices, whatever the axes.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped

from corrector_jax.types import ArrayLike, PyTree, UserError

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(AXES)
EXAMPLES = PartitionSpec(AXES[:2])
EVERYWHERE = PartitionSpec()

MESH_AXIS = {"width": "fsdp", "heads": "tensor", "inner": "tensor", None: None}
"""What an encoder family calls an axis of a parameter -> the axis of the mesh it is split over."""

Rules = tuple[tuple[str, PartitionSpec], ...]
"""(pattern of a leaf's path, its spec); leaves that no pattern matches are everywhere."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and the shardings of everything that lives on it.

    Attributes:
      mesh: the mesh.
      rules: how parameters are split, of `rules_of`.
    """

    mesh: Mesh
    rules: Rules = ()

    @property
    def num_devices(self) -> int:
        """Devices that rows are split over."""
        return self.mesh.size

    @property
    def num_shares(self) -> int:
        """Shares that examples are split into."""
        return int(self.mesh.shape["data"] * self.mesh.shape["fsdp"])

    @property
    def rows(self) -> NamedSharding:
        """First axis split over all devices: cache rows, token rows, queries of an evaluation."""
        return NamedSharding(self.mesh, ROWS)

    @property
    def examples(self) -> NamedSharding:
        """First axis split over data and fsdp: examples of a batch and texts to encode."""
        return NamedSharding(self.mesh, EXAMPLES)

    @property
    def everywhere(self) -> NamedSharding:
        """A full copy on every device: scalars, small parameters."""
        return NamedSharding(self.mesh, EVERYWHERE)

    def parameters(self, tree: PyTree) -> PyTree:
        """The shardings of parameters, and of optimizer states that mirror them, by the rules.

        Args:
          tree: leaves with a shape; the paths of their leaves end as the rules' patterns do.

        Returns:
          The same tree of shardings.

        Raises:
          ValueError: two rules say different things of one leaf, or one applies to none.
          UserError: the mesh does not divide an axis that a rule splits.
        """
        used: set[str] = set()

        def of(path: Any, leaf: Any) -> NamedSharding:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found = {rule: spec for rule, spec in self.rules if _matches(rule, name)}
            used.update(found)
            if len(set(found.values())) > 1:
                raise ValueError(f"rules contradict each other on {name}: {found}")
            spec = next(iter(found.values()), EVERYWHERE)
            self._require_shares(name, leaf.shape, spec)
            return NamedSharding(self.mesh, spec)

        shardings = jax.tree_util.tree_map_with_path(of, tree)
        if unused := [rule for rule, _ in self.rules if rule not in used]:
            raise ValueError(f"no parameter is matched by the rules {unused}")
        return shardings

    def _require_shares(self, name: str, shape: tuple[int, ...], spec: PartitionSpec) -> None:
        for size, axis in zip(shape, spec, strict=False):
            if axis is not None and size % self.mesh.shape[axis]:
                raise UserError(
                    f"config.mesh.{axis} is {self.mesh.shape[axis]}, which does not divide the "
                    f"{size} of {name} {list(shape)}: write a divisor of {size}"
                )

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

    def put(self, tree: PyTree, sharding: NamedSharding) -> PyTree:
        """Host values, the same on every process, onto the mesh.

        Args:
          tree: arrays, or PRNG keys.
          sharding: where all of them go.

        Returns:
          Arrays on the mesh; each process hands its own devices their shares alone.
        """
        if jax.process_count() == 1:
            return jax.device_put(tree, sharding)

        def one(x: ArrayLike) -> jax.Array:
            if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                return _wrap_key(self.put(jax.random.key_data(x), sharding))
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(one, tree)

    def put_rows(self, tree: PyTree) -> PyTree:
        """Host arrays [rows, ...] -> device arrays split by row; rows must divide evenly."""
        return self.put(tree, self.rows)

    def put_everywhere(self, tree: PyTree) -> PyTree:
        """Host arrays -> one copy on every device."""
        return self.put(tree, self.everywhere)

    def fetch(self, tree: PyTree) -> PyTree:
        """Arrays on the mesh -> NumPy arrays, whole, on every process; all of them must call it."""
        if jax.process_count() > 1:
            tree = _copier(self)(tree)
        return jax.device_get(tree)

    def split(self, x: jax.Array) -> jax.Array:
        """Inside jit: asks for the examples [n, ...] to be split, so that work on them is.

        An n that the shares do not divide stays where it is.
        """
        if x.shape[0] % self.num_shares:
            return x
        return jax.lax.with_sharding_constraint(x, self.examples)

    def gathered(self, tree: PyTree) -> PyTree:
        """Inside jit: parameters whole over fsdp, as they are used; examples stay split.

        Left to itself the compiler splits activations by width, and every device would hold those
        of all the examples of its `data` share.

        Args:
          tree: parameters of a tower, of whatever shape the rules allow.

        Returns:
          The same values; what `tensor` splits stays split.
        """

        def whole(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
            spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in sharding.spec))
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))

        return jax.tree.map(whole, tree, self.parameters(tree))

    def in_chunks(
        self, function: Callable[[PyTree, jax.Array], jax.Array], size: int
    ) -> Callable[[PyTree, jax.Array], jax.Array]:
        """A function of examples that holds the intermediate values of some of them at a time.

        Gradients are exact: the backward pass computes a chunk's intermediate values again (Gao et
        al. 2021, GradCache). Each device goes over its own examples, so nothing moves.

        Args:
          function: (parameters, [n, ...]) -> [n, ...], example by example.
          size: examples of a chunk, over all devices; a multiple of the shares.

        Returns:
          The same function. What chunks do not divide is filled up with copies; an n that the
          shares do not divide, like that of a small sample, is taken at once.
        """
        share = size // self.num_shares

        @jax.checkpoint
        def chunk(parameters: PyTree, x: jax.Array) -> jax.Array:
            return function(parameters, self.split(x))

        def chunked(parameters: PyTree, x: jax.Array) -> jax.Array:
            count = x.shape[0]
            held = count // self.num_shares  # of a device
            if count % self.num_shares or held <= share:
                return function(parameters, x)
            chunks = -(-held // share)
            x = x.reshape(self.num_shares, held, *x.shape[1:])
            x = jnp.pad(x, [(0, 0), (0, chunks * share - held), *[(0, 0)] * (x.ndim - 2)], "edge")
            x = x.reshape(self.num_shares, chunks, share, *x.shape[2:])
            x = jnp.moveaxis(x, 1, 0).reshape(chunks, size, *x.shape[3:])
            spec = PartitionSpec(None, *EXAMPLES)
            x = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
            y = jax.lax.map(functools.partial(chunk, parameters), x)
            y = y.reshape(chunks, self.num_shares, share, *y.shape[2:])
            y = jnp.moveaxis(y, 0, 1).reshape(self.num_shares, chunks * share, *y.shape[3:])
            return self.split(y[:, :held].reshape(count, *y.shape[2:]))

        return chunked

    def per_device(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """`jax.shard_map` on this mesh: `function` sees each device's own rows."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def jit_step(
        self,
        step: Callable[..., Any],
        out: PyTree,
        donate: tuple[int, ...] = (),
        static: tuple[str, ...] = (),
    ) -> Wrapped:
        """Compiles a step for this mesh.

        Args:
          step: a pure function of positional arrays, and of what is static by keyword.
          out: shardings of what it returns (a prefix of its tree).
          donate: positions of arguments whose buffers the results reuse.
          static: names of arguments of which each value is a program of its own.

        Returns:
          The jitted function.
        """
        return jax.jit(step, out_shardings=out, donate_argnums=donate, static_argnames=static)


def make_placement(
    devices: int | Sequence[Any] = 0, *, fsdp: int = 1, tensor: int = 1, rules: Rules = ()
) -> Placement:
    """A mesh of all three axes; `data` is as wide as the devices allow.

    Args:
      devices: how many of jax's (0 = all), or the devices themselves.
      fsdp: width of that axis.
      tensor: likewise.
      rules: how parameters are split.

    Returns:
      The mesh and what lives on it.

    Raises:
      ValueError: more devices are asked for than jax sees, or the axes do not divide them.
    """
    if isinstance(devices, int):
        available = jax.devices()
        if devices > len(available):
            raise ValueError(f"{devices} devices are asked for but jax sees {len(available)}")
        devices = available[: devices or len(available)]
    if len(devices) % (fsdp * tensor):
        raise ValueError(
            f"{len(devices)} devices cannot be split into fsdp={fsdp} x tensor={tensor}"
        )
    shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
    # Auto: jax.make_mesh defaults to Explicit axes, in which gathers from sharded rows are refused.
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    return Placement(mesh, rules)


def rules_of(axes: Mapping[str, tuple[str | None, ...]]) -> Rules:
    """Rules of a family.

    Args:
      axes: pattern of a leaf's path -> what the family calls its axes.

    Returns:
      The same patterns with the axes of the mesh.
    """
    return tuple(
        (pattern, PartitionSpec(*(MESH_AXIS[name] for name in names)))
        for pattern, names in axes.items()
    )


def local_start(rows: int) -> jax.Array:
    """Inside `per_device`: the global number, a scalar, of this device's first row of `rows`."""
    return jax.lax.axis_index(AXES) * rows


def own_rows(array: jax.Array) -> dict[int, jax.Array]:
    """What this process holds of an array [rows, ...] split by row, copies left out.

    Args:
      array: split over the mesh.

    Returns:
      First row -> the rows of one device, [n, ...].
    """
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return {shard.index[0].start or 0: shard.data for shard in shards}


def _matches(rule: str, name: str) -> bool:
    return re.search(rf"(?:^|/)(?:{rule})$", name) is not None


@functools.cache
def _copier(place: Placement) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: tree, out_shardings=place.everywhere)


@jax.jit
def _wrap_key(data: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(data)
