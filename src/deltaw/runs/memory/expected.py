"""The peak memory of a run that is about to start, by part, and whether the machine has as much. Knows what was prepared."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from deltaw.config import TrainConfig
from deltaw.data import Example
from deltaw.data.batches import padded
from deltaw.errors import DeltaWError
from deltaw.files import units
from deltaw.layers.processes.ranks import ALONE, Ranks
from deltaw.layers.processes.shards import bytes_here, is_dealt
from deltaw.layers.unwrap import plain_class
from deltaw.methods.plan import Method
from deltaw.model.summary import summary
from deltaw.runs.memory import machine
from deltaw.runs.memory.parts import NEEDS_VALUES, Memory, Taken, memory_of
from deltaw.runs.memory.step import Record, Step, choose_path, step
from deltaw.training.loop import LoopPlan
from deltaw.training.losses import CompletionLoss, Loss, attention_for
from deltaw.training.prepare import Prepared
from deltaw.training.tasks import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("deltaw")

_STEPS = 100
"""Steps whose batches are looked at, the run's first."""
_COMMON = 32
"""Tokens that the records of a small tree begin with alike."""
_taken: dict[tuple[object, ...], Step] = {}
"""Steps that were run on the meta device, by what decides them."""


@dataclass(frozen=True)
class Expected:
    """The peak of a run that is about to start, its model and adapter in memory."""

    memory: Memory
    missing: int | None
    """Bytes that the run will need beyond the free ones; None where it fits, or where that cannot be known."""

    def figures(self) -> dict[str, int]:
        """Return the bytes of each part, and their total."""
        return {part: n for part, n in dataclasses.asdict(self.memory).items() if part != "estimated"} | {
            "total": self.memory.total
        }

    def warning(self) -> str:
        """Return the sentences to show for a run that may not fit."""
        return (
            f"This run will need about {units.size(self.memory.total)}, {units.size(self.missing or 0)} more than there is. It "
            "may run out of memory: try --micro-batch 1 (or another part of --batch), --gradient-checkpointing, or a smaller "
            "--max-length."
        )


def expected(
    prepared: Prepared, ranks: Ranks = ALONE, *, free: Callable[[torch.device], int | None] = machine.free
) -> Expected | None:
    """Return what the largest step of a run will hold, from the model's shapes and the longest records.

    None where that cannot be known: a run never depends on it. Nothing changes, random numbers included.

    Args:
        prepared: The run.
        ranks: The processes that share its steps; the memory is one's.
        free: Returns the bytes still to be had on a device, None where that is not known.
    """
    try:
        memory = _memory(prepared, ranks)
    except (DeltaWError, *NEEDS_VALUES) as error:  # DeltaWError: a changed model is no longer what its config describes
        log.debug("The run's memory cannot be known beforehand: %s", error)
        return None
    needed, room = memory.total - memory.process - memory.weights, free(next(prepared.loaded.model.parameters()).device)
    return Expected(memory, None if room is None or needed <= room else needed - room)


def _memory(prepared: Prepared, ranks: Ranks) -> Memory:
    loaded, config = prepared.loaded, prepared.config
    first = next(loaded.model.parameters())
    device, dtype = first.device, first.dtype
    held = machine.held() if device.type == "cpu" else 0
    task = task_of(config.data)
    rows: Sequence[Record] = sorted(prepared.encoded.examples, key=lambda e: e.length)[-_rows(prepared, ranks) :]
    rows = _tree_instead(prepared, ranks, task.loss(loaded)) or rows

    def taken(checkpointed: bool) -> Taken:
        settings = TrainConfig(
            batch=len(rows), optimizer=config.optimizer, gradient_checkpointing=checkpointed, data=config.data,
            frozen_dtype=config.frozen_dtype,
        )  # fmt: skip
        alike = _what_decides(loaded.model, dtype, prepared.method, rows, settings, device.type)
        if alike not in _taken:
            model = _on_meta(loaded.model, dtype)
            shadow = dataclasses.replace(loaded, model=model)
            _taken[alike] = step(model, prepared.method, rows, settings, device.type, lambda: task.loss(shadow))
        return Taken(_taken[alike], estimated=False)

    plain = taken(checkpointed=False)
    passes = taken(checkpointed=True) if config.gradient_checkpointing else plain
    sizes = summary(loaded.model)
    base = sizes.base_bytes
    if is_dealt(loaded.model):
        base = bytes_here(loaded.model) - sum(adapter.bytes for adapter in sizes.adapters.values())
    return memory_of(passes, max(0, held - base), base, plain)


def _tree_instead(prepared: Prepared, ranks: Ranks, loss: Loss) -> list[Example]:
    """Return a record of as many tokens as the largest tree of the run's first steps; none where their largest batch is no tree.

    A tree's row holds what a record as long does: neither keeps scores of attention.
    """
    config, examples = prepared.config, prepared.encoded.examples
    if config.share == "off" or not isinstance(loss, CompletionLoss):
        return []
    plan = LoopPlan(loss, examples, (), config, ranks=ranks)
    parts = [part for step in range(min(_STEPS, plan.total_steps)) for part in plan.here(step)]
    with attention_for(loss, examples):
        batches = [loss.collate(part) for part in parts]
        largest = max(
            batches, key=lambda batch: (batch.input_ids if batch.tree is None else batch.tree.input_ids).numel()
        )
        if largest.tree is None or not _takes_trees(loss):
            return []
    tokens, taught = largest.tree.input_ids.numel(), largest.targets
    return [Example([0] * tokens, [0 < i >= tokens - taught for i in range(tokens)], "")]


def _takes_trees(loss: CompletionLoss) -> bool:
    """Return whether the model computes of a small tree what it computes of its rows."""
    choose_path(loss)
    common = [i % 8 for i in range(_COMMON)]
    rows = [Example([*common, *(n + i for i in range(8))], [False] * _COMMON + [True] * 8, "") for n in range(3)]
    batch = loss.collate(rows)
    return batch.tree is not None and not loss.why_no_tree(batch)


def _what_decides(
    model: PreTrainedModel,
    dtype: torch.dtype,
    method: Method,
    rows: Sequence[Record],
    settings: TrainConfig,
    device: str,
) -> tuple[object, ...]:
    """Return all that decides the memory of a step, as a key: the candidates of a sweep often differ in rate and seed alone."""
    config = model.config
    attention = getattr(config, "_attn_implementation", None)
    shapes = tuple((row.length, _counted(row)) for row in rows)
    return plain_class(model), config.to_json_string(), attention, dtype, repr(method), shapes, repr(settings), device


def _counted(row: Record) -> object:
    """Return the predictions of a text, or the sizes of an item's inputs."""
    if isinstance(row, Example):
        return sum(row.supervised)
    return tuple((name, tuple(getattr(value, "shape", (len(value),)))) for name, value in sorted(row.inputs.items()))


def _on_meta(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of the same class and config, without weights or adapters."""
    settings = copy.deepcopy(model.config)
    default = torch.get_default_dtype()
    with torch.device("meta"):
        torch.set_default_dtype(dtype)
        try:
            return cast("PreTrainedModel", plain_class(model)(settings).eval())
        finally:
            torch.set_default_dtype(default)


def _rows(prepared: Prepared, ranks: Ranks) -> int:
    """The number of rows in the largest forward pass."""
    config = prepared.config
    if config.micro_batch is not None:
        return config.micro_batch
    if config.batch_tokens is None:
        return math.ceil(config.batch / ranks.count)
    longest = max(e.length for e in prepared.encoded.examples)
    return max(1, math.ceil(config.batch_tokens // padded(longest) / ranks.count))
