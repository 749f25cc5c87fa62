"""The loop on many architectures: flat buffers, layers computed together, the head at supervised positions and whatever the
model does besides, against the plain way, each layer alone and the loss by the model's own logits."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw import LoRA, Prefix, TrainConfig, attach, parameters
from deltaw.data import Example, Order, collate
from deltaw.training.events import Event, Stepped, Warned
from deltaw.training.loop import LoopPlan, run_loop
from deltaw.training.loop.alike import alike as alike_of
from deltaw.training.losses import CompletionLoss, attention_for
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


# --- what records begin with alike ------------------------------------------------------------------------------

# Their layers mix tokens otherwise than by attention through transformers' interface, or attend to later ones
NO_TREES = {
    "bart", "bert", "bigbird_pegasus", "bloom", "codegen", "electra", "falcon_mamba", "gpt_neo", "gptj",
    "mamba", "marian", "mpt", "phimoe", "plbart", "rembert", "roberta", "roc_bert", "rwkv", "xglm", "xlm-roberta", "xlstm",
}  # fmt: skip


def alike(vocabulary: int = 96) -> list[Example]:
    """Rows with beginnings in common: several levels, two rows that are the same, one that ends within, one by itself."""
    chance = torch.Generator().manual_seed(1)

    def some(n: int) -> list[int]:
        return torch.randint(3, vocabulary, (n,), generator=chance).tolist()

    first, second = some(24), some(20)
    long, end = [*first, *second], some(3)
    rows = [[*first, *some(6)], [*long, *end], [*long, *some(9)], long, first[:22], [*long, *end], some(30)]
    return [Example(row, [place >= min(12, len(row) // 2) for place in range(len(row))], "") for row in rows]


def gradients(model: Any, trees: bool) -> tuple[CompletionLoss, float, Tensor]:
    loss, rows = CompletionLoss(model), alike()
    with attention_for(loss, rows, trees=trees):
        batch = loss.collate(rows)
        total, _ = loss(batch)
        total.backward()
    assert not trees or not loss.trees or batch.tree.input_ids.numel() < 0.6 * batch.input_ids.numel()
    slopes = torch.cat([p.grad.flatten() for p in parameters(model) if p.grad is not None])
    model.zero_grad()
    return loss, float(total.detach()), slopes


def scaled(model: Any) -> Any:
    """The adapter and the base far from their starts: what is mixed up shows."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
            elif parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=[] if k in ("llama", "gpt2", "gemma2", "gemma3_text", "gpt_oss") else pytest.mark.slow)
        for k in KINDS
        if k not in NO_TREES
    ],
)
def test_a_tree_gives_the_loss_and_gradients_of_its_rows(kind: str) -> None:
    """Windows of attention are 8 tokens where a model has one, beginnings 24 and 44."""
    model = scaled(attach(tiny_of(kind), LoRA(rank=2, alpha=4)))
    # The module's own attention of rows takes a mask's least number into float32, where double has a lesser one
    model = model if model.config._attn_implementation == "eager" else model.double()
    loss, total, slopes = gradients(model, True)
    _, wanted, wanted_slopes = gradients(model, False)
    assert model.config._attn_implementation in ("eager", "sdpa")
    assert loss.trees and total == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(slopes, wanted_slopes, rtol=0, atol=1e-5 * float(wanted_slopes.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(NO_TREES - {"xglm"}))
def test_where_a_tree_is_not_its_rows_there_is_none(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = scaled(attach(tiny_of(kind), LoRA(rank=2, alpha=4)))
    loss, total, slopes = gradients(model, True)
    _, wanted, wanted_slopes = gradients(model, False)
    assert not loss.trees and total == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(slopes, wanted_slopes, rtol=1e-3, atol=1e-4 * float(wanted_slopes.abs().max()))


def hybrid() -> Any:
    """LFM2 with a layer of convolutions, whose state goes from one token to the next in the row."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "lfm2", vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, layer_types=["conv", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).float()


@pytest.mark.parametrize("method", ["a layer of convolutions", "a prefix"])
def test_a_model_that_takes_no_tree_is_told_and_computes_rows(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama() if method == "a prefix" else hybrid()
    attach(model, Prefix(length=2) if method == "a prefix" else LoRA(rank=2, alpha=4))
    loss, total, slopes = gradients(model, True)
    assert loss.trees is False and caplog.text.count("is computed for each of them") == 1
    _, wanted, wanted_slopes = gradients(model, False)
    assert total == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(slopes, wanted_slopes)


def test_a_window_that_longer_rows_come_to_is_tried_again() -> None:
    """Llama 4's attention within chunks is in its mask alone: rows shorter than a chunk of 32 tokens say nothing of it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama4_text", vocab_size=96, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_hidden_layers=4, attention_chunk_size=32, num_local_experts=2, pad_token_id=0,
        no_rope_layers=[1, 1, 1, 0],
    )  # fmt: skip
    model = scaled(attach(AutoModelForCausalLM.from_config(config).float(), LoRA(rank=2, alpha=4)))
    loss, rows = CompletionLoss(model), alike()
    short = [Example(row.input_ids[:30], [False, *[True] * 29], "") for row in rows if len(row.input_ids) >= 30]
    with attention_for(loss, rows):
        loss(loss.collate(short))
        assert loss.trees
        loss(loss.collate(rows))
        assert loss.trees is False


def test_the_loop_takes_the_same_steps_with_trees_as_without() -> None:
    events: dict[str, list[Event]] = {"auto": [], "off": []}
    for share in events:
        model = attach(tiny_of("llama"), LoRA(rank=2, alpha=4))
        config = TrainConfig(batch=4, steps=4, lr=5e-3, warmup=0, log_every=1, share=share)  # type: ignore[arg-type]
        run_loop(LoopPlan(CompletionLoss(model), alike(), (), config, events[share].append))
    losses = {share: [event.loss for event in told if isinstance(event, Stepped)] for share, told in events.items()}
    assert len(losses["auto"]) == 4
    torch.testing.assert_close(losses["auto"], losses["off"], rtol=1e-5, atol=1e-6)


def test_groups_meet_in_a_step_and_the_tokens_they_share_are_counted() -> None:
    rows = [[*range(3 + 10 * d, 3 + 10 * d + 10), *range(20), 50 + q] for d in range(4) for q in range(4)]
    records = [Example(row, [False] * 30 + [True] * (len(row) - 30), str(i)) for i, row in enumerate(rows)]
    shared = {}
    for share in ("off", "auto", "group"):
        model = attach(tiny_of("llama"), LoRA(rank=2, alpha=4))
        config = TrainConfig(batch=8, steps=2, lr=5e-3, share=share)  # type: ignore[arg-type]
        plan = LoopPlan(CompletionLoss(model), records, (), config)
        shared[share] = run_loop(plan).shared
    assert shared["off"] == 0 and shared["group"] == 2 * 6 * 30
    known = alike_of(plan)
    assert known is not None and (known.groups, known.a_step, known.grouped) == (4, 2, True)
    assert known.computed == known.if_grouped == pytest.approx((2 * 30 + 8) / (8 * 31))


def test_a_run_whose_attention_takes_no_trees_tells_it() -> None:
    events: list[Event] = []
    model = tiny_of("gptj")
    config = TrainConfig(batch=7, steps=1, lr=5e-3)
    run_loop(LoopPlan(CompletionLoss(attach(model, LoRA(rank=2, alpha=4))), alike(), (), config, events.append))
    assert [e.text for e in events if isinstance(e, Warned)] == [
        "What records have in common is computed for each of them: the model's attention is 'eager' in a way of its own, not "
        "transformers' 'sdpa'."
    ]
