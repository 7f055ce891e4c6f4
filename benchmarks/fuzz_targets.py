"""What is read from disk: for each, how the valid files are made and how they are read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from corrector_jax import cache as caches
from corrector_jax import config as configs
from corrector_jax import index, model_folder, reading, snapshot, vectors, weights
from corrector_jax.cache import TargetCache
from corrector_jax.checkpoint import Checkpoints, Position
from corrector_jax.compare import compare
from corrector_jax.data import mined, prepared, published, sources, token_table
from corrector_jax.data.dataset import RetrievalData, Split
from corrector_jax.data.tokenize import TextTokenizer
from corrector_jax.evaluate import saved_config
from corrector_jax.job import load_encoder
from corrector_jax.lock import Lock
from corrector_jax.models.bert import BertConfig
from corrector_jax.models.dual_encoder import DualEncoder, Encoder, Projection
from corrector_jax.models.modernbert import ModernBertConfig
from corrector_jax.models.reader import Reader, ReaderConfig
from corrector_jax.models.t5 import T5Config
from corrector_jax.ranking import METRICS, Ranking, read_trec, write_trec
from corrector_jax.report import page, staleness
from corrector_jax.sharding import make_placement
from tests import published_files, tiny
from tests.data import written
from tests.report import made_up


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that is read from disk.

    Attributes:
      name: a word.
      write: puts valid files into an empty folder.
      read: reads them; a UserError or a DamagedError refuses them.
      share: of all cases, relative to the others.
      forge: makes digests fit what is there, as somebody would who means harm.
      gate: whether files that are not the valid ones were taken though none may be.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    share: int = 10
    forge: Callable[[Path], object] | None = None
    gate: Callable[[Path, dict[str, bytes]], bool] | None = None


# A run's config.json.


def _write_config(folder: Path) -> None:
    (folder / "config.json").write_text(configs.to_json(configs.default()))


# Snapshots of the cache and checkpoints.

_N, _D = 23, 4
_MADE_BY = {"pooling": "mean", "corpus": "cc"}


def _empty(dtype: str) -> TargetCache:
    return caches.create(_N, _D, dtype=dtype, block_rows=4, place=make_placement(1))


@functools.cache
def _like(dtype: str) -> TargetCache:
    return _empty(dtype)


def _filled(dtype: str) -> TargetCache:
    rows = np.random.default_rng(0).normal(size=(_N, _D)).astype(np.float32)
    ids = np.arange(_N, dtype=np.int32)
    return caches.write(_empty(dtype), ids, rows, 5, make_placement(1))


def _write_snapshot(folder: Path) -> None:
    with mock.patch.object(snapshot, "FILE_BYTES", 7 * (_D + 8)):
        snapshot.save(folder, _filled("int8"), step=5, made_by=_MADE_BY)


def _read_snapshot(folder: Path) -> None:
    problems = [problem for _, _, problem in snapshot.check(folder)]
    snapshot.load(folder, _like("float32"), made_by=_MADE_BY, remedy="write another --workdir")
    if any(problems):
        raise AssertionError("a file that is not what was saved was loaded")


def _forge_snapshot(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        entry["sha256"] = hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _state() -> Any:
    place = make_placement(1)
    return {
        "params": place.put_everywhere(np.arange(24, dtype=np.float32).reshape(6, 4)),
        "step": place.put_everywhere(np.int32(6)),
    }


def _write_checkpoint(folder: Path) -> None:
    with Checkpoints.writable(folder) as checkpoints:
        position = Position(step=6, data="data", metrics=10, log={"a": 1.0}, dev={"3": 0.5})
        position.cache = checkpoints.save_cache(_filled("float32"), step=6, made_by=_MADE_BY)
        checkpoints.save(_state(), position)


def _read_checkpoint(folder: Path) -> None:
    with Checkpoints.readable(folder) as checkpoints:
        for step in checkpoints.steps():
            with contextlib.suppress(snapshot.DamagedError):
                list(checkpoints.check(step))
        found, _, _ = checkpoints.resume(
            _state(), _like("float32"), data="data", made_by=_MADE_BY, say=lambda text: None
        )
    if not all(jax.tree.leaves(jax.tree.map(np.array_equal, found, _state()))):
        raise AssertionError("another state than was saved was taken")


def _forge_checkpoint(folder: Path) -> None:
    (file,) = folder.glob("checkpoints/*/position/metadata")
    content = json.loads(file.read_text())
    content.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(content | {"sha256": digest}))


# The index: no byte that ScaNN reads may be another than was written.

_ROWS = 400
_MADE = index.Parameters(leaves=8, searched=4, reorder=40)


@functools.cache
def _index() -> index.Index:
    rows = np.random.default_rng(0).normal(size=(_ROWS, 16)).astype(np.float32)
    return index.build(np.arange(_ROWS, dtype=np.int32), rows, k=10, made=_MADE)


def _read_index(folder: Path) -> None:
    found = index.load(folder, np.arange(_ROWS, dtype=np.int32), cache="aa", made=_MADE)
    found.search(np.ones((2, 16), np.float32), 5)


def _other_index(folder: Path, valid: dict[str, bytes]) -> bool:
    there = {path.name: path for path in folder.iterdir()}
    return there.keys() != valid.keys() or any(
        path.read_bytes() != valid[name] for name, path in there.items() if name != "index.json"
    )


# Published models.

_FAMILIES = {
    "bert": BertConfig(
        vocab_size=120, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=12,
        max_positions=80,
    ),
    "modernbert": ModernBertConfig(
        vocab_size=120, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12,
        max_positions=80, local=(True, False), pad_id=0,
    ),
    "t5": T5Config(
        vocab_size=120, hidden_size=8, num_layers=1, num_heads=2, head_size=4, intermediate_size=12,
    ),
}  # fmt: skip


def _clothes(folder: Path, kind: str) -> model_folder.Clothes:
    place = tiny.write_tokenizer(folder.parent / "tokenizer")
    text = (place / "tokenizer.json").read_text()
    (place / "tokenizer.json").unlink()
    place.rmdir()
    return model_folder.Clothes({"model_type": kind}, frozenset(), {}, text, {}, "[PAD]", "q: ")


def _write_encoder(folder: Path, family: str) -> None:
    encoder = Encoder(config=_FAMILIES[family], project=Projection(6, True, "tanh"))
    dual = DualEncoder(encoder)
    shapes = jax.eval_shape(dual.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    model_folder.write(
        folder, dual.towers(params), encoder=encoder, clothes=_clothes(folder, family),
        max_len={"shared": 12}, card="# A card\n",
    )  # fmt: skip


def _write_shards(folder: Path) -> None:
    """The same in two files and their index."""
    import safetensors.numpy

    _write_encoder(folder, "bert")
    tensors = sorted(safetensors.numpy.load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    names = {}
    for number, part in enumerate((tensors[:5], tensors[5:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        safetensors.numpy.save_file(dict(part), folder / file)
        names |= {name: file for name, _ in part}
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _read_encoder(folder: Path) -> None:
    config = configs.default()
    config.model.weights = str(folder)
    config.data.query_max_len = config.data.target_max_len = 0
    tokenization, encoder, _, origin = load_encoder(config)
    tokenization.targets(["ba be", ""])
    weights.find_tokenizer(str(folder))
    reading_back = origin.config | encoder.config.write()
    json.dumps(reading_back)


def _write_reader(folder: Path) -> None:
    sizes = ReaderConfig(_FAMILIES["t5"], decoder_layers=1, tied=True, start_id=0, end_id=3)
    shapes = jax.eval_shape(Reader(sizes).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    model_folder.write_reader(
        folder, params, config=sizes, clothes=_clothes(folder, "t5"), card="# A card\n"
    )


def _read_reader(folder: Path) -> None:
    config = configs.default()
    config.reader.weights = str(folder)
    reading.load_reader(config, "")


# Data in every layout.


def _layout(name: str, packed: str = "", share: int = 10) -> Target:
    def write(folder: Path) -> None:
        folder.rmdir()
        written.ALL[name](folder)
        if packed:
            written.compress(folder, packed)

    def read(folder: Path) -> None:
        _all_of(sources.load(str(folder), cache_dir=str(folder.parent / "cache")))

    return Target(f"data/{name}{packed}", write, read, share)


def _skipping(name: str) -> Target:
    """The same with bad rows skipped, and the corpus as --mode=embed reads it."""
    target = _layout(name)

    def read(folder: Path) -> None:
        cache = str(folder.parent / "cache")
        _all_of(sources.load(str(folder), cache_dir=cache, max_bad_rows=1000, max_targets=9))
        list(sources.targets(str(folder), target_template="{text}"))

    return Target(f"data/{name}, skipping", target.write, read)


def _all_of(data: RetrievalData) -> None:
    """Looks at every text, judgement and answer."""
    data.fingerprint()
    names, texts = list(data.target_ids), list(data.target_texts)
    if len(names) != len(texts):
        raise AssertionError("ids and texts differ in number")
    for name, split in data.splits.items():
        data.known_positives(name)
        for rows in (*split.positives, *split.negatives):
            [texts[row] for row in rows]
            if (rows < 0).any():
                raise AssertionError("a row is negative")
        list(zip(split.query_ids, split.texts, split.positives, split.grades, strict=True))
        list(split.answers)


def _write_prepared(folder: Path) -> None:
    place = written.ALL["fid"](folder.parent / "source")
    sources.load(str(place), cache_dir=str(folder))


def _read_prepared(folder: Path) -> None:
    _all_of(sources.load(str(folder.parent / "source"), cache_dir=str(folder)))


def _write_unfinished(folder: Path) -> None:
    """What a process leaves that was killed behind its corpus."""
    place = written.ALL["beir"](folder.parent / "source")
    with (
        mock.patch.object(prepared, "_write_split", side_effect=KeyboardInterrupt),
        contextlib.suppress(KeyboardInterrupt),
    ):
        sources.load(str(place), cache_dir=str(folder))


_TEXTS = [" ".join(tiny.WORDS[i : i + 1 + i % 7]) for i in range(40)]


@functools.cache
def _tokenizer(folder: Path) -> TextTokenizer:
    place = tiny.write_tokenizer(folder / "tokenizer")
    return TextTokenizer((place / "tokenizer.json").read_bytes())


def _read_tokens(folder: Path) -> None:
    table = token_table.token_table(
        _TEXTS, _tokenizer(folder.parent), name="tiny", content_fingerprint="cc",
        template="{text}", prefix="", max_len=6, folder=folder,
    )  # fmt: skip
    if table.ids.shape != (40, 6) or table.lengths.shape != (40,):
        raise AssertionError("another table was taken")
    if not ((table.lengths >= 0) & (table.lengths <= 6)).all() or table.ids.dtype != np.uint16:
        raise AssertionError("another kind of table was taken")


def _write_tfds(folder: Path) -> None:
    from corrector_jax.data import builders

    published_files.write("msmarco", folder)
    builders.prepare("msmarco", folder, verify=False)
    for path in (folder / "published").rglob("*.gz"):
        path.unlink()


def _read_tfds(folder: Path) -> None:
    place = published.folder_of("msmarco", str(folder))
    _all_of(sources.load(place, layout="tfds", cache_dir=str(folder.parent / "cache")))


def _archive(name: str) -> Target:
    corpus = published.CORPORA[name]

    def write(folder: Path) -> None:
        published_files.write(name, folder)

    def read(folder: Path) -> None:
        def nothing(url: str) -> Path:
            raise OSError("no network")

        with mock.patch("urllib.request.urlopen", side_effect=OSError("no network")):
            published.fetch(corpus.files, folder / "published" / name, nothing, verify=False)

    return Target(f"archive/{name}", write, read, 3)


# Rankings.

_SPLIT = Split(
    query_ids=[f"q{i}" for i in range(6)],
    texts=["text"] * 6,
    positives=[np.array([i], np.int32) for i in range(6)],
    grades=[np.array([1], np.int32)] * 6,
    negatives=(),
    answers=(),
)
_IDS = [f"t{i}" for i in range(30)]


def _write_trec(folder: Path) -> None:
    rows = np.random.default_rng(0).permuted(np.tile(np.arange(30, dtype=np.int32), (6, 1)), axis=1)
    scores = np.linspace(3, 1, 10, dtype=np.float32)
    ranking = Ranking(rows[:, :10], np.tile(scores, (6, 1)))
    write_trec(folder / "run.trec", _SPLIT, ranking, _IDS, "tag")


def _read_trec(folder: Path) -> None:
    found = read_trec(folder / "run.trec", _SPLIT, _IDS)
    if not np.isfinite(found.scores).all() or (found.rows >= len(_IDS)).any():
        raise AssertionError("a score is not finite, or a row is not there")


def _write_mined(folder: Path) -> None:
    lines = [{"query_id": f"q{i}", "negatives": [f"t{i + k}" for k in range(5)]} for i in range(6)]
    (folder / "mined.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# What a finished run leaves, as reports, comparisons and exports read it.


def _write_run(folder: Path) -> None:
    made_up.write(folder, made_up.files())
    rng = np.random.default_rng(0)
    after = {"metrics": dict.fromkeys(METRICS, 0.5), "queries": 6, "distribution": None}
    after["per_query"] = {name: rng.uniform(size=6).tolist() for name in METRICS}
    (folder / "eval").mkdir()
    (folder / "eval" / "after.json").write_text(json.dumps(after))
    (folder / "runs").mkdir()
    _write_trec(folder)
    (folder / "run.trec").rename(folder / "runs" / "after.trec")
    profile = {"steps": [5, 7], "seconds_per_step": {"encode": 0.1, "sweep": 0.2}}
    (folder / "profile.json").write_text(json.dumps(profile))


def _read_report(folder: Path) -> None:
    with mock.patch.object(page, "figure", return_value=""):
        page.write_report(folder)


def _read_compared(folder: Path) -> None:
    other = folder.parent / "cache" / "other"
    other.mkdir(parents=True)
    _write_run(other)
    with mock.patch("corrector_jax.report.comparison._figure", return_value=""):
        compare([folder, other], folder.parent / "cache" / "compare.html")


def _write_drift(folder: Path) -> None:
    import safetensors.numpy

    (folder / "drift").mkdir()
    for step in (0, 5):
        rows = np.random.default_rng(step).normal(size=(3, 8, 4)).astype(np.float32)
        named = dict(zip(("stale", "corrected", "fresh"), rows, strict=True))
        safetensors.numpy.save_file(named, folder / "drift" / f"{step}.safetensors")


def _read_drift(folder: Path) -> None:
    if samples := staleness.chosen(staleness.read_samples(folder)):
        staleness.projection(samples)


def _write_lock(folder: Path) -> None:
    record = {"host": "one", "pid": 12, "token": "ab", "beats": 3}
    (folder / "lock").write_text(json.dumps(record) + "\n")


def _write_vectors(folder: Path) -> None:
    files = {"00000.npy": "aa", "00000.ids.txt": "bb"}
    record = {"shard": 0, "rows": 3, "sha256": files, "texts_sha256": "cc", "encoder": {"run": "r"}}
    (folder / "00000.json").write_text(json.dumps(record))


def _read_vectors(folder: Path) -> None:
    record = vectors.done(folder, 0, {"run": "r"}, "cc")
    if record is not None and not isinstance(record["rows"], int):
        raise AssertionError("a record without rows was taken")


TARGETS = {
    target.name: target
    for target in (
        Target("config.json", _write_config, saved_config, 15),
        Target("snapshot", _write_snapshot, _read_snapshot, 15, _forge_snapshot),
        Target("checkpoint", _write_checkpoint, _read_checkpoint, 6, _forge_checkpoint),
        Target("index", lambda f: _index().save(f, cache="aa"), _read_index, 10, gate=_other_index),
        Target("weights/bert", functools.partial(_write_encoder, family="bert"), _read_encoder, 15),
        Target(
            "weights/modernbert",
            functools.partial(_write_encoder, family="modernbert"),
            _read_encoder,
        ),
        Target("weights/t5", functools.partial(_write_encoder, family="t5"), _read_encoder),
        Target("weights/shards", _write_shards, _read_encoder),
        Target("weights/reader", _write_reader, _read_reader),
        *map(_layout, written.ALL),
        *(_layout(name, ".gz", 4) for name in ("beir", "columns_csv", "dpr", "msmarco")),
        *(_layout(name, ".zst", 4) for name in ("fid", "tevatron")),
        *map(_skipping, ("beir", "msmarco", "dpr_with_corpus", "text_files")),
        Target("data/tfds", _write_tfds, _read_tfds, 4),
        Target("data/prepared", _write_prepared, _read_prepared, 15),
        Target("data/unfinished", _write_unfinished, _read_prepared, 6),
        _archive("msmarco"),
        _archive("hotpotqa"),
        Target("tokens", _read_tokens, _read_tokens),
        Target("trec", _write_trec, _read_trec),
        Target("mined", _write_mined, lambda f: mined.read(f / "mined.jsonl", _SPLIT, _IDS)),
        Target("report", _write_run, _read_report, 15),
        Target("compare", _write_run, _read_compared, 6),
        Target("drift", _write_drift, _read_drift),
        Target("lock", _write_lock, lambda f: Lock(f).holder(), 4),
        Target("vectors", _write_vectors, _read_vectors, 4),
    )
}
"""Name -> what is read; every reader of the package is behind one of them."""
