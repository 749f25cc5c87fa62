"""Pairs of options: each two values of two settings meet in one adapter's whole life. Most faults lived between options that each
had a test."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw import DoRA, LoRA, attach, detach, load, merge, parameters, save, unmerge, use, using
from deltaw.errors import AdapterError, TargetError
from deltaw.model.combine import combine
from deltaw.model.summary import updates
from tests.architectures import TABLE
from tests.conftest import assert_same, bits, pairwise, snapshot, tiny_gpt2, tiny_llama
from tests.methods.updates.test_weights import Attention, mixtral, oss

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(tied=False),
    "tied": tiny_llama,
    "gpt2": tiny_gpt2,
    "mixtral": mixtral,
    "gpt-oss": oss,
    "attention": Attention,
    "roberta": next(a for a in TABLE if a.name == "RoBERTa").build,
}
WHOLE = dict.fromkeys(MODELS, "*norm") | {
    "gpt2": "transformer.ln_f",
    "attention": "attn",
    "roberta": "classifier.out_proj",
}
EMBEDDINGS = {"gpt2": "wte", "attention": "embed", "roberta": "word_embeddings"}
AXES: dict[str, list[Any]] = {
    "model": list(MODELS),
    "method": ["lora", "dora", "pissa", "kaiming"],
    "targets": ["all-linear", "qv", "embedding"],
    "scaling": ["alpha/r", "alpha/sqrt(r)"],
    "alpha": [None, 5.0],
    "dropout": [0.0, 0.3],
    "beside": ["", "norms", "whole", "tokens"],
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "keep": ["copy", "correction"],
    "stored": [None, torch.bfloat16],
}
CASES = pairwise(AXES)
for case in CASES:
    if case["dtype"] is torch.float64 and case["model"] in ("mixtral", "gpt-oss"):
        case["dtype"] = torch.float32  # PyTorch has no grouped product in float64
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest ‖difference‖ / ‖logits‖."""
IDS = torch.arange(4, 37).view(3, 11)


def model_of(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(5)
    model: Any = MODELS[name]()
    for parameter in model.parameters():  # some classes leave memory as it was
        torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).eval()


def method_of(case: dict[str, Any]) -> LoRA:
    settings: dict[str, Any] = {key: case[key] for key in ("targets", "scaling", "alpha", "dropout")}
    if case["targets"] == "embedding":
        settings["targets"] = ["all-linear", EMBEDDINGS.get(case["model"], "embed_tokens")]
    if case["method"] in ("pissa", "kaiming"):
        settings["init"] = case["method"]
    if case["beside"] == "norms":
        settings["norms"] = True
    elif case["beside"] == "tokens":
        settings["tokens"] = [7, 9]
    elif case["beside"] == "whole":
        settings["whole"] = WHOLE[case["model"]]
    return (DoRA if case["method"] == "dora" else LoRA)(rank=3, **settings)


@torch.no_grad()
def run(model: Any) -> Tensor:
    out = model(IDS)
    return (out if isinstance(out, Tensor) else out.logits).double()


def close(one: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    assert float((one - other).norm() / other.norm()) < TOLERANCE[dtype]


def train_a_step(model: Any) -> None:
    """Two steps of plain descent that raise no tensor's version, as some packages' optimizers do."""
    for _ in range(2):
        out = model(IDS)
        loss = (out if isinstance(out, Tensor) else out.logits).float().square().mean()
        gradients = torch.autograd.grad(loss, parameters(model), allow_unused=True)
        for parameter, gradient in zip(parameters(model), gradients, strict=True):
            if gradient is not None:
                step = gradient / gradient.abs().max().clamp_min(1e-9)
                parameter.data += 0.1 * step


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v).removeprefix("torch.") for v in case.values()))
def test_a_life(case: dict[str, Any], tmp_path: Path) -> None:
    dtype = case["dtype"]
    model = model_of(case["model"], dtype)
    before, was, base = snapshot(model), bits(model), run(copy.deepcopy(model).requires_grad_(False))
    try:
        attach(model, method_of(case))
    except TargetError as refusal:
        assert str(refusal) and refused(case)
        assert_same(model, before)
        return
    assert not refused(case)
    close(run(model), base, dtype)
    model.train()
    train_a_step(model)
    model.eval()
    branch = run(model)
    assert (branch - base).norm() > 10 * TOLERANCE[torch.float32] * base.norm()
    save(model, tmp_path / "a")
    twin = model_of(case["model"], dtype)
    load(twin, tmp_path / "a", **({} if case["stored"] is None else {"dtype": case["stored"]}))
    if case["stored"] is None:
        assert torch.equal(run(twin), branch)
    else:
        close(run(twin), branch, torch.bfloat16)
    report = merge(model, keep=case["keep"], untie=True)
    assert report.survived > 0.5
    close(run(model), branch, dtype)
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in was.items())
    assert torch.equal(run(model), branch)
    combined_laws(model, branch, base, dtype)
    use(model, None)
    close(run(model), base, dtype)
    detach(model)
    assert_same(model, before)


def combined_laws(model: Any, branch: Tensor, base: Tensor, dtype: torch.dtype) -> None:
    """Once the adapter is itself, and it less itself is the base, in ΔW and in what else it trains."""
    combine(model, {"default": 1.0}, name="once")
    with using(model, "once"):
        close(run(model), branch, dtype)
    rescaled = any(type(update).__name__ == "LowRankRescaled" for update in updates(model).values())
    if rescaled:
        with pytest.raises(AdapterError, match="rank"):
            combine(model, {"default": 0.5, "once": 0.5}, name="half")
        return
    combine(model, {"default": 0.25, "once": 0.75}, name="whole")
    with using(model, "whole"):
        close(run(model), branch, dtype)
    combine(model, {"default": 1.0, "once": -1.0}, name="nothing")
    with using(model, "nothing"):
        close(run(model), base, dtype)


def refused(case: dict[str, Any]) -> bool:
    """Whether these settings exclude one another; each is said at attach."""
    weights = case["model"] in ("mixtral", "gpt-oss", "attention") and not (
        case["targets"] == "qv" and case["model"] != "attention"
    )
    if case["targets"] == "embedding" and case["beside"] == "tokens":
        return True
    if weights and (case["method"] in ("dora", "pissa") or case["dropout"]):
        return True
    sliced = case["model"] == "gpt2" and case["targets"] == "qv"
    if sliced and case["method"] in ("dora", "pissa"):
        return True
    return case["model"] == "attention" and case["beside"] in ("norms", "tokens", "whole")
