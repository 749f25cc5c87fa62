"""Updates beyond A and B on a linear layer: DoRA, embeddings, modules and tokens that are trained whole. No scale is 1."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw import LoRA, adapters, attach, detach, load, merge, parameters, route, save, unmerge, using
from deltaw.methods.dora import DoRA
from deltaw.methods.updates.lowrank import INITS
from deltaw.methods.updates.whole import Replaced
from deltaw.model.summary import updates
from tests.conftest import assert_same, bits, fill, snapshot, tiny_gpt2, tiny_llama

METHODS = {
    "dora": DoRA(rank=4, alpha=10),
    "embedding": LoRA(rank=4, alpha=10, targets="qv,embed_tokens"),
    "embedding by dora": DoRA(rank=4, alpha=10, targets="qv,embed_tokens"),
    "whole head": LoRA(rank=4, alpha=10, targets="qv", whole="lm_head"),
    "whole norms": LoRA(rank=4, alpha=10, targets="qv", whole="*norm"),
    "tokens": LoRA(rank=4, alpha=10, targets="qv", tokens="5,7,90"),
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    return tiny_llama(tied=request.param).eval()


@pytest.mark.parametrize("method", METHODS)
def test_attached_it_changes_nothing_and_detached_neither(model: Any, ids: torch.Tensor, method: str) -> None:
    before, base = snapshot(model), model(ids).logits
    attach(model, METHODS[method])
    torch.testing.assert_close(model(ids).logits, base, rtol=1e-5, atol=1e-5)
    detach(model)
    assert_same(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_merged_is_the_branch_and_unmerged_is_exact(model: Any, ids: torch.Tensor, method: str) -> None:
    if model.config.tie_word_embeddings and "embedding" in method:
        pytest.skip("an update of one of two tied weights cannot be merged (tests/model/test_merge.py)")
    before, base = bits(model), model(ids).logits
    fill(attach(model, METHODS[method]))
    branch = model(ids).logits
    assert (branch - base).abs().max() > 1e-2
    merge(model)
    torch.testing.assert_close(model(ids).logits, branch, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_8_rows_are_as_each_alone(model: Any, ids: torch.Tensor, method: str) -> None:
    fill(attach(model, METHODS[method], name="a"), seed=1)
    fill(attach(model, LoRA(rank=2, alpha=5), name="b"), seed=2)
    names = ["a", None, "b"]
    with torch.no_grad():
        with route(model, names):
            mixed = model(ids).logits
        for row, name in enumerate(names):
            with using(model, name):
                torch.testing.assert_close(mixed[row], model(ids).logits[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_each_of_its_parameters_learns(model: Any, ids: torch.Tensor, method: str) -> None:
    fill(attach(model, METHODS[method]))
    ids[0, :3] = torch.tensor([5, 7, 90])
    model(ids).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters(model))
    assert all(p.grad is None for n, p in model.named_parameters() if ".deltaw." not in n)


def test_dora_on_transposed_layers(ids: torch.Tensor) -> None:
    model = tiny_gpt2().eval()
    before = bits(model)
    fill(attach(model, METHODS["dora"]))
    branch = model(ids).logits
    merge(model)
    torch.testing.assert_close(model(ids).logits, branch, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())
    assert adapters(model).active == "default"


def test_what_is_trained_whole_is_the_bases_own() -> None:
    """Not the A's and B's of an adapter that is on its layers already."""
    model = attach(tiny_llama(), LoRA(rank=2, alpha=5, targets="qv"), name="first")
    attach(model, LoRA(rank=2, alpha=5, targets="mlp", whole="self_attn"), name="second")
    whole = [n for n, u in updates(model, "second").items() if isinstance(u, Replaced)]
    assert len(whole) == 8 and not any("deltaw" in n for n in whole)


def test_a_starts_with_the_variance_that_its_method_says() -> None:
    """Gaussian: 1/k (paper, section 4.1), so that Ax is as large as x. Kaiming: uniform up to 1/sqrt(k), a third of that."""
    torch.manual_seed(0)
    for k in (60, 900):
        A = INITS["gaussian"](300, k, torch.device("cpu"), torch.float64)
        assert A.shape == (300, k) and A.dtype == torch.float64
        assert float(A.std()) == pytest.approx(k**-0.5, rel=0.02) and abs(float(A.mean())) < 0.02 * k**-0.5
        assert float(A.abs().max()) > 3 * k**-0.5
        A = INITS["kaiming"](300, k, torch.device("cpu"), torch.float32)
        assert float(A.std()) == pytest.approx((3 * k) ** -0.5, rel=0.02)
        assert 0.99 * k**-0.5 < float(A.abs().max()) <= k**-0.5 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, {2: 1.0, 8: 1.0}),
        ({"alpha": 6.0}, {2: 3.0, 8: 0.75}),
        ({"scaling": "alpha/sqrt(r)"}, {4: 2.0, 9: 3.0}),
        ({"alpha": 6.0, "scaling": "alpha/sqrt(r)"}, {4: 3.0, 9: 2.0}),
    ],
    ids=str,
)
def test_the_scale_without_alpha_is_of_each_layers_rank(settings: dict[str, Any], scales: dict[int, float]) -> None:
    method = LoRA(rank=5, **settings)
    assert {rank: method.scale(rank) for rank in scales} == pytest.approx(scales)
    model = attach(tiny_llama(), LoRA(rank=5, targets={"q": 4, "down": 9}, **settings))
    live = {update.rank: update.scale for update in updates(model).values()}
    assert live == pytest.approx({rank: method.scale(rank) for rank in (4, 9)})


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
def test_doras_norm_is_of_what_a_and_b_and_w0_are_now(change: str, mode: Any, model: Any, ids: torch.Tensor) -> None:
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


@torch.no_grad()
def test_generate_computes_a_norm_once(model: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.methods.updates import dora as module

    genuine, count = module.row_norms, 0

    def counted(*given: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return genuine(*given)

    fill(attach(model, DoRA(rank=3, alpha=5)))
    monkeypatch.setattr("deltaw.methods.updates.dora.row_norms", counted)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    first = model.generate(ids, **settings)
    assert count == len(updates(model))
    for parameter in parameters(model):
        parameter.data *= -2
    assert not torch.equal(model.generate(ids, **settings), first)
    assert count == 2 * len(updates(model))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "adamw_torch", "by .data"])
def test_dora_trained_by_any_optimizer_is_what_is_loaded_again(
    optimizer: str, ids: torch.Tensor, tmp_path: Path
) -> None:
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
