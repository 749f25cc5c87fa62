import pytest

from deltaw.config import DataConfig
from deltaw.data import check_unwrapped, encode, encode_prompt, read
from deltaw.errors import DataError

from .conftest import CHATML, LLAMA2, tiny_tokenizer

PAIR = {"prompt": "ab", "completion": "cd"}


def encoded(rows, tokenizer, **config):
    config = DataConfig(**config)
    records = read(rows, config)
    result = encode(records, tokenizer, config)
    for record, example in zip(records, result.examples, strict=False):
        assert example.supervised[0] is False and any(example.supervised)
        if record.form != "text" and not result.counts.truncated and not result.counts.dropped:
            starts = [i for i in range(1, len(example.supervised)) if example.supervised[i] > example.supervised[i - 1]]
            assert encode_prompt(record, tokenizer, config) == example.input_ids[: starts[-1]]
    return result


def spelled(example, tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    return [t.upper() if s else t for t, s in zip(tokens, example.supervised, strict=True)]


def failure(rows, tokenizer, **config):
    with pytest.raises(DataError) as caught:
        encoded(rows, tokenizer, **config)
    return str(caught.value)


@pytest.mark.parametrize(
    "row, config, bos, golden",
    [
        (PAIR, {}, False, "a b C D <|IM_END|>"),
        (PAIR, {"separator": "\n"}, True, "<s> a b Ċ C D <|IM_END|>"),
        ({"prompt": "", "completion": "cd"}, {}, True, "<s> C D <|IM_END|>"),
        ({"text": "abc"}, {}, False, "a B C <|IM_END|>"),
        ({"text": "abc"}, {}, True, "<s> A B C <|IM_END|>"),
    ],
)
def test_plain_records_have_these_tokens_and_masks(row, config, bos, golden):
    tokenizer = tiny_tokenizer(bos=bos)
    assert spelled(encoded([row], tokenizer, **config).examples[0], tokenizer) == golden.split()


def test_chat_forms_meet_in_one_encoding():
    tokenizer = tiny_tokenizer(CHATML)
    chat = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}
    first = encoded([chat], tokenizer).examples[0].input_ids
    assert tokenizer.decode(first) == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncd<|im_end|>"
    assert encoded([PAIR], tokenizer, template="chat").examples[0].input_ids == first
    assert encoded([{"instruction": "ab", "output": "cd"}], tokenizer).examples[0].input_ids == first
    system = encoded([chat], tokenizer, system="S").examples[0].input_ids
    assert tokenizer.decode(system).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user")


def test_a_plain_instruction_has_its_form():
    tokenizer = tiny_tokenizer()
    example = encoded([{"instruction": "i", "input": "x", "output": "o"}], tokenizer).examples[0]
    text = "### Instruction:\ni\n\n### Input:\nx\n\n### Response:\no<|im_end|>"
    assert tokenizer.decode(example.input_ids) == text and example.supervised.count(True) == 2
    encoded([{"instruction": "i", "output": "o"}], tokenizer)


def test_too_long_records_are_cut_dropped_or_refused():
    rows = [PAIR, {"prompt": "abcdef", "completion": "gh"}]
    tokenizer = tiny_tokenizer(bos=True)
    cut = encoded(rows, tokenizer, max_length=6)
    assert spelled(cut.examples[1], tokenizer) == ["<s>", "e", "f", "G", "H", "<|IM_END|>"]
    assert (cut.counts.truncated, cut.counts.kept, cut.counts.longest, cut.counts.tokens) == (1, 2, 6, 12)
    dropped = encoded(rows, tokenizer, max_length=6, too_long="drop")
    assert (dropped.counts.dropped, dropped.counts.kept, dropped.counts.supervised) == (1, 1, 3)
    assert "records[1]: it has 10 tokens" in failure(rows, tokenizer, max_length=6, too_long="error")
    assert "last answer alone has 3" in failure(rows, tokenizer, max_length=3)
    assert "all 2 records" in failure(rows, tokenizer, max_length=3, too_long="drop")
    text = encoded([{"text": "abcdef"}], tokenizer, max_length=4)
    assert spelled(text.examples[0], tokenizer) == ["<s>", "A", "B", "C"]


def test_a_cut_conversation_keeps_only_whole_answers():
    tokenizer = tiny_tokenizer(CHATML)
    turn = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cdef"}]
    whole = encoded([{"messages": turn * 2}], tokenizer).examples[0]
    spans = {}
    for most in range(7, len(whole.input_ids)):
        example = encoded([{"messages": turn * 2}], tokenizer, max_length=most).examples[0]
        assert example.input_ids == whole.input_ids[-most:]
        spans[most] = sum(example.supervised)
    assert set(spans.values()) == {5, 10}


def test_settings_that_do_not_fit_a_form_are_refused():
    chat = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}
    plain, chatty = tiny_tokenizer(), tiny_tokenizer(CHATML)
    assert "no chat template" in failure([chat], plain)
    assert "template: chat" in failure([chat], chatty, template="plain")
    assert "separator" in failure([chat], chatty, separator="\n")
    assert "system has no effect" in failure([PAIR], plain, system="s")
    assert "text records have no turns" in failure([{"text": "t"}], chatty, template="chat")
    assert "no eos_token" in failure([PAIR], tiny_tokenizer(eos=None))
    assert "prompt is empty" in failure([{"prompt": "", "completion": "c"}], plain)


@pytest.mark.slow
def test_labels_of_smollm2_are_its_completions(smollm2):
    result = encoded([{"prompt": "name[Blue Spice]", "completion": "Blue Spice."}], smollm2, separator="\n")
    (example,) = result.examples
    kept = [i for i, s in zip(example.input_ids, example.supervised, strict=True) if s]
    assert kept == [*smollm2("Blue Spice.")["input_ids"], smollm2.eos_token_id]
    assert example.input_ids[: -len(kept)] == smollm2("name[Blue Spice]\n")["input_ids"]


@pytest.mark.slow
def test_instruct_records_are_encoded_exactly(smollm2, shared_data):
    config = DataConfig()
    counts = encode(read(shared_data / "instruct", config), smollm2, config).counts
    assert counts.kept == counts.records == 1100 and 0 < counts.supervised < counts.tokens


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("prompt", ["Hi", "<s>Hi", ""])
@pytest.mark.parametrize("completion", ["all", "all<|im_end|>", "all<|im_end|>\n", "all<|im_end|> so"])
def test_bos_and_eos_come_once_where_the_text_has_them(bos: bool, adds_eos: bool, prompt: str, completion: str) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    if adds_eos:
        from tokenizers import processors

        core = tokenizer.backend_tokenizer
        marks = [(mark, core.token_to_id(mark)) for mark in ("<s>", "<|im_end|>")]
        single = "<s> $A <|im_end|>" if bos else "$A <|im_end|>"
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    config = DataConfig()
    begins = "<s>" if bos or prompt.startswith("<s>") else ""
    ends = "all<|im_end|> so<|im_end|>" if completion.endswith("so") else "all<|im_end|>"
    if prompt or bos:
        records = read([{"prompt": prompt, "completion": completion}], config)
        (example,) = encode(records, tokenizer, config).examples
        assert tokenizer.decode(example.input_ids) == begins + prompt.removeprefix("<s>") + ends
        before = encode_prompt(records.items[0], tokenizer, config)
        assert before == example.input_ids[: len(before)] and not any(example.supervised[: len(before)])
        assert all(example.supervised[len(before) :])
    (example,) = encode(read([{"text": prompt + completion}], config), tokenizer, config).examples
    assert tokenizer.decode(example.input_ids) == begins + prompt.removeprefix("<s>") + ends
    assert example.supervised == [False] + [True] * (example.length - 1)


@pytest.mark.parametrize("completion", ["<s>all", "<|im_end|>"])
def test_an_empty_prompt_leaves_the_bos_to_the_completion(completion: str) -> None:
    tokenizer, config = tiny_tokenizer(bos=True), DataConfig()
    records = read([{"prompt": "", "completion": completion}], config)
    (example,) = encode(records, tokenizer, config).examples
    assert (
        tokenizer.decode(example.input_ids)
        == "<s>" + completion.removeprefix("<s>").removesuffix("<|im_end|>") + "<|im_end|>"
    )
    assert encode_prompt(records.items[0], tokenizer, config) == [tokenizer.bos_token_id] and not example.supervised[0]


def test_prompts_that_are_in_the_template_already_are_not_put_into_it_twice():
    wrapped = {"prompt": "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n", "completion": "cd<|im_end|>"}
    records = read([{"prompt": "ab", "completion": "cd"}, wrapped], DataConfig())
    with pytest.raises(
        DataError, match=r"1 of 2 prompts \(records\[1\]\) end as the chat template does.*template: plain"
    ):
        check_unwrapped(records, tiny_tokenizer(CHATML))
    check_unwrapped(records, tiny_tokenizer(LLAMA2))
    check_unwrapped(read([{"prompt": "assistant", "completion": "b"}], DataConfig()), tiny_tokenizer(CHATML))
