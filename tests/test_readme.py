"""What the documents promise: the README's example runs as it stands, both languages say the same, no link is dead."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deltaw import errors
from tests.conftest import ROOT
from tests.data.conftest import write_chat_model

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"]


def example(name: str) -> str:
    block = re.search(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    return block[1]


def test_the_sixty_seconds_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_chat_model(tmp_path / "model")
    records = [{"prompt": f"{n} and one?", "completion": f" {n + 1}"} for n in range(24)]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    code, replaced = re.subn(r'MODEL = "[^"]*"', 'MODEL = "./model"', example("README.md"))
    assert replaced == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


def test_both_languages_show_the_same_code_commands_and_figures() -> None:
    def plain(code: str) -> list[str]:
        return [line.split("# ")[0].rstrip() for line in code.splitlines()]

    assert plain(example("README.md")) == plain(example("README.ko.md"))
    english, korean = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ko.md"))
    for pattern in (r"^\| `deltaw [^|]*\|", r"\]\(results/[^)]*\)", r"\d[\d.,]*\d"):
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


def test_every_result_has_its_command() -> None:
    """benchmarks/README.md names the command behind each file that README.md quotes."""
    quoted = set(re.findall(r"\]\(results/([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
    commands = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert quoted and not {name for name in quoted if name not in commands}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_link_is_dead(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    dead = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not dead


def test_the_page_of_errors_has_each_exit_code() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE))
    classes = [errors.DeltaWError, *errors.DeltaWError.__subclasses__(), errors.Interrupted]
    assert {str(cls.exit_code): cls.__name__ for cls in classes} == {c: n for c, n in rows.items() if c != "143"}
