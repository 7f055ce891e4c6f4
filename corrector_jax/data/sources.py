"""Reads whichever data source the configuration names."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corrector_jax import paths
from corrector_jax.data import code_search, prepared
from corrector_jax.data.dataset import RetrievalData, hold_out, render_target, subset
from corrector_jax.data.layouts import inline
from corrector_jax.data.layouts.beir import Beir, read_corpus
from corrector_jax.data.layouts.msmarco import MsMarco
from corrector_jax.data.layouts.text_files import TextFiles
from corrector_jax.data.layouts.tfds import Tfds
from corrector_jax.data.rows import Reader, Rows, find
from corrector_jax.paths import AnyPath
from corrector_jax.types import UserError, shown
from corrector_jax.writer import say

LAYOUTS: dict[str, type[Any]] = {
    layout.layout: layout for layout in (Beir, MsMarco, *inline.ALL, TextFiles, Tfds)
}
"""Word of config.data.layout -> what reads it."""


def load(
    path: str,
    *,
    layout: str = "",
    target_template: str = "{title} {text}",
    holdout: float = 0.0,
    max_targets: int = 0,
    max_queries: int = 0,
    cache_dir: str = "",
    max_bad_rows: int = 0,
) -> RetrievalData:
    """Reads a data source, and cuts it to size where asked.

    Args:
      path: a folder or file in one of the layouts; '' for the embedded code search data.
      layout: one of `LAYOUTS`, '' to look which one it is.
      target_template: how a target's text is made of its `{title}` and `{text}`.
      holdout: share of the train queries that become dev where there is neither dev nor test.
      max_targets: keep that many targets, 0 for all; see `subset`.
      max_queries: keep that many queries of dev and of test each, 0 for all.
      cache_dir: see `cache_folder`.
      max_bad_rows: how many bad rows are skipped; one more is an error.

    Raises:
      UserError: something is wrong with the source or the template, or the cut leaves nothing.
    """
    _check_template(target_template)
    if path:
        place = _resolve(path)
        data = prepared.prepare(
            find_reader(place, layout),
            name=place.name.split(".")[0] if place.is_file() else place.name,
            target_template=target_template,
            folder=cache_folder(cache_dir) / "data",
            max_bad_rows=max_bad_rows,
        )
    else:
        data = code_search.build(target_template=target_template)
    without = data
    if (data := hold_out(without, holdout)) is not without:
        held, of = len(data.splits["dev"].texts), len(without.splits["train"].texts)
        say(f"{held:,} of {of:,} train queries are held out as dev (config.data.holdout)")
    return subset(data, max_targets=max_targets, max_queries=max_queries)


def targets(path: str, *, target_template: str) -> Iterator[tuple[str, str]]:
    """(id, text) of every target of a corpus, read as it is asked for; no queries are needed.

    Args:
      path: a corpus.jsonl, a folder that holds one, or a source in one of the layouts.
      target_template: how a target's text is made of its `{title}` and `{text}`.

    Raises:
      UserError: it is not there, holds no target, or a row is malformed, empty or there twice;
        the message names file and line.
    """
    place, rows = _resolve(path), Rows()
    corpus = place if place.is_file() else find(place, "corpus.jsonl")
    fits = not place.is_file() and len(_layouts(place)) == 1
    found = (
        find_reader(place).targets(rows) if corpus is None or fits else read_corpus(corpus, rows)
    )
    seen, size = prepared.Index(), 0
    while shard := list(itertools.islice(found, prepared.SHARD)):
        keys = [prepared.key_of(target.id) for target in shard]
        before = seen.find(np.array(keys, np.uint64)) >= 0
        here: set[int] = set()
        for target, key, held in zip(shard, keys, before.tolist(), strict=True):
            if held or key in here:
                name = shown(target.id)
                raise UserError(
                    f"{target.where}: the id {name} occurred before: write each id once."
                )
            here.add(key)
            text = render_target(target_template, title=target.title, text=target.text)
            if not text:
                raise UserError(
                    f"{target.where}: the target has no text: write one, or drop the row."
                )
            yield target.id, text
        seen.add(np.array(keys, np.uint64), size)
        size += len(shard)
    if not size:
        raise UserError(
            f"{place} holds no corpus, only queries with their passages: put a corpus.jsonl beside "
            "them, or name one."
        )


def find_reader(path: AnyPath, layout: str = "") -> Reader:
    """The reader of a source.

    Args:
      path: a folder or file that exists.
      layout: one of `LAYOUTS`, '' to look which one it is, and say so.

    Raises:
      UserError: it looks like no layout or like several, or lacks a file of its layout.
    """
    if layout:
        reader: Reader = LAYOUTS[layout](path)
        return reader
    found = _layouts(path)
    if not found:
        raise UserError(
            f"{path} is in none of the layouts {', '.join(LAYOUTS)}{inline.seen(path)}: write "
            "which one it should be in config.data.layout to see what is missing."
        )
    if len(found) > 1:
        raise UserError(
            f"{path} can be read as {' and as '.join(found)}: write which one in "
            "config.data.layout."
        )
    say(f"{path} is read as {found[0]} (config.data.layout)")
    return find_reader(path, found[0])


def cache_folder(cache_dir: str) -> Path:
    """Where what is prepared once is kept.

    Args:
      cache_dir: a local folder; '' = corrector_jax in the user's cache folder.

    Raises:
      UserError: it is not on a local disk: the tables are read in place.
    """
    place = paths.make(cache_dir or os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if not isinstance(place, Path):
        raise UserError(
            f"config.data.cache_dir={cache_dir!r} is not a local folder: write one on a disk of "
            "this machine."
        )
    return place if cache_dir else place / "corrector_jax"


def _layouts(path: AnyPath) -> list[str]:
    """The layouts that a source looks like."""
    return [name for name, kind in LAYOUTS.items() if kind.found_in(path)]


def _resolve(path: str) -> AnyPath:
    place = paths.make(path)
    if not place.exists():
        raise UserError(
            f"data.path={path!r} is not a folder or a file: write one that holds your data, or '' "
            "for the embedded data."
        )
    return place


def _check_template(template: str) -> None:
    try:
        filled = render_target(template, title="", text="some text")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"data.target_template={template!r} cannot be filled in: write a text with {{title}} "
            "and {text} as its only fields."
        ) from error
    if "some text" not in filled:
        raise UserError(f"data.target_template={template!r} drops the text: write {{text}} in it.")
