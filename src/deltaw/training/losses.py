"""Losses: Σ −log p(y_t | x, y_<t) over the supervised tokens of a batch, without a [tokens, vocabulary] tensor; and those of
classes, quantities and decoders.

A causal model's loss is computed from the hidden states before the head, at supervised positions alone. A model may scale or cap
the logits after its head: known ways are tried once, on a few tokens, against the model's logits. Where none of them gives these,
the loss is computed from the model's logits: slower, the same value. All other losses are computed from logits in fp32.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.data import Batch, Example, collate
from deltaw.data.groups import groups_of
from deltaw.data.items import IGNORED, Item, ItemBatch, collate_items
from deltaw.data.trees import Tree, tree_of
from deltaw.errors import DeltaWError, first_line
from deltaw.layers.tree import evaluating, is_finite
from deltaw.model.inputs import most_positions, text_config, windows
from deltaw.training import head as heads
from deltaw.training.attention import NoTree, mask_of, takes_trees, training_attention, without_trees
from deltaw.training.head import AfterHead, Head

log = logging.getLogger("deltaw")

# Names in transformers' configs of a factor of the logits (some models divide by it) and of their soft cap
_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier", "output_multiplier_scale")
CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logit_softcap", "softcap")
# The relative difference of a token's states that is rounding, of float32 and of half precision
_ROUNDING, _COARSE = 1e-4, 5e-2
# The tokens of a row that the ways to its logits are tried on
_TRIED = 16


class Loss(Protocol):
    """A task's loss for one model: training minimises it, evaluation reports it.

    Each loss has its own examples and batches, hence `Any`; its callers only pass them on.
    """

    model: nn.Module

    def collate(self, examples: Sequence[Any]) -> Any:
        """Return a batch, whose `targets` says how many predictions the loss is taken over."""

    def __call__(self, batch: Any) -> tuple[Tensor, int]:
        """Return (sum of the loss over a batch's predictions as an fp32 scalar, their number)."""

    def each(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of each prediction, fp32 [n], and its row in the batch, int64 [n] on the CPU."""

    def judged(self, batch: Any) -> tuple[Tensor, int, Tensor | None]:
        """Return what the call does, and how many predictions are right, as a scalar; None where none is right or wrong."""

    def shared(self, batch: Any) -> int:
        """Return how many of a batch's tokens are not computed, as another of its records has them too."""

    def order(self, examples: Sequence[Any]) -> list[int]:
        """Return the indices of examples in the order that costs least to score them in."""


def attention_for(loss: Loss, examples: Sequence[Any], *, trees: bool = True) -> AbstractContextManager[None]:
    """Open `training_attention` for these examples; `trees` only where the loss computes them."""
    longest = max(example.length for example in examples)
    return training_attention(loss.model, longest, trees=trees and isinstance(loss, CompletionLoss))


def by_length(examples: Sequence[Any]) -> list[int]:
    """Return the indices of examples, shorter ones first."""
    return sorted(range(len(examples)), key=lambda i: examples[i].length)


class CompletionLoss:
    """The summed −log p of a batch's supervised tokens, for one causal model.

    The first batch decides how it is computed: `.path` is then "head" or "logits".
    """

    def __init__(self, model: nn.Module, pad_id: int = 0) -> None:
        self.model = model
        self.pad_id = pad_id
        self.most = most_positions(model)
        self.body: nn.Module | None
        self.head: Head | None
        self.body, self.head = _split(model)
        self.after = AfterHead()
        self.path = ""
        self.trees: bool | None = None
        """True if the model computes of a tree what it computes of rows; None until it was tried."""
        self._tried = 0  # the tokens of the longest row that it was tried on

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        """Return (sum over supervised tokens of −log p as an fp32 scalar, their number). Rows are right-padded."""
        losses, _ = self.each(batch)
        return losses.sum(), losses.numel()

    def judged(self, batch: Batch) -> tuple[Tensor, int, None]:
        """Return what the call does: no token of a text is right or wrong."""
        return *self(batch), None

    def shared(self, batch: Batch) -> int:
        """Return how many of a batch's tokens are not computed, as another of its records has them too."""
        return batch.shared if self.trees else 0

    def order(self, examples: Sequence[Example]) -> list[int]:
        """Return the indices of examples, shorter ones first; where the model takes trees now, those that begin alike meet."""
        if self.trees is False or not takes_trees(self.model):
            return by_length(examples)
        groups = groups_of([example.input_ids for example in examples])
        return [i for group in sorted(groups, key=lambda group: max(examples[i].length for i in group)) for i in group]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return a batch, padded on the right within the model's positions; with its tree, where the model takes trees now."""
        batch = collate(examples, self.pad_id, self.most)
        if self.trees is False or not takes_trees(self.model):
            return batch
        return replace(batch, tree=tree_of(examples, self.pad_id, batch.input_ids.numel()))

    def each(self, batch: Batch, times: int = 1) -> tuple[Tensor, Tensor]:
        """Return −log p of each supervised token, fp32 [n], and its row in the batch, int64 [n] on the CPU.

        times: how often the model gets the batch, one time after the other in one pass; row i of time j is j · rows + i. Of a
        tree the pass has `times` rows.
        """
        self.decide(batch)
        tree = batch.tree if self.trees else None
        rows, positions, targets = _supervised(batch, tree)
        inputs = self._inputs(batch) if tree is None else self._inputs_of(tree)
        device = inputs["input_ids"].device
        if times > 1:
            inputs = {name: t if t.ndim == 4 else t.repeat(times, 1) for name, t in inputs.items()}
            size = (batch.input_ids if tree is None else tree.input_ids).numel()
            rows, positions = (_again(t, times, n) for t, n in ((rows, len(batch.input_ids)), (positions, size)))
            targets = targets.repeat(times)
        count = len(positions)
        if self.path == "head":
            padding = (0, -count % heads.MULTIPLE)  # with position 0 and target 0; their losses are dropped
            positions, targets = F.pad(positions, padding), F.pad(targets, padding)
        return self._losses(inputs, to_device(device, positions), to_device(device, targets))[:count], rows

    def decide(self, batch: Batch) -> None:
        """Decide by the first batch how the loss is computed, and by the first tree whether trees are taken."""
        if not self.path:
            self._choose(self._inputs(batch))
        if batch.tree is not None and self._is_new(batch.tree):
            reason = self.why_no_tree(batch)
            self.trees, self._tried = not reason, batch.tree.places.shape[1]
            if reason:
                log.warning("What records have in common is computed for each of them: of a tree, %s.", reason)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        return {
            "input_ids": to_device(device, batch.input_ids),
            "attention_mask": to_device(device, batch.attention_mask),
        }

    def _inputs_of(self, tree: Tree) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        return {
            "input_ids": to_device(device, tree.input_ids),
            "position_ids": to_device(device, tree.position_ids),
            "attention_mask": mask_of(tree, device),
        }

    def _is_new(self, tree: Tree) -> bool:
        """Return whether nothing like this was tried: no tree, or none whose rows are beyond the same windows of attention."""
        longest = tree.places.shape[1]
        if self.trees is None:
            return True
        return (
            self.trees and longest > self._tried and any(self._tried <= size < longest for size in windows(self.model))
        )

    @torch.no_grad()
    def why_no_tree(self, batch: Batch) -> str:
        """Return how what the model computes of a batch's tree differs from what it computes of the rows: not all models see the
        same. Return nothing where it does not."""
        assert batch.tree is not None
        _, plain, _ = _supervised(batch, None)
        _, shared, _ = _supervised(batch, batch.tree)
        with evaluating(self.model):
            with without_trees(self.model):
                wanted = self._states(self._inputs(batch), plain)
            try:
                return _differs(wanted, self._states(self._inputs_of(batch.tree), shared))
            except (DeltaWError, NoTree, RuntimeError, TypeError, ValueError, IndexError) as error:
                return first_line(error)

    def _states(self, inputs: dict[str, Tensor], positions: Tensor) -> Tensor:
        """Return the hidden states, or where the loss takes these the logits, at positions."""
        rows = self.model(**inputs, use_cache=False).logits if self.path == "logits" else self._hidden(inputs)
        return _at(to_device(rows.device, positions), rows)

    def _losses(self, inputs: dict[str, Tensor], positions: Tensor, targets: Tensor) -> Tensor:
        if self.path == "logits":
            logits = self.model(**inputs, use_cache=False).logits
            return F.cross_entropy(_at(positions, logits).float(), targets, reduction="none")
        assert self.head is not None
        return heads.cross_entropy(_at(positions, self._hidden(inputs)), self.head, targets, self.after)

    def _hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        assert self.body is not None
        hidden: Tensor = self.body(**inputs, use_cache=False).last_hidden_state
        return hidden

    @torch.no_grad()
    def _choose(self, inputs: dict[str, Tensor]) -> None:
        """Choose the way that gives the model's logits on the beginning of a row."""
        self.path = "logits"
        if self.body is None or self.head is None:
            return
        row = {k: v[:1, :_TRIED] for k, v in inputs.items()}
        with evaluating(self.model):
            logits = self.model(**row, use_cache=False).logits.float()
            z = self.head(self._hidden(row)).float()
        tolerance = 1e-3 if self.head.weight.dtype in (torch.float32, torch.float64) else 3e-2
        for after in _ways(self.model):
            if logits.shape == z.shape and (after(z) - logits).abs().max() <= tolerance * logits.abs().max():
                self.path, self.after = "head", after
                return
        if not is_finite(logits):  # of which nothing can be told
            return
        log.warning(
            "This model changes its head's logits in a way that is not known: the loss is computed from its own logits (slower)."
        )


def _ways(model: nn.Module) -> Iterator[AfterHead]:
    """Yield what the model may do to its logits, by its config. Ways with most settings come first: small logits tell little."""
    config = text_config(model)
    scales = [v for v in (_number(config, name) for name in _SCALES) if v]
    caps = [v for v in (_number(config, name) for name in CAPS) if v]
    for cap, scale in itertools.product((*caps, None), (*(w for v in scales for w in (v, 1 / v)), 1.0)):
        yield AfterHead(scale, cap)


def _number(config: object, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) else None


def _again(places: Tensor, times: int, size: int) -> Tensor:
    """Return places in a row of `size` as those in `times` such rows, one after the other."""
    return (places + size * torch.arange(times)[:, None]).flatten()


def _at(positions: Tensor, rows: Tensor) -> Tensor:
    return rows.reshape(-1, rows.shape[-1]).index_select(0, positions)


def _differs(wanted: Tensor, states: Tensor) -> str:
    """Return how states [n, k] differ from those wanted; nothing where they do so by rounding alone."""
    is_precise = wanted.dtype in (torch.float32, torch.float64)
    wanted, states = wanted.double(), states.double()
    off = ((states - wanted).norm(dim=1) / wanted.norm(dim=1)).max()
    return "" if off <= (_ROUNDING if is_precise else _COARSE) else f"the model's states differ by {off:.2g}"


def _supervised(batch: Batch, tree: Tree | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows and flat positions whose next token is supervised, and these tokens, int64 [n] each.

    They are computed on the CPU: a mask would make a GPU wait.
    """
    rows, columns = batch.supervised.nonzero(as_tuple=True)
    places = rows * batch.input_ids.shape[1] + columns - 1 if tree is None else tree.places[rows, columns - 1]
    return rows, places, batch.input_ids[rows, columns]


def to_device(device: torch.device, tensor: Tensor) -> Tensor:
    """Return the tensor on a device. To a GPU it is copied from pinned memory, which waits for nothing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _split(model: nn.Module) -> tuple[nn.Module, Head] | tuple[None, None]:
    """Return (body, head) of a model whose logits are head(body(x).last_hidden_state); Nones for any other."""
    body = getattr(model, getattr(model, "base_model_prefix", "") or "_", None)
    output = getattr(model, "get_output_embeddings", None)
    head = None if output is None else output()
    if isinstance(body, nn.Module) and body is not model and isinstance(getattr(head, "weight", None), Tensor):
        return body, cast(Head, head)
    return None, None


class ItemLoss(ABC):
    """Base of the losses of items."""

    def __init__(self, model: nn.Module, pad_id: int = 0) -> None:
        self.model = model
        self.pad_id = pad_id
        self.most = most_positions(model)

    def collate(self, items: Sequence[Item]) -> ItemBatch:
        """Return a batch, padded on the right within the model's positions."""
        return collate_items(items, self.pad_id, self.most)

    def __call__(self, batch: ItemBatch) -> tuple[Tensor, int]:
        """Return (sum of the batch's losses as an fp32 scalar, their number)."""
        losses, _ = self.each(batch)
        return losses.sum(), losses.numel()

    def judged(self, batch: ItemBatch) -> tuple[Tensor, int, Tensor | None]:
        """Return what the call does, and how many predictions are right, as a scalar; None where none is right or wrong."""
        return *self(batch), None

    def shared(self, batch: ItemBatch) -> int:
        """Return 0: every item is computed."""
        return 0

    def order(self, items: Sequence[Item]) -> list[int]:
        """Return the indices of items, shorter ones first."""
        return by_length(items)

    @abstractmethod
    def each(self, batch: ItemBatch) -> tuple[Tensor, Tensor]:
        """Return the loss of each prediction, fp32 [n], and its row in the batch, int64 [n] on the CPU."""

    def logits(self, batch: ItemBatch, **more: object) -> Tensor:
        """Return the model's logits of a batch, in fp32 or wider; `more` goes to the model."""
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

    @abstractmethod
    def of(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each record [n] from the model's logits [n, outputs] and its target [n]."""


class ClassLoss(RecordLoss):
    """−log p(class | x) for each record."""

    def judged(self, batch: ItemBatch) -> tuple[Tensor, int, Tensor]:
        """Return (sum of the losses, their number, how many records' likeliest class is theirs)."""
        logits = self.logits(batch)
        target = to_device(logits.device, batch.target)
        losses = self.of(logits, target)
        return losses.sum(), losses.numel(), (logits.argmax(-1) == target).sum()

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
        shifted = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        target = to_device(next(self.model.parameters()).device, batch.target)
        if shifted is not None:
            answer = {"decoder_input_ids": shifted(labels=target)}
        else:
            answer = {"labels": target}  # every such model shifts them itself
        logits = self.logits(batch, **answer, use_cache=False)
        at = to_device(logits.device, rows), to_device(logits.device, columns)
        return F.cross_entropy(logits[at], target[at], reduction="none"), rows
