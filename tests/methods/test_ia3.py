"""(IA)³: PEFT's files both ways."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import deltaw
from deltaw.methods.ia3 import IA3
from tests.methods.test_methods import build, logits, trained


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "bert", "bart"])
def test_real_peft_reads_our_ia3(name: str, tmp_path: Path) -> None:
    method = IA3(whole="classifier") if name == "bert" else IA3()
    model = trained(build(name), method)
    deltaw.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build(name), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_we_read_real_pefts_ia3(name: str, tmp_path: Path) -> None:
    targets = {
        "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]), "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
        "bert": (["key", "value", "output.dense"], ["output.dense"]),
    }[name]  # fmt: skip
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    config = peft.IA3Config(task_type=task, target_modules=targets[0], feedforward_modules=targets[1])
    theirs = peft.get_peft_model(build(name), config).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))) * 0.1)
    theirs.save_pretrained(tmp_path / "a")
    ours = build(name)
    deltaw.load(ours, tmp_path / "a")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-6, rtol=1e-5)
    deltaw.merge(ours, allow_unchanged=True)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)
