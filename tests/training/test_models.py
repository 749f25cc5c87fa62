"""The loop on many architectures: flat buffers, layers computed together, the head at supervised positions and whatever the
model does besides, against the plain way, each layer alone and the loss by the model's own logits."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw import LoRA, TrainConfig, attach, parameters
from deltaw.data import Example, Order, collate
from deltaw.training.events import Event, Stepped
from deltaw.training.loop import LoopPlan, run_loop
from deltaw.training.losses import CompletionLoss
from tests.conftest import tiny_llama
from tests.methods.updates.test_updates import METHODS

KINDS = [
    "afmoe", "bart", "bert", "bigbird_pegasus", "biogpt", "bloom", "codegen", "cohere", "cohere2", "deepseek_v3", "electra",
    "ernie4_5", "exaone4", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "internlm3", "lfm2", "llama",
    "mamba", "marian", "minicpm3", "ministral", "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmoe", "opt",
    "persimmon", "phi", "phi3", "phimoe", "plbart", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "rembert", "roberta",
    "roc_bert", "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2", "whisper", "xglm", "xlm-roberta", "xlstm",
]  # fmt: skip
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "conv_kernel"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "head_dim", "v_head_dim", "sliding_window", "kv_channels"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "state_size", "time_step_rank"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    "vocab_size": 96, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
RARE: dict[str, dict[str, Any]] = {"gpt_neo": {"attention_types": [[["global", "local"], 1]]}}


def tiny_of(kind: str) -> Any:
    """A model of this architecture, a few thousand parameters, without anything random in its forward pass."""
    defaults = AutoConfig.for_model(kind)
    own = {k: v for k, v in vars(defaults).items() if not isinstance(getattr(type(defaults), k, None), property)}
    settings = {k: v for k, v in SMALL.items() if k in own or k in ("hidden_size", "num_hidden_layers")}
    settings |= {
        k: 0.0 for k, v in own.items() if ("drop" in k or "jitter" in k) and isinstance(v, (int, float)) and v < 1
    }
    if own.get("layer_types"):
        settings["layer_types"] = own["layer_types"][:2]
    if "qk_rope_head_dim" in own:  # multi-head latent attention
        settings |= {"num_key_value_heads": 4, "head_dim": 4}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings | RARE.get(kind, {}))).float()


def examples() -> list[Example]:
    chance = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 30, (12,), generator=chance).tolist()
    return [
        Example(
            torch.randint(3, 96, (n,), generator=chance).tolist(), [False] * (n // 2) + [True] * (n - n // 2), str(i)
        )
        for i, n in enumerate(lengths)
    ]


def plain_steps(model: Any, train: list[Example], config: TrainConfig) -> list[float]:
    optimizer = torch.optim.AdamW(parameters(model), lr=config.lr, weight_decay=0.0)
    order = Order([len(e.input_ids) for e in train], batch=config.batch, seed=config.seed)
    losses = []
    model.train()
    for step in range(config.steps or 0):
        batch = collate([train[i] for i in order.at(step)], 0)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[:, :-1]
        wanted = batch.supervised[:, 1:]
        loss = F.cross_entropy(logits[wanted].float(), batch.input_ids[:, 1:][wanted])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_plain_way(kind: str) -> None:
    steps_agree(attach(tiny_of(kind), LoRA(rank=2, alpha=4)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", METHODS)
def test_steps_of_what_is_more_than_A_and_B(method: str, tied: bool) -> None:
    torch.manual_seed(0)
    steps_agree(attach(tiny_llama(tied=tied), METHODS[method]))


def steps_agree(model: Any) -> None:
    """The loop's steps beside a plain loop's over a copy."""
    twin = copy.deepcopy(model)
    config = TrainConfig(batch=4, steps=3, lr=5e-3, warmup=0, schedule="constant", clip=0.0, log_every=1)
    losses: list[float] = []

    def hear(event: Event) -> None:
        if isinstance(event, Stepped):
            losses.append(event.loss)

    run_loop(LoopPlan(CompletionLoss(model), examples(), (), config, hear))
    torch.testing.assert_close(losses, plain_steps(twin, examples(), config), rtol=1e-4, atol=1e-4)

    def learned(of: Any) -> Tensor:
        return torch.cat([p.detach().flatten() for p in parameters(of)])

    # Adam divides by a gradient's own size: entries whose gradient is rounding error may go either way
    far = (learned(model) - learned(twin)).abs() > 1e-4
    assert far.float().mean() < 1e-3
