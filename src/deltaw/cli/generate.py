"""`deltaw generate`: prompts in, completions out."""

from __future__ import annotations

import dataclasses
import json
import re
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
    from deltaw.training.tasks import Task


def run(command: Generate) -> None:
    """Run the command."""
    show.quiet_libraries()
    _check(command)
    from deltaw.files.formats.atomic import check_apart, check_place, write_text

    if command.out is not None:
        check_apart(
            command.out,
            {
                "the model": command.model,
                "the adapter": command.opening.adapter,
                "the prompts": command.file or command.prompt_file,
            },
        )
        check_place(Path(command.out))
    records = _records(command)[: command.data.max_records]
    from deltaw.model.inputs import within
    from deltaw.training.tasks import Written, task_of

    adapter, trust = command.opening.adapter, command.opening.trust_remote_code
    data = as_trained(command.data, adapter, command.model, trust_remote_code=trust)
    loaded = open_model(command.model, command.opening, data)
    task, data = task_of(data), within(_as_made(data, loaded, records), loaded.model)
    warn_of_no_end(loaded, records, data)
    streams = _streams(command, task, len(records))
    if streams:
        assert isinstance(task, Written)
        answers = task.answer(loaded, records, data, command.generation, lambda count: None, show.piece)
        print()
    else:
        answers = task.answer(loaded, records, data, command.generation, lambda count: None)
    completions = [task.said(answer, data) for answer in answers]
    if silent := [completion for completion in completions if completion is not None and not completion.strip()]:
        show.prose(_why_silent(silent, len(completions), data), style="yellow", console=show.err)
    pairs = [{"prompt": r.question, "completion": c} for r, c in zip(records, completions, strict=True)]
    if command.out is not None:
        write_text(Path(command.out), "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    elif len(pairs) == 1 and not command.json:
        if not streams:
            show.answer(pairs[0]["completion"])
    else:
        for pair in pairs:
            print(show.as_json(pair, indent=None))


def _check(command: Generate) -> None:
    """Raise ConfigError for flags that exclude each other."""
    sources = {"PROMPT": command.prompt, "--file": command.file, "--prompt-file": command.prompt_file}
    named = [name for name, value in sources.items() if value is not None]
    if len(named) > 1:
        raise ConfigError(f"Give the prompts in one place, not in {' and '.join(named)}.")
    beside = {"--json": command.json, "--out": command.out is not None, "--beams": command.generation.beams > 1}
    excluded = [flag for flag, is_used in beside.items() if is_used]
    if command.stream == "on" and excluded:
        raise ConfigError(
            f"--stream on shows one answer as it comes, which {' and '.join(excluded)} cannot be. Leave one out."
        )


def _streams(command: Generate, task: Task, count: int) -> bool:
    """Return whether the answer is shown as it comes. Raises ConfigError where that is asked for and cannot be."""
    from deltaw.training.tasks import Written

    if command.stream == "on":
        if count > 1:
            raise ConfigError(f"--stream on shows one answer as it comes, and there are {count} prompts. Leave it out.")
        if not isinstance(task, Written):
            raise ConfigError(f"--stream on shows a text as it comes, and the task is {task.name}. Leave it out.")
        return True
    whole = count > 1 or command.json or command.out is not None or command.generation.beams > 1
    return command.stream == "auto" and not whole and isinstance(task, Written) and sys.stdout.isatty()


def _as_made(data: DataConfig, loaded: Pretrained, records: Sequence[Record]) -> DataConfig:
    """Return the settings with the chat template that the model was made for, where nothing says how prompts are to be put.

    An adapter's training says it. A model that was taught to answer in a template says little, or nothing, to a bare prompt.
    """
    from deltaw.data import template_of

    is_open = data.task == "causal" and data.template == "auto" and {r.form for r in records} == {"prompt"}
    if not is_open or template_of("prompt", loaded.tokenizer, data) != "chat":
        return data
    what = "The prompt is" if len(records) == 1 else "The prompts are"
    show.prose(
        f"{what} put into the model's chat template; --template plain leaves it out.", style="dim", console=show.err
    )
    return dataclasses.replace(data, template="chat")


def _why_silent(silent: Sequence[str], count: int, data: DataConfig) -> str:
    """Return what to say of empty completions, or such of white space."""
    where = "" if count == 1 else f" to {len(silent)} of {count} prompts"
    what = f"nothing but white space{where}" if any(silent) else f"nothing{where}: it ended at once"
    other = "plain" if data.template == "chat" else "chat"
    return f"The model said {what}. Try --template {other}, another wording, or --temperature."


def _records(command: Generate) -> list[Record]:
    """Return the prompts as records: records and messages keep their form, plain text is a prompt a line, or one prompt."""
    from deltaw.data import read
    from deltaw.data.records import notes_of
    from deltaw.data.sources import Read, Row

    plain = dataclasses.replace(command.data, columns="", encoding="utf-8")  # of prompts that are in no file of records
    if command.file is not None and Path(command.file).suffix != ".txt":
        records = read(command.file, command.data, completions=False)
        show.notes(notes_of([records]))
        return list(records)
    name, text = _text(command)
    if command.prompt is not None or command.prompt_file is not None:
        rows: list[Row] = [(name, {"prompt": text})]
    elif _are_json(text) and command.file is None:
        from deltaw.data.sources.json_text import json_lines

        records = read(dataclasses.replace(json_lines(text.encode(), name), name=name), command.data, completions=False)
        show.notes(notes_of([records]))
        return list(records)
    else:  # Not splitlines, which also cuts at U+2028 and its like inside a prompt
        lines = enumerate(text.split("\n"), 1)
        rows = [(f"{name}:{number}", {"prompt": line}) for number, line in lines if line.strip()]
    if not rows or not text.strip():
        raise DataError("The prompt is empty." if name == "the prompt" else f"There is no prompt in {name}.")
    return list(read(Read(rows, [], name=name), plain, completions=False))


def _are_json(text: str) -> bool:
    """Return whether lines are JSON objects, and not prompts: the first one begins as an object with a field does."""
    return re.match(r'\s*\{\s*"', text) is not None


def _text(command: Generate) -> tuple[str, str]:
    """Return the name of what the prompts are in, and its text. A prompt from a file has no newline at its end."""
    if command.prompt not in (None, "-"):
        return "the prompt", str(command.prompt)
    path = command.prompt_file or command.file
    if path is None and command.prompt is None and sys.stdin.isatty():
        raise ConfigError("There is no prompt: give one, or a file of them, or pipe prompts into standard input.")
    piped = path in (None, "-")
    name, encoding = ("standard input", "utf-8") if piped else (str(path), command.data.encoding)
    try:
        text = sys.stdin.read() if piped else Path(name).read_text(encoding=encoding)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name} cannot be read as {encoding.upper()} text: {error}") from error
    is_one = command.prompt is not None or command.prompt_file is not None
    return name, text.removesuffix("\n") if is_one else text
