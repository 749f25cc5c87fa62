"""Measure the memory that loading a large base takes: the peak of a process beside the bytes of its weights.

    python benchmarks/big_base.py SMOLLM2             # a random Llama of 1.2 billion parameters, float32, shards of 1 GB: 4.7 GB
    python benchmarks/big_base.py SMOLLM2 --layers 4  # a smaller one

The checkpoint is written into a temporary folder, with the tokenizer of SMOLLM2, a folder. It is loaded by a process of its own,
as each command does, in each precision. `peak` is the most that the process held beyond what it held before. Weights that are
mapped from the file count as held, though the system can take their memory back at any time (`mapped`).

Writes results/big_base.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

DTYPES = ("float32", "bfloat16")


def write(folder: Path, layers: int) -> int:
    """Write the checkpoint, and return its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=49152, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def held() -> dict[str, int]:
    """Bytes that this process holds: at its peak, and now of files alone."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    values = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}
    return {"peak": values["VmHWM"], "mapped": values["RssFile"]}


def load(folder: str, dtype: str) -> None:
    """Load the model and read each weight once; print the bytes that it took."""
    from deltaw.model.pretrained import load_pretrained

    before = held()
    model: Any = load_pretrained(folder, dtype=dtype, device="cpu").model
    total = sum(float(parameter.detach().sum()) for parameter in model.parameters())
    assert total == total, "weights are finite"
    after = held()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    taken = {name: after[name] - before[name] for name in after}
    print(
        json.dumps({"dtype": dtype, "weights": weights, **taken, "peak_to_weights": round(taken["peak"] / weights, 3)})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", nargs="?")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(*args.load)
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), args.layers)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(args.tokenizer) / name, folder)
        rows = []
        for dtype in DTYPES:
            done = subprocess.run(
                [sys.executable, __file__, "--load", folder, dtype], check=True, stdout=subprocess.PIPE, text=True
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    machine.write("big_base", {"checkpoint": {"bytes": size, "dtype": "float32", "layers": args.layers}, "rows": rows})


if __name__ == "__main__":
    main()
