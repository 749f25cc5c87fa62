"""Conversations as people have them: exactly what is taught of each, or the one message that refuses it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.config import DataConfig
from deltaw.data import Record, as_taught, encode, encode_prompt, read
from deltaw.data.chats.encode import encode_chats
from deltaw.data.records import notes_of
from deltaw.errors import DataError

from ..conftest import CHATML, LLAMA2, MARKED, tiny_tokenizer
from .templates import DEEPSEEK, LLAMA3, MISTRAL, QWEN2, QWEN3

LONG = {"max_length": 100_000}
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    f"{{% endfor %}}{CHATML}"
)
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather", "parameters": {"type": "object", "properties": {}}},
}
BARE = TOOL["function"]
USER, ANSWER = {"role": "user", "content": "Warm?"}, {"role": "assistant", "content": "Mild"}
MORE, LAST = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}
RESULT = {"role": "tool", "content": "18", "tool_call_id": "abcdefghi", "name": "weather"}


def calling(arguments: object = '{"city": "Seoul"}', **fields: Any) -> dict[str, Any]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **fields}


def call_text(city: str = "Seoul") -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


def taught(record: dict[str, Any], template: str, **config: Any) -> list[list[str]]:
    """Return the text of each supervised run, a list for each example, after holding what comes before each run against what
    transformers gives at inference."""
    added = ("\n\n",) if template == QWEN3 else ()  # as in Qwen's vocabulary
    tokenizer = tiny_tokenizer(template, special=("<|eot_id|>",), added=added)
    settings = DataConfig(**LONG, **config)
    records = read([record], settings)
    examples = encode(records, tokenizer, settings).examples
    contexts = contexts_of(records.items[0], last=settings.turns == "last")
    texts = []
    for example in examples:
        ids, mask = example.input_ids, example.supervised
        starts = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
        ends = [next((j for j in range(i, len(ids)) if not mask[j]), len(ids)) for i in starts]
        texts.append([tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends, strict=True)])
        for start in starts:
            assert ids[:start] == inference(tokenizer, *contexts.pop(0))
    assert not contexts
    return texts


def contexts_of(record: Record, *, last: bool) -> list[tuple[Any, ...]]:
    """Return what each taught turn of a record answers, as transformers takes it."""
    conversation = record.as_chat(record.conversation)
    tools = [json.loads(schema) for schema in conversation.tools] or None
    numbers = [i for i, m in enumerate(conversation.messages) if m.is_taught]
    variables = json.loads(conversation.settings)
    return [(conversation.messages[:i], tools, variables) for i in (numbers[-1:] if last else numbers)]


def inference(tokenizer: Any, messages: Any, tools: Any, variables: Any) -> list[int]:
    """Return the tokens that transformers gives to generate from. DeepSeek's template takes calls as OpenAI writes them."""
    as_written = tokenizer.chat_template == DEEPSEEK
    dicts = [m.as_dict(arguments_as_text=as_written, empty=None if as_written else "") for m in messages]
    text = tokenizer.apply_chat_template(dicts, tools=tools, tokenize=False, add_generation_prompt=True, **variables)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def refusal(record: dict[str, Any], template: str = QWEN2, **config: Any) -> str:
    tokenizer, settings = tiny_tokenizer(template), DataConfig(**LONG, **config)
    with pytest.raises(DataError) as caught:
        encode(read([record], settings), tokenizer, settings)
    assert "records[0]" in str(caught.value) or "more than one form" in str(caught.value)
    return str(caught.value)


END = "<|im_end|>"
TOOLED = {"tools": [TOOL], "messages": [USER, calling(), RESULT, ANSWER]}
TAUGHT_CALL = [[call_text() + END, "Mild" + END]]
THOUGHT = {"messages": [USER, {**ANSWER, "reasoning_content": "So"}, MORE, {**LAST, "reasoning_content": "Hm"}]}


@pytest.mark.parametrize(
    "record, template, texts",
    [
        pytest.param(TOOLED, QWEN2, TAUGHT_CALL, id="tools and calls"),
        pytest.param({**TOOLED, "tools": json.dumps([TOOL])}, QWEN2, TAUGHT_CALL, id="tools as JSON text"),
        pytest.param({**TOOLED, "tools": [json.dumps(TOOL)]}, QWEN2, TAUGHT_CALL, id="a list of JSON texts"),
        pytest.param({**TOOLED, "tools": [BARE]}, QWEN2, TAUGHT_CALL, id="a bare function gets its frame"),
        pytest.param({"functions": [BARE], "messages": TOOLED["messages"]}, QWEN2, TAUGHT_CALL, id="functions"),
        pytest.param(
            {"tools": [TOOL], "messages": [USER, calling({"city": "Seoul"}), RESULT, ANSWER]}, QWEN2, TAUGHT_CALL,
            id="arguments as an object",
        ),
        pytest.param(
            {"tools": [TOOL], "messages": [USER, {**calling(), "content": ""}, RESULT, ANSWER]}, QWEN2, TAUGHT_CALL,
            id="empty content",
        ),
        pytest.param(
            {"tools": [TOOL], "messages": [USER, {"role": "assistant", "function_call": {"name": "weather", "arguments":
             '{"city": "Seoul"}'}}, {"role": "function", "name": "weather", "content": "18"}, ANSWER]},
            QWEN2, TAUGHT_CALL, id="function_call and role function",
        ),
        pytest.param(
            {"tools": json.dumps([BARE]), "system": "Be brief.", "conversations": [
                {"from": "human", "value": "Warm?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Seoul"}}'},
                {"from": "observation", "value": "18"}, {"from": "gpt", "value": "Mild"}]},
            QWEN2, TAUGHT_CALL, id="ShareGPT with tools",
        ),
        pytest.param(
            {"systemInstruction": {"parts": [{"text": "Be "}, {"text": "brief."}]}, "contents": [
                {"role": "user", "parts": [{"text": "Warm?"}]}, {"role": "model", "parts": [{"text": "Mi"}, {"text": "ld"}]}]},
            QWEN2, [["Mild" + END]], id="Gemini",
        ),
        pytest.param(
            {"tools": [TOOL], "messages": [USER, calling(content="I look")]}, QWEN2, [["I look\n" + call_text() + END]],
            id="text beside a call",
        ),
        pytest.param(
            {"tools": [TOOL], "messages": [USER, {**calling(), "tool_calls": calling()["tool_calls"] + calling(
                '{"city": "Busan"}')["tool_calls"]}]},
            QWEN2, [[f"{call_text()}\n{call_text('Busan')}{END}"]], id="two calls",
        ),
        pytest.param(
            {"tools": [TOOL], "messages": [USER, calling('{"city": "서울"}')]}, QWEN2, [[call_text("서울") + END]], id="Hangul",
        ),
        pytest.param(
            TOOLED, LLAMA3, [['{"name": "weather", "parameters": {"city": "Seoul"}}<|eot_id|>', "Mild<|eot_id|>"]], id="Llama",
        ),
        pytest.param(
            {"tools": [TOOL], "messages": [USER, calling(), {**RESULT, "role": "ipython"}, ANSWER]}, LLAMA3,
            [['{"name": "weather", "parameters": {"city": "Seoul"}}<|eot_id|>', "Mild<|eot_id|>"]], id="role ipython",
        ),
        pytest.param(
            {"tools": [TOOL], "messages": [USER, ANSWER, MORE, calling()]}, MISTRAL,
            [[" Mild<|im_end|>"], ['[CALLS] [{"name": "weather", "arguments": {"city": "Seoul"}, "id": "abcdefghi"}]<|im_end|>']],
            id="Mistral moves the tools",
        ),
        pytest.param(TOOLED, DEEPSEEK, [['<call>weather\n{"city": "Seoul"}</call>' + END, "Mild" + END]], id="arguments as text"),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Wa"}, {"type": "text", "text": "rm?"}]},
                          {"role": "assistant", "content": [{"type": "text", "text": "Mild"}]}]},
            QWEN2, [["Mild" + END]], id="parts of text",
        ),
        pytest.param({"messages": [USER, {**ANSWER, "weight": 0}, MORE, LAST]}, QWEN2, [["Yes" + END]], id="weight 0"),
        pytest.param({"messages": [USER, {**ANSWER, "weight": 1}, MORE, {**LAST, "train": False}, USER]}, QWEN2, [["Mild" + END]],
                     id="train false at the end"),
        pytest.param({"messages": [{**USER, "train": False}, {**ANSWER, "training": False}, MORE, {**LAST, "train_on_turn": True}]},
                     QWEN2, [["Yes" + END]], id="axolotl's flags"),
        pytest.param({"messages": [USER, {**ANSWER, "masked": True}, MORE, {**LAST, "loss": True}]}, MARKED, [["Yes" + END]],
                     id="masked, in a template with marks"),
        pytest.param(
            {"messages": THOUGHT["messages"][:2]}, QWEN3, [["<think>\nSo\n</think>\n\nMild" + END]], id="reasoning_content",
        ),
        pytest.param(
            THOUGHT, QWEN3, [["<think>\nSo\n</think>\n\nMild" + END], ["<think>\nHm\n</think>\n\nYes" + END]],
            id="Qwen3 drops earlier thoughts",
        ),
        pytest.param(
            {"messages": [USER, {**ANSWER, "content": "<think>\nSo\n</think>\n\nMild"}, MORE, {**LAST, "thinking": "Hm"}]}, QWEN3,
            [["<think>\nSo\n</think>\n\nMild" + END], ["<think>\nHm\n</think>\n\nYes" + END]], id="thoughts in the content",
        ),
        pytest.param(
            {"tools": [TOOL], "messages": [USER, calling(reasoning_content="So"), RESULT, {**ANSWER, "reasoning": "Hm"}]}, QWEN3,
            [[f"<think>\nSo\n</think>\n\n{call_text()}{END}", "<think>\nHm\n</think>\n\nMild" + END]],
            id="thoughts stay within a tool loop, so one record",
        ),
        pytest.param(
            {"messages": [USER, {**ANSWER, "weight": 0, "reasoning_content": "So"}, MORE, LAST]}, QWEN3,
            [["<think>\n\n</think>\n\nYes" + END]], id="context loses its thoughts, as at inference",
        ),
        pytest.param(
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}}, QWEN3, [["Mild" + END]],
            id="variables of the template",
        ),
        pytest.param(
            {"prompt": [USER, ANSWER, MORE], "completion": [LAST]}, QWEN2, [["Yes" + END]], id="TRL's prompt and completion",
        ),
        pytest.param(
            {"prompt": [USER], "completion": [calling(), RESULT, ANSWER], "tools": [TOOL]}, QWEN2, TAUGHT_CALL,
            id="a completion with tools",
        ),
        pytest.param({"messages": json.dumps([USER, ANSWER])}, QWEN2, [["Mild" + END]], id="messages as JSON text"),
        pytest.param(
            {"messages": [{**USER, "tool_calls": None, "weight": None}, {**ANSWER, "tool_calls": [], "name": None}], "tools": None},
            QWEN2, [["Mild" + END]], id="nulls of a table",
        ),
    ],
)  # fmt: skip
def test_exactly_this_is_taught(record: dict[str, Any], template: str, texts: list[list[str]]) -> None:
    assert taught(record, template) == texts


def test_names_in_a_message_may_have_capitals() -> None:
    turns = [{"Role": "prompter", "Content": "Warm?"}, {"Role": "Assistant", "CONTENT": "Mild"}]
    assert taught({"messages": turns}, CHATML) == [["Mild" + END]]


def test_a_greeting_is_context_and_said() -> None:
    """Nothing stands before it that a model could answer; with a system message something does."""
    records, tokenizer = (
        read([{"messages": [MORE | {"role": "assistant"}, USER, ANSWER]}], DataConfig()),
        tiny_tokenizer(CHATML),
    )
    encoded = encode(records, tokenizer, DataConfig())
    (example,) = encoded.examples
    spans = [i for i, is_taught in zip(example.input_ids, example.supervised, strict=True) if is_taught]
    assert tokenizer.decode(spans) == ANSWER["content"] + END
    assert "1 of 1 conversations begin with the assistant" in (encoded.note or "")
    assert "begin with" not in (encode(records, tokenizer, DataConfig(system="S")).note or "")


@pytest.mark.parametrize(
    "field", ["messages", "conversations", "conversation", "items", "dialog", "dialogue", "contents"]
)
@pytest.mark.parametrize(
    "human, model", [("human", "gpt"), ("user", "assistant"), ("User", "bot"), ("human", "chatgpt"), ("user", "model")]
)
def test_sharegpt_is_read_in_its_spellings(field: str, human: str, model: str) -> None:
    for role, content in (("from", "value"), ("role", "content"), ("from", "content")):
        turns = [{role: human, content: "Warm?"}, {role: model, content: "Mild"}]
        assert taught({field: turns}, CHATML) == [["Mild" + END]]
        for system in ({"system": "Brief."}, {"systemInstruction": {"parts": [{"text": "Brief"}, {"text": "."}]}}):
            assert read([{field: turns, **system}], DataConfig()).items[0].context[0].content == "Brief."


@pytest.mark.parametrize(
    "record, template, words",
    [
        pytest.param(TOOLED, CHATML, ["render the tools (weather)", "write the tools into a system message"], id="no tools"),
        pytest.param({"messages": [USER, calling()]}, CHATML, ["message 2", "tool calls (weather)"], id="no calls"),
        pytest.param({"messages": [{**USER, "content": "Call weather"}, ANSWER], "tools": [TOOL]}, CHATML, ["tools (weather)"],
                     id="no tools, though the user says their name"),
        pytest.param({"messages": [*[USER, calling(), RESULT, ANSWER][0:1], {**calling(), "weight": 0}, RESULT, ANSWER]}, CHATML,
                     ["message 2 (assistant)", "tool calls (weather)"], id="no calls in the context"),
        pytest.param({"tools": [TOOL], "messages": [USER, calling(content="I look")]}, LLAMA3, ["all of its content beside"],
                     id="text beside a call is dropped"),
        pytest.param({"tools": [TOOL], "messages": [USER, calling(content="I look")]}, DEEPSEEK, ["tool calls (weather)"],
                     id="calls beside text are dropped"),
        pytest.param({"messages": [USER, {**calling(), "tool_calls": calling()["tool_calls"] * 2}]}, LLAMA3,
                     ["only single tool-calls"], id="one call a turn"),
        pytest.param(THOUGHT, QWEN2, ["message 2 (assistant)", "thoughts", "reasoning_content"], id="no thoughts"),
        pytest.param({"messages": [{"role": "developer", "content": "Brief."}, USER, ANSWER]}, QWEN2,
                     ["message 1 (developer)", "role system"], id="no developer"),
        pytest.param({"messages": [{"role": "system", "content": "Brief."}, USER, ANSWER]}, LLAMA2,
                     ["no system here", "start of the first user message"], id="no system"),
        pytest.param({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]}, QWEN2,
                     ["messages[0]: content[0] is of type 'image_url'"], id="an image"),
        pytest.param({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, ANSWER]}, QWEN2, ["'input_audio'"],
                     id="sound"),
        pytest.param({"messages": [USER, ANSWER], "images": ["a.png"]}, QWEN2, ["'images'", "lost"], id="images beside"),
        pytest.param({"messages": [USER, {**ANSWER, "weight": 0.5}]}, QWEN2, ["messages[1]: weight is float 0.5", "0", "1"],
                     id="weight 0.5"),
        pytest.param({"messages": [USER, {**ANSWER, "weight": True}]}, QWEN2, ["weight is bool True"], id="weight true"),
        pytest.param({"messages": [USER, {**ANSWER, "weight": 0}]}, QWEN2, ["none of its assistant messages"], id="none taught"),
        pytest.param({"messages": [USER, {**ANSWER, "weight": 1, "train": False}]}, QWEN2, ["weight and train contradict"],
                     id="flags contradict"),
        pytest.param({"messages": [{**USER, "train": True}, ANSWER]}, QWEN2, ["a user message is not taught"], id="a user taught"),
        pytest.param({"messages": [USER, {**ANSWER, "train_detail": [{"begin_offset": 0}]}]}, QWEN2, ["'train_detail'"],
                     id="parts of a turn"),
        pytest.param({"messages": [USER, calling("{city")]}, QWEN2, ["messages[1]: tool_calls.arguments is text that is no JSON"],
                     id="arguments no JSON"),
        pytest.param({"messages": [USER, calling("[1]")]}, QWEN2, ["must be a JSON object"], id="arguments a list"),
        pytest.param({"messages": [{**USER, "tool_calls": calling()["tool_calls"]}, ANSWER]}, QWEN2,
                     ["a user message cannot have tool calls"], id="a user calls"),
        pytest.param({"messages": [USER, ANSWER], "tools": "[{"}, QWEN2, ["tools is text that is no JSON"], id="tools no JSON"),
        pytest.param({"messages": [USER, ANSWER], "tools": [{"type": "web_search"}]}, QWEN2, ["tools[0] must be the schema"],
                     id="a tool without a function"),
        pytest.param({"messages": [USER, {**ANSWER, "thinking": "a", "reasoning": "b"}]}, QWEN3, ["two different thoughts"],
                     id="two thoughts"),
        pytest.param({"messages": [{"role": "system", "content": "A"}, USER, ANSWER], "system": "B"}, QWEN2,
                     ["two different system texts"], id="two systems"),
        pytest.param({"messages": [USER, ANSWER], "items": [USER, ANSWER]}, QWEN2, ["chat (messages) and chat (items)"],
                     id="two conversations"),
        pytest.param({"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "look"}]}, QWEN2,
                     ["conversations[1]: value is text that is no JSON"], id="a call in words"),
        pytest.param({"messages": [USER, ANSWER], "chat_template_kwargs": {"tools": []}}, QWEN2, ["'tools' is no variable"],
                     id="reserved variable"),
        pytest.param({"prompt": [USER], "completion": [MORE]}, QWEN2, ["'completion' has no assistant message"], id="TRL, no answer"),
        pytest.param({"messages": [ANSWER]}, QWEN2, ["begins with its only assistant message", "before it"], id="a greeting alone"),
        pytest.param({"messages": [ANSWER, USER, ANSWER]}, ALTERNATING, ["put a user message first"], id="a greeting refused"),
        pytest.param({"messages": [USER, USER, ANSWER]}, ALTERNATING, ["messages 1 and 2 have one role: join them"], id="two users"),
        pytest.param({"messages": [USER, {**ANSWER, "loss_weight": 0}]}, QWEN2, ["loss_weight is int 0", "weight: 0 or 1"],
                     id="another word for weight"),
        pytest.param({"messages": [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}]}]}, QWEN2,
                     ["content[0] is of type 'thinking'", "reasoning_content"], id="thoughts in a part"),
        pytest.param({"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]}, QWEN2,
                     ["'tool_use'", "as tool_calls"], id="a call in a part"),
        pytest.param({"messages": str([USER, ANSWER])}, QWEN2, ["text that is no JSON", "json.dumps"], id="Python's writing"),
        pytest.param({"messages": [USER, {"role": "assistant", "content": "\n\n x"}]}, CHATML,
                     ["Remove the white space at the start of the answer"], id="white space at the start"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused_by_name(record: dict[str, Any], template: str, words: list[str]) -> None:
    message = refusal(record, template)
    assert all(word in message for word in words), message


def test_a_system_setting_that_the_template_refuses_is_named() -> None:
    assert "also the setting system" in refusal({"messages": [USER, ANSWER]}, LLAMA2, system="Brief.")


def test_the_last_answers_alone_are_taught_on_request() -> None:
    assert taught({"messages": [USER, ANSWER, MORE, LAST]}, QWEN2, turns="last") == [["Yes" + END]]
    assert taught(THOUGHT, QWEN3, turns="last") == [["<think>\nHm\n</think>\n\nYes" + END]]
    with pytest.raises(DataError, match="turns: last has no effect"):
        encode(read([{"prompt": "p", "completion": "c"}], DataConfig()), tiny_tokenizer(), DataConfig(turns="last"))


def test_turns_apart_and_unused_fields_are_told_once_with_their_count() -> None:
    config = DataConfig(**LONG)
    rows = [{**THOUGHT, "id": 1, "source": None}, {"messages": [{**USER, "name": "Bo", "ts": 3}, ANSWER], "id": 2}]
    records = read(rows, config)
    assert records.ignored == {"id": 2, "messages' ts": 1, "messages' name": 1}
    encoded = encode(records, tiny_tokenizer(QWEN3), config)
    assert encoded.records == [0, 0, 1] and encoded.counts.kept == encoded.counts.records == 3
    assert [example.place for example in encoded.examples] == [
        "records[0], message 2",
        "records[0], message 4",
        "records[1]",
    ]
    assert encoded.note is not None and "2 answers in 1 of 2 conversations is a record of its own" in encoded.note
    assert notes_of([records]) == ("ignored: id (2 records); messages' ts, messages' name (1 record)",)
    assert encode(read(rows[1:], config), tiny_tokenizer(CHATML), config).note is None


def test_answers_of_one_conversation_are_held_out_together() -> None:
    from deltaw.data.hold_out import hold_out

    config = DataConfig(**LONG)
    rows = [{"messages": [{**USER, "content": f"Warm {i}?"}, *THOUGHT["messages"][1:]]} for i in range(30)]
    records = read(rows, config)
    held = hold_out(records.items, 6, most=6, seed=1, source="", instead="")
    ids = [encode(records.only(n), tiny_tokenizer(QWEN3), config) for n in (held, sorted(set(range(30)) - set(held)))]
    places = [{example.place.partition(",")[0] for example in one.examples} for one in ids]
    assert not places[0] & places[1] and [len(one.examples) for one in ids] == [12, 48]


def test_prompts_with_tools_wait_for_their_answer() -> None:
    config, tokenizer = DataConfig(**LONG), tiny_tokenizer(QWEN2)
    asked = read([{"tools": [TOOL], "messages": [USER, calling(), RESULT]}], config, completions=False).items[0]
    text = tokenizer.decode(encode_prompt(asked, tokenizer, config))
    assert '"name": "weather"' in text and text.endswith("</tool_response><|im_end|>\n<|im_start|>assistant\n")
    other = read([{"messages": [USER]}, {"tools": [TOOL], "messages": [USER]}], config, completions=False)
    from deltaw.data.prompts import item_numbers

    assert item_numbers(other.items) == [0, 1]  # a question with tools is another question


def test_answers_to_score_against_are_in_the_templates_words() -> None:
    config = DataConfig(**LONG)
    records = read([TOOLED, {"tools": [TOOL], "messages": [USER, calling()]}, THOUGHT], config).items
    assert as_taught(records[:2], tiny_tokenizer(QWEN2), config) == ["Mild", call_text()]
    assert as_taught(records[2:], tiny_tokenizer(QWEN3), config) == ["<think>\nHm\n</think>\n\nYes"]


WORDS = st.text(st.sampled_from("aHi lĠ가.<>{}\"'"), min_size=1, max_size=8).map(lambda text: f"x{text}x")


@st.composite
def conversations(draw: Any) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(WORDS)})
        for _ in range(draw(st.integers(0, 2))):
            messages += [calling({draw(WORDS): draw(WORDS)}), {**RESULT, "content": draw(WORDS)}]
        thoughts = {"reasoning_content": draw(WORDS)} if draw(st.booleans()) else {}
        answer = {"role": "assistant", "content": draw(WORDS), "weight": draw(st.sampled_from([0, 1])), **thoughts}
        messages.append(answer)
    messages[-1]["weight"] = 1
    return {"messages": messages, "tools": [TOOL]}


def without(record: dict[str, Any], *names: str) -> dict[str, Any]:
    kept = [{k: v for k, v in m.items() if k not in names} for m in record["messages"] if m["role"] not in names]
    return {**record, "messages": kept}


@pytest.mark.parametrize(
    "template, lacks",
    [
        (QWEN2, ["reasoning_content"]),
        (QWEN3, []),
        (LLAMA3, ["reasoning_content"]),
        (MISTRAL, ["reasoning_content", "system"]),
    ],
)
@pytest.mark.parametrize("turns", ["all", "last"])
@settings(max_examples=25, deadline=None)
@given(record=conversations())
def test_what_comes_before_a_taught_turn_is_what_inference_gives(
    template: str, lacks: list[str], turns: str, record: dict[str, Any]
) -> None:
    """`taught` holds the tokens before each taught turn against apply_chat_template; here also the number of turns."""
    record = without(record, *lacks)
    count = sum(m["role"] == "assistant" and m.get("weight", 1) for m in record["messages"])
    assert sum(map(len, taught(record, template, turns=turns))) == (count if turns == "all" else 1)


def trl_templates() -> list[Any]:
    spec = importlib.util.find_spec("trl")
    folder = Path(next(iter(spec.submodule_search_locations or []))) / "chat_templates" if spec else Path("absent")
    names = [
        "qwen2_5",
        "qwen2_5_training",
        "qwen3",
        "qwen3_training",
        "gptoss",
        "glm4moe",
        "qwen3_5_think",
        "qwen3_instruct_2507",
    ]
    return [pytest.param(folder / f"{name}.jinja", id=name) for name in names]


@pytest.mark.parametrize("file", trl_templates())
def test_real_templates_with_tools_are_exact(file: Path) -> None:
    if not file.is_file():
        pytest.skip("this version of TRL has no such chat template, or TRL is not installed")
    template = file.read_text(encoding="utf-8")
    for record in (TOOLED, {"tools": [TOOL], "messages": [USER, ANSWER, MORE, calling(), RESULT, LAST]}):
        wanted = sum(m["role"] == "assistant" for m in record["messages"])
        texts = [text for texts in taught(record, template) for text in texts]
        assert len(texts) == wanted and all(word in "".join(texts) for word in ("weather", "Seoul"))
        assert "18" not in "".join(texts)  # the tool's result


def test_real_tool_calls_are_all_taught_or_refused(shared_data: Path) -> None:
    config = DataConfig(**LONG)
    records = read(shared_data / "tools", config, split="test")
    conversations = [record.as_chat(record.conversation) for record in records][:60]
    places = [record.place for record in records][:60]
    tokenizer = tiny_tokenizer(QWEN2)
    for conversation, row in zip(conversations, encode_chats(conversations, tokenizer, places), strict=True):
        text = tokenizer.decode([token for token, taught in zip(row.ids, row.supervised, strict=True) if taught])
        calls = [json.loads(part.partition("</tool_call>")[0]) for part in text.split("<tool_call>")[1:]]
        wanted = conversation.messages[-1].tool_calls
        assert calls == [{"name": c.name, "arguments": json.loads(c.arguments)} for c in wanted]
    with pytest.raises(DataError, match="60 of 60 records"):
        encode_chats(conversations, tiny_tokenizer(CHATML), places)
