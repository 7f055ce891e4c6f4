"""A little of the fuzzing: a few cases of every reader of the package."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks import fuzz, mutations
from benchmarks.fuzz_targets import TARGETS, Target
from corrector_jax.types import UserError

SLOW = {"index", "checkpoint", "data/tfds", "compare"}
"""Seconds to make: a case or two of these."""


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused_in_a_sentence(tmp_path, name):
    cases = iter(range(2 if name in SLOW else 8))
    found = fuzz.fuzz(TARGETS[name], tmp_path, cases=cases, seed=1)
    assert found.errors == {}
    assert found.refused + found.accepted == found.cases
    assert found.cases


def _fuzzed(folder: Path, read, **changes) -> dict[str, list]:
    def write(given: Path) -> None:
        (given / "file.json").write_text('{"name": "value", "rows": [1, 2, 3]}')

    folder.mkdir(exist_ok=True)
    target = Target("made up", write, _after_the_first(read), **changes)
    return fuzz.fuzz(target, folder, cases=iter(range(12)), seed=0).errors


def _after_the_first(read):
    """A reader that takes the file that is not damaged."""
    calls = []

    def reader(given: Path) -> None:
        calls.append(given)
        if len(calls) > 1:
            read(given)

    return reader


def _raise(error: Exception):
    def read(given: Path) -> None:
        raise error

    return read


def test_an_error_without_a_name_is_found(tmp_path):
    (what,) = _fuzzed(tmp_path, _raise(KeyError("rows")))
    assert what.startswith("KeyError: 'rows'")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("file.json is bad\nindeed", "more than one line"),
        ("file.json is \x1b[31mbad", "unprintable"),
        ("it is bad", "names no file"),
        ("file.json " + "x" * 1000, "too long"),
    ],
)
def test_a_sentence_that_is_none_is_found(tmp_path, message, said):
    (what,) = _fuzzed(tmp_path, _raise(UserError(message)))
    assert said in what


def test_a_good_sentence_is_a_refusal(tmp_path):
    assert _fuzzed(tmp_path, _raise(UserError("file.json:1: it is bad: mend it."))) == {}


def test_what_is_written_or_opened_outside_is_found(tmp_path):
    found = _fuzzed(tmp_path / "b", lambda given: (given / "../evil").write_text("evil"))
    assert "something was written outside of the folder" in found
    (what,) = _fuzzed(tmp_path / "c", lambda given: (given / f"../{mutations.SECRET}").read_text())
    assert what == f"opened /{mutations.SECRET}"


def test_what_hangs_or_takes_memory_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)

    def forever(given: Path) -> None:
        while True:
            pass

    (what,) = _fuzzed(tmp_path / "a", forever)
    assert what.startswith("Hanging")
    monkeypatch.setattr(fuzz, "SECONDS", 60)
    monkeypatch.setattr(fuzz, "MEMORY", 2**25)
    (what,) = _fuzzed(tmp_path / "b", lambda given: b"x" * 2**27)
    assert what == "too much memory"
    monkeypatch.setattr(fuzz, "MEMORY", 2**28)
    (what,) = _fuzzed(tmp_path / "c", lambda given: b"x" * 2**34)
    assert what.startswith("MemoryError")


def test_a_changed_file_that_is_taken_is_found(tmp_path):
    (what,) = _fuzzed(tmp_path, lambda given: None, gate=lambda given, valid: True)
    assert what == "a changed file was taken"


def test_a_case_is_known_by_its_seed(tmp_path):
    made = []
    for number, seed in enumerate((3, 3, 4)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.json").write_text('{"a": [1, 2, {"b": "c"}]}' * 3)
        (folder / "b.txt").write_text("a\tb\tc\n" * 9)
        rng = random.Random(seed)
        for _ in range(20):
            if any(path.is_file() for path in folder.iterdir()):
                mutations.damage(rng, folder, tmp_path / "outside")
        made.append({p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})
    assert made[0] == made[1]
    assert made[0] != made[2]
