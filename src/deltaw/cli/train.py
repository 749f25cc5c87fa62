"""`deltaw train`: live progress, then the results and what to try next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaw.cli import show
from deltaw.cli.flags import Train
from deltaw.files import units
from deltaw.training.events import Evaluated

if TYPE_CHECKING:
    from deltaw.runs.train import RunResult


def run(command: Train) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.cli import live
    from deltaw.cli.lines import TRAINING
    from deltaw.layers.processes.ranks import joined

    model, data = (None if name.startswith("<") else name for name in (command.model, command.data))
    may_change = [key for key in command.resume_with.replace(" ", "").split(",") if key]
    with joined() as ranks:
        if not ranks.is_first:
            show.nothing()
        with live.view(TRAINING, out=show.out) as view:
            from deltaw.runs.train import train

            result = train(
                model, data, command.run, method=command.settings, resume=command.resume, resume_with=may_change,
                on_event=view.hear,
            )  # fmt: skip
        _summary(result, command)


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
    shared = f", {state.shared / state.tokens:.0%} of them shared with other records" if state.shared else ""
    facts |= {
        "time": f"{units.duration(state.seconds)}, {speed:.0f} {outcome.counted}/s{shared}",
        "peak memory": units.size(outcome.peak_memory),
        "‖ΔW‖ / ‖W0‖": f"{outcome.relative_norm:.4f}",
        "adapter": f"{result.adapter}  {units.size(outcome.adapter_bytes)} (base {units.size(outcome.base_bytes)})",
        "report": str(result.report),
    }
    show.facts(facts)
    show.out.print("\nNext:", style="bold")
    for line in next_commands(command.model, str(result.adapter), result.settings):
        show.out.print(f"  {line}", soft_wrap=True)
