"""The losses of tasks other than the next token: of a class, of a quantity, of the tokens that a decoder is to say. Each
prediction's own, by the model's own logits in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.data.items import IGNORED, Item, ItemBatch, collate_items
from deltaw.model.inputs import most_positions
from deltaw.training.loss import to_device


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
