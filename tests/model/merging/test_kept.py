"""What is kept while adapters are merged: whatever was done since, the original bits come back or an error names the weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import deltaw
from deltaw import LoRA, attach, detach, merge, unmerge
from deltaw.errors import MergeError
from deltaw.model.merging.kept import base_parameters
from tests.conftest import bits, fill, tiny_llama

METHOD = LoRA(rank=4, alpha=10)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def merged_model(keep: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, torch.Tensor]]:
    """An untied model with two adapters merged into it, and its bits before."""
    torch.manual_seed(4)
    model = tiny_llama(tied=False).to(dtype).eval()
    before = bits(model)
    fill(attach(model, METHOD, name="a"), "a", seed=1)
    fill(attach(model, LoRA(rank=2, alpha=7, targets="mlp"), name="b"), "b", seed=2)
    merge(model, weights={"a": 1.5, "b": -0.5}, keep=keep)
    return model, before


def negate_one(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4].neg_()


def exchange_two(model: Any) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight.data
    weight[0, 0], weight[5, 7] = weight[5, 7].clone(), weight[0, 0].clone()


def step(model: Any) -> None:
    weight = model.model.layers[0].mlp.gate_proj.weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def load_other_weights(model: Any, assign: bool = False) -> None:
    state = {n: v + 1 for n, v in model.state_dict().items() if ".deltaw." not in n}
    model.load_state_dict(state, strict=False, assign=assign)


def tie(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.weight = model.model.layers[1].self_attn.q_proj.weight


CHANGES: dict[str, tuple[Any, str]] = {
    "float16": (lambda m: m.half(), "it is float16 now, it was float32"),
    "bfloat16 and back": (lambda m: m.bfloat16().float(), "its values have changed"),
    "float64": (lambda m: m.double(), r"Call model.to\(torch.float32\) first"),
    "one entry": (negate_one, r"layers.1.mlp.up_proj.weight: its values have changed"),
    "two exchanged": (exchange_two, "layers.0.self_attn.q_proj.weight: its values"),
    "a step": (step, "layers.0.mlp.gate_proj.weight: its values"),
    "load_state_dict": (load_other_weights, "its values have changed"),
    "assigned": (lambda m: load_other_weights(m, assign=True), "its values have changed"),
    "tied": (tie, "layers.0.self_attn.q_proj.weight: its values"),
    "gone": (lambda m: delattr(m.model.layers[0].mlp, "up_proj"), "the model no longer has it"),
}


@pytest.mark.parametrize("keep", ["copy", "correction"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_changed_while_merged_are_refused_and_nothing_is_touched(change: str, keep: Any) -> None:
    model, _ = merged_model(keep)
    act, message = CHANGES[change]
    act(model)
    now = {n: p.clone() for n, p in model.named_parameters()}
    for undo in (unmerge, lambda m: unmerge(m, "a"), detach):
        if change == "gone" and undo is detach:
            continue
        with pytest.raises(MergeError, match=rf"(?s)are not what the merge made of them.*{message}.*changed='keep'"):
            undo(model)
        assert all(torch.equal(p, now[n]) for n, p in model.named_parameters())
    with pytest.raises(MergeError, match="merged already"):
        merge(model, "a")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correction_gives_the_same_bits_back_in_less_memory(tiny: Any, ids: torch.Tensor, dtype: torch.dtype) -> None:
    tiny.to(dtype)
    before = bits(tiny)
    fill(attach(tiny, METHOD), size=0.02)
    copied = merge(tiny)
    merged = bits(tiny)
    unmerge(tiny)
    kept = merge(tiny, keep="correction")
    assert all(torch.equal(bits(tiny)[n], v) for n, v in merged.items())
    factors = sum(p.numel() * p.element_size() for p in deltaw.parameters(tiny, "default"))
    assert kept.extra_memory - factors < copied.extra_memory / 2
    assert dict(base_parameters(tiny)).keys() == before.keys()
    assert all(torch.equal(v, before[n]) for n, v in base_parameters(tiny))  # as saving asks for them
    with torch.no_grad():
        for parameter in deltaw.parameters(tiny, "default"):
            parameter.mul_(3.0)  # what is merged is what was merged
    unmerge(tiny)
    assert all(torch.equal(bits(tiny)[n], v) for n, v in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_correction_of_one_16_bit_form_is_not_applied_to_another(dtype: torch.dtype, tmp_path: Any) -> None:
    model, before = merged_model("correction", dtype)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    model.to(torch.float32)
    with pytest.raises(MergeError, match=rf"(?s)it is float32 now.*model.to\({dtype}\) first"):
        unmerge(model)
    with pytest.raises(MergeError, match="float32 now"):
        deltaw.save(model, tmp_path / "a", name="a")
    model.to(dtype)
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())
    merge(model, "a", keep="correction")
    model.to(other)
    with pytest.raises(MergeError, match="are not what"):
        unmerge(model)
    unmerge(model, changed="keep")
    assert deltaw.adapters(model).active == "b"
    merge(model, "a")
    unmerge(model)


def test_copies_go_back_on_request_whatever_was_done_since(ids: torch.Tensor) -> None:
    model, before = merged_model("copy")
    load_other_weights(model)
    norm = model.model.norm.weight.detach().clone()
    unmerge(model, changed="restore")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(model.model.norm.weight, norm)  # no merge has anything of it
    model, before = merged_model("copy")
    model.half()
    unmerge(model, changed="restore")
    assert all(torch.equal(bits(model)[n], v.half()) for n, v in before.items())
    model, before = merged_model("correction")
    negate_one(model)
    with pytest.raises(MergeError, match="up_proj"):
        unmerge(model, changed="restore")
    with pytest.raises(MergeError, match="it can be 'refuse'"):
        unmerge(model, changed="never")  # type: ignore[arg-type]
    kept = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    unmerge(model, changed="keep")
    before["model.layers.1.mlp.up_proj.weight"] = kept
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


@pytest.mark.parametrize("keep", ["copy", "correction"])
def test_whatever_leaves_the_merged_bits_leaves_them_restorable(keep: Any) -> None:
    def assigned(model: Any) -> Any:
        state = {n: v.clone() for n, v in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data.clone()
        return model

    same = [
        lambda m: m.requires_grad_(True),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        assigned,
        lambda m: m.double().float(),
        lambda m: m.train(),
    ]
    for change in same:
        model, before = merged_model(keep)
        model = change(model)
        unmerge(model)
        assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


def test_a_weight_that_was_tied_when_merged_is_given_back_twice_when_it_is_untied(ids: torch.Tensor) -> None:
    torch.manual_seed(1)
    model = tiny_llama(tied=True).eval()
    before = model.lm_head.weight.detach().clone()
    attach(model, LoRA(rank=2, alpha=5, targets="q", whole="embed_tokens"))
    fill(model)
    merge(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    unmerge(model)
    assert torch.equal(model.lm_head.weight, before) and torch.equal(model.model.embed_tokens.weight, before)
    merge(model)
    model.model.layers[0].mlp.other = torch.nn.Module()
    model.model.layers[0].mlp.other.weight = model.model.embed_tokens.weight
    with pytest.raises(MergeError, match=r"embed_tokens.weight: it is tied to model.layers.0.mlp.other.weight now"):
        unmerge(model)


def test_changed_is_a_keyword_of_unmerge_alone() -> None:
    model = fill(attach(tiny_llama().eval(), METHOD))
    merge(model)
    with pytest.raises(TypeError):
        unmerge(model, None, "keep")  # type: ignore[misc]
