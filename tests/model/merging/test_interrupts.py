"""Ctrl-C at any line of a merge or an unmerge: the model is as before or as after, and its base is never lost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw.errors import MergeError
from deltaw.layers.ops.merging import Product, merge_stats
from deltaw.model.merging.merge import Keep
from deltaw.model.record import record_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x))
        return out


def adapted() -> nn.Module:
    model = deltaw.attach(Net(), deltaw.LoRA(rank=2, alpha=3, targets=["up", "down"]))
    for parameter in deltaw.parameters(model):
        nn.init.normal_(parameter)
    return model


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Interrupt a call at its `at`th line of deltaw's code. Return whether it had so many."""
    lines = iter(range(at))

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if "deltaw" not in frame.f_code.co_filename:
            return None
        if event == "line" and next(lines, None) is None:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def steps(call: Callable[[nn.Module], object], model: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """Yield a model for each line at which the call can be interrupted, as the interrupt leaves it."""
    at = 0
    while True:
        each = model()
        if not interrupted(lambda each=each: call(each), at):  # type: ignore[misc]
            return
        yield each
        at += 1


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["copy", "correction"])
@pytest.mark.parametrize("phase", ["merge", "unmerge"])
def test_an_interrupt_loses_nothing(phase: str, keep: Keep) -> None:
    torch.manual_seed(0)
    x, first = torch.randn(3, 6), adapted()
    W0 = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    y = first(x)

    def model() -> nn.Module:
        again = adapted()
        again.load_state_dict(W0)
        if phase == "unmerge":
            deltaw.merge(again, keep=keep)
        return again

    count = 0
    for left in steps(lambda m: deltaw.merge(m, keep=keep) if phase == "merge" else deltaw.unmerge(m), model):
        count += 1
        if phase == "merge" or not record_of(left).merged:
            assert torch.allclose(left(x), y, atol=1e-4)
        if record_of(left).merged:
            deltaw.unmerge(left)
        assert torch.allclose(left(x), y, atol=1e-4) and deltaw.adapters(left).active == "default"
        assert all(torch.equal(tensor, W0[name]) for name, tensor in left.state_dict().items())
    assert count > 100


def test_figures_of_a_change_whose_squares_are_too_large_for_fp32() -> None:
    stats = merge_stats(torch.ones(2, 3), Product(torch.full((1, 3), 1e20), torch.ones(2, 1), 2.0))
    assert stats.dw_norm == pytest.approx(2e20 * 6**0.5) and stats.survived == pytest.approx(1.0)
    stats = merge_stats(
        torch.ones(2, 3).double(), Product(torch.full((1, 3), 1e50, dtype=torch.float64), torch.ones(2, 1), 2.0)
    )
    assert stats.largest_change == pytest.approx(2e50)


def test_a_base_that_is_not_finite_is_blamed() -> None:
    model = adapted()
    with torch.no_grad():
        model.get_parameter("up.weight")[1, 1] = float("nan")
    with pytest.raises(MergeError, match="up: the base's weight itself is not finite"):
        deltaw.merge(model)
