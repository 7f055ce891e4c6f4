"""The embedded default data: code search over the Python sources that are installed anyway.

A query is the first sentence of a docstring, its target the source of that function without any
docstring (the task of CodeSearchNet). The sources are the standard library and, where installed,
the packages of `PACKAGES`. They are found on disk and read by `ast`; nothing of them is imported or
executed, and a file that does not parse is passed over.

What is left out, because it would make a poor query or a poor target:
  * tests, vendored copies (false negatives of their originals) and large corners of narrow interest
    (GUI, build tools, kernels of single chips), which take long to read and give few good queries;
  * `__dunder__` methods, whose sentence is the protocol's, functions that do nothing but refuse
    (`pass`, `...`, `return None`, `raise`), and functions inside of functions;
  * sentences that only point elsewhere ("See numpy.dot", "Alias for x", "Test the parser"), have
    fewer than three words or more than `_MAX_WORDS`, or are not prose (grammars, doctests);
  * a sentence that an earlier function has, and a source that occurred before: with one positive
    per query, the twins would be false negatives of each other.

The split is a hash of the sentence's words and of nothing else: a sentence is in the same split on
every machine, whatever is installed there.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.util
import os
import re
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from corrector_jax.data.dataset import RetrievalData, Split, render_target, stable_hash
from corrector_jax.types import UserError

PACKAGES = ("numpy", "scipy", "jax", "flax", "optax")
"""Read after the standard library, in this order, where they are installed."""

_SPLITS = {"train": range(0, 80), "dev": range(80, 90), "test": range(90, 100)}  # hash modulo 100

_TESTS = "test tests idle_test testing internal_test_util"
_VENDORED = "_lib third_party _vendor _vendored _bundled"  # _lib: scipy's
_NARROW = "_precompute distutils encodings f2py idlelib lib2to3 mosaic pallas pydoc_data tkinter"
_SKIPPED_FOLDERS = frozenset(f"{_TESTS} {_VENDORED} {_NARROW}".split())
_SKIPPED_FILES = re.compile(r"conftest|test_\w+|\w+_test|\w*test_?utils?")

_MAX_WORDS = 40
_MIN_PROSE = 0.8  # share of letters and blanks in a sentence
_POINTER = re.compile(
    r"(an? )?(alias|deprecated|equivalent|like|override[sn]?|same|see|tests?|todo|fixme|xxx)\b"
    r"|(\S+ )?implementation of\b|an? helper function\W*$",
    re.IGNORECASE,
)
_ROLE = re.compile(r":[\w:]+:`[~!.]*([^`<]*?)\s*(?:<[^`]*>)?`")  # :func:`~numpy.dot` -> numpy.dot
_SIGNATURE = re.compile(r"[\w.\[\]=, ]*\w\(.*\)\s*(->.*|:)?")  # value = dot(a, b) -> array
_NOT_PROSE = re.compile(  # doctest, directive, field, underline, heading
    r"\s*(>>>|\.\. |@|:param|[-=~*]{3,}|(Parameters|Args|Arguments|Returns):?\s*$)"
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(\[])")
_ABBREVIATION = re.compile(
    r"(\b(e\.g|i\.e|etc|vs|cf|eqs?|fig|approx|resp|al|ref|sec|no|(?-i:[A-Z]))|\.)\.$", re.IGNORECASE
)

_Function = ast.FunctionDef | ast.AsyncFunctionDef


class _Candidate(NamedTuple):
    identifier: str
    sentence: str
    source: str


def build(
    *, target_template: str = "{title} {text}", packages: Sequence[str] = PACKAGES
) -> RetrievalData:
    """Builds the data from the sources installed beside the running interpreter.

    Args:
      target_template: how a target's text is made of `{title}` (empty) and `{text}` (the source).
      packages: what to read after the standard library; those not installed are passed over.

    Returns:
      Ungraded train, dev and test splits with one positive per query; a target and its query share
      an id such as 'json.decoder:JSONDecoder.decode'. The answer to a query is the
      function's name, where no other function has it.

    Raises:
      UserError: the interpreter has no readable standard library.
    """
    kept: list[_Candidate] = []
    seen: set[str] = set()
    for candidate in _candidates(packages):
        words = normalise(candidate.sentence)
        keys = {candidate.identifier, words, " ".join(candidate.source.split())}
        if seen.isdisjoint(keys):
            seen |= keys
            kept.append(candidate)
    if not kept:
        raise UserError(
            "This interpreter has no sources of its standard library to make the default data of: "
            "write the folder of a BEIR data set in data.path."
        )
    held_by = Counter(_name(candidate.identifier) for candidate in kept)
    rows_of: dict[str, list[int]] = {name: [] for name in _SPLITS}
    for row, candidate in enumerate(kept):
        bucket = stable_hash(normalise(candidate.sentence)) % 100
        rows_of[next(name for name, buckets in _SPLITS.items() if bucket in buckets)].append(row)
    return RetrievalData(
        name="code-search",
        target_ids=[candidate.identifier for candidate in kept],
        target_texts=[render_target(target_template, title="", text=c.source) for c in kept],
        splits={
            name: Split(
                query_ids=[kept[row].identifier for row in rows],
                texts=[kept[row].sentence for row in rows],
                positives=[np.array([row], np.int32) for row in rows],
                grades=[np.ones(1, np.int32) for _ in rows],
                answers=[_answers(_name(kept[row].identifier), held_by) for row in rows],
            )
            for name, rows in rows_of.items()
            if rows
        },
    )


def _name(identifier: str) -> str:
    return re.split(r"[:.]", identifier)[-1]


def _answers(name: str, held_by: Counter[str]) -> list[str]:
    """A function's name, and where it has several words, the same with blanks in between.

    Tokenizers of word pieces give a text back in this form. None where functions share the name:
    it would be found in other passages too.
    """
    if held_by[name] > 1:
        return []
    return list(dict.fromkeys([name, " ".join(re.findall(r"_|[^\W_]+", name))]))


def first_sentence(docstring: str) -> str | None:
    r"""The first sentence of a docstring without its markup, None where it makes no query.

    >>> first_sentence("dot(a, b)\n\nProduct of two arrays. See :func:`~numpy.matmul`.")
    'Product of two arrays.'
    """
    paragraphs = re.split(r"\n\s*\n", docstring.strip())
    if len(paragraphs) > 1 and _SIGNATURE.fullmatch(" ".join(paragraphs[0].split())):
        del paragraphs[0]
    lines = []
    for line in paragraphs[0].split("\n"):
        if _NOT_PROSE.match(line):
            break
        lines.append(line)
    sentence = _ROLE.sub(r"\1", " ".join(" ".join(lines).split())).replace("`", "")
    for end in _SENTENCE_END.finditer(sentence):
        if not _ABBREVIATION.search(sentence, 0, end.start()):
            sentence = sentence[: end.start()]
            break
    prose = sum(len(word) for word in re.findall(r"[A-Za-z ]+", sentence))
    if (
        not 3 <= len(re.findall(r"[A-Za-z]+", sentence)) <= _MAX_WORDS
        or prose < _MIN_PROSE * len(sentence)
        or not sentence.isprintable()
        or _POINTER.match(sentence)
        or _SIGNATURE.fullmatch(sentence)
    ):
        return None
    return sentence


def normalise(sentence: str) -> str:
    """A sentence's words in lower case; what the split and the search for twins look at."""
    return " ".join(re.findall(r"\w+", sentence.casefold()))


def _candidates(packages: Sequence[str]) -> Iterator[_Candidate]:
    for module, path in _modules(packages):
        try:
            with tokenize.open(path) as file:
                text = file.read()
            with warnings.catch_warnings(), _without_gc():
                warnings.simplefilter("ignore")  # other people's invalid escapes
                tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        lines = text.split("\n")
        for name, function in _functions(tree):
            sentence = first_sentence(ast.get_docstring(function, clean=False) or "")
            if sentence and not _does_nothing(function):
                source = _source(function, lines)
                if source:
                    yield _Candidate(f"{module}:{name}", sentence, source)


def _modules(packages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(dotted name, path) of every source file to read, in a fixed order."""
    roots = [("", sysconfig.get_path("stdlib"))]
    for package in packages:
        spec = importlib.util.find_spec(package)  # of a top-level name, so nothing is imported
        roots += [(package, root) for root in (spec and spec.submodule_search_locations) or ()]
    for package, root in roots:
        for folder, subfolders, files in os.walk(root):
            # Neither site-packages nor config-3.11-x86_64 is an identifier.
            subfolders[:] = sorted(
                name for name in subfolders if name.isidentifier() and name not in _SKIPPED_FOLDERS
            )
            for file in sorted(files):
                stem, extension = os.path.splitext(file)
                if extension != ".py" or not stem.isidentifier() or _SKIPPED_FILES.fullmatch(stem):
                    continue
                parts = os.path.relpath(os.path.join(folder, stem), root).split(os.sep)
                if stem == "__init__":
                    del parts[-1]
                yield ".".join([package, *parts] if package else parts), os.path.join(folder, file)


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Keeps the collector from walking all of jax again for each file: a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, _Function]]:
    """The functions and methods that may be targets, with their qualified names."""
    for child in _statements(node):
        if isinstance(child, _Function):
            if not re.fullmatch(r"__\w+__|test_\w+", child.name):
                yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements right inside a node; far quicker than `ast.walk`, which visits expressions."""
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        yield from getattr(node, field, ())


def _does_nothing(function: _Function) -> bool:
    for statement in function.body:
        match statement:
            case ast.Pass() | ast.Raise() | ast.Expr(ast.Constant()):
                pass
            case ast.Return(None | ast.Constant() | ast.Name("NotImplemented" | "self")):
                pass
            case _:
                return False
    return True


def _source(function: _Function, lines: list[str]) -> str | None:
    """A function's lines, dedented, without any docstring; None where one shares a line with code.

    Lines are cut here because `ast.get_source_segment` splits the whole file on every call.
    """
    start, stop = function.lineno - 1, function.end_lineno or function.lineno
    kept = dict(enumerate(lines[start:stop], start))
    pending: list[ast.AST] = [function]
    while pending:
        node = pending.pop()
        pending += _statements(node)
        if not isinstance(node, (_Function, ast.ClassDef)):
            continue
        if ast.get_docstring(node, clean=False) is None:
            continue
        docstring = node.body[0]
        first, last = docstring.lineno - 1, (docstring.end_lineno or docstring.lineno) - 1
        before = lines[first].encode()[: docstring.col_offset].decode()  # ast counts bytes
        after = lines[last].encode()[docstring.end_col_offset :].strip()
        if before.strip() or (after and not after.startswith(b"#")):
            return None
        alone = len(node.body) == 1
        while not alone and not lines[last + 1].strip():
            last += 1
        for number in range(first, last + 1):
            del kept[number]
        if alone:
            kept[first] = f"{before}pass"
    indent = lines[start][: function.col_offset]
    return "\n".join(kept[number].removeprefix(indent).rstrip() for number in sorted(kept))
