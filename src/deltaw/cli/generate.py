"""`deltaw generate`: prompts in, completions out."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.cli import show
from deltaw.cli.flags import Generate
from deltaw.cli.opening import as_trained, open_model, warn_of_no_end
from deltaw.errors import ConfigError, DataError

if TYPE_CHECKING:
    from deltaw.data import Record


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
    task, data = task_of(data), within(data, loaded.model)
    warn_of_no_end(loaded, records, data)
    answers = task.answer(loaded, records, data, command.generation, lambda count: None)
    completions = [task.said(answer, data) for answer in answers]
    pairs = [{"prompt": r.question, "completion": c} for r, c in zip(records, completions, strict=True)]
    if command.out is not None:
        write_text(Path(command.out), "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    elif len(pairs) == 1:
        show.answer(pairs[0]["completion"])
    else:
        for pair in pairs:
            print(show.as_json(pair, indent=None))


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
            f"{command.file or 'Standard input'} cannot be read as {command.data.encoding} text: {error}"
        ) from error
    # Not splitlines, which also cuts at U+2028 and its like inside a prompt
    lines = [{"prompt": line} for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError("There is no prompt in the input.")
    return list(read(lines, plain, completions=False))
