"""Ranks tried on a user's own model and data: every candidate trained over the one base that is in memory, scored on the same
test records, and the smallest rank that is enough, with what says so. Prints nothing: it reports events.

A sweep's folder holds data/ (the three sets of records), runs/ (a run folder for each candidate), results.json and report.html.
What is finished there is not done again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from deltaw import attached, environment, three_sets
from deltaw.config import GenerateConfig, SweepConfig, TrainConfig, to_mapping
from deltaw.data import Records, read
from deltaw.errors import TrainError
from deltaw.files.atomic import write_text
from deltaw.preparing import Prepared, prepare, with_head
from deltaw.resuming import claim, read_json, run_settings
from deltaw.run import RunResult, run
from deltaw.scoring import scoring_of
from deltaw.study.choice import Choice, Losses, chosen
from deltaw.study.evaluate import evaluate, record_losses
from deltaw.study.metrics import MORE_IS_BETTER
from deltaw.study.report import write as write_report
from deltaw.study.sweep_report import sweep_report
from deltaw.tasks import task_of
from deltaw.tried_ranks import Candidate, candidates, learning_rates

SETTINGS, RESULTS, REPORT, SCORE = "sweep.json", "results.json", "report.html", "score.json"


@dataclass(frozen=True)
class Progress:
    """Something that happened, for whoever shows it."""

    kind: Literal["started", "step", "finished"]
    values: dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What `sweep` returns."""

    folder: Path
    report: Path
    results: dict[str, Any]
    """What results.json holds: a row for each rank and choice of targets, and for each choice of targets the rank chosen."""
    choices: dict[str, Choice]
    """Targets → the smallest rank that is enough. Where one rank was tried alone there is nothing to choose."""


def sweep(
    model: str,
    data: str | Path,
    config: TrainConfig = TrainConfig(),  # noqa: B008  (frozen)
    options: SweepConfig = SweepConfig(),  # noqa: B008  (frozen)
    *,
    on_event: Callable[[Progress], None] = lambda event: None,
) -> Sweep:
    """Train and score every rank of `options` with `config`'s budget, over one base in memory, and write the report into
    `config.out`. Each candidate comes out as `train` alone makes it.

    model: a hub id, folder or GGUF file. data: a file, folder or hub data set, with records as `train` takes them. A folder with
    a sweep of the same settings is gone on with. A candidate whose loss is not finite is reported as failed.

    Raises ConfigError, TargetError or DataError before any training, and Interrupted after Ctrl-C: what was finished is kept.
    """
    return _Sweep(model, data, config, options, on_event).go()


class _Sweep:
    def __init__(
        self,
        model: str,
        data: str | Path,
        config: TrainConfig,
        options: SweepConfig,
        on_event: Callable[[Progress], None],
    ) -> None:
        self.model, self.data, self.options, self.on_event = model, data, options, on_event
        self.config = dataclasses.replace(config, samples=0)
        self.folder = Path(config.out)
        self.sets = self.folder / "data"
        self.base: Prepared | None = None

    def go(self) -> Sweep:
        learning_rates(self.options, self.config.lr)
        claim(self.folder, SETTINGS, self._settings(), overwrite=self.config.overwrite)
        source = three_sets.Source(self.data, self.config.data.split, self.config.valid, self.options.test)
        three_sets.write(self.sets, source, valid_most=self.config.valid_most, test_most=self.options.test_most)
        self.scoring = scoring_of(self.sets, self.config.data, self.model, self.options.metrics)
        every = candidates(self.options, self._base(self.config.seed).loaded.model)
        found = [self._tried(candidate) for candidate in every]
        choices = self._choices(found)
        results = {
            "settings": self._settings() | {"options": to_mapping(self.options)},
            "environment": environment.describe(),
            "chosen_by": self.scoring.chosen_by,
            "rows": [row for row, _ in found],
            "choices": {targets: dataclasses.asdict(choice) for targets, choice in choices.items()},
        }
        write_text(self.folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write_report(sweep_report(results), self.folder / REPORT)
        return Sweep(self.folder, self.folder / REPORT, results, choices)

    def _settings(self) -> dict[str, Any]:
        """What decides about the candidates' results; not which candidates there are."""
        own = {
            "model": self.model,
            "data": str(self.data),
            "test": self.options.test,
            "test_most": self.options.test_most,
        }
        return own | {"valid": self.config.valid, "run": run_settings(self.config)}

    def _base(self, seed: int) -> Prepared:
        """The model in memory. A head that the checkpoint lacks is made by the seed, so there each seed opens the model anew."""
        if self.base is None or (self.base.loaded.untrained and self.base.config.seed != seed):
            self.base = None  # one model at a time
            train, valid = (str(three_sets.file_of(self.sets, name)) for name in ("train", "valid"))
            config = dataclasses.replace(self.config, seed=seed, valid=valid, data=self.scoring.data)
            self.base = prepare(self.model, train, config, None)
        return self.base

    # --- candidates ---------------------------------------------------------------------------------------------

    def _tried(self, candidate: Candidate) -> tuple[dict[str, Any], Losses | None]:
        """Its learning rates, then the other seeds with the best one: its row of the results, and its test losses."""
        tried = [self._run(candidate, lr, self.config.seed) for lr in learning_rates(self.options, self.config.lr)]
        best = min((t for t in tried if "error" not in t), key=self._held_out, default=None)
        row: dict[str, Any] = {"name": candidate.name, "targets": candidate.targets, "rank": candidate.rank}
        row["alpha"] = candidate.method.alpha
        row["tried"] = [
            {"lr": t["task"]["lr"], "valid_loss": t.get("valid_loss"), "error": t.get("error")} for t in tried
        ]
        if best is None:
            return row | {"error": tried[0]["error"]}, None
        lr = best["task"]["lr"]
        more = [self._run(candidate, lr, self.config.seed + i) for i in range(1, self.options.seeds)]
        runs = [best, *(r for r in more if "error" not in r)]
        kept = (
            "parameters",
            "share",
            "bytes",
            "bytes_with_optimizer",
            "step_seconds",
            "seconds",
            "valid",
            "valid_loss",
        )
        scores = {
            metric: {"seeds": [r["scores"][metric]["value"] for r in runs]}
            | {part: statistics.fmean(r["scores"][metric][part] for r in runs) for part in ("value", "low", "high")}
            for metric in best["scores"]
        }
        losses = Losses(np.array([r["losses"]["sums"] for r in runs]), np.array(best["losses"]["counts"]))
        return row | {"lr": lr, **{k: best[k] for k in kept}, "folder": best["folder"], "scores": scores}, losses

    def _held_out(self, run: dict[str, Any]) -> tuple[float, float]:
        """What a learning rate is chosen by, the least first."""
        score = run["valid_scores"].get(self.scoring.chosen_by, run["valid_loss"])
        sign = -1.0 if self.scoring.chosen_by in MORE_IS_BETTER else 1.0
        return (math.inf if math.isnan(score) else sign * score), run["valid_loss"]

    def _run(self, candidate: Candidate, lr: float, seed: int) -> dict[str, Any]:
        """A candidate's score: the one that is there, or of training it now. A failed one's is its error."""
        words = re.sub(r"[^\w.,*]+", "-", candidate.targets).strip("-")
        folder = self.folder / "runs" / f"{words}-r{candidate.rank}-{lr:.2g}-{seed}"
        task = {"lr": lr, "seed": seed, "method": to_mapping(candidate.method), "kind": self.options.method}
        task["metrics"] = list(self.scoring.metrics)
        done = read_json(folder / SCORE)
        fresh = done is None or done["task"] != json.loads(json.dumps(task))
        values = {"name": candidate.name, "lr": lr, "seed": seed}
        if fresh:
            self.on_event(Progress("started", values))
            done = {"task": task, **self._trained(candidate, values, folder)}
            write_text(folder / SCORE, json.dumps(done, ensure_ascii=False) + "\n")
        self.on_event(Progress("finished", {**values, **done, "fresh": fresh}))
        return done | {"folder": str(folder)}

    def _trained(self, candidate: Candidate, values: dict[str, Any], folder: Path) -> dict[str, Any]:
        lr, seed = values["lr"], values["seed"]
        base = self._base(seed)
        config = dataclasses.replace(base.config, lr=lr, seed=seed, out=str(folder), overwrite=True)
        method = with_head(candidate.method, base.loaded.head)
        try:
            result = run(dataclasses.replace(base, config=config, method=method), lambda e: self._hear(e, values))
            return self._scored(base, result)
        except TrainError as error:
            return {"error": str(error)}
        finally:
            attached.detach(base.loaded.model)

    def _hear(self, event: Any, values: dict[str, Any]) -> None:
        if event.kind == "step":
            self.on_event(Progress("step", {**event.values, **values, "step": event.step}))

    def _scored(self, base: Prepared, result: RunResult) -> dict[str, Any]:
        figures, state = result.figures(), result.state
        valid = [[line["step"], line["valid_loss"]] for line in result.log if line["event"] == "eval"]
        by = [self.scoring.chosen_by] if self.scoring.chosen_by != "loss" else []
        task, data = task_of(base.config.data), base.config.data
        examples = task.encode(self._records(base, "test"), base.loaded, data).examples
        sums, counts = record_losses(task.loss(base.loaded), examples, max(16, self.config.batch))
        return {
            "parameters": figures["trainable_parameters"],
            "share": figures["trainable_share"],
            "bytes": figures["adapter_bytes"],
            "bytes_with_optimizer": figures["adapter_bytes"] + 8 * figures["trainable_parameters"],
            "seconds": state.seconds,
            "step_seconds": state.step_seconds / state.step,
            "valid": valid,
            "valid_loss": state.best_loss if self.config.patience else valid[-1][1],
            "valid_scores": {name: score["value"] for name, score in self._scores(base, by, "valid").items()},
            "scores": self._scores(base, self.scoring.metrics, "test"),
            "losses": {"sums": sums, "counts": counts},
        }

    def _records(self, base: Prepared, part: str) -> Records:
        return read(str(three_sets.file_of(self.sets, part)), base.config.data)

    def _scores(self, base: Prepared, metrics: Sequence[str], part: str) -> dict[str, Any]:
        if not metrics:
            return {}
        generation = GenerateConfig(batch=max(16, self.config.batch))
        loaded, data = base.loaded, base.config.data
        with torch.no_grad():
            found = evaluate(
                loaded.model, loaded.tokenizer, self._records(base, part), data, generation, metrics=metrics
            )
        return {name: dataclasses.asdict(score) for name, score in found.scores.items()}

    def _choices(self, found: Sequence[tuple[dict[str, Any], Losses | None]]) -> dict[str, Choice]:
        """Of each choice of targets, where several ranks were trained."""
        by_targets: dict[str, dict[int, Losses]] = {}
        for row, losses in found:
            if losses is not None:
                by_targets.setdefault(row["targets"], {})[row["rank"]] = losses
        return {t: chosen(own, self.options.margin) for t, own in by_targets.items() if len(own) > 1}
