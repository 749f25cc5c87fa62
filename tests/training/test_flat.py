"""Training on flat buffers gives the same values and gradients as layer by layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPTJConfig, GPTJForCausalLM

from deltaw import LoRA, attach
from deltaw.model.summary import parameters, updates
from deltaw.training.flat import Flat
from deltaw.training.together import largest_inputs, same_input
from tests.conftest import MAKERS, assert_same, fill, snapshot, tiny_llama


def tiny_bert() -> Any:
    config = BertConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config)


def tiny_gptj() -> Any:
    """Attention and MLP read the same tensor, but not one after the other."""
    config = GPTJConfig(
        n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=64, vocab_size=96, n_inner=56,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPTJForCausalLM(config)


MODELS = MAKERS | {"bert": tiny_bert, "gptj": tiny_gptj}


def prepared(make: Callable[[], Any], *, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    torch.manual_seed(1)
    model = make().to(dtype)
    settings = {"targets": "all-linear", "rank": 3, "alpha": 5, **settings}
    fill(attach(model, LoRA(**settings)))
    return model.train()


def flat_of(model: Any, ids: Tensor, *, int8: bool = False) -> Flat:
    adapted = updates(model)
    with torch.no_grad():
        groups = same_input(adapted, lambda: model(ids))
        largest = largest_inputs(adapted, lambda: model(ids)) if int8 else {}
    return Flat({name: model.get_submodule(name) for name in adapted}, adapted, groups, int8=largest)


def layers_of(model: Any) -> list[str]:
    return list(updates(attach(model, LoRA())))


def measure(model: Any, ids: Tensor) -> Tensor:
    out = model(ids)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).pow(2).mean()


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("ranks", [(3,), (3, 2)])  # at alpha 5; scales that differ within a group
def test_loss_and_gradients_are_those_of_the_layers_one_by_one(name: str, ranks: tuple[int, ...], ids: Tensor) -> None:
    targets = {layer: ranks[i % len(ranks)] for i, layer in enumerate(layers_of(MODELS[name]()))}
    model = prepared(MODELS[name], targets=targets)
    expected = measure(model, ids)
    gradients = torch.autograd.grad(expected, parameters(model), allow_unused=True, materialize_grads=True)
    before = snapshot(model)
    with flat_of(model, ids) as flat:
        for times in (1, 2):  # gradients of several micro-batches add up
            loss = measure(model, ids)
            torch.testing.assert_close(loss, expected)
            loss.backward()
            flat.add_gradients()
            for parameter, gradient in zip(parameters(model), gradients, strict=True):
                torch.testing.assert_close(parameter.grad, times * gradient)
    assert_same(model, before)
    assert all(p.is_contiguous() and p.grad is None and p._base is None for p in parameters(model))
    torch.testing.assert_close(measure(model, ids), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_step_after_a_refresh_computes_with_the_changed_values(name: str, ids: Tensor) -> None:
    model = prepared(MODELS[name])
    with flat_of(model, ids) as flat:
        for letter in "AB":
            for parameter in flat.parameters(letter):
                parameter.detach().mul_(0.5)
        flat.refresh()
        loss = measure(model, ids)
    torch.testing.assert_close(measure(model, ids), loss)


def test_a_bfloat16_base_adds_gradients_up_in_float32(ids: Tensor) -> None:
    model = prepared(lambda: tiny_llama(layers=1), dtype=torch.bfloat16, targets="q")
    with flat_of(model, ids) as flat:
        (buffer,) = flat.parameters("A")
        measure(model, ids).backward()
        flat.add_gradients()
        once = buffer.grad.clone()
        for _ in range(255):
            measure(model, ids).backward()
            flat.add_gradients()
        assert buffer.dtype == buffer.grad.dtype == torch.float32
        torch.testing.assert_close(buffer.grad, 256 * once)  # bfloat16 would stop growing at 256 times its spacing
    with flat_of(model, ids):
        wide = measure(model, ids)
    torch.testing.assert_close(wide, measure(model, ids), rtol=0.05, atol=1e-3)


def test_evaluation_goes_the_plain_way_bit_for_bit(ids: Tensor) -> None:
    model = prepared(tiny_llama, dtype=torch.float32)
    plain = model.eval()(ids).logits
    with flat_of(model, ids):
        assert torch.equal(model.eval()(ids).logits, plain)


def test_gradient_checkpointing_gives_the_same_gradients(ids: Tensor) -> None:
    model = prepared(tiny_llama, dropout=0.25)
    torch.manual_seed(7)
    gradients = torch.autograd.grad(measure(model, ids), parameters(model))
    for dropout, expected in ((0.25, gradients), (0.0, None)):
        for update in updates(model).values():
            update.dropout = dropout
        expected = expected or torch.autograd.grad(measure(model, ids), parameters(model))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with flat_of(model, ids) as flat:
            torch.manual_seed(7)
            measure(model, ids).backward()
            flat.add_gradients()
            for parameter, gradient in zip(parameters(model), expected, strict=True):
                torch.testing.assert_close(parameter.grad, gradient)
        model.gradient_checkpointing_disable()


class Reads(nn.Module):
    """Two layers whose inputs a test chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(4, 6)
        self.use: Callable[[Tensor], tuple[Tensor, Tensor | None]] = lambda x: (x, x)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.use(x)
        return self.one(first) if second is None else self.one(first) * self.two(second)


def test_layers_that_never_ran_are_named() -> None:
    model = Reads()
    fill(attach(model, LoRA(rank=2, alpha=5)))
    model.use = lambda x: (x, None)
    x = torch.randn(5, 4)
    with flat_of(model.train(), x) as flat:
        assert sorted(flat.groups) == [["one"], ["two"]]
        model(x).sum().backward()
        flat.add_gradients()
        assert flat.unreached() == ["two"]


def test_an_error_inside_gives_the_tensors_back(ids: Tensor) -> None:
    model = prepared(tiny_llama)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), flat_of(model, ids):
        measure(model, ids)
        raise KeyboardInterrupt
    assert_same(model, before)
    assert all(u.elsewhere is None for u in updates(model).values())


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_products_in_8_bits_are_near_and_leave_the_base_as_it_is(name: str, dropout: float, ids: Tensor) -> None:
    def some(model: Any, ids: Tensor) -> Tensor:
        out = model(ids)  # a norm makes the sum of all entries of a state the same, whatever they are
        return (out.logits if hasattr(out, "logits") else out.last_hidden_state)[..., :5].pow(2).mean()

    model = prepared(MODELS[name], dtype=torch.float32, dropout=dropout)
    before = snapshot(model)
    values: list[list[Tensor]] = []
    for int8 in (False, True):
        with flat_of(model, ids, int8=int8) as flat:
            torch.manual_seed(3)
            loss = some(model, ids)
            loss.backward()
            flat.add_gradients()
            slopes = torch.cat([p.grad.flatten().clone() for p in parameters(model)])
            model.eval()
            values.append([loss.detach(), slopes, some(model, ids).detach()])
            model.train()
    full, few = values
    assert few[0] != full[0] and float(few[0]) == pytest.approx(float(full[0]), rel=0.05)
    assert float(torch.cosine_similarity(full[1], few[1], dim=0)) > 0.99
    assert torch.equal(full[2], few[2]), "scores are of the weights as they are"
    assert_same(model, before)
