"""One candidate of a comparison, in a process of its own: train, score on the test records, say what it took.

    python -m deltaw.runs.worker FOLDER

FOLDER/candidate.json says what to do; FOLDER/score.json is what came out, with the run's own files beside it. A process of its
own, because the most memory that a process has held is of all that it has done.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from deltaw.errors import DeltaWError, TargetError

TASK, SCORE = "candidate.json", "score.json"


def main(folder: Path) -> int:
    """Exit code: 0, or that of the error, which is in score.json."""
    from deltaw.files.formats.atomic import write_text

    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    try:
        score = run(task, folder)
        code = 0
    except DeltaWError as error:
        score, code = {"error": str(error)}, error.exit_code
    if code != 130:  # what was interrupted is done again
        write_text(folder / SCORE, json.dumps({"task": task, **score}, indent=1, ensure_ascii=False) + "\n")
    return code


def run(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The candidate trained and scored."""
    import torch

    from deltaw.config import TrainConfig, from_mapping
    from deltaw.methods.registry import method_class
    from deltaw.runs.train import train
    from deltaw.training.events import Event, Started

    method = from_mapping(method_class(task["method"]), task["settings"], where=task["name"])
    config = from_mapping(TrainConfig, {**task["run"], "out": str(folder / "run"), "overwrite": True}, where="run")
    memory = _Memory()

    def hear(event: Event) -> None:
        if isinstance(event, Started):
            memory.loaded()

    notes: list[str] = []
    try:
        result = train(task["model"], task["train"], config, method=method, on_event=hear)
    except TargetError:
        if (instead := method.instead()) is None:
            raise
        notes.append(instead.note)
        result = train(task["model"], task["train"], config, method=instead.method, on_event=hear)
    speeds = [line for line in result.log if line["event"] == "step"]
    figures = result.figures()
    torch.set_grad_enabled(False)
    return {
        "notes": notes,
        "parameters": figures["trainable_parameters"],
        "share": figures["trainable_share"],
        "bytes": figures["adapter_bytes"],
        "bytes_with_optimizer": figures["bytes_with_optimizer"],
        "base_bytes": figures["base_bytes"],
        "memory": memory.over_the_loaded_model(),
        "seconds": result.state.seconds,
        "steps": result.state.step,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in speeds[1:] or speeds),
        "step_seconds": result.state.step_seconds / result.state.step,
        "valid_loss": result.state.best_loss if config.patience else _last_valid(result.log),
        "valid": [[line["step"], line["valid_loss"]] for line in result.log if line["event"] == "eval"],
        "valid_scores": {
            k: score["value"] for k, score in scores(result, task["valid_metrics"], config.valid, config).items()
        },
        "scores": scores(result, task["metrics"], task["test"], config),
    }


def scores(result: Any, metrics: list[str], records: Any, config: Any) -> dict[str, Any]:
    """Metric → value, its 95% interval, and each item's part in it, on the records of a file."""
    from deltaw.config import GenerateConfig
    from deltaw.data import read
    from deltaw.runs.evaluation.bootstrap import shortened
    from deltaw.runs.evaluation.evaluate import evaluate

    if not metrics:
        return {}
    generation = GenerateConfig(batch=max(16, config.batch))
    found = evaluate(
        result.model, result.tokenizer, read(records, config.data), config.data, generation, metrics=metrics
    )
    return {name: score.plain() | {"parts": shortened(score.parts)} for name, score in found.scores.items()}


def _last_valid(log: list[dict[str, Any]]) -> float | None:
    losses = [line["valid_loss"] for line in log if line["event"] == "eval"]
    return losses[-1] if losses else None


class _Memory:
    """The most memory that training has held over that of the loaded model and its adapter; None where it cannot be told."""

    def __init__(self) -> None:
        self.before: int | None = None

    def loaded(self) -> None:
        """Now the model is loaded, and its adapter attached."""
        import torch

        if torch.cuda.is_available() and torch.cuda.memory_allocated():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
            except OSError:
                return
            self.before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def over_the_loaded_model(self) -> int | None:
        import torch

        if self.before is None:
            return None
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return torch.cuda.max_memory_allocated() - self.before
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        return max(0, peak - self.before)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
