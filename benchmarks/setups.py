"""Name the studies of real data by real models: what is trained on what, as readers know it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import deltaw
import machine


@dataclass(frozen=True)
class Setup:
    model: str
    data: str
    """Their names, for readers."""
    config: deltaw.TrainConfig
    options: Any
    """Of the study: CompareConfig or SweepConfig."""


def glue(data: str, options: Any, *, steps: int, **settings: Any) -> Setup:
    """MiniLM on one of GLUE's tasks."""
    reading = deltaw.DataConfig(max_length=128)
    config = deltaw.TrainConfig(data=reading, steps=steps, batch=16, eval_every=steps, dtype="float32", **settings)
    return Setup("all-MiniLM-L6-v2", data, config, options)


def write(name: str, results: dict[str, Any], setup: Setup) -> None:
    """results/NAME.json, without the paths of this machine."""
    results["settings"] |= {"model": setup.model, "data": setup.data}
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (machine.RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
