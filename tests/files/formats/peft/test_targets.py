"""Layers that the settings of a foreign file mean: real PEFT reads the edited file, and we read the same from it."""

import copy
import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from deltaw import LoRA, attach, compress, convert, detach, load, save, spectrum
from deltaw.cli.main import main
from deltaw.errors import FileError
from deltaw.files.formats.peft.config import OF_ALL, OF_OTHERS
from tests.conftest import assert_same, byte_llama, fill, snapshot, tiny_gpt2, tiny_llama
from tests.data.conftest import tiny_tokenizer
from tests.files.conftest import filled, logits, rewritten, tiny_bert, tiny_t5


def tiny_mixtral() -> Any:
    """Stacked experts, which PEFT adapts by target_parameters."""
    config = MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
        num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return MixtralForCausalLM(config)


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "t5": tiny_t5, "mixtral": tiny_mixtral}


def of(model: str) -> Any:
    torch.manual_seed(5)
    return MODELS[model]().eval()


EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
# Model, settings of the adapter that PEFT trained, what is edited in its file, and how many layers that leaves
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "targets": ("llama", {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj"]}, 2),
    "a full name": ("llama", {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["model.layers.1.self_attn.q_proj"]}, 1),
    "a regex": ("llama", {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": r".*layers\.1\..*_proj"}, 2),
    "a regex that is no whole name": ("llama", {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": r".*\.q_pro."}, 2),
    "excluded": ("llama", {"target_modules": ["q_proj", "v_proj"]}, {"exclude_modules": ["layers.0.self_attn.q_proj"]}, 3),
    "excluded by a regex": ("llama", {"target_modules": ["q_proj", "v_proj"]}, {"exclude_modules": r".*\.0\..*"}, 2),
    "a layer's number": ("llama", {"target_modules": ["q_proj", "v_proj"]}, {"layers_to_transform": 1}, 2),
    "layers' numbers": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}, {"layers_to_transform": [0, 5]}, 2),
    "no numbers": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}, {"layers_to_transform": []}, 4),
    "a pattern": ("gpt2", {"target_modules": ["c_attn"]}, {"layers_to_transform": [0], "layers_pattern": "h"}, 1),
    "patterns": ("llama", {"target_modules": ["q_proj"]}, {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]}, 1),
    "T5's blocks": ("t5", {"target_modules": ["q", "v"]}, {"layers_to_transform": [1], "layers_pattern": "block"}, 6),
    "T5's first numbers": ("t5", {"target_modules": ["q", "wo"]}, {"layers_to_transform": 0}, 5),
    "T5's decoder": ("t5", {"target_modules": ["q", "v"]}, {"target_modules": r"decoder\..*\.[qv]"}, 8),
    "a module that is trained": ("bert", {"target_modules": ["query", "dense"]}, {"exclude_modules": ["output.dense"]}, 5),
    "embeddings": ("llama untied", {"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["q_proj"]}, 2),
    "all-linear": ("llama", {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"}, 4),
    "all-linear has no embedding": ("llama untied", {"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": "all-linear"}, 2),
    "all-linear has no head": ("llama untied", {"target_modules": ["q_proj", "lm_head"]}, {"target_modules": "all-Linear"}, 2),
    "all-linear of Conv1D": ("gpt2", {"target_modules": ["c_attn", "wpe"]}, {"target_modules": "all-linear"}, 2),
    "all-linear of a classifier": ("bert", {"target_modules": ["query", "pooler.dense"]}, {"target_modules": "all-linear"}, 3),
    "biases": ("bert", {"target_modules": ["query", "value"], "bias": "lora_only"}, {"target_modules": ["value"]}, 2),
    "dora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_dora": True}, {"target_modules": ["v_proj"]}, 2),
    "a full name has no number": ("llama untied", {"target_modules": ["q_proj", "lm_head"]}, {"layers_to_transform": [1]}, 2),
    "biases of layers that PEFT wraps": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}, {"target_modules": ["c_attn", "c_fc"]}, 2),
    "experts stay": ("mixtral", {"target_modules": ["q_proj"], **EXPERTS}, {"target_modules": []}, 4),
    "layers stay": ("mixtral", {"target_modules": ["q_proj"], **EXPERTS}, {"target_parameters": None}, 2),
    "one stack stays": ("mixtral", {"target_modules": ["q_proj"], **EXPERTS}, {"target_parameters": ["experts.gate_up_proj"]}, 4),
    "a bare name": ("mixtral", {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["down_proj"]}, {"target_modules": ["v_proj"]}, 4),
}  # fmt: skip
MODELS["llama untied"] = lambda: tiny_llama(tied=False)


def trained(model: Any, settings: dict[str, Any], folder: Path) -> None:
    """What PEFT saves of an adapter that changes something."""
    filled(peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=10, **settings))).save_pretrained(
        folder
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_layers_that_the_settings_do_not_mean_are_left_out_as_peft_does(
    case: str, ids: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, settings, edited, left = CASES[case]
    model = of(name)
    trained(model, settings, tmp_path / "a")
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    every = {k.split(".lora_")[0] for k in keys if ".lora_" in k}
    rewritten(tmp_path / "a", **edited)
    theirs: Any
    try:
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    except RuntimeError:  # PEFT gives the one stack the other's A and B
        assert case == "one stack stays"
        theirs = None
    before = snapshot(model)
    with caplog.at_level(logging.WARNING, "deltaw"):
        if theirs is None:
            with pytest.raises(FileError):
                load(model, tmp_path / "a")
            assert_same(model, before)
            return
        load(model, tmp_path / "a")
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=1e-4, atol=1e-4)
    said = [r.getMessage() for r in caplog.records if re.match(r"\d+ .*layers", r.getMessage())]
    assert len(said) == (left < len(every)), said
    assert not said or f"{len(every) - left} " in said[0]
    save(model, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert len({key.split(".lora_")[0] for key in ours if ".lora_" in key}) == left


def test_settings_that_mean_none_of_the_files_layers_are_refused(tmp_path: Path) -> None:
    model = of("llama")
    trained(model, {"target_modules": ["q_proj"]}, tmp_path / "a")
    before = snapshot(model)
    for edited in ({"target_modules": ["k_proj"]}, {"target_modules": []}, {"target_modules": "dummy-target-modules"}):
        with pytest.raises(FileError, match="mean none of the 2 layers"):
            load(model, rewritten(tmp_path / "a", **edited))
    assert_same(model, before)


@pytest.mark.parametrize("edited", [
    {"target_modules": "(q_proj"}, {"target_modules": 3}, {"exclude_modules": ["q", 1]}, {"layers_to_transform": "one"},
    {"layers_to_transform": [0], "layers_pattern": "("}, {"layers_pattern": ["h"]},
    {"target_modules": r".*q_proj", "layers_to_transform": [0]}, {"target_modules": r".*q_proj", "layers_pattern": "h"},
    {"modules_to_save": ["("]}, {"target_modules": "all-linear", "target_parameters": ["experts.down_proj"]},
], ids=str)  # fmt: skip
def test_settings_that_choose_no_layers_are_refused_by_name(edited: dict[str, Any], tmp_path: Path) -> None:
    model = of("llama")
    trained(model, {"target_modules": ["q_proj"]}, tmp_path / "a")
    with pytest.raises(FileError, match="|".join(edited)):
        load(model, rewritten(tmp_path / "a", **edited))


@pytest.mark.filterwarnings("ignore")
def test_layers_that_the_file_has_no_keys_for_change_nothing(
    ids: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = of("llama")
    trained(model, {"target_modules": ["q_proj"]}, tmp_path / "a")
    rewritten(tmp_path / "a", target_modules=["q_proj", "v_proj", "up_proj"])
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    load(model, tmp_path / "a")
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=1e-4, atol=1e-4)
    assert "left out" not in caplog.text


def test_settings_without_targets_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = of("llama")
    trained(model, {"target_modules": ["q_proj"]}, tmp_path / "a")
    load(model, rewritten(tmp_path / "a", target_modules=...))
    assert "name no target_modules" in caplog.text


def test_a_file_of_deltaw_means_all_that_it_holds(
    ids: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = of("llama")
    fill(attach(model, LoRA(rank=2, alpha=5, targets="qv")))
    expected = logits(model, ids)
    save(model, tmp_path / "a")
    detach(model)
    load(
        model, rewritten(tmp_path / "a", target_modules=["q_proj"], exclude_modules=["v_proj"], layers_to_transform=[0])
    )
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=0)
    assert not caplog.records


def test_every_reader_leaves_out_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    model = of("llama untied")
    trained(model, {"target_modules": ["q_proj", "v_proj", "lm_head"]}, tmp_path / "a")
    folder = rewritten(tmp_path / "a", target_modules=["q_proj"])
    kept = {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert spectrum(folder).keys() == kept
    compress(folder, tmp_path / "small", rank=2)
    assert spectrum(tmp_path / "small").keys() == kept
    convert(folder, tmp_path / "loralib.bin")
    assert len(torch.load(tmp_path / "loralib.bin")) == 2 * len(kept)
    assert main(["inspect", str(folder), "--json"]) in (0, None)
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 2
    assert "2 of the 5 layers" not in caplog.text and "3 of the 5 layers" in caplog.text
    rewritten(folder, target_modules="all-linear")  # what is the head, only a model tells
    with pytest.raises(FileError, match=r"lm_head: only PEFT, on a model"):
        spectrum(folder)


@pytest.mark.filterwarnings("ignore")
def test_scales_that_the_settings_do_not_mean_are_left_out(
    ids: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = of("llama")
    made = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    filled(peft.get_peft_model(copy.deepcopy(model), made)).save_pretrained(tmp_path / "a")
    rewritten(tmp_path / "a", exclude_modules=["v_proj"], something_new=0.5)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    load(model, tmp_path / "a")
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=1e-4, atol=1e-4)
    assert "2 of the 6 layers" in caplog.text and "something_new = 0.5" in caplog.text
    with pytest.raises(FileError, match="use_something_new"):
        load(model, rewritten(tmp_path / "a", use_something_new=True), name="b")


@pytest.mark.parametrize(
    ("setting", "said"), [(16, True), (0.5, True), ("mode", True), (None, False), ("", False), (False, False)]
)
def test_numbers_and_texts_that_nobody_knows_are_said(
    setting: Any, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = of("llama")
    trained(model, {"target_modules": ["q_proj"]}, tmp_path / "a")
    load(model, rewritten(tmp_path / "a", something_new=setting))
    assert (f"something_new = {setting!r}, which this version of deltaw does not know" in caplog.text) == said


def test_every_setting_of_pefts_other_methods_is_known() -> None:
    for config, kind in ((peft.IA3Config, "IA3"), (peft.PromptTuningConfig, "PROMPT_TUNING")):
        assert {f.name for f in dataclasses.fields(config)} <= OF_ALL | OF_OTHERS[kind]


def test_a_command_says_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every step that read the folder had said it again."""
    tokenizer = tiny_tokenizer()
    model = byte_llama(tokenizer).eval()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trained(model, {"target_modules": ["q_proj", "v_proj"]}, tmp_path / "a")
    rewritten(tmp_path / "a", target_modules=["v_proj"])
    base, folder = str(tmp_path / "base"), str(tmp_path / "a")
    assert main(["generate", base, "hi", "--adapter", folder, "--max-new-tokens", "2"]) == 0
    assert " ".join(capsys.readouterr().err.split()).count("2 of the 4 layers") == 1
    assert main(["merge", base, folder, "-o", str(tmp_path / "out")]) == 0
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(merged(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
