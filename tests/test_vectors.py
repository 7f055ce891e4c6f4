"""--mode=embed and --mode=export on a finished run."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax import config as configs
from corrector_jax import export, paths, vectors
from corrector_jax.checkpoint import Checkpoints, Position
from corrector_jax.evaluate import trained
from corrector_jax.job import make_job
from corrector_jax.types import UserError
from tests import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with one checkpoint, of two towers whose beta is learned."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny.config(
        folder,
        strategy="in_batch",
        mesh__devices=1,
        model__shared_towers=False,
        model__learn_beta=True,
        model__projection=6,
        data__target_prefix="ba ",
    )
    job = make_job(config)
    state = job.init_state()
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), state.params
    )
    params["beta"] = jnp.float32(0.002)
    position = Position(step=4, data=job.fingerprint)
    with Checkpoints.writable(folder / "workdir") as checkpoints:
        paths.write(folder / "workdir" / "config.json", configs.to_json(config))
        checkpoints.save(dataclasses.replace(state, params=params), position)
    export.write_final(job, params, folder / "workdir", position)
    return folder / "workdir"


@pytest.fixture(scope="module")
def wanted(run):
    """[N, D] of the run's targets, by its own encoder, all at once."""
    job, state, _ = trained(run)
    tokens = job.tokenization.targets(job.data.target_texts)
    return job, np.asarray(jax.jit(job.model.encode_targets)(state.params, tokens))


def embed(run, output, **changes):
    arguments = {"path": "", "shard_rows": 20, "part": 0, "parts": 1, **changes}
    return vectors.embed_run(run, output=str(output), **arguments)


def read(folder) -> tuple[list[str], np.ndarray, dict]:
    manifest = json.loads((folder / "manifest.json").read_text())
    ids, rows = [], []
    for shard in manifest["shards"]:
        for file, digest in shard["sha256"].items():
            assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
        name = f"{shard['shard']:05d}"
        ids += (folder / f"{name}.ids.txt").read_text().split()
        rows.append(np.load(folder / f"{name}.npy", allow_pickle=False))
    return ids, np.concatenate(rows), manifest


def test_a_runs_own_targets(run, wanted):
    folder = vectors.embed_run(run, path="", output="", shard_rows=20, part=0, parts=1)
    job, rows = wanted
    ids, found, manifest = read(folder)
    assert folder == run / "embeddings" / job.data.name
    assert ids == list(job.data.target_ids)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rows, atol=1e-5)
    assert [shard["rows"] for shard in manifest["shards"]] == [20, 20, 20, 7]
    assert (manifest["rows"], manifest["dim"]) == (67, 6)
    assert manifest["encoder"]["step"] == 4
    assert manifest["encoder"]["prefix"] == "ba "


@pytest.mark.parametrize("name", ["", "corpus.jsonl"])
def test_a_corpus_file_or_its_folder(run, wanted, tmp_path, name):
    job, rows = wanted
    data = run.parent / "data" / name
    ids, found, _ = read(embed(run, tmp_path, path=str(data)))
    assert ids == list(job.data.target_ids)
    np.testing.assert_allclose(found, rows, atol=1e-5)


def test_a_killed_process_loses_one_shard_at_most(run, tmp_path, monkeypatch):
    whole = read(embed(run, tmp_path / "whole"))
    made = []
    original = vectors._make

    def make(job, params, folder, number, *rest):
        if number == 2 and not made.count(2):
            made.append(2)
            (folder / "00002.npy").write_bytes(b"half a file")
            raise KeyboardInterrupt
        made.append(number)
        return original(job, params, folder, number, *rest)

    monkeypatch.setattr(vectors, "_make", make)
    with pytest.raises(KeyboardInterrupt):
        embed(run, tmp_path / "cut")
    assert not (tmp_path / "cut" / "manifest.json").exists()
    again = read(embed(run, tmp_path / "cut"))
    assert made == [0, 1, 2, 2, 3]  # the first two were not made again
    np.testing.assert_array_equal(again[1], whole[1])
    assert again[2] == whole[2]


def test_several_processes_share_the_work(run, wanted, tmp_path):
    embed(run, tmp_path, part=1, parts=2)
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["00001.npy", "00003.npy"]
    assert not (tmp_path / "manifest.json").exists()
    embed(run, tmp_path, part=0, parts=2)
    ids, found, _ = read(tmp_path)
    assert ids == list(wanted[0].data.target_ids)
    np.testing.assert_allclose(found, wanted[1], atol=1e-5)


def test_the_last_of_several_at_once_writes_the_manifest(run, wanted, tmp_path, monkeypatch):
    original = vectors._make

    def make(job, params, folder, number, *rest):
        if number == 2:  # the first part looked for shard 1 before the other made it
            embed(run, tmp_path, part=1, parts=2)
            assert not (tmp_path / "manifest.json").exists()
        return original(job, params, folder, number, *rest)

    monkeypatch.setattr(vectors, "_make", make)
    embed(run, tmp_path, part=0, parts=2)
    assert read(tmp_path)[0] == list(wanted[0].data.target_ids)


def test_other_embeddings_are_not_overwritten(run, tmp_path):
    embed(run, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="another corpus or another shard_rows"):
        embed(run, tmp_path, shard_rows=21)
    record = json.loads((tmp_path / "00000.json").read_text())
    record["encoder"]["step"] = 3
    (tmp_path / "00000.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"another encoder: name .*config\.embed\.output"):
        embed(run, tmp_path)
    (tmp_path / "00000.json").write_bytes(before[tmp_path / "00000.json"])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_cannot_be_is_refused(run, tmp_path):
    for changes in ({"part": 2, "parts": 2}, {"parts": 0}, {"shard_rows": 0}, {"part": -1}):
        with pytest.raises(UserError, match="write a part from 0"):
            embed(run, tmp_path, **changes)
    with pytest.raises(UserError, match=r"nothing\.jsonl.* is not a folder or a file"):
        embed(run, tmp_path, path=str(tmp_path / "nothing.jsonl"))


def test_export_writes_what_training_left(run, tmp_path):
    folder = export.export_run(run, path=str(tmp_path / "out"))
    left, right = (
        {path.relative_to(top): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        for top in (run / "final", folder)
    )
    assert left == right
    with pytest.raises(UserError, match="holds files already"):
        export.export_run(run, path=str(tmp_path / "out"))
    assert export.export_run(run) == run / "final"


def test_an_export_that_was_killed_is_written_anew(run, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def killed(*arguments: object) -> None:
        (out / "half").write_text("of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_final", killed)
        with pytest.raises(KeyboardInterrupt):
            export.export_run(run, path=str(out))
    export.export_run(run, path=str(out))
    names = [{path.name for path in top.iterdir()} for top in (run / "final", out)]
    assert names[0] == names[1]  # nothing of the one that was killed, and no mark


def test_the_card_says_what_it_is(run):
    card = (run / "final" / "README.md").read_text()
    for words in (
        "library_name: sentence-transformers",
        "for 4 steps from random weights: an encoder each",
        "inverse temperature 24.43",
        'SentenceTransformer("PATH_OF_THIS_FOLDER")',
        "67 targets; queries: 40 train, 12 dev, 12 test",
        "`encode_document` 'ba ' before a target",
        "Not evaluated yet.",
        '"strategy": "in_batch"',
    ):
        assert words in card, words


def test_a_learned_beta_scales_queries_alone(run):
    job, state, _ = trained(run)
    queries = jax.jit(job.model.encode_queries)(state.params, job.query_tokens["dev"])
    targets = jax.jit(job.model.encode_targets)(state.params, job.query_tokens["dev"])
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), np.exp(0.2), rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(targets, axis=1), 1, rtol=1e-4)


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", "{}", '{"rows": "3"}'])
def test_a_record_that_nobody_wrote_is_named(tmp_path, content):
    (tmp_path / "00002.json").write_text(content)
    with pytest.raises(UserError, match=r"00002\.json is not what was written .*: remove it"):
        vectors.done(tmp_path, 2, {"run": "r"}, "digest")
    assert vectors.done(tmp_path, 3, {"run": "r"}, "digest") is None
