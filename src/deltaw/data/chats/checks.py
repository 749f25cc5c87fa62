"""Parts of a conversation that a chat template leaves out. Knows rendered texts, no tokens.

A template that does not know tools, thoughts or a role renders the others as if they were not there. So each text of a message,
each call and each tool is looked for in the rendering, white space aside. A text that is not in it as it stands may have been
written otherwise (as JSON, for example). Then it counts as rendered if the rendering changes with its start and with its end.
Short texts may be in it by chance. So the tools, and the first text of each role, are also changed to see if that shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deltaw.data.chats.endings import Turn
from deltaw.data.chats.messages import Conversation, ToolCall
from deltaw.data.chats.template import Template
from deltaw.data.chats.tools import name_of
from deltaw.errors import DataError, shown

# Characters before a turn that count to it: a template may put an opening mark of thoughts into the generation prompt
_BEFORE = 40
_ADVICE = {
    "tools": "write the tools into a system message and remove the field tools",
    "calls": "write the calls as the message's text and remove tool_calls",
    "thoughts": "remove the thoughts, or write them into the content",
    "content": "remove the part of the content that it leaves out",
    "tool": "write a tool's result into a user message",
    "developer": "give the developer's message the role system, or write it into the first user message",
    "system": "write the system text at the start of the first user message, or leave it out (also the setting system)",
    "user": "leave these records out",
}
"""Advice on a part that is left out, where no other template renders it."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A part of a conversation that a template does not render."""

    part: str
    """One of those that there is advice for."""
    line: str


def advice_on(lost: Sequence[LeftOut]) -> str:
    """Return what to do about parts that are left out."""
    ways = "; ".join(_ADVICE[part] for part in dict.fromkeys(one.part for one in lost))
    return f"Use a model whose chat template renders them, or: {ways}."


def left_out(template: Template, conversation: Conversation, turns: Sequence[tuple[int, Turn]]) -> list[LeftOut]:
    """Return each part of the conversation that the template does not render.

    turns: the number of each taught message, and the turn. The conversation ends with the last of them.
    """
    whole = turns[-1][1].after
    lost = _tools_left_out(template, conversation.upto(turns[0][0]), turns[0][1].before)
    lost += _texts_left_out(template, conversation, whole)
    for number, turn in turns:
        lost += _answer_left_out(template, conversation.upto(number + 1), turn)
    return lost + _context_left_out(template, conversation, {number for number, _ in turns})


def left_out_of_prompt(template: Template, conversation: Conversation, prompt: str) -> list[LeftOut]:
    """Return each part of a conversation, rendered as a prompt, that the model would not see."""
    names = [name_of(schema) for schema in conversation.tools]
    lost = []
    if names and _tools_left_out(template, conversation, prompt):
        lost = [LeftOut("tools", f"the chat template does not render the tools ({shown(names)})")]
    try:
        whole = template.render(conversation)
    except DataError:  # of a template that renders no conversation without an answer
        return lost
    return lost + _texts_left_out(template, conversation, whole) + _context_left_out(template, conversation, set())


def _tools_left_out(template: Template, context: Conversation, before: str) -> list[LeftOut]:
    names = [name_of(schema) for schema in context.tools]
    lost = [name for name in names if name not in before]
    if names and not lost and _same(template, replace(context, tools=()), before, prompt=True):
        lost = names
    line = f"the chat template does not render the tools ({shown(lost)}), so answers would be learnt without them"
    return [LeftOut("tools", line)] if lost else []


def _texts_left_out(template: Template, conversation: Conversation, whole: str) -> list[LeftOut]:
    """Return the messages that are no assistant's and not rendered."""
    lost, squeezed = list[LeftOut](), _squeezed(whole)
    tried = {"user"}
    for number, message in enumerate(conversation.messages):
        role, text = message.role, message.content
        if role == "assistant" or not text.strip():
            continue
        is_there = _squeezed(text) in squeezed
        if is_there and role not in tried:
            is_there = not _same(template, conversation.changed(number, content=f"other {text} other"), whole)
        elif not is_there:
            is_there = _matters(template, conversation, number, "content", text, whole)
        tried.add(role)
        if not is_there:
            lost.append(LeftOut(role, f"message {number + 1} ({role}): the chat template does not render its text"))
    return lost


def _answer_left_out(template: Template, conversation: Conversation, turn: Turn) -> list[LeftOut]:
    """Return what a taught turn, the last of the conversation, loses."""
    number = len(conversation.messages) - 1
    message = conversation.messages[number]
    name, rendered = f"message {number + 1} (assistant)", _squeezed(turn.before[-_BEFORE:] + turn.text)
    lost = []
    for field, part, text in (("content", "content", message.content), ("reasoning", "thoughts", message.reasoning)):
        if _squeezed(text) in rendered or _matters(template, conversation, number, field, text, turn.after):
            continue
        beside = " beside its tool calls" if message.tool_calls else ""
        what = f"all of its content{beside}" if part == "content" else "its thoughts (reasoning_content, thinking)"
        lost.append(LeftOut(part, f"{name}: the chat template does not render {what}, so it would not be learnt"))
    calls = _calls_left_out(template, conversation, number, turn)
    return lost + ([LeftOut("calls", f"{name}: {_of_calls(calls)}")] if calls else [])


def _of_calls(names: Sequence[str]) -> str:
    return f"the chat template does not render its tool calls ({shown(names)})"


def _calls_left_out(template: Template, conversation: Conversation, number: int, turn: Turn) -> list[str]:
    """Return the names of the calls that the turn lacks."""
    calls, text = conversation.messages[number].tool_calls, _squeezed(turn.text)
    counts = Counter(call.name for call in calls)
    lost = [name for name, count in counts.items() if text.count(_squeezed(name)) < count]
    for i, call in enumerate(calls):
        if call.name in lost or _squeezed(call.arguments) in text:
            continue
        others = (*calls[:i], ToolCall(call.name, '{"other": "value"}', call.id), *calls[i + 1 :])
        if _same(template, conversation.changed(number, tool_calls=others), turn.after):
            lost.append(call.name)
    return lost


def _context_left_out(template: Template, conversation: Conversation, taught: set[int]) -> list[LeftOut]:
    """Return assistants' turns that are context and lose their calls: a template that knows none loses theirs too."""
    return [
        LeftOut("calls", f"message {number + 1} (assistant): {_of_calls([call.name for call in message.tool_calls])}")
        for number, message in enumerate(conversation.messages)
        if message.tool_calls and number not in taught and template.shape is None
    ]


def _matters(template: Template, conversation: Conversation, number: int, field: str, text: str, rendered: str) -> bool:
    """Return whether the rendering changes with the start and with the end of a text."""
    return not any(
        _same(template, conversation.changed(number, **{field: other}), rendered)
        for other in (f"other {text}", f"{text} other")
    )


def _same(template: Template, conversation: Conversation, rendered: str, *, prompt: bool = False) -> bool:
    try:
        return template.render(conversation, prompt=prompt) == rendered
    except DataError:
        return False


def _squeezed(text: str) -> str:
    """Return the text without white space."""
    return "".join(text.split())
