from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corrector_jax.data.tables import Appender, Numbers, Texts, digest

SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path: Path, texts: list[str]) -> Texts:
    table = Appender(path)
    table.texts(texts[:2])
    table.texts(texts[2:])
    table.commit()
    table.close()
    return Texts(path)


@SETTINGS
@given(texts=st.lists(st.text(max_size=6), max_size=9), data=st.data())
def test_a_table_of_texts_is_the_list(tmp_path: Path, texts: list[str], data):
    table = write(tmp_path / "t", texts)
    assert len(table) == len(texts)
    assert list(table) == texts
    cut = data.draw(st.slices(len(texts)))
    assert table[cut] == texts[cut]
    assert [table[i] for i in range(-len(texts), len(texts))] == texts * 2
    with pytest.raises(IndexError):
        table[len(texts)]
    assert table.digest() == digest(texts)


def test_digests_see_order_and_borders():
    lists = [["ab", "c"], ["c", "ab"], ["a", "bc"], ["abc"], ["abc", ""], ["", "abc"], [], [""]]
    assert len({digest(one) for one in lists}) == len(lists)


@SETTINGS
@given(rows=st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4), max_size=8))
def test_a_table_of_numbers_is_the_list(tmp_path: Path, rows: list[list[int]]):
    table = Appender(tmp_path / "n")
    table.numbers(rows)
    table.commit()
    table.close()
    numbers = Numbers(tmp_path / "n")
    assert [found.tolist() for found in numbers] == rows
    assert [found.tolist() for found in numbers[1:]] == rows[1:]
    assert all(found.dtype == np.int32 for found in numbers)


def test_what_was_written_behind_the_last_commit_is_cut_off(tmp_path: Path):
    table = Appender(tmp_path / "t")
    table.texts(["one", "zwei"])
    position = table.commit()
    table.texts(["lost"] * 1000)
    table.close()
    table = Appender(tmp_path / "t", position)
    table.texts(["three"])
    table.commit()
    table.close()
    assert list(Texts(tmp_path / "t")) == ["one", "zwei", "three"]
