"""The inputs that a model takes: number of positions, size of images, tokens, and the one that pads the rows of a batch.

Knows a model, its config and tokenizer, and that prefixes take positions; nothing of how these are opened.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from deltaw.config import DataConfig
from deltaw.errors import ConfigError, DataError, FileError
from deltaw.layers.tree import evaluating
from deltaw.layers.unwrap import plain_class
from deltaw.model.record import find_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("deltaw")

# --- positions, images, tokens ------------------------------------------------------------------------------------

# transformers' standard name first, then others that configs give it
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions")


def most_positions(model: nn.Module) -> int | None:
    """Return the most tokens that a row may have, without those of an adapter's prefix; None if the config sets no bound.

    Beyond it learned positions end with an index error, and rotary ones lose their sense.
    """
    config = text_config(model)
    values = (getattr(config, name, None) for name in _POSITIONS)
    most = next((int(n) for n in values if isinstance(n, int) and n > 0), None)
    return most if most is None else most - _taken_by_padding(model, most) - _taken_by_prefix(model)


def windows(model: nn.Module) -> list[int]:
    """Return the sizes, in tokens, of windows and chunks of attention that the model's config has; none where it says that each
    layer's attention is full."""
    config, words = text_config(model), ("window", "chunk", "local", "sliding")
    kinds = getattr(config, "layer_types", None)
    if kinds and not any(word in kind for kind in kinds for word in words):
        return []
    sizes = [v for k, v in vars(config).items() if any(word in k for word in words) and "layers" not in k]
    return [size for size in sizes if isinstance(size, int) and size > 1]


def turns_by_length(model: nn.Module) -> bool:
    """Return whether the model turns a token by an angle that depends on how long the whole input is: "dynamic" and "longrope"
    scaling of its rotary positions."""
    settings = vars(text_config(model)).get("rope_parameters") or {}
    # One scaling, or one for each kind of layer
    scalings = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    return any(s.get("rope_type", s.get("type")) in ("dynamic", "longrope") for s in scalings)


def _taken_by_padding(model: nn.Module, most: int) -> int:
    """Return how many positions no token gets: in RoBERTa and its like those up to the padding's own."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        rows = getattr(module, "num_embeddings", 0)
        if name.endswith("position_embeddings") and padding is not None and rows == most:
            return int(padding) + 1
    return 0


def _taken_by_prefix(model: nn.Module) -> int:
    """Return the positions of the longest prefix that is attached: which adapter a row will go through is not known here."""
    record = find_record(model) if isinstance(model, nn.Module) else None
    return max((a.method.positions for a in record.attached.values()), default=0) if record else 0


def within(data: DataConfig, model: nn.Module, taken: int = 0) -> DataConfig:
    """Return `data` with a max_length that the model has positions for, besides `taken` ones.

    Raises ConfigError if no position is left.
    """
    most = most_positions(model)
    if most is not None and most <= taken:
        raise ConfigError(f"The prefix takes {taken} positions, and the model has {most}: make it shorter.")
    return data if most is None else dataclasses.replace(data, max_length=min(data.max_length, most - taken))


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the rows of the model's embedding of tokens; None if it has no such table."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        embedding: object = find() if callable(find) else None
    except NotImplementedError:  # raised by transformers for a model without one
        return None
    return getattr(embedding, "num_embeddings", None)


def image_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a vision model takes."""
    size = model.config.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return getattr(model.config, "num_channels", 3), height, width


# Roles of tokens that stand for pictures and sounds: Gemma's tokenizer has one that its text models have no row for
_OF_OTHER_INPUTS = ("image", "boi", "eoi", "audio", "boa", "eoa", "video")


def tokens_beyond(tokenizer: object, rows: int) -> dict[str, int]:
    """Return the tokens of texts, with their ids in order, that an embedding of so many rows has no row for.

    Empty for a model without such a table (0 rows), and for an image processor.
    """
    if not rows or not hasattr(tokenizer, "get_vocab"):
        return {}
    roles = getattr(tokenizer, "special_tokens_map", {})
    of_others = {token for role, token in roles.items() if role.startswith(_OF_OTHER_INPUTS) and isinstance(token, str)}
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows and token not in of_others)
    return {token: i for i, token in beyond}


# --- padding and end tokens of classifiers ------------------------------------------------------------------------


def row_padding(model: PreTrainedModel, pad: int) -> int:
    """Return the token that pads the rows of a classifier.

    A decoder's head skips config.pad_token_id to find a text's last token; for other models it is `pad`, the tokenizer's.
    """
    skipped = getattr(text_config(model), "pad_token_id", None) if _skips_padding(model) else None
    return pad if skipped is None else int(skipped)


def settle_padding(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pad: int,
    source: str,
    *,
    scored: bool,
    ours: bool = True,
) -> None:
    """Let a model's config name the token that pads rows, `pad`.

    A decoder's head scores a text at its last token that is not `config.pad_token_id`, which must therefore be the tokenizer's.
    The config of a user's model (not `ours`) is changed only if it names none. Raises FileError for a classifier (`scored`)
    whose scores depend on padding all the same.
    """
    configs = model.config, model.config.get_text_config()
    before = getattr(configs[1], "pad_token_id", None)
    if before is None or (ours and before != pad and _skips_padding(model)):
        for config in configs:
            config.pad_token_id = pad
    elif before != pad and _skips_padding(model):
        log.warning(
            "The config of %s has pad_token_id %d, its tokenizer pads with %d: plain transformers would score rows padded by it "
            "at the wrong token. Set model.config.pad_token_id = %d.", source, before, pad, pad,
        )  # fmt: skip
    if scored:
        _check_padding(model, tokenizer, pad, source)


def check_ends(model: PreTrainedModel, rows: Sequence[Sequence[int]], places: Sequence[str]) -> None:
    """Raise DataError with every text whose number of end tokens is not that of most.

    T5's and BART's classifiers score a text at its last end token, and count these in all rows of a batch. `rows` are the texts'
    token ids, `places` their names for messages.
    """
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


def hidden_size_of(config: PreTrainedConfig | None) -> int | None:
    """Return the hidden size that a model's config says, of its text part where it has several; None where it says none."""
    if not isinstance(config, PreTrainedConfig):
        return None
    width = getattr(config.get_text_config(), "hidden_size", None)
    return width if isinstance(width, int) and width > 0 else None


def text_config(model: nn.Module) -> object:
    """Return the transformers config of a model's language part; another config as it is, None of a model without one."""
    config: object = getattr(model, "config", None)
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else config


def _skips_padding(model: nn.Module) -> bool:
    """Return whether the model's forward looks for the token that pads, as decoders with a head for classes do."""
    return "pad_token_id" in _names_in_forward(model)


def _scores_at_end(model: nn.Module) -> bool:
    """Return whether the model's forward looks for end tokens, as an encoder-decoder with a head for classes does."""
    return "eos_token_id" in _names_in_forward(model)


def _names_in_forward(model: nn.Module) -> tuple[str, ...]:
    """Return the names that the code of the model's own forward uses; none where it is no Python code."""
    code = getattr(inspect.unwrap(plain_class(model).forward), "__code__", None)
    return () if code is None else code.co_names


def _check_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pad: int, source: str) -> None:
    """Raise FileError for a classifier that cannot score a text, or whose scores of it change once it is padded."""
    pooled, hidden = (getattr(model.config, name, None) for name in ("pooler_hidden_size", "hidden_size"))
    has_pooler = any("pooler" in name.split(".") for name, _ in model.named_modules())
    if pooled is not None and pooled != hidden and has_pooler:
        raise FileError(
            f"{source} cannot score a text: its config has pooler_hidden_size {pooled} and hidden_size {hidden}, and its "
            f"{type(model).__name__} gives a pooler of the one size rows of the other. Make both the same in config.json."
        )
    try:
        depends = not _takes_mask(model) or _takes_last_place(model) or _changes_with_padding(model, tokenizer, pad)
    except (RuntimeError, ValueError, IndexError) as error:  # raised by the model's forward
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


def _takes_mask(model: nn.Module) -> bool:
    parameters = inspect.signature(plain_class(model).forward).parameters
    return "attention_mask" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _takes_last_place(model: nn.Module) -> bool:
    """Return whether a summary takes a row's last place, by the name that transformers gives it in XLNet."""
    return any(getattr(module, "summary_type", None) == "last" for module in model.modules())


@torch.no_grad()
def _changes_with_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pad: int) -> bool:
    """Return whether padding changes the scores of one text. In half precision rounding may do as much: False there."""
    ids = torch.tensor([tokenizer("A text.").input_ids])
    more = max(0, min(4, (most_positions(model) or 1 << 30) - ids.shape[1]))
    padded_ids = F.pad(ids, (0, more), value=row_padding(model, pad))
    mask = F.pad(torch.ones_like(ids), (0, more))
    with evaluating(model):
        alone = model(input_ids=ids.to(model.device)).logits.float()
        padded = model(input_ids=padded_ids.to(model.device), attention_mask=mask.to(model.device)).logits.float()
    is_precise = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return is_precise and bool((alone - padded).abs().max() > 0.1 * alone.abs().max())
