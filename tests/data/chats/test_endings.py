"""The token by which a chat-tuned model stops, found in every form of template."""

from __future__ import annotations

from typing import Any

import pytest

from deltaw.config import DataConfig
from deltaw.data import Encoded, encode, encode_prompt, read, turn_ends
from tests.data.conftest import CHATML, LLAMA2, MARKED, tiny_tokenizer

USER, MORE = {"role": "user", "content": "Hi"}, {"role": "user", "content": "more"}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


ONE = [USER, said("all")]
TWO = [USER, said("all"), MORE, said("Hello")]
OPEN = [USER, said("all"), MORE]


def ending_in(end: str, *, start: str = "") -> str:
    """A template whose assistant turns begin and end so."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + start + "{{ m.content }}" + end + "{% else %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_start|>assistant\n{% endif %}{% endfor %}"
    )


def encoded(template: str, *conversations: list[dict[str, str]], **tokens: Any) -> tuple[Encoded, Any]:
    tokenizer = tiny_tokenizer(template, **tokens)
    records = read([{"messages": c} for c in conversations], DataConfig())
    return encode(records, tokenizer, DataConfig()), tokenizer


OTHER = {"eos": "<|endoftext|>", "special": ("<|endoftext|>", "<|eot|>", "<|end|>", "</s>")}
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "chatml, another eos": (CHATML, ["<|im_end|>"], OTHER),
    "two tokens": (ending_in("<|eot|>\n"), ["<|eot|>"], OTHER),
    "the eos and a new line": (ending_in("{{ eos_token }}\n"), ["<|endoftext|>"], OTHER),
    "the eos": (LLAMA2, ["</s>"], OTHER | {"eos": "</s>"}),
    "two special tokens": (ending_in("<|end|><|eot|>"), ["<|end|>", "<|eot|>"], OTHER),
    "eos behind the last turn": (
        ending_in("<|end|>\n") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        ["<|end|>", "<|endoftext|>"],
        OTHER,
    ),
    "the next conversation's start": (ending_in("{{ eos_token }}<s>"), ["<|endoftext|>", "<s>"], OTHER),
    "text after it": (ending_in("<|eot|>[END]\n"), ["<|eot|>"], OTHER),
    "no special one": (ending_in("<|eot|>\n"), ["<|eot|>"], OTHER | {"added": ("<|eot|>",)}),
    "one of two": (ending_in("{{ '<|eot|>' if 'H' in m.content else '</s>' }}\n"), ["<|eot|>", "</s>"], OTHER),
    "changed content": (ending_in("<|eot|>\n").replace("m.content", "m.content | upper"), ["<|eot|>"], OTHER),
    "text before it": (ending_in("<|eot|>\n", start="(so)"), ["<|eot|>"], OTHER),
    "marked": (MARKED, ["<|im_end|>"], OTHER),
    "no eos at all": (CHATML, ["<|im_end|>"], {"eos": None}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_end_that_a_template_teaches(name: str) -> None:
    template, ends, tokens = CASES[name]
    found, tokenizer = encoded(template, ONE, TWO, **tokens)
    assert sorted(tokenizer.convert_ids_to_tokens(list(found.ends))) == sorted(ends)
    assert found.note is None
    assert set(tokenizer.convert_ids_to_tokens(turn_ends(tokenizer))) <= set(ends)
    for example in found.examples:  # and it is the last thing learnt, but for text that follows it in the turn
        learnt = [t for t, m in zip(example.input_ids, example.supervised, strict=True) if m]
        assert found.ends[0] in learnt or found.ends[-1] in learnt
        if "END" not in template:
            assert learnt[-1] in found.ends


def test_a_token_that_stands_within_answers_too() -> None:
    """gpt-oss ends each of an answer's channels with a token after which the answer goes on."""
    template = ending_in("</s>").replace("m.content", "m.content | replace('#', '<|end|>')")
    found, tokenizer = encoded(template, [USER, said("all#Hello")], **OTHER)
    assert tokenizer.convert_ids_to_tokens(list(found.ends)) == ["</s>"]
    found, tokenizer = encoded(CHATML, TWO, [USER, said("say <|im_end|> now")], **OTHER)
    assert tokenizer.convert_ids_to_tokens(list(found.ends)) == ["<|im_end|>"], (
        "a record that names the token is no reason"
    )


def test_an_empty_answer_does_not_say_where_its_end_begins() -> None:
    """A special token that begins each turn ends none."""
    template = ending_in("<|end|>\n", start="<|eot|>")
    found, tokenizer = encoded(template, ONE, [USER, said("<|end|>")], **OTHER)
    assert tokenizer.convert_ids_to_tokens(list(found.ends)) == ["<|end|>"]


def test_spans_within_a_turn_do_not_end_it() -> None:
    marked = "{% generation %}<|eot|>{% endgeneration %}{{ 'x' }}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    template = MARKED.replace("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}", marked)
    assert marked in template
    found, tokenizer = encoded(template, TWO, **OTHER)
    assert tokenizer.convert_ids_to_tokens(list(found.ends)) == ["<|im_end|>"] and found.note is None


def test_a_conversation_that_goes_on_teaches_its_answers_end() -> None:
    found, tokenizer = encoded(CHATML, OPEN, **OTHER)
    assert tokenizer.convert_ids_to_tokens(list(found.ends)) == ["<|im_end|>"]


def test_an_end_in_plain_text_is_said_by_name() -> None:
    found, tokenizer = encoded(ending_in("\nUser:"), ONE, TWO, **OTHER)
    assert found.ends == () and turn_ends(tokenizer) == []
    assert found.note is not None
    assert "ends 3 of 3 answers in no special token but plain text ('\\nUser:')" in found.note
    assert "goes on until max_new_tokens" in found.note
    found, _ = encoded(ending_in("\n"), ONE, **OTHER)
    assert found.ends == () and found.note is not None and "in no token of its own" in found.note
    found, _ = encoded(ending_in("\n"), [USER, said("over <|eot|>")], **OTHER)
    assert len(found.ends) == 1, "the record's own end is taught, though the template's is none"


def test_marks_that_leave_the_end_out_are_said() -> None:
    template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    found, tokenizer = encoded(template, TWO, **OTHER)
    assert found.ends == () and found.note is not None
    assert "marks leave out what ends 2 of 2 answers (<|im_end|>)" in found.note
    assert tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) == ["<|im_end|>"], "a chat still stops there"


def test_a_plain_template_teaches_the_eos() -> None:
    tokenizer = tiny_tokenizer(**OTHER)
    for records in ([{"prompt": "Hi", "completion": "all"}], [{"text": "Hello"}]):
        found = encode(read(records, DataConfig()), tokenizer, DataConfig())
        assert found.ends == (tokenizer.eos_token_id,) and found.note is None


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA2, MARKED, ending_in("{{ eos_token }}\n")], ids=["chatml", "llama2", "marked", "eos"]
)
@pytest.mark.parametrize("text", ["<s>{}", "{}<|im_end|>", "<s>{}<|im_end|>\n", "{}<|endoftext|>"])
def test_a_message_that_has_the_templates_marks_already_gets_no_second_ones(template: str, text: str) -> None:
    def talk(form: str) -> list[dict[str, str]]:
        return [{"role": m["role"], "content": form.format(m["content"])} for m in TWO]

    plain, tokenizer = encoded(template, talk("{}"), **OTHER)
    whole = tokenizer.decode(plain.examples[0].input_ids)
    ends = "<|im_end|>" in whole or "<|endoftext|>" in text
    form = text if whole.startswith("<s>") else text.removeprefix("<s>")
    form = form if ends else form.replace("<|im_end|>", "").strip()
    found, tokenizer = encoded(template, talk(form), **OTHER)
    assert tokenizer.decode(found.examples[0].input_ids) == whole and found == plain
    config = DataConfig()
    (one, other) = (read([{"messages": talk(f)[:3]}], config, completions=False).items[0] for f in (form, "{}"))
    assert encode_prompt(one, tokenizer, config) == encode_prompt(other, tokenizer, config)


def test_an_end_that_the_template_lacks_is_left_in_the_text() -> None:
    found, tokenizer = encoded(ending_in("\n"), [USER, said("all<|endoftext|>")], **OTHER)
    assert found.ends == (tokenizer.eos_token_id,) and found.note is None


def test_smollm2s_template_with_another_eos(smollm2: Any) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(smollm2)
    tokenizer.eos_token = "<|endoftext|>"
    found = encode(read([{"messages": TWO}], DataConfig()), tokenizer, DataConfig())
    assert tokenizer.convert_ids_to_tokens(list(found.ends)) == ["<|im_end|>"] and found.note is None
