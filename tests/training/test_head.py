"""The chunked loss of a frozen head is PyTorch's cross-entropy of all logits at once; a head that computes otherwise is called."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.training.head import AfterHead, chunked_cross_entropy, cross_entropy, is_frozen_linear


@pytest.mark.parametrize("chunk", [1, 40, 10_000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("after", [AfterHead(), AfterHead(0.3), AfterHead(1.0, 2.0), AfterHead(1.7, 2.0)])
def test_losses_and_gradients_are_pytorchs_whatever_the_chunk(chunk: int, bias: bool, after: AfterHead) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 6, requires_grad=True)
    weight, b = torch.randn(13, 6), torch.randn(13) if bias else None
    targets = torch.randint(0, 13, (9,))
    logits = after(F.linear(hidden, weight, b))
    expected = F.cross_entropy(logits, targets, reduction="none")
    losses = chunked_cross_entropy(hidden, weight, b, targets, after, chunk=chunk, cached=chunk)
    torch.testing.assert_close(losses, expected)
    g = torch.randn(9)
    torch.testing.assert_close(torch.autograd.grad(losses, hidden, g)[0], torch.autograd.grad(expected, hidden, g)[0])
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(hidden, weight, b, targets, after, chunk=chunk), expected)


def test_the_loss_of_a_bfloat16_head_is_that_of_its_logits_in_float32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 64).bfloat16().requires_grad_()
    weight, targets = torch.randn(200, 64).bfloat16(), torch.randint(0, 200, (9,))
    expected = F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")
    losses = chunked_cross_entropy(hidden, weight, None, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)
    ours, theirs = (torch.autograd.grad(of.sum(), hidden)[0].float() for of in (losses, expected))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


class Named(nn.Linear):
    """A subclass that computes what `nn.Linear` does."""


class Doubled(nn.Linear):
    """A subclass that computes otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_frozen_head_that_computes_as_nn_linear_is_one_product() -> None:
    for cls in (nn.Linear, Named):
        head = cls(8, 12)
        assert not is_frozen_linear(head)
        assert is_frozen_linear(head.requires_grad_(False))
    assert not is_frozen_linear(Doubled(8, 12).requires_grad_(False))


def test_a_head_whose_forward_was_replaced_on_the_object_is_called() -> None:
    """accelerate does so to offload a layer: its weight is no value that could be multiplied by."""
    torch.manual_seed(0)
    head = nn.Linear(8, 12).requires_grad_(False)
    forward = head.forward
    head.forward = lambda x: 3 * forward(x)  # type: ignore[method-assign]
    hidden, targets = torch.randn(5, 8), torch.randint(12, (5,))
    expected = F.cross_entropy(head(hidden), targets, reduction="none")
    torch.testing.assert_close(cross_entropy(hidden, head, targets), expected)
