"""The part of a text that is shown: whole, in place, and marked where the query's words are."""

from __future__ import annotations

import itertools
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from corrector_jax.snippet import WIDTH, snippet

TEXTS = st.text(st.sampled_from("ab cde_-.(\n<é"), max_size=600)


def shown(pieces):
    return "".join(piece.text for piece in pieces)


def marked(pieces):
    return [piece.text for piece in pieces if piece.marked]


@settings(max_examples=200, deadline=None)
@given(query=TEXTS, text=TEXTS)
def test_a_snippet_is_a_stretch_of_the_text_with_the_query_s_words_marked(query, text):
    pieces = snippet(query, text)
    plain = shown(pieces).removeprefix("… ").removesuffix(" …")
    assert plain in " ".join(text.split())
    assert len(plain) <= WIDTH + 8
    assert all(a.marked != b.marked for a, b in itertools.pairwise(pieces))
    asked = {word.lower() for word in re.findall(r"[^\W_]+", query)}
    stems = {word[:2] for word in asked}  # a stem keeps the beginning of a word
    assert all(word.lower()[:2] in stems for word in marked(pieces))


def test_words_match_by_stem_and_inside_identifiers_and_common_ones_do_not():
    pieces = snippet("Reads the lines of a file", "def read_line(file): the end of it")
    assert marked(pieces) == ["read", "line", "file"]
    assert marked(snippet("to be", "to be or not")) == ["to", "be"]  # nothing else was asked


def test_a_long_text_is_cut_to_where_most_words_are():
    text = f"needle {'hay ' * 200} needle and thread {'hay ' * 200}"
    pieces = snippet("needle thread", text)
    assert marked(pieces) == ["needle", "thread"]
    assert shown(pieces).startswith("… ")
    assert shown(pieces).endswith(" …")


def test_nothing_shared_shows_the_beginning():
    pieces = snippet("zzz", "hay " * 200)
    assert marked(pieces) == []
    assert shown(pieces).startswith("hay hay")
