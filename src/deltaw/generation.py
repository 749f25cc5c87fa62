"""Prompts in tokens → completions in text, batched. Knows no files and no adapters: the active one is simply used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deltaw.config import GenerateConfig
from deltaw.errors import DataError
from deltaw.modes import evaluating
from deltaw.positions import most_positions


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    *,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The completion of each prompt (token ids), in order, without the end token. Prompts of like length share a batch;
    shorter ones are padded on the left. `on_done` is told how many prompts are finished. Raises DataError, before anything is
    generated, when the model has no positions for a prompt and its completion."""
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
    numbers = [i + 1 for i, p in enumerate(prompts) if most is not None and len(p) + config.max_new_tokens > most]
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
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings(model, tokenizer, config))
    return out[:, width:].tolist()


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
    if config.temperature > 0:
        chosen |= {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    else:
        chosen |= {"do_sample": False}
    if config.beams > 1:
        chosen |= {"num_beams": config.beams, "length_penalty": config.length_penalty}
    return GenerationConfig(**chosen)


def pad_id(tokenizer: Any) -> int:
    """A token to fill rows with; it is masked everywhere, so the end token serves where there is none of its own."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id or 0
