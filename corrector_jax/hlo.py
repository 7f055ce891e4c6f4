"""What a compiled program costs one device: read from its text, loops counted.

XLA's own count takes the body of a loop once. Here every loop counts as often as it runs, so that a
pass over a cache in tiles costs what the whole cache costs. The text is that of
`compiled.as_text()` for TPU or CPU; of a GPU's the forms are known, but not all have been tried.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind, as one device runs them.

    Attributes:
      count: how many are run.
      bytes: the sum of their sizes. The size of one is its whole on this device, the larger of its
        operands and its results: what an all-gather leaves here, what a reduce-scatter starts from.
      sent: bytes that leave this device under the best algorithm on a ring of the group's n
        devices: (n - 1) / n of the size, twice that for an all-reduce, all of it for a permute.
    """

    count: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0

    def plus(self, other: Collective, times: float = 1) -> Collective:
        """These, and others so many times."""
        return Collective(
            self.count + times * other.count,
            self.bytes + times * other.bytes,
            self.sent + times * other.sent,
        )


class Transfer(NamedTuple):
    """One collective.

    Attributes:
      kind: one of `KINDS`.
      shape: its operands or its results, whichever is larger, as in 'bf16[2048,768]'.
      bytes: its size, as in `Collective`, of one run.
      op_name: what it was in the program that was traced.
    """

    kind: str
    shape: str
    bytes: float
    op_name: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one run of a program costs one device.

    Attributes:
      flops: of matrix products and convolutions, a multiplication and an addition being two.
        Elementwise work is not counted.
      bytes: moved to and from the main memory (HBM), an upper estimate: every instruction reads its
        operands and writes its results, a fusion being one instruction. Slices and gathers move
        what they take, updates what they put. What lives in a TPU's on-chip memory is free, the
        padding of layouts is not counted.
      collectives: kind -> what they move between devices.
      largest: the largest single collective; None where there is none.
      flops_of: scope that was asked for -> flops within it.
      unknown_loops: name and path of loops whose length the text does not tell, such as those that
        depend on data; their bodies are counted once.
    """

    flops: float
    bytes: float
    collectives: dict[str, Collective]
    largest: Transfer | None
    flops_of: dict[str, float]
    unknown_loops: tuple[str, ...]


def cost(text: str, scopes: Iterable[str] = ()) -> Cost:
    """Reads a compiled program.

    Args:
      text: `compiled.as_text()`.
      scopes: names of functions or of a `jax.named_scope`, each a part of the paths that operations
        carry; a gradient belongs to the scope of what it is the gradient of.

    Returns:
      The cost of one run on one device. Of the branches of a conditional the most expensive counts.

    Raises:
      ValueError: the text holds no program.
    """
    reader = _Reader(text, tuple(scopes))
    total = reader.total(reader.entry, {}, frozenset())
    kinds: dict[str, Collective] = {}
    for what, moved in sorted(total.transfers.items(), key=lambda item: item[0]):
        kinds[what.kind] = kinds.get(what.kind, Collective()).plus(moved)
    return Cost(
        flops=total.flops,
        bytes=total.bytes,
        collectives=kinds,
        largest=max(total.transfers, key=lambda t: t.bytes, default=None),
        flops_of={scope: total.flops_of[scope] for scope in reader.scopes},
        unknown_loops=tuple(dict.fromkeys(reader.unknown)),
    )


# --- The text ------------------------------------------------------------------------------------

_ARRAY = re.compile(r"(\w+)\[([^\]]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{")
_NAME = re.compile(r"%([^\s,(){}]+)")
_ELSEWHERE = re.compile(r"S\((\d+)\)")


class _Array(NamedTuple):
    """An array of a shape: its text without layout, bytes, dimensions, whether it is in HBM."""

    text: str
    bytes: float
    dims: tuple[int, ...]
    in_memory: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Instruction:
    """One line: `%name = shape opcode(inside), attributes`."""

    name: str
    shape: str
    opcode: str
    inside: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.inside)

    @property
    def kind(self) -> str:
        """The opcode without the marks of a first half."""
        return self.opcode.removesuffix("-start")

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """What stands behind `name=`, up to the next comma outside brackets; '' if nothing does."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        return _until(self.attributes, found.end()) if found else ""

    def computations(self, *names: str) -> list[str]:
        """Computations that these attributes name."""
        return [c for name in names for c in _NAME.findall(self.attribute(name))]

    def numbers(self, name: str) -> list[int]:
        """The integers of an attribute such as `lhs_batch_dims={0,1}`."""
        return [int(n) for n in re.findall(r"-?\d+", self.attribute(name))]


class _Computation:
    """Instructions by name, in order; the root; who uses what."""

    def __init__(self) -> None:
        self.instructions: dict[str, _Instruction] = {}
        self.root = ""

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        return {
            int(i.inside): i.name for i in self.instructions.values() if i.opcode == "parameter"
        }

    @functools.cached_property
    def users(self) -> dict[str, list[_Instruction]]:
        users = collections.defaultdict(list)
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users


def _until(text: str, start: int) -> str:
    """From start to the next comma or the bracket that closes, outside brackets and quotes."""
    depth, quoted = 0, False
    for place in range(start, len(text)):
        letter = text[place]
        if letter == '"' and text[place - 1] != "\\":
            quoted = not quoted
        if quoted:
            continue
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if depth < 0 or (letter == "," and depth == 0):
            return text[start:place]
    return text[start:]


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """All computations by name, and the name of the entry."""
    found: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and (header := _HEADER.match(line)):
            current = found[header[2]] = _Computation()
            entry = header[2] if header[1] else entry
            continue
        if line.startswith("}"):
            current = None
        name, equals, rest = line.strip().partition(" = ")
        if current is None or not equals:
            continue
        is_root = name.startswith("ROOT ")
        name = name.removeprefix("ROOT ").removeprefix("%")
        shape = f"({_inside(rest[1:])})" if rest.startswith("(") else rest.split(" ", 1)[0]
        opcode, _, rest = rest[len(shape) :].strip().partition("(")
        inside = _inside(rest)
        current.instructions[name] = _Instruction(
            name, shape, opcode, inside, rest[len(inside) + 1 :].lstrip(", ")
        )
        if is_root:
            current.root = name
    if not entry:
        raise ValueError("the text of a compiled program has no ENTRY computation")
    return found, entry


def _inside(text: str) -> str:
    """What stands before the parenthesis that closes one already opened."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return text[: found.start()]
    return text


@functools.lru_cache(maxsize=1 << 14)
def _arrays(shape: str) -> tuple[_Array, ...]:
    """The arrays of a shape, tuples flattened."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(n) for n in re.findall(r"\d+", dims))
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or "0")[0])
        elsewhere = _ELSEWHERE.search(layout)
        found.append(
            _Array(
                f"{dtype}[{dims}]",
                math.prod(sizes) * bits / 8,
                sizes,
                elsewhere is None or elsewhere[1] == "0",
            )
        )
    return tuple(found)


def _parts(shape: str) -> list[str]:
    """The elements of a tuple's shape; the shape itself where it is none."""
    if not shape.startswith("("):
        return [shape]
    parts, start = [], 1
    while start < len(shape):
        parts.append(_until(shape, start))
        start += len(parts[-1]) + 1
    return parts


def _size(shape: str) -> float:
    return sum(array.bytes for array in _arrays(shape))


def _in_memory(shape: str) -> float:
    return sum(array.bytes for array in _arrays(shape) if array.in_memory)


# --- FLOPs ---------------------------------------------------------------------------------------


def _dot_flops(result: _Array, lhs: _Array, contracting: list[int]) -> float:
    return 2.0 * math.prod(result.dims) * math.prod(lhs.dims[axis] for axis in contracting)


def _convolution_flops(instruction: _Instruction, lhs: _Array, rhs: _Array) -> float:
    """Products with what is there: neither padding nor the holes of a dilation count.

    A TPU program writes a batched matrix product as a convolution whose dilated windows meet one
    element each; counted in full it would cost the batch too often.
    """
    result = _arrays(instruction.shape)[0]
    left, right, out = re.split(r"_|->", instruction.attribute("dim_labels"))
    window = dict(re.findall(r"(\w+)=(\S+)", instruction.attribute("window").strip("{}")))

    def per_axis(name: str, otherwise: str, axes: int) -> list[str]:
        return window[name].split("x") if name in window else [otherwise] * axes

    axes = sum(label.isdigit() for label in out)
    positions = 1
    for axis, stride, pad, left_hole, right_hole in zip(
        range(axes),
        per_axis("stride", "1", axes),
        per_axis("pad", "0_0", axes),
        per_axis("lhs_dilate", "1", axes),
        per_axis("rhs_dilate", "1", axes),
        strict=True,
    ):
        positions *= _valid_positions(
            size=lhs.dims[left.index(str(axis))],
            kernel=rhs.dims[right.index(str(axis))],
            out=result.dims[out.index(str(axis))],
            stride=int(stride),
            low=int(pad.split("_")[0]),
            left_hole=int(left_hole),
            right_hole=int(right_hole),
        )
    groups = (instruction.numbers("feature_group_count") or [1])[0]
    batch_groups = (instruction.numbers("batch_group_count") or [1])[0]
    features = lhs.dims[left.index("f")] // groups * result.dims[out.index("f")]
    return 2.0 * positions * features * (lhs.dims[left.index("b")] // batch_groups)


@functools.lru_cache(maxsize=1 << 12)
def _valid_positions(
    size: int, kernel: int, out: int, stride: int, low: int, left_hole: int, right_hole: int
) -> int:
    """Pairs of an output and a kernel element that meet an element of the input, along one axis."""
    offset = np.arange(kernel, dtype=np.int64) * right_hole - low
    # Output o meets place o * stride + offset of the dilated input, an element where left_hole
    # divides the place: for o in one residue class modulo `period`, or never.
    shared = math.gcd(stride, left_hole)
    period = left_hole // shared
    offset = offset[offset % shared == 0]
    residue = (-offset // shared) * pow(stride // shared, -1, period) % period
    first = np.maximum(0, -(offset // stride))
    last = np.minimum(out - 1, ((size - 1) * left_hole - offset) // stride)
    met = (last - residue) // period - (first - 1 - residue) // period
    return int(np.maximum(0, met).sum())


# --- Counting ------------------------------------------------------------------------------------

_FREE = frozenset(
    {
        "add-dependency",
        "after-all",
        "bitcast",
        "constant",
        "domain",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
    }
)
_FREE_CALLS = frozenset({"AllocateBuffer", "ConcatBitcast", "SliceBitcast", "Sharding"})
_TAKES = frozenset({"dynamic-slice", "slice", "gather"})
_SAME = frozenset({"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done"})

_Value = tuple[int | None, int]
"""A scalar: (None, c) is c, (i, c) is element i of what the loop carries, plus c."""


class _Total:
    """Sums over instructions; collectives by what they are, so that the largest is known."""

    def __init__(self) -> None:
        self.flops = 0.0
        self.bytes = 0.0
        self.flops_of: dict[str, float] = collections.defaultdict(float)
        self.transfers: dict[Transfer, Collective] = {}

    def add(self, other: _Total, times: float = 1) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for scope, flops in other.flops_of.items():
            self.flops_of[scope] += times * flops
        for what, moved in other.transfers.items():
            self.move(what, moved, times)

    def move(self, what: Transfer, moved: Collective, times: float = 1) -> None:
        self.transfers[what] = self.transfers.get(what, Collective()).plus(moved, times)


class _Reader:
    """One program."""

    def __init__(self, text: str, scopes: tuple[str, ...]) -> None:
        self.computations, self.entry = _parse(text)
        self.scopes = scopes
        # A scope is a whole part of a path such as 'jit(step)/transpose(jvp(sweep))/dot_general'.
        self.patterns = {s: re.compile(rf"(?:^|[/(]){re.escape(s)}(?:[/)]|$)") for s in scopes}
        head = text.split("\n", 1)[0]
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head)
        self.devices = math.prod(int(n) for n in counts)
        self.unknown: list[str] = []
        self.totals: dict[tuple[object, ...], _Total] = {}
        self.begun = {self.channel(i) for i in self.halves()}

    def total(self, name: str, known: dict[int, int], inherited: frozenset[str]) -> _Total:
        """What one run of a computation costs.

        Args:
          name: the computation.
          known: for a loop's body, elements of what it carries that are known constants.
          inherited: scopes that the caller lies in.

        Returns:
          The sums.
        """
        key = (name, tuple(sorted(known.items())), inherited)
        if key not in self.totals:
            total = self.totals[key] = _Total()
            for instruction in self.computations[name].instructions.values():
                self.count(total, name, instruction, known, inherited)
        return self.totals[key]

    def count(
        self,
        total: _Total,
        name: str,
        instruction: _Instruction,
        known: dict[int, int],
        inherited: frozenset[str],
    ) -> None:
        """Adds one instruction of a computation that is run as such."""
        computation = self.computations[name]
        opcode = instruction.opcode
        within = inherited | self.scopes_of(instruction)
        if opcode == "while":
            body, condition = instruction.computations("body", "condition")
            trips, constants = self.loop(name, instruction, body, condition, known)
            for part in (body, condition):
                total.add(self.total(part, constants, within), trips)
        elif opcode == "conditional":
            branches = instruction.computations(
                "branch_computations", "true_computation", "false_computation"
            )
            parts = [self.total(branch, {}, within) for branch in branches]
            total.add(max(parts, key=lambda part: (part.flops, part.bytes)))
        elif opcode in ("call", "async-start"):
            for called in instruction.computations("to_apply", "calls"):
                total.add(self.total(called, {}, within))
        elif opcode == "fusion":
            (called,) = instruction.computations("calls")
            total.bytes += self.fusion_bytes(computation, instruction, called)
            self.fused(total, called, inherited, self.scopes_of(instruction))
        elif opcode == "custom-call" and instruction.computations("called_computations"):
            for called in instruction.computations("called_computations"):
                total.add(self.total(called, {}, within))
        else:
            total.bytes += self.plain_bytes(computation, instruction)
            self.work(total, computation, instruction, within)

    def fused(
        self, total: _Total, name: str, inherited: frozenset[str], named: frozenset[str]
    ) -> None:
        """Adds the work inside a fusion, whose memory traffic is the fusion's own."""
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            # A fusion is named after its root: what has a name of its own goes by that.
            own = self.scopes_of(instruction) if instruction.op_name else named
            if instruction.opcode == "fusion":
                (called,) = instruction.computations("calls")
                self.fused(total, called, inherited, own)
            elif not (
                self.channel(instruction) in self.begun
                and not self.begins(computation, instruction)
            ):
                self.work(total, computation, instruction, inherited | own, fused=True)

    def work(
        self,
        total: _Total,
        computation: _Computation,
        instruction: _Instruction,
        within: frozenset[str],
        fused: bool = False,
    ) -> None:
        """Adds the FLOPs of an instruction, and what it moves between devices."""
        flops = self.flops(computation, instruction)
        total.flops += flops
        for scope in within:
            total.flops_of[scope] += flops
        if instruction.kind not in KINDS:
            return
        kind = instruction.kind
        users = [user.opcode for user in computation.users[instruction.name]]
        if fused and kind == "all-reduce" and users == ["dynamic-slice"]:
            kind = "reduce-scatter"  # As a TPU program writes it.
        shapes = [self.operand_shapes(computation, instruction), self.result(instruction)]
        shape = max(shapes, key=_size)
        texts = ", ".join(array.text for array in _arrays(shape))
        size = _size(shape)
        total.move(
            Transfer(kind, texts, size, instruction.op_name),
            Collective(1, size, size * self.sent(kind, instruction)),
        )

    def scopes_of(self, instruction: _Instruction) -> frozenset[str]:
        name = instruction.op_name
        return frozenset(scope for scope, pattern in self.patterns.items() if pattern.search(name))

    # FLOPs

    def flops(self, computation: _Computation, instruction: _Instruction) -> float:
        """Of a matrix product or a convolution; 0 for anything else."""
        opcode = instruction.opcode
        target = instruction.attribute("custom_call_target") if opcode == "custom-call" else ""
        gemm = "matmul" in target or "gemm" in target
        if opcode not in ("dot", "convolution") and not gemm:
            return 0.0
        lhs, rhs = (
            _arrays(computation.instructions[operand].shape)[0]
            for operand in instruction.operands[:2]
        )
        if opcode == "convolution":
            return _convolution_flops(instruction, lhs, rhs)
        contracting = instruction.numbers("lhs_contracting_dims")
        if gemm:
            # Libraries keep the numbers in their own configuration; the last axis unless told.
            told = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
            contracting = [int(n) for n in re.findall(r"\d+", told[1])] if told else [-1]
        return _dot_flops(_arrays(instruction.shape)[0], lhs, contracting)

    # Between devices

    def halves(self) -> Iterable[_Instruction]:
        """Collectives that a TPU program begins in one fusion and goes on with in others."""
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                if instruction.kind in KINDS and self.begins(computation, instruction):
                    yield instruction

    def begins(self, computation: _Computation, instruction: _Instruction) -> bool:
        return any(
            '"AsyncCollectiveStart"' in user.attributes
            for user in computation.users[instruction.name]
        )

    def channel(self, instruction: _Instruction) -> tuple[str, str] | None:
        if instruction.kind not in KINDS:
            return None
        return instruction.kind, instruction.attribute("channel_id")

    def result(self, instruction: _Instruction) -> str:
        """The shape of a collective's results, without what its first half hands on."""
        starts = instruction.opcode.endswith("-start") and instruction.kind != "all-reduce"
        parts = _parts(instruction.shape)
        return parts[1] if starts and len(parts) > 1 else instruction.shape

    def sent(self, kind: str, instruction: _Instruction) -> float:
        """The share of a collective's size that leaves the device."""
        if kind in ("collective-permute", "collective-broadcast"):
            return 1.0
        group = self.group(instruction)
        return (2 if kind == "all-reduce" else 1) * (group - 1) / group

    def group(self, instruction: _Instruction) -> int:
        """How many devices take part in one collective."""
        text = instruction.attributes
        if axes := re.search(r"replica_groups=mesh\[(.*?)\].*?\{('.*?)\}", text):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
            used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[2])
            return math.prod(int(part or sizes[axis]) for axis, part in used)
        if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
            return int(iota[1])
        if listed := re.search(r"replica_groups=\{\{([^}]*)\}", text):
            return len(listed[1].split(","))
        return max(1, self.devices)

    # Memory

    def operand_shapes(self, computation: _Computation, instruction: _Instruction) -> str:
        shapes = [computation.instructions[o].shape for o in instruction.operands]
        return f"({', '.join(shapes)})"

    def plain_bytes(self, computation: _Computation, instruction: _Instruction) -> float:
        """Moved by an instruction that calls nothing."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0.0
        if instruction.attribute("custom_call_target").strip('"') in _FREE_CALLS:
            return 0.0
        result = self.result(instruction) if instruction.kind in KINDS else instruction.shape
        if opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            result = _parts(instruction.shape)[0 if opcode == "copy-start" else 1]
        shapes = [computation.instructions[o].shape for o in instruction.operands]
        if instruction.kind in _TAKES:
            taken = _size(result) if _in_memory(shapes[0]) else 0.0
            return taken + _in_memory(result) + sum(map(_in_memory, shapes[1:]))
        if opcode in ("dynamic-update-slice", "scatter"):
            put = self.put(computation, instruction)
            return sum(map(_in_memory, shapes[1:])) + (put if _in_memory(result) else 0.0)
        return sum(map(_in_memory, shapes)) + _in_memory(result)

    def fusion_bytes(
        self, computation: _Computation, instruction: _Instruction, called: str
    ) -> float:
        """Moved by a fusion: what it takes of its operands, what it puts into its results."""
        inner = self.computations[called]
        moved = 0.0
        for number, operand in enumerate(instruction.operands):
            shape = computation.instructions[operand].shape
            if _in_memory(shape):
                read = self.read(called, inner.parameters[number])
                moved += min(_in_memory(shape), read)
        root = inner.instructions[inner.root]
        if root.opcode != "tuple":
            return moved + min(_in_memory(instruction.shape), self.written(called, inner.root))
        for shape, name in zip(_parts(instruction.shape), root.operands, strict=True):
            moved += min(_in_memory(shape), self.written(called, name))
        return moved

    def read(self, name: str, value: str) -> float:
        """Bytes of a value that a fused computation looks at, each reader on its own."""
        computation = self.computations[name]
        total = 0.0
        for user in computation.users[value]:
            at = user.operands.index(value)
            if user.opcode in _TAKES and at == 0:
                total += _size(user.shape)
            elif user.opcode in ("dynamic-update-slice", "scatter") and at == 0:
                continue  # In place.
            elif user.opcode in ("bitcast", "get-tuple-element"):
                total += self.read(name, user.name)
            elif user.opcode == "fusion":
                (called,) = user.computations("calls")
                inner = self.computations[called]
                if inner.instructions[inner.root].opcode == "bitcast":
                    total += self.read(name, user.name)  # Another name of the same value.
                else:
                    total += self.read(called, inner.parameters[at])
            elif user.opcode != "tuple":
                total += _size(computation.instructions[value].shape)
        return total

    def written(self, name: str, value: str) -> float:
        """Bytes that a fused computation puts where this value is to be."""
        computation = self.computations[name]
        instruction = computation.instructions[value]
        if instruction.opcode == "parameter":
            return 0.0
        if instruction.opcode == "bitcast":
            return self.written(name, instruction.operands[0])
        if instruction.opcode == "fusion" and not instruction.shape.startswith("("):
            (called,) = instruction.computations("calls")
            return self.written(called, self.computations[called].root)
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            return self.put(computation, instruction)
        return _size(instruction.shape)

    def put(self, computation: _Computation, instruction: _Instruction) -> float:
        """Bytes that an update changes."""
        operands = instruction.operands
        # scatter takes k arrays, the places, and k updates.
        places = (len(operands) - 1) // 2 + 1
        updates = operands[1:2] if instruction.opcode != "scatter" else operands[places:]
        return sum(_size(computation.instructions[o].shape) for o in updates)

    # Loops

    def loop(
        self,
        name: str,
        instruction: _Instruction,
        body: str,
        condition: str,
        known: dict[int, int],
    ) -> tuple[int, dict[int, int]]:
        """How often a loop runs (1 if nobody knows), and the constants that it carries."""
        here = self.computations[name]
        carried = here.instructions[instruction.operands[0]]
        initial: dict[int, int] = {}
        if carried.opcode == "tuple":
            for index, operand in enumerate(carried.operands):
                value = self.value(name, operand, self.carries(known))
                if value is not None and value[0] is None:
                    initial[index] = value[1]
        root = self.computations[body].instructions[self.computations[body].root]
        after = [self.value(body, o, self.carries({})) for o in root.operands]
        if root.opcode != "tuple":
            after = []
        constants = {i: c for i, c in initial.items() if i < len(after) and after[i] == (i, 0)}
        told = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
        if told:
            return int(told[1]), constants
        trips = self.trips(condition, initial, constants, after)
        if trips is None:
            self.unknown.append(f"{instruction.name} {instruction.op_name}".strip())
        return (1 if trips is None else trips), constants

    def trips(
        self,
        condition: str,
        initial: dict[int, int],
        constants: dict[int, int],
        after: list[_Value | None],
    ) -> int | None:
        """From a condition that compares a counter with a constant; None if it does not."""
        compared = self.compared(condition, self.carries(constants))
        if compared is None:
            return None
        direction, left, right = compared
        if left[0] is None:
            left, right = right, left
            direction = direction.translate(str.maketrans("LG", "GL"))
        index = left[0]
        if index is None or right[0] is not None or index not in initial or index >= len(after):
            return None
        following = after[index]
        if following is None or following[0] != index or not (step := following[1]):
            return None
        distance = right[1] - left[1] - initial[index]
        distance += {"LE": 1, "GE": -1}.get(direction, 0)
        if direction == "EQ" or (direction != "NE" and (step > 0) != (direction[0] == "L")):
            return None
        return max(0, -(-distance // step))

    def compared(
        self, name: str, carry: Callable[[int, int | None], _Value | None]
    ) -> tuple[str, _Value, _Value] | None:
        """The comparison that a condition ends in."""
        computation = self.computations[name]
        root = computation.instructions[computation.root]
        while root.opcode in _SAME:
            root = computation.instructions[root.operands[0]]
        values = [self.value(name, o, carry) for o in root.operands]
        if root.opcode == "fusion":
            (called,) = root.computations("calls")
            return self.compared(called, lambda number, _: values[number])
        if root.opcode != "compare" or values[0] is None or values[1] is None:
            return None
        return root.attribute("direction"), values[0], values[1]

    def carries(self, constants: dict[int, int]) -> Callable[[int, int | None], _Value | None]:
        """Inside a loop: element `index` of the one parameter, as a constant or as itself."""

        def value(number: int, index: int | None) -> _Value | None:
            if index is None:
                return None
            return (None, constants[index]) if index in constants else (index, 0)

        return value

    def value(
        self, name: str, value: str, carry: Callable[[int, int | None], _Value | None]
    ) -> _Value | None:
        """A scalar integer, as far as constants, copies and sums of constants tell it."""
        computation = self.computations[name]
        instruction = computation.instructions[value]
        opcode = instruction.opcode
        if opcode == "constant":
            inside = instruction.inside
            return (None, int(inside)) if re.fullmatch(r"-?\d+", inside) else None
        if opcode == "parameter":
            return carry(int(instruction.inside), None)
        if opcode in _SAME:
            return self.value(name, instruction.operands[0], carry)
        if opcode == "get-tuple-element":
            source = computation.instructions[instruction.operands[0]]
            index = instruction.numbers("index")[0]
            if source.opcode == "parameter":
                return carry(int(source.inside), index)
            if source.opcode == "tuple":
                return self.value(name, source.operands[index], carry)
            return None
        if opcode == "fusion" and not instruction.shape.startswith("("):
            values = [self.value(name, o, carry) for o in instruction.operands]
            (called,) = instruction.computations("calls")
            root = self.computations[called].root
            return self.value(called, root, lambda number, _: values[number])
        if opcode in ("add", "subtract"):
            left, right = (self.value(name, o, carry) for o in instruction.operands)
            if left is None or right is None:
                return None
            if opcode == "subtract" and right[0] is None:
                return left[0], left[1] - right[1]
            if opcode == "add" and (left[0] is None or right[0] is None):
                return (right if left[0] is None else left)[0], left[1] + right[1]
        return None
