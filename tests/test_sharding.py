"""Where values live: shares are equal and whole, and donated buffers are reused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from corrector_jax.models.bert import BertConfig
from corrector_jax.models.dual_encoder import DualEncoder, Encoder, Projection
from corrector_jax.models.modernbert import ModernBertConfig
from corrector_jax.models.t5 import T5Config
from corrector_jax.sharding import (
    EVERYWHERE,
    ROWS,
    local_start,
    make_placement,
    rules_of,
)
from corrector_jax.types import UserError

MESHES = pytest.mark.parametrize("devices", [1, 3, 8])


@MESHES
@pytest.mark.parametrize("multiple", [1, 16])
def test_padding_gives_every_device_an_equal_whole_share(devices, multiple):
    place = make_placement(devices)
    for count in (0, 1, devices * multiple - 1, devices * multiple, devices * multiple + 1, 1009):
        rows = place.pad(count, multiple)
        assert rows % (devices * multiple) == 0
        assert rows >= max(count, 1)
        assert rows - count < devices * multiple or count == 0


@MESHES
def test_rows_are_split_in_order_and_the_rest_is_everywhere(devices):
    place = make_placement(devices)
    assert place.num_devices == devices
    x = np.arange(6 * devices).reshape(-1, 2)
    split, whole = place.put_rows({"x": x})["x"], place.put_everywhere({"x": x})["x"]
    assert np.array_equal(split, x)
    assert [s.data.shape for s in split.addressable_shards] == [(3, 2)] * devices
    assert [s.data.shape for s in whole.addressable_shards] == [x.shape] * devices
    starts = place.per_device(
        lambda part: jnp.broadcast_to(local_start(part.shape[0]), (1,)), (ROWS,), ROWS
    )(split)
    assert starts.tolist() == list(range(0, 3 * devices, 3))


def test_split_asks_for_rows_and_leaves_what_does_not_divide():
    place = make_placement(8)
    ask = jax.jit(lambda x: place.split(x) + 1)
    assert ask(place.put_everywhere(jnp.zeros((16, 2)))).sharding.is_equivalent_to(place.rows, 2)
    assert ask(place.put_everywhere(jnp.zeros((15, 2)))).shape == (15, 2)


def test_all_devices_by_default_and_not_more_than_there_are():
    assert make_placement().num_devices == jax.device_count()
    with pytest.raises(ValueError, match="9"):
        make_placement(9)


@MESHES
def test_a_step_reuses_what_it_is_given(devices):
    place = make_placement(devices)

    def step(kept, changed):
        return changed + kept.sum(), kept.sum()

    compiled = place.jit_step(step, (place.rows, place.everywhere), donate=(1,))
    kept, changed = (place.put_rows(np.ones((8 * devices, 4), np.float32)) for _ in range(2))
    alias = compiled.lower(kept, changed).compile().memory_analysis().alias_size_in_bytes
    assert alias == 8 * 4 * 4
    out, total = compiled(kept, changed)
    assert changed.is_deleted()
    assert not kept.is_deleted()
    assert out.sharding.is_equivalent_to(place.rows, 2)
    assert total.sharding.is_equivalent_to(place.everywhere, 0)
    assert place.everywhere.spec == EVERYWHERE


# Rules.

AXES = {"up/kernel": ("width", "inner"), "up/bias": ("inner",), "(word|place)": (None, "width")}
SHAPES = {
    "layer": {"up": {"kernel": jnp.zeros((8, 12)), "bias": jnp.zeros(12)}, "norm": jnp.zeros(8)},
    "word": jnp.zeros((97, 8)),
}


def specs(place, tree):
    return jax.tree.map(lambda sharding: tuple(sharding.spec), place.parameters(tree))


def test_rules_say_where_leaves_are_and_the_rest_is_everywhere():
    place = make_placement(8, fsdp=2, tensor=2, rules=rules_of(AXES))
    found = specs(place, {"shared": SHAPES, "beta": jnp.zeros(())})
    assert found["beta"] == ()
    assert found["shared"]["word"] == (None, "fsdp")
    assert found["shared"]["layer"] == {
        "up": {"kernel": ("fsdp", "tensor"), "bias": ("tensor",)},
        "norm": (),
    }
    # Moments mirror parameters, under other names.
    assert specs(place, ({"mu": SHAPES}, {"nu": SHAPES}))[1]["nu"] == found["shared"]
    # A pattern is whole parts of a path: "word" is not the end of "sword", nor the middle.
    strange = {"sword": jnp.zeros((2, 2)), "word": {"inner": jnp.zeros((2, 2))}}
    assert specs(place, SHAPES | strange | {"a": {"word": SHAPES["word"]}}) | {"layer": 0} == {
        "a": {"word": (None, "fsdp")}, "layer": 0, "sword": (), "word": {"inner": ()},
    }  # fmt: skip


def test_rules_that_contradict_each_other_are_refused():
    rules = (*rules_of(AXES), ("kernel", PartitionSpec("fsdp")))
    with pytest.raises(ValueError, match=r"contradict .*layer/up/kernel"):
        make_placement(1, rules=rules).parameters(SHAPES)
    same = (*rules_of(AXES), (".*/kernel", PartitionSpec("fsdp", "tensor")))
    assert make_placement(1, rules=same).parameters(SHAPES)


def test_a_rule_that_no_leaf_matches_is_refused():
    rules = (*rules_of(AXES), ("down/kernel", PartitionSpec("fsdp")))
    with pytest.raises(ValueError, match="down/kernel"):
        make_placement(1, rules=rules).parameters(SHAPES)


@pytest.mark.parametrize(
    ("axes", "key", "said"),
    [
        ({"fsdp": 8}, "fsdp", r"word \[97, 6\]: write a divisor of 6"),
        ({"tensor": 8}, "tensor", r"layer/up/bias \[12\]: write a divisor of 12"),
    ],
)
def test_a_mesh_that_does_not_divide_a_parameter_is_refused(axes, key, said):
    place = make_placement(8, **axes, rules=rules_of(AXES))
    tree = SHAPES | {"word": jnp.zeros((97, 6))} if key == "fsdp" else SHAPES
    with pytest.raises(UserError, match=rf"config.mesh.{key} is 8, .*{said}"):
        place.parameters({"shared": tree})


BASE = {"vocab_size": 32_000, "hidden_size": 768, "num_layers": 2, "num_heads": 12}
ENCODERS = {
    "bert": Encoder(BertConfig(**BASE, intermediate_size=3072, max_positions=512)),
    "roberta": Encoder(
        BertConfig(**BASE, intermediate_size=3072, max_positions=512, pad_id=1, position_offset=2)
    ),
    "t5": Encoder(
        T5Config(**BASE, head_size=64, intermediate_size=3072), project=Projection(768, bias=False)
    ),
    "t5-gated": Encoder(T5Config(**BASE, head_size=64, intermediate_size=2048, gated=True)),
    "modernbert": Encoder(
        ModernBertConfig(
            **BASE, intermediate_size=1152, max_positions=8192, local=(True, False), pad_id=0
        ),
        project=Projection(512),
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("shared", [True, False])
def test_a_family_s_rules_split_all_that_is_large_over_both_axes(name, shared):
    model = DualEncoder(ENCODERS[name], shared=shared)
    params = jax.eval_shape(model.init, jax.random.key(0))
    place = make_placement(8, fsdp=2, tensor=4, rules=rules_of(model.axes()))
    shardings = place.parameters(params)
    whole, held = 0, 0
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    ):
        share = sharding.shard_shape(leaf.shape)
        parts = leaf.size // np.prod(share)
        if leaf.size > 2**14:
            assert parts >= 2, jax.tree_util.keystr(path)
        if leaf.ndim > 1 and "layer" in jax.tree_util.keystr(path):
            assert parts == 8, jax.tree_util.keystr(path)
        whole, held = whole + leaf.size, held + np.prod(share)
    assert held < 0.45 * whole  # the word table, most of these two layers, is split in two
