"""Hold what the rows of several benchmarks share: the floor, and the loop of PEFT's examples, for any model with a loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from deltaw.data import Batch
from race import Clock


@dataclass(frozen=True)
class Step:
    """What a model gets for one step, and what is counted of it."""

    inputs: dict[str, Any]
    """With labels: the model computes its own loss."""
    tokens: int
    supervised: int


def completion(batch: Batch, device: torch.device) -> Step:
    """The labels of a causal language model are −100 where the loss is not taken."""
    labels = batch.input_ids.masked_fill(~batch.supervised, -100)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
    there = {name: value.to(device) for name, value in inputs.items()}
    return Step(there, int(batch.attention_mask.sum()), int(batch.supervised.sum()))


def floor(model: Any) -> Any:
    """The model frozen, its embeddings' output as if something trained below: a backward pass then forms the activations'
    gradients and nothing else."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def plain_loop(clock: Clock, model: Any, steps: Iterable[Step], lr: float) -> None:
    """Forward, backward and AdamW over whatever of the model is trainable; a model with nothing trainable is a floor."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr) if trainable else None
    model.train()
    clock.start()
    for step in steps:
        loss = model(**step.inputs).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        clock.step(step.tokens, step.supervised, loss.detach())
