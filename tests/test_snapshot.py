"""Snapshots of the cache: any mesh and dtype reads them, and nothing but what was saved."""

from __future__ import annotations

import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from corrector_jax import cache as caches
from corrector_jax import paths, snapshot
from corrector_jax.sharding import make_placement
from corrector_jax.snapshot import DamagedError
from corrector_jax.types import UserError

N, D = 67, 6
MADE_BY = {
    "weights": "aa", "tokenizer": "bb", "template": "{text}", "prefix": "", "length": 64,
    "layers": 2, "pooling": "mean", "normalize": True, "dtype": "float32", "corpus": "cc",
}  # fmt: skip
REMEDY = "write another --workdir"


def empty(devices: int, dtype: str = "float32") -> caches.TargetCache:
    return caches.create(N, D, dtype=dtype, block_rows=4, place=make_placement(devices))


@functools.cache
def filled(devices: int, dtype: str = "float32") -> caches.TargetCache:
    place = make_placement(devices)
    rows = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    ids = np.arange(N, dtype=np.int32)
    return caches.write(empty(devices, dtype), ids, rows, 5, place)


def real(cache: caches.TargetCache) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.asarray(cache.embeddings[:N]).astype(np.float32),
        np.asarray(cache.written_at[:N]),
    )


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    if request.param == "disk":
        return tmp_path / "snapshot"
    return paths.make(f"memory://{tmp_path.name}/snapshot")


def load(folder, like, made_by=MADE_BY, sha256=""):
    return snapshot.load(folder, like, made_by=made_by, sha256=sha256, remedy=REMEDY)


@pytest.mark.parametrize(("saved_on", "read_on"), [(8, 1), (1, 8), (3, 2)])
def test_what_one_mesh_saves_another_reads_bit_for_bit(folder, saved_on, read_on):
    cache = filled(saved_on)
    reference = snapshot.save(folder, cache, step=5, made_by=MADE_BY)
    back = load(folder, empty(read_on), sha256=reference["sha256"])
    assert reference["step"] == 5
    for one, other in zip(real(cache), real(back), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (np.asarray(back.written_at)[N:] == -1).all()
    assert (np.asarray(back.embeddings)[N:] == 0).all()
    assert back.embeddings.sharding.is_equivalent_to(empty(read_on).embeddings.sharding, 2)


def test_many_files_hold_the_same_rows(folder, monkeypatch):
    cache = filled(2)
    monkeypatch.setattr(snapshot, "FILE_BYTES", 7 * (4 * D + 8))
    snapshot.save(folder, cache, step=5, made_by=MADE_BY)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert len(files) > 9
    assert all(entry["stop"] - entry["start"] <= 7 for entry in files)
    for one, other in zip(real(cache), real(load(folder, empty(3))), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("saved", "read"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_another_storage_dtype_reads_it(folder, saved, read):
    cache = filled(2, saved)
    snapshot.save(folder, cache, step=5, made_by=MADE_BY)
    back = load(folder, empty(4, read))
    assert back.embeddings.dtype == read
    expected = real(cache)[0].astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(real(back)[0], expected)


def test_int8_rows_are_saved_with_their_scale_and_read_as_any_dtype(tmp_path):
    cache = filled(3)
    snapshot.save(tmp_path / "f32", cache, step=5, made_by=MADE_BY)
    small = load(tmp_path / "f32", empty(8, "int8"))
    snapshot.save(tmp_path / "int8", small, step=5, made_by=MADE_BY)
    (file,) = (tmp_path / "int8").glob("rows-000000000000.safetensors")
    held = safetensors.numpy.load_file(file)
    assert {name: array.dtype for name, array in held.items()} == {
        "embeddings": np.int8, "scale": np.float32, "written_at": np.int32,
    }  # fmt: skip
    same = load(tmp_path / "int8", empty(2, "int8"))
    assert np.array_equal(same.scale[:N], small.scale[:N])
    assert (np.asarray(same.scale)[N:] == 1).all()
    for one, other in zip(real(small), real(same), strict=True):
        np.testing.assert_array_equal(one, other)
    rows = real(cache)[0]
    bound = np.abs(rows).max(axis=1, keepdims=True) * (1 / 254 + 1e-6)
    for devices, dtype, rounded in ((1, "bfloat16", 2**-8), (5, "float32", 0)):
        back = load(tmp_path / "int8", empty(devices, dtype))
        assert back.scale is None
        assert back.embeddings.dtype == dtype
        found, at = real(back)
        assert (np.abs(found - rows) <= bound + rounded * np.abs(rows)).all()
        assert (at == 5).all()
    # What was written as int8 in the first place is what is loaded as int8.
    for one, other in zip(real(filled(2, "int8")), real(same), strict=True):
        np.testing.assert_array_equal(one, other)


def test_anyone_with_safetensors_reads_the_rows(tmp_path):
    cache = filled(8)
    snapshot.save(tmp_path / "s", cache, step=5, made_by=MADE_BY)
    files = sorted((tmp_path / "s").glob("*.safetensors"))
    rows = np.concatenate([safetensors.numpy.load_file(file)["embeddings"] for file in files])
    np.testing.assert_array_equal(rows, real(cache)[0])


def test_the_saved_cache_can_still_be_donated_without_a_copy(tmp_path):
    cache = filled.__wrapped__(2)
    snapshot.save(tmp_path / "s", cache, step=5, made_by=MADE_BY)
    pointers = [shard.data.unsafe_buffer_pointer() for shard in cache.embeddings.addressable_shards]
    touched = jax.jit(lambda c: c.at[0, 0].set(1.0), donate_argnums=0)(cache.embeddings)
    assert [s.data.unsafe_buffer_pointer() for s in touched.addressable_shards] == pointers


@pytest.mark.parametrize("field", [*MADE_BY, "size", "dim"])
def test_each_field_of_the_manifest_is_refused_when_it_differs(tmp_path, field):
    snapshot.save(tmp_path / "s", filled(2), step=5, made_by=MADE_BY)
    like, made_by = empty(2), dict(MADE_BY)
    if field == "size":
        like = caches.create(N + 1, D, dtype="float32", block_rows=4, place=make_placement(2))
    elif field == "dim":
        like = caches.create(N, D + 1, dtype="float32", block_rows=4, place=make_placement(2))
    else:
        made_by[field] = "changed"
    with pytest.raises(UserError, match=f"made with {field} .* but this run has .*{REMEDY}"):
        load(tmp_path / "s", like, made_by)


def test_a_flipped_or_missing_byte_of_any_file_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "FILE_BYTES", 40 * (4 * D + 8))
    target = tmp_path / "s"
    reference = snapshot.save(target, filled(2), step=5, made_by=MADE_BY)
    rng = np.random.default_rng(0)
    for path in sorted(target.iterdir()):
        content = path.read_bytes()
        flips = rng.integers(0, 8 * len(content), 25)
        broken = [content[: len(content) // 2], b"", None]
        for flip in flips:
            changed = bytearray(content)
            changed[flip // 8] ^= 1 << flip % 8
            broken.append(bytes(changed))
        for wrong in broken:
            path.unlink() if wrong is None else path.write_bytes(wrong)
            with pytest.raises(DamagedError, match=path.name):
                load(target, empty(2), sha256=reference["sha256"])
            path.write_bytes(content)
    load(target, empty(2), sha256=reference["sha256"])


def rewrite(folder, change) -> None:
    """Changes the manifest as somebody would who wants it to be believed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].pop(),
        lambda m: m["files"][0].update(start=3),
        lambda m: m["files"][0].update(file="../s/" + m["files"][0]["file"]),
        lambda m: m["files"][0].pop("stop"),
        lambda m: m.pop("made_by"),
        lambda m: m.update(files=None),
        lambda m: m.update(files=[7]),
    ],
)
def test_a_manifest_that_contradicts_itself_is_damaged(tmp_path, change):
    snapshot.save(tmp_path / "s", filled(2), step=5, made_by=MADE_BY)
    rewrite(tmp_path / "s", change)
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        load(tmp_path / "s", empty(2))


def test_a_file_of_other_rows_than_the_manifest_says_is_damaged(tmp_path):
    target = tmp_path / "s"
    snapshot.save(target, filled(1), step=5, made_by=MADE_BY)
    short = safetensors.numpy.save({"embeddings": np.zeros((3, D), np.float32)})
    (target / "rows-000000000000.safetensors").write_bytes(short)
    digest = hashlib.sha256(short).hexdigest()
    rewrite(target, lambda m: m["files"][0].update(sha256=digest))
    with pytest.raises(DamagedError, match="holds other rows than its manifest says"):
        load(target, empty(1))


def test_another_format_is_named(tmp_path):
    snapshot.save(tmp_path / "s", filled(2), step=5, made_by=MADE_BY)
    rewrite(tmp_path / "s", lambda m: m.update(format=7))
    with pytest.raises(UserError, match="has format 7 and this version reads 1"):
        load(tmp_path / "s", empty(2))


def test_a_folder_cut_off_while_it_was_written_is_no_snapshot(tmp_path, monkeypatch):
    def fail(path, content):
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    monkeypatch.setattr(snapshot.paths, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        snapshot.save(tmp_path / "s", filled(2), step=5, made_by=MADE_BY)
    monkeypatch.undo()
    with pytest.raises(DamagedError, match=r"manifest\.json cannot be read"):
        load(tmp_path / "s", empty(2))
    snapshot.save(tmp_path / "s", filled(2), step=6, made_by=MADE_BY)
    load(tmp_path / "s", empty(2))


FORGED = {
    "stop": lambda m: m["files"][0].update(stop="x"),
    "step": lambda m: m.update(step=[1]),
    "bytes": lambda m: m["files"][0].update(bytes="many"),
    "sha256": lambda m: m["files"][0].update(sha256=7),
    "made_by": lambda m: m.update(made_by=None),
    "size": lambda m: (m.update(size=-1), m["files"][-1].update(stop=-1)),
    "dtype": lambda m: m.update(dtype=4),
    "no file has such a name": lambda m: m["files"][0].update(file="rows\0.safetensors"),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_manifest_of_other_kinds_of_values_is_damaged(tmp_path, change):
    snapshot.save(tmp_path / "s", filled(1), step=5, made_by=MADE_BY)
    rewrite(tmp_path / "s", change)
    for read in (lambda: load(tmp_path / "s", empty(1)), lambda: raised(tmp_path / "s")):
        with pytest.raises(DamagedError):
            read()


def raised(folder) -> None:
    """What `check` says of files, as an error."""
    for _, _, problem in snapshot.check(folder):
        if problem:
            raise DamagedError(problem)


def test_json_without_end_is_damaged(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DamagedError, match=r"manifest\.json is not JSON"):
        snapshot.read_manifest(tmp_path)


ROWS = np.zeros((N, D), np.float32)
AGES = np.zeros(N, np.int32)


@pytest.mark.parametrize(
    "content",
    [
        safetensors.numpy.save({"embeddings": ROWS}),
        safetensors.numpy.save({"embeddings": ROWS[:, :3], "written_at": AGES}),
        safetensors.numpy.save({"embeddings": ROWS, "written_at": AGES, "more": AGES}),
        safetensors.numpy.save({"embeddings": ROWS, "written_at": np.zeros((), np.int32)}),
        safetensors.numpy.save({"embeddings": ROWS.astype(np.float64), "written_at": AGES}),
        b"\xff" * 100,
    ],
)
def test_a_file_that_its_digest_fits_and_the_manifest_does_not_is_damaged(tmp_path, content):
    """As somebody would forge it, or another program write it."""
    snapshot.save(tmp_path / "s", filled(1), step=5, made_by=MADE_BY)
    (file,) = (tmp_path / "s").glob("rows-*")
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite(tmp_path / "s", lambda m: m["files"][0].update(sha256=digest))
    with pytest.raises(DamagedError, match=file.name):
        load(tmp_path / "s", empty(1))
