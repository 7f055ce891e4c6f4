"""Digests: the same on every mesh, and never the same after any change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from corrector_jax import digest
from corrector_jax.sharding import make_placement

DTYPES = [np.float32, ml_dtypes.bfloat16, np.int32, np.int8, np.uint16, np.bool_]


def array(dtype, shape=(16, 5)) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_flipped_bit_is_seen(dtype):
    original = array(dtype, (3, 2))
    before = digest.leaves({"a": original})["a"]
    bits = 1 if dtype is np.bool_ else 8 * original.dtype.itemsize
    for element in range(original.size):
        for bit in range(bits):
            changed = original.copy()
            raw = changed.reshape(-1).view(np.uint8)
            raw[element * original.dtype.itemsize + bit // 8] ^= 1 << bit % 8
            after = digest.leaves({"a": changed})["a"]
            assert after[:2] == before[:2]
            assert after[2] != before[2], (element, bit)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_a_digest_is_what_a_loop_over_the_elements_makes(dtype, shape):
    """Digests are written into files: how they are computed may change, what they are may not."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    original = np.asarray(array(dtype, shape))
    bits = original.reshape(-1).view(f"u{original.dtype.itemsize}").tolist()
    lanes = [
        sum(mix(word ^ mix((place + lane) % 2**32)) for place, word in enumerate(bits)) % 2**32
        for lane in (0x9E3779B9, 0x7F4A7C15)
    ]
    assert digest.leaves([original])["0"][2] == "".join(f"{lane:08x}" for lane in lanes)


def test_how_an_array_is_split_changes_nothing():
    tree = {"rows": array(np.float32), "whole": array(np.int32, (7,)), "scalar": np.float32(3)}
    expected = digest.leaves(tree)
    for devices in (1, 2, 8):
        place = make_placement(devices)
        placed = jax.device_put(
            tree, {"rows": place.rows, "whole": place.everywhere, "scalar": place.everywhere}
        )
        assert digest.leaves(placed) == expected


def test_moved_elements_names_shapes_and_dtypes_are_seen():
    base = np.arange(6, dtype=np.float32)
    swapped = base[[1, 0, 2, 3, 4, 5]]
    seen = {
        digest.of(tree)
        for tree in (
            {"a": base},
            {"a": swapped},
            {"b": base},
            {"a": base.reshape(2, 3)},
            {"a": base.view(np.int32)},
            {"a": base, "b": base},
            {"a": np.zeros(6, np.float32)},
            {"a": np.zeros(7, np.float32)},
        )
    }
    assert len(seen) == 8


def test_zero_and_minus_zero_and_nans_differ_by_their_bits():
    values = np.array([0.0, -0.0, np.nan], np.float32)
    other = values.copy()
    other.view(np.uint32)[2] ^= 1
    digests = [digest.leaves([np.float32(value)])["0"][2] for value in (*values, other[2])]
    assert len(set(digests)) == 4


def test_leaves_are_named_by_their_path():
    tree = {"a": (jnp.zeros(2), {"b": jnp.ones(3, jnp.bfloat16)}), "none": None}
    assert {path: leaf[:2] for path, leaf in digest.leaves(tree).items()} == {
        "a/0": ("float32", [2]),
        "a/1/b": ("bfloat16", [3]),
    }
