"""Losses in chunks of the head: the same as through the whole head, and a head that computes otherwise is called."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.training.head import cross_entropy, is_frozen_linear


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
