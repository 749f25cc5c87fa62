"""`deltaw generate`: prompts in, completions out."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.cli import show
from deltaw.cli.flags import Generate
from deltaw.cli.opening import as_trained, open_model, warn_of_no_end
from deltaw.errors import ConfigError, DataError

if TYPE_CHECKING:
    from deltaw.config import DataConfig
    from deltaw.data import Record
    from deltaw.model.pretrained import Pretrained


def run(command: Generate) -> None:
    """Run the command."""
    show.quiet_libraries()
    if command.prompt is not None and command.file is not None:
        raise ConfigError("Give either a prompt or --file, not both.")
    from deltaw.files.formats.atomic import check_apart, check_place, write_text

    if command.out is not None:
        check_apart(
            command.out,
            {"the model": command.model, "the adapter": command.opening.adapter, "the prompts": command.file},
        )
        check_place(Path(command.out))
    records = _records(command)
    from deltaw.model.inputs import within
    from deltaw.training.tasks import task_of

    adapter, trust = command.opening.adapter, command.opening.trust_remote_code
    data = as_trained(command.data, adapter, command.model, trust_remote_code=trust)
    loaded = open_model(command.model, command.opening, data)
    task, data = task_of(data), within(_as_made(data, loaded, records), loaded.model)
    warn_of_no_end(loaded, records, data)
    answers = task.answer(loaded, records, data, command.generation, lambda count: None)
    completions = [task.said(answer, data) for answer in answers]
    if silent := sum(completion is not None and not completion.strip() for completion in completions):
        show.prose(_why_silent(silent, len(completions), data), style="yellow", console=show.err)
    pairs = [{"prompt": r.question, "completion": c} for r, c in zip(records, completions, strict=True)]
    if command.out is not None:
        write_text(Path(command.out), "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    elif len(pairs) == 1 and not command.json:
        show.answer(pairs[0]["completion"])
    else:
        for pair in pairs:
            print(show.as_json(pair, indent=None))


def _as_made(data: DataConfig, loaded: Pretrained, records: Sequence[Record]) -> DataConfig:
    """Return the settings with the chat template that the model was made for, where nothing says how prompts are to be put.

    An adapter's training says it. A model that was taught to answer in a template says little, or nothing, to a bare prompt.
    """
    bare = data.task == "causal" and data.template == "auto" and data.separator is None
    if not (bare and getattr(loaded.tokenizer, "chat_template", None) and {r.form for r in records} == {"prompt"}):
        return data
    what = "The prompt is" if len(records) == 1 else "The prompts are"
    show.prose(
        f"{what} put into the model's chat template; --template plain leaves it out.", style="dim", console=show.err
    )
    return dataclasses.replace(data, template="chat")


def _why_silent(silent: int, count: int, data: DataConfig) -> str:
    """Return what to say of empty completions."""
    what = (
        "The model said nothing: it ended"
        if count == 1
        else f"The model said nothing to {silent} of {count} prompts: it ended"
    )
    other = "plain" if data.template == "chat" else "chat"
    return f"{what} at once. Try --template {other}, another wording, or --temperature."


def _records(command: Generate) -> list[Record]:
    """The prompts as records: a file of records keeps its form; plain text has a prompt a line."""
    from deltaw.data import read
    from deltaw.data.records import notes_of

    plain = dataclasses.replace(
        command.data, columns="", encoding="utf-8"
    )  # for prompts that are in no file of records
    if command.prompt is not None:
        return list(read([{"prompt": command.prompt}], plain, completions=False))
    if command.file is not None and Path(command.file).suffix != ".txt":
        records = read(command.file, command.data, completions=False)
        show.notes(notes_of([records]))
        return list(records)
    if command.file is None and sys.stdin.isatty():
        raise ConfigError("There is no prompt: give one, or --file, or pipe prompts into standard input.")
    try:
        text = Path(command.file).read_text(encoding=command.data.encoding) if command.file else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{command.file or 'Standard input'} cannot be read as {command.data.encoding.upper()} text: {error}"
        ) from error
    # Not splitlines, which also cuts at U+2028 and its like inside a prompt
    lines = [{"prompt": line} for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError("There is no prompt in the input.")
    return list(read(lines, plain, completions=False))
