"""A page that stands alone, hostile text as text, and the right cells in its tables."""

from __future__ import annotations

import re

import pytest

from corrector_jax.report import page as pages
from corrector_jax.report.page import write_report
from corrector_jax.report.words import summary_table
from corrector_jax.types import UserError
from tests.report.made_up import CODE, HOSTILE, write

PLOTS = ("recall", "kl", "overlap", "drift", "loss", "ledger", "times")


def test_the_page_stands_alone(tmp_path, run, page):
    parsed = page(run, plots=len(PLOTS))
    assert len(parsed.addresses) == 2 * len(PLOTS)  # light and dark
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert not re.search(r"url\(|@import", parsed.text("style"))
    assert [tag for tag in parsed.tags if tag in ("h1", "h2")] == ["h1"] + ["h2"] * 6
    for name in PLOTS:
        assert (tmp_path / "plots" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {*run, "report.html", *(f"{name}.png" for name in PLOTS)}


def test_the_same_files_give_the_same_bytes(tmp_path, run, monkeypatch):
    monkeypatch.setattr(pages, "PLOTS", pages.PLOTS[-1:])
    first = write_report(write(tmp_path, run)).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_hostile_text_is_shown_as_text(tmp_path, run, page):
    run["results.json"]["dataset"]["name"] = HOSTILE
    run["results.json"]["dataset"]["eval_split"] = f"$x_{{$ {HOSTILE}"
    run["results.json"]["strategy"] = HOSTILE
    run["results.json"]["encoder"]["source"] = HOSTILE
    run["metrics.jsonl"].append({"step": 1, f"eval/{HOSTILE}-$\\frac$/recall@20": 0.5})
    for hit in run["examples.json"][0]["before"]:
        hit["rank"] = HOSTILE
    run["examples.json"][0]["positives"] = ["half a pair \ud800, a zero \0"]
    run["config.json"][HOSTILE] = {HOSTILE: HOSTILE}
    parsed = page(run, plots=1)
    assert "script" not in parsed.tags
    assert HOSTILE in parsed.text("h1")
    assert HOSTILE in parsed.text("title")
    assert HOSTILE in parsed.text("h3")
    assert parsed.text("pre").count(HOSTILE) >= 3


def test_code_keeps_its_lines_and_indents(run, page):
    run["examples.json"] = run["examples.json"][:1]
    # A browser drops one line break right after <pre>, a parser does not: hence one more here.
    assert "\n" + CODE in page(run).text("pre")
    assert re.search(r"^pre \{[^}]*white-space: pre-wrap", page(run).text("style"), re.M)


def test_examples_mark_the_relevant_target(run, page):
    run["examples.json"] = run["examples.json"][:1]
    parsed = page(run)
    assert "First relevant target: rank 37 before, rank 1 after." in parsed.words
    assert parsed.texts["span"].count("relevant") == 2
    run["examples.json"][0]["after"] = []
    parsed = page(run)
    assert "rank 37 before, not among those shown after" in parsed.words
    assert "Nothing was found." in parsed.words


def test_long_examples_are_cut_and_say_so(run, page):
    run["examples.json"] = run["examples.json"][2:]
    assert "… (4,800 more characters)" in page(run).text("pre")


def cells(parsed_html):
    """[row][column] of the first table."""
    table = re.search(r"<tbody>(.*?)</tbody>", parsed_html, re.S).group(1)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("</tr>")[:-1]]


def test_the_best_of_each_column_is_bold(tmp_path, run, monkeypatch):
    monkeypatch.setattr(pages, "PLOTS", ())
    run["results.json"]["eval"]["bm25"]["ndcg@10"] = 0.42862  # not told apart by three digits
    rows = cells(write_report(write(tmp_path, run)).read_text())
    bold = {(row[0], i) for row in rows for i, cell in enumerate(row) if "<b>" in cell}
    after = "encoder after training"
    assert bold == {
        ("full encoder, untouched", 1),
        *((after, i) for i in (2, 3, 4, 5)),
        ("BM25", 5),
    }
    assert rows[-1][2] == "+0.177<small>+0.150 to +0.203</small>"


def test_a_system_that_was_not_evaluated_is_left_out(run, page):
    del run["results.json"]["eval"]["pretrained"]
    parsed = page(run)
    assert "BM25 reaches 0.442." in parsed.words
    assert "full encoder" not in parsed.text("th")
    assert "full encoder" not in summary_table(run["results.json"])


def test_the_ledger_adds_up(run, page):
    numbers = page(run).texts["td"]
    assert "164,521" in numbers
    assert "100.0 %" in numbers
    assert "70.0 %" in numbers  # 115,200 of them
    assert "12.90" in numbers  # times the corpus


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl", "examples.json"])
def test_every_file_but_the_results_may_be_missing(run, page, missing):
    del run[missing]
    assert "Recall@20 rose" in page(run).words


def test_without_results_there_is_no_report(tmp_path, run):
    with pytest.raises(UserError, match=r"holds no results\.json"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"strategy": ')
    with pytest.raises(UserError, match=r"results\.json is not JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
