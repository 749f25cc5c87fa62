"""Published models by name, as sizes for their transformers configs: `plan` reads these without a folder or a network.

Knows no torch. GPT-3 has no class in transformers. GPT-2's class with GPT-3's sizes has the same dense layers, but no sparse
attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaw.config import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Preset:
    """A model's config, and its usual task."""

    family: str
    """The name of the config's class in transformers."""
    settings: dict[str, object]
    task: Task
    source: str
    """The paper that the sizes are from."""

    def config(self) -> PreTrainedConfig:
        """Return the transformers config."""
        import transformers

        config: PreTrainedConfig = getattr(transformers, self.family)(**self.settings)
        return config


def _roberta(hidden: int, blocks: int, heads: int) -> Preset:
    sizes: dict[str, object] = {
        "hidden_size": hidden, "num_hidden_layers": blocks, "num_attention_heads": heads, "intermediate_size": 4 * hidden,
        "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
    }  # fmt: skip
    return Preset("RobertaConfig", sizes, "classification", "Liu et al. 2019, arXiv 1907.11692")


def _gpt(width: int, blocks: int, heads: int, positions: int, source: str, **more: float) -> Preset:
    sizes: dict[str, object] = {
        "n_embd": width, "n_layer": blocks, "n_head": heads, "n_positions": positions, "vocab_size": 50257, **more,
    }  # fmt: skip
    return Preset("GPT2Config", sizes, "causal", source)


def _llama(hidden: int, inner: int, blocks: int, heads: int, *, tied: bool = False) -> Preset:
    """A model of the Llama 3 family: eight key-value heads, and its vocabulary."""
    sizes: dict[str, object] = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": tied,
    }  # fmt: skip
    return Preset("LlamaConfig", sizes, "causal", "Grattafiori et al. 2024, arXiv 2407.21783; 1B and 3B: Llama 3.2")


_GPT2, _GPT3 = "Radford et al. 2019", "Brown et al. 2020, arXiv 2005.14165"
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

PRESETS: dict[str, Preset] = {
    "roberta-base": _roberta(768, 12, 12),
    "roberta-large": _roberta(1024, 24, 16),
    "deberta-xxl": Preset(
        "DebertaV2Config",
        {
            "hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144,
            "vocab_size": 128100, "max_position_embeddings": 512, "type_vocab_size": 0, "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"], "position_buckets": 256, "share_att_key": True, "norm_rel_ebd": "layer_norm",
            "position_biased_input": False, "conv_kernel_size": 3, "conv_act": "gelu",
        },
        "classification", "He et al. 2021, arXiv 2006.03654 (v2)",
    ),
    "gpt2-medium": _gpt(1024, 24, 16, 1024, _GPT2),
    "gpt2-large": _gpt(1280, 36, 20, 1024, _GPT2),
    "gpt3-175b": _gpt(12288, 96, 96, 2048, _GPT3, **_NO_DROPOUT),
    "llama-1b": _llama(2048, 8192, 16, 32, tied=True),
    "llama-3b": _llama(3072, 8192, 28, 24, tied=True),
    "llama-8b": _llama(4096, 14336, 32, 32),
    "llama-70b": _llama(8192, 28672, 80, 64),
    "llama-405b": _llama(16384, 53248, 126, 128),
}  # fmt: skip
