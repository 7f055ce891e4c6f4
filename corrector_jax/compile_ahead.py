"""Proof before the pod is rented: every step compiled from shapes alone, for a named topology.

No data is read and no device need be there: XLA's TPU compiler runs on any Linux machine. Encoders
whose sizes are known (`models/sizes.py`) are not downloaded. What it says of memory is what a run
would take.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from corrector_jax import chips, hlo, paths
from corrector_jax.cache import TargetCache, TargetTokens
from corrector_jax.chips import Chip
from corrector_jax.data.published import CORPORA, QUERIES
from corrector_jax.embed import jit_embed
from corrector_jax.evaluate import jit_gap, jit_search, jit_softmax
from corrector_jax.job import load_encoder
from corrector_jax.models import pretrained
from corrector_jax.models.dual_encoder import Encoder, Projection
from corrector_jax.models.reader import Reader, ReaderConfig
from corrector_jax.models.sizes import READERS, SIZES
from corrector_jax.paths import AnyPath
from corrector_jax.program import Program, make_program, placement
from corrector_jax.reading import load_reader
from corrector_jax.state import TrainState
from corrector_jax.steps.eval_step import Best, Gap, Softmax
from corrector_jax.steps.reader_step import Tables
from corrector_jax.types import Array, Asked, Batch, PyTree, UserError
from corrector_jax.writer import say

RESERVED = 0.03
"""Share of a device's memory that programs cannot have: the runtime's own."""

LONGEST = 512
"""Tokens of a text where neither the configuration nor known sizes say."""

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one step costs one device.

    Attributes:
      name: of the step.
      resident: bytes of what lives there during the whole run: state, cache, tokens.
      own: bytes of what comes for this step alone, such as a batch.
      temporaries: bytes that it needs while it runs, results that reuse no argument among them.
      cost: its work.
      floor: part of the device -> the least seconds it needs.
      seconds: that compiling took.
    """

    name: str
    resident: int
    own: int
    temporaries: int
    cost: hlo.Cost
    floor: dict[str, float]
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes that must be there at once."""
        return self.resident + self.own + self.temporaries

    def record(self) -> dict[str, Any]:
        """As JSON."""
        collectives = {
            kind: {"count": found.count, "bytes": found.bytes, "sent": found.sent}
            for kind, found in self.cost.collectives.items()
        }
        largest = self.cost.largest
        return {
            "bytes": {
                "resident": self.resident,
                "own": self.own,
                "temporaries": self.temporaries,
                "peak": self.peak,
            },
            "flops": self.cost.flops,
            "flops_of_sweep": self.cost.flops_of["sweep"],
            "bytes_moved": self.cost.bytes,
            "collectives": collectives,
            "largest_collective": largest and {"shape": largest.shape, "bytes": largest.bytes},
            "floor_seconds": self.floor,
            "loops_of_unknown_length": list(self.cost.unknown_loops),
            "compile_seconds": round(self.seconds, 1),
        }


def compile_run(config: ConfigDict, topology: str, output: AnyPath) -> bool:
    """Compiles the steps of a run, prints what each costs a device, and writes it as JSON.

    Args:
      config: validated.
      topology: a name of `chips.topology`, or "" for the devices at hand.
      output: the JSON file.

    Returns:
      Whether every step fits a device's memory; True where that memory is not known.

    Raises:
      UserError: the topology, the encoder or N is not known.
    """
    if topology:
        devices, chip = chips.topology(topology)
    else:
        devices = list(jax.devices())
        chip = chips.of(devices[0])
    place = placement(config, devices)
    encoder, lengths = find_encoder(config)
    reader = find_reader(config) if config.reader.weights else None
    program = make_program(config, encoder, count_targets(config), place, reader)
    program.require_shares()
    say(
        f"{len(devices)} devices ({topology or chip.name}), mesh data x fsdp x tensor = "
        f"{' x '.join(str(n) for n in place.mesh.shape.values())}; {program.size:,} targets x "
        f"{encoder.dim}, {config.train.batch_size} queries x {program.targets_per_query} "
        "targets a step" + (", which a reader reads" if reader else "")
    )
    too_large, steps = [], []
    resident, lowered = lower_steps(program, lengths)
    for name, lower, own in lowered:
        say(f"compiling the {name} step")
        with chips.compiling(devices):
            found = measure(name, lower, resident, own, chip)
        if isinstance(found, str):
            say(f"  does not fit: {found}")
            too_large.append(name)
            continue
        steps.append(found)
        if chip.memory_bytes and found.peak > (1 - RESERVED) * chip.memory_bytes:
            too_large.append(name)
        say("\n".join(f"  {line}" for line in describe(found, chip)))
    if too_large:
        say(f"it does not fit ({', '.join(too_large)}): {advise(program, too_large)}")
    elif chip.memory_bytes:
        say("it fits")
    else:
        say(f"whether it fits is not known: there are no figures of {chip.name}")
    record = {
        "topology": topology or chip.name,
        "devices": len(devices),
        "mesh": dict(place.mesh.shape),
        "targets": program.size,
        "chip": dataclasses.asdict(chip),
        "fits": not too_large if chip.memory_bytes else None,
        "steps": {step.name: step.record() for step in steps},
        "config": config.to_dict(),
    }
    paths.write(output, json.dumps(record, indent=2) + "\n")
    say(f"written: {output}")
    return not too_large


def count_targets(config: ConfigDict) -> int:
    """N: of the configuration, or of the published set it names.

    Raises:
      UserError: neither says.
    """
    published = config.data.published
    if config.compile.targets:
        return int(config.compile.targets)
    if not published:
        raise UserError(
            "config.compile.targets is 0 and config.data.published is empty: write how many "
            "targets there are, as in --config.compile.targets=1000000"
        )
    passages = CORPORA[QUERIES[published].corpus].passages
    return min(config.data.max_targets or passages, passages)


def find_encoder(config: ConfigDict) -> tuple[Encoder, tuple[int, int]]:
    """The encoder that a configuration names, by its known sizes where those are known.

    Args:
      config: validated.

    Returns:
      One tower, and how many tokens a query and a target may have.

    Raises:
      UserError: it is neither known nor at hand.
    """
    model, data = config.model, config.data
    if model.weights not in SIZES:
        texts, encoder, *_ = load_encoder(config)
        return encoder, (texts.query_max_len, texts.target_max_len)
    known = SIZES[model.weights]
    dim = model.projection or known.projection
    encoder = Encoder(
        config=pretrained.encoder_config(known.config, layers=model.layers),
        pooling=model.pooling or known.pooling,
        normalize={"": known.normalize, "yes": True, "no": False}[model.normalize],
        dtype=model.dtype,
        project=Projection(dim, bias=False) if dim else None,
    )
    return encoder, (data.query_max_len or LONGEST, data.target_max_len or LONGEST)


def find_reader(config: ConfigDict) -> Reader:
    """The reader that a configuration names, by its known sizes where those are known.

    Args:
      config: validated, with a reader.

    Raises:
      UserError: it is neither known nor at hand.
    """
    if config.reader.weights in READERS:
        sizes = ReaderConfig.read(READERS[config.reader.weights], tied=True)
        return Reader(sizes, config.model.dtype)
    *_, origin = load_encoder(config)
    return load_reader(config, origin.tokenizer_json).reader


def lower_steps(
    program: Program, lengths: tuple[int, int]
) -> tuple[int, list[tuple[str, Callable[[], Any], int]]]:
    """Every step of a run.

    Args:
      program: the program.
      lengths: tokens of a query and of a target.

    Returns:
      Bytes that live on a device during the whole run; and the steps in the order a run meets
      them, each with its name, what lowers it from shapes, and bytes that come for it alone.
    """
    config, place, plan = program.config, program.place, program.config.compile
    everywhere, dim = place.everywhere, program.model.dim

    def array(shape: tuple[int, ...], dtype: Any, sharding: Any = everywhere) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows = place.pad(program.size, config.negatives.block_rows)
    state = abstract_state(program)
    small = program.model.encoder.config.vocab_size <= 2**16
    words = array((rows, lengths[1]), jnp.uint16 if small else jnp.int32, place.rows)
    tokens = TargetTokens(words, program.size, "")
    tables: Any = tokens
    if program.answering:
        wide, of_reader = config.reader.passage_max_len, program.answering.reader.config.encoder
        kind = jnp.uint16 if of_reader.vocab_size <= 2**16 else jnp.int32
        passages = TargetTokens(array((rows, wide), kind, place.rows), program.size, "")
        tables = Tables(tokens, passages)
    cache = None
    if program.uses_cache:
        int8 = config.cache.dtype == "int8"
        cache = TargetCache(
            embeddings=array((rows, dim), config.cache.dtype, place.rows),
            scale=array((rows,), jnp.float32, place.rows) if int8 else None,
            written_at=array((rows,), jnp.int32, place.rows),
            size=program.size,
            lengths=array((rows,), jnp.float32, place.rows)
            if program.method.corrector.has_lengths
            else None,
        )
    count, num_mined = config.train.batch_size, program.num_mined
    batch = Batch(
        query_tokens=array((count, lengths[0]), jnp.int32, place.examples),
        positive=array((count,), jnp.int32, place.examples),
        known=array((count, 1 if program.answering else plan.known), jnp.int32, place.examples),
        valid=array((count,), jnp.bool_, place.examples),
        mined=array((count, num_mined), jnp.int32, place.examples) if num_mined else None,
        candidates=array((count, program.num_candidates), jnp.int32, place.examples)
        if program.num_candidates
        else None,
        asked=_asked(config, count, place.examples) if program.answering else None,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = array(key.shape, key.dtype)
    block = place.pad(config.eval.batch_size)
    queries = -(-plan.queries // block) * block
    ids = array((block,), jnp.int32)
    fresh, asked = array((block, dim), jnp.float32), array((queries, dim), jnp.float32, place.rows)
    best = _placed(jax.eval_shape(functools.partial(Best.empty, queries, config.eval.top_k)), asked)
    judged = array((queries, plan.known), jnp.int32, place.rows)
    seen = _placed(jax.eval_shape(functools.partial(Softmax.empty, *judged.shape)), asked)
    steps: list[tuple[str, Callable[[], Any], int]] = [
        (
            "embed",
            lambda: jit_embed(program.model, place).lower(
                state.params, tokens, ids, length=tokens.ids.shape[1]
            ),
            held_bytes(ids),
        ),
        (
            "search",
            lambda: jit_search(place).lower(best, asked, fresh, ids),
            held_bytes((best, asked, fresh, ids)),
        ),
        (
            "loss",
            lambda: jit_softmax(config.model.beta, place).lower(seen, asked, judged, fresh, ids),
            held_bytes((seen, asked, judged, fresh, ids)),
        ),
    ]
    names = ("train",) if len(program.stages()) == 1 else ("given", "train")
    for name, stage in zip(names, program.stages(), strict=True):
        lower = functools.partial(stage.step.lower, state, cache, tables, batch, key)
        steps.append((name, lower, held_bytes(batch)))
    if program.answering:
        read = config.reader.read or program.answering.passages
        some = place.pad(max(1, config.eval.batch_size // read))
        asked_of = _asked(config, some, place.examples).question
        found = array((some, read), jnp.int32, place.examples)
        there = array((some, read), jnp.bool_, place.examples)
        lower = functools.partial(
            program.read_step.lower, state.params["reader"], tables, asked_of, found, there
        )
        steps.append(("read", lower, held_bytes((asked_of, found, there))))
    if cache is not None:
        probe_queries = array((config.corrector.probe_queries, lengths[0]), jnp.int32)
        probe_ids = array((config.corrector.probe_targets,), jnp.int32)
        gap = jax.eval_shape(functools.partial(Gap.empty, queries))
        gap = Gap(
            _placed(gap.stale, asked),
            _placed(gap.corrected, asked),
            _placed(gap.drift, fresh),
            _placed(gap.corrected_error, fresh),
        )
        steps += [
            (
                "probe",
                lambda: program.probe_step().lower(state, cache, tokens, probe_queries, probe_ids),
                held_bytes((probe_queries, probe_ids)),
            ),
            (
                "gap",
                lambda: jit_gap(program.method, place).lower(
                    gap, asked, fresh, ids, cache, state.corrector.gated
                ),
                held_bytes((gap, asked, fresh, ids)),
            ),
        ]
        if program.method.corrector.has_lengths:
            steps.append(("lengths", lambda: program.lengths_step().lower(state, cache), 0))
        if program.method.corrector.landmarks:
            steps.append(("fit", lambda: program.fit_step().lower(state, cache, tokens, key), 0))
    return held_bytes((state, cache, tables)), steps


def _asked(config: ConfigDict, count: int, sharding: Any) -> Asked:
    """What `count` questions ask, as shapes."""
    widths = (config.reader.query_max_len, config.reader.answer_max_len)
    shapes: list[Any] = [(count, width) for width in widths]
    question, answer = (jax.ShapeDtypeStruct(x, jnp.int32, sharding=sharding) for x in shapes)
    return Asked(question, answer)  # type: ignore[arg-type]


def abstract_state(program: Program) -> TrainState:
    """The training state as shapes on the mesh."""
    return _on(jax.eval_shape(lambda: program.initial(None)), program.state_sharding)


def held_bytes(tree: PyTree) -> int:
    """Bytes that one device holds of arrays or shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def measure(
    name: str, lower: Callable[[], Any], resident: int, own: int, chip: Chip
) -> Compiled | str:
    """Compiles one step.

    Args:
      name: of the step.
      lower: gives what `jax.jit(...).lower(...)` gives.
      resident: bytes that live on a device during the whole run.
      own: bytes that come for it alone.
      chip: what it is compiled for.

    Returns:
      What it costs, or the compiler's own words where it needs more memory than there is.
    """
    started = time.monotonic()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return " ".join(str(error).split())[:300]
    memory = compiled.memory_analysis()
    cost = hlo.cost(compiled.as_text(), scopes=("sweep",))
    return Compiled(
        name=name,
        resident=resident,
        own=own,
        temporaries=memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        cost=cost,
        floor=chips.floor_seconds(cost, chip),
        seconds=time.monotonic() - started,
    )


def describe(step: Compiled, chip: Chip) -> list[str]:
    """Lines for a terminal: memory, work, what moves between devices, the floor of the time."""
    of = f" of {chip.memory_bytes / _GIB:.1f}" if chip.memory_bytes else ""
    lines = [
        f"memory  {step.peak / _GIB:.2f}{of} GiB a device: {step.resident / _GIB:.2f} all the "
        f"time, {step.own / _GIB:.2f} for this step, {step.temporaries / _GIB:.2f} within it",
        f"work    {step.cost.flops / 1e12:.3f} TFLOP, {step.cost.bytes / 1e9:.2f} GB moved",
    ]
    if sweep := step.cost.flops_of["sweep"]:
        lines[-1] += f"; the sweep {sweep / step.cost.flops:.1%} of the FLOPs"
    if step.cost.collectives:
        moved = ", ".join(
            f"{found.count:.0f} {kind} of {found.bytes / 1e6:.1f} MB"
            for kind, found in step.cost.collectives.items()
        )
        lines.append(f"network {moved}")
    if step.floor:
        parts = ", ".join(f"{part} {seconds * 1e3:.1f}" for part, seconds in step.floor.items())
        slowest = chips.binding(step.floor)
        lines.append(f"floor   {step.floor[slowest] * 1e3:.1f} ms ({slowest}; {parts})")
    return lines


def advise(program: Program, too_large: list[str]) -> str:
    """What to change where memory does not suffice, the cheapest first.

    Args:
      program: the program.
      too_large: names of the steps that do not fit.

    Returns:
      Words.
    """
    config, steps = program.config, []
    if {"search", "gap"} & set(too_large):
        steps += [f"--config.eval.batch_size={max(1, config.eval.batch_size // 2)}"]
    if config.model.dtype != "bfloat16":
        steps.append("--config.model.dtype=bfloat16")
    if not config.train.remat:
        steps.append("--config.train.remat=True")
    shares = program.place.num_shares
    half = (config.train.chunk or program.encoded_per_step) // 2 // shares * shares
    if half:
        steps.append(f"--config.train.chunk={half}")
    if program.uses_cache and config.cache.dtype != "int8":
        smaller = "bfloat16" if config.cache.dtype == "float32" else "int8"
        steps.append(f"--config.cache.dtype={smaller}")
    steps.append("a wider --config.mesh.fsdp, or more devices")
    return "try, in this order, " + ", ".join(steps)


def _on(tree: PyTree, shardings: PyTree) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _placed(tree: PyTree, like: Array) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding), tree
    )
