import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.data import Message, encode_chat, prompt_ids
from deltaw.errors import DataError

from ..conftest import CHATML, FORGETFUL, LLAMA2, MARKED, tiny_tokenizer

TALK = [
    Message("user", "Hi"),
    Message("assistant", "Hello"),
    Message("user", "More\n"),
    Message("assistant", "All well"),
]


def supervised(tokenizer, messages=TALK):
    """The supervised text, runs apart, after checking that generation would see what training saw."""
    ids, mask = encode_chat(messages, tokenizer)
    assert not mask[0] and tokenizer.decode(ids) == tokenizer.apply_chat_template(
        [m.as_dict() for m in messages], tokenize=False
    )
    starts = [i for i in range(1, len(mask)) if mask[i] and not mask[i - 1]]
    answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    for start, answer in zip(starts, answers, strict=True):
        assert prompt_ids(messages[:answer], tokenizer) == ids[:start]
    ends = [next((j for j in range(i, len(mask)) if not mask[j]), len(mask)) for i in starts]
    return [tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends, strict=True)]


def failure(template, messages=TALK):
    with pytest.raises(DataError) as caught:
        encode_chat(messages, tiny_tokenizer(template), place="train.jsonl:7")
    return str(caught.value)


@pytest.mark.parametrize(
    "template, spans",
    [
        (CHATML, ["Hello<|im_end|>", "All well<|im_end|>"]),
        (MARKED, ["Hello<|im_end|>", "All well<|im_end|>"]),
        (LLAMA2, [" Hello<|im_end|>", " All well<|im_end|>"]),
    ],
)
def test_exactly_the_assistants_tokens_are_supervised(template, spans):
    assert supervised(tiny_tokenizer(template)) == spans


def test_a_turn_without_a_special_token_is_supervised_whole():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert supervised(tiny_tokenizer(template)) == [" Hello\n", " All well\n"]


def test_marks_agree_with_transformers():
    tokenizer = tiny_tokenizer(MARKED)
    theirs = tokenizer.apply_chat_template(
        [m.as_dict() for m in TALK], return_dict=True, return_assistant_tokens_mask=True
    )
    assert encode_chat(TALK, tokenizer) == (theirs["input_ids"], [bool(m) for m in theirs["assistant_masks"]])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=3))
def test_either_exact_or_refused(answers):
    tokenizer = tiny_tokenizer(CHATML)
    messages = [m for a in answers for m in (Message("user", a[::-1]), Message("assistant", a))]
    try:
        found = supervised(tokenizer, messages)
    except DataError as error:
        assert "crosses the edge" in str(error)
    else:
        assert found == [a + "<|im_end|>" for a in answers]


def test_refusals_say_what_is_not_exact():
    think = [*TALK[:1], Message("assistant", "<think>so</think>Hello"), *TALK[2:]]
    message = failure(FORGETFUL, think)
    assert "train.jsonl:7" in message and "2 rows" in message
    message = failure(LLAMA2, [Message("system", "s"), *TALK])
    assert "no system here" in message
    message = failure(CHATML, [Message("user", "Hi"), Message("assistant", "\n\nHello")])
    assert "crosses the edge" in message and "ĊĊ" in message
    assert "no chat template" in failure(None)
    assert "no assistant message" in failure(CHATML, TALK[:1])
    assert "enclose nothing" in failure(
        MARKED.replace("{{ m.content }}<|im_end|>{% endgeneration %}", "{% endgeneration %}{{ m.content }}<|im_end|>")
    )
    assert "no text for it" in failure(CHATML.replace("{{ m.content }}<|im_end|>\n", "", 1), TALK[:2])


@pytest.mark.slow
def test_spans_of_smollm2s_template_are_exact(smollm2):
    assert supervised(smollm2) == ["Hello<|im_end|>", "All well<|im_end|>"]
    system = [Message("system", "Be brief."), *TALK]
    assert supervised(smollm2, system) == ["Hello<|im_end|>", "All well<|im_end|>"]
    ids, mask = encode_chat(TALK[:2], smollm2)
    assert [t for t, m in zip(ids, mask, strict=True) if m] == [19556, 2]
    assert smollm2.decode(ids[mask.index(True) - 4 : mask.index(True)]) == "<|im_start|>assistant\n"
