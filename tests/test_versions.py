"""That a change of a tensor is seen, whoever makes it."""

from typing import Any

import pytest
import torch

from deltaw import attach, detach
from deltaw.base_identity import base_fingerprint
from deltaw.methods.dora import DoRA
from deltaw.versions import version_of
from tests.conftest import tiny_llama


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {}], ids=["fused", "foreach", "loop"])
def test_steps_of_optimizers_are_seen(settings: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], **settings)
    seen = {version_of(parameter)}
    for _ in range(3):
        parameter.grad = torch.ones(4)
        optimizer.step()
        seen.add(version_of(parameter))
    assert len(seen) == 4


def test_a_base_that_is_trained_whole_in_between_is_another_one() -> None:
    model = tiny_llama()
    first = base_fingerprint(attach(model, DoRA(rank=2)))
    detach(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.arange(9)[None]).logits.square().mean().backward()
    optimizer.step()
    assert base_fingerprint(attach(model, DoRA(rank=2))).compare(first) == "different"


def test_doras_norm_follows_a_fused_step() -> None:
    torch.manual_seed(0)
    model, ids = attach(tiny_llama().eval(), DoRA(rank=2, alpha=5)), torch.arange(9)[None]
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=0.1, fused=True)
    model(ids).logits.square().mean().backward()
    with torch.no_grad():
        model(ids)
    optimizer.step()
    with torch.no_grad():
        stale = model(ids).logits
        for parameter in own:
            parameter.mul_(1.0)
        torch.testing.assert_close(model(ids).logits, stale)
