"""A corpus as embeddings on disk, for another search engine: `--mode=embed`.

    00000.npy       [rows, D] float32, one row a target
    00000.ids.txt   their ids, one a line, in the same order
    00000.json      what made them, of which texts, and the sha256 of both files: written last
    manifest.json   all shards and the encoder, once every shard is there

A shard is done when its json is there, so that a killed process loses the one it was at. Each shard
is made by one process alone: several may share the work and know nothing of each other.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

import numpy as np

from corrector_jax import paths
from corrector_jax.checkpoint import Position
from corrector_jax.data import sources
from corrector_jax.embed import embed_table
from corrector_jax.evaluate import trained
from corrector_jax.job import Job
from corrector_jax.paths import AnyPath
from corrector_jax.types import PyTree, UserError
from corrector_jax.writer import say

Texts = list[tuple[str, str]]
"""(id, text) of some targets."""


def embed_run(
    workdir: AnyPath, *, path: str, output: str, shard_rows: int, part: int, parts: int
) -> AnyPath:
    """Embeds a corpus with a run's newest checkpoint; goes on where it was cut off.

    Args:
      workdir: the run's folder.
      path: a corpus.jsonl or a folder that holds one; empty = the run's own targets.
      output: where to; empty = embeddings/NAME in the workdir, after the corpus.
      shard_rows: targets of a shard.
      part: of `parts`: this process makes shards part, part + parts, ...
      parts: how many processes share the work.

    Returns:
      The folder.

    Raises:
      UserError: there is no run or no corpus, an argument is impossible, or the folder holds the
        embeddings of something else.
    """
    if shard_rows < 1 or not 0 <= part < parts:
        raise UserError(
            f"config.embed.part is {part} of {parts} parts, with {shard_rows} rows a shard: write "
            "a part from 0 to parts - 1, and 1 row or more"
        )
    job, state, position = trained(workdir)
    source: Iterable[tuple[str, str]]
    if path:
        name = PurePath(path).name.split(".")[0]
        source = sources.targets(path, target_template=job.config.data.target_template)
    else:
        name = job.data.name
        source = zip(job.data.target_ids, job.data.target_texts, strict=True)
    folder = paths.make(output) if output else workdir / "embeddings" / name
    encoder = describe(job, state.params, workdir, position)
    records: list[dict[str, Any] | None] = []
    digests: list[str] = []
    for number, texts in enumerate(_shards(source, shard_rows)):
        record = done(folder, number, encoder, _digest(texts))
        if record is None and number % parts == part:
            record = _make(job, state.params, folder, number, encoder, texts)
        digests.append(_digest(texts))
        records.append(record)
    # Other parts went on meanwhile: whoever makes the last shard sees all of them here.
    for number, record in enumerate(records):
        records[number] = record or done(folder, number, encoder, digests[number])
    missing = records.count(None)
    if missing:
        say(f"{missing} of {len(records)} shards are left to the other parts: {folder}")
        return folder
    # Written by whoever is last; two at once write the same.
    rows = sum(record["rows"] for record in records if record)
    manifest = {
        "encoder": encoder,
        "rows": rows,
        "dim": job.model.dim,
        "dtype": "float32",
        "shards": [
            {k: v for k, v in record.items() if k != "encoder"} for record in records if record
        ],
    }
    text = json.dumps(manifest, indent=2) + "\n"
    paths.write(folder / "manifest.json", text, together=True)
    say(f"{rows:,} embeddings of {job.model.dim} dimensions: {folder}")
    return folder


def describe(job: Job, params: PyTree, workdir: AnyPath, position: Position) -> dict[str, Any]:
    """The fields that name the encoder: equal fields mean equal embeddings of equal texts.

    Args:
      job: the job.
      params: the encoders' parameters.
      workdir: the run's folder.
      position: which checkpoint.

    Returns:
      A JSON-able dict.
    """
    made_by = {field: value for field, value in job.made_by.items() if field != "corpus"}
    return {
        "run": workdir.name,
        "step": position.step,
        "source": job.origin.source,
        "weights": job.weights_digest(params),
        **made_by,
    }


def _shards(source: Iterable[tuple[str, str]], rows: int) -> Iterator[Texts]:
    source = iter(source)
    while texts := list(itertools.islice(source, rows)):
        yield texts


def done(
    folder: AnyPath, number: int, encoder: dict[str, Any], digest: str
) -> dict[str, Any] | None:
    """The record of a shard that is there; None where it is still to be made.

    Args:
      folder: of the embeddings.
      number: of the shard.
      encoder: of `describe`, which the record must name.
      digest: of the shard's ids and texts, likewise.

    Raises:
      UserError: it is of something else, or is no record that was written. The files it names are
        not looked into.
    """
    path = folder / f"{number:05d}.json"
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = paths.read_json(path)
        rows, files = record["rows"], record["sha256"]
        if type(rows) is not int or rows < 0 or not isinstance(files, dict):
            raise TypeError("rows")
        made_by, of = record["encoder"], record["texts_sha256"]
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be read ({reason}): make it readable") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not what was written ({type(error).__name__}): remove it, and its shard is "
            "made again"
        ) from error
    if made_by != encoder or of != digest:
        what = "encoder" if made_by != encoder else "corpus or another shard_rows"
        raise UserError(
            f"{folder} holds the embeddings of another {what}: name another folder with "
            "--config.embed.output"
        )
    return record


def _make(
    job: Job,
    params: PyTree,
    folder: AnyPath,
    number: int,
    encoder: dict[str, Any],
    texts: Texts,
) -> dict[str, Any]:
    """Embeds one shard and writes its three files, the record last."""
    started = time.monotonic()
    rows = embed_table(
        job.model,
        params,
        job.tokenization.targets([text for _, text in texts]),
        pad_id=job.tokenization.tokenizer.pad_id,
        block=job.config.eval.batch_size,
        place=job.place,
    )
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    name = f"{number:05d}"
    files = {
        f"{name}.npy": buffer.getvalue(),
        f"{name}.ids.txt": "".join(f"{identifier}\n" for identifier, _ in texts).encode(),
    }
    for file, content in files.items():
        paths.write(folder / file, content)
    record = {
        "shard": number,
        "rows": len(texts),
        "sha256": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
        "texts_sha256": _digest(texts),
        "encoder": encoder,
    }
    paths.write(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")
    rate = len(texts) / (time.monotonic() - started)
    say(f"shard {name}: {len(texts):,} embeddings, {rate:,.0f} a second")
    return record


def _digest(texts: Texts) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
