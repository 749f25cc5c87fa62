"""One turn of a conversation as fields have it → messages. Knows no record and no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping

from deltaw.data.chats.fields import Fields, text_problem
from deltaw.data.chats.messages import Message, ToolCall
from deltaw.data.chats.tools import calls_of
from deltaw.data.sources import show
from deltaw.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
_ALIASES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant", "ai": "assistant",
    "prompter": "user",
    "function": "tool", "function_response": "tool", "tool_response": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")
"""Roles of turns whose text is the JSON of an assistant's calls."""
ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text", "parts")
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_TAUGHT = ("train", "training", "train_on_turn", "loss")
"""Flags that say that a turn is taught."""
_MASKED = ("masked", "mask")
"""Flags that say that it is not."""
_LOST = ("train_detail", "training_detail", "image", "images", "video", "videos", "audio", "audios", "refusal")
"""Fields with a meaning that training cannot follow."""
_UNCLEAR = ("loss_weight", "loss_scale", "loss_mask", "trainable", "learnable")
"""Other tools' words for how much a turn counts, whose meanings differ."""
_KNOWN = {
    *_UNCLEAR,
    *_THOUGHTS,
    *_TAUGHT,
    *_MASKED,
    *_LOST,
    "tool_calls",
    "function_call",
    "name",
    "tool_call_id",
    "weight",
}


_REMOVE = "remove the part or the record"
_INSTEAD = {
    "thinking": "give the thoughts as reasoning_content beside content",
    "reasoning": "give the thoughts as reasoning_content beside content",
    "tool_use": "give the call as tool_calls beside content",
    "tool_result": "give the result as a message of its own, with the role tool",
}
"""Type of a part → what to do with it instead."""


def turn_of(turn: object, where: str, lines: list[str], unused: list[str]) -> list[Message]:
    """Return the message of a turn, in a list; none where its role is not known.

    `lines` takes what is wrong with it: all turns are checked before any is used. `unused` takes fields that say nothing.
    """
    if not isinstance(turn, Mapping):
        lines.append(f"{where} must be an object with role and content, found {show(turn)}")
        return []
    if not any(key in turn for key in ROLE_KEYS):
        turn = {
            str(key).lower() if str(key).lower() in (*ROLE_KEYS, *_CONTENT_KEYS) else key: turn[key] for key in turn
        }
    role_key = next((key for key in ROLE_KEYS if key in turn), "from" if "value" in turn else "role")
    content_key = next((k for k in _CONTENT_KEYS if k in turn), "value" if role_key == "from" else "content")
    word = str(turn.get(role_key)).lower() if isinstance(turn.get(role_key), str) else ""
    role = "assistant" if word in _CALLS else _ALIASES.get(word, word)
    wrong: list[str] = []
    if role not in ROLES:
        wrong.append(_unknown(turn, role_key))
    content, thoughts = _content(turn, content_key, wrong)
    calls: tuple[ToolCall, ...] = ()
    if word in _CALLS:
        calls, content = calls_of(content, content_key, wrong), ""
    for name in ("tool_calls", "function_call"):
        if turn.get(name):
            calls += calls_of(turn[name], name, wrong)
    if (calls or thoughts) and role != "assistant":
        wrong.append(f"a {role} message cannot have {'tool calls' if calls else 'thoughts'}: an assistant's has")
    if role == "assistant" and not calls and not wrong and not content.strip() and not thoughts:
        wrong.append(str(text_problem(content, content_key)))
    taught = _is_taught(turn, role, wrong)
    wrong += [f"field {key!r} is not taught from and would be lost; remove it" for key in _LOST if turn.get(key)]
    wrong += [
        f"{key} is {show(turn[key])}, and whether the turn is taught is said by weight: 0 or 1, or train: true or false"
        for key in _UNCLEAR
        if turn.get(key) is not None
    ]
    used = _KNOWN | {role_key, content_key}
    unused += [f"messages' {key}" for key, value in turn.items() if key not in used and value is not None]
    if turn.get("name") and role != "tool":
        unused.append("messages' name")
    lines += [f"{where}: {line}" for line in wrong]
    if role not in ROLES:
        return []
    name, call_id = (str(turn.get(key) or "") for key in ("name", "tool_call_id"))
    return [Message(role, content, calls, thoughts, name if role == "tool" else "", call_id, taught)]


def _unknown(turn: Fields, key: str) -> str:
    roles = f"roles are {', '.join(ROLES)}"
    if key not in turn:
        return f"field {key!r} is missing; the message has {', '.join(map(str, turn)) or 'no fields'}; {roles}"
    known = (*ROLES, *_ALIASES, *_CALLS)
    return f"unknown role {turn[key]!r}{nearest(str(turn[key]), known)}; {roles}"


def _content(turn: Fields, key: str, wrong: list[str]) -> tuple[str, str]:
    """Return the text of a message and the thoughts beside it. Parts are joined."""
    value, thoughts = turn.get(key), ""
    for name in _THOUGHTS:
        thought = turn.get(name)
        if thought is None or thought == "" or thought == thoughts:
            continue
        problem = text_problem(thought, name)
        if problem is not None or thoughts:
            wrong.append(problem or f"field {name!r} and another one hold two different thoughts; leave one")
        else:
            thoughts = str(thought)
    if value is None and (turn.get("tool_calls") or turn.get("function_call") or thoughts):
        return "", thoughts
    if key not in turn:
        wrong.append(f"field {key!r} is missing; the message has {', '.join(map(str, turn)) or 'no fields'}")
        return "", thoughts
    return text_of_parts(value, key, wrong), thoughts


def text_of_parts(value: object, name: str, wrong: list[str]) -> str:
    """Return the text in a field: a text, parts that are joined, or an object that holds these. `wrong` takes what is amiss."""
    if isinstance(value, Mapping) and (key := next((k for k in ("parts", "content") if k in value), None)):
        value, name = value[key], f"{name}.{key}"
    if isinstance(value, (list, tuple)):
        value = "".join(_part(part, f"{name}[{i}]", wrong) for i, part in enumerate(value))
    problem = text_problem(value, name, empty=True)
    wrong += [problem] if problem is not None else []
    return value if isinstance(value, str) else ""


def _part(part: object, where: str, wrong: list[str]) -> str:
    """Return the text of one part of a message's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(text, str):
        return text
    if isinstance(kind, str) and kind != "text":
        wrong.append(f"{where} is of type {kind!r}, and texts alone are taught; {_INSTEAD.get(kind, _REMOVE)}")
    else:
        wrong.append(f"{where} must be a text, or an object with type and text, found {show(part)}")
    return ""


def _is_taught(turn: Fields, role: str, wrong: list[str]) -> bool:
    """Return whether the flags of a turn let it be taught."""
    said: dict[str, bool] = {}
    weight = turn.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        wrong.append(f"weight is {show(weight)}; it must be 0 (context alone) or 1 (taught)")
    elif weight is not None:
        said["weight"] = weight == 1
    for key in (*_TAUGHT, *_MASKED):
        value = turn.get(key)
        if value is None:
            continue
        if value not in (True, False):
            wrong.append(f"{key} is {show(value)}; it must be true or false")
            continue
        said[key] = bool(value) is (key in _TAUGHT)
    if len(set(said.values())) > 1:
        wrong.append(f"{' and '.join(said)} contradict each other; leave one")
    if role in ROLES and role != "assistant" and any(said[key] for key in said if key in _TAUGHT):
        wrong.append(f"a {role} message is not taught: assistants' alone are; remove {' and '.join(said)}")
    return all(said.values())
