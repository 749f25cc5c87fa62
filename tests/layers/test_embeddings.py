"""Embeddings whose own forward goes through `nn.Embedding`'s: scaled ones (Gemma, BART), positions with an offset (OPT, BART)."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltaw
from deltaw import DoRA, LoRA
from deltaw.errors import TargetError
from deltaw.layers.kinds import why_not
from tests.architectures import TABLE, Architecture
from tests.conftest import assert_same, bits, fill, snapshot

ENTRIES = {a.name: a for a in TABLE}
CASES = [
    ("Gemma3", "embed_tokens"),
    ("BART", "encoder.embed_tokens"),
    ("BART", "embed_positions"),
    ("OPT", "embed_positions"),
]
METHODS = {
    "lora": lambda name: LoRA(rank=2, alpha=3, targets=f"q,{name}"),
    "dora": lambda name: DoRA(rank=2, alpha=3, targets=f"q,{name}"),
    "whole": lambda name: LoRA(rank=2, targets="q", whole=name),
}


def untied(entry: Architecture) -> Any:
    """What is tied cannot be merged for one of its users alone."""
    model = entry.build()
    seen: set[int] = set()
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if id(parameter) in seen and parameter is not None:
                module._parameters[own] = nn.Parameter(parameter.detach().clone())
            seen.add(id(parameter))
    return model


@torch.no_grad()
def computed(entry: Architecture, model: Any) -> Tensor:
    return entry.outputs(model(**entry.inputs()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("architecture", "name"), CASES, ids=lambda part: part)
def test_life_of_a_wrapped_embedding(architecture: str, name: str, method: str, tmp_path: Path) -> None:
    entry = ENTRIES[architecture]
    model = untied(entry)
    before, base, twin = snapshot(model), computed(entry, model), untied(entry)
    values = bits(model)
    deltaw.attach(model, METHODS[method](name))
    assert torch.equal(computed(entry, model), base) or method == "dora"
    torch.testing.assert_close(computed(entry, model), base)
    own = deltaw.parameters(model)
    optimizer = torch.optim.AdamW(deltaw.parameters(model), lr=0.01)
    for _ in range(2):
        loss = model(**entry.inputs()).loss
        loss.backward()
        optimizer.step()
    assert own and all(p.grad is not None and p.grad.any() for p in own)
    branch = computed(entry, model)
    assert (branch - base).abs().max() > 1e-3
    deltaw.save(model, tmp_path / "adapter")
    deltaw.load(twin, tmp_path / "adapter")
    assert torch.equal(computed(entry, twin), branch)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(computed(entry, again), branch)
    deltaw.merge(model)
    torch.testing.assert_close(computed(entry, model), branch, rtol=1e-4, atol=1e-5)
    deltaw.unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in values.items())
    deltaw.detach(model)
    assert_same(model, before)


def test_rows_of_a_batch_have_their_own_scaled_embeddings() -> None:
    entry = ENTRIES["Gemma3"]
    model = entry.build()
    fill(deltaw.attach(model, METHODS["lora"]("embed_tokens"), name="a"), "a", seed=1)
    fill(deltaw.attach(model, METHODS["lora"]("embed_tokens"), name="b"), "b", seed=2)
    with torch.no_grad(), deltaw.route(model, ["a", None, "b"]):
        together = computed(entry, model)
    for i, name in enumerate(["a", None, "b"]):
        with deltaw.using(model, name):
            torch.testing.assert_close(together[i], computed(entry, model)[i], rtol=1e-4, atol=1e-5)


def test_peft_and_we_agree_on_gemmas_embedding(tmp_path: Path) -> None:
    entry = ENTRIES["Gemma3"]
    base = entry.build()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for i, (n, p) in enumerate(theirs.named_parameters()):
            if "lora_" in n:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    deltaw.load(base, tmp_path / "theirs")
    torch.testing.assert_close(computed(entry, base), computed(entry, theirs), rtol=1e-5, atol=1e-6)
    deltaw.save(base, tmp_path / "ours")
    back: Any = peft.PeftModel.from_pretrained(entry.build(), tmp_path / "ours").eval()
    torch.testing.assert_close(computed(entry, back), computed(entry, theirs), rtol=1e-5, atol=1e-6)


class Reads(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight[0]


class Elsewhere(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight) * 2


class Between(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(self.weight.dtype)


class Over(Between):
    """One that is over another one: both go through `nn.Embedding`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


def test_what_reads_the_weight_by_itself_is_refused() -> None:
    for cls in (Reads, Elsewhere):
        assert why_not(cls(9, 4)) == f"{cls.__name__} has a forward of its own"
        with pytest.raises(TargetError, match="has a forward of its own"):
            deltaw.attach(nn.Sequential(cls(9, 4)), LoRA(rank=2, targets="0"))
    model = nn.Sequential(Over(9, 4))
    x = torch.arange(9)
    fill(deltaw.attach(model, LoRA(rank=2, alpha=3, targets="0")))
    branch = model(x)
    deltaw.merge(model)
    torch.testing.assert_close(model(x), branch)
    torch.testing.assert_close(branch, 3 * model[0].weight)


class Padded(nn.Module):
    """An embedding with a padding token, whose row is zero or not."""

    def __init__(self, *, zero: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12, padding_idx=4)
        self.out = nn.Linear(12, 7)
        if not zero:
            nn.init.normal_(self.embed.weight)

    def forward(self, ids: Tensor) -> Tensor:
        h: Tensor = self.out(torch.tanh(self.embed(ids)))
        return h


PADDED_IDS = torch.tensor([[4, 1, 2, 4, 3], [5, 4, 6, 7, 4]])
PADDED = {
    "gaussian": LoRA(rank=3, alpha=7, targets="embed,out"),
    "kaiming": LoRA(rank=3, alpha=7, targets="embed", init="kaiming"),
    "pissa": LoRA(rank=3, alpha=7, targets="embed", init="pissa"),
    "dropout": LoRA(rank=3, alpha=7, targets="embed", dropout=0.2),
    "dora": DoRA(rank=3, alpha=7, targets="embed"),
}


def padded(kind: str) -> Any:
    torch.manual_seed(6)
    return Padded(zero=kind == "dora")


def trained(model: Any, steps: int = 6) -> Any:
    """Steps whose data has the padding token, and whose loss sees it."""
    optimizer = torch.optim.AdamW(deltaw.parameters(model), lr=0.05, weight_decay=0.1)
    model.train()
    for step in range(steps):
        (model((PADDED_IDS + step) % 30).square().sum() + model(PADDED_IDS).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", PADDED)
def test_the_padding_row_is_left_alone(kind: str, tmp_path: Path) -> None:
    """PyTorch gives it no gradient; the update moved it."""
    model, twin = padded(kind), padded(kind)
    pad, before = torch.tensor([[4]]), model.embed.weight[4].clone()
    deltaw.attach(model, PADDED[kind])
    with torch.enable_grad():
        trained(model)
    assert torch.equal(model.embed(pad)[0, 0], before)
    assert not torch.equal(model.embed(pad + 1), twin.embed(pad + 1))
    assert not deltaw.delta(model, "embed")[:, 4].any()
    expected = model(PADDED_IDS)
    deltaw.attach(model, LoRA(rank=2, targets="embed"), name="other")
    with deltaw.route(model, ["other", "default"]):
        rows = model.embed(PADDED_IDS)
    assert all(torch.equal(row, before) for row in rows[PADDED_IDS == 4])
    deltaw.use(model, "default")
    deltaw.detach(model, "other")
    deltaw.save(model, tmp_path / "adapter")
    deltaw.merge(model)
    assert torch.equal(model.embed.weight[4], before)
    torch.testing.assert_close(model(PADDED_IDS), expected, rtol=1e-4, atol=1e-5)
    deltaw.unmerge(model)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(PADDED_IDS), expected, rtol=1e-4, atol=1e-5)


def test_peft_leaves_the_padding_row_alone_too(tmp_path: Path) -> None:
    """Its A is zero at the start, and the padding token's column stays so: the same ΔW as ours, read by us."""
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["embed"])
    theirs = trained_by_peft(peft.get_peft_model(padded("gaussian"), config))
    theirs.save_pretrained(tmp_path / "theirs")
    model = padded("gaussian")
    deltaw.load(model, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(model(PADDED_IDS), theirs.eval()(PADDED_IDS), rtol=1e-4, atol=1e-5)
    assert not deltaw.delta(model, "embed")[:, 4].any() and deltaw.delta(model, "embed").any()


def trained_by_peft(model: Any) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        model(PADDED_IDS).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_dora_refuses_an_embedding_whose_padding_row_it_would_rescale() -> None:
    model = padded("gaussian")
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"row of its padding token \(4\) is not zero"):
        deltaw.attach(model, DoRA(rank=2, targets="embed"))
    assert_same(model, before)
