"""How long inference takes with each way of adapting a model, in turn with the base. Knows models and adapters; nothing of data.

The ways are timed in rounds, one after the other in each, so that what a machine does besides meets all of them; of a way the
median over rounds counts, and its ratio to the base's time is the median of the rounds' ratios. The heap is the same for all:
glibc gives large pieces back to the system, and a program that asks for them anew waits for each page. With the originals of a
merged model there (540 MB), passes over 8 rows of 256 tokens took up to a fifth longer, all of it page faults.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from deltaw.model.inputs import image_shape, most_positions
from deltaw.model.merging.merge import merge, unmerge
from deltaw.model.switch import using

BASE = "base"
# Seconds from which a task warms itself up
_LONG = 1.0
Way = Callable[[], AbstractContextManager[Any]]
"""Opens a block in which the model is used in this way."""
Task = Callable[[], Callable[[], object]]
"""Gets ready, untimed, for what it returns, which is timed."""


@dataclass(frozen=True)
class Latency:
    """Of one task."""

    seconds: dict[str, float]
    """Way → median."""
    ratios: dict[str, float]
    """Way → median of its time over the base's in the same round."""
    rounds: int


def ways(model: nn.Module, adapters: Sequence[str], merged: Sequence[str] = ()) -> dict[str, Way]:
    """The base alone, each of `adapters` in use, and those of `merged` merged ("lora, merged")."""
    found: dict[str, Way] = {BASE: lambda: using(model, None)}
    found |= {name: lambda name=name: using(model, name) for name in adapters}  # type: ignore[misc]
    return found | {f"{name}, merged": lambda name=name: _merged(model, name) for name in merged}  # type: ignore[misc]


@contextlib.contextmanager
def _merged(model: nn.Module, name: str) -> Iterator[None]:
    merge(model, name, allow_unchanged=True)
    try:
        yield
    finally:
        unmerge(model)


@torch.no_grad()
def measure(ways: Mapping[str, Way], task: Task, *, rounds: int = 7, seconds: float = math.inf) -> Latency:
    """Each way's time for the task, in so many rounds, fewer where these would take more than about `seconds`, but one at least.
    Another way is the first in each round, and before a way is timed it has been through the task once, in the first round only
    where that is long: what came before it (a merge, say) has filled the caches with something else."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    with freed_memory_kept():
        first = _timed(task())
        long = first > _LONG
        fitting = seconds / (first * len(ways) * (1 if long else 2))
        rounds = max(1, int(min(rounds, fitting)))
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                with ways[name]():
                    if not long or (i == 0 and rounds > 1):
                        task()()
                    times[name].append(_timed(task()))
    medians = {name: statistics.median(own) for name, own in times.items()}
    ratios = {
        name: statistics.median(t / b for t, b in zip(own, times[BASE], strict=True)) for name, own in times.items()
    }
    return Latency(medians, ratios, rounds)


def _timed(run: Callable[[], object]) -> float:
    _wait()
    began = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- tasks ------------------------------------------------------------------------------------------------------


def forward(model: Any, batch: int, length: int) -> Task:
    """A pass over random tokens [batch, length], as far as the model has positions, of which a language model's head sees the
    last; over random images where it takes these."""
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        pictures = images(model, batch)
        return lambda: lambda: model(pixel_values=pictures)
    length = min(length, most_positions(model) or length)
    inputs: dict[str, Any] = {"input_ids": tokens(model, batch, length)}
    given = inspect.signature(model.forward).parameters
    inputs |= {"logits_to_keep": 1} if "logits_to_keep" in given else {}
    inputs |= {"use_cache": False} if "use_cache" in given else {}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens(model, batch, 1)
    return lambda: lambda: model(**inputs)


def decoding(model: Any, batch: int, *, cached: int = 64, steps: int = 8) -> Task:
    """`steps` tokens of each row one after the other, behind `cached` ones: what generating costs."""
    prompt, next_token = tokens(model, batch, cached), tokens(model, batch, 1)
    # transformers 5.24 renamed it
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def ready() -> Callable[[], object]:
        named: dict[str, Any] = {name: DynamicCache(), "use_cache": True}
        model(prompt, **named)
        return lambda: [model(next_token, **named) for _ in range(steps)]

    return ready


def tokens(model: Any, batch: int, length: int) -> Tensor:
    """The same ones each time, none of the first hundred, where special ones are."""
    count = model.get_input_embeddings().weight.shape[0]
    drawn = torch.randint(min(100, count // 2), count, (batch, length), generator=torch.Generator().manual_seed(batch))
    device: torch.device = next(model.parameters()).device
    return drawn.to(device)


def images(model: Any, batch: int) -> Tensor:
    """Noise [batch, channels, height, width], the same each time."""
    drawn = torch.randn(batch, *image_shape(model), generator=torch.Generator().manual_seed(batch))
    first = next(model.parameters())
    return drawn.to(first.device, first.dtype)


# malloc.h: what the settings are called
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# What glibc's own rule ends at in a program that frees large pieces, and its default (mallopt(3))
_LARGEST, _MAPS = 32 << 20, 65536


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """In this block nothing that is freed goes back to the system, so that it is there for what comes next. Elsewhere than with
    glibc it changes nothing."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _MAPS)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library where it is glibc, else None."""
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # no library goes without a name there (Windows)
        return None
