"""The data of a comparison: every dev query stays, whatever the cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import grid_data
from corrector_jax.data import sources
from corrector_jax.data.dataset import RetrievalData
from corrector_jax.types import UserError
from tests import tiny


def load(folder: Path, cache: Path) -> RetrievalData:
    return sources.load(str(folder), cache_dir=str(cache))


def positives(data: RetrievalData, split: str) -> dict[str, set[str]]:
    """Names of the known positives by query."""
    of = data.splits[split]
    return {
        query: {data.target_ids[row] for row in rows}
        for query, rows in zip(of.query_ids, of.positives, strict=True)
    }


def test_a_cut_keeps_every_dev_query_and_its_positives(tmp_path: Path):
    whole = load(tiny.write_data(tmp_path / "whole"), tmp_path / "cache")
    written = grid_data.write(str(tmp_path / "whole"), tmp_path / "runs" / "data", targets=30)
    small = load(written, tmp_path / "cache")
    kept = set(small.target_ids)
    assert len(kept) == 30
    assert set(small.splits) == {"train", "dev"}
    assert positives(small, "dev") == positives(whole, "dev")
    left = {query: known & kept for query, known in positives(whole, "train").items()}
    assert positives(small, "train") == {query: known for query, known in left.items() if known}


def test_a_smaller_cut_lies_inside_a_larger_one(tmp_path: Path):
    tiny.write_data(tmp_path / "whole")
    found = [
        set(load(grid_data.write(str(tmp_path / "whole"), tmp_path / f"{count}", targets=count),
                 tmp_path / "cache").target_ids)
        for count in (25, 40)
    ]  # fmt: skip
    assert found[0] < found[1]


def test_hard_negatives_of_the_data_are_kept_and_known(tmp_path: Path):
    folder = tiny.write_data(tmp_path / "whole")
    before = tiny.write_data(tmp_path / "before")
    known = positives(load(folder, tmp_path / "cache"), "train")["train1"]
    against = next(f"t{i}" for i in range(tiny.TARGETS) if f"t{i}" not in known)
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write(f"train1\t{against}\t0\n")
    assert not grid_data.has_negatives(grid_data.write(str(before), tmp_path / "without"))
    written = grid_data.write(str(folder), tmp_path / "data")
    assert grid_data.has_negatives(written)
    data = load(written, tmp_path / "cache")
    train = data.splits["train"]
    found = {
        query: [data.target_ids[row] for row in rows]
        for query, rows in zip(train.query_ids, train.negatives, strict=True)
        if len(rows)
    }
    assert found == {"train1": [against]}


def test_what_cannot_be_compared_on_is_refused(tmp_path: Path):
    folder = tiny.write_data(tmp_path / "whole")
    with pytest.raises(UserError, match="more than the 3 to be kept"):
        grid_data.write(str(folder), tmp_path / "data", targets=3)
    (folder / "qrels" / "dev.tsv").unlink()
    with pytest.raises(UserError, match="has no dev split"):
        grid_data.write(str(folder), tmp_path / "more")


def test_data_that_is_there_is_left_as_it_is(tmp_path: Path):
    folder = tiny.write_data(tmp_path / "whole")
    written = grid_data.write(str(folder), tmp_path / "data")
    before = (written / "corpus.jsonl").read_text()
    (folder / "corpus.jsonl").write_text("")
    assert grid_data.write(str(folder), tmp_path / "data") == written
    assert (written / "corpus.jsonl").read_text() == before
    assert json.loads(before.splitlines()[0])["_id"] == "t0"
    with pytest.raises(UserError, match="another --name"):
        grid_data.write(str(folder), tmp_path / "data", targets=30)
