"""Tools on offer, and calls of them, as fields have them. Knows no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping

from deltaw.data.chats.fields import parsed
from deltaw.data.chats.messages import ToolCall
from deltaw.data.sources import show


def schemas_of(value: object, where: str, lines: list[str]) -> list[str]:
    """Return the schema of each tool as JSON text, in the form {"type": "function", "function": {name, …}}.

    The value may be a list, one schema, or JSON text of either; null, "" and [] are none. A bare function gets its frame.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value = parsed(value, where, lines)
        if value is None:
            return []
    tools = value if isinstance(value, (list, tuple)) else [value]
    schemas = []
    for i, tool in enumerate(tools):
        place = f"{where}[{i}]"
        if isinstance(tool, str):
            tool = parsed(tool, place, lines)
            if tool is None:
                continue
        if (framed := _framed(tool)) is None:
            lines.append(f"{place} must be the schema of a function, with its name, found {show(tool)}")
        elif (text := _json(framed, place, lines)) is not None:
            schemas.append(text)
    return schemas


def name_of(schema: str) -> str:
    """Return the name of a tool by its schema."""
    return str(json.loads(schema)["function"]["name"])


def _framed(tool: object) -> Mapping[str, object] | None:
    """Return a tool in OpenAI's form; None for what has no name."""
    if not isinstance(tool, Mapping):
        return None
    function = tool.get("function")
    if isinstance(function, Mapping):
        return {"type": "function", **tool} if _has_name(function) else None
    if not _has_name(tool) or tool.get("type", "function") != "function":
        return None
    return {"type": "function", "function": {key: v for key, v in tool.items() if key != "type"}}


def _has_name(function: Mapping[str, object]) -> bool:
    name = function.get("name")
    return isinstance(name, str) and bool(name.strip())


def calls_of(value: object, where: str, lines: list[str]) -> tuple[ToolCall, ...]:
    """Return the calls in a list, in one object, or in JSON text of either."""
    if isinstance(value, str):
        value = parsed(value, where, lines)
        if value is None:
            return ()
    entries = value if isinstance(value, (list, tuple)) else [value]
    calls = [_call(entry, where if len(entries) == 1 else f"{where}[{i}]", lines) for i, entry in enumerate(entries)]
    return tuple(call for call in calls if call is not None)


def _call(entry: object, where: str, lines: list[str]) -> ToolCall | None:
    if isinstance(entry, Mapping) and entry.get("type", "function") not in ("function", None):
        lines.append(f"{where} is a call of type {show(entry['type'])}; functions alone are taught")
        return None
    function = entry.get("function", entry) if isinstance(entry, Mapping) else None
    if not isinstance(function, Mapping) or not _has_name(function):
        lines.append(f"{where} must be a call, with the function's name and arguments, found {show(entry)}")
        return None
    assert isinstance(entry, Mapping)
    arguments = function.get("arguments", function.get("parameters"))
    text = _arguments(arguments, f"{where}.arguments", lines)
    return None if text is None else ToolCall(str(function["name"]), text, str(entry.get("id") or ""))


def _arguments(value: object, where: str, lines: list[str]) -> str | None:
    """Return the arguments of a call as JSON text. Without any they are {}."""
    if value is None or value == "":
        return "{}"
    count = len(lines)
    if isinstance(value, str):
        inside = parsed(value, where, lines)
        if isinstance(inside, Mapping):
            return value
        lines += [f"{where} must be a JSON object, found {show(value)}"] * (len(lines) == count)
        return None
    if not isinstance(value, Mapping):
        lines.append(f"{where} must be an object or its JSON text, found {show(value)}")
        return None
    return _json(value, where, lines)


def _json(value: Mapping[str, object], where: str, lines: list[str]) -> str | None:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
        return text
    except (TypeError, ValueError) as error:
        lines.append(f"{where} cannot be written as JSON: {error}")
        return None
