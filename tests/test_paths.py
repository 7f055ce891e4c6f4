"""Paths: one way to read and write, wherever it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from corrector_jax import paths
from corrector_jax.types import UserError


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    return tmp_path if request.param == "disk" else paths.make(f"memory://{tmp_path.name}/a")


def test_a_path_without_a_scheme_is_local_and_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert paths.make("runs/a") == tmp_path / "runs" / "a"
    assert paths.make("~/runs") == Path("/home/someone/runs")
    assert paths.is_local(paths.make("runs/a"))
    assert not paths.is_local(paths.make("memory://a"))
    assert paths.make(tmp_path) is tmp_path


def test_write_makes_folders_and_replaces(folder):
    for content in ("first", "zweite ü"):
        paths.write(folder / "b" / "c.txt", content)
        assert (folder / "b" / "c.txt").read_text(encoding="utf-8") == content
    paths.write(folder / "b" / "c.txt", b"\x00\xff")
    assert (folder / "b" / "c.txt").read_bytes() == b"\x00\xff"
    assert [path.name for path in (folder / "b").iterdir()] == ["c.txt"]


def test_a_write_that_fails_leaves_what_was_there(folder):
    paths.write(folder / "c.txt", "kept")

    def interrupted() -> None:
        with paths.writing(folder / "c.txt") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (folder / "c.txt").read_text() == "kept"
    assert [path.name for path in folder.iterdir()] == ["c.txt"]


def test_two_that_write_the_same_file_together_both_end_well(tmp_path):
    path = tmp_path / "manifest.json"
    with paths.writing(path, together=True) as one:
        one.write(b"the ")
        with paths.writing(path, together=True) as other:
            other.write(b"the same")
        one.write(b"same")
    assert path.read_bytes() == b"the same"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "../a"])
def test_a_name_that_leads_elsewhere_is_not_plain(name):
    assert not paths.is_plain(name)
    assert paths.is_plain("rows-0.safetensors")


def test_remove_takes_files_and_folders_and_minds_nothing_missing(folder):
    paths.write(folder / "b" / "c.txt", "x")
    paths.remove(folder / "b" / "c.txt")
    assert not (folder / "b" / "c.txt").exists()
    paths.write(folder / "b" / "d" / "e.txt", "x")
    paths.remove(folder / "b")
    paths.remove(folder / "b")
    assert not (folder / "b" / "d" / "e.txt").exists()


def test_move_takes_a_folder_whole(folder):
    paths.write(folder / "b" / "c.txt", "x")
    paths.move(folder / "b", folder / "far" / "d")
    assert (folder / "far" / "d" / "c.txt").read_text() == "x"
    assert not (folder / "b" / "c.txt").exists()


def test_free_bytes_are_known_of_disks_only(tmp_path):
    free = paths.free_bytes(tmp_path / "not" / "there" / "yet")
    assert free is not None
    assert free > 0
    assert paths.free_bytes(paths.make("memory://a")) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nosuch://a/b", "nosuch:// is not known here"),
        ("s3://bucket/run", "needs the package s3fs: pip install s3fs"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_sentence(text, said):
    with pytest.raises(UserError, match=said):
        paths.make(text)
