"""Run the commands of a page of docs/ and write what they print into it.

    python -m scripts.run_page docs/first_run.md          # from the clone, into a scratch folder

A block of the language `console` holds commands, each after "$ ", with what they print below. A comment before a block,
`<!-- keep 9 6 -->`, leaves the first 9 and the last 6 lines of each output, with … between them. Some commands take minutes.
A command that fails ends the script.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?:<!-- keep (\d+) (\d+) -->\n)?```console\n(.*?)```", re.DOTALL)
WIDTH = "100"


def main() -> None:
    page = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "examples").symlink_to(ROOT / "examples")
        begin = 0
        while block := BLOCK.search(text := page.read_text(encoding="utf-8"), begin):
            shown = ran(block, Path(scratch))
            begin = block.start() + len(shown)
            page.write_text(text[: block.start()] + shown + text[block.end() :], encoding="utf-8")


def ran(block: re.Match[str], folder: Path) -> str:
    """Return a block with what its commands print now."""
    first, last = (int(block[1]), int(block[2])) if block[1] else (1000, 0)
    shown = []
    for command in commands(block[3]):
        print(f"$ {command}", flush=True)
        shown.append(f"$ {command}\n" + "\n".join(cut(output(command, folder).splitlines(), first, last)).rstrip())
    return block[0][: block.start(3) - block.start(0)] + "\n\n".join(part.rstrip() for part in shown) + "\n```"


def commands(text: str) -> list[str]:
    """Return the commands of a block, a command over several lines as it stands."""
    return re.findall(r"^\$ (.*?[^\\])$", text, re.MULTILINE | re.DOTALL)


def output(command: str, folder: Path) -> str:
    """Run a command as the reader does, in `folder`, and return what it prints."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "COLUMNS": WIDTH,
    }
    process = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if process.returncode:
        sys.exit(f"{process.stdout}\nThe command failed with exit code {process.returncode}.")
    return process.stdout


def cut(lines: list[str], first: int, last: int) -> list[str]:
    """Return the first and last lines, with … for those between, without spaces at the ends of lines."""
    lines = [line.rstrip() for line in lines]
    return lines if len(lines) <= first + last + 1 else [*lines[:first], "…", *lines[len(lines) - last :]]


if __name__ == "__main__":
    main()
