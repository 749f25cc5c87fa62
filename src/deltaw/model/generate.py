"""Prompts in tokens → completions in text, batched, and where they stop. Knows no files: the active adapter is used."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from deltaw.config import GenerateConfig
from deltaw.errors import AdapterError, DataError
from deltaw.layers.ops.seeding import devices_of, seeded
from deltaw.layers.tree import evaluating
from deltaw.model.ends import in_use, listed, own_ends, routed, taught
from deltaw.model.inputs import most_positions
from deltaw.model.pretrained import pad_id
from deltaw.model.switch import route


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    *,
    ends: Sequence[int] = (),
    on_done: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The completion of each prompt (token ids), in order, without the end token. Prompts of like length share a batch; shorter
    ones are padded on the left, for an encoder on the right. `on_done` is told how many prompts are finished.

    A completion ends at the first of `stops`. Within a `route` block there is a prompt for each of its names, and each stops
    where its own adapter was taught to. Random numbers are drawn from `config.seed`; the caller's generators stay as they were.

    Raises, before anything is generated: DataError when the model has no positions for a prompt and its completion, AdapterError
    when a route names another number of rows.
    """
    problem = too_long(prompts, config, model)
    if problem:
        raise DataError(problem)
    names = routed(model)
    if names is not None and len(names) != len(prompts):
        raise AdapterError(
            f"The route names {len(names)} rows, and there are {len(prompts)} prompts: give one for each."
        )
    completions = [""] * len(prompts)
    finished = 0
    with evaluating(model), drawing(model, config, config.seed):
        for its_own, rows in _of_one_end(model, names, len(prompts)):
            asked = settings(model, tokenizer, config, [*ends, *its_own])
            order = sorted(rows, key=lambda i: -len(prompts[i]))
            for start in range(0, len(order), config.batch):
                chosen = order[start : start + config.batch]
                with contextlib.nullcontext() if names is None else route(model, [names[i] for i in chosen]):
                    said = _batch(model, [prompts[i] for i in chosen], asked)
                for i, ids in zip(chosen, said, strict=True):
                    completions[i] = tokenizer.decode(until_end(ids, asked), skip_special_tokens=True)
                finished += len(chosen)
                on_done(finished)
    return completions


def drawing(model: Any, config: GenerateConfig, seed: int) -> contextlib.AbstractContextManager[None]:
    """While open, samples are drawn from `seed`. What draws none touches no generator, so that threads may share a model."""
    return seeded(seed, devices_of(model)) if config.temperature > 0 else contextlib.nullcontext()


def stops(model: Any, tokenizer: Any, ends: Iterable[int] = ()) -> list[int]:
    """The tokens that end a completion: those of the model's generation_config, the tokenizer's eos, and `ends`."""
    own = [] if getattr(tokenizer, "eos_token_id", None) is None else [int(tokenizer.eos_token_id)]
    return list(dict.fromkeys([*own_ends(model), *own, *ends]))


def until_end(ids: Sequence[int], asked: GenerationConfig) -> list[int]:
    """A completion's tokens before the first that ends it; all, where none does."""
    ends = set(listed(asked.eos_token_id))
    return list(itertools.takewhile(lambda token: token not in ends, ids))


def _of_one_end(
    model: Any, names: Sequence[str | None] | None, count: int
) -> Iterable[tuple[tuple[int, ...], Sequence[int]]]:
    """The rows whose adapters were taught the same end tokens, and these."""
    if names is None:
        return [(in_use(model), range(count))]
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(taught(model, [name]), []).append(row)
    return groups.items()


def too_long(prompts: Sequence[Sequence[int]], config: GenerateConfig, model: Any) -> str | None:
    """What to tell the user when a prompt and its completion do not fit the model's positions; None when all fit."""
    most = most_positions(model)
    beside = _encodes(model)  # the prompt has positions of its own
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


def _batch(model: Any, prompts: Sequence[Sequence[int]], asked: GenerationConfig) -> list[list[int]]:
    """The new tokens of each row: what ends them, and padding after that, included."""
    pad = asked.pad_token_id
    width = max(len(p) for p in prompts)
    encodes = _encodes(model)

    def padded(row: Sequence[int], fill: int) -> list[int]:
        gap = [fill] * (width - len(row))
        return [*row, *gap] if encodes else [*gap, *row]  # a decoder goes on from the right end

    ids = torch.tensor([padded(p, pad) for p in prompts], device=model.device)
    mask = torch.tensor([padded([1] * len(p), 0) for p in prompts], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=asked)
    return out[:, 1 if encodes else width :].tolist()  # a decoder of an encoder's begins with one token of its own


def _encodes(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


class Asked(GenerationConfig):
    """transformers' settings for one call, which hold as they are.

    `generate` fills what a config leaves open from the model's generation_config, so a base's repetition penalty, forbidden
    words and the like would come through. Here these stay open, which means that nothing is done.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **values: Any) -> dict[str, Any]:
        """transformers' own, but for the call that hands over what the model's config says."""
        if defaults_only and allow_custom_entries:
            return values
        return super().update(defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **values)


KEPT = ("eos_token_id", "bos_token_id", "use_cache")
"""Fields of a base's generation_config that count: which tokens end and begin a text, and whether keys and values are kept, which
changes no choice."""
KEPT_OF_DECODERS = ("decoder_start_token_id", "forced_bos_token_id")
"""Those that count besides where a decoder follows an encoder: how it begins, which for mBART says the language."""


def settings(model: Any, tokenizer: Any, config: GenerateConfig, ends: Iterable[int] = ()) -> Asked:
    """transformers' GenerationConfig for ours. Temperature 0 takes the likeliest token each time, exactly. Above 0 it samples
    from the model's probabilities at that temperature, cut to top_p and by nothing else.

    Of the model's generation_config only KEPT counts, and KEPT_OF_DECODERS. End tokens are those of `stops`. The pad token is the
    tokenizer's.
    """
    own = getattr(model, "generation_config", None)
    names = KEPT + (KEPT_OF_DECODERS if _encodes(model) else ())
    chosen: dict[str, Any] = {name: getattr(own, name, None) for name in names}
    chosen |= {
        "max_new_tokens": config.max_new_tokens,
        "pad_token_id": pad_id(tokenizer),
        "eos_token_id": stops(model, tokenizer, ends) or None,
        "do_sample": config.temperature > 0,
    }
    if config.temperature > 0:
        chosen |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    if config.beams > 1:
        chosen |= {"num_beams": config.beams, "length_penalty": config.length_penalty}
    return Asked(**chosen)
