"""One part of a comparison, in a process of its own: a candidate, or the timing of inference with all adapters.

    python -m deltaw.runs.worker candidate FOLDER     # candidate.json → score.json, with the run's own files beside it
    python -m deltaw.runs.worker timing FOLDER        # timing.json → latency.json

A candidate has its own process because the peak of memory is a process's: it would be that of the candidates before it too.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw import progress
from deltaw.errors import ConfigError, DeltaWError, FileError, FolderInUse, Interrupted, TargetError
from deltaw.runs.results.compare import CandidateScore, CandidateTask, LatencyRow, Outcome, RunFigures, TimingTask
from deltaw.runs.results.scores import MetricScore
from deltaw.runs.results.study import Failed

if TYPE_CHECKING:
    from deltaw.config import TrainConfig
    from deltaw.methods.plan import Method
    from deltaw.runs.train import RunResult
    from deltaw.training.events import Event

CANDIDATE, SCORE = "candidate.json", "score.json"
NOW = "now.json"
"""The file of a candidate's last notice, while it is trained."""
_NOW_EVERY = 0.2
"""Seconds between two writes of that."""
TIMING, LATENCY = "timing.json", "latency.json"
_ROUNDS = 9


def main(part: str, folder: Path) -> int:
    """Do one part of a comparison and return the exit code: 0, or that of the error, which is in score.json."""
    return _candidate(folder) if part == "candidate" else _timing(folder)


# --- a candidate --------------------------------------------------------------------------------------------------


def _candidate(folder: Path) -> int:
    task = json.loads((folder / CANDIDATE).read_text(encoding="utf-8"))
    code = 0
    outcome: Outcome | None = None
    try:
        with progress.watched(_Now(folder / NOW).take):
            outcome = scored(CandidateTask.from_json(task), folder / "run")
    except DeltaWError as error:
        code = error.exit_code
        if isinstance(error, Interrupted | FolderInUse):  # neither is a result
            sys.stderr.write(f"{error}\n")
        else:
            outcome = Failed(str(error))
    if outcome is not None:
        from deltaw.runs.resume.place import RunFolder

        _write(folder / SCORE, {"task": task, **outcome.to_json()})
        RunFolder(folder / "run").forget_states()
    (folder / NOW).unlink(missing_ok=True)
    return code


class _Now:
    """A file that holds the last notice, for the process that shows it. Ticks are written now and then, other notices at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = 0.0

    def take(self, notice: progress.Notice) -> None:
        """Take up a notice."""
        now = time.monotonic()
        if isinstance(notice, progress.Tick | progress.Phase) and now - self._written < _NOW_EVERY:
            return
        self._written = now
        beside = self._path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a view is not worth a candidate
            beside.write_text(json.dumps(progress.to_json(notice)), encoding="utf-8")
            beside.replace(self._path)


def _write(path: Path, values: dict[str, object]) -> None:
    from deltaw.files.formats.atomic import write_text

    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def scored(task: CandidateTask, folder: Path) -> CandidateScore:
    """Train a candidate into its run folder, and score it."""
    import torch

    from deltaw.config import TrainConfig, from_mapping
    from deltaw.methods.registry import method_class
    from deltaw.training.events import Evaluated, Stepped

    method = from_mapping(method_class(task.method), task.settings, where=task.name)
    config = from_mapping(
        TrainConfig, {**task.run, "out": str(folder), "overwrite": True, "track": "none"}, where="run"
    )
    memory = _Memory()
    result, notes = _trained(task, config, method, memory)
    speeds = [event.tokens_per_second for event in result.events if isinstance(event, Stepped)]
    valid = [(event.step, event.valid_loss) for event in result.events if isinstance(event, Evaluated)]
    last = valid[-1][1] if valid else None
    outcome, state = result.outcome, result.state
    figures = RunFigures(
        notes=notes,
        parameters=outcome.trainable_parameters,
        share=outcome.trainable_share,
        bytes=outcome.adapter_bytes,
        bytes_with_optimizer=outcome.bytes_with_optimizer,
        base_bytes=outcome.base_bytes,
        memory=memory.over_the_loaded_model(),
        seconds=state.seconds,
        steps=state.step,
        tokens_per_second=statistics.median(speeds[1:] or speeds),
        step_seconds=state.step_seconds / state.step,
        valid_loss=state.best_loss if config.patience else last,
    )
    with torch.no_grad():
        held_out = _scores(result, task.valid_metrics, config.valid, config)
        scores = _scores(result, task.metrics, task.test, config)
    return CandidateScore(figures, valid, {name: score.value for name, score in held_out.items()}, scores)


def _trained(task: CandidateTask, config: TrainConfig, method: Method, memory: _Memory) -> tuple[RunResult, list[str]]:
    """Train the candidate, or what its method has instead for a model that it does not fit, with a note that says so."""
    from deltaw.training.events import Started

    def hear(event: Event) -> None:
        if isinstance(event, Started):
            memory.loaded()

    try:
        return _resumed_or_begun(task, config, method, hear), []
    except TargetError:
        instead = method.instead()
        if instead is None:
            raise
        return _resumed_or_begun(task, config, instead.method, hear), [instead.note]


def _resumed_or_begun(
    task: CandidateTask, config: TrainConfig, method: Method, hear: Callable[[Event], None]
) -> RunResult:
    """Go on with the candidate's run where one of these settings was begun, else begin it."""
    from deltaw.runs.resume.place import RunFolder
    from deltaw.runs.train import train

    if any(state.exists() for state in RunFolder(Path(config.out)).states):
        try:
            return train(task.model, task.train, config, method=method, resume=config.out, on_event=hear)
        except FolderInUse:
            raise
        except (ConfigError, FileError):
            pass  # of other settings, or damaged
    return train(task.model, task.train, config, method=method, on_event=hear)


def _scores(
    result: RunResult, metrics: Sequence[str], records: str | None, config: TrainConfig
) -> dict[str, MetricScore]:
    """Return the metrics on the records of a file, with their parts by item."""
    from deltaw.config import GenerateConfig
    from deltaw.data import read
    from deltaw.runs.evaluation.evaluate import evaluate

    if not metrics:
        return {}
    assert records is not None
    generation = GenerateConfig(batch=max(16, config.batch))
    evaluation = evaluate(
        result.model, result.tokenizer, read(records, config.data), config.data, generation, metrics=metrics
    )
    return {name: MetricScore.of(score) for name, score in evaluation.scores.items()}


class _Memory:
    """The most memory that training has held over that of the loaded model and its adapter."""

    def __init__(self) -> None:
        self._before: int | None = None
        """Bytes that were held when training began."""

    def loaded(self) -> None:
        """Count from here on: the model is loaded, and its adapter attached."""
        import torch

        from deltaw.runs.memory import machine

        if torch.cuda.is_available() and torch.cuda.memory_allocated():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            try:
                Path("/proc/self/clear_refs").write_text("5")  # Linux's way to begin the peak anew
            except OSError:
                return
            self._before = machine.held()

    def over_the_loaded_model(self) -> int | None:
        """Return the bytes that training held over those before; None where the system does not tell a peak."""
        import torch

        if self._before is None:
            return None
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return torch.cuda.max_memory_allocated() - self._before
        return max(0, _peak() - self._before)


def _peak() -> int:
    """Return the bytes in memory at the peak since it was last begun anew; neither psutil nor getrusage tells that on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# --- timing -------------------------------------------------------------------------------------------------------


def _timing(folder: Path) -> int:
    task = json.loads((folder / TIMING).read_text(encoding="utf-8"))
    rows = timed(TimingTask.from_json(task))
    _write(folder / LATENCY, {"task": task, "rows": [row.to_json() for row in rows]})
    return 0


def timed(task: TimingTask) -> list[LatencyRow]:
    """Time passes and decoding with the base alone, with each adapter, and with the first one that merges merged."""
    from deltaw.files import store
    from deltaw.model.summary import updates
    from deltaw.runs.evaluation import latency
    from deltaw.training.opening import of_adapter, opened
    from deltaw.training.tasks import Causal, task_of

    data = of_adapter(next(iter(task.adapters.values())))  # all of one comparison have the same
    loaded = opened(task.model, data, dtype=task.dtype, device=task.device, trust_remote_code=task.trust_remote_code)
    model = loaded.model.eval()
    shown: dict[str, str] = {}
    for i, (name, adapter) in enumerate(task.adapters.items()):
        shown[f"m{i}"] = name  # an adapter's name may hold no dot, a method's may
        store.load(model, adapter, name=f"m{i}", activate=False)
    merged = [n for n in shown if all(u.exact_product is not None for u in updates(model, n).values())][:1]
    ways = latency.ways(model, list(shown), merged=merged)
    shown |= {f"{name}, merged": f"{shown[name]}, merged" for name in merged}
    jobs = {("forward", rows, length): latency.forward(model, rows, length) for rows, length in task.passes}
    if isinstance(task_of(data), Causal):
        jobs |= {("decode, 8 tokens", rows, 64): latency.decoding(model, rows) for rows in task.decoding}
    table = []
    for (what, batch, length), job in jobs.items():
        measured = latency.measure(ways, job, rounds=_ROUNDS, seconds=task.seconds)
        ratios = {shown[way]: ratio for way, ratio in measured.ratios.items() if way != latency.BASE}
        table.append(LatencyRow(what, batch, length, measured.seconds[latency.BASE], ratios, measured.rounds))
    return table


def imported() -> None:
    """Import what the parts need, and compute nothing: threads do not survive a fork."""
    import transformers
    import transformers.models.auto.modeling_auto

    for name in ("AutoTokenizer", "PreTrainedModel", "GenerationMixin"):
        getattr(transformers, name)


if __name__ == "__main__":
    from deltaw.runs.resume.signals import end_with_the_parent

    end_with_the_parent()
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
