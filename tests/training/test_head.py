"""The chunked loss of a frozen head: PyTorch's cross-entropy of all logits at once."""

import pytest
import torch

from deltaw.training.head import AfterHead, chunked_cross_entropy


@pytest.mark.parametrize("chunk", [1, 40, 10_000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("after", [AfterHead(), AfterHead(0.3), AfterHead(1.0, 2.0), AfterHead(1.7, 2.0)])
def test_losses_and_gradients_are_pytorchs_whatever_the_chunk(chunk: int, bias: bool, after: AfterHead) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 6, requires_grad=True)
    weight, b = torch.randn(13, 6), torch.randn(13) if bias else None
    targets = torch.randint(0, 13, (9,))
    logits = after(torch.nn.functional.linear(hidden, weight, b))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
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
    expected = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")
    losses = chunked_cross_entropy(hidden, weight, None, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)
    ours, theirs = (torch.autograd.grad(of.sum(), hidden)[0].float() for of in (losses, expected))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
