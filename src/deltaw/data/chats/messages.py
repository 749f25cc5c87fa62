"""Messages of a conversation, with tool calls and thoughts. Knows no file, no fields of records and no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function, as an assistant writes it."""

    name: str
    arguments: str
    """A JSON object, as text."""
    id: str = ""

    def as_dict(self, arguments_as_text: bool) -> dict[str, object]:
        """Return the call as chat templates take it."""
        arguments = self.arguments if arguments_as_text else json.loads(self.arguments)
        call: dict[str, object] = {"type": "function", "function": {"name": self.name, "arguments": arguments}}
        return {"id": self.id, **call} if self.id else call


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    """Empty where there is none, for example beside tool calls."""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    """The thoughts of an assistant before the content, where they are a field of their own."""
    name: str = ""
    """The tool whose result this is."""
    call_id: str = ""
    """The id of the call whose result this is."""
    taught: bool = True
    """False: an assistant's turn that is context alone."""

    @property
    def is_taught(self) -> bool:
        """True for an assistant's turn to learn from."""
        return self.role == "assistant" and self.taught

    @property
    def text(self) -> str:
        """The content and the tool calls, for people to read."""
        calls = [f'{{"name": {json.dumps(c.name)}, "arguments": {c.arguments}}}' for c in self.tool_calls]
        return "\n".join([self.content] * bool(self.content) + calls)

    def as_dict(self, *, arguments_as_text: bool = False, empty: str | None = "") -> dict[str, object]:
        """Return the message as chat templates take it.

        arguments_as_text: give the arguments of calls as JSON text, not as objects. empty: the content where calls stand alone;
        without it there is no content then, as transformers removes a null.
        """
        fields: dict[str, object] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            if not self.content and empty is None:
                del fields["content"]
            fields["tool_calls"] = [call.as_dict(arguments_as_text) for call in self.tool_calls]
        if self.reasoning:  # templates read either name
            fields |= {"reasoning_content": self.reasoning, "thinking": self.reasoning}
        fields |= {"name": self.name} if self.name else {}
        return fields | ({"tool_call_id": self.call_id} if self.call_id else {})

    @property
    def said(self) -> tuple[object, ...]:
        """All that a template can render of it: messages with equal values are the same to a model."""
        return (self.role, self.content, self.tool_calls, self.reasoning, self.name)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as a chat template takes it."""

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()
    """The JSON schema of each tool on offer, as text."""
    settings: str = "{}"
    """Further variables of the template (`chat_template_kwargs`): a JSON object, as text."""

    def upto(self, count: int) -> Conversation:
        """Return the conversation of its first `count` messages."""
        return replace(self, messages=self.messages[:count])

    def changed(self, number: int, **fields: object) -> Conversation:
        """Return the conversation with other fields of one message."""
        messages = list(self.messages)
        messages[number] = replace(messages[number], **fields)  # type: ignore[arg-type]
        return replace(self, messages=tuple(messages))


def last_assistant(messages: Sequence[Message]) -> int:
    """Return the index of the last assistant message, of a taught one where there is one; -1 without any."""
    answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    return max([i for i in answers if messages[i].taught] or answers, default=-1)
