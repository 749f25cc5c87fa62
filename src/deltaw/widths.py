"""How many candidates share one pass over their base. Knows what was prepared, memory, and routes."""

from __future__ import annotations

import dataclasses

import torch

from deltaw import available_memory
from deltaw.errors import AdapterError
from deltaw.expected_memory import expected
from deltaw.layers.tree import evaluating
from deltaw.model import attach
from deltaw.model.switch import route
from deltaw.training.prepare import Prepared
from deltaw.training.tasks import task_of

# Of the free memory; the rest is for what is not foreseen
_USED = 0.8


def width_of(asked: int | None, largest: Prepared) -> tuple[int, str]:
    """How many, and why. `asked`: how many were asked for; `largest`: the candidate with the most parameters. Raises AdapterError
    where several were asked for and this model's rows cannot have adapters of their own."""
    first = next(largest.loaded.model.parameters())
    if first.dtype == torch.float16:
        return 1, "in float16 each has a loss scale of its own"
    if asked is not None:
        if asked > 1 and (why := _why_apart(largest)):
            raise AdapterError(f"{asked} candidates cannot share a pass over this model; leave --abreast out. {why}")
        return asked, "as asked for"
    if first.device.type == "cpu":
        return 1, "a CPU is bound by arithmetic"
    if largest.config.gradient_checkpointing:
        return 1, "a GPU's checkpointing sees one adapter at a time"
    if why := _why_apart(largest):
        return 1, why.split(": ")[0]
    found, room = expected(largest), available_memory.free(first.device)
    if found is None or room is None:
        return 1, "the memory of a pass cannot be told beforehand"
    each = found.memory
    own = each.adapter + each.gradients + each.optimizer + each.activations + each.working
    return max(1, int(room * _USED) // own), "as many as the memory holds"


def _why_apart(prepared: Prepared) -> str | None:
    """Why the rows of a batch cannot have adapters of their own on this model, by a pass of two rows; None where they can."""
    model, config = prepared.loaded.model, prepared.config
    device, names = next(model.parameters()).device, ["0", "1"]
    method = dataclasses.replace(prepared.method, rank=1, alpha=None, init="gaussian")
    loss, examples = task_of(config.data).loss(prepared.loaded), prepared.encoded.examples
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad(), evaluating(model):
        loss(loss.collate(examples[:1]))  # its first call, which tries the ways to the loss
        try:
            for name in names:
                attach.attach(model, method, name=name)
            with route(model, names):
                loss.each(loss.collate([examples[0], examples[-1]]))
        except AdapterError as error:
            return str(error)
        finally:
            attach.detach(model)
    return None
