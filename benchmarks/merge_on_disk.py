"""How much memory does a merge on disk take, and how long? A checkpoint of Llama-3-8B's shapes, half its layers: 9 GB in
bfloat16.

    python benchmarks/merge_on_disk.py --scratch FOLDER     # needs some 30 GB there

Merges reversibly, verifies, and unmerges by the command line, each in a process of its own, whose peak of resident memory is read
afterwards; what comes back is compared with the base byte for byte. Writes results/merge_on_disk.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import machine
from deltaw.files.formats import peft
from deltaw.files.formats.fingerprint import FORMS, Fingerprint
from deltaw.files.formats.locate import hash_of_layers, places_of
from deltaw.files.formats.peft import config_for
from deltaw.files.formats.peft.metadata import FORMAT, FORMAT_KEY
from deltaw.files.formats.safetensors import shards_of

HIDDEN, KV, INNER, VOCABULARY = 4096, 1024, 14336, 128256
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", required=True, help="folder to work in; nothing of it is removed that was there")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--name", default="merge_on_disk", help="of the result file")
    chosen = parser.parse_args()
    scratch = Path(chosen.scratch)
    base, adapter, merged, back = (str(scratch / name) for name in ("base", "adapter", "merged", "back"))
    make_base(Path(base), chosen.layers)
    make_adapter(Path(base), Path(adapter), chosen.layers)
    size = sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))
    largest = max(entry.size for shard in shards_of(Path(base)) for entry in shard.entries.values())
    steps = {
        "torch alone": timed(["-c", "import torch"]),
        "merge": timed(["-m", "deltaw", "merge", base, adapter, "-o", merged + "-plain", "--check", "off"]),
        "merge --reversible": timed(
            ["-m", "deltaw", "merge", base, adapter, "-o", merged, "--reversible", "--check", "off"]
        ),
        "verify": timed(["-m", "deltaw", "verify", merged, "--base", base, "--adapter", adapter]),
        "unmerge": timed(["-m", "deltaw", "unmerge", merged, adapter, "-o", back]),
    }
    correction = (Path(merged) / "base.correction").stat().st_size
    machine.write(chosen.name, {
        "checkpoint_gb": size / 1e9, "shards": len(list(Path(base).glob("*.safetensors"))), "dtype": "bfloat16",
        "largest_tensor_mb": largest / 1e6, "allowed_peak_mb": 2 * largest / 1e6 + 200, "adapter": "all-linear, r = 8",
        "correction_share": correction / size, "steps": steps, "same_bytes_back": digests(Path(base)) == digests(Path(back)),
    })  # fmt: skip


def make_base(folder: Path, layers: int) -> None:
    """A folder with shards, an index and a config, of random weights."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def weight(d: int, k: int) -> torch.Tensor:
        return torch.randn(d, k, generator=generator, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)

    parts = [
        {
            f"model.layers.{i}.{name}.weight": shape
            for i in range(first, min(first + 4, layers))
            for name, shape in SHAPES.items()
        }
        for first in range(0, layers, 4)
    ]
    parts += [{"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}, {"lm_head.weight": (VOCABULARY, HIDDEN)}]
    index = {}
    for number, shapes in enumerate(parts):
        name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        save_file({tensor: weight(*shape) for tensor, shape in shapes.items()}, folder / name)
        index |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))


def make_adapter(base: Path, folder: Path, layers: int) -> None:
    """All dense layers of the blocks, r = 8, random A and B."""
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for i in range(layers):
        for name, (d, k) in SHAPES.items():
            A, B = torch.randn(8, k, generator=generator) / k**0.5, torch.randn(d, 8, generator=generator) * 0.01
            factors[f"model.layers.{i}.{name}"] = (A, B)
    scales = dict.fromkeys(factors, 2.0)
    config = config_for(
        dict.fromkeys(factors, 8), scales, target_modules=sorted(n.rsplit(".", 1)[1] for n in SHAPES), dropout=0.0,
        rank_stabilised=False, transposed=False, base=None, task="CAUSAL_LM",
    )  # fmt: skip
    file = peft.LoRAFile(factors, scales, config, {FORMAT_KEY: FORMAT})
    shards = shards_of(base)
    file.metadata[peft.W0] = str(
        Fingerprint(*(hash_of_layers(shards, places_of(shards, file, base), form) for form in FORMS))
    )
    peft.write(folder, file)


# A process begins with the peak of the one that it was forked from: a small one in between tells what its child took itself
LAUNCH = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps({"status": status, "seconds": time.perf_counter() - began, "peak_mb": usage.ru_maxrss * 1024 / 1e6}))
"""


def timed(words: list[str]) -> dict[str, Any]:
    """Seconds and the peak of resident memory of a Python process."""
    done = subprocess.run([sys.executable, "-c", LAUNCH, sys.executable, *words], stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    if found.pop("status"):
        raise SystemExit(f"{words} failed")
    return found


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            found[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


if __name__ == "__main__":
    main()
