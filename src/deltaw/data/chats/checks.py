"""Parts of a conversation that a chat template leaves out. Knows rendered texts, no tokens.

A template that does not know tools, thoughts or a role renders the others as if they were not there. So each text of a message,
each call and each tool is looked for in the rendering, white space aside. A text that is not in it as it stands may have been
written otherwise (as JSON, for example). Then it counts as rendered if the rendering changes with its start and with its end.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from deltaw.data.chats.endings import Turn
from deltaw.data.chats.messages import Conversation, ToolCall
from deltaw.data.chats.template import Template
from deltaw.data.chats.tools import name_of
from deltaw.errors import DataError, shown

# Of the text before a turn: a template may put an opening mark of thoughts into the generation prompt
_BEFORE = 40
_ELSE = "Use a model whose template does"


def left_out(template: Template, conversation: Conversation, turns: Sequence[tuple[int, Turn]]) -> list[str]:
    """Return a line for each part of the conversation that the template does not render.

    turns: the number of each taught message, and the turn. The conversation ends with the last of them.
    """
    whole = turns[-1][1].after
    lines = _tools_left_out(conversation, turns[0][1].before)
    squeezed = _squeezed(whole)
    for number, message in enumerate(conversation.messages):
        if message.role != "assistant" and not _is_in(message.content, squeezed):
            lines += _text_left_out(template, conversation, number, whole)
    for number, turn in turns:
        lines += _answer_left_out(template, conversation.upto(number + 1), turn)
    return lines + _context_left_out(template, conversation, {number for number, _ in turns})


def _tools_left_out(conversation: Conversation, before: str) -> list[str]:
    names = [name_of(schema) for schema in conversation.tools]
    lost = [name for name in names if name not in before]
    if not lost:
        return []
    return [
        f"the chat template does not render the tools ({shown(lost)}), so an answer would be learnt without them. {_ELSE}, or "
        "write them into a system message and remove the field tools."
    ]


def _text_left_out(template: Template, conversation: Conversation, number: int, whole: str) -> list[str]:
    message = conversation.messages[number]
    if _matters(template, conversation, number, "content", message.content, whole):
        return []
    advice = {
        "tool": f"{_ELSE}, or write the result into a user message.",
        "developer": "Give it the role system, or write it into the first user message.",
        "system": "Write it at the start of the first user message, or leave it out (also the setting system).",
    }.get(message.role, f"{_ELSE}.")
    return [f"message {number + 1} ({message.role}): the chat template does not render its text. {advice}"]


def _answer_left_out(template: Template, conversation: Conversation, turn: Turn) -> list[str]:
    """Return what a taught turn, the last of the conversation, loses."""
    number = len(conversation.messages) - 1
    message = conversation.messages[number]
    name, rendered = f"message {number + 1} (assistant)", _squeezed(turn.before[-_BEFORE:] + turn.text)
    lines = []
    for field, text in (("content", message.content), ("reasoning", message.reasoning)):
        if _is_in(text, rendered) or _matters(template, conversation, number, field, text, turn.after):
            continue
        what = "its thoughts (reasoning_content, thinking)" if field == "reasoning" else "all of its content"
        beside = " beside its tool calls" if field == "content" and message.tool_calls else ""
        lines.append(
            f"{name}: the chat template does not render {what}{beside}, so a model would not learn it. {_ELSE}, or remove the "
            f"{'thoughts' if field == 'reasoning' else 'part that it leaves out'}."
        )
    lost = _calls_left_out(template, conversation, number, turn)
    if lost:
        lines.append(f"{name}: {_of_calls(lost)}")
    return lines


def _of_calls(names: Sequence[str]) -> str:
    return (
        f"the chat template does not render its tool calls ({shown(names)}). {_ELSE}, or write the calls as the message's "
        "text and remove tool_calls."
    )


def _calls_left_out(template: Template, conversation: Conversation, number: int, turn: Turn) -> list[str]:
    """Return the names of the calls that the turn lacks."""
    calls, text = conversation.messages[number].tool_calls, _squeezed(turn.text)
    counts = Counter(call.name for call in calls)
    lost = [name for name, count in counts.items() if text.count(_squeezed(name)) < count]
    for i, call in enumerate(calls):
        if call.name in lost or _is_in(call.arguments, text) or _is_in(json.dumps(json.loads(call.arguments)), text):
            continue
        others = (*calls[:i], ToolCall(call.name, '{"other": "value"}', call.id), *calls[i + 1 :])
        if _same(template, conversation.changed(number, tool_calls=others), turn.after):
            lost.append(call.name)
    return lost


def _context_left_out(template: Template, conversation: Conversation, taught: set[int]) -> list[str]:
    """Return what is wrong with assistants' turns that are context: a template that knows no calls loses theirs too."""
    return [
        f"message {number + 1} (assistant): {_of_calls([call.name for call in message.tool_calls])}"
        for number, message in enumerate(conversation.messages)
        if message.tool_calls and number not in taught and template.shape is None
    ]


def _matters(template: Template, conversation: Conversation, number: int, field: str, text: str, rendered: str) -> bool:
    """Return whether the rendering changes with the start and with the end of a text."""
    return not any(
        _same(template, conversation.changed(number, **{field: other}), rendered)
        for other in (f"other {text}", f"{text} other")
    )


def _same(template: Template, conversation: Conversation, rendered: str) -> bool:
    try:
        return template.render(conversation) == rendered
    except DataError:
        return False


def _is_in(text: str, squeezed: str) -> bool:
    return _squeezed(text) in squeezed


def _squeezed(text: str) -> str:
    """Return the text without white space."""
    return "".join(text.split())
