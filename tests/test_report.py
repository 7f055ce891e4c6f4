"""The report: right words for every outcome, a page that stands alone, hostile text as text."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from corrector_jax import report
from corrector_jax.report import summary_table, write_report
from corrector_jax.types import UserError

METRICS = ("recall@1", "recall@20", "recall@100", "mrr@10", "ndcg@10")
PLOTS = ("recall", "kl", "drift", "loss")
HOSTILE = "<script>alert('x')</script></pre></article> & <b>bold"
CODE = '''
def read_lines(path, *, encoding="utf-8"):
    """Kept: the blank line above, <angles>, and this indent."""
    with open(path, encoding=encoding) as file:
        if a < b and c > d:
            return [line.rstrip("\\n") for line in file]


class Cache(dict[str, tuple[int, ...]]):
\tdef __missing__(self, key):
\t\treturn self.setdefault(key, a_function_with_a_rather_long_name_that_does_not_break(self, key))
'''


def metrics(*values):
    return dict(zip(METRICS, values, strict=True))


def hits(first_relevant, text):
    ranks = [1, 2, 3] if first_relevant <= 3 else [1, 2, 3, first_relevant]
    return [
        {
            "rank": rank,
            "score": 17.25 - rank / 3,
            "text": CODE if rank == first_relevant else text,
            "relevant": rank == first_relevant,
        }
        for rank in ranks
    ]


@pytest.fixture
def run():
    """The files of a made-up run: {name: content}."""
    rng = np.random.default_rng(0)
    rows = []
    for step in range(401):
        drift = 0.6 * (1 - np.exp(-step / 60))
        left = 0.04 * (1 - np.exp(-step / 30))
        row = {"step": step}
        if step % 4 == 0:
            row["train/loss"] = 1.2 + 3.5 * np.exp(-step / 80) + rng.normal(0, 0.25)
            row["train/drift"] = drift * np.exp(rng.normal(0, 0.05)) + 1e-4
            row["train/corrected_error"] = left * np.exp(rng.normal(0, 0.1)) + 1e-4
            row["train/learning_rate"] = 1e-4
        if step % 40 == 0:
            row |= {"probe/drift": drift, "probe/corrected_error": left}
            row |= {"probe/kl_stale": 2.4 * drift, "probe/kl_corrected": 3.6 * left}
            row |= {"probe/gate": 1.0, "probe/overlap_stale": 0.4}
        if step % 100 == 0:
            gain = 1 - np.exp(-step / 120)
            values = [0.21, 0.40, 0.55, 0.27, 0.30] + gain * np.array([0.1, 0.18, 0.2, 0.12, 0.13])
            row |= {
                f"eval/code-dev/{name}": value for name, value in zip(METRICS, values, strict=True)
            }
        if len(row) > 1:
            rows.append(row)
    interval = {"difference": 0.1771, "low": 0.1503, "high": 0.2031}
    results = {
        "strategy": "corrected",
        "seed": 0,
        "steps": 400,
        "eval": {
            "before": metrics(0.2102, 0.4011, 0.5532, 0.2743, 0.3012),
            "after": metrics(0.3087, 0.5782, 0.7498, 0.3921, 0.4286),
            "bm25": metrics(0.2612, 0.4415, 0.5621, 0.3122, 0.3391),
            "pretrained": metrics(0.3104, 0.5523, 0.6904, 0.3819, 0.4102),
        },
        "comparison": dict.fromkeys(METRICS, interval),
        "distribution": {
            "kl_stale": 1.4312,
            "kl_corrected": 0.1521,
            "drift": 0.6021,
            "corrected_error": 0.0412,
        },
        "ledger": {
            "initial": 8931,
            "refresh": 0,
            "encoded_with_grad": 115200,
            "encoded_without_grad": 22528,
            "evaluation": 17862,
            "corpus_passes": 1.0,
        },
        "wall_seconds": 312.4,
        "examples_per_second": 41.7,
        "dataset": {
            "name": "code",
            "targets": 8931,
            "train_queries": 7102,
            "eval_queries": 911,
            "eval_split": "test",
        },
        "encoder": {"source": "all-MiniLM-L6-v2", "layers": 3, "dim": 384},
    }
    examples = [
        {
            "query": "Read a text file and return its lines without line ends.",
            "positives": [CODE],
            "before": hits(37, "def write_lines(path, lines):\n    pass"),
            "after": hits(1, "def read_bytes(path):\n    return path.read_bytes()"),
        },
        {"query": HOSTILE, "positives": [HOSTILE], "before": hits(2, HOSTILE), "after": []},
        {
            "query": "Say no.",
            "positives": ["a", "b"],
            "before": hits(3, "x " * 3000),
            "after": hits(2, "word"),
        },
    ]
    config = {"data": {"name": HOSTILE, "path": None}, "train": {"steps": 400, "lr": 1e-4}}
    return {
        "results.json": results,
        "config.json": config,
        "examples.json": examples,
        "metrics.jsonl": rows,
    }


def write(folder, run):
    for name, content in run.items():
        if name.endswith(".jsonl"):
            text = "".join(json.dumps(row) + "\n" for row in content)
        else:
            text = json.dumps(content)
        (folder / name).write_text(text)
    return folder


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
def page(tmp_path, monkeypatch):
    """A function from files to the parsed page; without its plots, which take a second or two."""

    def render(run, plots=False):
        if not plots:
            monkeypatch.setattr(report, "_PLOTS", ())
        return Page(write_report(write(tmp_path, run)).read_text(encoding="utf-8"))

    return render


def test_the_page_stands_alone(tmp_path, run, page):
    parsed = page(run, plots=True)
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
    monkeypatch.setattr(report, "_PLOTS", report._PLOTS[-1:])
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
    parsed = page(run, plots=True)
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


def outcome(run, before, after, low, high):
    """The run with another recall@20."""
    results = copy.deepcopy(run["results.json"])
    results["eval"]["before"]["recall@20"], results["eval"]["after"]["recall@20"] = before, after
    difference = {"difference": after - before, "low": low, "high": high}
    results["comparison"]["recall@20"] = difference
    return {**run, "results.json": results}


@pytest.mark.parametrize(
    ("case", "said", "unsaid"),
    [
        ((0.4, 0.5, 0.08, 0.12), "rose from 0.400 to 0.500 (+0.100, 95 % interval +0.080", "fell"),
        (
            (0.5, 0.4, -0.12, -0.08),
            "fell from 0.500 to 0.400 (-0.100, 95 % interval -0.120",
            "rose",
        ),
        ((0.4, 0.41, -0.01, 0.03), "cannot tell the difference from none (+0.010", "rose"),
        ((0.4, 0.39, -0.03, 0.01), "cannot tell the difference from none (-0.010", "fell"),
        ((0.4, 0.41, 0.0, 0.02), "cannot tell the difference from none", "rose"),
        ((0.4, 0.4, 0.0, 0.0), "cannot tell the difference from none", "rose"),
        ((0.4, 0.5, None, None), "without an interval that is no evidence of a change", "rose"),
    ],
)
def test_a_change_is_claimed_only_beyond_its_interval(run, page, case, said, unsaid):
    changed = outcome(run, *case)
    for words in (page(changed).words, summary_table(changed["results.json"]).replace("\n ", "")):
        assert said in words
        assert unsaid not in words


@pytest.mark.parametrize(
    ("stale", "corrected", "said"),
    [
        (1.43, 0.152, "is 1.430 nats (KL) from the fresh one, 0.152 nats once corrected: the "
         "corrector removed 89 % of the KL."),
        (0.5, 0.9, "0.900 nats once corrected: the corrector made it worse."),
        (0.5, 0.5, "0.500 nats (KL) from the fresh one, with the corrector and without it."),
        (0.5, 0.4999, "removed less than 1 % of the KL"),
        (0.5, 1e-5, "removed more than 99 % of the KL"),
        (0.5, None, "no corrected figure was recorded"),
        (0.0, 0.0, "0.000 nats (KL) from the fresh one, with the corrector and without it."),
        (0.0, 0.1, "the corrector made it worse"),
    ],
)  # fmt: skip
def test_the_corrector_gets_its_due(run, page, stale, corrected, said):
    run["results.json"]["distribution"] |= {"kl_stale": stale, "kl_corrected": corrected}
    assert said in page(run).words


def test_refreshes_are_told(run, page):
    assert "never refreshed: 0 targets were re-embedded after the first" in page(run).words
    run["results.json"]["ledger"]["refresh"] = 26793
    words = page(run).words
    assert "was refreshed: 26,793 targets were re-embedded, 3.0 times the corpus." in words
    assert "never refreshed" not in words


def test_a_run_without_a_cache(run, page):
    run["results.json"]["distribution"] = dict.fromkeys(run["results.json"]["distribution"])
    run["metrics.jsonl"] = [
        {key: value for key, value in row.items() if "probe" not in key and "drift" not in key}
        for row in run["metrics.jsonl"]
    ]
    words = page(run).words
    assert "No negatives came from a cache" in words
    assert "never refreshed" not in words
    assert "nats" not in summary_table(run["results.json"])


def cells(parsed_html):
    """[row][column] of the first table."""
    table = re.search(r"<tbody>(.*?)</tbody>", parsed_html, re.S).group(1)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("</tr>")[:-1]]


def test_the_best_of_each_column_is_bold(tmp_path, run, monkeypatch):
    monkeypatch.setattr(report, "_PLOTS", ())
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


def test_half_a_line_is_left_out(tmp_path, run, page):
    path = write(tmp_path, run) / "metrics.jsonl"
    whole, unreadable = report._read_metrics(path)
    assert unreadable == 0
    assert "Unreadable" not in page(run).words
    with open(path, "a") as file:
        file.write('{"step": 400, "train/loss": 99')
    series, unreadable = report._read_metrics(path)
    assert unreadable == 1
    np.testing.assert_equal(series, whole)
    assert "Unreadable lines of metrics.jsonl left out: 1." in write_report(tmp_path).read_text()


def drawn(figure):
    """{label: (x, y)} of the lines of a figure, and its texts."""
    lines = {}
    for ax in figure.axes:
        for line in ax.get_lines():
            lines[line.get_label()] = (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    return lines, " ".join(texts + [ax.get_title(loc="left") for ax in figure.axes])


@pytest.fixture
def draw(tmp_path):
    """A function from files and a plot's name to what is drawn."""

    def from_files(run, name):
        series, _ = report._read_metrics(write(tmp_path, run) / "metrics.jsonl")
        plot = next(plot for plot in report._PLOTS if plot.name == name)
        return drawn(plot.draw(series, run["results.json"], report._LIGHT))

    return from_files


def test_a_step_written_twice_counts_once(run, draw):
    run["metrics.jsonl"].append({"step": 0, "train/loss": 7.5})
    steps, loss = draw(run, "loss")[0]["as logged"]
    assert (np.diff(steps) > 0).all()
    assert loss[0] == 7.5


def test_the_smoothed_loss_is_a_mean_of_neighbours(run, draw):
    lines, _ = draw(run, "loss")
    loss, smooth = lines["as logged"][1], lines["mean of 5 neighbours"][1]
    assert smooth[50] == pytest.approx(loss[48:53].mean())
    assert smooth[0] == pytest.approx(loss[:3].mean())
    assert smooth[-1] == pytest.approx(loss[-3:].mean())


def test_the_exact_kl_is_marked_at_the_end(run, draw):
    lines, said = draw(run, "kl")
    assert lines["corrected cache, all targets: 0.152"] == ([400], [0.1521])
    assert lines["stale cache, probe"][0].tolist() == list(range(0, 401, 40))
    assert said.strip() == ""


def test_recall_is_drawn_with_the_split_it_belongs_to(run, draw):
    lines, _ = draw(run, "recall")
    assert set(lines) >= {"BM25 (test)", "during training (dev)", "before and after (test)"}
    assert lines["BM25 (test)"][1].tolist() == [0.3122] * 2  # of mrr@10, the last panel
    assert lines["before and after (test)"][1].tolist() == [0.2743, 0.3921]
    run["metrics.jsonl"] += [{"step": step, "eval/code-test/recall@20": 0.5} for step in (0, 400)]
    assert "during training (dev)" in draw(run, "recall")[0]  # the one evaluated more often


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss", "train/loss"),
        ("drift", "train/drift train/corrected_error probe/drift probe/corrected_error"),
        ("kl", "probe/kl_stale kl_stale over all targets"),
        ("recall", "recall@100"),
    ],
)
def test_a_plot_without_data_says_what_is_missing(run, draw, page, name, words):
    run["metrics.jsonl"] = [{"step": 0, "other": 1.0, "train/loss": float("nan")}]
    for key in ("eval", "distribution"):
        run["results.json"][key] = {}
    lines, said = draw(run, name)
    assert lines == {}
    assert "nothing to draw, not logged:" in said
    assert words in " ".join(said.split())
    assert "Recall@20 was not measured both before and after training." in page(run).words


def test_a_plot_names_the_series_it_lacks(run, draw):
    for row in run["metrics.jsonl"]:
        row.pop("probe/kl_corrected", None)
    lines, said = draw(run, "kl")
    assert "stale cache, probe" in lines
    assert said.strip() == "not logged: probe/kl_corrected"


@pytest.mark.parametrize("first", [0.0, 3e-15])
def test_no_drift_is_off_the_logarithmic_axis(run, first):
    steps = np.arange(5)
    series = {
        "probe/drift": (steps, np.array([first, 0.1, 0.4, 0.5, 0.6])),
        "probe/corrected_error": (steps, np.array([first, 0.01, 0.01, 0.02, 0.02])),
    }
    plot = next(plot for plot in report._PLOTS if plot.name == "drift")
    figure = plot.draw(series, run["results.json"], report._LIGHT)
    (ax,) = figure.axes
    figure.draw_without_rendering()
    assert ax.get_yscale() == "log"
    assert 0.001 < ax.get_ylim()[0] < 0.01
    assert not np.isfinite(ax.yaxis.get_transform().transform(np.zeros(1)))
    labels = {text.get_text() for text in ax.get_yticklabels()}
    assert labels >= {"0.01", "0.03", "0.1", "0.3"}


def test_one_step_is_enough(run, draw):
    run["metrics.jsonl"] = run["metrics.jsonl"][:1]
    run["results.json"]["steps"] = 1
    assert list(draw(run, "loss")[0]) == ["as logged"]
    assert draw(run, "drift")[0]["stale cache (drift), probe"][1] == [0]
    assert draw(run, "recall")[0]["during training (dev)"][0] == [0]


def test_the_terminal_table_is_narrow_and_complete(run):
    run["results.json"]["ledger"] = dict.fromkeys(run["results.json"]["ledger"], 21_015_324)
    table = summary_table(run["results.json"])
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    assert table.isascii()
    assert lines[0].split() == list(METRICS)
    ends = [match.end() for match in re.finditer(r"\S+", lines[0])]
    columns = [[line[end - 6 : end] for end in ends] for line in lines[1:6]]
    assert [row[1] for row in columns] == [" 0.442", " 0.552", " 0.401", " 0.578", "+0.177"]
    assert [row[4] for row in columns] == [" 0.339", " 0.410", " 0.301", " 0.429", "+0.177"]
    assert "removed 89 %" in " ".join(table.split())
    assert "21,015,324 with gradient" in " ".join(table.split())


def test_the_terminal_table_takes_what_there_is():
    assert "Recall@20 was not measured" in summary_table({})
