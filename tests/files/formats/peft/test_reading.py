"""All that PEFT can write: real PEFT makes and fills each adapter, we give its logits, and PEFT gives those of what we write of it.

On tiny models of four architectures, and on SmolLM2. No scale is 1.
"""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
)

from deltaw import (
    LoRA,
    attach,
    combine,
    compress,
    detach,
    load,
    merge,
    merge_files,
    route,
    save,
    spectrum,
    unmerge,
    using,
)
from deltaw.errors import AdapterError, FileError, MergeError
from deltaw.files.formats.peft.config import HARMLESS, READ, SETTINGS
from tests.conftest import assert_same, bits, covering, fill, snapshot, tiny_gpt2, tiny_llama
from tests.files.conftest import filled, logits, rewritten, tiny_bert, tiny_t5

MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama, "llama untied": lambda: tiny_llama(tied=False), "gpt2": tiny_gpt2, "bert": tiny_bert, "t5": tiny_t5,
}  # fmt: skip
LLAMA, GPT2 = ("llama", "llama untied"), ("gpt2",)
QV = {
    "llama": ["q_proj", "v_proj"],
    "llama untied": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "bert": ["query", "value"],
    "t5": ["q", "v"],
}
EMBEDDING = {
    "llama": "embed_tokens",
    "llama untied": "embed_tokens",
    "gpt2": "wte",
    "bert": "word_embeddings",
    "t5": "shared",
}
HEAD = {"llama": "lm_head", "llama untied": "lm_head", "gpt2": "lm_head", "bert": "classifier", "t5": "lm_head"}

# Name → settings, and the models that they are tried on where not on all. "qv", "emb" and "head" stand for a model's own names
CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...] | None]] = {
    "plain": ({}, None),
    "all linear": ({"target_modules": "all-linear"}, None),
    "by a pattern": ({"target_modules": r".*\.1\..*(q_proj|c_attn|query|SelfAttention\.v)"}, None),
    "rslora": ({"use_rslora": True}, None),
    "dora": ({"use_dora": True}, None),
    "dora and rslora": ({"use_dora": True, "use_rslora": True, "target_modules": "all-linear"}, None),
    "patterns": ({"rank_pattern": {"0.*q_proj": 5}, "alpha_pattern": {"v_proj": 7}}, LLAMA),
    "layers": ({"layers_to_transform": [1]}, ("llama", "gpt2")),
    "excluded": ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, LLAMA),
    "gaussian": ({"init_lora_weights": "gaussian"}, ("bert",)),
    "mica": ({"init_lora_weights": "mica"}, ("llama",)),
    "a parameter": ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, LLAMA),
    "bias all": ({"bias": "all"}, ("gpt2", "bert")),
    "bias lora_only": ({"bias": "lora_only"}, ("gpt2", "bert")),
    "lora_bias": ({"lora_bias": True}, None),
    "head whole": ({"modules_to_save": ["head"]}, None),
    "embedding whole": ({"modules_to_save": ["emb"]}, None),
    "both whole": ({"modules_to_save": ["emb", "head"]}, ("llama", "llama untied", "gpt2")),
    "both whole and tied": ({"modules_to_save": ["emb", "head"], "ensure_weight_tying": True}, ("llama", "gpt2")),
    "norms whole": ({"modules_to_save": ["input_layernorm", "ln_1", "LayerNorm", "layer_norm"]}, None),
    "embedding": ({"target_modules": ["qv", "emb"]}, None),
    "embedding by dora": ({"target_modules": ["qv", "emb"], "use_dora": True}, ("llama", "bert")),
    "head": ({"target_modules": ["qv", "head"]}, ("llama", "llama untied", "bert")),
    "embedding and head": ({"target_modules": ["qv", "emb", "head"]}, LLAMA),
    "embedding, head whole": ({"target_modules": ["qv", "emb"], "modules_to_save": ["head"]}, LLAMA),
    "embedding whole, head": ({"target_modules": ["qv", "head"], "modules_to_save": ["emb"]}, LLAMA),
    "tokens": ({"trainable_token_indices": [7, 3, 90]}, ("llama", "llama untied", "gpt2", "bert")),
    "tokens, head whole": ({"trainable_token_indices": {"embed_tokens": [9, 5]}, "modules_to_save": ["head"]}, ("llama untied",)),
    "tokens of both": ({"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4, 8]}}, LLAMA),
    "tokens of both, in two orders": ({"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [5, 3]}}, ("llama",)),
    "tokens of the head": ({"trainable_token_indices": {"lm_head": [5, 3]}}, ("llama", "t5")),
    "tokens of two embeddings": ({"trainable_token_indices": {"embed_tokens": [5, 3]}}, ("t5",)),
}  # fmt: skip
CASES = [(c, m) for c, (_, models) in CONFIGS.items() for m in models or MODELS]


def model_of(name: str) -> Any:
    torch.manual_seed(1)
    return MODELS[name]().eval()


def settings_for(config: str, model: str) -> dict[str, Any]:
    settings = {"target_modules": ["qv"], **CONFIGS[config][0]}

    def named(values: Any) -> Any:
        if not isinstance(values, list):
            return values
        own = {"emb": [EMBEDDING[model]], "head": [HEAD[model]], "qv": QV[model]}
        return [name for value in values for name in own.get(value, [value])]

    return {key: named(value) for key, value in settings.items()}


# Of two layers with one weight, one would change with the other; and a bias has no place in a layer without any
OF_ONE_OF_TWO = {
    "head whole", "embedding whole", "both whole", "embedding", "embedding by dora", "head", "embedding and head",
    "embedding, head whole", "embedding whole, head", "tokens of both", "tokens of both, in two orders", "tokens of the head",
    "tokens of two embeddings",
}  # fmt: skip
UNMERGEABLE = {(c, m) for c, m in CASES if c in OF_ONE_OF_TWO and m in ("llama", "gpt2", "t5")}
UNMERGEABLE |= {("lora_bias", m) for m in ("llama", "llama untied", "t5")}


def merged_and_back(model: Any, expected: torch.Tensor, ids: torch.Tensor, *, possible: bool) -> None:
    before = bits(model)
    if not possible:
        with pytest.raises(MergeError, match=r"tied to|has no") as caught:
            merge(model)
        if "tied to" not in str(caught.value) or "has no" in str(caught.value):
            return
    merge(model, allow_unchanged=True, untie=True)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert all(torch.equal(bits(model)[n], value) for n, value in before.items())


@pytest.mark.parametrize(("config", "model"), covering(list(CONFIGS), list(MODELS), cases=CASES))
@pytest.mark.filterwarnings("ignore")
def test_real_peft_and_we_agree(config: str, model: str, ids: torch.Tensor, tmp_path: Path) -> None:
    plain = model_of(model)
    before, untouched = logits(plain, ids), snapshot(plain)
    made = peft.LoraConfig(r=4, lora_alpha=10, **settings_for(config, model))
    theirs = filled(peft.get_peft_model(copy.deepcopy(plain), made)).eval()
    expected = logits(theirs, ids)
    assert (expected - before).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path / "theirs")

    load(plain, tmp_path / "theirs")
    torch.testing.assert_close(logits(plain, ids), expected, rtol=1e-4, atol=1e-4)
    save(plain, tmp_path / "ours")
    combine(plain, {"default": 1.0}, name="same")
    with using(plain, "same"):
        torch.testing.assert_close(logits(plain, ids), expected, rtol=1e-4, atol=1e-4)
    merged_and_back(plain, expected, ids, possible=(config, model) not in UNMERGEABLE)
    detach(plain)
    assert_same(plain, untouched)

    load(plain, tmp_path / "ours")
    torch.testing.assert_close(logits(plain, ids), expected, rtol=1e-4, atol=1e-4)
    detach(plain)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again, ids), expected, rtol=1e-4, atol=1e-4)


def test_one_token_of_tied_layers_that_differ_is_not_saved(tmp_path: Path) -> None:
    """PEFT takes equal lists of tokens for tied layers as one layer's; one of several tokens can be in another order."""
    made = peft.LoraConfig(r=4, target_modules=["q"], trainable_token_indices={"embed_tokens": [5]})
    filled(peft.get_peft_model(model_of("t5"), made)).save_pretrained(tmp_path / "theirs")
    model = model_of("t5")
    load(model, tmp_path / "theirs")
    with pytest.raises(AdapterError, match=r"encoder\.embed_tokens and decoder\.embed_tokens"):
        save(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# The others are read on tiny models
ON_SMOLLM2 = ["all linear", "dora", "embedding", "both whole and tied", "tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ON_SMOLLM2)
@pytest.mark.filterwarnings("ignore")
def test_real_peft_and_we_agree_on_smollm2(config: str, smollm2: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = torch.randint(0, 49152, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[0, :3] = torch.tensor([7, 3, 90])
    made = peft.LoraConfig(r=8, lora_alpha=20, **settings_for(config, "llama"))
    theirs = filled(peft.get_peft_model(base, made), size=0.02).eval()
    expected = logits(theirs, ids)
    theirs.save_pretrained(tmp_path / "theirs")
    del theirs
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    plain = logits(base, ids)
    load(base, tmp_path / "theirs")
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(base, ids), expected, rtol=1e-3, atol=1e-3)
    save(base, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(detach(base), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again, ids), expected, rtol=1e-3, atol=1e-3)


def test_older_versions_files(ids: torch.Tensor, tmp_path: Path) -> None:
    """A pickled file, names of adapters in its keys, and no settings but those that version 0.2 had."""
    plain = tiny_llama().eval()
    made = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj"], modules_to_save=["lm_head"])
    theirs = filled(peft.get_peft_model(copy.deepcopy(plain), made)).eval()
    theirs.save_pretrained(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    tensors = {
        key.replace("lora_A.weight", "lora_A.default.weight").replace(
            "lm_head.", "lm_head.modules_to_save.default."
        ): value
        for key, value in load_file(tmp_path / "new" / "adapter_model.safetensors").items()
    }
    torch.save(tensors, old / "adapter_model.bin")
    settings = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    known = (
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "fan_in_fan_out",
        "bias",
        "modules_to_save",
    )
    (old / "adapter_config.json").write_text(json.dumps({key: settings[key] for key in known}))
    load(plain, old)
    torch.testing.assert_close(logits(plain, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)


class Planted:
    """What a pickle must not be able to do."""

    def __reduce__(self) -> Any:
        return print, ("run by a file",)


def test_a_pickled_file_is_read_as_weights_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    save(attach(model, LoRA(rank=2, alpha=5, targets="qv")), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save({"x": Planted()}, tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(FileError, match="cannot be read as weights alone"):
        load(model, tmp_path / "a", name="b")
    assert "run by a file" not in capfd.readouterr().out


@pytest.mark.parametrize("settings", [
    {"init_lora_weights": "olora"}, {"layer_replication": [[0, 2], [1, 2]]}, {"alora_invocation_tokens": [3, 4]},
], ids=["another W0", "another model", "some positions"])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_would_be_misread_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    plain = tiny_llama()
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    peft.get_peft_model(copy.deepcopy(plain), config).save_pretrained(tmp_path / "a")
    before = snapshot(plain)
    with pytest.raises(FileError, match=next(iter(settings))):
        load(plain, tmp_path / "a")
    assert_same(plain, before)


@pytest.mark.filterwarnings("ignore")
def test_a_start_that_changes_W0_is_read_once_peft_has_converted_it(ids: torch.Tensor, tmp_path: Path) -> None:
    plain = tiny_llama().eval()
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    theirs.save_pretrained(tmp_path / "start")
    filled(theirs)
    theirs.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path / "start")
    load(plain, tmp_path / "a")
    torch.testing.assert_close(logits(plain, ids), logits(theirs, ids), rtol=1e-3, atol=1e-3)


# --- what is refused by its name --------------------------------------------------------------------------------

# PEFT's methods → settings with which each takes a tiny Llama, where its own defaults do not
METHODS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10}, "C3A": {"block_size": 8}, "MISS": {"r": 8}, "SHIRA": {"r": 2}, "OFT": {"oft_block_size": 4},
    "ROAD": {"group_size": 8}, "VBLORA": {"vector_length": 8, "num_vectors": 300}, "WAVEFT": {"n_frequency": 32},
}  # fmt: skip
OF_OURS = {"LORA", "IA3", "PROMPT_TUNING"}
# They train what is not an adapter's file alone
NOT_WRITTEN = {"ADAPTION_PROMPT", "XLORA"}


SLOW = {"ADAMSS"}  # PEFT clusters the singular vectors of each layer


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ())
        for kind in sorted(str(t.value) for t in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_pefts_other_methods_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    if kind in OF_OURS | NOT_WRITTEN:
        return
    config_class = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {f.name for f in dataclasses.fields(config_class)}
    settings = {
        "target_modules": ["q_proj"],
        "feedforward_modules": [],
        "num_virtual_tokens": 3,
        "task_type": "CAUSAL_LM",
    }
    settings = {key: value for key, value in settings.items() if key in known} | METHODS.get(kind, {})
    plain = tiny_llama()
    peft.get_peft_model(copy.deepcopy(plain), config_class(**settings)).save_pretrained(tmp_path / "a")
    before = snapshot(plain)
    with pytest.raises(FileError, match=f"peft_type is '{kind}'") as refused:
        load(plain, tmp_path / "a")
    assert str(refused.value).count("\n") == 1  # and of nothing else
    assert_same(plain, before)


def test_every_setting_of_pefts_is_read_or_refused_or_known_to_be_harmless() -> None:
    fields = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert fields <= SETTINGS.keys() | READ | HARMLESS


@pytest.mark.parametrize("settings", [
    {"use_something_new": True}, {"something_new": {"rate": 0.5}}, {"peft_type": "LORA2"}, {"peft_type": ...},
    {"use_qalora": True}, {"arrow_config": {"top_k": 3}}, {"monteclora_config": {"num_samples": 4}}, {"kasa_config": {"beta": 0.1}},
    {"use_bdlora": {"nblocks": 2}}, {"megatron_config": {"tensor_model_parallel_size": 2}}, {"init_lora_weights": "loftq"},
    {"init_lora_weights": "corda"}, {"init_lora_weights": "lora_ga"}, {"enable_lora": [True, False, True]},
], ids=str)  # fmt: skip
def test_settings_that_may_change_the_result_are_refused_by_name(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_llama()
    save(attach(model, LoRA(rank=2, alpha=5, targets="qv")), tmp_path / "a")
    detach(model)
    before = snapshot(model)
    with pytest.raises(FileError, match=next(iter(settings))):
        load(model, rewritten(tmp_path / "a", **settings))
    assert_same(model, before)


def test_settings_that_only_say_how_it_was_made_are_passed_over(tmp_path: Path) -> None:
    model = tiny_llama()
    save(attach(model, LoRA(rank=2, alpha=5, targets="qv")), tmp_path / "a")
    said = {
        "something_new": 16,
        "corda_config": {"corda_method": "kpm"},
        "velora_config": {"num_groups": 4},
        "merge_weights": True,
    }
    load(model, rewritten(tmp_path / "a", **said), name="b")


# --- two names, one layer ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """PyTorch's attention, called by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        self.self_attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        out: torch.Tensor = self.out(self.self_attn(x, x, x)[0])
        return out


@pytest.mark.parametrize(
    "targets", [["self_attn"], ["self_attn", "out_proj"], ["out_proj", "self_attn", "out"]], ids=str
)
@pytest.mark.filterwarnings("ignore")
def test_an_output_projection_that_peft_has_twice(
    targets: list[str], ids: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(3)
    plain = Attention().eval()
    before = plain(ids)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    expected = theirs(ids).detach()
    theirs.save_pretrained(tmp_path / "a")
    load(plain, tmp_path / "a")
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(plain(ids), expected, rtol=1e-5, atol=1e-6)
    assert ("are left out" in caplog.text) == ("out_proj" in targets) and "another" not in caplog.text
    save(plain, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(detach(plain), tmp_path / "ours").eval()
    torch.testing.assert_close(again(ids), expected, rtol=1e-5, atol=1e-6)


def test_two_keys_of_one_tensor_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_llama()
    save(attach(model, LoRA(rank=2, alpha=5, targets="qv")), tmp_path / "a")
    detach(model)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "lora_A" in k)
    other = key.replace("lora_A.weight", "lora_A.default.weight")
    save_file(tensors | {other: tensors[key] * 2}, path)
    with pytest.raises(FileError, match="same tensor's names") as refused:
        load(model, tmp_path / "a")
    assert key in str(refused.value) and other in str(refused.value)
    save_file(tensors | {other: tensors[key].clone()}, path)  # the same twice
    load(model, tmp_path / "a")


def test_two_names_of_one_layer_are_refused_by_name(tmp_path: Path) -> None:
    from tests.files.test_renames import tiny_llava

    model = tiny_llava()
    save(attach(model, LoRA(rank=2, alpha=5, targets="*language_model*.q_proj")), tmp_path / "a")
    detach(model)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    old = {k.replace("model.language_model.", "language_model.model."): t * 2 for k, t in tensors.items()}
    save_file(tensors | old, path)
    before = snapshot(model)
    with pytest.raises(FileError, match="two updates of one layer"):
        load(model, tmp_path / "a", check_base=False)
    assert_same(model, before)


def resized(base: Path, tokens: int) -> Any:
    """A checkpoint's model with so many tokens. PEFT sees by the checkpoint's config that the vocabulary has been resized."""
    kind = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    model = kind.from_pretrained(base).eval()
    model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


NEW_TOKENS: dict[str, tuple[str, dict[str, Any]]] = {
    "both whole, tied": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "both whole": ("llama untied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "the embedding, tied": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "the embedding": ("llama untied", {"modules_to_save": ["embed_tokens"]}),
    "the head, tied": ("llama", {"modules_to_save": ["lm_head"]}),
    "the head": ("llama untied", {"modules_to_save": ["lm_head"]}),
    "both by one, tied": ("llama", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "nothing, tied": ("llama", {}),
    "tokens, tied": ("llama", {"trainable_token_indices": {"embed_tokens": [96, 97]}}),
    "some tokens, tied": ("llama", {"trainable_token_indices": {"embed_tokens": [7, 97]}}),
    "some tokens": ("llama untied", {"trainable_token_indices": [97, 7]}),
    "tokens, the head": ("llama untied", {"trainable_token_indices": {"embed_tokens": [96, 97]}, "modules_to_save": ["lm_head"]}),
    "update of the head, tied": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "fewer tokens": ("llama untied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "gpt2": ("gpt2", {"modules_to_save": ["wte", "lm_head"], "bias": "all"}),
    "t5": ("t5", {"modules_to_save": ["shared", "lm_head"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", list(NEW_TOKENS))
@pytest.mark.filterwarnings("ignore")
def test_a_resized_vocabulary_as_peft_reloads_it(
    case: str, ids: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, settings = NEW_TOKENS[case]
    model_of(name).save_pretrained(tmp_path / "base")
    tokens = 90 if case == "fewer tokens" else 98
    ids = ids.clamp(max=tokens - 1)
    ids[:, :2] = torch.tensor([tokens - 2, tokens - 1])
    made = peft.LoraConfig(r=4, lora_alpha=10, **{"target_modules": QV[name], **settings})
    filled(peft.get_peft_model(resized(tmp_path / "base", tokens), made)).save_pretrained(tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(resized(tmp_path / "base", tokens), tmp_path / "theirs").eval()
    expected = logits(theirs, ids)
    plain = type(theirs.get_base_model()).from_pretrained(tmp_path / "base").eval()
    before = snapshot(plain)

    load(plain, tmp_path / "theirs")
    assert "keeps the" not in caplog.text
    torch.testing.assert_close(logits(plain, ids), expected, rtol=1e-5, atol=1e-5)
    compress(tmp_path / "theirs", tmp_path / "copy", energy=1.0)
    save(plain, tmp_path / "ours")
    detach(plain)
    assert_same(plain, before)
    again = peft.PeftModel.from_pretrained(resized(tmp_path / "base", tokens), tmp_path / "copy").eval()
    torch.testing.assert_close(logits(again, ids), expected, rtol=1e-5, atol=1e-5)
    again = peft.PeftModel.from_pretrained(resized(tmp_path / "base", tokens), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again, ids), expected, rtol=1e-5, atol=1e-5)


HEADS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification, {"hidden_size": 32, "pad_token_id": 1}),
    "distilbert": (transformers.DistilBertConfig, transformers.DistilBertForSequenceClassification, {"dim": 32, "hidden_dim": 56,
                   "n_layers": 2, "n_heads": 4, "dropout": 0.0, "seq_classif_dropout": 0.0}),
    "llama": (transformers.LlamaConfig, transformers.LlamaForSequenceClassification, {"hidden_size": 32, "attention_bias": True}),
    "tokens": (transformers.BertConfig, transformers.BertForTokenClassification, {"hidden_size": 32}),
    "answers": (transformers.BertConfig, transformers.BertForQuestionAnswering, {"hidden_size": 32, "num_labels": 2}),
}  # fmt: skip
HEAD_TASK = {"tokens": "TOKEN_CLS", "answers": "QUESTION_ANS"}


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.filterwarnings("ignore")
def test_heads_that_peft_trains_beside_biases(kind: str, bias: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    config, model_class, own = HEADS[kind]
    common = {
        "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "num_labels": 3,
        "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
        "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(2)
    plain = model_class(config(**{**common, **own})).eval()
    targets = {"llama": ["q_proj", "v_proj"], "distilbert": ["q_lin", "v_lin"]}.get(kind, ["query", "value"])
    made = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=targets, bias=bias, task_type=HEAD_TASK.get(kind, "SEQ_CLS")
    )
    theirs = filled(peft.get_peft_model(copy.deepcopy(plain), made)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "theirs", adapter_name="other").eval()

    def outputs(model: Any) -> torch.Tensor:
        with torch.no_grad():
            out = model(input_ids=ids.clamp(min=2))
        return torch.cat([out.start_logits, out.end_logits]) if kind == "answers" else out.logits

    expected = outputs(again)
    assert (expected - outputs(plain)).abs().max() > 1e-3
    load(plain, tmp_path / "theirs")
    torch.testing.assert_close(outputs(plain), expected, rtol=1e-5, atol=1e-5)
    save(plain, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(detach(plain), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_bases_own_head_in_a_file_is_no_update(
    ids: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = model_of("bert")
    made = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["query"], bias="all", task_type="SEQ_CLS")
    filled(peft.get_peft_model(copy.deepcopy(plain), made)).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.classifier.original_module.bias"
    load(plain, tmp_path / "a", name="same")
    expected = logits(plain, ids)
    assert "classifier.bias" not in caplog.text
    save_file({**tensors, key: tensors[key] + 1.0}, path)
    load(plain, tmp_path / "a", name="drifted")
    assert torch.equal(logits(plain, ids), expected)
    assert "keeps the classifier.bias of the base" in caplog.text
    other = peft.PeftModel.from_pretrained(model_of("bert"), tmp_path / "a").eval()
    torch.testing.assert_close(logits(other, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_each_of_several_adapters_that_peft_saved_of_one_model(ids: torch.Tensor, tmp_path: Path) -> None:
    plain = model_of("bert")
    theirs = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(r=4, lora_alpha=10, target_modules=["query"], bias="all", task_type="SEQ_CLS")
    )  # fmt: skip
    theirs.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=7, target_modules=["value"], task_type="SEQ_CLS"))
    theirs.add_adapter("third", peft.LoraConfig(r=2, lora_alpha=7, target_modules=["query"]))
    for name in ("default", "second", "third"):
        theirs.set_adapter(name)
        filled(theirs)
    theirs.save_pretrained(tmp_path)
    for name in ("default", "second", "third"):
        folder = tmp_path if name == "default" else tmp_path / name
        again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
        load(plain, folder)
        torch.testing.assert_close(logits(plain, ids), logits(again, ids), rtol=1e-5, atol=1e-5)
        detach(plain)
    for path in tmp_path.glob("adapter_*"):
        path.unlink()
    with pytest.raises(FileError, match="Adapters are in its folders second, third: give one of these"):
        load(plain, tmp_path)


PATTERNS = {
    "one layer, then all": {"q_proj": 7, "layers.0.self_attn.q_proj": 3},
    "anchored beside a wildcard": {r"^model\.layers\.0\.self_attn\.q_proj": 5, r".*q_proj": 7},
    "groups and alternatives": {r"layers\.(0|1)\.self_attn\.(q|v)_proj": 9, "v_proj|q_proj": 3, r"(q)_\w+": 2},
    "a part of a name": {"proj": 3, "q_pro": 9, r"\d\.self_attn\.v_proj": 6},
}


@pytest.mark.parametrize("case", list(PATTERNS))
@pytest.mark.filterwarnings("ignore")
def test_patterns_hold_in_the_order_in_which_peft_reloads_them(case: str, ids: torch.Tensor, tmp_path: Path) -> None:
    """PEFT sorts them when it saves, so that a model in training may have had others."""
    plain = model_of("llama")
    made = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj"], alpha_pattern=PATTERNS[case])
    filled(peft.get_peft_model(copy.deepcopy(plain), made)).save_pretrained(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "a").eval()
    load(plain, tmp_path / "a")
    torch.testing.assert_close(logits(plain, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    save(plain, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(detach(plain), tmp_path / "b").eval()
    torch.testing.assert_close(logits(again, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    path = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["alpha_pattern"] = dict(reversed(settings["alpha_pattern"].items()))  # as others write them
    path.write_text(json.dumps(settings))
    theirs = peft.PeftModel.from_pretrained(model_of("llama"), tmp_path / "a").eval()
    load(plain := model_of("llama"), tmp_path / "a")
    torch.testing.assert_close(logits(plain, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [
    {"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
], ids=str)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_peft_keeps_tied_is_merged_once(settings: dict[str, Any], ids: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = tiny_llama().eval()
    before, was = logits(model, ids), bits(model)
    config = peft.LoraConfig(r=4, lora_alpha=6, ensure_weight_tying=True, **settings)
    theirs = filled(peft.get_peft_model(copy.deepcopy(model), config)).eval()
    expected = logits(theirs, ids)
    theirs.save_pretrained(tmp_path / "a")
    load(model, tmp_path / "a")
    assert (expected - before).abs().max() > 1.0
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    merge(model)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    unmerge(model)
    assert all(torch.equal(bits(model)[n], value) for n, value in was.items())
    merge(model, weights={"default": 0.5})
    unmerge(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_A_and_B_of_8_bits(dtype: torch.dtype, ids: torch.Tensor, tmp_path: Path) -> None:
    """Saved, cut, looked at, merged on disk and in memory, and routed: where PyTorch has no arithmetic for them."""
    model = tiny_llama().eval()
    save(fill(attach(model, LoRA(rank=4, alpha=6, targets="qv"))), tmp_path / "a")
    detach(model).save_pretrained(tmp_path / "base")
    load(model, tmp_path / "a", name="x", dtype=dtype)
    expected = logits(model, ids)
    with torch.no_grad(), route(model, ["x"] * len(ids)):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
    save(model, tmp_path / "b", name="x")
    assert {t.dtype for t in load_file(tmp_path / "b" / "adapter_model.safetensors").values()} == {dtype}
    merge(model)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-3, atol=1e-3)
    detach(model)
    load(model, tmp_path / "b")
    assert torch.equal(logits(model, ids), expected)
    assert all(s.norm > 0 for s in spectrum(tmp_path / "b").values())
    done = compress(tmp_path / "b", tmp_path / "cut", rank=2)
    assert 0 < done.error < 1
    load(model, tmp_path / "cut", name="cut")
    merge_files(tmp_path / "base", tmp_path / "b", tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again, ids), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "settings"), [
    ("llama", {"whole": "model.norm"}), ("llama", {"tokens": [3, 7]}), ("llama", {"whole": "embed_tokens,lm_head"}),
    ("llama", {"norms": True}), ("llama untied", {"whole": "lm_head"}), ("bert", {"whole": "classifier"}),
], ids=str)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_peft_reads_an_adapter_without_low_rank_updates(
    kind: str, settings: dict[str, Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    """It was written with no target_modules, with which PEFT refuses any adapter."""
    model = model_of(kind)
    targets = "query" if kind == "bert" else "q_proj"
    fill(attach(twin := copy.deepcopy(model), LoRA(rank=2, targets=targets, **settings)))
    save(twin, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if ".lora_" not in k}, path, metadata={"deltaw_format": "1"})
    load(twin := copy.deepcopy(model), tmp_path / "a")
    save(twin, tmp_path / "b")
    expected = logits(twin, ids)
    assert (expected - logits(model, ids)).abs().max() > 0.1
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "b").eval()
    torch.testing.assert_close(logits(theirs, ids), expected, rtol=1e-5, atol=1e-5)
    if settings.get("whole") == "embed_tokens,lm_head":  # which PEFT has put into its base, and saves nothing of
        return
    theirs.save_pretrained(tmp_path / "theirs")
    load(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
