"""A loop's state as tensors and plain numbers, from which it goes on to the same bits. Knows no files.

Batches and random numbers follow from the seed and the number of the step, so neither is in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import FileError
from deltaw.training.flat import Flat
from deltaw.training.loop.checks import look_back
from deltaw.training.loop.spikes import Usual
from deltaw.training.loop.state import Loop, LoopState

_TRAINED, _BEST, _OPTIMIZER, _LOSSES = "trained", "best", "optimizer", "losses"


@dataclass(frozen=True)
class Saved:
    """A loop after one of its steps."""

    tensors: Mapping[str, Tensor]
    """On the CPU: the trained values, those of the best evaluation, the optimizer's moments, the sum of losses not yet logged."""
    numbers: Mapping[str, Any]
    """All else, as JSON holds it."""

    @property
    def step(self) -> int:
        """The steps that were taken."""
        return int(self.numbers["state"]["step"])

    @property
    def has_ended(self) -> bool:
        """True where no step follows: the run had come to its end."""
        return bool(self.numbers["has_ended"])

    def reopened(self) -> Saved:
        """Return the state of a run that had come to its end, to be trained further."""
        state = {**self.numbers["state"], "stopped": "", "without_gain": 0}
        return Saved(self.tensors, {**self.numbers, "state": state, "has_ended": False})


def captured(loop: Loop) -> Saved:
    """Return a copy of the loop's state. On a GPU this waits for it. Raises TrainError where the last step was not finite."""
    if not loop.failed:
        look_back(loop)
    tensors: dict[str, Tensor] = {f"{_TRAINED}.{i}": p for i, p in enumerate(loop.trainable)}
    tensors |= {f"{_BEST}.{i}": p for i, p in enumerate(loop.best or ())}
    tensors[_LOSSES] = loop.losses
    of_optimizer: dict[str, dict[str, object]] = {}
    for index, values in loop.optimizer.state_dict()["state"].items():
        plain = of_optimizer.setdefault(str(index), {})
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}.{index}.{name}"] = value
            else:
                plain[name] = value
    numbers = {
        "state": _plain(loop.state),
        "logged": _plain(loop.logged),
        "last_evaluation": loop.last_evaluation,
        "due": loop.due,
        "rungs": loop.rungs,
        "skipped": loop.skipped,
        "usual": asdict(loop.usual),
        "failed": loop.failed,
        "has_ended": not loop.goes_on,
        "optimizer": of_optimizer,
        "scaler": loop.scaler.state_dict(),
        "layout": layout(loop.flat),
    }
    numbers["strides"] = {name: tensor.stride() for name, tensor in tensors.items() if not tensor.is_contiguous()}
    return Saved({name: _copy(tensor) for name, tensor in tensors.items()}, numbers)


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU with its entries in order, as files hold them."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def restore(loop: Loop, saved: Saved) -> None:
    """Let the loop go on after the saved step. Raises FileError for the state of another adapter."""
    numbers, trained = saved.numbers, [saved.tensors.get(f"{_TRAINED}.{i}") for i in range(len(loop.trainable))]
    fits = all(t is not None and t.shape == p.shape for t, p in zip(trained, loop.trainable, strict=True))
    if not fits or numbers["layout"] != layout(loop.flat):
        raise FileError(
            "The saved state is of an adapter whose values lie in another order: another version of deltaw wrote it. "
            "Resume with that version, or train again."
        )
    with torch.no_grad():
        for parameter, tensor in zip(loop.trainable, trained, strict=True):
            assert tensor is not None
            parameter.copy_(tensor)
    loop.flat.refresh()
    loop.losses.copy_(saved.tensors[_LOSSES])
    best = [saved.tensors.get(f"{_BEST}.{i}") for i in range(len(loop.trainable))]
    loop.best = [t.to(p.device, copy=True) for t, p in zip(best, loop.trainable, strict=True) if t is not None] or None
    _restore_optimizer(loop, saved)
    loop.scaler.load_state_dict(numbers["scaler"])
    for name, value in _state(numbers["state"]).items():
        setattr(loop.state, name, value)
    loop.logged = LoopState(**_state(numbers["logged"]))
    loop.last_evaluation, loop.due = numbers["last_evaluation"], numbers["due"]
    loop.usual = Usual(**numbers.get("usual", {}))  # the state of an older version has none
    loop.rungs, loop.skipped, loop.failed = numbers["rungs"], numbers["skipped"], numbers["failed"]
    loop.began = loop.plan.clock() - loop.state.seconds


def _restore_optimizer(loop: Loop, saved: Saved) -> None:
    strides = saved.numbers["strides"]
    states: dict[int, dict[str, object]] = {int(i): dict(plain) for i, plain in saved.numbers["optimizer"].items()}
    for name, tensor in saved.tensors.items():
        kind, _, rest = name.partition(".")
        if kind == _OPTIMIZER:
            index, _, key = rest.partition(".")
            # In memory as it lay there: products of other strides have other last bits
            laid = torch.empty_strided(tensor.shape, strides.get(name, tensor.stride()), dtype=tensor.dtype)
            states[int(index)][key] = laid.copy_(tensor)
    groups = loop.optimizer.state_dict()["param_groups"]
    loop.optimizer.load_state_dict({"state": states, "param_groups": groups})


def layout(flat: Flat) -> list[str]:
    """Return which values lie where in the trained tensors: the layers in their order, then the others' names."""
    return [name for group in flat.groups for name in group] + [f"{name} beside" for name in flat.others]


def _plain(state: LoopState) -> dict[str, Any]:
    """Return the state as JSON holds it, which has no ∞ and no NaN: as texts."""
    values = asdict(state)
    return {n: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}


def _state(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a state from what `_plain` gives."""
    return {n: float(v) if isinstance(v, str) and n != "stopped" else v for n, v in values.items()}
