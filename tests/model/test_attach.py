"""Attach, detach and switch: the design's invariants 1, 2 and 5 over layer kinds and dtypes. No scale is 1."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import deltaw
from deltaw import LoRA, attach, detach, merge, unmerge, use, using
from deltaw.errors import AdapterError, MergeError, TargetError
from deltaw.model.summary import parameters, updates
from tests.conftest import MAKERS, assert_same, bits, fill, snapshot, tiny_llama

METHOD = LoRA(rank=4, alpha=10)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attach_changes_no_output(tiny: Any, ids: torch.Tensor, dtype: torch.dtype) -> None:
    tiny.to(dtype)
    before = tiny(ids).logits
    assert attach(tiny, METHOD) is tiny
    assert torch.equal(tiny(ids).logits, before)
    with torch.no_grad():
        assert torch.equal(tiny(ids).logits, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_inactive_adapter_changes_nothing(tiny: Any, ids: torch.Tensor, dtype: torch.dtype) -> None:
    tiny.to(dtype)
    before = tiny(ids).logits
    fill(attach(tiny, METHOD))
    assert not torch.equal(tiny(ids).logits, before)
    with using(tiny, None):
        assert torch.equal(tiny(ids).logits, before)
    assert deltaw.adapters(tiny).active == "default"


def test_only_updates_train(tiny: Any, ids: torch.Tensor) -> None:
    before = bits(tiny)
    attach(tiny, LoRA(rank=4, alpha=10, dropout=0.1)).train()
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=0.01, weight_decay=0.1)
    start = [p.detach().clone() for p in parameters(tiny)]
    for _ in range(3):
        tiny(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(bits(tiny)[n], v) for n, v in before.items())
    assert all(not torch.equal(p, s) for p, s in zip(parameters(tiny), start, strict=True))
    trainable = [n for n, p in tiny.named_parameters() if p.requires_grad]
    assert len(trainable) == len(parameters(tiny)) and all(".deltaw.default." in n for n in trainable)


@pytest.mark.parametrize("merged", [False, True])
def test_detach_gives_back_the_same_object(tiny: Any, ids: torch.Tensor, merged: bool) -> None:
    tiny.model.layers[0].mlp.up_proj.weight.requires_grad_(False) if hasattr(tiny, "model") else None
    before, output = snapshot(tiny), tiny(ids).logits
    fill(attach(tiny, METHOD, name="a"))
    fill(attach(tiny, LoRA(rank=2, alpha=3, targets="mlp"), name="b"))
    if merged:
        merge(tiny)
    assert detach(tiny, "b") is tiny
    assert detach(tiny) is tiny
    assert_same(tiny, before)
    assert torch.equal(tiny(ids).logits, output)


def test_an_adapter_that_goes_while_another_is_merged_is_not_made_active_again(tiny: Any, ids: torch.Tensor) -> None:
    expected = tiny(ids).logits
    fill(attach(tiny, LoRA(rank=3, alpha=5), name="a"))
    fill(attach(tiny, LoRA(rank=3, alpha=5), name="b"))
    merge(tiny, "a")  # while b is active
    detach(tiny, "b")
    unmerge(tiny)
    assert deltaw.adapters(tiny) == ("a",) and deltaw.adapters(tiny).active is None
    assert torch.equal(tiny(ids).logits, expected)


def test_base_keys_classes_and_ties_stay_while_attached(tiny: Any) -> None:
    keys = set(tiny.state_dict())
    attach(tiny, METHOD)
    assert keys <= set(tiny.state_dict())
    assert all(".deltaw.default." in k for k in set(tiny.state_dict()) - keys)
    assert tiny.get_output_embeddings().weight is tiny.get_input_embeddings().weight
    for name in updates(tiny):
        layer = tiny.get_submodule(name)
        assert isinstance(layer, type(layer).__mro__[1]) and type(layer).__name__ in ("Linear", "Conv1D")


def test_a_failed_attach_leaves_the_model_untouched(tiny: Any) -> None:
    before = snapshot(tiny)
    for method in (
        LoRA(targets="nothing_like_it"),
        LoRA(rank=4, targets={"mlp": 900}),
        LoRA(targets="all-linear,wrong"),
    ):
        with pytest.raises(TargetError):
            attach(tiny, method)
        assert_same(tiny, before)


def test_names_that_are_taken_or_unknown_and_merged_states_are_refused(tiny: Any) -> None:
    with pytest.raises(AdapterError, match="no adapter"):
        use(tiny, "x")
    fill(attach(tiny, METHOD, name="task"))
    with pytest.raises(AdapterError, match="attached already"):
        attach(tiny, METHOD, name="task")
    with pytest.raises(AdapterError, match=r"no adapter 'tusk' \(did you mean 'task'\?\). Attached: task"):
        use(tiny, "tusk")
    with pytest.raises(AdapterError, match="without dots"):
        attach(tiny, METHOD, name="a.b")
    with pytest.raises(MergeError, match="Nothing is merged"):
        unmerge(tiny)
    merge(tiny)
    for call in (lambda: attach(tiny, METHOD, name="b"), lambda: use(tiny, "task")):
        with pytest.raises(AdapterError, match="unmerge"):
            call()
    with pytest.raises(MergeError, match="merged already"):
        merge(tiny)


@pytest.mark.parametrize("name", ["route", "training", "items", "weight", "été", "a b"])
def test_any_name_without_dots_can_name_an_adapter(tiny: Any, ids: torch.Tensor, name: str) -> None:
    before = snapshot(tiny)
    fill(attach(tiny, METHOD, name=name))
    tiny(ids)
    assert tuple(deltaw.adapters(tiny)) == (name,)
    assert_same(detach(tiny, name), before)


def test_a_layer_shared_by_two_parents_takes_one_update() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(6, 4)).eval()
    x, keys = torch.randn(2, 6), list(model.state_dict())
    before = model(x)
    fill(attach(model, LoRA(rank=2, alpha=5)))
    assert len(updates(model)) == 2
    branch = model(x)
    merge(model)
    torch.testing.assert_close(model(x), branch)
    detach(model)
    assert torch.equal(model(x), before) and list(model.state_dict()) == keys


def test_deepcopy_has_a_life_of_its_own(tiny: Any, ids: torch.Tensor) -> None:
    base = tiny(ids).logits
    fill(attach(tiny, METHOD))
    branch = tiny(ids).logits
    twin = copy.deepcopy(tiny)
    assert torch.equal(twin(ids).logits, branch)
    use(twin, None)
    assert torch.equal(twin(ids).logits, base) and torch.equal(tiny(ids).logits, branch)
    use(twin, "default")
    merge(twin)
    assert torch.equal(tiny(ids).logits, branch)
    detach(twin)
    assert torch.equal(twin(ids).logits, base) and deltaw.adapters(tiny) == ("default",)


@pytest.mark.slow
def test_compile_gives_the_same_values_and_gradients_and_sees_switches(ids: torch.Tensor) -> None:
    torch._dynamo.reset()
    model = fill(attach(tiny_llama(layers=1).eval(), METHOD))
    eager = model(ids, labels=ids).loss
    expected = torch.autograd.grad(eager, parameters(model))
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(ids, labels=ids).loss
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, parameters(model)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    with using(model, None):
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    use(compiled, None)
    assert deltaw.adapters(model).active is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(tiny: Any, ids: torch.Tensor, reentrant: bool) -> None:
    fill(attach(tiny, METHOD)).train()
    expected = torch.autograd.grad(tiny(ids, labels=ids).loss, parameters(tiny))
    tiny.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        tiny.enable_input_require_grads()
    tiny(ids, labels=ids).loss.backward()
    for parameter, gradient in zip(parameters(tiny), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_autocast_changes_outputs_by_rounding_alone_and_gradients_stay_fp32(tiny: Any, ids: torch.Tensor) -> None:
    fill(attach(tiny, METHOD))
    plain = tiny(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loose = tiny(ids, labels=ids)
    loose.loss.backward()
    torch.testing.assert_close(loose.logits.float(), plain, rtol=0.2, atol=0.3)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters(tiny))


def test_train_and_eval_follow_the_layer(tiny: Any, ids: torch.Tensor) -> None:
    fill(attach(tiny, LoRA(rank=4, alpha=10, dropout=0.5)))
    quiet = tiny(ids).logits
    assert torch.equal(tiny(ids).logits, quiet)
    tiny.train()
    assert not torch.equal(tiny(ids).logits, tiny(ids).logits)
    tiny.eval()
    assert torch.equal(tiny(ids).logits, quiet)


def test_loading_base_weights_while_attached_still_works(tiny: Any) -> None:
    state = {k: v.clone() for k, v in tiny.state_dict().items()}
    attach(tiny, METHOD)
    result = tiny.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and all(".deltaw." in k for k in result.missing_keys)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_a_seed_gives_the_same_A_and_a_zero_B(kind: str) -> None:
    drawn = []
    for _ in range(2):
        model = MAKERS[kind]()
        torch.manual_seed(11)
        drawn.append([u.A for u in updates(attach(model, METHOD)).values()])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    B = [u.B for u in updates(model).values()]
    assert not any(b.any() for b in B)
