"""Ranks tried on a user's own model and data: every candidate trained over the one base that is in memory, scored on the same
test records, and the smallest rank that is enough, with what says so. Prints nothing: it reports events.

A sweep's folder holds data/ (the three sets of records), runs/ (a run folder for each candidate), results.json and report.html.
What is finished there is not done again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np

from deltaw.config import GenerateConfig, SweepConfig, TrainConfig, to_mapping
from deltaw.data import read
from deltaw.errors import DataError, TrainError
from deltaw.files.formats.atomic import write_text
from deltaw.model import attach
from deltaw.model.switch import use
from deltaw.runs import splits
from deltaw.runs.candidates import Candidate, candidates, learning_rates, width_of
from deltaw.runs.directions import alike, in_common
from deltaw.runs.evaluation.bootstrap import Choice, Measured, chosen, compared, of_losses, shortened
from deltaw.runs.evaluation.evaluate import Evaluation, evaluate
from deltaw.runs.evaluation.metrics import MORE_IS_BETTER, of_scores, row_of
from deltaw.runs.folder import claim, finished, read_json, run_settings
from deltaw.runs.memory import machine
from deltaw.runs.reports.page import write as write_report
from deltaw.runs.reports.sweep import sweep_report
from deltaw.runs.scoring import scoring_of
from deltaw.runs.train import RunResult, run_abreast
from deltaw.training.events import Event, Stepped
from deltaw.training.prepare import Prepared, prepare, with_head

SETTINGS, RESULTS, REPORT, SCORE = "sweep.json", "results.json", "report.html", "score.json"
# Where the worse half ends, if it is to: shares of the run
_RUNGS = (0.25, 0.5)
_KEPT = (
    "parameters", "share", "bytes", "bytes_with_optimizer", "step_seconds", "seconds", "valid", "valid_loss",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One run."""

    candidate: Candidate
    lr: float
    seed: int

    def named(self) -> dict[str, Any]:
        return {"name": self.candidate.name, "lr": self.lr, "seed": self.seed}


@dataclass(frozen=True)
class Progress:
    """Something that happened, for whoever shows it."""

    kind: Literal["left out", "width", "started", "step", "finished"]
    values: dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What `sweep` returns."""

    folder: Path
    report: Path
    results: dict[str, Any]
    """What results.json holds: a row for each rank and choice of targets, for each choice of targets the rank chosen, and where
    there are several choices of targets, all candidates compared."""
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
        self.width: int | None = None

    def go(self) -> Sweep:
        learning_rates(self.options, self.config.lr)
        claim(self.folder, SETTINGS, self._settings(), overwrite=self.config.overwrite)
        source = splits.Source(self.data, self.config.data.split, self.config.valid, self.options.test)
        most = {"valid_most": self.config.valid_most, "test_most": self.options.test_most}
        splits.write(self.sets, source, self.config.data, **most)
        self.scoring = scoring_of(self.sets, self.config.data, self.model, self.options.metrics)
        tried = candidates(self.options, self._base(self.config.seed).loaded.model)
        for targets, why in tried.left_out.items():
            self.on_event(Progress("left out", {"targets": targets, "why": why}))
        found = self._rows(tried.candidates)
        choices = choices_of(found, self.options.margin)
        results = {
            "settings": self._settings() | {"options": to_mapping(self.options)},
            "environment": machine.describe(),
            "chosen_by": self.scoring.chosen_by,
            "left_out": tried.left_out,
            "sets": self.scoring.sets,
            "warnings": list(self.scoring.warnings),
            "rows": [row for row, _ in found],
            "choices": {targets: dataclasses.asdict(choice) for targets, choice in choices.items()},
            "compared": compared_of(found),
            "alike": self._alike([row for row, losses in found if losses is not None], choices),
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
            "halving": self.options.halving,
        }
        return own | {"valid": self.config.valid, "run": run_settings(self.config)}

    def _base(self, seed: int) -> Prepared:
        """The model in memory. A head that the checkpoint lacks is made by the seed, so there each seed opens the model anew."""
        if self.base is None or (self.base.loaded.untrained and self.base.config.seed != seed):
            self.base = None  # one model at a time
            train, valid = (str(splits.file_of(self.sets, name)) for name in ("train", "valid"))
            config = dataclasses.replace(self.config, seed=seed, valid=valid, data=self.scoring.data)
            self.base = prepare(self.model, train, config, None)
        return self.base

    # --- candidates ---------------------------------------------------------------------------------------------

    def _rows(self, every: Sequence[Candidate]) -> list[tuple[dict[str, Any], Measured | None]]:
        """Of each candidate all learning rates, then the other seeds with the best one: its row of the results, and its losses
        on the test records."""
        rates, seed = learning_rates(self.options, self.config.lr), self.config.seed
        rungs = _RUNGS if self.options.halving else ()
        first = self._done([Task(c, lr, seed) for c in every for lr in rates], rungs)
        tried = {c: [first[Task(c, lr, seed)] for lr in rates] for c in every}
        best = {c: min((r for r in own if "scores" in r), key=self._held_out, default=None) for c, own in tried.items()}
        others = [
            Task(c, run["task"]["lr"], seed + i) for i in range(1, self.options.seeds) for c, run in best.items() if run
        ]
        more = self._done(others)
        found = []
        for candidate, own in best.items():
            runs = (
                []
                if own is None
                else [own, *(run for task, run in more.items() if task.candidate == candidate and "scores" in run)]
            )
            found.append(_row(candidate, tried[candidate], runs))
        return found

    def _held_out(self, run: dict[str, Any]) -> tuple[float, float]:
        """What a learning rate is chosen by, the least first."""
        score = run["valid_scores"].get(self.scoring.chosen_by, run["valid_loss"])
        sign = -1.0 if self.scoring.chosen_by in MORE_IS_BETTER else 1.0
        return (math.inf if math.isnan(score) else sign * score), run["valid_loss"]

    def _done(self, tasks: Sequence[Task], rungs: Sequence[float] = ()) -> dict[Task, dict[str, Any]]:
        """Task → what its run came to: what is there already, or of training it now; of a failed one its error."""
        found = {task: self._known(task) for task in tasks}
        for seed in dict.fromkeys(task.seed for task in tasks):
            left = [task for task in tasks if task.seed == seed and found[task] is None]
            for part in self._portions(left, all_at_once=bool(rungs)):
                found |= self._trained(part, rungs)
        return {task: (done or {}) | {"folder": str(self._folder(task))} for task, done in found.items()}

    def _folder(self, task: Task) -> Path:
        targets = quote(task.candidate.targets, safe=",*")  # each its own folder, whatever the pattern
        return self.folder / "runs" / f"{targets}-r{task.candidate.rank}-{task.lr}-{task.seed}"

    def _key(self, task: Task) -> dict[str, Any]:
        """What decides about a run's result."""
        method = to_mapping(task.candidate.method)
        key = {"lr": task.lr, "seed": task.seed, "method": method, "kind": self.options.method}
        plain: dict[str, Any] = json.loads(json.dumps(key | {"metrics": list(self.scoring.metrics)}))
        return plain

    def _known(self, task: Task) -> dict[str, Any] | None:
        done: dict[str, Any] | None = read_json(self._folder(task) / SCORE)
        if done is None or done["task"] != self._key(task):
            return None
        if "losses" in done and not _by_item(done):
            return None
        self.on_event(Progress("finished", task.named() | done | {"fresh": False}))
        return done

    def _portions(self, tasks: Sequence[Task], *, all_at_once: bool) -> Iterator[Sequence[Task]]:
        """The tasks in groups that are in memory together; what was chosen is said once."""
        if not tasks:
            return
        base = self._base(tasks[0].seed)
        if self.width is None:
            largest = max((task.candidate for task in tasks), key=lambda c: c.rank)
            self.width, why = width_of(self.options.abreast, dataclasses.replace(base, method=largest.method))
            self.on_event(Progress("width", {"width": self.width, "why": why}))
        size = len(tasks) if all_at_once else self.width
        for i in range(0, len(tasks), size):
            yield tasks[i : i + size]

    def _trained(self, tasks: Sequence[Task], rungs: Sequence[float]) -> dict[Task, dict[str, Any]]:
        """All of one seed, in one model."""
        base = self._base(tasks[0].seed)
        assert self.width is not None
        ready = []
        for task in tasks:
            config = dataclasses.replace(
                base.config, lr=task.lr, seed=task.seed, out=str(self._folder(task)), overwrite=True
            )
            method = with_head(task.candidate.method, base.loaded.head)
            ready.append(dataclasses.replace(base, config=config, method=method))
            self.on_event(Progress("started", task.named()))
        try:
            results = run_abreast(
                ready, self.width, rungs=rungs, on_event=lambda i, event: self._hear(event, tasks[i].named())
            )
            return {
                task: self._kept(base, task, i, result)
                for i, (task, result) in enumerate(zip(tasks, results, strict=True))
            }
        finally:
            attach.detach(base.loaded.model)

    def _kept(self, base: Prepared, task: Task, number: int, result: RunResult | TrainError) -> dict[str, Any]:
        """A run's score, written beside it."""
        use(base.loaded.model, str(number))
        if isinstance(result, TrainError):
            done: dict[str, Any] = {"error": str(result)}
        elif result.state.stopped == "behind":
            done = {"behind": result.state.step, "valid_loss": result.state.valid_loss}
        else:
            try:
                done = self._scored(base, result)
            except DataError as error:  # its losses are not finite
                done = {"error": str(error)}
        done = {"task": self._key(task), **done}
        write_text(self._folder(task) / SCORE, json.dumps(done, ensure_ascii=False) + "\n")
        self.on_event(Progress("finished", task.named() | done | {"fresh": True}))
        return done

    def _hear(self, event: Event, values: dict[str, Any]) -> None:
        if isinstance(event, Stepped):
            self.on_event(Progress("step", {**dataclasses.asdict(event), **values}))

    def _scored(self, base: Prepared, result: RunResult) -> dict[str, Any]:
        figures, state = result.figures(), result.state
        valid = [[line["step"], line["valid_loss"]] for line in result.log if line["event"] == "eval"]
        by = [self.scoring.chosen_by] if self.scoring.chosen_by != "loss" else []
        wanted = self.scoring.metrics
        on_test = self._evaluated(base, "test", {"loss", *wanted})
        assert on_test.losses is not None
        scores = {
            name: score.plain() | ({} if name == "loss" else {"parts": shortened(score.parts)})
            for name, score in on_test.scores.items()
            if name in wanted
        }
        return {
            "parameters": figures["trainable_parameters"],
            "share": figures["trainable_share"],
            "bytes": figures["adapter_bytes"],
            "bytes_with_optimizer": figures["bytes_with_optimizer"],
            "seconds": state.seconds,
            "step_seconds": state.step_seconds / state.step,
            "valid": valid,
            "valid_loss": state.best_loss if self.config.patience else valid[-1][1],
            "valid_scores": {n: s.value for n, s in self._evaluated(base, "valid", by).scores.items()} if by else {},
            "scores": scores,
            "losses": on_test.losses._asdict(),
        }

    def _evaluated(self, base: Prepared, part: str, metrics: Collection[str]) -> Evaluation:
        loaded, data, generation = base.loaded, base.config.data, GenerateConfig(batch=max(16, self.config.batch))
        records = read(str(splits.file_of(self.sets, part)), data)
        return evaluate(loaded.model, loaded.tokenizer, records, data, generation, metrics=sorted(metrics))

    def _alike(self, rows: Sequence[dict[str, Any]], choices: Mapping[str, Choice]) -> list[dict[str, Any]]:
        """The directions of the largest rank of each choice of targets against those of the chosen one, or else of the next
        smaller one, and against its own from another seed."""
        found = []
        for targets, choice in choices.items():
            own = {row["rank"]: Path(row["folder"]) for row in rows if row["targets"] == targets}
            *smaller, largest = sorted(own)
            other = choice.rank if choice.rank != largest else smaller[-1]
            pairs = [(f"r = {other}", own[other])]
            first = own[largest]
            again = first.with_name(f"{first.name.rpartition('-')[0]}-{self.config.seed + 1}")
            if self.options.seeds > 1 and (again / SCORE).is_file():
                pairs.append((f"r = {largest} of another seed", again))
            one = finished(first)
            others = {name: finished(path) for name, path in pairs}
            found += [
                alike(one, each) | {"targets": targets, "with": name}
                for name, each in others.items()
                if in_common(one, each)
            ]
        return found


def _by_item(done: Mapping[str, Any]) -> bool:
    """Whether a score says which items its records are of, as those of older versions do not."""
    others = (score for name, score in done["scores"].items() if name != "loss")
    return "items" in done["losses"] and all("parts" in score for score in others)


def choices_of(found: Sequence[tuple[dict[str, Any], Measured | None]], margin: float) -> dict[str, Choice]:
    """Targets → the rank that is enough, where several ranks were trained. `found`: rows of results.json, and their losses."""
    by_targets: dict[str, dict[int, Measured]] = {}
    for row, losses in found:
        if losses is not None:
            by_targets.setdefault(row["targets"], {})[row["rank"]] = losses
    return {t: chosen(own, margin) for t, own in by_targets.items() if len(own) > 1}


def losses_of(runs: Sequence[Mapping[str, Any]]) -> Measured:
    """The losses of one candidate's runs, by what score.json has of each."""
    sums, counts, items = (np.array([run["losses"][part] for run in runs]) for part in ("sums", "counts", "items"))
    return of_losses(sums, counts[0], items[0], [run["task"]["seed"] for run in runs])


def compared_of(found: Sequence[tuple[dict[str, Any], Measured | None]]) -> list[dict[str, Any]]:
    """The candidates beside the best one, where it is more than a matter of rank."""
    losses = {row["name"]: own for row, own in found if own is not None}
    if len({row["targets"] for row, own in found if own is not None}) < 2:
        return []
    return [dataclasses.asdict(each) for each in compared(losses)]


def _row(
    candidate: Candidate, tried: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], Measured | None]:
    """Of results.json; `runs` are those with the best learning rate, one a seed."""
    row: dict[str, Any] = {"name": candidate.name, "targets": candidate.targets, "rank": candidate.rank}
    row["alpha"] = candidate.method.alpha
    row["tried"] = [
        {"lr": t["task"]["lr"], "valid_loss": t.get("valid_loss"), "error": t.get("error"), "behind": t.get("behind")}
        for t in tried
    ]
    if not runs:
        steps = [t["behind"] for t in tried if "behind" in t]
        behind = f"was among the worse half of the candidates at step {max(steps, default=0)}, and ended there"
        return row | {"error": next((t["error"] for t in tried if "error" in t), behind)}, None
    best = runs[0]
    losses, seeds = losses_of(runs), [r["task"]["seed"] for r in runs]
    scores = {
        metric: row_of(
            score, losses if metric == "loss" else of_scores([r["scores"][metric] for r in runs], seeds), metric
        )
        for metric, score in best["scores"].items()
    }
    own = {"lr": best["task"]["lr"], **{k: best[k] for k in _KEPT}, "folder": best["folder"], "scores": scores}
    return row | own, losses
