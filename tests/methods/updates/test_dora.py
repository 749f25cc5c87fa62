"""DoRA: its norm is of A, B and W0 as they are now, whatever changed them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltaw import adapters, attach, load, merge, parameters, save, unmerge, using
from deltaw.methods.dora import DoRA
from deltaw.model.summary import updates
from tests.conftest import bits, fill, tiny_gpt2, tiny_llama


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    return tiny_llama(tied=request.param).eval()


def test_on_transposed_layers_it_merges_and_unmerges_exactly(ids: torch.Tensor) -> None:
    model = tiny_gpt2().eval()
    before = bits(model)
    fill(attach(model, DoRA(rank=4, alpha=10)))
    branch = model(ids).logits
    merge(model)
    torch.testing.assert_close(model(ids).logits, branch, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())
    assert adapters(model).active == "default"


def changes_of_dora() -> dict[str, Any]:
    """Ways to change an adapter or its base, of which PyTorch's count of changes sees some."""

    def by_data(model: Any) -> None:
        for parameter in parameters(model):
            parameter.data -= 0.1 * parameter.data.sign()

    def new_memory(model: Any) -> None:
        for parameter in parameters(model):
            parameter.data = parameter.data * 1.3

    def fused(model: Any) -> None:
        for parameter in parameters(model):
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(parameters(model), lr=0.1, fused=True).step()

    def in_inference(model: Any) -> None:
        with torch.inference_mode():
            for parameter in parameters(model):
                parameter.mul_(1.2)

    def base(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.data *= 0.5

    def loaded(model: Any) -> None:
        model.load_state_dict({n: v + 0.1 for n, v in model.state_dict().items()}, assign=True)

    return {f.__name__: f for f in (by_data, new_memory, fused, in_inference, base, loaded)}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__)
@pytest.mark.parametrize("change", changes_of_dora())
def test_the_norm_is_of_what_a_and_b_and_w0_are_now(change: str, mode: Any, model: Any, ids: torch.Tensor) -> None:
    fill(attach(model, DoRA(rank=3, alpha=5)))
    with using(model, "default"):
        with mode():
            model(ids)
        changes_of_dora()[change](model)
        with mode():
            found = model(ids).logits
        merge_safe = copy.deepcopy(model)
    merge(merge_safe)
    torch.testing.assert_close(found.clone(), merge_safe(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_norm_is_computed_outside_of_autocast_and_inference_mode(model: Any, ids: torch.Tensor) -> None:
    fill(attach(model, DoRA(rank=3, alpha=5)))
    name, update = next(iter(updates(model).items()))
    layer = model.get_submodule(name)
    norm = update.norm(layer)
    assert norm.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(update.norm(layer), norm)
        model(ids)
    with torch.inference_mode():
        model(ids)
    model(ids).logits.sum().backward()
    model.to(torch.bfloat16)
    W = update.W0(layer).double() + update.scale * update.B.double() @ update.A.double()
    torch.testing.assert_close(update.norm(layer).double(), W.norm(dim=1), rtol=1e-5, atol=0)
    model.double()
    torch.testing.assert_close(update.norm(layer), W.norm(dim=1), rtol=1e-12, atol=0)


class Norms(TorchDispatchMode):
    """Counts the norms of rows that are computed while it is open; RMSNorm computes none."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.linalg_vector_norm.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_generate_computes_a_norm_once(model: Any, ids: torch.Tensor) -> None:
    fill(attach(model, DoRA(rank=3, alpha=5)))
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with Norms() as norms:
        first = model.generate(ids, **settings)
    assert norms.count == len(updates(model))
    for parameter in parameters(model):
        parameter.data *= -2
    with Norms() as norms:
        assert not torch.equal(model.generate(ids, **settings), first)
    assert norms.count == len(updates(model))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "adamw_torch", "by .data"])
def test_trained_by_any_optimizer_it_is_what_is_loaded_again(optimizer: str, ids: torch.Tensor, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class ByData(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data -= group["lr"] * parameter.grad.sign()

    if optimizer == "adamw_bnb_8bit":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = tiny_llama()
    twin = copy.deepcopy(model)
    attach(model, DoRA(rank=4, alpha=6))
    settings = TrainingArguments(
        str(tmp_path), max_steps=20, learning_rate=2e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        optim="adamw_torch" if optimizer == "by .data" else optimizer,
    )  # fmt: skip
    own = ByData(parameters(model), lr=2e-3) if optimizer == "by .data" else None
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, settings, train_dataset=rows, optimizers=(own, None)).train()
    losses = []
    save(model, tmp_path / "a")
    load(twin, tmp_path / "a")
    for one in (model, twin):
        with torch.no_grad():
            losses.append(float(one.eval()(ids, labels=ids).loss))
    assert losses[0] < 4.5 and losses[0] == pytest.approx(losses[1], rel=1e-5)
