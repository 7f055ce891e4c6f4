from __future__ import annotations

import ast
import email
import gc
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from corrector_jax.answers import has_answer
from corrector_jax.data import code_search
from corrector_jax.data.code_search import first_sentence
from corrector_jax.data.dataset import RetrievalData
from corrector_jax.types import UserError

PACKAGES = ("optax", "no_such_package")


@pytest.fixture(scope="module")
def real() -> RetrievalData:
    """Real sources, fewer than the default for the sake of time."""
    return code_search.build(packages=PACKAGES)


@pytest.fixture
def build_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Builds from files given as {path: content}, in place of the standard library."""

    def build(files: dict[str, str], **arguments) -> RetrievalData:
        root = tmp_path / "library"
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
        return code_search.build(packages=(), **arguments)

    return build


def _queries(data: RetrievalData) -> dict[str, str]:
    return {
        query: text
        for split in data.splits.values()
        for query, text in zip(split.query_ids, split.texts, strict=True)
    }


def _function(name: str, docstring: str, body: str = "return x + 1") -> str:
    return f'def {name}(x):\n    """{docstring}"""\n    {body}\n'


def test_real_data_is_large_and_parallel(real: RetrievalData):
    count = len(real.target_ids)
    assert count > 3000
    assert len(set(real.target_ids)) == len(set(real.target_texts)) == count
    assert any(name.startswith("optax.") for name in real.target_ids)
    assert "textwrap:TextWrapper.wrap" in real.target_ids
    shares = {name: len(split.texts) / count for name, split in real.splits.items()}
    assert shares == pytest.approx({"train": 0.8, "dev": 0.1, "test": 0.1}, abs=0.02)
    rows = np.concatenate([np.concatenate(split.positives) for split in real.splits.values()])
    np.testing.assert_array_equal(np.sort(rows), np.arange(count))  # each target has its query
    for split in real.splits.values():
        for query, (row,), grades in zip(
            split.query_ids, split.positives, split.grades, strict=True
        ):
            assert query == real.target_ids[row]
            assert grades.tolist() == [1]


def test_every_real_target_is_a_function_without_docstrings(real: RetrievalData):
    for identifier, text in zip(real.target_ids, real.target_texts, strict=True):
        (function,) = ast.parse(text).body
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        assert identifier.endswith(function.name)
        for node in ast.walk(function):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                assert ast.get_docstring(node) is None


def test_splits_share_no_sentence(real: RetrievalData):
    seen: set[str] = set()
    for split in real.splits.values():
        sentences = [code_search.normalise(text) for text in split.texts]
        assert len(set(sentences)) == len(sentences)
        assert seen.isdisjoint(sentences)
        seen.update(sentences)


def test_another_process_builds_the_same_and_imports_nothing(monkeypatch):
    library = str(Path(email.__file__).parent)  # part of the real one, for the sake of time
    monkeypatch.setattr(sysconfig, "get_path", lambda name: library)
    here = code_search.build(packages=PACKAGES)
    script = (
        "import sys, sysconfig\n"
        "from corrector_jax.data import code_search\n"
        f"sysconfig.get_path = lambda name: {library!r}\n"
        "before = set(sys.modules)\n"
        f"data = code_search.build(packages={PACKAGES})\n"
        "print(data.fingerprint(), *[len(split.texts) for split in data.splits.values()])\n"
        "print(*[query for split in data.splits.values() for query in split.query_ids])\n"
        "print(*(set(sys.modules) - before))\n"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    corpus, queries, imported = result.stdout.split("\n")[:3]
    splits = here.splits.values()
    assert corpus.split() == [here.fingerprint(), *(str(len(split.texts)) for split in splits)]
    assert queries.split() == [query for split in splits for query in split.query_ids]
    assert [name for name in imported.split() if name.startswith("optax")] == []


def test_sources_are_read_and_never_run(build_from, recwarn):
    gc.enable()
    data = build_from(
        {
            "a.py": "raise SystemExit\n" + _function("late", "Add one to x."),
            "b.py": "this does not parse\n" + _function("lost", "Add two to x."),
            "c.py": "# -*- coding: nonsense -*-\n",
            "d.py": '"\\d"\n' + _function("warned", "Add three to x."),
        }
    )
    assert data.target_ids == ["a:late", "d:warned"]
    assert not recwarn
    assert gc.isenabled()


def test_docstrings_go_and_the_rest_stays(build_from):
    source = '''
class Outer:
    if True:

        @property
        async def method(
            self, ä="ä",
        ) -> int:
            r"""Do the äthing
            over two lines.

            More.
            """  # a comment

            def inner():
                """Only this."""

            class Local:
                "One more."

                # A remark.
                value = """text
    less indented"""

            return inner


def shared(x): """Share the line with code."""; return x
'''
    data = build_from({"pack/__init__.py": source})
    assert data.target_ids == ["pack:Outer.method"]
    assert _queries(data)["pack:Outer.method"] == "Do the äthing over two lines."
    assert (
        data.target_texts[0]
        == '''async def method(
    self, ä="ä",
) -> int:
    def inner():
        pass

    class Local:
        # A remark.
        value = """text
    less indented"""

    return inner'''
    )


def test_twins_are_kept_once(build_from):
    files = {
        "a.py": _function("first", "Add one to x.")
        + _function("same_sentence", "Add ``one`` to X!", "return 1 + x")
        + _function("other", "Subtract one from x.", "return x - 1"),
        "b.py": _function("first", "Increase x by a little."),
    }
    assert build_from(files).target_ids == ["a:first", "a:other"]


def test_poor_targets_and_poor_places_are_left_out(build_from):
    bodies = [
        "pass",
        "...",
        "return",
        "return None",
        "return NotImplemented",
        "raise ValueError(x)",
    ]
    files = {
        "bodies.py": "".join(
            _function(f"f{i}", f"Do thing number {'i' * i} now.", body)
            for i, body in enumerate(bodies)
        ),
        "names.py": _function("__len__", "Return the length of it.")
        + _function("test_it", "Check that it works."),
        "good.py": _function("good", "Do a good thing.")
        + _function(
            "outer", "Do it all.", "def g():\n        'Do the inner thing.'\n        return x"
        ),
        "test/good.py": _function("bad", "Do a bad thing."),
        "pack/tests/good.py": _function("bad", "Do a bad thing."),
        "pack/test_good.py": _function("bad", "Do a bad thing."),
        "pack/_vendor/good.py": _function("bad", "Do a bad thing."),
        "site-packages/good.py": _function("bad", "Do a bad thing."),
        "pack/with-dash.py": _function("bad", "Do a bad thing."),
    }
    assert build_from(files).target_ids == ["good:good", "good:outer"]


def test_a_sentence_alone_decides_on_its_split(build_from):
    def split_of(prefix: str, start: int) -> dict[str, str]:
        functions = [
            _function(f"{prefix}{i}", f"Add the {i}th number to x.", f"return {prefix} + {i}")
            for i in range(start, 200)
        ]
        data = build_from({"a.py": "".join(functions)})
        return {text: name for name, split in data.splits.items() for text in split.texts}

    many, few = split_of("f", 0), split_of("renamed", 50)
    assert set(few.values()) == {"train", "dev", "test"}
    assert few.items() < many.items()


def test_template_applies(build_from):
    data = build_from({"a.py": _function("f", "Add one to x.")}, target_template="{title}# {text}")
    assert data.target_texts == ["# def f(x):\n    return x + 1"]


def test_an_environment_without_sources_is_refused(build_from):
    with pytest.raises(UserError, match=r"data\.path"):
        build_from({})


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum. And more.", "Return the sum."),
        ("\n    Return the\n    sum of x\n\n    More text.\n", "Return the sum of x"),
        ("Use e.g. Newton's method. It is fast.", "Use e.g. Newton's method."),
        ("Read version 3.11 files of x.y. Then stop.", "Read version 3.11 files of x.y."),
        ("Follow J. Doe and sons. Then stop.", "Follow J. Doe and sons."),
        ("dot(a, b, out=None) -> array\n\nMultiply two arrays.", "Multiply two arrays."),
        ("Call :func:`~numpy.dot` on ``a`` and `b`.", "Call numpy.dot on a and b."),
        ("Solve a system.\nParameters\n----------\na : array", "Solve a system."),
        ("Solve a system\nArgs:\n  a: array", "Solve a system"),
        ("Solve the equation\n.. math:: x = y", "Solve the equation"),
        ("", None),
        ("   \n ", None),
        ("Two words.", None),
        ("word " * 60, None),
        ("See numpy.dot for the documentation.", None),
        ("Test that the parser works.", None),
        ("Testing is done by this function.", "Testing is done by this function."),
        ("An alias for the other function.", None),
        ("LAX-backend implementation of numpy.dot.", None),
        ("name = word *('.' word) / '(' word ')' / [':']", None),
        (">>> f(1) and then some\n2", None),
        ("split(text, separator, limit)", None),
        ("返回两个数组的和 of two arrays", None),
        ("Return the sum \x00 of both.", None),
    ],
)
def test_first_sentence(docstring: str, sentence: str | None):
    assert first_sentence(docstring) == sentence


def test_a_name_is_an_answer_where_one_function_has_it(real: RetrievalData):
    names = Counter(identifier.rpartition(":")[2].rpartition(".")[2] for identifier in
                    real.target_ids)  # fmt: skip
    several = 0
    for split in real.splits.values():
        for row, answers in zip(split.positives, split.answers, strict=True):
            name = real.target_ids[row[0]].rpartition(":")[2].rpartition(".")[2]
            if names[name] > 1:
                assert answers == []
                continue
            assert answers[0] == name
            assert has_answer(real.target_texts[row[0]], answers[:1])
            several += len(answers) == 2
            assert all(answer.replace(" ", "") == name for answer in answers)
    assert several > 100
