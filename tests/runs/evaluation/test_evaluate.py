"""What `evaluate` reports is what the model does: loss by hand, text by the model's own greedy choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw.config import DataConfig, GenerateConfig
from deltaw.data import encode, encode_prompt, read
from deltaw.data.items import encode_labelled
from deltaw.errors import DataError
from deltaw.model.generate import generate, settings
from deltaw.model.pretrained import pad_id
from deltaw.model.switch import using
from deltaw.runs.evaluation.evaluate import evaluate
from deltaw.training.losses import ClassLoss
from deltaw.training.opening import opened
from tests.conftest import byte_llama, fill
from tests.data.conftest import CHATML, tiny_tokenizer
from tests.training.test_tasks import TEXTS, about, folder_of

DATA = DataConfig(template="plain")
RECORDS = [
    {"prompt": "What is red?", "completion": " A color"},
    {"prompt": "Say it", "completion": " Hi"},
    {"prompt": "What is red?", "completion": " All of it"},
    {"prompt": "A much longer prompt than the others are", "completion": " no"},
]


@pytest.fixture
def small() -> Any:
    tokenizer = tiny_tokenizer(CHATML)
    model = byte_llama(tokenizer, initializer_range=0.4)
    deltaw.attach(model, deltaw.LoRA(rank=4, alpha=6))
    return fill(model), tokenizer


def by_hand(model: Any, tokenizer: Any) -> float:
    """Σ over completion tokens of −log p, one record at a time, over their number."""
    total = count = 0.0
    for example in encode(read(RECORDS, DATA), tokenizer, DATA).examples:
        logp = model(torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
        for t, (token, scored) in enumerate(zip(example.input_ids, example.supervised, strict=True)):
            if scored:
                total -= float(logp[t - 1, token])
                count += 1
    return total / count


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_an_end_in_a_references_text_is_no_part_of_the_answer(small: Any, template: Any) -> None:
    model, tokenizer = small
    data, asked = DataConfig(template=template), GenerateConfig(max_new_tokens=5)
    prompts = [{"prompt": r["prompt"]} for r in RECORDS[:2]]
    said = evaluate(model, tokenizer, read([p | {"completion": "?"} for p in prompts], data), data, asked).predictions
    for end in ("", "<|im_end|>", "<|im_end|>\n"):
        records = read([p | {"completion": text + end} for p, text in zip(prompts, said, strict=True)], data)
        found = evaluate(model, tokenizer, records, data, asked)
        assert found.scores["exact_match"].value == 1.0 and found.predictions == said


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("adapter", [None, "default"])
def test_loss_is_the_sum_by_hand(small: Any, adapter: str | None, batch: int) -> None:
    model, tokenizer = small
    with using(model, adapter):
        found = evaluate(model, tokenizer, read(RECORDS, DATA), DATA, GenerateConfig(batch=batch), metrics=("loss",))
        assert found.scores["loss"].value == pytest.approx(by_hand(model, tokenizer), rel=1e-5)
    assert found.predictions == [] and found.losses is not None and len(found.losses.sums) == len(RECORDS)
    assert sum(found.losses.sums) / sum(found.losses.counts) == pytest.approx(found.scores["loss"].value)


def test_classes_and_their_losses_take_one_pass_over_the_records_that_are_kept(tmp_path: Path) -> None:
    data = DataConfig(task="classification", labels=["cold", "warm"], max_length=20, too_long="drop")
    loaded = opened(folder_of(TEXTS["bert"], tmp_path), data)
    long = {"text": "red green blue " * 4, "label": "warm"}
    records = read([*about(7), long], data)
    kept = encode_labelled(records, loaded.tokenizer, data).examples
    assert len(kept) < len(records)
    passes: list[int] = []
    loaded.model.register_forward_hook(lambda _, inputs, out: passes.append(len(out.logits)))
    found = evaluate(loaded.model, loaded.tokenizer, records, data, GenerateConfig(batch=4))
    assert sum(passes) == found.records == len(found.predictions) == len(kept)
    assert found.losses is not None and found.items == len({records.items[i].prompt for i in range(7)}) == 4
    loss = ClassLoss(loaded.model, pad_id(loaded.tokenizer))
    with torch.no_grad():
        expected = [float(loss(loss.collate([one]))[0]) for one in kept]
    assert found.losses.sums == pytest.approx(expected, rel=1e-4)


def test_base_and_adapter_differ_and_the_metrics_come_in_the_order_asked(small: Any) -> None:
    model, tokenizer = small
    records = read(RECORDS, DATA)
    config = GenerateConfig(max_new_tokens=8, batch=2)
    with using(model, None):
        base = evaluate(model, tokenizer, records, DATA, config, metrics=("rouge_l", "loss"))
    adapted = evaluate(model, tokenizer, records, DATA, config, metrics=("rouge_l", "loss"))
    assert list(base.scores) == ["rouge_l", "loss"]
    assert base.scores["loss"] != adapted.scores["loss"]
    assert base.predictions != adapted.predictions


def test_losses_that_are_not_finite_are_an_error(small: Any) -> None:
    model, tokenizer = small
    with torch.no_grad():
        deltaw.parameters(model)[0].fill_(1e38)
    with pytest.raises(
        DataError, match=r"(?s)no score: With the adapter 'default' the outputs are not finite.*entries of 1e"
    ):
        evaluate(model, tokenizer, read(RECORDS, DATA), DATA, GenerateConfig(), metrics=("loss",))


def test_equal_prompts_are_one_item_with_several_references(small: Any) -> None:
    model, tokenizer = small
    found = evaluate(
        model, tokenizer, read(RECORDS, DATA), DATA, GenerateConfig(max_new_tokens=4), metrics=("exact_match",)
    )
    assert found.items == len(found.predictions) == 3
    assert not model.training


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, ids: list[int], most: int) -> list[int]:
    """One prompt, no cache, no padding, no library."""
    out: list[int] = []
    while len(out) < most:
        token = int(model(torch.tensor([[*ids, *out]])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        out.append(token)
    return out


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_batched_generation_is_each_prompt_alone_in_the_order_given(small: Any, batch: int) -> None:
    model, tokenizer = small
    prompts = [encode_prompt(r, tokenizer, DATA) for r in read(RECORDS, DATA)]
    done: list[int] = []
    found = generate(model, tokenizer, prompts, GenerateConfig(max_new_tokens=6, batch=batch), on_done=done.append)
    expected = [tokenizer.decode(greedy(model, tokenizer, p, 6), skip_special_tokens=True) for p in prompts]
    assert found == expected
    assert done[-1] == len(prompts) and done == sorted(done)


def test_sampling_is_seeded_and_the_models_own_habits_are_left_out(small: Any) -> None:
    model, tokenizer = small
    model.generation_config.update(do_sample=True, temperature=9.0, top_k=1, repetition_penalty=5.0)
    greedy_settings = settings(model, tokenizer, GenerateConfig())
    assert not greedy_settings.do_sample and greedy_settings.repetition_penalty in (None, 1.0)
    prompts = [encode_prompt(r, tokenizer, DATA) for r in read(RECORDS, DATA)]

    def draw(seed: int) -> list[str]:
        return generate(model, tokenizer, prompts, GenerateConfig(max_new_tokens=8, temperature=1.0, seed=seed))

    assert draw(1) == draw(1) != draw(2)
