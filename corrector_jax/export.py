"""A run's encoders for everyone: the folder sentence-transformers loads, and its model card."""

from __future__ import annotations

from typing import Any

import jax
import tokenizers

from corrector_jax import config as configs
from corrector_jax import model_folder, paths
from corrector_jax.checkpoint import Position
from corrector_jax.evaluate import trained
from corrector_jax.job import Job
from corrector_jax.model_folder import Clothes
from corrector_jax.paths import AnyPath
from corrector_jax.report.words import json_of, made_by_a_run
from corrector_jax.types import PyTree, UserError
from corrector_jax.writer import say

FINAL = "final"
"""The folder of a run that holds its encoders."""

_UNFINISHED = ".unfinished"
"""In a folder that is being written: where that was killed, the same command writes it anew."""


def export_run(workdir: AnyPath, *, path: str = "") -> AnyPath:
    """Writes the encoders of a run's newest checkpoint.

    Args:
      workdir: the run's folder.
      path: where to; empty = `final` in the workdir, which is written anew.

    Returns:
      The folder.

    Raises:
      UserError: there is no run or no checkpoint, or the folder holds something else.
    """
    folder = paths.make(path) if path else workdir / FINAL
    mark = folder / _UNFINISHED
    if path and folder.exists():
        found = {entry.name for entry in folder.iterdir()}
        if mark.name in found:
            paths.remove(folder)
        elif found - {f".{mark.name}.tmp"}:  # the mark itself, half written
            raise UserError(f"config.export.path={path} holds files already: name an empty folder")
    job, state, position = trained(workdir)
    paths.write(mark, "")
    write_final(job, state.params, workdir, position, folder)
    paths.remove(mark)
    say(f"{job.model.dim} dimensions, at step {position.step:,}: {folder}")
    return folder


def write_final(
    job: Job, params: PyTree, workdir: AnyPath, position: Position, folder: AnyPath | None = None
) -> AnyPath:
    """Writes encoders as a sentence-transformers folder, or two and a Router where they differ.

    A reader goes below it, into `reader`.

    Args:
      job: the job.
      params: the encoders' parameters, and the reader's.
      workdir: the run's folder, whose evaluations go into the card.
      position: steps and ledger, for the card.
      folder: where to; None = `final` in the workdir.

    Returns:
      The folder.
    """
    folder = folder or workdir / FINAL
    params = jax.device_get(params)
    texts, origin = job.tokenization, job.origin
    lengths = {"query": texts.query_max_len, "target": texts.target_max_len}
    tokenizer = tokenizers.Tokenizer.from_str(origin.tokenizer_json)
    model_folder.write(
        folder,
        job.model.towers(params),
        encoder=job.model.encoder,
        clothes=Clothes(
            config=origin.config,
            names=origin.names,
            beside=origin.beside,
            tokenizer_json=origin.tokenizer_json,
            tokenizer_files=origin.tokenizer_files,
            pad_token=str(tokenizer.id_to_token(texts.tokenizer.pad_id)),
            query_prefix=texts.query_prefix,
            target_prefix=texts.target_prefix,
        ),
        max_len={**lengths, "shared": max(lengths.values())},
        card=card(job, params, workdir, position),
    )
    if job.questions:
        loaded = job.questions.loaded
        model_folder.write_reader(
            folder / "reader",
            params["reader"],
            config=loaded.reader.config,
            clothes=loaded.clothes,
            card=reader_card(job, position),
        )
    return folder


def card(job: Job, params: PyTree, workdir: AnyPath, position: Position) -> str:
    """The model card: what it is, data, metrics, cost, how to load, configuration.

    Args:
      job: the job.
      params: the encoders' parameters.
      workdir: the run's folder, with what it has of evaluations.
      position: steps and ledger.

    Returns:
      Markdown with the head that model hubs read.
    """
    encoder = job.model.encoder
    beta = float(job.method.beta * job.model.beta_ratio(params))
    towers = "one encoder" if job.model.shared else "an encoder each for queries and targets"
    steps = f"{encoder.pooling} pooling" + (", dense" if encoder.project else "")
    steps += ", normalised" if encoder.normalize else ""
    counts = ", ".join(f"{len(s.texts):,} {name}" for name, s in job.data.splits.items())
    lines = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "tags:",
        "- sentence-transformers",
        "- feature-extraction",
        "- corrector_jax",
        "---",
        "",
        f"# A retriever for {job.data.name}",
        "",
        f"Trained with corrector_jax, strategy `{job.config.strategy}`, for {position.step:,} "
        f"steps from {job.origin.source}: {towers}, {steps}, {job.model.dim} dimensions.",
        f"Scores are dot products; the softmax it was trained with had the inverse temperature "
        f"{beta:.4g}.",
        "",
        "## How to load it",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        'model = SentenceTransformer("PATH_OF_THIS_FOLDER")',
        'queries = model.encode_query(["a query"])',
        'targets = model.encode_document(["a text", "another"])',
        "scores = model.similarity(queries, targets)",
        "```",
        "",
        *_how_it_reads(job),
        "In corrector_jax: `--config.model.weights=PATH_OF_THIS_FOLDER"
        + ("`." if job.model.shared else "/query` or `/target`."),
        "",
        "## Data",
        "",
        f"{job.data.name}: {job.size:,} targets; queries: {counts}.",
        "",
        "## Metrics",
        "",
        *_metrics(job, workdir),
        "",
        "## Cost",
        "",
        f"Targets encoded up to step {position.step:,}:",
        "",
        *(f"* {name.replace('_', ' ')}: {count:,}" for name, count in position.ledger.items()),
        "",
        "## Configuration",
        "",
        "```json",
        configs.to_json(job.config).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def reader_card(job: Job, position: Position) -> str:
    """The card of a reader: what it is, and what it reads.

    Args:
      job: the job, with a reader.
      position: steps.

    Returns:
      Markdown with the head that model hubs read.
    """
    assert job.questions is not None  # whoever has none has no card
    keys, source = job.config.reader, job.questions.loaded.source
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text2text-generation",
            "tags:",
            "- t5",
            "- corrector_jax",
            "---",
            "",
            f"# A reader for {job.data.name}",
            "",
            f"Trained with corrector_jax for {position.step:,} steps from {source}, beside the "
            "retriever in the folder above. It reads the tokens of a question without special ones "
            f"({keys.query_prefix!r} before it, {keys.query_max_len} at most), then those of a "
            f"passage with them ({keys.passage_prefix!r}, {keys.passage_max_len}); of "
            f"{keys.passages} passages encoded one by one the decoder sees all (fusion in the "
            "decoder). transformers loads it as a T5ForConditionalGeneration, which reads one.",
            "",
        ]
    )


def _how_it_reads(job: Job) -> list[str]:
    """Prefixes and lengths, in words."""
    texts = job.tokenization
    lines = []
    if texts.query_prefix or texts.target_prefix:
        lines = [
            f"`encode_query` puts {texts.query_prefix!r} before a query and `encode_document` "
            f"{texts.target_prefix!r} before a target, as in training; `encode` puts nothing.",
        ]
    lengths = (
        f"Queries were cut at {texts.query_max_len} tokens and targets at {texts.target_max_len}"
    )
    if job.model.shared and texts.query_max_len != texts.target_max_len:
        longest = max(texts.query_max_len, texts.target_max_len)
        lengths += f"; loaded as above, both are cut at {longest} (`model.max_seq_length`)"
    return [*lines, f"{lengths}.", ""]


def _metrics(job: Job, workdir: AnyPath) -> list[str]:
    """A table of the evaluations the run has so far."""
    records: dict[str, dict[str, Any]] = {}
    for name in ("bm25", "pretrained", "before", "after"):
        path = workdir / "eval" / f"{name}.json"
        if path.exists():
            with made_by_a_run(path):
                records[name] = {k: float(v) for k, v in json_of(path)["metrics"].items()}
    if not records:
        return ["Not evaluated yet."]
    names = dict.fromkeys(name for record in records.values() for name in record)
    shown = {"bm25": "BM25", "pretrained": "all layers, untouched"}
    return [
        f"On the split {job.final_split}, all {job.size:,} targets ranked:",
        "",
        f"| | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
        *(
            f"| {shown.get(when, f'{when} training')} | "
            + " | ".join(f"{record[name]:.4f}" if name in record else "" for name in names)
            + " |"
            for when, record in records.items()
        ),
    ]
