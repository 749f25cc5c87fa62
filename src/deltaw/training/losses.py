"""Σ −log p(y_t | x, y_<t) over the supervised tokens of a batch, without a [tokens, vocabulary] tensor; and the losses of tasks
other than the next token.

For a causal model the loss is computed from the hidden states before the head, at supervised positions alone. What a model does
after the head (a scale, a soft cap) is tried out once, on a few tokens, against the model's own logits; where nothing known
gives those, they are used themselves: slower, the same value. The losses of a class, of a quantity and of the tokens that a
decoder is to say are those of each prediction, by the model's own logits in fp32.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.data import Batch, Example, collate
from deltaw.data.items import IGNORED, Item, ItemBatch, collate_items
from deltaw.layers.tree import evaluating
from deltaw.model.inputs import most_positions
from deltaw.training import head as heads
from deltaw.training.head import AfterHead

log = logging.getLogger("deltaw")

# What transformers' configs call a factor of the logits (some models divide by it) and their soft cap
_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier", "output_multiplier_scale")
CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logit_softcap", "softcap")
# The tokens of a row that the ways to its logits are tried on
_TRIED = 16


class Loss(Protocol):
    """What training takes down, and evaluation reports: a task's loss for one model."""

    model: nn.Module

    def collate(self, examples: Sequence[Any]) -> Any:
        """A batch, whose `targets` says how many predictions the loss is taken over."""

    def __call__(self, batch: Any) -> tuple[Tensor, int]:
        """(sum of the loss over a batch's predictions as an fp32 scalar, their number)."""

    def each(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss of each prediction, fp32 [n], and the row of the batch that each is of, int64 [n] on the CPU."""


class CompletionLoss:
    """The summed loss of a batch, for one model. The first batch decides how it is computed: `.path` is then "head" or
    "logits"."""

    def __init__(self, model: nn.Module, pad_id: int = 0) -> None:
        self.model = model
        self.pad_id = pad_id
        self.most = most_positions(model)
        self.body, self.head = _split(model)
        self.after = AfterHead()
        self.path = ""

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        """(sum over supervised tokens of −log p as an fp32 scalar, their number). Rows are right-padded."""
        losses, _ = self.each(batch)
        return losses.sum(), losses.numel()

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Right-padded, within the model's positions."""
        return collate(examples, self.pad_id, self.most)

    def each(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """−log p of each supervised token, fp32 [n], and the row of the batch that each is in, int64 [n] on the CPU."""
        rows, positions, targets = _supervised(batch)
        device = next(self.model.parameters()).device
        inputs = {
            "input_ids": to_device(device, batch.input_ids),
            "attention_mask": to_device(device, batch.attention_mask),
        }
        if not self.path:
            self._choose(inputs)
        count = len(positions)
        if self.path == "head":
            filled = (0, -count % heads.MULTIPLE)  # with position 0 and target 0; their losses are dropped
            positions, targets = F.pad(positions, filled), F.pad(targets, filled)
        return self._losses(inputs, to_device(device, positions), to_device(device, targets))[:count], rows

    def _losses(self, inputs: dict[str, Tensor], positions: Tensor, targets: Tensor) -> Tensor:
        if self.path == "logits":
            logits = self.model(**inputs, use_cache=False).logits
            return F.cross_entropy(_at(positions, logits).float(), targets, reduction="none")
        assert self.head is not None
        return heads.cross_entropy(_at(positions, self._hidden(inputs)), self.head, targets, self.after)

    def _hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        assert self.body is not None
        return self.body(**inputs, use_cache=False).last_hidden_state

    @torch.no_grad()
    def _choose(self, inputs: dict[str, Tensor]) -> None:
        """Find what gives the model's own logits on the beginning of a row."""
        self.path = "logits"
        if self.body is None or self.head is None:
            return
        row = {k: v[:1, :_TRIED] for k, v in inputs.items()}
        with evaluating(self.model):
            own = self.model(**row, use_cache=False).logits.float()
            z = self.head(self._hidden(row)).float()
        tolerance = 1e-3 if self.head.weight.dtype in (torch.float32, torch.float64) else 3e-2
        for after in _ways(self.model):
            if own.shape == z.shape and (after(z) - own).abs().max() <= tolerance * own.abs().max():
                self.path, self.after = "head", after
                return
        log.warning(
            "This model does more than is known to its head's logits; the loss is computed from its own (slower)."
        )


def _ways(model: Any) -> Iterator[AfterHead]:
    """What the model may do to its logits, by its config; what sets most comes first, since small logits tell little."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    scales = [v for v in (_number(config, name) for name in _SCALES) if v]
    caps = [v for v in (_number(config, name) for name in CAPS) if v]
    for cap, scale in itertools.product((*caps, None), (*(w for v in scales for w in (v, 1 / v)), 1.0)):
        yield AfterHead(scale, cap)


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) else None


def _at(positions: Tensor, rows: Tensor) -> Tensor:
    return rows.reshape(-1, rows.shape[-1]).index_select(0, positions)


def _supervised(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and flat positions whose next token is supervised, and those tokens. Found on the CPU: a mask would stall a GPU."""
    rows, columns = batch.supervised.nonzero(as_tuple=True)
    return rows, rows * batch.input_ids.shape[1] + columns - 1, batch.input_ids[rows, columns]


def to_device(device: torch.device, tensor: Tensor) -> Tensor:
    """To a GPU from pinned memory: the copy waits for nothing, and nothing waits for it but what reads it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _split(model: Any) -> tuple[nn.Module | None, Any]:
    """(body, head) of a model whose logits come from head(body(x).last_hidden_state)."""
    body = getattr(model, getattr(model, "base_model_prefix", "") or "_", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    sound = isinstance(body, nn.Module) and body is not model and isinstance(getattr(head, "weight", None), Tensor)
    return (body, head) if sound else (None, None)


class ItemLoss:
    """What the losses of items share. `logits` is the model's answer to a batch."""

    def __init__(self, model: nn.Module, pad_id: int = 0) -> None:
        self.model = model
        self.pad_id = pad_id
        self.most = most_positions(model)

    def collate(self, items: Sequence[Item]) -> ItemBatch:
        """Right-padded, within the model's positions."""
        return collate_items(items, self.pad_id, self.most)

    def __call__(self, batch: ItemBatch) -> tuple[Tensor, int]:
        """(sum of the batch's losses as an fp32 scalar, their number)."""
        losses, _ = self.each(batch)
        return losses.sum(), losses.numel()

    def each(self, batch: ItemBatch) -> tuple[Tensor, Tensor]:
        """The loss of each prediction, fp32 [n], and the row that each is of, int64 [n] on the CPU."""
        raise NotImplementedError

    def logits(self, batch: ItemBatch, **more: Any) -> Tensor:
        """The model's, in fp32 or wider."""
        first = next(self.model.parameters())
        inputs = {name: to_device(first.device, t) for name, t in batch.inputs.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(first.dtype)
        out: Tensor = self.model(**inputs, **more).logits
        return out.to(torch.promote_types(out.dtype, torch.float32))


class RecordLoss(ItemLoss):
    """One prediction for each record."""

    def each(self, batch: ItemBatch) -> tuple[Tensor, Tensor]:
        logits = self.logits(batch)
        return self.of(logits, to_device(logits.device, batch.target)), torch.arange(len(batch.target))

    def of(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of each record [n], of the model's logits [n, outputs] and what they should say [n]."""
        raise NotImplementedError


class ClassLoss(RecordLoss):
    """−log p(class | x) for each record."""

    def of(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none")


class SquaredLoss(RecordLoss):
    """(ŷ − y)² for each record."""

    def of(self, logits: Tensor, target: Tensor) -> Tensor:
        return (logits[:, 0] - target).square()


class DecoderLoss(ItemLoss):
    """−log p(y_t | x, y_<t) for each token of the completions, of a model with an encoder for x and a decoder for y."""

    def each(self, batch: ItemBatch) -> tuple[Tensor, Tensor]:
        rows, columns = (batch.target != IGNORED).nonzero(as_tuple=True)
        model: Any = self.model
        target = to_device(next(model.parameters()).device, batch.target)
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            said = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=target)}
        else:
            said = {"labels": target}  # with which every such model shifts its own
        logits = self.logits(batch, **said, use_cache=False)
        at = to_device(logits.device, rows), to_device(logits.device, columns)
        return F.cross_entropy(logits[at], target[at], reduction="none"), rows
