"""What a model takes: how many positions, images of which size, and which token fills the rows of a batch.

Knows a model, its config and tokenizer, and that prefixes take positions; nothing of how they are opened.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deltaw.config import DataConfig
from deltaw.errors import ConfigError, DataError, FileError
from deltaw.layers.tree import evaluating
from deltaw.layers.unwrap import plain_class
from deltaw.model.record import find_record

# Beside transformers' standard name, the names that configs give it
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions")


def most_positions(model: Any) -> int | None:
    """The most tokens that a row may have; None where the model's config sets no bound. An adapter's prefix takes some of them.

    Learned positions end there, with an index error; rotary ones lose their sense.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = (getattr(config, name, None) for name in _NAMES)
    most = next((int(n) for n in found if isinstance(n, int) and n > 0), None)
    return most if most is None else most - _taken_by_padding(model, most) - _taken_by_prefix(model)


def _taken_by_padding(model: Any, most: int) -> int:
    """Positions that RoBERTa and its like never give a token: those up to the padding's own."""
    for name, module in model.named_modules():
        own = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and own is not None and getattr(module, "num_embeddings", 0) == most:
            return int(own) + 1
    return 0


def _taken_by_prefix(model: Any) -> int:
    """By the longest one that is attached: which adapter a row will go through is not known here."""
    record = find_record(model) if isinstance(model, nn.Module) else None
    return max((a.method.positions for a in record.attached.values()), default=0) if record else 0


def within(data: DataConfig, model: Any, taken: int = 0) -> DataConfig:
    """`data` with a max_length that the model has positions for, besides `taken` ones. Raises ConfigError where these are all."""
    most = most_positions(model)
    if most is not None and most <= taken:
        raise ConfigError(f"The prefix takes {taken} positions, and the model has {most}: make it shorter.")
    return data if most is None else dataclasses.replace(data, max_length=min(data.max_length, most - taken))


def vocabulary_size(model: Any) -> int | None:
    """Rows of the model's embedding of tokens; None where it has no such table."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # transformers' way to say that there is none
        return None
    return getattr(embedding, "num_embeddings", None)


def image_shape(model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a vision model takes."""
    size = model.config.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return getattr(model.config, "num_channels", 3), height, width


log = logging.getLogger("deltaw")


def row_padding(model: Any, pad: int) -> int:
    """The token that rows of a classifier are filled with: the one that its head skips to find a text's last token, and else
    `pad`, the tokenizer's."""
    own = _text_config(model).pad_token_id if _ends_by_padding(model) else None
    return pad if own is None else int(own)


def settle_padding(model: Any, tokenizer: Any, pad: int, source: str, *, scored: bool, own: bool = True) -> None:
    """See to it that a model knows which token fills rows, `pad`. A decoder's head takes a text's last token that is not
    `config.pad_token_id`, so that has to be the tokenizer's. The config of a model that is not our `own` is changed only where it
    names none. Raises FileError for a classifier (`scored`) whose scores depend on padding all the same."""
    configs = model.config, _text_config(model)
    before = getattr(configs[1], "pad_token_id", None)
    if before is None or (own and before != pad and _ends_by_padding(model)):
        for config in configs:
            config.pad_token_id = pad
    elif before != pad and _ends_by_padding(model):
        log.warning(
            "The config of %s has pad_token_id %d, its tokenizer pads with %d: plain transformers would score rows padded by it "
            "at the wrong token. Set model.config.pad_token_id = %d.", source, before, pad, pad,
        )  # fmt: skip
    if scored:
        _check_padding(model, tokenizer, pad, source)


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _ends_by_padding(model: Any) -> bool:
    """Whether the model's own forward looks for the token that pads: a decoder with a head for classes."""
    code = getattr(inspect.unwrap(plain_class(model).forward), "__code__", None)
    return code is not None and "pad_token_id" in code.co_names


def check_ends(model: Any, rows: Sequence[Sequence[int]], places: Sequence[str]) -> None:
    """Raise DataError with every text, of those that are scored together, that has another number of end tokens than the most
    have. T5's and BART's classifiers score a text at its last end token, and count these in all rows of a batch."""
    end = model.config.eos_token_id if _scores_at_end(model) else None
    if not isinstance(end, int):
        return
    counts = [list(row).count(end) for row in rows]
    usual = max(dict.fromkeys(counts), key=counts.count, default=1)
    problems = [
        f"{place}: {n} end tokens instead of {usual}"
        for place, n in zip(places, counts, strict=True)
        if n != usual or not n
    ]
    if problems:
        raise DataError(
            f"{len(problems)} of {len(rows)} texts cannot be scored by a {type(model).__name__}:",
            problems,
            "It takes a text's score at its end token, of which all texts must have as many: take out those in texts.",
        )


def _scores_at_end(model: Any) -> bool:
    """Whether the model's own forward looks for end tokens: an encoder-decoder's with a head for classes."""
    code = getattr(inspect.unwrap(plain_class(model).forward), "__code__", None)
    return code is not None and "eos_token_id" in code.co_names


def _check_padding(model: Any, tokenizer: Any, pad: int, source: str) -> None:
    """Raise FileError for a classifier whose scores of a text change once it is padded, or that cannot score one."""
    pooled, hidden = (getattr(model.config, name, None) for name in ("pooler_hidden_size", "hidden_size"))
    if (
        pooled != hidden
        and any("pooler" in name.split(".") for name, _ in model.named_modules())
        and pooled is not None
    ):
        raise FileError(
            f"{source} cannot score a text: its config has pooler_hidden_size {pooled} and hidden_size {hidden}, and its "
            f"{type(model).__name__} gives a pooler of the one size rows of the other. Make both the same in config.json."
        )
    try:
        depends = not _masks(model) or _takes_last_place(model) or _changes_with_padding(model, tokenizer, pad)
    except (RuntimeError, ValueError, IndexError) as error:  # the model's own
        raise FileError(
            f"{source} cannot score a text: its {type(model).__name__} raises {type(error).__name__}: {error}\n"
            "Do its tokenizer and its config fit the model?"
        ) from error
    if _scores_at_end(model) and pad == model.config.eos_token_id:
        raise FileError(
            f"{source} cannot score padded texts: its {type(model).__name__} takes a text's score at its last end token, and its "
            f"tokenizer pads with that token ({pad}). Give the tokenizer a pad_token of its own."
        )
    if depends:
        raise FileError(
            f"The scores of {source} depend on padding: its {type(model).__name__} knows no mask, or takes them from a row's "
            "last place, padding or not. Rows of several texts would be scored wrongly."
        )


def _masks(model: Any) -> bool:
    parameters = inspect.signature(plain_class(model).forward).parameters
    return "attention_mask" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _takes_last_place(model: Any) -> bool:
    """By the name that transformers gives it: XLNet's summary does."""
    return any(getattr(module, "summary_type", None) == "last" for module in model.modules())


@torch.no_grad()
def _changes_with_padding(model: Any, tokenizer: Any, pad: int) -> bool:
    """By one text, alone and padded. In half precision rounding can be that much of small scores, so nothing is told there."""
    ids = torch.tensor([tokenizer("A text.").input_ids])
    more = max(0, min(4, (most_positions(model) or 1 << 30) - ids.shape[1]))
    filled = F.pad(ids, (0, more), value=row_padding(model, pad))
    mask = F.pad(torch.ones_like(ids), (0, more))
    with evaluating(model):
        alone = model(input_ids=ids.to(model.device)).logits.float()
        padded = model(input_ids=filled.to(model.device), attention_mask=mask.to(model.device)).logits.float()
    told = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return told and bool((alone - padded).abs().max() > 0.1 * alone.abs().max())


# Roles of tokens in whose place pictures and sounds go: Gemma's tokenizer has one that its text models have no row for
_OF_OTHER_INPUTS = ("image", "boi", "eoi", "audio", "boa", "eoa", "video")


def tokens_beyond(tokenizer: Any, rows: int) -> dict[str, int]:
    """Token → id, by their ids, of those that texts may have and an embedding of so many rows has no row for. Empty where a
    model has no such table (0 rows), and for an image processor."""
    if not rows or not hasattr(tokenizer, "get_vocab"):
        return {}
    roles = getattr(tokenizer, "special_tokens_map", {})
    filled_in = {token for role, token in roles.items() if role.startswith(_OF_OTHER_INPUTS) and isinstance(token, str)}
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows and token not in filled_in)
    return {token: i for i, token in beyond}
