"""What the documents promise: their examples run, both languages say the same, figures stand in results/, commands and links work."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

import deltaw
from deltaw import errors
from deltaw.cli.flags import COMMANDS, train_with
from deltaw.cli.usage import flags_of
from deltaw.cli.words import parse
from deltaw.methods.registry import METHODS, PRESETS, at_width
from deltaw.training.tasks import Causal, Classification
from tests.conftest import ROOT
from tests.data.conftest import write_chat_model

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"]


def example(name: str) -> str:
    block = re.search(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    return block[1]


@pytest.mark.parametrize("document", ["README.md", "docs/python.md"])
def test_the_examples_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_chat_model(tmp_path / "model")
    records = [{"prompt": f"{n} and one?", "completion": f" {n + 1}"} for n in range(24)]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    code, replaced = re.subn(r'MODEL = "[^"]*"', 'MODEL = "./model"', example(document))
    assert replaced == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(code, document, "exec"), {})
    if "my-adapter" in code:
        assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


def test_both_languages_show_the_same_code_commands_and_figures() -> None:
    def plain(code: str) -> list[str]:
        return [line.split("# ")[0].rstrip() for line in code.splitlines()]

    assert plain(example("README.md")) == plain(example("README.ko.md"))
    english, korean = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ko.md"))
    for pattern in (r"^\| `deltaw [^|]*\|", r"\]\((?:results|docs)/[^)]*\)", r"\d[\d.,]*\d"):
        ours, theirs = (sorted(set(re.findall(pattern, text, re.MULTILINE))) for text in (english, korean))
        assert ours == theirs


def test_the_design_names_files_that_exist() -> None:
    """A path in docs/design.md is of src/deltaw/ or of the clone; a name alone follows a path of the same folder."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    roots = (ROOT / "src" / "deltaw", ROOT / "src", ROOT)
    paths = set(re.findall(r"[\w./]*\w/\w+\.py\b", text)) - {"deltaw/merge.py"}  # which would hide a function
    assert len(paths) > 40
    assert not {path for path in paths if not any((root / path).is_file() for root in roots)}
    alone = set(re.findall(r"(?<![\w/])\w+\.py\b", text))
    assert not alone - {file.name for file in roots[0].rglob("*.py")}


# --- figures ----------------------------------------------------------------------------------------------------

BENCHMARKS = ROOT / "docs" / "benchmarks.md"
# Results are in seconds, microseconds, bytes, MB, GB and shares; pages also in milliseconds, minutes, GB and percent
UNITS = [1, 1e3, 1e-3, 1 / 60, 1e-9, 100]


def numbers(value: object) -> Iterator[float]:
    """Yield each number in a result."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def figures(cells: str) -> list[str]:
    """Return the numbers of a text, without those in names such as bf16."""
    return re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*[A-Za-z])", cells.replace(",000", "000"))


def test_every_figure_stands_in_the_results_that_its_row_names() -> None:
    """A figure is a number of the row's files, rounded to its digits, in the same or another unit."""
    rows = [
        line for line in BENCHMARKS.read_text(encoding="utf-8").splitlines() if re.match(r"\| .*\(\.\./results/", line)
    ]
    assert len(rows) > 15
    wrong = []
    for row in rows:
        _, what, *cells, _, _ = row.split("|")
        files = re.findall(r"\(\.\./results/([^)]+)\)", row)
        known = [n for name in files for n in numbers(json.loads((ROOT / "results" / name).read_text()))]
        for figure in figures(" ".join(cells)):
            half = 0.5001 * 10.0 ** -len(figure.partition(".")[2])
            if not any(abs(n * unit - float(figure)) <= half for n in known for unit in UNITS):
                wrong.append(f"{figure} of {what.strip()}: not in {', '.join(files)}")
    assert not wrong


def test_the_figures_of_the_readme_are_those_of_the_benchmarks() -> None:
    page = BENCHMARKS.read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| \[.*\]\(docs/benchmarks.md#.*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) >= 5
    for row in rows:
        assert not [
            figure for figure in figures(" ".join(row.split("|")[2:])) if not re.search(rf"\b{figure}\b", page)
        ], row


def test_every_result_has_its_command() -> None:
    """benchmarks/README.md names the command behind each file that the pages quote."""
    pages = " ".join(path.read_text(encoding="utf-8") for path in (BENCHMARKS, ROOT / "docs" / "memory.md"))
    quoted = set(re.findall(r"\]\(\.\./results/([^)]+)\)", pages))
    commands = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert quoted and not {name for name in quoted if name not in commands}


# --- commands ---------------------------------------------------------------------------------------------------


def written_out(text: str) -> list[list[str]]:
    """Return the words of each `deltaw …` in the blocks of a page."""
    blocks = re.findall(r"```(?:sh|bash|console)?\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip().removeprefix("$ ") for line in lines for part in line.split(" && ")]
    return [shlex.split(part, comments=True)[1:] for part in parts if part.startswith("deltaw ")]


def in_the_text(text: str) -> list[list[str]]:
    """Return the words of each `deltaw …` between the blocks: names, and forms with … and [x]."""
    spans = re.findall(r"`(deltaw [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [re.sub(r"[\[\]]|\|\S+", " ", span).split()[1:] for span in spans]


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d.name != "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_command_is_one(document: Path) -> None:
    """A command that is written out parses; one in the text has a name and flags that there are."""
    text = document.read_text(encoding="utf-8")
    for words in written_out(text):
        if not {"--resume", "--config", "--show-completion"} & {*words}:
            parse(words)
    for words in in_the_text(text):
        assert words[0] in {*COMMANDS, "COMMAND", "--help", "--version"}, words
        if words[0] in COMMANDS and "NAME" not in words:
            method = words[words.index("--method") + 1] if "--method" in words else "lora"
            known = {f.word for f in flags_of(train_with(method) if words[0] == "train" else COMMANDS[words[0]])}
            assert not {w for w in words if w.startswith("--")} - known - {"--help"}, words


def test_the_page_of_commands_has_each_one() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `deltaw (\w+)", page, re.MULTILINE)) == set(COMMANDS)


def test_the_page_of_the_api_has_each_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: deltaw\.(\w+)$", page, re.MULTILINE)) == sorted({*deltaw.__all__} - {"__version__"})


def test_the_page_of_settings_has_the_rates_and_passes_of_the_code() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rates = dict(re.findall(r"^\| `(\w+)` \| ([\d.e-]+) \|", page, re.MULTILINE))
    assert {name: float(rate) for name, rate in rates.items()} == {name: PRESETS[name][1].lr for name in METHODS}
    wide = re.search(r"LoRA ([\d.e-]+) at 2,048 and ([\d.e-]+) at 4,096", page)
    assert wide and [float(rate) for rate in wide.groups()] == [
        at_width(PRESETS["lora"][1].lr, w) for w in (2048, 4096)
    ]
    passes = re.findall(r"^\| ([\d,]+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(passes) > 4
    for records, classes, texts in passes:
        count = int(records.replace(",", ""))
        assert (int(classes), int(texts)) == (Classification.passes.over(count), Causal.passes.over(count))


# --- links ------------------------------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs.yml make them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", h)).strip().lower().replace(" ", "-") for h in headings
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_link_is_dead(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    dead = []
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", text):
        target = document.parent / link if link else document
        if "://" in link:
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor[1:] not in anchors(target)):
            dead.append(link + anchor)
    assert not dead


def test_the_site_has_each_page() -> None:
    """Pages that mkdocs.yml does not list would be in no menu."""
    listed = re.findall(r"([\w/.]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert {path.name for path in ROOT.glob("docs/*.md")} == {name for name in listed if "/" not in name}


@pytest.mark.slow
def test_the_site_is_built_and_loads_nothing_from_a_network(tmp_path: Path) -> None:
    """`make docs` is strict: a dead link or anchor, or a name that the API page cannot find, ends it."""
    pytest.importorskip("mkdocs", reason="make bootstrap installs mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")]
    assert len(pages) > 15 and not [
        t for page in pages for t in re.findall(r'<(?:script|link|img)[^>]*="https?:[^>]*>', page)
    ]


# --- errors -----------------------------------------------------------------------------------------------------


def test_the_page_of_errors_has_each_exit_code() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE))
    classes = [errors.DeltaWError, *errors.DeltaWError.__subclasses__(), errors.Interrupted]
    assert {str(cls.exit_code): cls.__name__ for cls in classes} == {c: n for c, n in rows.items() if c != "143"}
