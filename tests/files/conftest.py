"""Models and edits of adapter folders that several tests of files use."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration


def tiny_bert() -> Any:
    """Biases everywhere, a classifier that no checkpoint of the base has."""
    config = BertConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def tiny_t5() -> Any:
    """An encoder and a decoder, whose embeddings and head are one weight."""
    config = T5Config(
        d_model=32, d_kv=8, d_ff=56, num_layers=2, num_heads=4, vocab_size=96, dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    with torch.no_grad():
        return model(**inputs).logits


def filled(model: Any, size: float = 0.2) -> Any:
    """Random values for all that trains, tied weights once."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def rewritten(folder: Path, **settings: Any) -> Path:
    """The folder with other settings; those that are `...` taken out."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder
