import pytest

from deltaw.config import DataConfig
from deltaw.data import Message, read, references
from deltaw.errors import DataError

USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def failure(records, **config):
    with pytest.raises(DataError) as caught:
        read(records, DataConfig(**config))
    return str(caught.value)


@pytest.mark.parametrize(
    "fields, form, prompt, completion",
    [
        ({"prompt": "p", "completion": "c", "id": 3}, "prompt", "p", "c"),
        ({"messages": [USER, ANSWER]}, "chat", "u", "a"),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, "chat", "u", "a"),
        ({"instruction": "i", "input": None, "output": "o"}, "instruction", "i", "o"),
        ({"text": "t", "id": 1}, "text", "", "t"),
        ({"text": "t", "label": 1}, "labelled", "t", None),
        ({"sentence1": "a", "sentence2": "b", "label": "yes"}, "labelled", "a", None),
        ({"image": [[0, 1]], "label": "cat"}, "image", "an image", None),
    ],
)
def test_each_form_becomes_a_record(fields, form, prompt, completion):
    records = read([fields], DataConfig())
    assert (records.form, records.items[0].prompt, records.items[0].completion) == (form, prompt, completion)


def test_the_context_ends_before_the_last_answer():
    assert read([{"messages": [USER, ANSWER]}], DataConfig()).items[0].context == (Message("user", "u"),)
    record = read([{"instruction": "i", "input": "x", "output": "o"}], DataConfig()).items[0]
    assert record.conversation == (Message("user", "i\n\nx"), Message("assistant", "o"))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"prompt": "p", "completion": ""}, ["'completion' is empty"]),
        ({"prompt": 5, "completion": "c"}, ["'prompt' must be text, found int 5"]),
        ({"prompt": "p", "completoin": "c"}, ["'completion' is missing", "'completoin'"]),
        ({"prompt": "p", "completion": "\ud83d"}, ["unpaired surrogate", "ud83d"]),
        ({"messages": [USER]}, ["no assistant message", "user"]),
        ({"messages": []}, ["not empty"]),
        ({"messages": "hi"}, ["list of messages", "str 'hi'"]),
        ({"messages": [{"role": "assistent", "content": "a"}]}, ["messages[0]", "'assistant'"]),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, ["messages[1]", "'content' is empty"]),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [1]}]},
            ["tool_calls must be a call"],
        ),
        ({"messages": [USER, ANSWER], "tools": [{"names": "f"}]}, ["tools[0] must be the schema"]),
        ({"messages": ["hi"]}, ["messages[0]", "role and content"]),
        ({"instruction": "", "output": "o"}, ["'instruction' is empty"]),
        ({"instruction": "i", "input": 1, "output": "o"}, ["'input' must be text"]),
        ({"text": " \n"}, ["'text' is empty"]),
    ],
)
def test_bad_record_is_named(fields, words):
    good = {
        "prompt": {"prompt": "p", "completion": "c"},
        "messages": {"messages": [USER, ANSWER]},
        "instruction": {"instruction": "i", "output": "o"},
        "text": {"text": "t"},
    }[next(iter(fields))]
    message = failure([good, fields, good])
    assert "1 of 3" in message and "records[1]" in message
    assert all(w in message for w in words), message


def test_unknown_and_ambiguous_fields_are_refused():
    message = failure([{"promt": "p", "answer": "a"}])
    assert "promt, answer" in message and "did you mean 'prompt'" in message and "instruction, output" in message
    message = failure([{"instruction": "i", "output": "o", "text": "t"}])
    assert "more than one form: instruction (instruction, output) and text (text)" in message
    assert read([{"instruction": "i", "output": "o", "text": "t"}], DataConfig(form="text")).form == "text"
    assert "no records" in failure([])
    assert "records[0]" in failure([3])


def test_prompts_alone_are_read_without_answers():
    found = read([{"prompt": "p"}], DataConfig(), completions=False)
    assert found.items[0].completion is None
    found = read([{"messages": [USER]}, {"messages": [USER, ANSWER]}], DataConfig(), completions=False)
    assert [r.context for r in found] == [(Message("user", "u"),)] * 2


def test_references_of_equal_prompts_are_one_item():
    rows = [{"prompt": p, "completion": c} for p, c in ["ab", "cd", "ae"]]
    records = read(rows, DataConfig())
    assert [(r.prompt, c) for r, c in references(records)] == [("a", ["b", "e"]), ("c", ["d"])]


def test_e2e_has_630_items(shared_data):
    assert len(references(read(shared_data / "e2e", DataConfig(), split="test"))) == 630
