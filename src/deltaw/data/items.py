"""Records of tasks other than the next token → a model's inputs and targets, and their batches. Knows a tokenizer or an image
processor, no model.

labelled   the text, or the pair of texts, as the tokenizer encodes it for classification; target: a class's number or a quantity
image      the picture as the processor prepares it; target: a class's number
seq2seq    the prompt as the tokenizer encodes it for an encoder, without its left where it is too long; target: the completion's
           tokens, without its end and the end token where it is too long

A text that has the tokenizer's own first or last token already gets no second one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from deltaw.config import DataConfig
from deltaw.data.batches import padded
from deltaw.data.encode import Counts, Encoded, ended, plain_prompt
from deltaw.data.forms import Record
from deltaw.data.images import pixels
from deltaw.data.labels import class_indices, quantities
from deltaw.data.records import Records
from deltaw.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

Input: TypeAlias = "list[int] | NDArray[np.float32] | Tensor"
"""A number for each token, or a picture."""
IGNORED = -100
"""The target of padding, over which no loss is taken."""


@dataclass(frozen=True, slots=True)
class Item:
    """A record as a model takes it, with its target."""

    inputs: Mapping[str, Input]
    """The model's names of its inputs → a number for each token, or an array."""
    target: int | float | list[int] | None
    place: str

    @property
    def length(self) -> int:
        """Tokens; 1 where there are none."""
        return len(self.inputs["input_ids"]) if "input_ids" in self.inputs else 1

    @property
    def targets(self) -> int:
        """Predictions that the loss is taken over."""
        return len(self.target) if isinstance(self.target, list) else 1


@dataclass(frozen=True)
class ItemBatch:
    """n items as tensors; lists are padded on the right."""

    inputs: dict[str, Tensor]
    target: Tensor
    """Classes int64 [n], quantities float32 [n], or tokens int64 [n, t] with IGNORED as padding."""
    targets: int
    """Predictions that the loss is taken over."""


def encode_labelled(records: Records, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Encoded:
    """Return texts and pairs with their labels. `config.labels` numbers the classes; without it, labels are quantities.

    Raises one DataError with every record that cannot be used.
    """
    targets = _targets(records, config)
    inputs, lengths = texts(records.items, tokenizer, config.max_length, config.too_long == "truncate")
    items = [Item(row, target, r.place) for row, target, r in zip(inputs, targets, records.items, strict=True)]
    return _kept(items, lengths, records, config)


def texts(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, most: int, cut: bool = True
) -> tuple[list[dict[str, list[int]]], list[int]]:
    """Return the tokenizer's encoding of each record's text or pair, and the number of its tokens before it was cut.

    Where they may be cut, they have at most `most` tokens; of a pair, the longer text is cut first.
    """
    bare = _Bare(tokenizer)
    seconds = [bare.end(r.input) for r in records] if any(r.input for r in records) else None
    firsts = [bare.start(r.prompt) if seconds else bare.end(bare.start(r.prompt)) for r in records]
    lengths = [len(ids) for ids in tokenizer(firsts, seconds, verbose=False).input_ids]
    _check_none_empty(lengths, records, "text")
    encoded = tokenizer(firsts, seconds, truncation=cut, max_length=most if cut else None, verbose=False)
    names = [name for name in encoded if name != "attention_mask"]
    return [{name: list(encoded[name][i]) for name in names} for i in range(len(records))], lengths


def encode_images(records: Records, processor: BaseImageProcessor, config: DataConfig) -> Encoded:
    """Return pictures with their labels. Raises one DataError with every record that cannot be used."""
    targets = _targets(records, config)
    values = pixels(records.items, processor)
    items = [
        Item({"pixel_values": v}, target, r.place) for v, target, r in zip(values, targets, records.items, strict=True)
    ]
    return _kept(items, [1] * len(items), records, config)


def encode_seq2seq(records: Records, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Encoded:
    """Return prompts for the encoder and completions for the decoder, each in at most max_length tokens.

    Raises one DataError with every record that cannot be used.
    """
    if records.form not in ("prompt", "instruction"):
        raise DataError(
            f"{records.source}: a model with an encoder learns from prompt or instruction records, and these are {records.form} "
            "records."
        )
    cut = config.too_long == "truncate"
    prompts = _encoder_inputs(records.items, tokenizer, config)
    answers = _decoder_targets(records.items, tokenizer)
    most = config.max_length if cut else None
    items = [
        Item({"input_ids": prompt.within(most)}, answer[:most], r.place)
        for prompt, answer, r in zip(prompts, answers, records.items, strict=True)
    ]
    lengths = [max(len(prompt.ids), len(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
    encoded = _kept(items, lengths, records, config)
    if tokenizer.eos_token_id is None:
        return replace(encoded, note=_NO_END)
    return replace(encoded, ends=(int(tokenizer.eos_token_id),))


def encoder_inputs(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[list[int]]:
    """Return the tokens of each record's prompt, as in training: one longer than max_length loses its left."""
    return [prompt.within(config.max_length) for prompt in _encoder_inputs(records, tokenizer, config)]


_NO_END = (
    "This tokenizer has no eos_token, so completions teach no end: the model does not learn to stop, and generates until "
    "max_new_tokens."
)


@dataclass(frozen=True, slots=True)
class _Parts:
    """A text's tokens, between those that the tokenizer puts before and after every text."""

    before: list[int]
    text: list[int]
    after: list[int]

    @property
    def ids(self) -> list[int]:
        """The tokens of the whole row."""
        return [*self.before, *self.text, *self.after]

    def within(self, most: int | None) -> list[int]:
        """Return at most so many tokens: the left of the text is cut. Of very few, the last are left."""
        ids = self.ids
        if most is None or len(ids) <= most:
            return ids
        room = most - len(self.before) - len(self.after)
        return [*self.before, *self.text[-room:], *self.after] if room > 0 else ids[-most:]


def _encoder_inputs(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[_Parts]:
    bare = _Bare(tokenizer)
    prompts = [bare.end(bare.start(_prompt(r, config))) for r in records]
    whole = tokenizer(prompts, verbose=False).input_ids
    _check_none_empty([len(ids) for ids in whole], records, "prompt")
    texts = tokenizer(prompts, add_special_tokens=False, verbose=False).input_ids
    return [_parts(list(ids), list(text)) for ids, text in zip(whole, texts, strict=True)]


def _check_none_empty(lengths: Sequence[int], records: Sequence[Record], what: str) -> None:
    """Raise DataError with every record whose row would have no token: a model computes nothing from that."""
    problems = [f"{r.place}: its {what} has no token" for r, n in zip(records, lengths, strict=True) if not n]
    if problems:
        raise DataError(
            f"{len(problems)} of {len(records)} records cannot be encoded:",
            problems,
            f"This tokenizer adds no token to an empty {what}. Fill it in, or leave these records out.",
        )


# Tokens that a tokenizer puts before a text: one or two
_MOST_BEFORE = 8


def _parts(ids: list[int], text: list[int]) -> _Parts:
    """Split the encoding of a text into the text's tokens and those around them."""
    for at in range(min(len(ids) - len(text), _MOST_BEFORE) + 1):
        if ids[at : at + len(text)] == text:
            return _Parts(ids[:at], text, ids[at + len(text) :])
    return _Parts([], ids, [])


def _decoder_targets(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of each completion and, whatever the tokenizer adds, an end token."""
    bare, end = _Bare(tokenizer), tokenizer.eos_token_id
    completions = [bare.end(bare.start(r.completion or "")) for r in records]
    whole = tokenizer(text_target=completions, verbose=False).input_ids
    texts = tokenizer(text_target=completions, add_special_tokens=False, verbose=False).input_ids
    parts = [_parts(list(ids), list(text)) for ids, text in zip(whole, texts, strict=True)]
    targets = [p.ids if end is None or end in p.after else ended(p.ids, tokenizer) for p in parts]
    _check_none_empty([len(target) for target in targets], records, "completion")
    return targets


class _Bare:
    """Removes from a text the tokens that the tokenizer puts before and after every text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        ids, text = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
        parts = _parts(list(ids), list(text))
        self.first, self.last = (tokenizer.convert_ids_to_tokens(part) for part in (parts.before, parts.after))

    def start(self, text: str) -> str:
        """Return the text without the tokens in front."""
        for mark in self.first:
            text = text.removeprefix(mark)
        return text

    def end(self, text: str) -> str:
        """Return the text without the tokens at the end, and white space after them."""
        bare = text.rstrip()
        for mark in reversed(self.last):
            bare = bare.removesuffix(mark)
        return text if bare == text.rstrip() else bare


def _prompt(record: Record, config: DataConfig) -> str:
    return plain_prompt(record, config.separator)


def _targets(records: Records, config: DataConfig) -> Sequence[int | float]:
    if config.labels is None:
        return quantities(records.items, records.source)
    return class_indices(records.items, config.labels, records.source)


def _kept(items: list[Item], lengths: Sequence[int], records: Records, config: DataConfig) -> Encoded:
    """Return the items, without too long ones where these are to be dropped. Raises DataError where they are an error."""
    long = [i for i, n in enumerate(lengths) if n > config.max_length]
    if long and config.too_long == "error":
        problems = [
            f"{items[i].place}: it has {lengths[i]} tokens, over max_length {config.max_length}. Raise max_length, shorten it, "
            "or set too_long: truncate or drop"
            for i in long
        ]
        raise DataError(f"{records.source}: {len(long)} of {len(records)} records cannot be encoded:", problems)
    dropped = set(long) if config.too_long == "drop" else set()
    numbers = [i for i in range(len(items)) if i not in dropped]
    kept = [items[i] for i in numbers]
    if not kept:
        raise DataError(
            f"{records.source}: all {len(records)} records are longer than max_length ({config.max_length} tokens) "
            "and were dropped. Raise max_length or set too_long: truncate."
        )
    counts = Counts(
        records=len(records), kept=len(kept), truncated=len(long) - len(dropped), dropped=len(dropped),
        tokens=sum(i.length for i in kept), supervised=sum(i.targets for i in kept), longest=max(i.length for i in kept),
    )  # fmt: skip
    return Encoded(kept, counts, numbers)


def collate_items(items: Sequence[Item], pad_id: int, most: int | None = None) -> ItemBatch:
    """Return items as one batch, with an attention mask where they have tokens.

    Lists are padded on the right, ids with `pad_id` and others with 0. Padding alone makes no row longer than `most`. Raises
    DataError without items.
    """
    import torch

    if not items:
        raise DataError("A batch needs at least one record.")
    inputs: dict[str, Tensor] = {}
    for name in items[0].inputs:
        values = [item.inputs[name] for item in items]
        rows = [value for value in values if isinstance(value, list)]
        if rows:
            inputs[name] = _filled(rows, pad_id if name == "input_ids" else 0, most)
        else:
            inputs[name] = torch.stack([torch.as_tensor(v) for v in values])
    if "input_ids" in inputs:
        lengths = torch.tensor([item.length for item in items])
        inputs["attention_mask"] = (torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]).long()
    targets = [item.target for item in items]
    completions = [target for target in targets if isinstance(target, list)]
    if completions:
        target = _filled(completions, IGNORED, most)
    else:
        target = torch.tensor([float("nan") if t is None else t for t in targets])
    return ItemBatch(inputs, target, sum(item.targets for item in items))


def _filled(rows: Sequence[list[int]], value: int, most: int | None) -> Tensor:
    import torch

    longest = max(len(row) for row in rows)
    width = padded(longest)
    out = torch.full((len(rows), width if most is None else max(longest, min(width, most))), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out
