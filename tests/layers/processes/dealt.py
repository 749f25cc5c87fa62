"""Save, load and merge models whose weights `fully_shard` has dealt out, beside the same in one process. Run by each process.

python -m tests.layers.processes.dealt FOLDER      # prints a JSON object: case → what was found to be so
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import deltaw
from deltaw.errors import DeltaWError
from deltaw.layers.processes.shards import full, is_part
from deltaw.model.summary import updates
from tests.conftest import fill, tiny_gpt2, tiny_llama

IDS = torch.arange(3, 13)[None]


def mixture() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config)


# Name → the model, its method, its dtype
CASES: dict[str, tuple[Callable[[], Any], Any, torch.dtype]] = {
    "LoRA": (tiny_llama, deltaw.LoRA(rank=2), torch.float32),
    "LoRA, bfloat16": (tiny_llama, deltaw.LoRA(rank=2), torch.bfloat16),
    "Conv1D": (tiny_gpt2, deltaw.LoRA(rank=2), torch.float32),
    "DoRA": (tiny_llama, deltaw.DoRA(rank=2), torch.float32),
    "a tied head, trained whole": (tiny_llama, deltaw.LoRA(rank=2, whole="lm_head,model.embed_tokens"), torch.float32),
    "an embedding": (lambda: tiny_llama(tied=False), deltaw.LoRA(rank=2, targets="embed_tokens,q,lm_head"), torch.float32),
    "experts": (mixture, deltaw.LoRA(rank=2, targets="gate_up_proj,down_proj,q_proj"), torch.float32),
    "(IA)³": (tiny_llama, deltaw.IA3(), torch.float32),
    "biases": (tiny_llama, deltaw.BitFit(add=True), torch.float32),
}  # fmt: skip


def made(case: str) -> Any:
    torch.manual_seed(0)
    maker, _, dtype = CASES[case]
    return maker().to(dtype).eval()


def adapted(case: str) -> Any:
    return fill(deltaw.attach(made(case), CASES[case][1]), size=0.1)


def deal(model: Any, whole: set[nn.Parameter]) -> None:
    stem = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for block in stem:
        fully_shard(block, ignored_params=whole)
    fully_shard(model, ignored_params=whole)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out.float()


def same(model: nn.Module, other: nn.Module) -> bool:
    """Return whether two models have the same bits, one of them dealt out."""
    for module in model.modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.reshard()
    values, wanted = dict(model.named_parameters()), dict(other.named_parameters())
    return values.keys() == wanted.keys() and all(torch.equal(full(values[n]), full(wanted[n])) for n in wanted)


def found(case: str, apart: bool, folder: Path) -> dict[str, object]:
    """Return what is so. apart: A and B are not dealt out with the base."""
    one, model, base = adapted(case), adapted(case), made(case)
    deal(model, set(deltaw.parameters(model)) if apart else set())
    wanted, close = logits(one), 1e-5 if CASES[case][2] is torch.float32 else 0.1
    so: dict[str, object] = {"dealt out": any(is_part(p) for p in model.parameters())}
    so["logits"] = torch.allclose(logits(model), wanted, atol=close)
    out = deltaw.save(model, folder / "saved")
    alone = made(case)
    deltaw.load(alone, out)
    so["saved whole, loaded alone"] = torch.allclose(logits(alone), wanted, atol=close)
    so["summary"] = deltaw.summary(model).adapters["default"].bytes == deltaw.summary(one).adapters["default"].bytes
    if case.startswith(("LoRA", "Conv1D", "DoRA")):
        layer = next(iter(updates(model)))
        so["delta"] = torch.equal(deltaw.delta(model, layer), deltaw.delta(one, layer))
    for keep in ("copy", "correction"):
        if case != "biases":
            report, expected = deltaw.merge(model, keep=keep), deltaw.merge(one, keep=keep)  # type: ignore[arg-type]
            so[f"merged ({keep})"] = same(model, one) and report.relative == expected.relative
            so[f"logits, merged ({keep})"] = torch.allclose(logits(model), logits(one), atol=close)
            deltaw.save(model, folder / "saved while merged")
            deltaw.unmerge(model)
            deltaw.unmerge(one)
            so[f"unmerged ({keep})"] = same(model, one)
    combined = deltaw.combine(model, {"default": 1.0}, name="copy") if case != "biases" else None
    so["combined"] = combined is None or combined.name == "copy"
    deltaw.detach(model)
    so["detached"] = same(model, base)
    deltaw.load(model, out)
    so["loaded"] = torch.allclose(logits(model), wanted, atol=close)
    return so


def refused() -> dict[str, object]:
    """Return what is said to what cannot be done."""
    model = adapted("LoRA")
    deal(model, set())
    said: dict[str, object] = {}
    asked: dict[str, Callable[[], object]] = {
        "attach": lambda: deltaw.attach(model, deltaw.LoRA(rank=2), name="late"),
        "untie": lambda: deltaw.merge(model, untie=True),
    }
    for what, ask in asked.items():
        try:
            ask()
        except DeltaWError as error:
            said[what] = f"{type(error).__name__}: {error}"
    return said


def main() -> None:
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    outcome: dict[str, object] = {
        f"{case}{', A and B whole' * apart}": found(case, apart, folder / f"{number} {apart}")
        for number, case in enumerate(CASES)
        for apart in (False, True)
    }
    outcome["refused"] = refused()
    if dist.get_rank() == 0:
        print(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
