"""What the sweep over NQ's 21 million rows costs a device, by the programs XLA compiles for TPU.

    python -m benchmarks.sweep_scaling

For slices of 4, 16 and 64 chips, and on 16 chips for every corrector. Needs no TPU: the compiler
runs anywhere. Writes benchmarks/results/sweep_scaling.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs import nq
from corrector_jax import chips, compile_ahead, hlo
from corrector_jax.cache import TargetCache
from corrector_jax.program import make_program, placement
from corrector_jax.types import Batch

RESULTS = Path(__file__).parent / "results" / "sweep_scaling.json"
SLICES = ("v5e:2x2", "v5e:4x4", "v5e:8x8")
CORRECTORS = (("linear", 0), ("mlp", 128), ("mlp", 256), ("mlp", 768))


def sweep(topology: str, kind: str, hidden: int) -> dict[str, Any]:
    """Compiles the draw of a step of configs/nq.py and reads what it costs a device."""
    config = nq.get_config()
    config.corrector.kind, config.corrector.hidden = kind, hidden
    devices, chip = chips.topology(topology)
    place = placement(config, devices)
    size = compile_ahead.count_targets(config)
    program = make_program(config, compile_ahead.find_encoder(config)[0], size, place)
    rows, dim = place.pad(size, config.negatives.block_rows), program.model.dim

    def array(shape: tuple[int, ...], dtype: Any, sharding: Any = place.everywhere) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    cache = TargetCache(
        array((rows, dim), config.cache.dtype, place.rows),
        None,
        array((rows,), jnp.int32, place.rows),
        size,
        array((rows,), jnp.float32, place.rows) if program.method.corrector.has_lengths else None,
    )
    count = config.train.batch_size
    psi = jax.tree.map(
        lambda leaf: array(leaf.shape, leaf.dtype),
        jax.eval_shape(lambda: program.init_corrector(0).gated),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (
        array((count, dim), jnp.float32),
        psi,
        cache,
        Batch(
            query_tokens=array((count, 1), jnp.int32),  # not read
            positive=array((count,), jnp.int32),
            known=array((count, config.compile.known), jnp.int32),
            valid=array((count,), jnp.bool_),
        ),
        array(key.shape, key.dtype),
    )
    with chips.compiling(devices):
        compiled = jax.jit(program.method.proposal.draw).lower(*arguments).compile()
    cost = hlo.cost(compiled.as_text())
    floor = chips.floor_seconds(cost, chip)
    return {
        "topology": topology,
        "devices": len(devices),
        "corrector": kind if kind == "linear" else f"{kind} {hidden}",
        "flops": cost.flops,
        "bytes": cost.bytes,
        "largest_collective_bytes": cost.largest.bytes if cost.largest else 0,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "floor_ms": {part: round(1e3 * seconds, 2) for part, seconds in floor.items()},
    }


def main() -> None:
    """Compiles, prints and writes."""
    found = [sweep(topology, "mlp", 128) for topology in SLICES]
    found += [sweep("v5e:4x4", *corrector) for corrector in CORRECTORS if corrector != ("mlp", 128)]
    first = found[0]
    for one in found[: len(SLICES)]:
        times = one["devices"] / first["devices"]
        one["flops_vs_even_share"] = round(one["flops"] * times / first["flops"], 4)
        one["bytes_vs_even_share"] = round(one["bytes"] * times / first["bytes"], 4)
    for one in found:
        print(json.dumps(one))
    RESULTS.write_text(json.dumps({"config": "configs/nq.py", "sweeps": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
