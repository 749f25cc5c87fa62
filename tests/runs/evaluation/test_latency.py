"""Times are of the ways themselves: the heap is the same for all of them, and each is in use while it is timed."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from collections.abc import Callable, Iterator

import pytest
import torch

import deltaw
from deltaw.runs.evaluation import latency
from deltaw.runs.evaluation.latency import freed_memory_kept
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


class Clock:
    """A clock that tasks move on, by what they are said to take."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.now, self.way, self.seconds = 0.0, "", seconds
        self.taken: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def ways(self) -> dict[str, latency.Way]:
        return {name: lambda name=name: self.using(name) for name in self.seconds}  # type: ignore[misc]

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[None]:
        self.way, self.passes = name, 0
        yield
        self.way = ""

    def task(self) -> Callable[[], None]:
        def run() -> None:
            if not self.way:  # how long the task is
                self.now += 0.25
                return
            self.passes += 1
            if self.passes == 1:  # untimed
                self.now += 100.0
                return
            round_number = self.taken.count(self.way)
            self.taken.append(self.way)
            self.now += self.seconds[self.way][round_number]

        return run


SECONDS = {"base": [1.0, 10.0, 2.0, 4.0], "one": [2.0, 5.0, 8.0, 8.0]}


@pytest.mark.parametrize(
    ("rounds", "base", "one", "ratio"),
    [(3, 2.0, 5.0, 2.0), (4, 3.0, 6.5, 2.0), (2, 5.5, 3.5, 1.25), (1, 1.0, 2.0, 2.0)],
)
def test_ratios_are_the_median_of_the_rounds_own(
    rounds: int, base: float, one: float, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2, 0.5, 4 and 2: not the ratio of medians, nor the mean."""
    clock = Clock(SECONDS)
    monkeypatch.setattr(latency.time, "perf_counter", clock.perf_counter)
    found = latency.measure(clock.ways(), clock.task, rounds=rounds)
    assert found.seconds == {"base": base, "one": one} and found.ratios == {"base": 1.0, "one": ratio}
    assert found.rounds == rounds
    turns = ["base", "one", "one", "base", "base", "one", "one", "base"]
    assert clock.taken == turns[: 2 * rounds]


@pytest.mark.parametrize(("seconds", "rounds"), [(3.5, 3), (2.9, 2), (0.1, 1), (1e9, 4)])
def test_as_many_rounds_as_fit(seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a second twice for two ways, untimed and timed, is a second a round."""
    clock = Clock(SECONDS)
    monkeypatch.setattr(latency.time, "perf_counter", clock.perf_counter)
    assert latency.measure(clock.ways(), clock.task, rounds=4, seconds=seconds).rounds == rounds
