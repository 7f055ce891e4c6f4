"""What the docs tell to type is typed here: on tiny data, with sizes overridden.

Every command is parsed and validated as main does it, so that a misspelt key fails at once, and one
of each mode is run; `make slow` runs all of them.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import array_record.python.array_record_data_source  # noqa: F401 - its flags, before any are saved
import pytest
from absl.testing import flagsaver

from corrector_jax import config as configs
from corrector_jax import main
from corrector_jax.strategies import STRATEGIES, Strategy
from corrector_jax.train import train
from tests import published_files, tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "launch" / "README.md"])
FENCE = re.compile(r"^```([^`\n]*)\n(.*?)^```$", re.M | re.S)
SHELL = ("python", "make", "pip", "source", "cd", "git", "./")
VARIABLE = re.compile(r"[A-Z_]+=\S*$")


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a page.

    Attributes:
      page: where it stands.
      variables: NAME=VALUE before it.
      words: the command and its arguments.
    """

    page: str
    variables: tuple[str, ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.page, *self.words))

    @property
    def module(self) -> str:
        """NAME of `python -m NAME`, or of `python NAME`, as a module."""
        if not self.words[0].endswith("python"):
            return ""
        if self.words[1] == "-m":
            return self.words[2]
        return self.words[1].removesuffix(".py").replace("/", ".")

    @property
    def arguments(self) -> tuple[str, ...]:
        """What the module is given."""
        return self.words[3:] if self.words[1] == "-m" else self.words[2:]

    @property
    def mode(self) -> str:
        """--mode."""
        return next((w.partition("=")[2] for w in self.words if w.startswith("--mode=")), "train")


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in these languages."""
    for language, content in FENCE.findall(page.read_text()):
        if language in languages:
            yield content


def is_shell(block: str) -> bool:
    """Whether a block that does not say what it is holds commands."""
    first = block.strip().split(maxsplit=1)[0]
    return first.startswith((*SHELL, ".venv", "launch/")) or bool(VARIABLE.match(first))


def commands_of(page: Path) -> Iterator[Command]:
    """Every command of a page's shell blocks."""
    for block in (*blocks(page, "sh", "bash"), *filter(is_shell, blocks(page, ""))):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            count = next((i for i, w in enumerate(words) if not VARIABLE.match(w)), len(words))
            if words:
                name = str(page.relative_to(ROOT))
                yield Command(name, tuple(words[:count]), tuple(words[count:]))


COMMANDS = [command for page in PAGES for command in commands_of(page)]
MAIN = [command for command in COMMANDS if command.module == "corrector_jax.main"]


@contextlib.contextmanager
def typed(arguments: tuple[str, ...]) -> Iterator[None]:
    """As if main had been started with them: ml_collections looks at sys.argv for overrides."""
    before = sys.argv
    sys.argv = ["main", *arguments]
    try:
        with flagsaver.flagsaver():
            yield
    finally:
        sys.argv = before


def parsed(arguments: tuple[str, ...]):
    """The configuration that main makes of its arguments; all flags as they were."""
    with typed(arguments):
        rest = main._parse(["main", *arguments])
        assert main._MODE.value == "compare" or len(rest) == 1, rest
        return main._CONFIG.value


def test_no_command_escapes():
    for page in PAGES:
        fenced = "".join(content for _, content in FENCE.findall(page.read_text()))
        told = len(re.findall(r"python -m corrector_jax\.main|launch/\w+\.sh", fenced))
        found = [c for c in commands_of(page) if c.module or c.words[0].startswith("launch/")]
        found = [c for c in found if c.module in ("corrector_jax.main", "")]
        assert len(found) == told, page
    assert len(MAIN) > 30
    assert {command.mode for command in MAIN} == set(main_modes())


def main_modes() -> list[str]:
    """Every mode of main, as it lists them itself."""
    return re.findall(r'^        "(\w+)": ', (ROOT / "corrector_jax" / "main.py").read_text(), re.M)


@pytest.mark.parametrize("command", MAIN, ids=str)
def test_every_command_of_main_is_one_that_main_accepts(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parsed(command.arguments)
    if config is not None:
        configs.validate(config)


@pytest.mark.parametrize("key", ["config.train.stps=1", "config.strategy=corected"])
def test_a_misspelt_key_or_word_is_found(key, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(main.UserError):
        configs.validate(parsed(("--config=configs/own.py", f"--{key}")))


def options(module: str) -> set[str]:
    """Every option that a module's source adds to a parser."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    added = [
        c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument"
    ]
    return {ast.literal_eval(call.args[0]) for call in added}


def test_benchmarks_that_pages_name_exist_with_these_options_and_keys():
    told = [c for c in COMMANDS if c.module.startswith("benchmarks")]
    text = "\n".join(page.read_text() for page in PAGES)
    for module in {*re.findall(r"-m (benchmarks\.\w+)", text), *(c.module for c in told)}:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    assert len(told) > 5
    for command in told:
        for word in command.arguments:
            name = word.partition("=")[0]
            if name.startswith("--config."):
                assert name.removeprefix("--config.") in dict(configs.flat(configs.default())), word
            elif name.startswith("--"):
                assert name in options(command.module), command


def test_make_has_every_target_that_pages_name():
    made = re.findall(r"^([\w.%-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    prose = "\n".join(page.read_text() for page in PAGES)
    told = {c.words[1] for c in COMMANDS if c.words[0] == "make"}
    told |= set(re.findall(r"`make ([\w.-]+)`", prose))
    assert {"quickstart", "test", "docs", "notebooks"} <= told
    assert {re.sub(r"3\.\d+$", "3.%", name) for name in told} <= set(made)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0][:7] == "launch/"], ids=str)
def test_launchers_take_these_variables_and_their_arguments_are_main_s(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = os.environ | dict(v.split("=", 1) for v in command.variables)
    arguments = [word for word in command.words[1:] if word != "--dry-run"]
    done = subprocess.run(
        ["bash", command.words[0], "--dry-run", *arguments],
        env=given, cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    configs.validate(parsed(tuple(arguments)))


# ---- keys, names and modules in prose


def test_keys_and_flags_in_prose_are_known():
    keys = dict(configs.flat(configs.default()))
    for page in PAGES:
        text = FENCE.sub("", page.read_text())
        for key in re.findall(r"--config\.([\w.]+\w)", text):
            assert key in keys, (page.name, key)
        for code in re.findall(r"`([a-z]+\.[a-z_]+)(?:=[^`]*)?`", text):
            group, _, name = code.partition(".")
            if group in configs.default() and name not in ("py", "md", "json", "jsonl", "html"):
                assert code in keys or name == "*", (page.name, code)


def test_every_module_is_in_the_reference():
    files = (ROOT / "corrector_jax").rglob("*.py")
    modules = {".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files}
    modules = {m for m in modules if not m.endswith("__init__")}
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    assert sorted(re.findall(r"automodule:: (\S+)", text)) == sorted(modules)


def test_every_page_is_in_a_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    named = "\n".join(
        block for block in re.findall(r"^```{toctree}\n(.*?)^```", index, re.M | re.S)
    )
    for page in PAGES:
        if page.name != "index.md":
            assert str(os.path.relpath(page.with_suffix(""), ROOT / "docs")) in named.split(), page


WITHOUT = """
import sys
sys.modules |= dict.fromkeys(("scann", "tensorflow_datasets", "tensorflow", "torch"))
import importlib, pkgutil
import corrector_jax
for found in pkgutil.walk_packages(corrector_jax.__path__, "corrector_jax."):
    if found.name not in {apart}:
        importlib.import_module(found.name)
from corrector_jax import config, index, main
main._parse(["main", "--config=configs/quickstart.py"])
config.validate(main._CONFIG.value)
print(index.why_not())
"""


def test_without_what_docs_machines_calls_dispensable_the_package_imports_and_says_so():
    # Only --mode=prepare_data imports the one that is left out, and main imports modes late.
    code = WITHOUT.replace("{apart}", repr(["corrector_jax.data.builders"]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "scann" in done.stdout  # the reason


# ---- run for real


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """A folder where the paths that pages use as examples exist, on tiny data."""
    tiny.overrides(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "mine")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "corpus.jsonl").symlink_to(tmp_path / "data" / "corpus.jsonl")
    (tmp_path / "DIR").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    """Main in this process, as its command line would run it; returns the exit code."""
    with typed(arguments):
        rest = main._parse(["main", *arguments])
        try:
            main.main(rest)
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def told(page: str, mode: str, number: int = 0) -> list[str]:
    """The arguments of a command of a page."""
    found = [c for c in MAIN if c.page == page and c.mode == mode]
    return list(found[number].arguments)


def test_check_data_and_mine_as_told(place, capsys):
    data = [f"--config.{k}={v}" for k, v in tiny.overrides(place).items() if k != "data.path"]
    arguments = [a.replace("DIR_OR_FILE", "DIR") for a in told("README.md", "check_data")]
    assert run(*arguments, *data) == 0
    assert "67 targets" in capsys.readouterr().out
    assert run(*told("docs/data.md", "mine"), *data) == 0
    assert (place / "runs" / "mined" / "negatives.trec").stat().st_size


def test_inspect_and_export_as_told(place, capsys):
    assert run(*told("docs/checkpoints.md", "inspect")) == 0
    shutil.rmtree(place / "runs" / "mine" / "final")
    for number in (0, 1):
        assert run(*told("docs/export.md", "export", number)) == 0
    for folder in (place / "runs" / "mine" / "final", place / "exported"):
        assert json.loads((folder / "modules.json").read_text())


def test_embed_as_told_and_the_page_s_program_reads_it(place):
    _, shared = (told("docs/export.md", "embed", n) for n in (0, 1))
    for part in range(4):
        assert run(*shared, f"--config.embed.part={part}", "--config.embed.shard_rows=20") == 0
    (code,) = blocks(ROOT / "docs" / "export.md", "python")
    made: dict = {}
    exec(code, made)
    assert made["rows"].shape == (tiny.TARGETS, 16)
    assert made["ids"] == [f"t{row}" for row in range(tiny.TARGETS)]


def test_search_and_compare_as_told(place, capsys):
    shutil.copytree(place / "runs" / "mine", place / "runs" / "one")
    shutil.copytree(place / "runs" / "mine", place / "runs" / "other")
    arguments = told("docs/search.md", "search")
    assert run(*[a.replace("runs/quickstart", "runs/mine") for a in arguments]) == 0
    said = capsys.readouterr().out
    assert "rank: " in said, said  # where the other model has that target
    assert run(*told("docs/search.md", "compare")) == 0
    assert (place / "compare.html").stat().st_size


@pytest.mark.slow  # tests/test_compile_ahead.py compiles with the others
def test_compile_as_told(place):
    # The topology of the page is a pod's; the tests of compile mode have the TPU compiler's.
    sizes = [f"--config.{k}={v}" for k, v in tiny.overrides(place).items()]
    sizes += ["--topology=cpu:2", "--config.mesh.devices=0", "--config.compile.targets=300"]
    sizes += ["--config.compile.queries=16", "--config.train.chunk=0"]
    arguments = [a for a in told("docs/scale.md", "compile") if not a.startswith("--topology")]
    assert run(*arguments, *sizes) == 0
    (plan,) = (place / "runs" / "nq" / "compile").glob("*.json")
    assert json.loads(plan.read_text())


def test_a_snapshot_s_rows_are_read_as_told(place):
    (code,) = blocks(ROOT / "docs" / "checkpoints.md", "python")
    made: dict = {}
    exec(code, made)
    assert made["rows"].shape[1] == 16


@pytest.fixture
def distinct(monkeypatch):
    """The strategy of docs/extending.md, added as the page adds it."""
    (code,) = blocks(ROOT / "docs" / "extending.md", "python")
    for name in ("STRATEGIES", "WORDS"):  # restored afterwards
        monkeypatch.setattr(configs, name, dict(getattr(configs, name)))
    exec(code, {"STRATEGIES": configs.STRATEGIES, "Strategy": Strategy})
    configs.WORDS["strategy"] = tuple(configs.STRATEGIES)  # made of it when it is imported
    for name, strategy in configs.STRATEGIES.items():
        monkeypatch.setitem(STRATEGIES, name, strategy)


def test_the_strategy_of_the_page_is_one(distinct, tmp_path):
    config = tiny.config(tmp_path, strategy="distinct")
    words = configs.chosen(config)
    assert (words["proposal"], words["corrector"]) == ("gumbel_topk", "linear")
    with pytest.raises(main.UserError, match="which strategy 'distinct' does not allow"):
        tiny.config(tmp_path, strategy="distinct", negatives__proposal="two_level")


@pytest.mark.slow
def test_the_strategy_of_the_page_trains(distinct, tmp_path):
    config = tiny.config(tmp_path, strategy="distinct", refresh__threshold=1e-6)
    train(config, tmp_path / "run", started=time.monotonic())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 8


# ---- every command of every page


def sizes(command: Command, folder: Path) -> dict[str, object]:
    """What makes a command's run tiny; the paths in it exist below `folder`."""
    made = tiny.overrides(folder)
    text = " ".join(command.words)
    reader = "rlm_" in text or "reader.weights" in text
    if reader:
        made |= tiny.reader_overrides(folder) | {"reader.warmup": 1}
    if published := re.search(r"configs/(?:rlm_)?(nq|msmarco|triviaqa|hotpotqa)\.py", text):
        everything = folder / "everything"
        if not everything.exists():
            published_files.write(published[1], everything)
        made |= {"data.path": str(everything), "data.verify": False}
    made |= {"eval.full_encoder": False, "train.chunk": 0, "train.remat": False}
    made |= {"negatives.candidates": 16, "negatives.tail": 16, "negatives.path": ""}
    if "negatives.path" in text:
        del made["negatives.path"]
    if command.mode == "compile":
        made |= {"compile.targets": 300, "compile.queries": 16, "mesh.devices": 0}
    return made


def tamed(command: Command, folder: Path) -> list[str]:
    """The arguments of a command as they are run here."""
    arguments = [re.sub(r"=DIR(_OR_FILE)?$", "=DIR", word) for word in command.arguments]
    if command.mode == "compile":
        arguments = [word for word in arguments if not word.startswith("--topology")]
        arguments.append("--topology=cpu:2")
    if any(word.startswith("--config=") for word in arguments):
        arguments += [f"--config.{key}={value}" for key, value in sizes(command, folder).items()]
    return arguments


SERVED = "serve"
"""The one mode that does not end by itself: tests/test_serve.py starts and stops it."""


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({command.page for command in MAIN}))
def test_every_command_of_a_page_runs(page, place, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError))
    monkeypatch.setattr("sys.stdin", io.StringIO("some words\n"))
    for name in ("quickstart", "one", "other"):
        shutil.copytree(place / "runs" / "mine", place / "runs" / name)
    for command in (c for c in MAIN if c.page == page and c.mode != SERVED):
        arguments = tamed(command, place)
        workdirs = [w for w in arguments if w.startswith("--workdir=")]
        if command.mode == "train":
            workdir = workdirs[0].removeprefix("--workdir=") if workdirs else "runs/unnamed"
            if (place / workdir / "checkpoints").exists():  # another run is there
                shutil.rmtree(place / workdir)
            if not workdirs:
                arguments.append(f"--workdir={workdir}")
        assert run(*arguments) == 0, command
