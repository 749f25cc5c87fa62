"""Trained vectors before a model's input, and in their place before each of its blocks. Knows the module that it is on, never
a model.

The prefix is there in a pass that starts a sequence; later ones, whose earlier positions come from a cache, have it in
the cache. What the module puts out is of the input's own positions alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

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
    """A model's body sees l trained embeddings, rows [l, d], before those of its tokens: prompt tuning (Lester et al. 2021,
    arXiv 2104.08691), the paper's prefix-embedding tuning (§5.1). Tokens' positions count from l on."""

    unmergeable = _UNMERGEABLE

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def branch(self, layer: Any, *inputs: Any, **named: Any) -> Any:
        named = arguments(layer, inputs, named)
        ids, embeds = named.pop("input_ids", None), named.pop("inputs_embeds", None)
        embeds = layer.get_input_embeddings()(ids) if embeds is None else embeds
        self._lengthen(named)
        if not started(named.values()):
            prefix = self.rows.to(embeds.dtype).expand(embeds.shape[0], -1, -1)
            out = self._outputs(layer, torch.cat([prefix, embeds], 1), named, len(self.rows))
        else:
            out = self._outputs(layer, embeds, named, 0)
        return out

    def _lengthen(self, named: dict[str, Any]) -> None:
        """What goes with the tokens: a mask over all positions so far; of this pass's tokens, positions and types."""
        l, first = len(self.rows), not started(named.values())  # noqa: E741
        mask = named.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise AdapterError(
                    "A prefix needs an attention mask [batch, tokens], or none: a mask in another form (a static cache's, say) "
                    "cannot be made longer."
                )
            named["attention_mask"] = F.pad(mask, (l, 0), value=1)
        if named.get("position_ids") is not None:
            own = named["position_ids"] + l
            before = torch.arange(l, device=own.device).expand(*own.shape[:-1], l)
            named["position_ids"] = torch.cat([before, own], -1) if first else own
        if first and named.get("token_type_ids") is not None:
            named["token_type_ids"] = F.pad(named["token_type_ids"], (l, 0))

    def _outputs(self, layer: Any, embeds: Tensor, named: dict[str, Any], extra: int) -> Any:
        """What the module puts out, without its first `extra` positions."""
        as_tuple = named.pop("return_dict", None) is False
        out = plain_class(layer).forward(layer, inputs_embeds=embeds, **named)
        out.last_hidden_state = out.last_hidden_state[:, extra:]
        if out.get("hidden_states") is not None:
            out.hidden_states = tuple(h[:, extra:] for h in out.hidden_states)
        if out.get("pooler_output") is not None and extra:  # it was made of the prefix's first position
            out.pooler_output = pooled(layer, out.last_hidden_state)
        return out.to_tuple() if as_tuple else out

    def changes(self, layer: Any) -> dict[str, Change]:
        return {}

    def misfit(self, layer: Any) -> str | None:
        if why := why_bypassed(layer):
            return why
        embedding = getattr(layer, "get_input_embeddings", lambda: None)()
        if not isinstance(embedding, nn.Embedding):
            return f"a {plain_class(layer).__name__} has no embedding of tokens that a prefix could stand before"
        d = embedding.weight.shape[1]
        return None if self.rows.shape[1] == d else f"the prefix has {self.rows.shape[1]} dimensions, the embedding {d}"

    def moved(self, layer: Any) -> tuple[float, float]:
        return square(self.rows), square(layer.get_input_embeddings().weight)


class PrefixOfBlock(Update):
    """The first l positions that a block sees are `rows` [l, d], whatever came out of the block before it: prefix-layer tuning
    (paper §5.1, after Li and Liang 2021, arXiv 2101.00190). `index`: the block's number."""

    unmergeable = _UNMERGEABLE

    def __init__(self, rows: Tensor, index: int) -> None:
        super().__init__()
        self.rows, self.index = nn.Parameter(rows), index

    def branch(self, layer: Any, *inputs: Any, **named: Any) -> Any:
        own = "hidden_states" if "hidden_states" in named else next(iter(named), "")
        h = inputs[0] if inputs else named[own]
        if not started((*inputs, *named.values()), self.index):
            prefix = self.rows.to(h.dtype).expand(h.shape[0], -1, -1)
            h = torch.cat([prefix, h[:, len(self.rows) :]], 1)
        inputs, named = ((h, *inputs[1:]), named) if inputs else ((), named | {own: h})
        return plain_class(layer).forward(layer, *inputs, **named)

    def changes(self, layer: Any) -> dict[str, Change]:
        return {}

    def misfit(self, layer: Any) -> str | None:
        return why_bypassed(layer)

    def moved(self, layer: Any) -> tuple[float, float]:
        return square(self.rows), float(self.rows.numel())


def arguments(layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """A call's inputs by their names."""
    names = list(inspect.signature(plain_class(layer).forward).parameters)[1:]
    return dict(zip(names, inputs, strict=False)) | named


def started(values: Iterable[Any], index: int = 0) -> bool:
    """Tell if one of a call's values is a cache that holds positions of block `index`. Versions of transformers give it different
    names."""
    return any(isinstance(value, Cache) and value.get_seq_length(index) > 0 for value in values)


def pooled(layer: Any, hidden: Tensor) -> Tensor:
    """What a body's pooler makes of its last hidden states."""
    if activation := getattr(layer, "pooler_activation", None):  # ALBERT's pooler is a dense layer alone
        return activation(layer.pooler(hidden[:, 0]))
    result: Tensor = layer.pooler(hidden)
    return result
