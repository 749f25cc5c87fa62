"""Mixtures of experts for which PEFT translates names of transformers 4 (gate_proj, w1 …) into stacks: every type of its table that
builds alone. Real PEFT and transformers read what we write, we read what PEFT writes."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import deltaw
from deltaw import LoRA
from deltaw.errors import FileError
from deltaw.files.formats import peft as peft_files
from deltaw.model.summary import updates
from tests.conftest import assert_same, fill, snapshot

# Before, its conversion is for other versions of transformers, or there is none
peft = pytest.importorskip("peft", minversion="0.20")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 20, "num_hidden_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 8,
    # experts, by any of their names
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "moe_topk": 2, "zero_expert_num": 1, "expert_ffn_hidden_size": 20, "ffn_hidden_size": 24, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "shared_expert_intermediate_size": 12,
    # the first layer is dense
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1, "mlp_layer_types": ["dense", "sparse"],
    "first_last_k_dense_replace": 1, "layer_types": ["full_attention"] * 2,
    # latent, linear and sparse attention
    "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8, "rotary_dim": 4,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8, "block_size": 16,
}  # fmt: skip
LATENT = {"head_dim": 4, "num_key_value_heads": 4}
OWN = dict.fromkeys(
    ["deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash"], LATENT
)
BUILT = (
    "mixtral", "minimax", "minimax_m2", "afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "glm4_moe",
    "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "solar_open", "mellum", "beam", "qwen3_moe", "qwen3_next", "hunyuan_v1_moe",
    "flex_olmo", "olmoe", "exaone_moe", "cohere2_moe",
)  # fmt: skip
# Not tried: parts of larger models, and types that these sizes do not build
NOT_ALONE = {"glm4v_moe", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text", "sarvam_mla"}
QUICK = ("mixtral", "deepseek_v3", "qwen3_next")
TYPES = [pytest.param(t, marks=() if t in QUICK else pytest.mark.slow) for t in BUILT]
IDS = torch.arange(4, 37).view(3, 11)


def model_of(kind: str) -> Any:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    config = CONFIG_MAPPING[kind]
    known = set(inspect.signature(config.__init__).parameters) | set(getattr(config, "__dataclass_fields__", ()))
    settings = {key: value for key, value in (SIZES | OWN.get(kind, {})).items() if key in known}
    if "index_topk" in known:  # their layers have kinds of their own
        settings.pop("layer_types", None)
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config(**settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def targets_of(model: Any, wanted: str) -> Any:
    """All-linear but for a router whose weight its module reads without calling it: PEFT leaves its update out."""
    router = any(name.endswith("router.classifier") for name, _ in model.named_modules())
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return sorted(linear - {"classifier", "lm_head"} | {"gate_up_proj"}) if router else wanted


def close(actual: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor) -> None:
    """To the last bits: PEFT adds some ΔW to the weight that we add a branch for."""
    assert (expected - plain).abs().max() > 5e-4
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-6)


def test_all_types_of_the_table_are_tried() -> None:
    mapping = pytest.importorskip("transformers.conversion_mapping")
    table = {t for t, pattern in mapping._MODEL_TO_CONVERSION_PATTERN.items() if pattern in ("mixtral", "qwen2_moe")}
    causal = {t for t in table if t in CONFIG_MAPPING}
    assert causal <= {*BUILT, *NOT_ALONE}, "PEFT translates names of more types than are tried here"


@pytest.mark.parametrize("kind", TYPES)
def test_real_peft_and_transformers_read_what_we_write(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    plain = run(model)
    for number, wanted in enumerate(("all-linear", "experts.*")):
        folder = tmp_path / str(number)
        targets = targets_of(model, wanted) if wanted == "all-linear" else ["gate_up_proj", "down_proj"]
        fill(deltaw.attach(model, LoRA(rank=4, alpha=6, targets=targets)))
        expected = run(model)
        deltaw.save(model, folder)
        deltaw.detach(model)
        close(run(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()), expected, plain)
        theirs = copy.deepcopy(model)
        theirs.load_adapter(str(folder))
        close(run(theirs), expected, plain)
        deltaw.load(model, folder)
        assert torch.equal(run(model), expected)
        deltaw.detach(model)


# What PEFT is asked for: names of modules that it translates, or parameters by their own names
ASKED: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "names": {"target_modules": ["q_proj", "q_a_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"]},
    "gate_up alone": {"target_modules": ["gate_proj", "up_proj", "w1", "w3"]},
    "patterns": {
        "target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {"down_proj": 7},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_we_read_what_real_peft_writes(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    plain, before = run(model), snapshot(model)
    for number, (asked, settings) in enumerate(ASKED.items()):
        if asked == "all-linear" and targets_of(model, "") != "":
            continue
        folder = tmp_path / str(number)
        config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **copy.deepcopy(settings))
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
        expected = run(theirs)
        theirs.save_pretrained(folder)
        deltaw.load(model, folder)
        torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=5e-6)
        deltaw.save(model, tmp_path / f"ours {number}")
        deltaw.detach(model)
        assert_same(model, before)
        close(
            run(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / f"ours {number}").eval()),
            expected,
            plain,
        )


def test_a_router_that_peft_trained_is_merged_and_unmerged(tmp_path: Path) -> None:
    model = model_of("qwen3_moe")
    before = snapshot(model)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=["gate", "q_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    deltaw.load(model, tmp_path / "a")
    assert any(name.endswith("mlp.gate") for name in updates(model))
    deltaw.merge(model)
    torch.testing.assert_close(run(model), run(theirs), rtol=1e-4, atol=1e-5)
    deltaw.detach(model)
    assert_same(model, before)


def test_dropout_that_peft_has_no_place_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("deepseek_v3")
    plain = run(model)
    fill(deltaw.attach(model, LoRA(rank=4, alpha=6, dropout=0.1, targets=["o_proj", "model.layers.0.mlp.*_proj"])))
    expected = run(model)
    deltaw.save(model, tmp_path / "a")
    assert "lora_dropout is 0 instead of 0.1" in caplog.text
    close(run(peft.PeftModel.from_pretrained(deltaw.detach(model), tmp_path / "a").eval()), expected, plain)


def test_a_model_whose_parameters_are_in_another_order_refuses_what_the_order_decides(tmp_path: Path) -> None:
    model = model_of("qwen3_moe")
    settings = ASKED["patterns"]
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **copy.deepcopy(settings))
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "a")
    assert peft_files.read(tmp_path / "a").scales["model.layers.0.mlp.experts.base_layer"] == 6 / 3
    experts = model.model.layers[0].mlp.experts
    experts._parameters = dict(reversed(experts._parameters.items()))
    before = snapshot(model)
    with pytest.raises(FileError, match="by this model's order"):
        deltaw.load(model, tmp_path / "a")
    assert_same(model, before)


def test_a_mixture_all_of_whose_layers_are_dense_is_read_by_peft(tmp_path: Path) -> None:
    """PEFT translates the names by the model's type, whether there are stacks or none."""
    sizes = {key: value for key, value in (SIZES | LATENT).items() if key not in ("mlp_layer_types", "layer_types")}
    known = set(getattr(CONFIG_MAPPING["deepseek_v3"], "__dataclass_fields__", ()))
    config = CONFIG_MAPPING["deepseek_v3"](**{key: value for key, value in sizes.items() if key in known})
    config.first_k_dense_replace = 2
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(config).eval()
    assert not any("Experts" in type(m).__name__ for m in base.modules())
    model = fill(deltaw.attach(copy.deepcopy(base), LoRA(rank=2, alpha=3)), size=0.3)
    deltaw.save(model, tmp_path)
    theirs = run(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval())
    torch.testing.assert_close(theirs, run(model), atol=1e-5, rtol=1e-4)
    assert (theirs - run(base)).abs().max() > 1e-2
