"""The time of inference with each way of adapting a model, in turn with the base. Knows models and adapters; nothing of data.

Each round times all ways in turn, so that other work of the machine disturbs all of them. The median over rounds counts, and for
ratios to the base's time the median of the rounds' ratios. All ways share one heap. glibc returns large pieces to the system, and
a program that asks for them again waits for each page. Beside a merged model's originals (540 MB), passes over 8 rows of 256
tokens took up to a fifth longer, all of it page faults.
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

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from deltaw.model.inputs import image_shape, most_positions
from deltaw.model.merging.merge import merge, unmerge
from deltaw.model.switch import using

BASE = "base"
# A task of so many seconds needs no warm-up
_LONG = 1.0
Way = Callable[[], AbstractContextManager[object]]
"""Opens a block in which the model is used in this way."""
Task = Callable[[], Callable[[], object]]
"""Prepares, untimed, and returns the timed part."""


@dataclass(frozen=True)
class Latency:
    """The times of one task."""

    seconds: dict[str, float]
    """Way → median over rounds."""
    ratios: dict[str, float]
    """Way → median of its time over the base's time in the same round."""
    rounds: int


def ways(model: nn.Module, adapters: Sequence[str], merged: Sequence[str] = ()) -> dict[str, Way]:
    """Return the base alone, each of `adapters` in use, and each of `merged` merged ("lora, merged")."""
    all_ways: dict[str, Way] = {BASE: lambda: using(model, None)}
    all_ways |= {name: lambda name=name: using(model, name) for name in adapters}  # type: ignore[misc]
    return all_ways | {f"{name}, merged": lambda name=name: _merged(model, name) for name in merged}  # type: ignore[misc]


@contextlib.contextmanager
def _merged(model: nn.Module, name: str) -> Iterator[None]:
    merge(model, name, allow_unchanged=True)
    try:
        yield
    finally:
        unmerge(model)


@torch.no_grad()
def measure(ways: Mapping[str, Way], task: Task, *, rounds: int = 7, seconds: float = math.inf) -> Latency:
    """Return each way's time for the task, in so many rounds, or as many as about `seconds` allow, at least one.

    Each round starts with another way. A way runs the task once untimed before it is timed, as the work before it (for example
    a merge) has filled the caches. Long tasks do so in the first round only.
    """
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
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratios = {
        name: statistics.median(t / b for t, b in zip(seconds, times[BASE], strict=True))
        for name, seconds in times.items()
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


def forward(model: PreTrainedModel, batch: int, length: int) -> Task:
    """Return a pass over random tokens [batch, length], at most the model's positions, or over random images.

    A language model's head sees the last token alone.
    """
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        pictures = images(model, batch)
        return lambda: lambda: model(pixel_values=pictures)
    length = min(length, most_positions(model) or length)
    inputs: dict[str, object] = {"input_ids": tokens(model, batch, length)}
    parameters = inspect.signature(model.forward).parameters
    inputs |= {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    inputs |= {"use_cache": False} if "use_cache" in parameters else {}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens(model, batch, 1)
    return lambda: lambda: model(**inputs)


def decoding(model: PreTrainedModel, batch: int, *, cached: int = 64, steps: int = 8) -> Task:
    """Return `steps` single-token passes of each row after `cached` tokens: the cost of generating."""
    prompt, next_token = tokens(model, batch, cached), tokens(model, batch, 1)
    # transformers 5.24 renamed it
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def ready() -> Callable[[], object]:
        named: dict[str, object] = {name: DynamicCache(), "use_cache": True}
        model(prompt, **named)
        return lambda: [model(next_token, **named) for _ in range(steps)]

    return ready


def tokens(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Return random tokens int64 [batch, length], the same each time, without the first hundred, which may be special."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    count = embedding.weight.shape[0]
    drawn = torch.randint(min(100, count // 2), count, (batch, length), generator=torch.Generator().manual_seed(batch))
    return drawn.to(next(model.parameters()).device)


def images(model: PreTrainedModel, batch: int) -> Tensor:
    """Return noise [batch, channels, height, width], the same each time."""
    drawn = torch.randn(batch, *image_shape(model), generator=torch.Generator().manual_seed(batch))
    first = next(model.parameters())
    return drawn.to(first.device, first.dtype)


# Names of the settings in malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# glibc's threshold once a program has freed large pieces, and its default number of maps (mallopt(3))
_LARGEST, _MAPS = 32 << 20, 65536


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory in this process within the block, for its next use. Without glibc nothing changes."""
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


def _glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc."""
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # Windows: a library needs a name
        return None
