"""Costs against calculations by hand, on programs compiled for CPU and for TPU v5e:4x4."""

from __future__ import annotations

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from corrector_jax import chips, hlo

P = PartitionSpec


class Machine:
    """Compiles functions of shapes for some devices in a row."""

    def __init__(self, name: str):
        self.name = name
        self.devices, _ = chips.topology(name)
        self.count = len(self.devices)
        # A TPU multiplies float32 in one bfloat16 pass and moves operands as such.
        self.tpu = not name.startswith("cpu")
        self.mesh = Mesh(np.array(self.devices), ("d",), axis_types=(AxisType.Auto,))

    def shape(self, *dims, dtype=jnp.float32, spec=()):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(self.mesh, P(*spec)))

    def compile(self, function, *shapes):
        with chips.compiling(self.devices):
            return jax.jit(function).lower(*shapes).compile()

    def cost(self, function, *shapes, scopes=()):
        return hlo.cost(self.compile(function, *shapes).as_text(), scopes)

    def each(self, function, into, out):
        """`function` on every device's own part."""
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=into, out_specs=out, check_vma=False
        )


@pytest.fixture(scope="module", params=["cpu:8", "v5e:4x4"])
def machine(request):
    if request.param != "cpu:8" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: nothing compiles for a TPU")
    return Machine(request.param)


@functools.cache
def product(m, k, n):
    """FLOPs of [m, k] @ [k, n]."""
    return 2 * m * k * n


# FLOPs of programs without loops


def dots(machine):
    """name -> (function, shapes, FLOPs by hand)."""
    s = machine.shape
    grouped = s(16, 64, 256), s(16, 128, 256)
    return {
        "matmul": (jnp.matmul, (s(256, 512), s(512, 384)), product(256, 512, 384)),
        "bfloat16": (
            jnp.matmul,
            (s(256, 512, dtype=jnp.bfloat16), s(512, 384, dtype=jnp.bfloat16)),
            product(256, 512, 384),
        ),
        "batched": (
            lambda a, b: jnp.einsum("bij,bjk->bik", a, b),
            (s(4, 128, 256), s(4, 256, 128)),
            4 * product(128, 256, 128),
        ),
        "batched, transposed": (
            lambda a, b: jnp.einsum("bij,bkj->bik", a, b),
            grouped,
            16 * product(64, 256, 128),
        ),
        "two batch axes": (
            lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k),
            (s(2, 128, 4, 64), s(2, 128, 4, 64)),
            2 * 4 * product(128, 64, 128),
        ),
        "two contracted": (
            lambda a, b: jnp.einsum("ijk,jkl->il", a, b),
            (s(128, 8, 64), s(8, 64, 256)),
            product(128, 8 * 64, 256),
        ),
    }


@pytest.mark.parametrize("name", list(dots(Machine("cpu:8"))))
def test_a_product_costs_what_it_does_by_hand_and_by_xla(machine, name):
    function, shapes, flops = dots(machine)[name]
    compiled = machine.compile(function, *shapes)
    found = hlo.cost(compiled.as_text())
    assert found.flops == flops
    assert found.flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.01)
    assert found.collectives == {}
    assert found.largest is None


def test_attention_is_two_products(machine):
    def attention(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    shape = machine.shape(2, 128, 4, 64, dtype=jnp.bfloat16)
    assert machine.cost(attention, shape, shape, shape).flops == 2 * 2 * 4 * product(128, 64, 128)


def test_the_gradient_of_two_layers_is_five_products(machine):
    def loss(weights, x):
        return jnp.sum(jnp.square(jnp.tanh(x @ weights[0]) @ weights[1]))

    weights = machine.shape(256, 512), machine.shape(512, 128)
    # Forward both, back through the second, both weights: x needs no gradient.
    flops = 2 * product(64, 256, 512) + 3 * product(64, 512, 128)
    assert machine.cost(jax.grad(loss), weights, machine.shape(64, 256)).flops == flops


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_counts_what_it_meets(machine, padding, stride):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    # Along an axis of 16 a window of 3 meets this many elements.
    met = {("SAME", 1): 46, ("SAME", 2): 23, ("VALID", 1): 42, ("VALID", 2): 21}[padding, stride]
    shapes = machine.shape(8, 16, 16, 32), machine.shape(3, 3, 32, 64)
    assert machine.cost(convolve, *shapes).flops == 2 * 8 * met**2 * 32 * 64


def test_valid_positions_are_those_that_a_loop_over_them_finds():
    rng = np.random.default_rng(0)
    for _ in range(300):
        size, kernel, out, stride, left, right = rng.integers(1, 8, 6).tolist()
        low = int(rng.integers(-3, 8))
        met = 0
        for o in range(out):
            for k in range(kernel):
                place = o * stride + k * right - low
                met += place % left == 0 and 0 <= place // left < size
        assert hlo._valid_positions(size, kernel, out, stride, low, left, right) == met


# Loops and branches


def test_a_scan_counts_as_often_as_it_runs(machine):
    def scanned(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    found = machine.cost(scanned, machine.shape(128, 128), machine.shape(7, 128, 128))
    assert found.flops == 7 * product(128, 128, 128)
    assert found.unknown_loops == ()


def test_loops_within_loops_multiply(machine):
    def nested(x, w):
        def outer(x, _):
            return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x), None

        return jax.lax.scan(outer, x, None, length=3)[0]

    found = machine.cost(nested, machine.shape(128, 128), machine.shape(128, 128))
    assert found.flops == 15 * product(128, 128, 128)
    assert found.unknown_loops == ()


@pytest.mark.parametrize(("first", "last", "times"), [(2, 11, 9), (4, 4, 0)])
def test_a_loop_counts_from_where_it_starts(machine, first, last, times):
    def loop(x, w):
        return jax.lax.fori_loop(first, last, lambda i, x: jnp.tanh(x @ w + i), x)

    found = machine.cost(loop, machine.shape(128, 128), machine.shape(128, 128))
    assert found.flops == times * product(128, 128, 128)


@pytest.mark.parametrize(
    ("first", "more", "step", "times"),
    [
        (20, lambda i: i > 3, -4, 5),
        (20, lambda i: i >= 4, -4, 5),
        (1, lambda i: i <= 10, 3, 4),
        (1, lambda i: i != 10, 3, 3),
    ],
)
def test_a_loop_may_count_in_any_way(machine, first, more, step, times):
    def loop(x, w):
        def body(carry):
            return carry[0] + step, jnp.tanh(carry[1] @ w + carry[0])

        return jax.lax.while_loop(lambda carry: more(carry[0]), body, (first, x))[1]

    found = machine.cost(loop, machine.shape(128, 128), machine.shape(128, 128))
    assert found.flops == times * product(128, 128, 128)
    assert found.unknown_loops == ()


def test_a_loop_of_unknown_length_is_named_and_counted_once(machine):
    def loop(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9.0, lambda x: jnp.tanh(x @ w), x)

    found = machine.cost(loop, machine.shape(128, 128), machine.shape(128, 128))
    assert found.flops == product(128, 128, 128)
    (name,) = found.unknown_loops
    assert re.fullmatch(r"while\S* jit\(loop\)/while", name)


def test_of_two_branches_the_expensive_one_counts(machine):
    def either(which, x, w):
        return jax.lax.cond(which > 0, lambda x: jnp.tanh(x @ w) @ w, lambda x: x @ w, x)

    shape = machine.shape(128, 128)
    found = machine.cost(either, machine.shape(dtype=jnp.int32), shape, shape)
    assert found.flops == 2 * product(128, 128, 128)


# Parts of a program


def test_flops_belong_to_the_scopes_that_they_were_written_in(machine):
    def sweep(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def loss(x, w, last):
        with jax.named_scope("part"):
            x = sweep(x, w)
        return jnp.sum(x @ last)

    shapes = machine.shape(64, 128), machine.shape(7, 128, 128), machine.shape(128, 256)
    of = machine.cost(loss, *shapes, scopes=("part", "par", "sweep")).flops_of
    assert of == {"part": 7 * product(64, 128, 128), "par": 0, "sweep": 0}
    found = machine.cost(jax.grad(loss, 1), *shapes, scopes=("part",))
    # Forward, back to what is carried, back to the weights; and back through the last.
    assert found.flops_of["part"] == 3 * 7 * product(64, 128, 128)
    assert found.flops == found.flops_of["part"] + product(64, 256, 128)


# Between devices


def test_collectives_move_these_bytes(machine):
    n, part = machine.count, 128 * 256 * 4
    whole = n * part
    split, everywhere = P("d"), P()
    x = machine.shape(n * 128, 256, spec="d")

    def psum(x):
        return jax.lax.psum(x, "d")

    found = machine.cost(machine.each(psum, split, everywhere), x)
    assert found.collectives == {"all-reduce": hlo.Collective(1, part, 2 * part * (n - 1) / n)}
    assert found.largest[:3] == ("all-reduce", "f32[128,256]", part)
    assert found.largest.op_name.endswith("psum")

    def gather(x):
        return jax.lax.all_gather(x, "d", tiled=True)

    found = machine.cost(machine.each(gather, split, everywhere), x)
    assert found.collectives == {"all-gather": hlo.Collective(1, whole, part * (n - 1))}
    assert found.largest[:3] == ("all-gather", f"f32[{n * 128},256]", whole)

    def swap(x):
        return jax.lax.all_to_all(x, "d", 1, 0, tiled=True)

    found = machine.cost(machine.each(swap, split, split), x)
    assert found.collectives == {"all-to-all": hlo.Collective(1, part, part * (n - 1) / n)}

    def pass_on(x):
        return jax.lax.ppermute(x, "d", [(i, (i + 1) % n) for i in range(n)])

    found = machine.cost(machine.each(pass_on, split, split), x)
    assert found.collectives == {"collective-permute": hlo.Collective(1, part, part)}


def test_a_reduce_scatter_starts_from_the_whole(machine):
    n = machine.count
    whole = n * 128 * 256 * 4

    def scatter(x):
        return jax.lax.psum_scatter(x, "d", tiled=True)

    found = machine.cost(machine.each(scatter, P(), P("d")), machine.shape(n * 128, 256))
    # The TPU's compiler makes an all-reduce of this one; of gradients it does not, see below.
    kind, times = ("all-reduce", 2) if machine.tpu else ("reduce-scatter", 1)
    sent = times * whole * (n - 1) / n
    assert found.collectives == {kind: hlo.Collective(1, whole, sent)}


def test_collectives_in_a_loop_count_as_often_as_it_runs(machine):
    def body(x, _):
        return 0.5 * jax.lax.psum(x, "d"), None

    def loop(x):
        return jax.lax.scan(body, x, None, length=7)[0]

    x = machine.shape(machine.count * 128, 256, spec="d")
    found = machine.cost(machine.each(loop, P("d"), P("d")), x)
    assert found.collectives["all-reduce"].count == 7
    assert found.collectives["all-reduce"].bytes == 7 * 128 * 256 * 4
    assert found.largest.bytes == 128 * 256 * 4


def test_a_gather_that_nobody_wrote_is_found(machine):
    n = machine.count
    found = machine.cost(
        jnp.matmul, machine.shape(n * 128, 256, spec="d"), machine.shape(256, 512, spec="d")
    )
    assert found.flops == product(128, 256, 512)
    assert found.collectives["all-gather"].count == 1
    assert found.largest.bytes == 256 * 512 * (2 if machine.tpu else 4)


def test_parts_of_a_mesh_gather_among_themselves(machine):
    devices = np.array(machine.devices).reshape(2, -1)
    mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    weights = jax.ShapeDtypeStruct(
        (4, 512, 512), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp"))
    )
    x = jax.ShapeDtypeStruct(
        (1024, 512), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp")))
    )

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0])

    found = machine.cost(loss, weights, x)
    size = 512 * 512 * (2 if machine.tpu else 4)
    share = 1 - 1 / devices.shape[1]
    assert found.flops == 4 * product(1024 // machine.count, 512, 512)
    assert found.collectives["all-gather"] == hlo.Collective(4, 4 * size, 4 * size * share)


def test_a_collective_that_hides_behind_a_product_is_counted_once(machine):
    """On TPU such a gather is spread over several fusions, and some are started early."""
    layers, width, hidden, batch = 6, 512, 2048, 256
    devices = np.array(machine.devices).reshape(-1, 4)
    mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, P(None, "fsdp"))
    weights = tuple(
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
        for shape in ((layers, width, hidden), (layers, hidden, width))
    )
    x = jax.ShapeDtypeStruct(
        (machine.count * batch, width),
        jnp.bfloat16,
        sharding=NamedSharding(mesh, P(("data", "fsdp"))),
    )

    def layer(x, w):
        inner, outer = (w.astype(jnp.bfloat16) for w in w)
        return x + jax.nn.relu(x @ inner) @ outer, None

    def loss(weights, x):
        y, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    def gradient(weights, x):
        return jax.lax.with_sharding_constraint(jax.grad(loss)(weights, x), split)

    text = machine.compile(gradient, weights, x).as_text()
    assert ("AsyncCollectiveStart" in text) == machine.tpu
    found = hlo.cost(text)
    # Forward two products, the first again, back four.
    assert found.flops == layers * 7 * product(batch, width, hidden)
    # Forward and back, the two weights of a layer each.
    assert found.collectives["all-gather"].count == 4 * layers
    if machine.tpu:
        assert found.collectives["reduce-scatter"].count == 2 * layers
    assert found.unknown_loops == ()


# Memory


def test_a_product_reads_its_operands_and_writes_its_result(machine):
    found = machine.cost(jnp.matmul, machine.shape(512, 1024), machine.shape(1024, 256))
    assert found.bytes == 4 * (512 * 1024 + 1024 * 256 + 512 * 256)


def test_tiles_of_an_array_in_a_loop_are_one_pass_over_it(machine):
    rows, tile, width = 1 << 18, 1 << 13, 256
    # In the type that the machine multiplies: any other is converted first, in a pass of its own.
    dtype = jnp.bfloat16 if machine.tpu else jnp.float32

    def best(x, q):
        def step(best, start):
            part = jax.lax.dynamic_slice_in_dim(x, start, tile)
            return jnp.maximum(best, jnp.max(q @ part.T, axis=1)), None

        return jax.lax.scan(step, jnp.zeros(8, dtype), jnp.arange(0, rows, tile))[0]

    x, q = machine.shape(rows, width, dtype=dtype), machine.shape(8, width, dtype=dtype)
    found = machine.cost(best, x, q)
    assert found.flops == product(8, width, rows)
    whole = rows * width * x.dtype.itemsize
    # A CPU program copies each tile out before it multiplies: read, write, read.
    passes = 1 if machine.tpu else 3
    assert found.bytes == pytest.approx(passes * whole, rel=0.01)


def test_gathered_rows_are_what_a_gather_reads(machine):
    def take(x, rows):
        return jnp.square(jnp.take(x, rows, axis=0, mode="clip"))

    # The array is beyond what a TPU could hold on its chip.
    x, rows = machine.shape(1 << 18, 256), machine.shape(512, dtype=jnp.int32)
    assert machine.cost(take, x, rows).bytes < 5 * 512 * 256 * 4


def test_an_update_in_place_moves_what_it_puts(machine):
    def put(x, new, start):
        return jax.lax.dynamic_update_slice_in_dim(x, new, start, 0)

    shapes = machine.shape(1 << 18, 256), machine.shape(512, 256), machine.shape(dtype=jnp.int32)
    with chips.compiling(machine.devices):
        compiled = jax.jit(put, donate_argnums=0).lower(*shapes).compile()
    assert hlo.cost(compiled.as_text()).bytes < 3 * 512 * 256 * 4


# What other compilers write


def program(*lines, header="num_partitions=8", more=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, {header}\n\n{more}ENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"


def test_the_two_halves_of_a_collective_are_one():
    found = hlo.cost(
        program(
            "%p = f32[256,128]{1,0} parameter(0)",
            "%a = (f32[256,128]{1,0}, f32[1024,128]{1,0}) all-gather-start(%p), "
            "replica_groups=[2,4]<=[8], dimensions={0}",
            "%b = f32[1024,128]{1,0} all-gather-done(%a)",
            "%c = (f32[256,128]{1,0}, f32[256,128]{1,0}, u32[], u32[]) "
            "collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
            "%d = f32[256,128]{1,0} collective-permute-done(%c)",
            "%e = f32[256,128]{1,0} all-reduce-start(%p), replica_groups={}, to_apply=%add",
            "ROOT %f = f32[256,128]{1,0} all-reduce-done(%e)",
        )
    )
    part = 256 * 128 * 4
    assert found.collectives == {
        "all-gather": hlo.Collective(1, 4 * part, 3 * part),
        "all-reduce": hlo.Collective(1, part, 2 * part * 7 / 8),
        "collective-permute": hlo.Collective(1, part, part),
    }
    assert found.largest == ("all-gather", "f32[1024,128]", 4 * part, "")
    # Each reads its operand and writes its result, once.
    assert found.bytes == 5 * part + 2 * part + 2 * part


def test_a_wrapped_computation_is_run_once():
    more = (
        "%wrapped (q: f32[64,64]) -> f32[64,64] {\n"
        "  %q = f32[64,64]{1,0} parameter(0)\n"
        "  ROOT %d = f32[64,64]{1,0} dot(%q, %q), lhs_contracting_dims={1}, "
        "rhs_contracting_dims={0}\n}\n\n"
    )
    lines = (
        "%p = f32[64,64]{1,0} parameter(0)",
        "%s = ((f32[64,64]{1,0}), f32[64,64]{1,0}, u32[]) async-start(%p), calls=%wrapped",
        "%u = ((f32[64,64]{1,0}), f32[64,64]{1,0}, u32[]) async-update(%s)",
        "ROOT %d = f32[64,64]{1,0} async-done(%u)",
    )
    found = hlo.cost(program(*lines, more=more))
    assert found.flops == product(64, 64, 64)
    assert found.bytes == 3 * 64 * 64 * 4


@pytest.mark.parametrize(
    ("call", "flops"),
    [
        ('custom_call_target="__onednn$matmul"', product(64, 32, 16)),
        (
            'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
            '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
            '"rhs_contracting_dimensions":["0"]}}}',
            product(64, 32, 16),
        ),
        ('custom_call_target="xla_ffi_python_cpu_callback"', 0),
    ],
)
def test_products_that_a_library_makes_are_counted(call, flops):
    lines = (
        "%p = f32[64,32]{1,0} parameter(0)",
        "%q = f32[32,16]{1,0} parameter(1)",
        "%r = (f32[64,16]{1,0}, s8[4194304]{0}) custom-call(%p, %q), " + call,
        "ROOT %s = f32[64,16]{1,0} get-tuple-element(%r), index=0",
    )
    assert hlo.cost(program(*lines)).flops == flops


def test_what_takes_or_puts_a_part_moves_that_part():
    lines = (
        "%x = f32[4096,256]{1,0} parameter(0)",
        "%i = s32[] parameter(1)",
        "%rows = s32[32,1]{1,0} parameter(2)",
        "%a = f32[32,256]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={32,256}",
        "%b = f32[32,256]{1,0} gather(%x, %rows), slice_sizes={1,256}",
        "%c = f32[4096,256]{1,0} dynamic-update-slice(%x, %a, %i, %i)",
        "ROOT %d = f32[4096,256]{1,0} scatter(%c, %rows, %b), to_apply=%add",
    )
    part, index = 32 * 256 * 4, 4
    takes = (2 * part + 2 * index) + (2 * part + 32 * index)
    puts = (2 * part + 2 * index) + (2 * part + 32 * index)
    assert hlo.cost(program(*lines)).bytes == takes + puts


def test_what_stays_on_the_chip_is_free():
    lines = (
        "%x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)",
        "%s = (bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, "
        "u32[]{:S(2)}) copy-start(%x)",
        "%y = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%s)",
        "%z = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} tanh(%y)",
        "ROOT %r = f32[64,128]{1,0:T(8,128)} convert(%z)",
    )
    assert hlo.cost(program(*lines)).bytes == 64 * 128 * 2 + 64 * 128 * 4


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.cost("HloModule nothing")
