"""Times are of the ways themselves: the heap is the same for all of them, and each is in use while it is timed."""

from __future__ import annotations

import ctypes
import resource

import pytest
import torch

import deltaw
from deltaw.study import latency
from deltaw.study.heap import freed_memory_kept
from tests.conftest import fill, tiny_llama

GLIBC = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
MIB = 1 << 20


def faults(size: int) -> int:
    """Of pages, in filling and freeing so many bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(size // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not GLIBC, reason="needs glibc's malloc")
def test_what_is_freed_is_there_again_until_the_end() -> None:
    with freed_memory_kept():
        faults(128 * MIB)
        assert faults(64 * MIB) < 32
    assert faults(64 * MIB) >= 32  # all of them, where the system gives pages of 2 MiB


def test_each_way_is_in_use_while_it_is_timed() -> None:
    model = tiny_llama().eval()
    deltaw.attach(model, deltaw.LoRA(rank=2), name="one")
    fill(model)
    inputs = torch.tensor([[3, 1, 2]])
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        own = {}
        for name, way in latency.ways(model, ["one"], merged=["one"]).items():
            with way():
                own[name] = model(inputs).logits
        found = latency.measure(
            latency.ways(model, ["one"], merged=["one"]), lambda: lambda: seen.append(model(inputs).logits), rounds=2
        )
    assert list(found.seconds) == list(found.ratios) == ["base", "one", "one, merged"] and found.ratios["base"] == 1.0
    # A first pass shows how long the task is; then in each round an untimed and a timed one of each way, another way first
    base, one, merged = (own[name] for name in found.seconds)
    expected = [out for out in (base, one, merged, one, merged, base) for _ in ("untimed", "timed")]
    torch.testing.assert_close(torch.stack(seen[1:]), torch.stack(expected))
    assert not torch.allclose(base, one) and torch.allclose(one, merged, atol=1e-5)
