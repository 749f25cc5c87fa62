"""A table of architectures: for each a tiny random model, inputs for it, and what deltaw is expected to find on it.

Layers are non-square where the architecture lets them be, weights that it ties are tied, and nothing drops out: what a check finds
is the mechanism's doing. tests/test_architectures.py goes through the table, and scripts/models_page.py makes a page of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor

ROWS = 3
"""Of each batch."""


@dataclass(frozen=True)
class Architecture:
    """One line of the table."""

    name: str
    """As people say it."""
    model: Any
    config: Any
    """Classes of transformers."""
    settings: Mapping[str, Any]
    """Of the config."""
    inputs: Callable[[], dict[str, Any]]
    """A batch, the same every time, with which the model gives a loss."""
    roles: Mapping[str, set[str]]
    """Role → how the names of its layers end: all of the layers that end so, where no longer end is in the table."""
    others: set[str] = field(default_factory=set)
    """Ends of layers that all-linear adapts and that have no role."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Weights that take no update, embeddings aside: how the module's name ends → how the reason begins."""
    unsliced: bool = False
    """A role that the model fuses with others means nothing here: how they are laid out is not known."""
    outputs: Callable[[Any], Tensor] = lambda out: out.logits
    """What the model gives for each row of the batch, [rows, ...]."""
    refused: str = ""
    """How deltaw refuses to adapt it (a pattern); nothing else is then expected of it."""
    rows_refused: str = ""
    """How deltaw refuses rows with adapters of their own (a pattern)."""

    def build(self) -> Any:
        """The model in evaluation mode, the same weights every time."""
        torch.manual_seed(7)
        return self.model(self.config(**self.settings)).eval()


# --- inputs -----------------------------------------------------------------------------------------------------


def ids(n: int = 11, *, seed: int = 2) -> Tensor:
    """Tokens of a batch, none of them a special one."""
    return torch.randint(4, 95, (ROWS, n), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(4))


def tokens() -> dict[str, Any]:
    """Each token is to be told from itself (encoders), or the next one from those before."""
    return {"input_ids": ids(), "labels": ids()}


def classes() -> dict[str, Any]:
    return {"input_ids": ids(), "labels": torch.arange(ROWS)}


def pairs() -> dict[str, Any]:
    """For an encoder and a decoder."""
    return {"input_ids": ids(), "labels": ids(7, seed=3)}


def images() -> dict[str, Any]:
    return {"pixel_values": noise(3, 12, 12), "labels": torch.arange(ROWS)}


def captions() -> dict[str, Any]:
    """Images, and texts that end in the token by which CLIP sums them up."""
    text = torch.cat([ids(8), torch.full((ROWS, 1), 95)], 1)
    return {"input_ids": text, "pixel_values": noise(3, 12, 12), "return_loss": True}


def sounds() -> dict[str, Any]:
    return {"input_features": noise(8, 20), "labels": ids(7)}


def embeddings(out: Any) -> Tensor:
    """CLIP's outputs before it compares each text with each image, which makes one number of two rows."""
    return torch.cat([out.text_embeds, out.image_embeds], 1)


# --- sizes ------------------------------------------------------------------------------------------------------

VOCABULARY: dict[str, Any] = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56, "initializer_range": 0.1,
}  # fmt: skip
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER: dict[str, Any] = SIZES | VOCABULARY | NO_DROPOUT | {"max_position_embeddings": 64, "num_labels": ROWS}
DECODER: dict[str, Any] = SIZES | VOCABULARY | {"max_position_embeddings": 64}
GROUPED: dict[str, Any] = DECODER | {"num_key_value_heads": 2}
"""Grouped-query attention."""
WIDE: dict[str, Any] = GROUPED | {"head_dim": 12}
"""And heads that together are wider than the model: no layer is square."""
SEQ2SEQ: dict[str, Any] = VOCABULARY | {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 56, "decoder_ffn_dim": 40, "init_std": 0.1, "dropout": 0.0,
}  # fmt: skip

# --- expectations -----------------------------------------------------------------------------------------------

Roles = dict[str, set[str]]
ATTENTION: Roles = {"q": {"q_proj"}, "k": {"k_proj"}, "v": {"v_proj"}, "o": {"o_proj"}}
LLAMA: Roles = ATTENTION | {"gate": {"gate_proj"}, "up": {"up_proj"}, "down": {"down_proj"}}
BART: Roles = ATTENTION | {"o": {"out_proj"}, "up": {"fc1"}, "down": {"fc2"}}
MIXTURE: Roles = ATTENTION | {"gate_up": {"experts.gate_up_proj"}, "down": {"experts.down_proj"}}
BERT: Roles = {
    "q": {"query"}, "k": {"key"}, "v": {"value"}, "o": {"attention.output.dense"}, "up": {"intermediate.dense"},
    "down": {"output.dense"},
}  # fmt: skip
NEOX: Roles = {"qkv": {"query_key_value"}, "o": {"dense"}, "up": {"dense_h_to_4h"}, "down": {"dense_4h_to_h"}}


def head(*ends: str) -> dict[str, str]:
    return dict.fromkeys(ends, "output head")


# --- the table --------------------------------------------------------------------------------------------------

TABLE: tuple[Architecture, ...] = (
    Architecture(
        "BERT", hf.BertForMaskedLM, hf.BertConfig, ENCODER, tokens, BERT,
        left_out=head("predictions.transform.dense", "predictions.decoder"),
    ),
    Architecture(
        "RoBERTa", hf.RobertaForSequenceClassification, hf.RobertaConfig, ENCODER, classes, BERT,
        left_out=head("classifier.dense", "classifier.out_proj"),
    ),
    # As its released models are: the layers of the tokens' keys and queries also see its relative positions, [1, positions, d]
    Architecture(
        "DeBERTa-v2", hf.DebertaV2ForSequenceClassification, hf.DebertaV2Config,
        ENCODER | {
            "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True,
            "norm_rel_ebd": "layer_norm", "position_biased_input": False, "pooler_dropout": 0.0,
        },
        classes, BERT | {"q": {"query_proj"}, "k": {"key_proj"}, "v": {"value_proj"}},
        left_out=head("pooler.dense", "classifier"), rows_refused=r"query_proj: its input is \(1, 16, 32\)",
    ),
    # All of its layers are one
    Architecture(
        "ALBERT", hf.AlbertForMaskedLM, hf.AlbertConfig, ENCODER | {"embedding_size": 24, "classifier_dropout_prob": 0.0}, tokens,
        BERT | {"o": {"attention.dense"}, "up": {"ffn"}, "down": {"ffn_output"}},
        others={"embedding_hidden_mapping_in"}, left_out=head("predictions.dense", "predictions.decoder"),
    ),
    Architecture(
        "DistilBERT", hf.DistilBertForMaskedLM, hf.DistilBertConfig,
        VOCABULARY | {
            "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 56, "max_position_embeddings": 64, "dropout": 0.0,
            "attention_dropout": 0.0, "initializer_range": 0.1,
        },
        tokens, {"q": {"q_lin"}, "k": {"k_lin"}, "v": {"v_lin"}, "o": {"out_lin"}, "up": {"lin1"}, "down": {"lin2"}},
        left_out=head("vocab_transform", "vocab_projector"),
    ),
    Architecture(
        "GPT-2", hf.GPT2LMHeadModel, hf.GPT2Config,
        VOCABULARY | {
            "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 56, "n_positions": 64, "initializer_range": 0.1,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
        tokens, {"qkv": {"c_attn"}, "o": {"attn.c_proj"}, "up": {"c_fc"}, "down": {"mlp.c_proj"}}, left_out=head("lm_head"),
    ),
    Architecture("GPT-NeoX", hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, DECODER, tokens, NEOX, left_out=head("lm_head")),
    # With the projections of its 350M model, whose embeddings are narrower than its layers
    Architecture(
        "OPT", hf.OPTForCausalLM, hf.OPTConfig,
        VOCABULARY | {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 56, "init_std": 0.1, "dropout": 0.0,
            "word_embed_proj_dim": 24, "do_layer_norm_before": False, "max_position_embeddings": 64,
        },
        tokens, BART, others={"project_in", "project_out"}, left_out=head("lm_head"),
    ),
    Architecture(
        "BLOOM", hf.BloomForCausalLM, hf.BloomConfig,
        VOCABULARY | {
            "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0,
            "initializer_range": 0.1,
        },
        tokens, NEOX, left_out=head("lm_head"),
    ),
    Architecture(
        "Falcon", hf.FalconForCausalLM, hf.FalconConfig, DECODER | {"ffn_hidden_size": 56}, tokens, NEOX,
        left_out=head("lm_head"),
    ),
    Architecture("Llama", hf.LlamaForCausalLM, hf.LlamaConfig, WIDE, tokens, LLAMA, left_out=head("lm_head")),
    Architecture(
        "Mistral", hf.MistralForCausalLM, hf.MistralConfig, WIDE | {"sliding_window": 4}, tokens, LLAMA,
        left_out=head("lm_head"),
    ),
    Architecture(
        "Qwen3", hf.Qwen3ForCausalLM, hf.Qwen3Config, WIDE | {"tie_word_embeddings": True}, tokens, LLAMA,
        left_out=head("lm_head"),
    ),
    Architecture(
        "Gemma3", hf.Gemma3ForCausalLM, hf.Gemma3TextConfig,
        WIDE | {
            "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 12,
        },
        tokens, LLAMA, left_out=head("lm_head"),
    ),
    Architecture(
        "Phi-3", hf.Phi3ForCausalLM, hf.Phi3Config, GROUPED, tokens,
        {"qkv": {"qkv_proj"}, "o": {"o_proj"}, "gate_up": {"gate_up_proj"}, "down": {"down_proj"}}, left_out=head("lm_head"),
    ),
    # The experts of a layer are two parameters [experts, d, k] of one module, and the router is a class of its own
    Architecture(
        "Mixtral", hf.MixtralForCausalLM, hf.MixtralConfig, WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2}, tokens,
        MIXTURE, left_out=head("lm_head") | {"mlp.gate": "MixtralTopKRouter is no"}, unsliced=True,
    ),
    Architecture(
        "Qwen3-MoE", hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig,
        WIDE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}, tokens, MIXTURE,
        left_out=head("lm_head") | {"mlp.gate": "Qwen3MoeTopKRouter is no"}, unsliced=True,
    ),
    Architecture(
        "T5", hf.T5ForConditionalGeneration, hf.T5Config,
        {
            "vocab_size": 96, "d_model": 32, "d_kv": 12, "d_ff": 56, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
            "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
        },
        pairs, {"q": {"q"}, "k": {"k"}, "v": {"v"}, "o": {"o"}, "up": {"wi"}, "down": {"wo"}}, left_out=head("lm_head"),
    ),
    Architecture(
        "BART", hf.BartForConditionalGeneration, hf.BartConfig, SEQ2SEQ | {"max_position_embeddings": 64}, pairs, BART,
        left_out=head("lm_head"),
    ),
    Architecture(
        "ViT", hf.ViTForImageClassification, hf.ViTConfig,
        SIZES | NO_DROPOUT | {"image_size": 12, "patch_size": 4, "num_labels": ROWS}, images,
        ATTENTION | {"up": {"fc1"}, "down": {"fc2"}},
        left_out=head("classifier") | {"vit.embeddings": "ViTEmbeddings is no", "projection": "Conv2d: it takes"},
    ),
    Architecture(
        "CLIP", hf.CLIPModel, hf.CLIPConfig,
        {
            "text_config": SIZES | VOCABULARY | {"eos_token_id": 95, "max_position_embeddings": 32},
            "vision_config": SIZES | {"hidden_size": 24, "intermediate_size": 40, "image_size": 12, "patch_size": 4},
            "projection_dim": 20,
        },
        captions, BART, others={"text_projection", "visual_projection"}, left_out={"patch_embedding": "Conv2d: it takes"},
        outputs=embeddings,
    ),
    Architecture(
        "Whisper", hf.WhisperForConditionalGeneration, hf.WhisperConfig,
        SEQ2SEQ | {
            "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32, "decoder_start_token_id": 1,
            "suppress_tokens": None, "begin_suppress_tokens": None,
        },
        sounds, BART, left_out=head("proj_out") | {"conv1": "Conv1d: it takes", "conv2": "Conv1d: it takes"},
    ),
)  # fmt: skip
