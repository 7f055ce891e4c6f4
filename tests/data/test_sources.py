from __future__ import annotations

import numpy as np
import pytest

from corrector_jax.data import beir, code_search, sources
from corrector_jax.data.dataset import RetrievalData, Split
from corrector_jax.types import UserError


@pytest.fixture(autouse=True)
def _two_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both readers give two targets and a test query for each; the name tells what they got."""

    def read(folder: str = "embedded", *, target_template: str) -> RetrievalData:
        rows = [np.array([row], np.int32) for row in range(2)]
        grades = [np.ones(1, np.int32)] * 2
        test = Split(query_ids=["p", "q"], texts=["one?", "two?"], positives=rows, grades=grades)
        return RetrievalData(
            name=f"{folder}, {target_template}",
            target_ids=["a", "b"],
            target_texts=["one", "two"],
            splits={"test": test},
        )

    monkeypatch.setattr(beir, "read", read)
    monkeypatch.setattr(code_search, "build", read)


@pytest.mark.parametrize(("path", "source"), [("", "embedded"), ("some/folder", "some/folder")])
def test_the_path_chooses_the_source(path: str, source: str):
    assert sources.load(path, target_template="{text}!").name == f"{source}, {{text}}!"


@pytest.mark.parametrize("path", ["", "some/folder"])
def test_what_was_read_is_cut(path: str):
    def sizes(**cut: int) -> tuple[int, int]:
        data = sources.load(path, **cut)
        return len(data.target_ids), len(data.splits["test"].texts)

    assert sizes() == sizes(max_targets=5) == (2, 2)
    assert sizes(max_targets=1) == (1, 1)
    assert sizes(max_queries=1) == (2, 1)


@pytest.mark.parametrize("template", ["{titel} {text}", "{}", "{text", "{text[a]}", "passage:"])
def test_templates_that_cannot_work_are_refused(template: str):
    with pytest.raises(UserError, match=r"data\.target_template="):
        sources.load("", target_template=template)
