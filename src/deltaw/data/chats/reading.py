"""Fields of a record → a conversation, in the spellings that there are. Knows no file, no tokenizer and no other form.

OpenAI    {"messages": [{"role", "content", "tool_calls", "weight" …}], "tools": […]}, also the older function_call and functions
ShareGPT  {"conversations" or one of TURNS: [{"from", "value"}], "system", "tools"}
Gemini    {"contents": [{"role", "parts": [{"text"}]}], "systemInstruction": {"parts": [{"text"}]}}
TRL       {"prompt": [messages], "completion": [messages]}: answers in the completion are taught, those in the prompt are not

What carries meaning is used or refused by name. Other fields are in `Reading.unused`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltaw.data.chats.fields import Fields, missing, parsed
from deltaw.data.chats.messages import Conversation, Message
from deltaw.data.chats.tools import schemas_of
from deltaw.data.chats.turns import ROLE_KEYS, text_of_parts, turn_of
from deltaw.data.sources import show

TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "items", "contents")
"""Fields that hold the turns of a conversation."""
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "systeminstruction")
"""Names of a system message."""
_TOOLS = ("tools", "functions")
_SETTINGS = "chat_template_kwargs"
_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "documents")
_RESERVED = (
    "messages", "conversation", "tools", "documents", "add_generation_prompt", "chat_template", "continue_final_message",
    "padding", "tokenize", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reading:
    """A conversation as it was read."""

    conversation: Conversation
    unused: tuple[str, ...]
    """Names of fields, of the record and of its messages, that say nothing to training."""


def holds_conversation(fields: Fields, *, completions: bool = True) -> bool:
    """Return whether a record's fields hold a conversation."""
    return bool(_lists(fields)) or in_lists(fields, completions=completions)


def in_lists(fields: Fields, *, completions: bool) -> bool:
    """Return whether the record is TRL's: a prompt and a completion that are lists of messages."""
    wanted = ("prompt", "completion") if completions else ("prompt",)
    return all(_is_turns(fields.get(name)) for name in wanted)


def read_conversation(
    fields: Fields, *, completions: bool, called: Mapping[str, str] | None = None
) -> Reading | list[str]:
    """Return the conversation of a record, or a line for each thing that is wrong with it.

    completions: False takes a conversation that waits for its answer. called: what the record calls its fields.
    """
    called = called or {}
    lines: list[str] = []
    unused: list[str] = []
    if names := _lists(fields):
        messages = _turns(fields, names[0], lines, unused, called)
        lines += [f"it has two conversations, in {' and '.join(map(repr, names))}; leave one"] * (len(names) > 1)
    elif "prompt" in fields and "messages" not in fields:
        names = ["prompt", "completion"]
        messages = _prompt_and_completion(fields, lines, unused, completions, called)
    else:
        return ["field 'messages' is null"] if "messages" in fields else [missing(fields, "messages", TURNS)]
    messages = _with_system(messages, fields, lines)
    schemas = [schema for name in _TOOLS for schema in schemas_of(fields.get(name), name, lines)]
    lines += [
        f"field {name!r} is not taught from and would be lost: texts alone are" for name in _MEDIA if fields.get(name)
    ]
    settings = _settings(fields, lines)
    used = {*names, *SYSTEM, *_TOOLS, _SETTINGS, *_MEDIA}
    unused += [str(name) for name, value in fields.items() if name not in used and value is not None]
    if not lines:
        lines += _no_answer(messages, completions)
    return lines or Reading(Conversation(messages, tuple(schemas), settings), tuple(dict.fromkeys(unused)))


def _is_turns(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and isinstance(value[0], Mapping)
        and any(key in value[0] for key in ROLE_KEYS)
    )


def _lists(fields: Fields) -> list[str]:
    """Return the names of the fields that hold turns. `messages` and `conversations` mean nothing else, whatever they hold."""
    there = [name for name in TURNS if fields.get(name) is not None]
    return [name for name in there if name in TURNS[:2] or _is_turns(fields[name])]


def _turns(
    fields: Fields, name: str, lines: list[str], unused: list[str], called: Mapping[str, str]
) -> tuple[Message, ...]:
    turns, name = fields.get(name), called.get(name, name)
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # as a table has it
        count = len(lines)
        turns = parsed(turns, name, lines)
        if len(lines) > count:
            return ()
    if not isinstance(turns, (list, tuple)) or not turns:
        lines.append(f"field {name!r} must be a list of messages that is not empty, found {show(turns)}")
        return ()
    return tuple(message for i, turn in enumerate(turns) for message in turn_of(turn, f"{name}[{i}]", lines, unused))


def _prompt_and_completion(
    fields: Fields, lines: list[str], unused: list[str], completions: bool, called: Mapping[str, str]
) -> tuple[Message, ...]:
    """Return the messages of a prompt, whose answers are context, and of a completion."""
    prompt = _turns(fields, "prompt", lines, unused, called)
    context = tuple(Message(m.role, m.content, m.tool_calls, m.reasoning, m.name, m.call_id, False) for m in prompt)
    if not completions:
        return context
    completion = _turns(fields, "completion", lines, unused, called)
    if completion and not any(m.role == "assistant" for m in completion):
        lines.append("field 'completion' has no assistant message to learn from")
    return (*context, *completion)


def _with_system(messages: tuple[Message, ...], fields: Fields, lines: list[str]) -> tuple[Message, ...]:
    """Return the messages with the system text that stands beside them in front."""
    for name in SYSTEM:
        value = fields.get(name)
        if value is None or value == "":
            continue
        count = len(lines)
        value = text_of_parts(value, name, lines)
        if len(lines) > count:
            continue
        if messages and messages[0].role in ("system", "developer"):
            if messages[0].content != value:
                lines.append(f"field {name!r} and the first message are two different system texts; leave one")
        else:
            messages = (Message("system", value), *messages)
    return messages


def _settings(fields: Fields, lines: list[str]) -> str:
    """Return the variables of the template that the record sets, as JSON text."""
    value = fields.get(_SETTINGS)
    if value is None or value == "":
        return "{}"
    if isinstance(value, str):
        value = parsed(value, _SETTINGS, lines)
    if not isinstance(value, Mapping):
        lines.append(f"field {_SETTINGS!r} must be an object of the template's variables, found {show(value)}")
        return "{}"
    lines += [f"{_SETTINGS}: {key!r} is no variable of a template; remove it" for key in value if key in _RESERVED]
    try:
        return json.dumps(dict(value), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        lines.append(f"field {_SETTINGS!r} cannot be written as JSON: {error}")
        return "{}"


def _no_answer(messages: Sequence[Message], completions: bool) -> list[str]:
    """Return what is wrong with a conversation that has nothing to learn."""
    if not completions and (not messages or messages[-1].role != "assistant"):
        return []  # it waits for its answer
    if not any(m.role == "assistant" for m in messages):
        roles = ", ".join(m.role for m in messages)
        return [f"it has no assistant message to learn from (roles: {roles})"]
    if completions and not any(m.is_taught for m in messages):
        return ["none of its assistant messages is to be taught (weight: 0, train: false …); leave the record out"]
    return []
