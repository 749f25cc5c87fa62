"""A tokenizer's chat template: the text that it makes of a conversation. Knows nothing of what is taught.

Templates take the arguments of a tool call as an object (Qwen, Llama) or as JSON text (DeepSeek), and the content of a message of
calls alone as "" or not at all (transformers removes a null). A trial tells which: the right form renders the call's name and
arguments, without quotes escaped or Python's.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaw.data.chats.messages import Conversation, Message, ToolCall
from deltaw.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Shape:
    """The form in which a template takes tool calls."""

    arguments_as_text: bool = False
    empty: str | None = ""
    """The content of a message of calls alone; None: it has none."""


_SHAPES = [Shape(as_text, empty) for as_text in (False, True) for empty in ("", None)]
_CALL = ToolCall("weather_of", '{"place": "Seoul"}', "abcdefghi")  # Mistral's ids have nine letters
_CALLING = Conversation(
    (
        Message("user", "Hello"),
        Message("assistant", "", (_CALL,)),
        Message("tool", "18", name="weather_of", call_id=_CALL.id),
    )
)


@dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        """Raise DataError if the tokenizer has no chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "This tokenizer has no chat template, which chat records need. Use an instruction-tuned model's tokenizer, "
                "or prompt/completion records with template: plain."
            )

    @functools.cached_property
    def shape(self) -> Shape | None:
        """The form in which it takes tool calls; None where it renders none."""
        return next((shape for shape in _SHAPES if self._renders_calls(shape)), None)

    def _renders_calls(self, shape: Shape) -> bool:
        try:
            text = self._text(_CALLING, shape, prompt=True)
        except Exception:  # whatever a template raises: it does not take this form
            return False
        names = all(word in text for word in (_CALL.name, "place", "Seoul"))
        return names and '\\"' not in text and "{'" not in text

    def render(self, conversation: Conversation, *, prompt: bool = False) -> str:
        """Return the text of a conversation, with the generation prompt if asked for.

        Raises DataError with the template's message if it refuses, for example roles.
        """
        shape = self.shape if any(m.tool_calls for m in conversation.messages) else None
        try:
            return self._text(conversation, shape or Shape(), prompt=prompt)
        except Exception as error:  # jinja2's errors, and any that a template provokes
            raise DataError(self._refusal(conversation, prompt, error)) from error

    def _refusal(self, conversation: Conversation, prompt: bool, error: Exception) -> str:
        messages = conversation.messages
        roles = ", ".join(m.role for m in messages) or "none"
        text = f"the chat template fails on the roles {roles}: {type(error).__name__}: {error}{_in_a_row(messages)}"
        if len(messages) > 1 and messages[0].role in ("system", "developer"):
            try:
                self._text(
                    Conversation(messages[1:], conversation.tools, conversation.settings), Shape(), prompt=prompt
                )
            except Exception:  # something else is wrong too
                return text
            return (
                f"{text}. Without the {messages[0].role} message it does not fail. Write that text at the start of the first "
                "user message, or leave it out (also the setting system)."
            )
        return text

    def _text(self, conversation: Conversation, shape: Shape, *, prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                _as_dicts(conversation, shape),  # type: ignore[arg-type]
                tools=_tools(conversation),  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=prompt,
                **json.loads(conversation.settings),
            )
        )

    def has_marks(self, conversation: Conversation) -> bool:
        """Return whether the template for this conversation has {% generation %} marks."""
        return _MARKS.search(self._source(conversation)) is not None

    def marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation and the characters inside {% generation %} marks."""
        from transformers.utils import chat_template_utils

        render: Any = (
            chat_template_utils.render_jinja_template
        )  # annotated to return a str, and it returns (texts, spans)
        texts, marks = render(
            conversations=[_as_dicts(conversation, self.shape or Shape())],
            tools=_tools(conversation),
            chat_template=self._source(conversation),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **json.loads(conversation.settings)},
        )
        return texts[0], [(a, b) for a, b in marks[0] if b > a]

    def _source(self, conversation: Conversation) -> str:
        return self.tokenizer.get_chat_template(tools=_tools(conversation))


def _in_a_row(messages: Sequence[Message]) -> str:
    """Return what to do where roles do not alternate, which many templates refuse: empty where they do."""
    begins = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), 0)
    if messages and messages[begins].role == "assistant":
        return " (it begins with the assistant: put a user message first)"
    twice = next((i for i in range(begins, len(messages) - 1) if messages[i].role == messages[i + 1].role), None)
    return "" if twice is None else f" (messages {twice + 1} and {twice + 2} have one role: join them)"


def _as_dicts(conversation: Conversation, shape: Shape) -> list[dict[str, object]]:
    return [m.as_dict(arguments_as_text=shape.arguments_as_text, empty=shape.empty) for m in conversation.messages]


def _tools(conversation: Conversation) -> list[dict[str, object]] | None:
    return [json.loads(schema) for schema in conversation.tools] or None
