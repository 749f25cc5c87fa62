"""Σ −log p(y_t | x, y_<t) over the supervised tokens of a batch, without a [tokens, vocabulary] tensor.

The vocabulary head runs at supervised positions only, a chunk at a time; the loss of a chunk and its gradient with respect
to the hidden states are formed together and the chunk's logits are gone before the next one. Where a model's head is not a
plain frozen linear map of its body's hidden states, its own logits are used instead: slower, the same value.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.data import Batch
from deltaw.layers import slot_of

log = logging.getLogger("deltaw")

# Bounds a chunk's logits to 64 MB of fp32, whatever the vocabulary
_CHUNK_ELEMENTS = 1 << 24
# Supervised positions come in multiples of this: every new shape leaves buffers behind in the CPU's matrix library
_POSITIONS_MULTIPLE = 32
# What transformers models call the things that stand between hidden states and logits
_AFTER_HEAD = (
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "output_multiplier_scale",
    "lm_head_multiplier",
)


class CompletionLoss:
    """The summed loss of a batch, for one model. Chooses its path once; `.path` says which: "chunked" or "logits"."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.body, self.head = _split(model)
        self.path = "chunked" if self.head is not None else "logits"
        self._checked = self.head is None

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        """(sum over supervised tokens of −log p as an fp32 scalar, their number). Rows are right-padded."""
        losses, _ = self.per_token(batch)
        return losses.sum(), losses.numel()

    def per_token(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """−log p of each supervised token, fp32 [n], and the row of the batch that each is in, int64 [n] on the CPU."""
        rows, positions, targets = _supervised(batch)
        device = next(self.model.parameters()).device
        positions, targets = positions.to(device), targets.to(device)
        inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
        if self.head is not None and not self._checked:
            self._check(inputs, positions, targets)
        if self.head is None or self.body is None:
            return self._from_logits(inputs, positions, targets), rows
        return self._from_hidden(inputs, positions, targets), rows

    def _from_hidden(self, inputs: dict[str, Tensor], positions: Tensor, targets: Tensor) -> Tensor:
        assert self.body is not None and self.head is not None
        hidden = self.body(**inputs, use_cache=False).last_hidden_state
        count = len(positions)
        filled = (0, -count % _POSITIONS_MULTIPLE)  # with position 0 and target 0; their losses are dropped
        hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, F.pad(positions, filled))
        return chunked_cross_entropy(hidden, self.head.weight, self.head.bias, F.pad(targets, filled))[:count]

    def _from_logits(self, inputs: dict[str, Tensor], positions: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(**inputs, use_cache=False).logits
        logits = logits.reshape(-1, logits.shape[-1]).index_select(0, positions)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def _check(self, inputs: dict[str, Tensor], positions: Tensor, targets: Tensor) -> None:
        """Once, on the first batch's first row: the fast path must agree with the model's own logits."""
        self._checked = True
        row = {k: v[:1] for k, v in inputs.items()}
        inside = positions < row["input_ids"].shape[1]
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                own = self._from_logits(row, positions[inside], targets[inside])
                fast = self._from_hidden(row, positions[inside], targets[inside])
        finally:
            self.model.train(training)
        tolerance = 1e-3 if next(self.model.parameters()).dtype == torch.float32 else 5e-2
        if not torch.allclose(own, fast, rtol=tolerance, atol=tolerance):
            log.warning(
                "This model's head is not a plain linear map; the loss is computed from its own logits (slower)."
            )
            self.head, self.path = None, "logits"


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """−log softmax(weight·hidden_i + bias)[targets_i] for each i, fp32 [n].

    hidden [n, k], weight [vocabulary, k] and bias [vocabulary] frozen, targets [n] int64. Differentiable in hidden.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        height = max(1, _CHUNK_ELEMENTS // weight.shape[0] // _POSITIONS_MULTIPLE) * _POSITIONS_MULTIPLE
        for start in range(0, hidden.shape[0], height):
            chunk = slice(start, start + height)
            y = targets[chunk, None]
            logits = F.linear(hidden[chunk], weight, bias).float()
            top = logits.amax(1, keepdim=True)
            own = logits.gather(1, y)
            mass = logits.sub_(top).exp_().sum(1, keepdim=True)
            losses[chunk] = (mass.log() + top - own).squeeze(1)
            if dhidden is not None:
                # softmax − one-hot, in the logits' own memory
                logits.div_(mass).scatter_add_(1, y, torch.full_like(mass, -1.0))
                dhidden[chunk] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(dhidden)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (dhidden,) = ctx.saved_tensors
        return (None if dhidden is None else dhidden * grads[0].to(dhidden.dtype)[:, None]), None, None, None


def _supervised(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and flat positions whose next token is supervised, and those tokens. Found on the CPU: a mask would stall a GPU."""
    rows, columns = batch.supervised.nonzero(as_tuple=True)
    return rows, rows * batch.input_ids.shape[1] + columns - 1, batch.input_ids[rows, columns]


def _split(model: Any) -> tuple[nn.Module | None, nn.Linear | None]:
    """(body, head) when logits = head(body(x).last_hidden_state) with a plain, frozen, unadapted head."""
    body = getattr(model, getattr(model, "base_model_prefix", "") or "_", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    plain = (
        isinstance(body, nn.Module)
        and type(head) is nn.Linear
        and slot_of(head) is None
        and not any(p.requires_grad for p in head.parameters())
        and all(getattr(model.config, name, None) in (None, 1, 1.0) for name in _AFTER_HEAD)
    )
    return (body, head) if plain else (None, None)
