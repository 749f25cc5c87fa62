"""Records of tasks other than the next token: which end is cut, what ends an answer, and nothing twice."""

from __future__ import annotations

from typing import Any

import pytest

from deltaw.config import DataConfig
from deltaw.data import Encoded, read
from deltaw.data.items import encode_labelled, encode_seq2seq, encoder_inputs
from deltaw.errors import DataError
from tests.data.conftest import tiny_tokenizer

# What a tokenizer puts around a text: T5's, BART's, mBART's on the source's side, and one that adds nothing
AROUND = {"t5": "$A </s>", "bart": "<s> $A </s>", "mbart": "$A </s> <lang>", "none": "$A"}


def tokenizer_of(kind: str) -> Any:
    from tokenizers import processors

    tokenizer = tiny_tokenizer(eos="</s>", special=("</s>", "<lang>"))
    core = tokenizer.backend_tokenizer
    marks = [(mark, core.token_to_id(mark)) for mark in ("<s>", "</s>", "<lang>")]
    core.post_processor = processors.TemplateProcessing(
        single=AROUND[kind], pair=AROUND[kind].replace("$A", "$A </s> $B"), special_tokens=marks
    )
    return tokenizer


def pair(prompt: str, completion: str, kind: str, **settings: Any) -> tuple[Encoded, str, str]:
    tokenizer, config = tokenizer_of(kind), DataConfig(**settings)
    encoded = encode_seq2seq(read([{"prompt": prompt, "completion": completion}], config), tokenizer, config)
    (item,) = encoded.examples
    records = list(read([{"prompt": prompt}], config, completions=False))
    assert encoder_inputs(records, tokenizer, config) == [item.inputs["input_ids"]], "answered as it was trained"
    return encoded, tokenizer.decode(item.inputs["input_ids"]), tokenizer.decode(item.target)


def whole(kind: str, text: str, *, answer: bool = False) -> str:
    around = AROUND["t5"] if kind == "none" and answer else AROUND[kind]
    return around.replace(" ", "").replace("$A", text)


@pytest.mark.parametrize("kind", AROUND)
def test_a_prompt_loses_its_left_and_keeps_what_the_tokenizer_adds(kind: str) -> None:
    marks = len(AROUND[kind].split()) - 1
    encoded, prompt, answer = pair("abcdefgh", "xyz", kind, max_length=4 + marks)
    assert (prompt, answer) == (whole(kind, "efgh"), whole(kind, "xyz", answer=True))
    assert encoded.counts.truncated == 1 and encoded.counts.longest == 4 + marks
    encoded, prompt, _ = pair("abcd", "xyz", kind, max_length=4 + marks)
    assert prompt == whole(kind, "abcd") and encoded.counts.truncated == 0


@pytest.mark.parametrize("kind", AROUND)
@pytest.mark.parametrize("length", [3, 5, 6])
def test_an_answer_that_is_cut_teaches_no_end_and_is_counted(kind: str, length: int) -> None:
    encoded, _, answer = pair("a", "uvwxyz", kind, max_length=length)
    assert answer == whole(kind, "uvwxyz", answer=True).replace("<s>", "·").replace("</s>", "¦")[:length].replace(
        "·", "<s>"
    ).replace("¦", "</s>")
    assert not answer.endswith("</s>")
    assert encoded.counts.truncated == 1
    encoded, _, answer = pair("a", "uvwxyz", kind, max_length=9)
    assert answer == whole(kind, "uvwxyz", answer=True) and encoded.counts.truncated == 0


@pytest.mark.parametrize(("too_long", "kept"), [("drop", 1), ("error", 0)])
def test_long_answers_are_dropped_or_refused_by_their_whole_length(too_long: Any, kept: int) -> None:
    config = DataConfig(max_length=4, too_long=too_long)
    records = read([{"prompt": "a", "completion": c} for c in ("xyz", "vwxyz")], config)
    if kept:
        encoded = encode_seq2seq(records, tokenizer_of("t5"), config)
        assert encoded.counts.kept == kept and encoded.counts.dropped == 1
    else:
        with pytest.raises(DataError, match="it has 6 tokens, over max_length 4"):
            encode_seq2seq(records, tokenizer_of("t5"), config)


@pytest.mark.parametrize("kind", AROUND)
@pytest.mark.parametrize("text", ["{}", "<s>{}", "{}</s>", "<s>{}</s>", "{}</s>\n"])
def test_what_a_text_begins_and_ends_with_already_comes_once(kind: str, text: str) -> None:
    encoded, prompt, answer = pair(text.format("ab"), text.format("xy"), kind)
    for found in (prompt, answer):
        assert found.count("</s>") <= 1 and found.count("<s>") <= 1
    assert answer.count("</s>") == 1
    if kind == "bart":
        assert (prompt, answer) == ("<s>ab</s>", "<s>xy</s>")
    assert encoded.ends == (tokenizer_of(kind).eos_token_id,) and encoded.note is None


def test_without_an_eos_the_user_is_told() -> None:
    tokenizer = tokenizer_of("none")
    tokenizer.eos_token = None
    config = DataConfig()
    encoded = encode_seq2seq(read([{"prompt": "a", "completion": "xyz"}], config), tokenizer, config)
    assert encoded.ends == () and "no eos_token" in (encoded.note or "")


@pytest.mark.parametrize("second", [None, "cd", "cd</s>"])
@pytest.mark.parametrize("first", ["ab", "<s>ab", "<s>ab</s>"])
def test_a_classifiers_texts_have_each_mark_once(first: str, second: str | None) -> None:
    tokenizer, config = tokenizer_of("bart"), DataConfig(labels=["no", "yes"])
    record = {"text": first, "label": "yes"} | ({} if second is None else {"text_pair": second})
    encoded = encode_labelled(read([record], config), tokenizer, config)
    found = tokenizer.decode(encoded.examples[0].inputs["input_ids"])
    if second is None:
        assert found == "<s>ab</s>"
    elif not first.endswith("</s>"):
        assert found == "<s>ab</s>cd</s>"
    assert encoded.ends == ()


def test_records_without_a_token_are_named() -> None:
    """An encoder was given a row of no tokens."""
    tokenizer, config = tokenizer_of("none"), DataConfig()
    given = [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}]
    with pytest.raises(DataError, match=r"1 of 2 records cannot be encoded:\n.*records\[1\]: its prompt has no token"):
        encode_seq2seq(read(given, config), tokenizer, config)
    with pytest.raises(DataError, match="its prompt has no token"):
        encoder_inputs(list(read(given, config, completions=False)), tokenizer, config)
    encode_seq2seq(read(given, config), tokenizer_of("t5"), config)  # which has an end token
