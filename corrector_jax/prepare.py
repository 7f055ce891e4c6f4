"""--mode=prepare_data: everything about the data that need not wait for an accelerator.

Four stages, each of which finds what it did before: fetch the publisher's files, write them as TFDS
data, read those into tables, tokenize.
"""

from __future__ import annotations

import os
from pathlib import Path

from ml_collections import ConfigDict

from corrector_jax import job, paths
from corrector_jax.data import sources
from corrector_jax.data.layouts import tfds
from corrector_jax.types import UserError
from corrector_jax.writer import say

ID_BYTES = 56
"""A passage takes so many bytes in the tables, beside its text and its tokens."""


def prepare_data(config: ConfigDict) -> None:
    """Prepares the data of a configuration.

    Args:
      config: validated.

    Raises:
      UserError: files cannot be had or are malformed, or the disk is too small.
    """
    if config.data.published:
        _prepare_published(config)
    job.prepare(config)
    say("the data is ready: the same command without --mode=prepare_data trains on it")


def _prepare_published(config: ConfigDict) -> None:
    tfds.library()
    from corrector_jax.data import builders

    root = paths.make(config.data.path)
    if not isinstance(root, Path):
        raise UserError(
            f"config.data.path is {config.data.path!r} but records are written to a local disk: "
            "write a folder of this machine"
        )
    _enough_disk(config, root, builders.disk_needed(config.data.published, root))
    builders.prepare(
        config.data.published,
        root,
        verify=config.data.verify,
        max_bad_rows=config.data.max_bad_rows,
    )


def _enough_disk(config: ConfigDict, root: Path, needed: dict[str, int]) -> None:
    """Refuses to begin what the disks cannot hold, before the first of hours."""
    from corrector_jax.data.published import CORPORA, QUERIES

    if not config.data.verify:
        return  # nobody knows how large other files are
    corpus = CORPORA[QUERIES[config.data.published].corpus]
    a_row = ID_BYTES + 2 * (config.data.target_max_len or 512)  # tokens of 16 bits
    cache = sources.cache_folder(config.data.cache_dir)
    tables = {}
    if needed["records"]:  # else they may be there: those stages check for themselves
        tables["tables"] = corpus.text_bytes + corpus.passages * a_row
    shared = _disk_of(root) == _disk_of(cache)
    for place, parts in ((root, needed | tables if shared else needed), (cache, tables)):
        free, total = paths.free_bytes(place), sum(parts.values())
        if free is not None and free < total:
            shown = ", ".join(f"{what} {size / 1e9:.1f}" for what, size in parts.items() if size)
            raise UserError(
                f"{config.data.published} needs {total / 1e9:.1f} GB below {place} ({shown}) but "
                f"the disk has {free / 1e9:.1f} GB left: free some, or name folders on another "
                "disk in config.data.path and config.data.cache_dir"
            )


def _disk_of(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return os.stat(path).st_dev
