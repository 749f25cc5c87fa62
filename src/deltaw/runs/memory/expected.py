"""The peak memory of a run that is about to start, by part, and whether there is as much. Knows what was prepared."""

from __future__ import annotations

import copy
import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch

from deltaw.data.batches import padded
from deltaw.files import units
from deltaw.layers.unwrap import plain_class
from deltaw.model.summary import summary
from deltaw.runs.memory import machine
from deltaw.runs.memory.parts import Memory, Taken, memory_of
from deltaw.runs.memory.step import step
from deltaw.training.prepare import Prepared
from deltaw.training.tasks import task_of

log = logging.getLogger("deltaw")


@dataclass(frozen=True)
class Expected:
    """The peak of a run that is about to start, its model and adapter in memory."""

    memory: Memory
    missing: int | None
    """Bytes that it will want beyond those that there are; None where it fits or that cannot be told."""

    def figures(self) -> dict[str, int]:
        """The parts in bytes, and their total."""
        return {part: n for part, n in dataclasses.asdict(self.memory).items() if part != "estimated"} | {
            "total": self.memory.total
        }

    def warning(self) -> str:
        """For a run that may not fit."""
        return (
            f"This run will want about {units.size(self.memory.total)}, {units.size(self.missing or 0)} more than there is. It "
            "may run out of memory: try --micro-batch 1 (or another part of --batch), --gradient-checkpointing, or a smaller "
            "--max-length."
        )


def expected(prepared: Prepared) -> Expected | None:
    """What a run's largest step will hold, from the shapes of its model and its longest records. None where that cannot be told:
    a run never depends on it. Changes nothing, random numbers included."""
    try:
        return _expected(prepared)
    except Exception as error:
        log.debug("The run's memory cannot be told beforehand: %s", error)
        return None


def _expected(prepared: Prepared) -> Expected | None:
    loaded, config = prepared.loaded, prepared.config
    first = next(loaded.model.parameters())
    device, dtype = first.device, first.dtype
    held = machine.held() if device.type == "cpu" else 0
    rows = sorted(prepared.encoded.examples, key=lambda e: e.length)[-_rows(prepared) :]
    task = task_of(config.data)
    one = dataclasses.replace(config, batch=len(rows), batch_tokens=None, micro_batch=None, valid_share=0.0)

    def taken(checkpointed: bool) -> Taken:
        model = _on_meta(loaded.model, dtype)
        shadow = dataclasses.replace(loaded, model=model)
        settings = dataclasses.replace(one, gradient_checkpointing=checkpointed)
        found = step(model, prepared.method, rows, settings, device.type, lambda m: task.loss(shadow))
        return Taken(found, estimated=False)

    plain = taken(checkpointed=False)
    passes = taken(checkpointed=True) if config.gradient_checkpointing else plain
    base = summary(loaded.model).base_bytes
    memory = memory_of(passes, max(0, held - base), base, plain)
    room = machine.free(device)
    wanted = memory.total - memory.process - base
    return Expected(memory, None if room is None or wanted <= room else wanted - room)


def _on_meta(model: Any, dtype: torch.dtype) -> Any:
    """A model of the same class and config, without weights or adapters."""
    settings = copy.deepcopy(model.config)
    before: Any = torch.get_default_dtype()
    with torch.device("meta"):
        torch.set_default_dtype(dtype)
        try:
            return plain_class(model)(settings).eval()
        finally:
            torch.set_default_dtype(before)


def _rows(prepared: Prepared) -> int:
    """Of the largest forward pass."""
    config = prepared.config
    if config.micro_batch is not None:
        return config.micro_batch
    if config.batch_tokens is None:
        return config.batch
    longest = max(e.length for e in prepared.encoded.examples)
    return max(1, config.batch_tokens // padded(longest))
