"""Bytes and FLOPs of tensors on the meta device, and the kernels that stand in there for a device's."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from deltaw.runs.memory.live import Live, StandIns


def meta(*shape: int, trained: bool = True) -> Tensor:
    return torch.zeros(shape, device="meta", requires_grad=trained)


def saved(make: Callable[[], Tensor], device: str, *there: Tensor) -> int:
    """Bytes that a forward pass keeps beside its output and its inputs, `there`."""
    live = Live(there)
    with live, StandIns(device):
        out = make()
        return live.now - out.untyped_storage().nbytes()


def test_live_counts_what_is_alive_its_peak_and_flops() -> None:
    left, right = meta(3, 4, trained=False), meta(4, 5, trained=False)
    live = Live(there=(left, right))
    with live:
        product = left @ right
        assert (live.now, live.flops) == (4 * 15, 2 * 3 * 4 * 5)
        del product
        assert (live.now, live.peak) == (0, 4 * 15)
        assert live.since() == 0 == live.peak


def test_dropout_saves_a_byte_an_entry_on_a_gpu_and_a_factor_on_a_cpu() -> None:
    x = meta(1000)
    assert saved(lambda: F.dropout(x, 0.1), "cuda", x) == 1000
    assert saved(lambda: F.dropout(x, 0.1), "cpu", x) == 4000


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("trained_mask", [False, True])
def test_attention_does_not_save_its_scores_where_the_kernel_is_fused(device: str, trained_mask: bool) -> None:
    """A CPU's fused kernel takes no mask that is trained (T5's position bias): it was refused instead of planned."""
    n, heads, t, e = 2, 4, 64, 8
    query, mask = meta(n, heads, t, e), meta(1, heads, t, t, trained=trained_mask)
    kept = saved(lambda: F.scaled_dot_product_attention(query, query, query, attn_mask=mask), device, query, mask)
    scores = 4 * n * heads * t * t
    assert kept >= scores if trained_mask and device == "cpu" else kept < scores / 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_stand_ins_reach_the_blocks_that_checkpointing_recomputes(reentrant: bool) -> None:
    peaks = {}
    for device in ("cpu", "cuda"):
        x = meta(1000)
        live = Live(there=[x])
        with live, StandIns(device):
            out = checkpoint(lambda x: F.dropout(x, 0.1), x, use_reentrant=reentrant).sum()
            before = live.since()
            torch.autograd.backward(get_gradient_edge(out))
        peaks[device] = live.peak - before
    assert peaks["cpu"] - peaks["cuda"] >= 3000


def test_other_threads_and_other_tensors_compute_as_ever() -> None:
    """The functions were replaced for the whole process at the start of every training."""

    def compute() -> list[Tensor]:
        torch.manual_seed(3)
        query = torch.randn(2, 4, 9, 8)
        attended = F.scaled_dot_product_attention(query, query, query, dropout_p=0.2)
        return [attended, F.dropout(attended, 0.3)]

    expected, elsewhere = compute(), list[Tensor]()
    functions = F.scaled_dot_product_attention, F.dropout
    with StandIns("cuda"):
        thread = threading.Thread(target=lambda: elsewhere.extend(compute()))
        thread.start()
        thread.join()
        here = compute()
        assert (F.scaled_dot_product_attention, F.dropout) == functions
    for results in (elsewhere, here):
        assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))
