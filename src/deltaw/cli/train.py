"""`deltaw train`: live progress, then the results and what to try next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from deltaw.cli import show
from deltaw.cli.flags import Train
from deltaw.files import units
from deltaw.training.events import Answered, Evaluated, Event, Resumed, Started, Stepped

if TYPE_CHECKING:
    from rich.progress import TaskID

    from deltaw.runs.train import RunResult


def run(command: Train) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.runs.train import train

    model, data = (None if name.startswith("<") else name for name in (command.model, command.data))
    may_change = [key for key in command.resume_with.replace(" ", "").split(",") if key]
    with progress() as view:
        result = train(
            model, data, command.run, method=command.settings, resume=command.resume, resume_with=may_change,
            on_event=view.hear,
        )  # fmt: skip
    _summary(result, command)


def progress() -> _Lines:
    """Return a context manager whose `hear` shows a run's events: live in a terminal, in plain lines elsewhere."""
    return _Live() if show.is_terminal() else _Lines()


class _Lines:
    """Prints one plain line for each logged step and evaluation."""

    counted = "tokens"

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def hear(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, Started):
            self.counted = event.counted
            _coverage(event)
        elif isinstance(event, Stepped):
            show.out.print(
                f"step {event.step}/{event.total_steps}  loss {event.loss:.4f}  lr {event.lr:.2e}  {self._pace(event)}",
                soft_wrap=True,
            )
        elif isinstance(event, Evaluated):
            show.out.print(f"step {event.step}  held-out loss {event.valid_loss:.4f}")
        elif isinstance(event, Answered):
            pass  # they are in the report
        elif isinstance(event, Resumed):
            show.out.print(f"Resumed after step {event.step}.", style="bold")
            for note in event.notes:
                show.prose(note, style="yellow", console=show.err)
        else:
            show.prose(f"warning: {event.text}", style="yellow", console=show.err)

    def _pace(self, event: Stepped) -> str:
        """Speed, memory and time left, the same in the bar and in plain lines."""
        left = units.duration(event.seconds_left)
        return f"{event.tokens_per_second:.0f} {self.counted}/s  {units.size(event.memory)}  {left} left"


class _Live(_Lines):
    """Shows a progress bar on one line; evaluations and warnings scroll above it. Before the first step it says what goes on."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.progress = Progress(
            TextColumn("[bold]training"), BarColumn(bar_width=24), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.description}"), console=show.out,
        )  # fmt: skip
        self.task: TaskID | None = None
        self.held_out = ""
        self.status = show.out.status("reading the records, opening the model")

    def __enter__(self) -> _Live:
        self.status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.status.stop()
        self.progress.stop()

    def hear(self, event: Event) -> None:
        """Show an event."""
        if not isinstance(event, Stepped):
            super().hear(event)
            if isinstance(event, Started):
                self.status.update(
                    "letting the base answer samples, scoring the held-out records"
                    if event.sets.valid
                    else "taking the first step"
                )
            elif isinstance(event, Evaluated):
                self.status.update("taking the first step")
                self.held_out = f"  held out {event.valid_loss:.4f}"
            return
        if self.task is None:
            self.status.stop()
            self.progress.start()
            self.task = self.progress.add_task("", total=event.total_steps)
        described = f"loss {event.loss:.4f}{self.held_out}  lr {event.lr:.1e}  {self._pace(event)}"
        self.progress.update(self.task, completed=event.step, description=described)
        if event.step == event.total_steps:
            self.progress.stop()
            self.status.update("writing the samples and the report")
            self.status.start()


def _coverage(event: Started) -> None:
    """Print what trains, what does not and why, and a summary of the data."""
    data = event.data
    show.out.print(
        f"[bold]{event.layers}[/] layers take an update: {event.parameters:,} parameters, {event.share:.2%} of the base's.",
        soft_wrap=True,
        markup=True,
    )
    for line in event.coverage:
        show.prose(f"  {line}", style="dim")
    what = f"{data.tokens:,} tokens, {data.supervised:,} of them supervised"
    if event.task not in ("causal", "seq2seq"):
        what = "numbers to predict" if event.labels is None else f"{len(event.labels)} classes"
        what += "" if event.task == "image" else f", {data.tokens:,} tokens"
    show.out.print(
        f"[bold]{data.kept:,}[/] records, {what}"
        f" (truncated {data.truncated}, dropped {data.dropped}, longest {data.longest}).",
        soft_wrap=True,
        markup=True,
    )
    held = f"held out: {event.sets.valid}" if event.sets.valid else "nothing is held out"
    show.prose(f"Trained on {event.sets.train}; {held}.")
    show.notes(event.sets.notes)
    if event.expected_memory:
        show.out.print(_memory(event.expected_memory), soft_wrap=True, markup=True)


def _memory(parts: Mapping[str, int]) -> str:
    """The expected peak and its parts; parts of 0 bytes, such as a GPU's process, are left out."""
    names = ("process", "weights", "adapter", "gradients", "optimizer", "activations", "working", "heap")
    listed = ", ".join(f"{name} {units.size(parts[name])}" for name in names if parts[name])
    return f"About [bold]{units.size(parts['total'])}[/] of memory at the peak: {listed}."


def _summary(result: RunResult, command: Train) -> None:
    """Show what came out, and what to try next."""
    from deltaw.runs.reports.train import next_commands

    state, outcome = result.state, result.outcome
    show.out.print()
    if state.stopped in ("early", "minutes"):
        why = "the held-out loss no longer fell" if state.stopped == "early" else "the time was up"
        show.out.print(f"Stopped after step {state.step}: {why}.")
    facts = {"training loss": f"{state.first_loss:.4f} → {state.last_loss:.4f}"}
    held_out = [event.valid_loss for event in result.events if isinstance(event, Evaluated)]
    if held_out:
        best = f"best {state.best_loss:.4f} at step {state.best_step}"
        facts["held-out loss"] = f"{held_out[0]:.4f} → {held_out[-1]:.4f} ({best})"
    speed = state.tokens / max(state.step_seconds, 1e-9)
    facts |= {
        "time": f"{units.duration(state.seconds)}, {speed:.0f} {outcome.counted}/s",
        "peak memory": units.size(outcome.peak_memory),
        "‖ΔW‖ / ‖W0‖": f"{outcome.relative_norm:.4f}",
        "adapter": f"{result.adapter}  {units.size(outcome.adapter_bytes)} (base {units.size(outcome.base_bytes)})",
        "report": str(result.report),
    }
    show.facts(facts)
    show.out.print("\nNext:", style="bold")
    for line in next_commands(command.model, str(result.adapter), result.settings):
        show.out.print(f"  {line}", soft_wrap=True)
