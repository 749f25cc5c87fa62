"""Measure the steps of an adapter's life: load, switch, save, merge, unmerge, convert, deltaw beside PEFT in one run.

    python benchmarks/lifecycle.py --model .cache/smollm2

SmolLM2, all-linear, r = 8, float32. PEFT loads 32 adapters, deltaw as many as --most. Times are medians where a step can be
repeated, else single ones. PEFT converts no adapters of other programs. Memory of adapters is the growth of the process's
resident memory. Beside the times of loading stands the time that the system takes to give one adapter's memory (memory_ms);
on some machines that is most of it. Writes results/lifecycle.json.
"""

from __future__ import annotations

import argparse
import copy
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
from transformers import AutoModelForCausalLM

import deltaw
import machine
from adapters import attach_random

AT = (1, 12, 32, 100, 300, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--most", type=int, default=1000, help="adapters that deltaw loads (9.8 MB each)")
    parser.add_argument("--peft-most", type=int, default=32)
    chosen = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()
    twin = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        make(model, folder)
        result = {
            "model": "SmolLM2-135M-Instruct", "adapter": "all-linear, r = 8, float32",
            "adapter_mb": (folder / "adapter_model.safetensors").stat().st_size / 1e6,
            "deltaw": ours(model, folder, chosen.most) | conversions(folder, chosen.model),
            "peft": theirs(twin, folder, chosen.peft_most),
        }  # fmt: skip
    machine.write("lifecycle", result)


def make(model: Any, folder: Path) -> None:
    attach_random(model)
    deltaw.save(model, folder)
    deltaw.detach(model)


def ours(model: Any, folder: Path, most: int) -> dict[str, Any]:
    """deltaw's figures."""
    found: dict[str, Any] = {"load_ms": {}, "memory_ms": {}, "switch_us": {}}
    size = (folder / "adapter_model.safetensors").stat().st_size
    deltaw.load(model, folder, name="first")  # with the base's fingerprint, once
    deltaw.detach(model)
    before, loads = memory(), []
    for i in range(1, most + 1):
        loads.append(seconds(lambda i=i: deltaw.load(model, folder, name=f"task{i}", activate=False)) * 1e3)
        if i in AT:
            found["load_ms"][str(i)] = statistics.median(loads[-5:])
            found["memory_ms"][str(i)] = fresh_memory(size)
            found["switch_us"][str(i)] = switches(lambda name: deltaw.use(model, name), ["task1", f"task{i}"])
    found["memory_of_each_mb"] = (memory() - before) / most / 1e6
    for i in range(2, most + 1):
        deltaw.detach(model, f"task{i}")
    found["memory_left_after_unload_mb"] = (memory() - before) / 1e6
    deltaw.use(model, "task1")
    with tempfile.TemporaryDirectory() as out:
        found["save_ms"] = often(lambda: deltaw.save(model, Path(out) / "again", name="task1"))
    for keep in ("copy", "correction"):
        merges, unmerges, report = [], [], None
        for _ in range(5):
            began = time.perf_counter()
            report = deltaw.merge(model, keep=keep)
            merges.append(time.perf_counter() - began)
            unmerges.append(seconds(lambda: deltaw.unmerge(model)))
        assert report is not None
        found[f"merge_{keep}"] = {
            "merge_s": statistics.median(merges), "unmerge_s": statistics.median(unmerges),
            "extra_memory_mb": report.extra_memory / 1e6,
        }  # fmt: skip
    return found


def conversions(folder: Path, base: str) -> dict[str, float]:
    """To llama.cpp's file and back."""
    with tempfile.TemporaryDirectory() as out:
        file = Path(out) / "adapter.gguf"
        to = often(lambda: deltaw.convert(folder, file, base=base))
        back = often(lambda: deltaw.convert(file, Path(out) / "back", base=base))
    return {"convert_to_gguf_ms": to, "convert_from_gguf_ms": back}


def theirs(model: Any, folder: Path, most: int) -> dict[str, Any]:
    """PEFT's figures."""
    found: dict[str, Any] = {"load_ms": {}, "switch_us": {}}
    before, loads = memory(), []
    wrapped: Any = None
    for i in range(1, most + 1):
        if wrapped is None:
            began = time.perf_counter()
            wrapped = peft.PeftModel.from_pretrained(model, folder, adapter_name="task1")
            loads.append((time.perf_counter() - began) * 1e3)
        else:
            loads.append(
                seconds(lambda i=i, wrapped=wrapped: wrapped.load_adapter(folder, adapter_name=f"task{i}")) * 1e3
            )
        if i in AT:
            found["load_ms"][str(i)] = statistics.median(loads[-5:])
            found["switch_us"][str(i)] = switches(wrapped.set_adapter, ["task1", f"task{i}"])
    found["memory_of_each_mb"] = (memory() - before) / most / 1e6
    wrapped.set_adapter("task1")
    with tempfile.TemporaryDirectory() as out:
        found["save_ms"] = often(lambda: wrapped.save_pretrained(out, selected_adapters=["task1"]))
    merges, unmerges = [], []
    for _ in range(5):
        merges.append(seconds(wrapped.merge_adapter))
        unmerges.append(seconds(wrapped.unmerge_adapter))
    found["merge"] = {"merge_s": statistics.median(merges), "unmerge_s": statistics.median(unmerges)}
    return found


def seconds(done: Callable[[], Any]) -> float:
    began = time.perf_counter()
    done()
    return time.perf_counter() - began


def often(done: Callable[[], Any]) -> float:
    """Median milliseconds."""
    return statistics.median(seconds(done) for _ in range(5)) * 1e3


def switches(switch: Callable[[str], None], names: list[str]) -> float:
    """Median microseconds of a switch to and fro."""
    return statistics.median(seconds(lambda name=names[i % 2]: switch(name)) for i in range(20)) * 1e6


def fresh_memory(size: int) -> float:
    """Median milliseconds for the system to give as many bytes that nobody had before, kept until all are given."""
    kept: list[mmap.mmap] = []
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    return often(lambda: kept.append(mmap.mmap(-1, size, flags=flags)))


def memory() -> int:
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()
