"""Run the rows of a benchmark side by side, so that a slow minute of the machine is everybody's.

Each row has its own process. Their steps are taken in turn, one row at a time. A row is a function of a job and a `Clock`. A
script that has rows calls `work` where it was started as a worker, and `heat` where it was not.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaw.training.events import Event

# Rows with the same batches, whose times are compared turn by turn
PAIRED = ("deltaw", "floor")
ROOT = Path(__file__).resolve().parents[1]
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


class Clock:
    """A row's side of the race: it waits for its turn, and tells what the steps of a turn took."""

    def __init__(self, turns: int, told: int, each: int) -> None:
        self.turns = os.fdopen(turns, "r")
        self.told = os.fdopen(told, "w")
        self.each = each
        self._begin()

    def start(self) -> None:
        """The model is there; the first step comes next."""
        self._tell(loaded=_held())
        self._wait()

    def step(self, tokens: int, supervised: int, loss: Any) -> None:
        """A step of that many tokens is over. `loss` is read at the end of a turn only: on a GPU, reading it waits."""
        self.steps += 1
        self.tokens += tokens
        self.supervised += supervised
        if self.steps == self.each:
            synchronize()
            seconds = time.perf_counter() - self.began
            self._tell(seconds=seconds, tokens=self.tokens, supervised=self.supervised, loss=float(loss), peak=_peak())
            self._wait()

    def follow(self) -> Callable[[Event], None]:
        """What `deltaw.train` is to tell its events to, with a line logged for each step."""
        from deltaw.training.events import Started, Stepped

        counted = [0, 0]

        def hear(event: Event) -> None:
            if isinstance(event, Started):
                self.start()
            elif isinstance(event, Stepped):
                self.step(event.tokens - counted[0], event.supervised - counted[1], event.loss)
                counted[:] = event.tokens, event.supervised

        return hear

    def _tell(self, **values: float) -> None:
        self.told.write(json.dumps(values) + "\n")
        self.told.flush()

    def _wait(self) -> None:
        self.turns.readline()
        self._begin()

    def _begin(self) -> None:
        self.steps = self.tokens = self.supervised = 0
        self.began = time.perf_counter()


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def synchronize() -> None:
    """Until the GPU has done what it was given, if there is one."""
    if cuda := _cuda():
        cuda.synchronize()


def _held() -> int:
    """Bytes that this process holds, on the GPU where it uses one."""
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()
        return cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    if cuda := _cuda():
        return cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(given: str, rows: Mapping[str, Callable[[Any, Clock], None]], job: Callable[[dict[str, Any]], Any]) -> None:
    """A worker's whole work: its row, by what `heat` gave it."""
    told = json.loads(given)
    rows[told["row"]](job(told["job"]), Clock(*told["pipes"], told["each"]))


class _Runner:
    """The race's side of a row."""

    def __init__(self, row: str, job: dict[str, Any], each: int) -> None:
        turns, self.give = os.pipe()
        hear, told = os.pipe()
        name, _, checkout = row.partition("@")
        given = json.dumps({"row": name, "job": job, "pipes": (turns, told), "each": each})
        script, env = Path(sys.argv[0]).resolve(), os.environ | QUIET
        if checkout:
            root = Path(checkout).resolve()
            script, env = root / script.relative_to(ROOT), env | {"PYTHONPATH": str(root / "src")}
        self.process = subprocess.Popen(
            [sys.executable, str(script), "--worker", given],
            pass_fds=(turns, told), stdout=subprocess.DEVNULL, env=env,
        )  # fmt: skip
        os.close(turns)
        os.close(told)
        self.hear = os.fdopen(hear, "r")
        self.row = row
        self.loaded = self._heard()["loaded"]
        self.taken: list[dict[str, float]] = []

    def turn(self) -> None:
        os.write(self.give, b"\n")
        self.taken.append(self._heard())

    def end(self) -> None:
        """What comes after the last step, such as writing an adapter, has waited until nobody's steps are timed any more."""
        os.write(self.give, b"\n")
        if code := self.process.wait():
            sys.exit(f"{self.row} ended with code {code}")

    def _heard(self) -> dict[str, float]:
        line = self.hear.readline()
        if not line:
            sys.exit(f"{self.row} ended with code {self.process.wait()}")
        return json.loads(line)


def heat(rows: Sequence[str], job: dict[str, Any], *, warm: int, count: int, each: int = 1) -> dict[str, Any]:
    """All rows, `warm + count` turns of `each` steps: figures of the last `count` turns by row.

    A row named ROW@CHECKOUT is ROW as the script and the deltaw of another checkout run it; it is called "ROW before".

    A ratio of times is one of sums over all these steps, per token; of the `PAIRED` rows, whose batches are the same, it is
    the median of the ratios turn by turn.
    """
    names = {row: row.partition("@")[0] + " before" * ("@" in row) for row in rows}
    runners = {names[row]: _Runner(row, job, each) for row in rows}
    for number in range(warm + count):
        for runner in list(runners.values())[:: 1 if number % 2 == 0 else -1]:  # who goes first takes turns, too
            runner.turn()
    for runner in runners.values():
        runner.end()
    figures = {row: _summary(runner, warm, each) for row, runner in runners.items()}
    for row, values in figures.items():
        cost = values["seconds_per_1000_tokens"]
        values["times_the_time_of"] = {
            other: round(cost / figures[other]["seconds_per_1000_tokens"], 3) for other in figures if other != row
        }
    if set(PAIRED) <= set(rows):
        ours, theirs = ([turn["seconds"] for turn in runners[row].taken[warm:]] for row in PAIRED)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        figures[PAIRED[0]]["times_the_time_of"][PAIRED[1]] = round(ratio, 3)
    return figures


def _summary(runner: _Runner, warm: int, each: int) -> dict[str, Any]:
    turns = runner.taken[warm:]
    seconds, tokens = sum(t["seconds"] for t in turns), sum(t["tokens"] for t in turns)
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "supervised_per_second": round(sum(t["supervised"] for t in turns) / seconds, 1),
        "seconds_per_step": round(statistics.median(t["seconds"] for t in turns) / each, 4),
        "seconds_per_1000_tokens": round(1000 * seconds / tokens, 4),
        "peak_over_loaded_gb": round((turns[-1]["peak"] - runner.loaded) / 1e9, 3),
        "peak_gb": round(turns[-1]["peak"] / 1e9, 3),
        "losses": [round(t["loss"], 4) for t in runner.taken],
    }
