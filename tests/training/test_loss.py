"""The objective: the loss is the sum computed by hand, by either path, and no [tokens, vocabulary] tensor is made."""

from typing import Any

import pytest
import torch

from deltaw import LoRA, attach
from deltaw.attached import parameters
from deltaw.data import Batch, Example, collate
from deltaw.training import loss as loss_module
from deltaw.training.loss import CompletionLoss, chunked_cross_entropy
from tests.conftest import MAKERS, fill, tiny_llama

EXAMPLES = [
    Example([5, 9, 11, 4, 2], [False, False, True, True, True], "a:1"),
    Example([7, 8, 2], [False, True, True], "a:2"),
    Example([3, 6, 9, 12, 15, 18, 2], [False, False, False, False, True, False, True], "a:3"),
]


def by_hand(model: Any, examples: list[Example]) -> tuple[float, int]:
    """Σ −log p(y_t | x, y_<t), one record at a time, straight from the definition."""
    total, count = 0.0, 0
    for example in examples:
        logits = model(torch.tensor([example.input_ids])).logits[0].double()
        for t, wanted in enumerate(example.supervised):
            if wanted:
                p = logits[t - 1].exp() / logits[t - 1].exp().sum()
                total -= float(p[example.input_ids[t]].log())
                count += 1
    return total, count


@pytest.mark.parametrize("path", ["chunked", "logits"])
def test_the_loss_is_the_sum_computed_by_hand(tiny: Any, path: str) -> None:
    fill(attach(tiny, LoRA(rank=4, alpha=10)))
    measure = CompletionLoss(tiny)
    assert measure.path == "chunked"
    if path == "logits":
        measure.head = None
    with torch.no_grad():
        total, count = measure(collate(EXAMPLES, 0))
        expected, expected_count = by_hand(tiny, EXAMPLES)
    assert count == expected_count == 7
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_both_paths_give_the_same_gradients(tiny: Any) -> None:
    fill(attach(tiny, LoRA(rank=4, alpha=10)))
    measure = CompletionLoss(tiny)
    chunked = torch.autograd.grad(measure(collate(EXAMPLES, 0))[0], parameters(tiny))
    measure.head = None
    for ours, theirs in zip(
        chunked, torch.autograd.grad(measure(collate(EXAMPLES, 0))[0], parameters(tiny)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 40, 10_000])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_cross_entropy(chunk: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(9, 6, requires_grad=True)
    weight, b = torch.randn(13, 6), torch.randn(13) if bias else None
    targets = torch.randint(0, 13, (9,))
    expected = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(hidden, weight, b), targets, reduction="none"
    )
    found = chunked_cross_entropy(hidden, weight, b, targets)
    torch.testing.assert_close(found, expected)
    g = torch.randn(9)
    torch.testing.assert_close(torch.autograd.grad(found, hidden, g)[0], torch.autograd.grad(expected, hidden, g)[0])


def test_logits_never_exist_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fill(attach(tiny_llama(), LoRA(rank=4, alpha=10)))
    measure = CompletionLoss(model)
    measure(collate(EXAMPLES, 0))  # the one check against the model's own logits
    heights: list[int] = []
    model.lm_head.register_forward_hook(lambda m, i, o: heights.append(-1))
    plain = torch.nn.functional.linear
    monkeypatch.setattr(
        loss_module.F,
        "linear",
        lambda x, w, b=None: (heights.append(len(x)), plain(x, w, b))[1] if len(w) == 96 else plain(x, w, b),
    )
    many = EXAMPLES * 20
    total, count = measure(collate(many, 0))
    total.backward()
    assert count == 140
    # All 400 positions of the rows have hidden states; only the supervised ones, up to a round number, have logits
    assert heights == [160]


def test_a_head_of_its_own_kind_falls_back_to_the_models_logits(caplog: pytest.LogCaptureFixture) -> None:
    class Doubled(type(tiny_llama())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    torch.manual_seed(0)
    model = Doubled(tiny_llama().config).eval()
    attach(model, LoRA(rank=4, alpha=10))
    measure = CompletionLoss(model)
    with torch.no_grad():
        total, _ = measure(collate(EXAMPLES, 0))
        assert float(total) == pytest.approx(by_hand(model, EXAMPLES)[0], rel=1e-5)
    assert measure.path == "logits" and "not a plain linear map" in caplog.text


@pytest.mark.parametrize("kind", list(MAKERS))
def test_an_adapted_head_is_used_as_adapted(kind: str) -> None:
    model = MAKERS[kind]().eval()
    fill(attach(model, LoRA(rank=4, alpha=10, targets="lm_head")))
    measure = CompletionLoss(model)
    assert measure.path == "logits"
    with torch.no_grad():
        assert float(measure(collate(EXAMPLES, 0))[0]) == pytest.approx(by_hand(model, EXAMPLES)[0], rel=1e-5)


def test_per_token_losses_know_their_rows(tiny: Any) -> None:
    losses, rows = CompletionLoss(tiny).per_token(collate(EXAMPLES, 0))
    assert rows.tolist() == [0, 0, 0, 1, 1, 2, 2]
    with torch.no_grad():
        expected, _ = by_hand(tiny, EXAMPLES[1:2])
    assert float(losses[3:5].sum()) == pytest.approx(expected, rel=1e-5)


def test_padding_is_not_attended_to(tiny: Any) -> None:
    batch = collate(EXAMPLES, 0)
    other = Batch(torch.where(batch.attention_mask.bool(), batch.input_ids, 77), batch.attention_mask, batch.supervised)
    with torch.no_grad():
        torch.testing.assert_close(CompletionLoss(tiny)(batch)[0], CompletionLoss(tiny)(other)[0])
