"""The docs site: `make docs`.

The repository's root is the source folder, so that README, CONTRIBUTING and launch/README are pages
too and every link between files means the same here and where the repository is browsed.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

project = "corrector_jax"
author = "The corrector_jax authors"
copyright = f"{author}. Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",  # the source beside every function
]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/api/*.md", "launch/README.md"]
exclude_patterns = [".*", "build", "runs"]

html_theme = "furo"
html_title = "corrector_jax"
html_extra_path = ["_site"]  # an index.html at the top that leads to docs/
html_show_sphinx = False
highlight_language = "none"  # blocks that say nothing hold commands or what they print

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]
suppress_warnings = ["myst.header"]  # a title that README's picture of a page skips a level

default_role = "py:obj"  # `name` in a docstring is a link where there is such a name
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": False}


def _plain(_app: Sphinx, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: |x| and y_i are mathematics, not marks of reStructuredText.

    What a module's own docstring indents is a table or a command, and stays as it is typed.
    """
    made: list[str] = []
    literal = False
    for line in lines:
        indented = line.startswith("  ") and not line.lstrip().startswith("* ")
        if what == "module" and indented and not literal and not _in_list(made):
            made += ["", "::", ""]
            literal = True
        elif line and not line.startswith(" "):
            if literal:
                made.append("")
            literal = False
        made.append(line if literal or line.lstrip().startswith((">>>", "...")) else _escape(line))
    lines[:] = made


def _in_list(lines: list[str]) -> bool:
    """Whether the paragraph that ends here is an entry of a list."""
    for line in reversed(lines):
        if not line or line.lstrip().startswith("* "):
            return bool(line)
    return False


def _escape(line: str) -> str:
    bullet = "".join(re.findall(r"^ *\* ", line))
    parts = re.split(r"(``[^`]*``|`[^`]*`)", line.removeprefix(bullet))
    parts[::2] = [re.sub(r"[|*]|_(?=[\s,.;:)\]|]|$)", r"\\\g<0>", part) for part in parts[::2]]
    return bullet + "".join(parts)


def _skip(_app: Sphinx, _what: str, _name: str, obj: Any, skip: bool, _options: Any) -> bool:
    """The fields of a NamedTuple stand in its docstring; "Alias for field number" says nothing."""
    return skip or type(obj).__name__ == "_tuplegetter"


def setup(app: Sphinx) -> None:
    """Hooks; the first before napoleon, whose own marks must stay."""
    app.connect("autodoc-process-docstring", _plain, priority=100)
    app.connect("autodoc-skip-member", _skip)
