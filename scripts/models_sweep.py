"""Try an adapter's whole life on every architecture of the installed transformers, each in its own process.

    python -m scripts.models_sweep                    all types without a result; under an hour on one core
    python -m scripts.models_sweep --part 2/4         the second quarter of them
    python -m scripts.models_sweep --again            also types whose last result was not good
    python -m scripts.models_sweep llama t5 whisper   these types, whatever result they have

Each result is a file in .cache/models, so a stopped sweep resumes. At the end they replace those in results/models.json, of
which scripts/models_page.py makes docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests are no installed package
os.environ["OMP_NUM_THREADS"] = "1"  # a process that forks must not have threads

import torch  # noqa: E402
import transformers  # noqa: E402
from tests.conformance.building import NotBuilt, build, classes, folders  # noqa: E402
from tests.conformance.checks import look, without_folders  # noqa: E402

import deltaw  # noqa: E402

SINGLE = ROOT / ".cache" / "models"
RESULTS = ROOT / "results" / "models.json"
SECONDS = 150
"""Processor time for one architecture, in seconds."""
MEMORY = 8 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="folders of transformers/models")
    parser.add_argument("--part", default="1/1", help="which part of how many, for example 2/4")
    parser.add_argument("--again", action="store_true", help="also types whose last result was not good")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    SINGLE.mkdir(parents=True, exist_ok=True)
    rows = known()
    names = arguments.types or [n for n in folders()[part - 1 :: parts] if wanted(rows.get(n), again=arguments.again)]
    prepare()
    for name in names:
        started = time.monotonic()
        row = alone(name)
        row["seconds"] = round(time.monotonic() - started, 1)
        (SINGLE / f"{name}.json").write_text(json.dumps(row, indent=1, ensure_ascii=False), encoding="utf-8")
        print(f"{name}: {outcome(row)} ({row['seconds']} s)", flush=True)
    write_results()


def known() -> dict[str, dict[str, Any]]:
    """Return the result of each type: the committed one, replaced by this machine's where there is one."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["models"] if RESULTS.is_file() else {}
    return rows | {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(SINGLE.glob("*.json"))}


def wanted(row: dict[str, Any] | None, *, again: bool) -> bool:
    if row is None:
        return True
    same = row.get("transformers") == transformers.__version__
    return not same or ("checks" in row and "dense" not in row) or (again and outcome(row) != "✓")


def outcome(row: dict[str, Any]) -> str:
    for key in ("not tried", "refused"):
        if key in row:
            return f"{key}: {row[key][:300]}"
    return "; ".join(f"{name}: {why[:200]}" for name, why in row["checks"].items() if why) or "✓"


def prepare() -> None:
    """Import once what all processes need, before they are forked."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    import peft  # noqa: F401

    for name in deltaw.__all__:
        getattr(deltaw, name)
    for name in folders():
        try:
            classes(name)
        except ImportError:
            continue


def alone(name: str) -> dict[str, Any]:
    """Return the checks' result for one architecture, from a process that may die."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _report(name, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return {"type": name, "not tried": f"its process ended ({status})", "transformers": transformers.__version__}
    return dict(json.loads(text))


def _report(name: str, writing: int) -> None:
    """Write the row and end: the forked process."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    row: dict[str, Any] = {"type": name, "transformers": transformers.__version__}
    try:
        with tempfile.TemporaryDirectory() as folder:
            row |= look(build(name), Path(folder))
    except NotBuilt as error:
        row["not tried"] = str(error)
    except BaseException as error:
        why = f"the check itself failed: {type(error).__name__}: {error}"
        row["not tried"] = without_folders(why, Path(tempfile.gettempdir()))
    os.write(writing, json.dumps(row).encode())
    os._exit(0)


def write_results() -> None:
    """Write all results as one file."""
    rows = dict(sorted(known().items()))
    text = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "minutes": round(sum(row["seconds"] for row in rows.values()) / 60, 1),
        "models": rows,
    }
    RESULTS.write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
