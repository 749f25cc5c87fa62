"""What a targets value means, and what it says when it means nothing."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPTJConfig,
    GPTJForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from deltaw.errors import TargetError
from deltaw.methods.targets import role, select
from tests.conftest import tiny_gpt2, tiny_llama

PER_LAYER = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def ends(model: nn.Module, targets: object) -> set[str]:
    return {n.rsplit(".", 1)[-1] for n in select(model, targets, 4).ranks}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", PER_LAYER),
        ("qv", {"q_proj", "v_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("q", {"q_proj"}),
        ("q, down", {"q_proj", "down_proj"}),
        (["q_proj", "up"], {"q_proj", "up_proj"}),
        ("*.layers.1.mlp.*", {"gate_proj", "up_proj", "down_proj"}),
        ("lm_head", {"lm_head"}),
    ],
)
def test_presets_roles_names_and_globs(targets: object, expected: set[str]) -> None:
    assert ends(tiny_llama(), targets) == expected


def test_a_role_is_a_name_too_where_no_layer_has_the_role() -> None:
    model = nn.ModuleDict({"q": nn.Linear(8, 6), "inner": nn.ModuleDict({"up": nn.Linear(6, 8)})})
    assert list(select(model, "q,up", 2).ranks) == ["q", "inner.up"]
    with pytest.raises(TargetError, match="'k': no layer of this model has that role"):
        select(model, "k", 2)


def test_a_mapping_sets_ranks_and_later_entries_override() -> None:
    ranks = select(tiny_llama(), {"attention": 8, "mlp": 4, "model.layers.1.self_attn.q_proj": 2}, 16).ranks
    assert ranks["model.layers.0.self_attn.q_proj"] == 8
    assert ranks["model.layers.1.self_attn.q_proj"] == 2
    assert ranks["model.layers.0.mlp.up_proj"] == 4
    assert (
        select(tiny_llama(), "attention=8,mlp=4", 16).ranks
        == select(tiny_llama(), {"attention": 8, "mlp": 4}, 16).ranks
    )


def test_the_order_is_the_models() -> None:
    model = tiny_llama()
    names = [n for n, _ in model.named_modules()]
    chosen = list(select(model, "down,q", 2).ranks)
    assert chosen == sorted(chosen, key=names.index)


def test_the_output_head_is_not_among_all_linear_and_coverage_says_why() -> None:
    left_out = select(tiny_llama(tied=False), "attention", 4).left_out
    assert left_out["lm_head"] == "output head"
    assert left_out["model.layers.0.mlp.up_proj"] == "not among the targets"
    assert "Embedding" in left_out["model.embed_tokens"]


def test_an_embedding_takes_an_update_only_where_it_is_named() -> None:
    assert "model.embed_tokens" not in {
        n for targets in ("all-linear", "*") for n in select(tiny_llama(), targets, 4).ranks
    }
    assert list(select(tiny_llama(), "embed_tokens", 4).ranks) == ["model.embed_tokens"]


def test_heads_of_other_models_are_left_out_too() -> None:
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    )
    names = select(bert, "all-linear", 2).ranks
    assert "classifier" not in names and "bert.encoder.layer.0.output.dense" in names
    assert {role(n) for n in names if "layer.0" in n} == {"q", "k", "v", "o", "up", "down"}
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50))
    names = select(t5, "all-linear", 2).ranks
    assert "lm_head" not in names and {role(n) for n in names} == {"q", "k", "v", "o", "up", "down"}


def test_fused_attention_is_in_attention_whole() -> None:
    assert ends(tiny_gpt2(), "attention") == {"c_attn", "c_proj"}
    assert not select(tiny_gpt2(), "attention", 4).slices


def mixture() -> nn.Module:
    """Layers of one expert's gate beside ordinary ones, as Qwen's mixtures have them."""
    model = nn.Module()
    model.up_proj, model.shared_expert_gate = nn.Linear(8, 8), nn.Linear(8, 1)
    return model


@pytest.mark.parametrize("targets", ["all-linear", "*", "all-linear=4"])
def test_layers_too_small_for_the_rank_are_left_out_of_what_describes_many(targets: str) -> None:
    found = select(mixture(), targets, 4)
    assert list(found.ranks) == ["up_proj"]
    assert found.left_out["shared_expert_gate"] == "rank 4 is larger than min(d, k) = 1"


@pytest.mark.parametrize(("targets", "rank"), [("shared_expert_gate", 2), ("all-linear", 9)])
def test_a_rank_too_large_for_a_named_layer_or_for_all_is_an_error(targets: str, rank: int) -> None:
    with pytest.raises(TargetError, match=rf"rank {rank} is larger than min\(d, k\) = 1"):
        select(mixture(), targets, rank)


def test_a_small_layer_may_be_named_beside_the_others() -> None:
    assert select(mixture(), {"all-linear": 4, "shared_expert_gate": 1}, 8).ranks == {
        "up_proj": 4,
        "shared_expert_gate": 1,
    }


def test_a_role_that_no_layer_has_is_not_taken_for_a_fused_one() -> None:
    model = nn.ModuleDict({"odd_name": nn.Linear(8, 8), "q_proj": nn.Linear(8, 8)})
    with pytest.raises(TargetError, match="'mlp': no layer of this model has that role"):
        select(model, "mlp", 2)


def test_roles_of_gpt_j_are_known() -> None:
    config = GPTJConfig(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    assert ends(GPTJForCausalLM(config), "mlp") == {"fc_in", "fc_out"}


def test_every_problem_is_in_one_error_with_the_nearest_names() -> None:
    with pytest.raises(TargetError) as caught:
        select(
            tiny_llama(),
            [
                "q_prj",
                "self_attn",
                "norm",
                "attention=500",
                "mlp=0",
                "up=x",
                "*nothing*",
                "c_attn[q,v]",
                5,
            ],
            4,
        )
    text = str(caught.value)
    for part in (
        "'q_prj' matches no layer (did you mean 'q_proj'",
        "'self_attn' is a LlamaAttention with 8 dense layers inside", "'norm' cannot take the update",
        "rank 500 is larger than min(d, k) = 32", "'mlp': rank is 0", "'up': rank is 'x'", "5 is no name", "'*nothing*' matches no dense layer",
        "'c_attn' matches no layer", "Its dense layers are",
    ):  # fmt: skip
        assert part in text, f"{part!r} not in:\n{text}"


def test_weights_that_are_read_without_calling_a_layer_are_meant_too() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32)
    found = ["self_attn.out_proj", "self_attn.in_proj_weight", "linear1", "linear2"]
    assert sorted(select(model, "all-linear", 2).ranks) == sorted(found)


def test_a_layer_under_two_names_is_found_by_either_and_counted_once() -> None:
    model = nn.Module()
    shared = nn.Linear(8, 6)
    model.first, model.second = shared, nn.ModuleList([shared])
    assert list(select(model, "all-linear", 2).ranks) == ["first"]
    assert list(select(model, "second.0", 2).ranks) == ["first"]


def test_quantised_or_foreign_layers_say_why() -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(Own(8, 8), nn.Linear(8, 8))
    assert select(model, "all-linear", 2).left_out["0"] == "Own has a forward of its own"


class Tied(nn.Module):
    """An output layer has the weight of a layer in the body."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.narrow, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.head.weight = self.body.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.narrow(self.body(x)))
        return out


def test_a_layer_with_the_weight_of_an_output_layer_is_left_out_with_it() -> None:
    found = select(Tied(), "all-linear", 2)
    assert list(found.ranks) == ["narrow"]
    assert found.left_out == {"body": "output head", "head": "output head"}
