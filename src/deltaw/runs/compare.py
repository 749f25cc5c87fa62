"""Methods compared on a user's own model and data: learning rates on held-out records, the best one of each method on test
records, all with the same records in the same order and the same budget. Prints nothing: it reports events.

A comparison's folder holds data/ (the three sets of records), runs/ (a folder for each candidate), results.json and report.html.
What is finished there is not done again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deltaw.config import CompareConfig, TrainConfig, to_mapping
from deltaw.errors import ConfigError, Interrupted, TrainError
from deltaw.files.formats.atomic import write_text
from deltaw.methods.registry import DEFAULT, METHODS, QUICK, Contestant, contestants, described, rates
from deltaw.runs import splits, timing, worker
from deltaw.runs.evaluation.bootstrap import Measured, compared
from deltaw.runs.evaluation.metrics import MORE_IS_BETTER, of_scores, row_of
from deltaw.runs.folder import claim, read_json, run_settings
from deltaw.runs.memory import machine
from deltaw.runs.reports.compare import comparison_report
from deltaw.runs.reports.page import write as write_report
from deltaw.runs.scoring import scoring_of

SETTINGS, RESULTS, REPORT = "comparison.json", "results.json", "report.html"
# --quick: so that five methods are compared within ten minutes on two cores without bfloat16, most of them for training
_QUICK_MINUTES, _QUICK_VALID, _QUICK_TEST = 0.75, 32, 64
# What inference is timed on: rows and tokens of passes, rows that are decoded; and for how long each, all methods together
_TIMED: dict[str, Any] = {"passes": [[1, 128], [32, 128]], "decoding": [1, 32], "seconds": 600.0}
_QUICK_TIMED: dict[str, Any] = {"passes": [[1, 128], [32, 16]], "decoding": [1], "seconds": 20.0}


@dataclass(frozen=True)
class Progress:
    """Something that happened, for whoever shows it."""

    kind: Literal["started", "finished", "timing"]
    values: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns."""

    folder: Path
    report: Path
    results: dict[str, Any]
    """What results.json holds: a row for each method, each candidate, latencies."""


def compare(
    model: str,
    data: str | Path,
    config: TrainConfig = TrainConfig(),  # noqa: B008  (frozen)
    options: CompareConfig = CompareConfig(),  # noqa: B008  (frozen)
    *,
    on_event: Callable[[Progress], None] = lambda event: None,
) -> Comparison:
    """Train and score each method of `options` with `config`'s budget, and write the report into `config.out`.

    model: a hub id or a folder. data: a file, folder or hub data set, with records as `train` takes them. The learning rate is
    each method's own, not `config.lr`. A folder with a comparison of the same settings is gone on with. A candidate that fails
    (its loss is not finite, say) is reported as failed.

    Raises ConfigError or DataError before any training, and Interrupted after Ctrl-C: what was finished is kept.
    """
    return _Comparison(model, data, config, options, on_event).go()


class _Comparison:
    def __init__(
        self,
        model: str,
        data: str | Path,
        config: TrainConfig,
        options: CompareConfig,
        on_event: Callable[[Progress], None],
    ) -> None:
        self.model, self.data, self.on_event = model, data, on_event
        self.config = dataclasses.replace(config, samples=0)
        if options.quick:
            minutes = None if config.steps else config.minutes or _QUICK_MINUTES
            self.config = dataclasses.replace(
                self.config, minutes=minutes, valid_most=min(config.valid_most, _QUICK_VALID)
            )
        if config.lr != TrainConfig().lr:
            raise ConfigError(
                "Each method has a learning rate of its own: write it in brackets, lora(lr=2e-4), or try --lrs 3."
            )
        self.options = options
        self.test_most = min(options.test_most, _QUICK_TEST) if options.quick else options.test_most
        self.contestants = contestants(options.methods or (QUICK if options.quick else DEFAULT))
        self.folder = Path(config.out)
        self.sets = self.folder / "data"

    def go(self) -> Comparison:
        claim(self.folder, SETTINGS, self._settings(), overwrite=self.config.overwrite)
        source = splits.Source(self.data, self.config.data.split, self.config.valid, self.options.test)
        most = {"valid_most": self.config.valid_most, "test_most": self.test_most}
        splits.write(self.sets, source, self.config.data, **most)
        scoring = scoring_of(self.sets, self.config.data, self.model, self.options.metrics)
        self.data_config, self.metrics, self.chosen_by = scoring.data, list(scoring.metrics), scoring.chosen_by
        chosen = []
        for contestant in self.contestants:
            tried = [self._run(contestant, lr, self.config.seed) for lr in rates(contestant.lr, self.options.lrs)]
            best = min((t for t in tried if "error" not in t), key=self._held_out, default=None)
            seeds = [self.config.seed + i for i in range(1, self.options.seeds)] if best else []
            more = [self._run(contestant, best["task"]["run"]["lr"], seed) for seed in seeds] if best else []
            chosen.append((contestant, tried, best, more))
        found = [self._row(*each) for each in chosen]
        latencies = self._latencies({c.name: best for c, _, best, _ in chosen if best})
        results = {
            "settings": self._settings(),
            "environment": machine.describe(),
            "chosen_by": self.chosen_by,
            "sets": scoring.sets,
            "warnings": list(scoring.warnings),
            "rows": [row for row, _ in found],
            "compared": _compared(found, scoring.metrics[-1]),
            "latency": latencies,
        }
        write_text(self.folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write_report(comparison_report(results), self.folder / REPORT)
        return Comparison(self.folder, self.folder / REPORT, results)

    # --- the folder ---------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """What decides about the candidates' results; not which candidates there are."""
        return {
            "model": self.model, "data": str(self.data), "test": self.options.test, "test_most": self.test_most,
            "valid": self.config.valid, "run": run_settings(self.config),
        }  # fmt: skip

    def _held_out(self, run: dict[str, Any]) -> tuple[float, float]:
        """What a learning rate is chosen by, the least first: the score on held-out records, the loss where scores are equal."""
        score = run["valid_scores"].get(self.chosen_by, run["valid_loss"])
        sign = -1.0 if self.chosen_by in MORE_IS_BETTER else 1.0
        return _least_last(sign, score), _least_last(1.0, run["valid_loss"])

    # --- candidates ---------------------------------------------------------------------------------------------

    def _run(self, contestant: Contestant, lr: float, seed: int) -> dict[str, Any]:
        """A candidate's score: the one that is there, or of a new process. A failed one's is its error."""
        words = re.sub(r"[^\w.=+]+", "-", contestant.name).strip("-")
        folder = self.folder / "runs" / f"{words}-{lr}-{seed}"
        train, valid, test = (str(splits.file_of(self.sets, name)) for name in splits.NAMES)
        run = to_mapping(dataclasses.replace(self.config, data=self.data_config))
        run |= {"lr": lr, "seed": seed, "valid": valid, "split": None}
        del run["out"], run["overwrite"]
        task = {
            "name": contestant.name, "method": contestant.kind, "settings": to_mapping(contestant.method), "model": self.model,
            "train": train, "test": test, "metrics": self.metrics, "run": run,
            "valid_metrics": [] if self.chosen_by == "loss" else [self.chosen_by],
        }  # fmt: skip
        done = read_json(folder / worker.SCORE)
        fresh = done is None or done["task"] != json.loads(json.dumps(task)) or not _has_parts(done)
        if fresh:
            self._tell("started", contestant, lr, seed, {})
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / worker.TASK, json.dumps(task, indent=1, ensure_ascii=False) + "\n")
            _in_a_process("deltaw.runs.worker", folder)
            done = read_json(folder / worker.SCORE)
        assert done is not None
        self._tell("finished", contestant, lr, seed, {**done, "fresh": fresh})
        return done | {"folder": str(folder)}

    def _tell(
        self, kind: Literal["started", "finished"], contestant: Contestant, lr: float, seed: int, more: dict[str, Any]
    ) -> None:
        self.on_event(Progress(kind, {"name": contestant.name, "lr": lr, "seed": seed, **more}))

    def _latencies(self, best: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        if not self.options.latency or not best:
            return []
        runs = {name: run for name, run in best.items() if not METHODS[run["task"]["method"]].trains_everything}
        task: dict[str, Any] = {
            "model": self.model, "dtype": "float32" if self.config.dtype == "auto" else self.config.dtype,
            "device": self.config.device,
            "adapters": {name: str(Path(run["folder"]) / "run" / "adapter") for name, run in runs.items()},
            **(_QUICK_TIMED if self.options.quick else _TIMED),
        }  # fmt: skip
        done = read_json(self.folder / timing.RESULT)
        if done is None or done["task"] != task:
            self.on_event(Progress("timing", {"names": list(task["adapters"])}))
            write_text(self.folder / timing.TASK, json.dumps(task, indent=1, ensure_ascii=False) + "\n")
            _in_a_process("deltaw.runs.timing", self.folder)
            done = read_json(self.folder / timing.RESULT)
        if done is None:
            raise TrainError(f"Timing inference failed; what it said is in {self.folder / 'output.txt'}.")
        found: list[dict[str, Any]] = done["rows"]
        return found

    def _row(
        self,
        contestant: Contestant,
        tried: list[dict[str, Any]],
        best: dict[str, Any] | None,
        more: list[dict[str, Any]],
    ) -> tuple[dict[str, Any], dict[str, Measured]]:
        """What results.json has of a method, and its scores by metric."""
        settings = dict(described(contestant.method))
        row: dict[str, Any] = {"name": contestant.name, "method": contestant.kind, "settings": settings}
        row["tried"] = [
            {
                "lr": t["task"]["run"]["lr"], "valid_loss": t.get("valid_loss"),
                "valid_score": t.get("valid_scores", {}).get(self.chosen_by), "error": t.get("error"),
            }
            for t in tried
        ]  # fmt: skip
        if best is None:
            return row | {"error": tried[0]["error"]}, {}
        figures = {k: v for k, v in best.items() if k not in ("task", "folder", "scores", "valid", "valid_scores")}
        runs = [best, *(run for run in more if "error" not in run)]
        seeds = [run["task"]["run"]["seed"] for run in runs]
        measured = {metric: of_scores([run["scores"][metric] for run in runs], seeds) for metric in best["scores"]}
        scores = {metric: row_of(best["scores"][metric], own, metric) for metric, own in measured.items()}
        return row | {"lr": best["task"]["run"]["lr"], **figures, "scores": scores, "valid": best["valid"]}, measured


def _compared(found: Sequence[tuple[dict[str, Any], dict[str, Measured]]], metric: str) -> list[dict[str, Any]]:
    """The methods beside the best by this metric; of equals the smaller is the better."""
    scored = sorted((each for each in found if each[1]), key=lambda each: each[0]["parameters"])
    measured = {row["name"]: own[metric] for row, own in scored if math.isfinite(own[metric].value)}
    if len(measured) < 2:
        return []
    return [dataclasses.asdict(each) for each in compared(measured, more_is_better=metric in MORE_IS_BETTER)]


def _has_parts(done: dict[str, Any]) -> bool:
    """Whether a score says what each item adds to it, as those of older versions do not."""
    return "error" in done or all("parts" in score for score in done["scores"].values())


def _least_last(sign: float, value: float | None) -> float:
    """To sort by; what is not there, or not a number, comes last."""
    return math.inf if value is None or math.isnan(value) else sign * value


def _in_a_process(module: str, folder: Path) -> None:
    """Run it to its end; what it says goes to FOLDER/output.txt. Raises Interrupted when it was, TrainError when it ended
    without a word."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "output.txt").open("w", encoding="utf-8") as output:
        words = [sys.executable, "-m", module, str(folder)]
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=os.environ | quiet)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C reached it too
            code = Interrupted.exit_code
    if code == Interrupted.exit_code:
        raise Interrupted("Stopped. What was finished is kept: the same command goes on from there.")
    results = [worker.SCORE, timing.RESULT]
    if code < 0 or not any((folder / name).is_file() for name in results):
        raise TrainError(f"{module} ended with {code} and no result; what it said is in {folder / 'output.txt'}.")
