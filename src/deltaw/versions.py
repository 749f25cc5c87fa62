"""Whether a tensor still has the values that it had. Knows tensors alone.

PyTorch counts changes in place (`Tensor._version`), but not those of its fused optimizers: their steps are counted here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

_steps: Any = WeakTensorKeyDictionary()
"""Parameter → steps that fused optimizers took with it."""
_total = 0


def version_of(tensor: Tensor) -> tuple[int, int, int]:
    """Equal for as long as the tensor has the same storage and nothing was written to it. (Tensors made under inference mode
    keep no count.)"""
    counted = _steps.get(tensor, 0) if _total else 0  # looking there takes longer than all else
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, counted


def steps() -> int:
    """How many steps optimizers of this process have taken."""
    return _total


def _count(optimizer: Any, *_: Any) -> None:
    global _total
    _total += 1
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                _steps[parameter] = _steps.get(parameter, 0) + 1


register_optimizer_step_post_hook(_count)
