"""Where a benchmark's result goes: results/NAME.json, with the machine, versions and date."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from deltaw.runs.memory.machine import describe

RESULTS = Path(__file__).resolve().parents[1] / "results"


def write(name: str, result: dict[str, Any]) -> Path:
    """Write results/NAME.json and show it."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    whole = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "machine": describe(), **result}
    text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
    print(text)
    return path
