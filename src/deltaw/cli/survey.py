"""`deltaw data`: a look at records before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from deltaw.cli import show
from deltaw.cli.flags import Survey as Command
from deltaw.config import TrainConfig
from deltaw.errors import shown, visible

if TYPE_CHECKING:
    from deltaw.runs.survey import Lengths, Rendered, Survey

_BAR = 40
"""Cells of the longest bar."""


def run(command: Command) -> None:
    """Run the command."""
    show.quiet_libraries()
    from deltaw.files.formats.atomic import check_apart, check_place
    from deltaw.runs.reports.page import write
    from deltaw.runs.survey import survey, survey_report

    if command.out is not None:
        check_apart(command.out, {"the data": command.data, "the model": command.model})
        check_place(Path(command.out))
    config = TrainConfig(data=command.records, valid=command.valid, trust_remote_code=command.trust_remote_code)
    look = survey(command.data, command.model, config)
    if command.out is not None:
        write(survey_report(look), Path(command.out))
    if command.json:
        print(show.as_json(look.to_json()))
        return
    _tell(look)
    if command.out is not None:
        show.facts({"page": str(command.out)})


def _tell(look: Survey) -> None:
    """Print the look, part by part."""
    facts = {"records": f"{look.what}, of the form {look.form} ({look.fields})"}
    facts["held out"] = look.held_out or "nothing: train holds out a part by itself"
    if look.template:
        facts["template"] = (
            "the model's chat template" if look.template == "chat" else "none: prompts are taken as they are"
        )
    if look.tokens is not None:
        share = look.tokens.supervised / max(1, look.tokens.tokens)
        facts["tokens"] = f"{look.tokens.tokens:,}, of which {look.tokens.supervised:,} ({share:.0%}) are taught"
        facts["cut, dropped"] = f"{look.tokens.truncated:,} and {look.tokens.dropped:,}"
    facts["copies"] = f"{look.copies:,} {'record equals' if look.copies == 1 else 'records equal'} an earlier one"
    if look.several:
        facts["answers"] = f"{look.several:,} {'prompt has' if look.several == 1 else 'prompts have'} several"
    if look.labels:
        facts["classes"] = shown([f"{name} {count:,}" for name, count in look.labels.items()], 12)
    if look.quantities:
        facts["labels"] = "numbers from {:g} to {:g}".format(*look.quantities)
    show.facts(facts)
    for warning in (*filter(None, [look.overlap, look.note]), *look.notes, *look.odd):
        show.prose(warning, style="yellow")
    _draw(look.lengths)
    for one in look.rendered:
        _show(one)


def _draw(lengths: Lengths) -> None:
    """Print a histogram in bars."""
    most = max(lengths.counts, default=0)
    if not most:
        return
    show.out.print(f"\nlength in {lengths.unit}", style="bold")
    ranges = [f"{low:,}–{high - 1:,}" for low, high in zip(lengths.edges, lengths.edges[1:], strict=False)]
    width = max(map(len, ranges))
    for name, count in zip(ranges, lengths.counts, strict=True):
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        show.out.print(f"{name:>{width}}  {bar} {count:,}")


def _show(one: Rendered) -> None:
    """Print a record with what is taught in colour, and between brackets where there are no colours."""
    show.out.print(f"\n{one.place}, with what is taught in green", style="bold")
    line = Text()
    for text, taught in one.parts:
        marked = text if show.out.color_system or not taught else f"⟦{text}⟧"
        line.append(visible(marked), "green" if taught else "dim")
    show.out.print(line, soft_wrap=True)
