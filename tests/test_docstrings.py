"""Whoever takes or gives an array says its shape."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "corrector_jax"
ARRAY = re.compile(r"\b(Array|ArrayLike|ndarray)\b")
SHAPE = re.compile(r"\[[^\]]*\]|[Ss]calar|[Uu]nused|not used|only B is read")


def public(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            yield prefix + child.name, child


def silent(path: Path) -> list[str]:
    """The public functions of a file that handle arrays and name no shape."""
    found = []
    for name, function in public(ast.parse(path.read_text())):
        arguments = [*function.args.args, *function.args.kwonlyargs]
        arguments = [a for a in arguments if a.arg != "key"]  # a key is a key
        annotations = [a.annotation for a in arguments] + [function.returns]
        if any(ARRAY.search(ast.unparse(a)) for a in annotations if a is not None):
            text = ast.get_docstring(function) or ""
            if not SHAPE.search(text):
                found.append(name)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_public_functions_that_handle_arrays_name_their_shapes(path):
    assert silent(path) == []


def test_a_function_without_shapes_is_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text('def f(x: Array) -> None:\n    """Takes x."""\n')
    assert silent(file) == ["f"]
