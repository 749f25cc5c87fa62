"""Prompts in tokens → completions in text, batched. Knows no files and no adapters: the active one is simply used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deltaw.config import GenerateConfig
from deltaw.errors import DataError
from deltaw.modes import evaluating
from deltaw.positions import most_positions
from deltaw.pretrained import pad_id


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    *,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The completion of each prompt (token ids), in order, without the end token. Prompts of like length share a batch; shorter
    ones are padded on the left, for an encoder on the right. `on_done` is told how many prompts are finished. Raises DataError,
    before anything is generated, when the model has no positions for a prompt and its completion."""
    problem = too_long(prompts, config, model)
    if problem:
        raise DataError(problem)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    completions = [""] * len(prompts)
    torch.manual_seed(config.seed)
    with evaluating(model):
        for start in range(0, len(order), config.batch):
            chosen = order[start : start + config.batch]
            for i, ids in zip(chosen, _batch(model, tokenizer, [prompts[i] for i in chosen], config), strict=True):
                completions[i] = tokenizer.decode(ids, skip_special_tokens=True)
            on_done(start + len(chosen))
    return completions


def too_long(prompts: Sequence[Sequence[int]], config: GenerateConfig, model: Any) -> str | None:
    """What to tell the user when a prompt and its completion do not fit the model's positions; None when all fit."""
    most = most_positions(model)
    beside = bool(
        getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    )  # the prompt has positions of its own
    needed = [max(len(p), config.max_new_tokens) if beside else len(p) + config.max_new_tokens for p in prompts]
    numbers = [i + 1 for i, n in enumerate(needed) if most is not None and n > most]
    if not numbers:
        return None
    longest = max(len(p) for p in prompts)
    named = ", ".join(map(str, numbers[:10])) + (" …" if len(numbers) > 10 else "")
    return (
        f"{len(numbers)} of {len(prompts)} prompts (number {named}; the longest has {longest} tokens) and their completions "
        f"(max_new_tokens is {config.max_new_tokens}) do not fit the model's {most} positions. Shorten them, or lower "
        "max_new_tokens."
    )


def _batch(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], config: GenerateConfig) -> list[list[int]]:
    pad = pad_id(tokenizer)
    width = max(len(p) for p in prompts)
    encodes = bool(getattr(model.config, "is_encoder_decoder", False))

    def padded(row: Sequence[int], fill: int) -> list[int]:
        gap = [fill] * (width - len(row))
        return [*row, *gap] if encodes else [*gap, *row]  # a decoder goes on from the right end

    ids = torch.tensor([padded(p, pad) for p in prompts], device=model.device)
    mask = torch.tensor([padded([1] * len(p), 0) for p in prompts], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings(model, tokenizer, config))
    return out[:, 0 if encodes else width :].tolist()


# How an encoder's decoder begins and ends
_OF_DECODERS = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")


def settings(model: Any, tokenizer: Any, config: GenerateConfig) -> Any:
    """transformers' GenerationConfig for ours: the model's end tokens are kept, its sampling habits are not."""
    from transformers import GenerationConfig

    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends = [*ends, tokenizer.eos_token_id]
    chosen: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "pad_token_id": pad_id(tokenizer),
        "eos_token_id": ends,
    }
    if getattr(model.config, "is_encoder_decoder", False):
        chosen |= {name: getattr(model.generation_config, name, None) for name in _OF_DECODERS}
    if config.temperature > 0:
        chosen |= {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    else:
        chosen |= {"do_sample": False}
    if config.beams > 1:
        chosen |= {"num_beams": config.beams, "length_penalty": config.length_penalty}
    return GenerationConfig(**chosen)
