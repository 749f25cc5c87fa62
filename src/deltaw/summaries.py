"""How large the base and each attached adapter are. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from deltaw.attached import adapters, base_parameters, parameters, record_of


@dataclass(frozen=True)
class AdapterSummary:
    """Size of one adapter."""

    layers: int
    parameters: int
    share: float
    """Of the base's parameters."""
    bytes: int
    left_out: dict[str, str]
    """Dense weights without an update, and why."""
    rounding: float = 0.0
    """‖ΔW − ΔW'‖ / ‖ΔW‖ of an adapter that was loaded in less than its file's precision."""


@dataclass(frozen=True)
class Summary:
    """What `summary` returns: the base's size and each adapter's."""

    base_parameters: int
    base_bytes: int
    active: str | None
    adapters: dict[str, AdapterSummary]


def summary(model: nn.Module) -> Summary:
    """Sizes of the base and of each attached adapter."""
    base = dict(base_parameters(model))
    count = sum(p.numel() for p in base.values())
    each = {}
    for name in adapters(model):
        own = parameters(model, name)
        size = sum(p.numel() for p in own)
        attached = record_of(model).attached[name]
        each[name] = AdapterSummary(
            layers=len(attached.layers),
            parameters=size,
            share=size / count,
            bytes=sum(p.numel() * p.element_size() for p in own),
            left_out=dict(attached.left_out),
            rounding=attached.metadata.get("rounding", 0.0),
        )
    return Summary(count, sum(p.numel() * p.element_size() for p in base.values()), adapters(model).active, each)
