"""Prompts in tokens → completions in text, batched, and where they stop. Knows no files: the active adapter is used."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer

from deltaw.config import GenerateConfig
from deltaw.errors import AdapterError, ConfigError, DataError, shown
from deltaw.layers.ops.seeding import devices_of, seeded
from deltaw.layers.tree import evaluating
from deltaw.model.ends import Ends, in_use, listed, own_ends, routed, taught
from deltaw.model.inputs import most_positions
from deltaw.model.pretrained import pad_id
from deltaw.model.switch import at_fault, route

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@runtime_checkable
class Generates(Protocol):
    """A model that can generate."""

    def generate(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        streamer: TextStreamer | None = None,
    ) -> Tensor:
        """Return token ids [rows, length], which a streamer gets meanwhile.

        They begin with a decoder's prompts, or with the first token of an encoder's decoder.
        """
        ...


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    *,
    ends: Sequence[int] = (),
    on_done: Callable[[int], None] = lambda count: None,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Return the completion of each prompt (token ids), in order, without the end token.

    Prompts of like length share a batch. Shorter ones are padded on the left, for an encoder on the right. A completion ends at
    the first token of `stops`, to which `ends` are added. Within a `route` block there is a prompt for each name, and each
    stops where its own adapter was taught to. Random numbers are drawn from `config.seed`; the caller's generators stay as they
    were. `on_done` is told how many prompts are finished. `on_text` is told the completion of the only prompt as it comes, piece
    by piece.

    Raises, before anything is generated, ConfigError for `on_text` with several prompts or beams, DataError if the model has no
    positions for a prompt and its completion, and AdapterError if a route names another number of rows. Raises AdapterError for
    an adapter whose logits mean nothing, and FileError for such a base.
    """
    problem = too_long(prompts, config, model)
    if problem:
        raise DataError(problem)
    names = routed(model)
    if names is not None and len(names) != len(prompts):
        raise AdapterError(
            f"The route names {len(names)} rows, and there are {len(prompts)} prompts: give one for each."
        )
    if on_text is not None and (len(prompts) != 1 or config.beams > 1):
        raise ConfigError("Only one completion, without beams, can be shown as it comes.")
    completions = [""] * len(prompts)
    finished = 0
    with evaluating(model), drawing(model, config, config.seed):
        for taught_ends, rows in _by_ends(model, names, len(prompts)):
            asked = settings(model, tokenizer, config, [*ends, *taught_ends])
            order = sorted(rows, key=lambda i: -len(prompts[i]))
            for start in range(0, len(order), config.batch):
                chosen = order[start : start + config.batch]
                with contextlib.nullcontext() if names is None else route(model, [names[i] for i in chosen]):
                    pieces = None if on_text is None else streamer(tokenizer, asked, on_text)
                    new_tokens = _batch(model, [prompts[i] for i in chosen], asked, pieces)
                for i, ids in zip(chosen, new_tokens, strict=True):
                    completions[i] = str(tokenizer.decode(until_end(ids, asked), skip_special_tokens=True))
                finished += len(chosen)
                on_done(finished)
    return completions


def drawing(model: nn.Module, config: GenerateConfig, seed: int) -> contextlib.AbstractContextManager[None]:
    """While open, draw samples from `seed`.

    If nothing is sampled, no generator is touched, so that threads may share a model.
    """
    return seeded(seed, devices_of(model)) if config.temperature > 0 else contextlib.nullcontext()


def stops(model: nn.Module, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int] = ()) -> list[int]:
    """Return the tokens that end a completion: those of the model's generation_config, the tokenizer's eos, and `ends`."""
    eos = listed(getattr(tokenizer, "eos_token_id", None))
    return list(dict.fromkeys([*own_ends(model), *eos, *ends]))


def until_end(ids: Sequence[int], asked: GenerationConfig) -> list[int]:
    """Return a completion's tokens before the first that ends it; all if none does."""
    ends = set(listed(asked.eos_token_id))
    return list(itertools.takewhile(lambda token: token not in ends, ids))


def _by_ends(model: nn.Module, names: Sequence[str | None] | None, count: int) -> Iterable[tuple[Ends, Sequence[int]]]:
    """Return end tokens, and the rows whose adapters were taught these."""
    if names is None:
        return [(in_use(model), range(count))]
    groups: dict[Ends, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(taught(model, [name]), []).append(row)
    return groups.items()


def too_long(prompts: Sequence[Sequence[int]], config: GenerateConfig, model: nn.Module) -> str | None:
    """Return a message if a prompt and its completion do not fit the model's positions; None if all fit."""
    most = most_positions(model)
    has_encoder = _has_encoder(model)  # the prompt then has positions of its own
    needed = [max(len(p), config.max_new_tokens) if has_encoder else len(p) + config.max_new_tokens for p in prompts]
    numbers = [str(i + 1) for i, n in enumerate(needed) if most is not None and n > most]
    if not numbers:
        return None
    longest = max(len(p) for p in prompts)
    return (
        f"{len(numbers)} of {len(prompts)} prompts (number {shown(numbers, 10)}; the longest has {longest} tokens) and their "
        f"completions of up to {config.max_new_tokens} new tokens do not fit the model's {most} positions. Shorten the prompts, "
        "or ask for fewer new tokens: --max-new-tokens on the command line, max_new_tokens in Python."
    )


def streamer(
    tokenizer: PreTrainedTokenizerBase, asked: GenerationConfig, on_text: Callable[[str], None]
) -> TextStreamer:
    """Return what a call of the model's `generate` takes as streamer: `on_text` is told a completion's text up to its end token.

    A piece ends where a word does, or where the characters of a script without spaces are whole.
    """

    class Pieces(TextStreamer):
        def put(self, value: Tensor) -> None:
            if self.next_tokens_are_prompt or until_end(value.flatten().tolist(), asked):
                super().put(value)  # type: ignore[no-untyped-call]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    asked: GenerationConfig,
    pieces: TextStreamer | None = None,
) -> list[list[int]]:
    """Return the new tokens of each row, with what ends them and padding after that."""
    pad = asked.pad_token_id
    width = max(len(p) for p in prompts)
    has_encoder = _has_encoder(model)

    def padded(row: Sequence[int], fill: int) -> list[int]:
        gap = [fill] * (width - len(row))
        return [*row, *gap] if has_encoder else [*gap, *row]  # a decoder continues from the right end

    ids = torch.tensor([padded(p, pad) for p in prompts], device=model.device)
    mask = torch.tensor([padded([1] * len(p), 0) for p in prompts], device=model.device)
    if not isinstance(model, Generates):
        raise AdapterError(f"A {type(model).__name__} cannot generate.")
    with watched(model, ids, mask) as watch:
        out = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=asked, logits_processor=watch, streamer=pieces
        )
    rows: list[list[int]] = out[
        :, 1 if has_encoder else width :
    ].tolist()  # a decoder behind an encoder has a first token
    return rows


def _likeliest(logits: Tensor) -> bool:
    """Return whether each row of logits [rows, tokens] has a likeliest token.

    NaN has none. Nor have equal ones, which a norm makes of what overflowed before it.
    """
    least, most = torch.aminmax(logits, dim=-1)
    return bool((torch.isfinite(most) & (most > least)).all())


class _NotFinite(Exception):
    """Raised out of `generate` with the token ids [rows, length] whose logits are not finite."""


class _Watch(LogitsProcessor):
    """Raises _NotFinite for a row without a likeliest token: the choice would be the first token each time."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not _likeliest(scores):
            raise _NotFinite(input_ids)
        return scores


@contextlib.contextmanager
def watched(model: nn.Module, ids: Tensor, mask: Tensor) -> Iterator[LogitsProcessorList]:
    """Yield what a call of the model's `generate` takes as logits_processor.

    ids, mask: the prompts [rows, length]. Raises AdapterError or FileError, for an adapter or a base whose logits are not finite.
    """
    try:
        yield LogitsProcessorList([_Watch()])
    except _NotFinite as stopped:
        (tokens,) = stopped.args

        def again() -> Tensor:
            if _has_encoder(model):
                logits: Tensor = model(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens).logits
            else:
                logits = model(input_ids=tokens).logits
            return logits[:, -1]

        raise at_fault(model, again, name=getattr(model, "name_or_path", ""), sound=_likeliest) from None


def _has_encoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


class Asked(GenerationConfig):
    """The settings of one call of `generate`, which hold as they are.

    transformers fills the settings that a config leaves open from the model's generation_config, so that a base's repetition
    penalty or forbidden words would come through. Here such settings stay open, and nothing is done.
    """

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **values: object
    ) -> dict[str, object]:
        """Update as transformers does, except in the call that hands over what the model's config says."""
        if defaults_only and allow_custom_entries:
            return values
        unused: dict[str, object] = super().update(  # type: ignore[no-untyped-call]
            defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **values
        )
        return unused


KEPT = ("eos_token_id", "bos_token_id", "use_cache")
"""Fields of a base's generation_config that count: tokens that end and begin a text, and whether keys and values are cached,
which changes no choice."""
KEPT_OF_DECODERS = ("decoder_start_token_id", "forced_bos_token_id")
"""Fields that count besides for a decoder behind an encoder: how it begins, which for mBART says the language."""


def settings(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: GenerateConfig, ends: Iterable[int] = ()
) -> Asked:
    """Return transformers' GenerationConfig for ours.

    Temperature 0 takes the likeliest token each time, exactly. Above 0 it samples from the model's probabilities at that
    temperature, cut to top_p and by nothing else. Of the model's generation_config only KEPT and KEPT_OF_DECODERS count. End
    tokens are those of `stops`, and the tokenizer's token pads.
    """
    of_base = getattr(model, "generation_config", None)
    names = KEPT + (KEPT_OF_DECODERS if _has_encoder(model) else ())
    values: dict[str, object] = {name: getattr(of_base, name, None) for name in names}
    values |= {
        "max_new_tokens": config.max_new_tokens,
        "pad_token_id": pad_id(tokenizer),
        "eos_token_id": stops(model, tokenizer, ends) or None,
        "do_sample": config.temperature > 0,
    }
    if config.temperature > 0:
        values |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    if config.beams > 1:
        values |= {"num_beams": config.beams, "length_penalty": config.length_penalty}
    return Asked(**values)  # type: ignore[no-untyped-call]
