from __future__ import annotations

from html.parser import HTMLParser

import pytest

from corrector_jax.report import page as pages
from corrector_jax.report.page import write_report
from tests.report import made_up

VOID = {"meta", "img", "source"}


class Page(HTMLParser):
    """The page as its parser sees it; every tag must be closed by its own end tag."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.addresses, self.ids = [], [], [], []
        self.texts = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}"
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def text(self, tag):
        return "".join(self.texts.get(tag, []))

    @property
    def words(self):
        text = " ".join("".join(self.texts.get(tag, [])) for tag in self.texts if tag != "style")
        return " ".join(text.split())


@pytest.fixture
def run():
    """The files of a made-up run: {name: content}."""
    return made_up.files()


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A function from files to the parsed page; with its first plots alone, which take time."""

    def render(run, plots=0):
        monkeypatch.setattr(pages, "PLOTS", pages.PLOTS[:plots])
        return Page(write_report(made_up.write(tmp_path, run)).read_text(encoding="utf-8"))

    return render
