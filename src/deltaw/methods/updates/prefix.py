"""Trained vectors before a model's input, and in their place before each of its blocks. Knows the module that it is on, never
a model.

The prefix is there in a pass that starts a sequence. Later passes, whose earlier positions come from a cache, have it in the
cache. The module's output is of its input's positions alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from deltaw.errors import AdapterError
from deltaw.layers.kinds import why_bypassed
from deltaw.layers.ops.merging import Change
from deltaw.layers.unwrap import plain_class
from deltaw.methods.updates.base import Update, square

_UNMERGEABLE = "a prefix is part of the input, which no weight can hold"


class Prepended(Update):
    """l trained embeddings, `rows` [l, d], that a model's body reads before those of its tokens; positions count from l on.

    Prompt tuning (Lester et al. 2021, arXiv 2104.08691); prefix-embedding tuning of the LoRA paper (§5.1).
    """

    unmergeable = _UNMERGEABLE

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def branch(self, layer: nn.Module, *inputs: object, **named: object) -> object:
        named = arguments(layer, inputs, named)
        ids, embeds = named.pop("input_ids", None), named.pop("inputs_embeds", None)
        embeds = _embedding_of(layer)(ids) if embeds is None else embeds
        assert isinstance(embeds, Tensor)
        self._lengthen(named)
        if started(named.values()):
            return _outputs(layer, embeds, named, 0)
        prefix = self.rows.to(embeds.dtype).expand(embeds.shape[0], -1, -1)
        return _outputs(layer, torch.cat([prefix, embeds], 1), named, len(self.rows))

    def _lengthen(self, named: dict[str, object]) -> None:
        """Lengthen, in place, what goes with the tokens: the mask over all positions so far; positions and types of this pass.

        Raises AdapterError for a mask that is not [batch, tokens].
        """
        length, first = len(self.rows), not started(named.values())
        mask, positions, types = (named.get(n) for n in ("attention_mask", "position_ids", "token_type_ids"))
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise AdapterError(
                    "A prefix needs an attention mask [batch, tokens], or none. A mask in another form (for example of a static "
                    "cache) cannot be made longer."
                )
            named["attention_mask"] = F.pad(mask, (length, 0), value=1)
        if isinstance(positions, Tensor):
            after = positions + length
            before = torch.arange(length, device=after.device).expand(*after.shape[:-1], length)
            named["position_ids"] = torch.cat([before, after], -1) if first else after
        if first and isinstance(types, Tensor):
            named["token_type_ids"] = F.pad(types, (length, 0))

    def changes(self, layer: nn.Module) -> dict[str, Change]:
        return {}

    def misfit(self, layer: nn.Module) -> str | None:
        if why := why_bypassed(layer):
            return why
        embedding = _embedding_of(layer) if hasattr(layer, "get_input_embeddings") else None
        if not isinstance(embedding, nn.Embedding):
            return f"a {plain_class(layer).__name__} has no embedding of tokens that a prefix could stand before"
        d = embedding.weight.shape[1]
        return None if self.rows.shape[1] == d else f"the prefix has {self.rows.shape[1]} dimensions, the embedding {d}"

    def moved(self, layer: nn.Module) -> tuple[float, float]:
        """Measure the prefix against the embedding."""
        embedding = _embedding_of(layer)
        assert isinstance(embedding, nn.Embedding)
        return square(self.rows), square(embedding.weight)


class PrefixOfBlock(Update):
    """`rows` [l, d] in place of the first l positions that a block reads, whatever came out of the block before it.

    Prefix-layer tuning of the LoRA paper (§5.1), after Li and Liang 2021 (arXiv 2101.00190). `index` is the block's number.
    """

    unmergeable = _UNMERGEABLE

    def __init__(self, rows: Tensor, index: int) -> None:
        super().__init__()
        self.rows, self.index = nn.Parameter(rows), index

    def branch(self, layer: nn.Module, *inputs: object, **named: object) -> object:
        input_name = "hidden_states" if "hidden_states" in named else next(iter(named), "")
        h = inputs[0] if inputs else named[input_name]
        assert isinstance(h, Tensor)
        if not started((*inputs, *named.values()), self.index):
            prefix = self.rows.to(h.dtype).expand(h.shape[0], -1, -1)
            h = torch.cat([prefix, h[:, len(self.rows) :]], 1)
        inputs, named = ((h, *inputs[1:]), named) if inputs else ((), named | {input_name: h})
        return plain_class(layer).forward(layer, *inputs, **named)

    def changes(self, layer: nn.Module) -> dict[str, Change]:
        return {}

    def misfit(self, layer: nn.Module) -> str | None:
        return why_bypassed(layer)

    def moved(self, layer: nn.Module) -> tuple[float, float]:
        """Measure the prefix against rows of ones."""
        return square(self.rows), float(self.rows.numel())


def arguments(layer: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object]) -> dict[str, object]:
    """Return a call's inputs by the names that the layer's forward has for them."""
    names = list(inspect.signature(plain_class(layer).forward).parameters)[1:]
    return {**dict(zip(names, inputs, strict=False)), **named}


def started(values: Iterable[object], index: int = 0) -> bool:
    """Return whether one of a call's values is a cache that holds positions of block `index`.

    Versions of transformers give the cache different names.
    """
    return any(isinstance(value, Cache) and value.get_seq_length(index) > 0 for value in values)


def pooled(body: nn.Module, hidden: Tensor) -> Tensor:
    """Compute the output of a body's pooler from its last hidden states [batch, tokens, d]."""
    pooler = body.get_submodule("pooler")
    if activation := getattr(body, "pooler_activation", None):  # ALBERT's pooler is a dense layer alone
        hidden = hidden[:, 0]
    result: Tensor = pooler(hidden)
    return activation(result) if activation else result


def _embedding_of(body: nn.Module) -> nn.Module:
    """The embedding of tokens, as transformers has it of every model and body."""
    embedding: nn.Module = getattr(body, "get_input_embeddings")()  # noqa: B009  (which nn.Module does not have)
    return embedding


def _outputs(body: nn.Module, embeds: Tensor, named: dict[str, object], extra: int) -> object:
    """Compute the body's output from embeddings [batch, tokens, d], without its first `extra` positions."""
    as_tuple = named.pop("return_dict", None) is False
    out = plain_class(body).forward(body, inputs_embeds=embeds, **named)
    out.last_hidden_state = out.last_hidden_state[:, extra:]
    if out.get("hidden_states") is not None:
        out.hidden_states = tuple(h[:, extra:] for h in out.hidden_states)
    if out.get("pooler_output") is not None and extra:  # it was made of the prefix's first position
        out.pooler_output = pooled(body, out.last_hidden_state)
    return out.to_tuple() if as_tuple else out
