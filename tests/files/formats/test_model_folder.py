"""The tokenizer and chat template in an adapter's folder: used, saved and merged where they are others than the base's."""

import io
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltaw
from deltaw import LoRA, attach, compress, load, merge_files, save, unmerge_files
from deltaw.cli import main
from deltaw.errors import BaseMismatch, ConfigError
from deltaw.files.formats.locate import NotByFiles
from deltaw.files.formats.model_folder import brought, differs, files_in
from deltaw.model.pretrained import load_pretrained
from deltaw.training.opening import equip
from tests.conftest import byte_llama, fill
from tests.data.conftest import CHATML, tiny_tokenizer

NEW = ["<one>", "<two>"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder with a tokenizer that has no chat template."""
    tokenizer = tiny_tokenizer()
    byte_llama(tokenizer, tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def taught(base: Path) -> Any:
    """The base's tokenizer with new tokens and a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(NEW)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """PEFT's recipe for new tokens: a resized vocabulary, trained whole, and the tokenizer beside the adapter."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), taught(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    made = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )  # fmt: skip
    theirs = peft.get_peft_model(model, made)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def plain(base: Path, folder: Path) -> Path:
    """An adapter of the base without a tokenizer."""
    model = fill(attach(AutoModelForCausalLM.from_pretrained(base), LoRA(rank=4, alpha=10, targets="qv")))
    return save(model, folder)


def test_new_tokens_are_whole_and_the_template_is_there(
    base: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = equip(load_pretrained(str(base)), adapter)
    ids = loaded.tokenizer("Hi<one>").input_ids
    assert ids[-1] == len(loaded.tokenizer) - 2 and loaded.tokenizer.chat_template == CHATML
    assert "tokens and chat template; new: <one>, <two>" in caplog.text
    assert max(loaded.of_base().tokenizer("Hi<one>").input_ids) < len(loaded.tokenizer) - 2
    assert loaded.of_base().tokenizer.chat_template == CHATML  # which the base has none of
    theirs = AutoModelForCausalLM.from_pretrained(base)
    theirs.resize_token_embeddings(len(loaded.tokenizer), mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model(torch.tensor([ids])).logits, theirs(torch.tensor([ids])).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("command", ["generate", "eval", "chat"])
def test_a_command_uses_them(
    command: str,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "data.jsonl"
    row = {"messages": [{"role": "user", "content": "Hi <one>"}, {"role": "assistant", "content": "all"}]}
    data.write_text((json.dumps(row) + "\n") * 3)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi <two>\n/base\nHi <two>\n/quit\n"))
    inputs = {"generate": ["Hi <one>"], "eval": [str(data)], "chat": []}[command]
    assert main([command, str(base), *inputs, "--adapter", str(adapter), "--max-new-tokens", "3"]) == 0
    assert command != "eval" or "exact match" in capsys.readouterr().out


def test_a_merged_model_has_them_and_rows_for_their_tokens(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert main(["merge", str(base), str(adapter), "-o", str(tmp_path / "merged")]) == 0
    model, tokenizer = (kind.from_pretrained(tmp_path / "merged") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert len(model.get_input_embeddings().weight) == len(model.lm_head.weight) == len(tokenizer) == 266
    assert tokenizer.chat_template == CHATML and model.config.vocab_size == 266
    loaded = equip(load_pretrained(str(base)), adapter)
    ids = torch.tensor([tokenizer("Hi<one> a<two>").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, loaded.model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["tokenizer", "template alone", "template in a config"])
def test_a_merge_on_disk_takes_them_and_an_unmerge_gives_the_bases_back(base: Path, tmp_path: Path, what: str) -> None:
    folder = plain(base, tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML
    if what == "tokenizer":
        tokenizer.save_pretrained(folder)
    elif what == "template alone":
        (folder / "chat_template.jinja").write_text(CHATML)
    else:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    merge_files(base, folder, tmp_path / "merged", reversible=True)
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == CHATML and merged.get_vocab() == tokenizer.get_vocab()
    unmerge_files(tmp_path / "merged", folder, tmp_path / "back")
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == {
        p.name: p.read_bytes() for p in base.iterdir()
    }


def test_tokens_that_nobody_has_rows_for(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether a tokenizer fits is asked once: what uses the model refuses, a merge adds rows and says so."""
    folder = plain(base, tmp_path / "a")
    taught(base).save_pretrained(folder)
    with pytest.raises(NotByFiles, match="tokens up to 265, the checkpoint rows for 264"):
        merge_files(base, folder, tmp_path / "merged")
    loaded = load_pretrained(str(base))
    said = (
        rf"The tokenizer of {folder} has 266 tokens, the model's embedding 264 rows: there are none for '<one>' \(264\)"
    )
    with pytest.raises(ConfigError, match=said):
        equip(loaded, folder)
    assert not deltaw.adapters(loaded.model)
    assert main(["generate", str(base), "--adapter", str(folder), "Hi", "--max-new-tokens", "2"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert re.search(said, err) and err.count("264 rows") == 1
    assert main(["merge", str(base), str(folder), "-o", str(tmp_path / "merged"), "--any-base"]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "has tokens up to 265, the model's embedding 264 rows with the adapter: <one>, <two> get" in err
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_input_embeddings().weight
    assert len(weight) == 266
    torch.testing.assert_close(weight[264:], weight[:264].mean(0).expand(2, -1))


def test_a_token_in_whose_place_pictures_go_gets_no_row(base: Path, tmp_path: Path) -> None:
    """Gemma's tokenizer has one beyond the rows of its models for text alone."""
    folder = plain(base, tmp_path / "a")
    tokenizer = taught(base)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    roles = {"image_token": "<one>", "audio_token": "<two>"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra_special_tokens": roles}))
    equip(load_pretrained(str(base)), folder)
    merge_files(base, folder, tmp_path / "by files")
    assert main(["merge", str(base), str(folder), "-o", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    for merged in ("by files", "merged"):
        assert len(AutoModelForCausalLM.from_pretrained(tmp_path / merged).get_input_embeddings().weight) == 264


def test_a_tokenizer_of_another_base_is_refused_by_name(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = plain(base, tmp_path / "a")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    held = json.loads((folder / "tokenizer.json").read_text())
    words = held["model"]["vocab"]
    one, other = list(words)[5], list(words)[9]
    words[one], words[other] = words[other], words[one]
    (folder / "tokenizer.json").write_text(json.dumps(held))
    loaded = load_pretrained(str(base))
    for refused in (lambda: equip(loaded, folder), lambda: merge_files(base, folder, tmp_path / "merged")):
        with pytest.raises(BaseMismatch, match=r"id 5 is '\*', in the base's '&'"):
            refused()
    assert not (tmp_path / "merged").exists() and not deltaw.adapters(loaded.model)
    equip(loaded, folder, check_base=False)
    assert "is not one of this base" in caplog.text


def test_special_tokens_of_other_names_are_named(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = plain(base, tmp_path / "a")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    text = (folder / "tokenizer.json").read_text().replace("<|im_start|>", "<|turn|>")
    (folder / "tokenizer.json").write_text(text)
    assert brought(folder, AutoTokenizer.from_pretrained(base)) is not None
    assert "'<|im_start|>' is '<|turn|>' (id 262)" in caplog.text


def test_one_that_is_the_bases_changes_nothing_and_is_not_written(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = plain(base, tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    loaded = load_pretrained(str(base))
    with caplog.at_level(logging.INFO, logger="deltaw"):
        assert equip(loaded, folder) is loaded and "tokenizer" not in caplog.text
    save(loaded.model, tmp_path / "again")
    save(loaded.model, tmp_path / "given", tokenizer=tokenizer)
    assert not files_in(tmp_path / "again") and not files_in(tmp_path / "given")
    assert not differs(folder, str(base)) and differs(taught(base), str(base)) and differs(tokenizer, None)


@pytest.mark.parametrize("method", [LoRA(rank=4, alpha=10, targets="qv"), deltaw.IA3()], ids=["lora", "ia3"])
def test_what_is_saved_has_it_where_it_is_another_one(base: Path, tmp_path: Path, method: Any) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), taught(base)
    save(fill(attach(model, method)), tmp_path / "a", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "a").get_vocab() == tokenizer.get_vocab()
    again = AutoModelForCausalLM.from_pretrained(base)
    load(again, tmp_path / "a")
    save(again, tmp_path / "b")
    names = {p.name for p in files_in(tmp_path / "a")}
    assert {p.name for p in files_in(tmp_path / "b")} == names and "chat_template.jinja" in names
    if isinstance(method, LoRA):
        compress(tmp_path / "a", tmp_path / "c", rank=2)
        assert {p.name for p in files_in(tmp_path / "c")} == names


def test_a_run_keeps_the_tokenizer_that_it_was_given(base: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), taught(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    data = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "all"}]}] * 4
    config = deltaw.TrainConfig(out=str(tmp_path / "run"), steps=1, samples=0, valid_share=0.0)
    method = LoRA(rank=2, alpha=5, targets="qv", whole="embed_tokens,lm_head")
    result = deltaw.train(model, data, config, method=method, tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(result.adapter).chat_template == CHATML
    loaded = equip(load_pretrained(str(base)), result.adapter)
    assert len(loaded.tokenizer) == 266 == loaded.model(torch.tensor([[265]])).logits.shape[-1]


def test_new_tokens_of_a_tied_model_are_merged_untied(base: Path, tmp_path: Path) -> None:
    """PEFT trains the embedding and the head apart, which the model ties."""
    model, tokenizer = byte_llama(tiny_tokenizer(), tie_word_embeddings=True), taught(base)
    model.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    arguments = ["merge", str(base), str(tmp_path / "a"), "-o", str(tmp_path / "merged")]
    assert main(arguments) != 0
    assert not (tmp_path / "merged").exists()
    assert main([*arguments, "--untie"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "merged")("Hi<one> a<two>").input_ids])
    assert not merged.config.tie_word_embeddings and int(ids.max()) == 265
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, theirs.eval()(ids).logits, rtol=1e-4, atol=1e-4)
