"""The index over the stale cache: what it finds, that it is always the same, and without ScaNN."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from corrector_jax import index, paths
from corrector_jax.sharding import make_placement
from corrector_jax.snapshot import DamagedError
from tests import oracle

ROOT = Path(__file__).resolve().parents[1]
N, DIM, K = 3000, 16, 40
MADE = index.Parameters(leaves=50, searched=12, reorder=160)


@functools.cache
def problem() -> tuple[np.ndarray, np.ndarray]:
    """Clustered rows, as embeddings are, and queries near some of them."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(30, DIM))
    rows = centers[rng.integers(30, size=N)] + 0.5 * rng.normal(size=(N, DIM))
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    queries = rows[:33] + 0.1 * rng.normal(size=(33, DIM))
    return rows.astype(np.float32), queries.astype(np.float32)


def numbers() -> np.ndarray:
    return np.arange(N, dtype=np.int32)


@functools.cache
def built() -> index.Index:
    return index.build(numbers(), problem()[0], k=K, made=MADE)


def exact(queries: np.ndarray, k: int = K) -> np.ndarray:
    return np.argsort(-(queries @ problem()[0].T), axis=1)[:, :k]


def test_small_sets_are_searched_exactly_and_large_ones_in_parts():
    assert index.parameters(9_999, 100) == (1, 1, 0)
    assert index.parameters(100_000, 100) == (316, 36, 400)
    assert index.parameters(21_015_324, 1024) == (4584, 135, 4096)
    assert index.parameters(16_000, 1000) == (126, 63, 4000)  # eight times as many as are wanted
    assert index.parameters(500, 100, leaves=20, searched=30, reorder=50) == (20, 20, 100)
    assert index.parameters(30, 50, leaves=4) == (4, 4, 30)


def test_it_finds_nearly_all_of_the_best():
    rows, queries = problem()
    ids, scores = built().search(queries, K)
    hits = [len(set(a) & set(b)) / K for a, b in zip(ids, exact(queries), strict=True)]
    assert np.mean(hits) > 0.95
    assert ids.dtype == np.int32
    np.testing.assert_allclose(scores, np.einsum("bd,bkd->bk", queries, rows[ids]), atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_without_leaves_it_finds_exactly_the_best_of_its_own_rows():
    rows, queries = problem()
    own = np.arange(5, 500, 3, dtype=np.int32)
    one = index.build(own, rows[own], k=K, made=index.parameters(len(own), K))
    ids, _ = one.search(queries, K)
    best = own[np.argsort(-(queries @ rows[own].T), axis=1)[:, :K]]
    np.testing.assert_array_equal(ids, best)


def test_a_query_finds_the_same_alone_and_in_a_batch():
    queries = problem()[1]
    ids, scores = built().search(queries, K)
    for at in (0, 20):
        alone = built().search(queries[at : at + 1], K)
        np.testing.assert_array_equal(alone[0], ids[at : at + 1])
        np.testing.assert_array_equal(alone[1], scores[at : at + 1])


def test_indices_of_the_same_rows_are_the_same_to_the_byte(tmp_path):
    rows = oracle.unit(np.random.default_rng(1), 12_000, 64)  # with fewer, chance does not show
    ids, made = np.arange(len(rows), dtype=np.int32), index.Parameters(110, 3, 160)
    # All alive at once: what depends on addresses would differ.
    every = [index.build(ids, rows.copy(), k=K, made=made) for _ in range(4)]
    for number, one in enumerate(every):
        one.save(tmp_path / str(number), cache="abc")
    said = {(tmp_path / str(number) / "index.json").read_text() for number in range(4)}
    assert len(said) == 1  # the sha256 of every file


def test_what_is_not_there_is_padded_and_a_query_that_is_not_finite_finds_nothing():
    rows, queries = problem()
    few = index.build(numbers()[:7], rows[:7], k=K, made=index.parameters(7, K))
    ids, scores = few.search(np.stack([queries[0], queries[1] * np.nan]), K)
    assert sorted(ids[0, :7]) == list(range(7))
    assert (ids[0, 7:] == -1).all()
    assert (scores[0, 7:] == -np.inf).all()
    assert (ids[1] == -1).all()
    one_leaf = index.build(numbers(), rows, k=500, made=index.Parameters(50, 1, 600))
    ids, scores = one_leaf.search(queries, 500)
    assert one_leaf.parameters.searched == 1
    assert (ids[:, -1] == -1).all()
    assert (np.isfinite(scores) == (ids >= 0)).all()


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_a_saved_index_finds_what_it_found(tmp_path, scheme):
    folder = paths.make(f"{scheme}{tmp_path}/index")
    built().save(folder, cache="abc")
    files = [path for path in folder.iterdir() if path.name != "index.json"]
    assert index.check(folder) == sum(path.stat().st_size for path in files)
    found = index.load(folder, numbers(), cache="abc", made=MADE).search(problem()[1], K)
    for one, other in zip(found, built().search(problem()[1], K), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_damaged_index_or_one_of_something_else_is_not_loaded(tmp_path):
    folder = tmp_path / "index"

    def refused(said: str, cache: str = "abc", ids: np.ndarray | None = None) -> None:
        with pytest.raises(DamagedError, match=said):
            index.load(folder, numbers() if ids is None else ids, cache=cache, made=MADE)
        if "something else" not in said:
            with pytest.raises(DamagedError, match=said):
                index.check(folder)

    refused("holds no index")
    built().save(folder, cache="abc")
    refused("of something else", cache="abd")
    refused("of something else", ids=numbers()[::-1].copy())
    (folder / "scann_docids.pkl").write_bytes(b"whatever")
    refused("does not hold the files")
    (folder / "scann_docids.pkl").unlink()
    content = bytearray((folder / "hashed_dataset.npy").read_bytes())
    content[-1] ^= 1
    (folder / "hashed_dataset.npy").write_bytes(content)
    refused("sha256 differs")


def test_several_indices_give_the_best_of_all_rows():
    rows, queries = problem()
    halves = []
    for own in (numbers()[::2].copy(), numbers()[1::2].copy()):
        part = index.build(own, rows[own], k=K, made=index.parameters(len(own), K))
        halves.append(part.search(queries, K))
    ids, scores = (np.stack(both) for both in zip(*halves, strict=True))
    np.testing.assert_array_equal(index.merge(ids, scores, K), exact(queries))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rows_of_a_cache_are_read_without_its_padding(devices, dtype):
    rows = problem()[0][:67]
    cache = oracle.filled(rows, make_placement(devices), block_rows=4, dtype=dtype)
    ids, held = index.rows_here(cache)
    np.testing.assert_array_equal(ids, np.arange(67))
    np.testing.assert_array_equal(held, np.asarray(rows, cache.embeddings.dtype).astype("float32"))


CODE = """
import sys
from corrector_jax import index
{first}
print(index.why_not())
"""


@pytest.mark.parametrize(
    ("tensorflow", "first", "said"),
    [
        ("raise RuntimeError('built for another version')", "", ""),
        ("raise RuntimeError('built for another version')", "sys.modules['scann'] = None", "scann"),
        ("load_op_library = None", "import tensorflow", "Error"),
    ],
    ids=["tensorflow-unused", "no-scann", "tensorflow-in-use"],
)
def test_tensorflow_beside_it_is_not_looked_at_and_why_it_fails_is_said(
    tmp_path, tensorflow, first, said
):
    (tmp_path / "tensorflow.py").write_text(tensorflow)
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(first=first)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert (said in done.stdout) if said else not done.stdout.strip()


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"files": null}', '{"files": [[[]]]}'])
def test_an_index_json_of_anything_else_is_no_index(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DamagedError, match="holds no index"):
        index.load(tmp_path, numbers(), cache="abc", made=MADE)


def test_a_process_that_holds_padding_alone_finds_nothing(monkeypatch):
    """Its devices come behind the last target: 67 of 512 rows, of which it has the last 64."""
    cache = oracle.filled(problem()[0][:67], make_placement(8), block_rows=4)
    monkeypatch.setattr(index, "own_rows", lambda array: {448: np.zeros((64, DIM), np.float32)})
    ids, rows = index.rows_here(cache)
    assert (ids.shape, rows.shape) == ((0,), (0, DIM))
    made = index.parameters(len(ids), K, leaves=8)
    found, scores = index.build(ids, rows, k=K, made=made).search(problem()[1], K)
    assert (found == -1).all()
    assert (scores == -np.inf).all()
    assert found.shape == scores.shape == (33, K)
