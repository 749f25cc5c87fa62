"""How many candidates share one pass over their base. Knows what was prepared, and memory."""

from __future__ import annotations

import torch

from deltaw import available_memory
from deltaw.expected_memory import expected
from deltaw.preparing import Prepared

# Of the free memory; the rest is for what is not foreseen
_USED = 0.8


def width_of(asked: int | None, largest: Prepared) -> tuple[int, str]:
    """How many, and why. `asked`: how many were asked for; `largest`: the candidate with the most parameters."""
    first = next(largest.loaded.model.parameters())
    if first.dtype == torch.float16:
        return 1, "in float16 each has a loss scale of its own"
    if asked is not None:
        return asked, "as asked for"
    if first.device.type == "cpu":
        return 1, "a CPU is bound by arithmetic"
    if largest.config.gradient_checkpointing:
        return 1, "a GPU's checkpointing sees one adapter at a time"
    found, room = expected(largest), available_memory.free(first.device)
    if found is None or room is None:
        return 1, "the memory of a pass cannot be told beforehand"
    each = found.memory
    own = each.adapter + each.gradients + each.optimizer + each.activations + each.working
    return max(1, int(room * _USED) // own), "as many as the memory holds"
