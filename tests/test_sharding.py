"""Where values live: shares are equal and whole, and donated buffers are reused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax.sharding import EVERYWHERE, ROWS, local_start, make_placement

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
