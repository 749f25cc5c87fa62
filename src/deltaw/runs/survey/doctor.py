"""A look at the machine before anything is trained on it: what is there, which fast ways are open, and what is slow here and why.

Knows no models. What can be measured in a second is measured, not looked up.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
import timeit
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from deltaw.files import units
from deltaw.model.pretrained import bfloat16_pays, pick_device
from deltaw.runs.memory import machine
from deltaw.training.frozen import is_faster

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
)
"""Flags of a processor with which products of matrices are faster."""
_WORTH_IT = 1.2
"""Several threads are to be so many times as fast as one."""
_LITTLE = 5 << 30
"""Bytes of a disk or of memory that a small model and its run need."""

# Package → what it is for here
_OPTIONAL = {
    "gguf": "GGUF files: pip install 'deltaw[gguf]'",
    "sacrebleu": "BLEU: pip install 'deltaw[eval]'",
    "rouge_score": "ROUGE-L: pip install 'deltaw[eval]'",
    "sklearn": "F1, Matthews: pip install 'deltaw[eval]'",
    "scipy": "Pearson and Spearman: pip install 'deltaw[eval]'",
    "PIL": "images: pip install 'deltaw[vision]'",
    "bitsandbytes": "bases in 4 and 8 bits: pip install bitsandbytes",
    "torchao": "bases in few bits: pip install torchao",
    "onnxruntime": "ONNX Runtime's adapters: pip install 'deltaw[onnx]'",
}
_KERNELS = {
    "causal_conv1d": "Mamba, Jamba and Falcon-H1 take their slow path without it: pip install causal-conv1d",
    "mamba_ssm": "Mamba 2 takes its slow path without it: pip install mamba-ssm",
    "fla": "gated delta nets (Qwen3-Next) take their slow path without it: pip install flash-linear-attention",
}
"""Packages whose kernels a GPU has for some models' layers."""


@dataclass(frozen=True)
class Fact:
    """Something about the machine."""

    name: str
    value: str
    advice: str = ""
    """A sentence on what is slow or missing here, why, and what to do; empty where all is well."""


@dataclass(frozen=True)
class Checkup:
    """All that was looked at."""

    sections: Mapping[str, list[Fact]]
    """Title → facts."""

    @property
    def advice(self) -> list[str]:
        """Return what is worth doing, by the name of what it is about."""
        return [f"{fact.name}: {fact.advice}" for facts in self.sections.values() for fact in facts if fact.advice]

    def to_json(self) -> dict[str, object]:
        """Return the facts as plain values."""
        return {title: [asdict(fact) for fact in facts] for title, facts in self.sections.items()}


def checkup() -> Checkup:
    """Look at this machine and this environment. It takes about a second, and changes nothing."""
    device, described = pick_device("auto"), machine.describe()
    return Checkup(
        {
            "Versions": list(_versions(described)),
            "Processor and threads": list(_processor(described)),
            "Accelerators": list(_accelerators()),
            "Memory and disk": list(_room()),
            "Fast ways": list(_fast_ways(device)),
            "Optional packages": list(_optional()),
        }
    )


def _versions(described: machine.Environment) -> Iterator[Fact]:
    for name, version in described["versions"].items():
        yield Fact(name, version)
    yield Fact("Python", f"{described['python']} ({sys.executable})")


def _processor(described: machine.Environment) -> Iterator[Fact]:
    allowed, threads, flags = _allowed(), torch.get_num_threads(), _flags()
    yield Fact("processor", described["processor"])
    yield Fact("instructions", ", ".join(name for name in _INSTRUCTIONS if name in flags) or "not known")
    yield Fact("cores", f"{described['cores']}, of which {allowed:g} may be used here")
    yield Fact("linear algebra", _algebra())
    several, one = _speed(threads), _speed(1)
    yield Fact("float32 products", f"{several:.0f} GFLOP/s with {threads} threads, {one:.0f} with one")
    yield Fact("threads", str(threads), _thread_advice(threads, allowed, several / one))


def _thread_advice(threads: int, allowed: float, gain: float) -> str:
    said = f"OMP_NUM_THREADS is {os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else ""
    if threads > allowed:
        return (
            f"{threads} threads share {allowed:g} cores and wait for one another, which makes a step several times slower: "
            f"export OMP_NUM_THREADS={max(1, int(allowed))}."
        )
    if threads < int(allowed) / 2:
        why = said or "torch was told to use few"
        return f"{threads} of {allowed:g} cores are used ({why}): export OMP_NUM_THREADS={int(allowed)}."
    if threads > 1 and gain < _WORTH_IT:
        return f"{threads} threads are only {gain:.1f} times as fast as one: something else uses the cores now."
    return ""


def _allowed() -> float:
    """Return how many cores this process may use: by affinity, and by a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        return min(float(cores), int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or the word "max"
        return float(cores)


def _flags() -> set[str]:
    """Return the flags of the processor, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(
        next((line.split(":", 1)[1] for line in lines if line.lower().startswith(("flags", "features"))), "").split()
    )


def _algebra() -> str:
    libraries = {"MKL": torch.backends.mkl.is_available(), "oneDNN": torch.backends.mkldnn.is_available()}
    return ", ".join(name for name, there in libraries.items() if there) or "torch's own"


def _speed(threads: int) -> float:
    """Return the GFLOP/s of a product of a training step's size, the best of five."""
    before, (n, k, d) = torch.get_num_threads(), (512, 1024, 1024)
    x, W0 = torch.ones(n, k), torch.ones(k, d)
    torch.set_num_threads(threads)
    try:
        return 2e-9 * n * k * d / min(timeit.repeat(lambda: x @ W0, number=1, repeat=5))
    finally:
        torch.set_num_threads(before)


def _accelerators() -> Iterator[Fact]:
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        built = "for CPUs alone" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        there = shutil.which("nvidia-smi") is not None
        advice = (
            "A GPU's driver is installed, but torch finds no GPU: is it built for this driver's CUDA?" if there else ""
        )
        yield Fact("GPU", f"none (torch is built {built})", advice)
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        name = f"{torch.cuda.get_device_name(number)}, compute capability {major}.{minor}"
        used = "Another process holds most of its memory." if free < total / 2 else ""
        yield Fact(f"GPU {number}", f"{name}, {units.size(free)} free of {units.size(total)}", used)
    if torch.cuda.is_available():
        yield Fact("CUDA", f"{torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    if torch.backends.mps.is_available():
        yield Fact("GPU", "Apple's (MPS)")


def _room() -> Iterator[Fact]:
    left, total = machine.free(torch.device("cpu")) or 0, psutil.virtual_memory().total
    low = f"Less than {units.size(_LITTLE)}: `deltaw plan MODEL` says what a run takes." if left < _LITTLE else ""
    yield Fact("memory", f"{units.size(left)} left of {units.size(total)}", low)
    for name, path in _disks().items():
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        low = f"Less than {units.size(_LITTLE)} are left." if free < _LITTLE else ""
        if not os.access(there, os.W_OK):
            low = "It cannot be written."
        yield Fact(name, f"{units.size(free)} free in {path}", low)


def _disks() -> dict[str, Path]:
    """Return the folders that runs, models and temporary files go to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return {
        "this folder": Path.cwd(),
        "models of the hub": Path(HF_HUB_CACHE),
        "temporary": Path(tempfile.gettempdir()),
    }


def _fast_ways(device: torch.device) -> Iterator[Fact]:
    yield Fact("device", f"{device}: what --device auto takes")
    pays = bfloat16_pays(device)
    here = "runs take it by themselves" if pays else "slower than float32 here, so runs stay in float32"
    yield Fact("bfloat16", here)
    if device.type in ("cpu", "cuda"):
        faster = is_faster(device.type)
        how = "--frozen-dtype auto takes it" if faster else "slower than float32 here, so --frozen-dtype auto leaves it"
        yield Fact("products in 8 bits", how)
    if device.type == "cuda":
        kernels = torch.backends.cuda
        on = {"flash": kernels.flash_sdp_enabled(), "memory-efficient": kernels.mem_efficient_sdp_enabled()}
        yield Fact("fused attention", ", ".join(name for name, is_on in on.items() if is_on) or "turned off")
        for package, without in _KERNELS.items():
            yield Fact(package, *_there(package, without))


def _optional() -> Iterator[Fact]:
    for package, use in _OPTIONAL.items():
        version, _ = _there(package, "")
        yield Fact(package, version if version != "not installed" else f"not installed; for {use}")


def _there(package: str, without: str) -> tuple[str, str]:
    """Return a package's version and no advice, or that it is not installed and the advice."""
    if importlib.util.find_spec(package) is None:
        return "not installed", without
    names = importlib.metadata.packages_distributions().get(package, [package])
    return importlib.metadata.version(names[0]), ""
