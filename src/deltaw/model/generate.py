"""Prompts in tokens → completions in text, batched, and where they stop. Knows no files: the active adapter is used."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer

from deltaw.config import GenerateConfig
from deltaw.errors import AdapterError, ConfigError, DataError, DeltaWError, shown
from deltaw.layers.ops.seeding import devices_of, seeded
from deltaw.layers.tree import evaluating
from deltaw.model.ends import Ends, in_use, listed, own_ends, routed, taught
from deltaw.model.inputs import most_positions, turns_by_length, windows
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
        past_key_values: Cache | None = None,
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

    Prompts of like length share a batch, or prompts that begin alike where that leaves less to compute: the model then reads what
    all of a batch begin with once. Shorter ones are padded on the left, for an encoder on the right. A completion ends at
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
            reader = _Reader(model, asked) if names is None and config.beams == 1 else None
            for chosen in _batches(prompts, rows, config.batch, shared=reader is not None):
                with contextlib.nullcontext() if names is None else route(model, [names[i] for i in chosen]):
                    pieces = None if on_text is None else streamer(tokenizer, asked, on_text)
                    new_tokens = _batch(model, [prompts[i] for i in chosen], asked, pieces, reader)
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


def _batches(prompts: Sequence[Sequence[int]], rows: Sequence[int], size: int, *, shared: bool) -> list[list[int]]:
    """Return the rows in batches, longest prompts first; where their common beginnings are read once, those that begin alike
    together, if that is less to read."""
    orders = [sorted(rows, key=lambda i: -len(prompts[i]))]
    if shared:
        orders.append(sorted(rows, key=lambda i: list(prompts[i]), reverse=True))
    ways = [[order[i : i + size] for i in range(0, len(order), size)] for order in orders]

    def to_read(batches: list[list[int]]) -> int:
        kept = [[prompts[i] for i in batch] for batch in batches]
        return sum(len(batch) * max(map(len, batch)) - (len(batch) - 1) * _common(batch) for batch in kept)

    return min(ways, key=to_read)


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with alike and go on after."""
    least, most = min(prompts, key=list), max(prompts, key=list)
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(least, most, strict=False))
    return min(sum(1 for _ in alike), min(map(len, prompts)) - 1)


_LEAST = 128
"""Tokens that reading a common beginning once must save in a batch. Not measured."""
_TRIED = 24
"""Tokens of a common beginning that are tried."""


class _Reader:
    """Reads what the prompts of a batch begin with alike once, into the model's cache, where that gives what reading every prompt
    does: that is tried first, on a few tokens."""

    def __init__(self, model: PreTrainedModel, asked: GenerationConfig) -> None:
        self.model, self.asked = model, asked
        self.takes_it: bool | None = None
        self.beginning: list[int] = []
        self.cache: Cache | None = None

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[int, Cache | None]:
        """Return how many tokens of each prompt a cache holds, and the cache, a row for each; (0, None) if that is too few."""
        common = _common(prompts)
        if common * (len(prompts) - 1) < _LEAST or self.asked.use_cache is False or _has_encoder(self.model):
            return 0, None
        longest = max(map(len, prompts)) + (self.asked.max_new_tokens or 0)
        # Padding after the beginning would count in a window, and positions that depend on the length know the beginning's alone
        if any(size < longest for size in windows(self.model)) or turns_by_length(self.model):
            return 0, None
        if self.takes_it is None:
            self.takes_it = self._takes(list(prompts[0][:_TRIED]))
        return (common, self._cached(prompts[0][:common], len(prompts))) if self.takes_it else (0, None)

    def _cached(self, beginning: Sequence[int], rows: int) -> Cache | None:
        if self.cache is None or self.beginning != list(beginning):
            ids = torch.tensor([beginning], device=self.model.device)
            self.cache = self.model.base_model(input_ids=ids, use_cache=True).past_key_values
            self.beginning = list(beginning)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)  # type: ignore[union-attr]
        return cache

    def _takes(self, beginning: list[int]) -> bool:
        """Return whether two prompts that begin so come to the same logits either way."""
        prompts = [[*beginning, *beginning[:2]], [*beginning, *beginning[-5:]]]
        try:
            rows, shared = (
                self._logits(prompts, *held) for held in ((0, None), (len(beginning), self._cached(beginning, 2)))
            )
        except (AttributeError, DeltaWError, NotImplementedError, RuntimeError, TypeError, ValueError, IndexError):
            return False
        tolerance = 1e-3 if rows.dtype in (torch.float32, torch.float64) else 5e-2
        rows, shared = rows.double(), shared.double()
        return bool(((rows - shared).norm(dim=-1) <= tolerance * rows.norm(dim=-1)).all())

    def _logits(self, prompts: Sequence[Sequence[int]], held: int, cache: Cache | None) -> Tensor:
        """Return the logits of two tokens after each prompt."""
        ids, mask = _padded(prompts, 0, held, self.model.device)
        two = Asked(  # type: ignore[no-untyped-call]
            max_new_tokens=2, min_new_tokens=2, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        out: Any = self.model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=two, past_key_values=cache
        )
        return torch.stack(out.logits)


def _padded(prompts: Sequence[Sequence[int]], pad: int, held: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return prompts as ids and mask [rows, tokens]. Padding comes after the first `held` tokens of each."""
    width = max(map(len, prompts))
    gaps = [width - len(p) for p in prompts]
    ids = [[*p[:held], *[pad] * gap, *p[held:]] for p, gap in zip(prompts, gaps, strict=True)]
    mask = [[*[1] * len(p[:held]), *[0] * gap, *[1] * len(p[held:])] for p, gap in zip(prompts, gaps, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    asked: GenerationConfig,
    pieces: TextStreamer | None = None,
    reader: _Reader | None = None,
) -> list[list[int]]:
    """Return the new tokens of each row, with what ends them and padding after that."""
    pad = asked.pad_token_id
    if not isinstance(model, Generates):
        raise AdapterError(f"A {type(model).__name__} cannot generate.")
    has_encoder = _has_encoder(model)
    held, cache = (0, None) if reader is None else reader.read(prompts)
    ids, mask = _padded(prompts, pad, max(map(len, prompts)) if has_encoder else held, model.device)
    with watched(model, ids, mask) as watch:
        out = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=asked, logits_processor=watch, streamer=pieces,
            **{} if cache is None else {"past_key_values": cache},
        )  # fmt: skip
    rows: list[list[int]] = out[
        :, 1 if has_encoder else ids.shape[1] :
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
