from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corrector_jax.data.tables import Appender, Numbers, Texts, damaged, digest
from corrector_jax.types import UserError

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


def test_a_file_that_cannot_be_read_just_now_is_not_called_damaged():
    denied = str(damaged(Path("a/b.data"), PermissionError(13, "Permission denied")))
    assert denied == "a/b.data cannot be read (Permission denied): make it readable, or try again."
    for error in (None, FileNotFoundError(2, "No such file"), ValueError("7 bytes")):
        assert "is damaged: remove the folder a" in str(damaged(Path("a/b.data"), error))


def test_ends_that_no_table_has_are_damage(tmp_path: Path):
    write(tmp_path / "t", ["one", "two", "three"])
    ends = tmp_path / "t.ends"
    good = np.fromfile(ends, "<i8")
    for bad in (good[[1, 0, 2]], good * [-1, 1, 1], good[:2], [*good, 2**40]):
        np.array(bad, "<i8").tofile(ends)
        with pytest.raises(UserError, match=r"t\.data is damaged: remove the folder"):
            list(Texts(tmp_path / "t"))
    ends.write_bytes(good.astype("<i8").tobytes()[:-3])  # no whole number of them
    with pytest.raises(UserError, match="is damaged"):
        Texts(tmp_path / "t")
    ends.unlink()
    with pytest.raises(UserError, match="is damaged"):
        Texts(tmp_path / "t")


def test_a_text_that_is_no_utf8_is_damage(tmp_path: Path):
    write(tmp_path / "t", ["one", "two"])
    (tmp_path / "t.data").write_bytes(b"one\xff\xff\xff")
    table = Texts(tmp_path / "t")
    assert table[0] == "one"
    for read in (lambda: table[1], lambda: list(table)):
        with pytest.raises(UserError, match=r"t\.data is damaged"):
            read()


def test_numbers_that_name_no_row_are_damage(tmp_path: Path):
    table = Appender(tmp_path / "n")
    table.numbers([[0, 4], [], [2]])
    table.commit()
    table.close()
    assert Numbers(tmp_path / "n", below=5).lengths().tolist() == [2, 0, 1]
    with pytest.raises(UserError, match=r"n\.data is damaged"):
        Numbers(tmp_path / "n", below=4)


def test_less_than_was_committed_is_damage(tmp_path: Path):
    """A file that is made longer to what it was would be full of zeros."""
    table = Appender(tmp_path / "t")
    table.texts(["one"])
    position = table.commit()
    table.close()
    (tmp_path / "t.data").write_bytes(b"on")
    with pytest.raises(UserError, match=r"t\.data is damaged"):
        Appender(tmp_path / "t", position)
