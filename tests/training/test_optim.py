"""torch.optim's optimizers over flat buffers: the same steps as over A's and B's one by one."""

import dataclasses
import typing
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw import LoRA, TrainConfig, attach
from deltaw.config import Optimizer
from deltaw.model.summary import parameters, updates
from deltaw.training import optim
from deltaw.training.flat import Flat
from tests.conftest import fill, tiny_llama

NAMES = typing.get_args(Optimizer)


def prepared() -> Any:
    torch.manual_seed(1)
    return fill(attach(tiny_llama().double(), LoRA(rank=3, alpha=5))).train()


def one_by_one(model: Any) -> Flat:
    """Flat buffers, no layers computed together."""
    adapted = updates(model)
    return Flat({n: model.get_submodule(n) for n in adapted}, adapted, [[n] for n in adapted])


def steps(model: Any, ids: Tensor, config: TrainConfig, count: int = 4) -> list[Tensor]:
    """A and B after some steps as the loop takes them."""
    with one_by_one(model) as flat:
        optimizer = optim.make(flat, config)
        for number in range(count):
            optim.set_lr(optimizer, config.lr / (number + 1))
            model(ids).logits.pow(2).mean().backward()
            flat.add_gradients()
            optimizer.step()
            flat.zero_gradients()
            flat.refresh()
    return [p.detach().clone() for p in parameters(model)]


def plain_steps(model: Any, ids: Tensor, config: TrainConfig, count: int = 4) -> list[Tensor]:
    """The same with an optimizer over the parameters as they are."""
    As = [u.A for u in updates(model).values()]
    Bs = [u.B for u in updates(model).values()]
    groups = [{"params": As, "lr": config.lr}, {"params": Bs, "lr": config.lr * config.lr_ratio}]
    optimizer = getattr(torch.optim, config.optimizer)(groups, lr=config.lr, weight_decay=config.weight_decay)
    for number in range(count):
        for group, ratio in zip(optimizer.param_groups, (1.0, config.lr_ratio), strict=True):
            group["lr"] = config.lr / (number + 1) * ratio
        model(ids).logits.pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in parameters(model)]


@pytest.mark.parametrize("name", NAMES)
def test_each_takes_the_steps_that_it_would_take_on_the_parameters_one_by_one(name: str, ids: Tensor) -> None:
    config = TrainConfig(lr=3e-3, optimizer=name, weight_decay=0.01, lr_ratio=4.0)  # type: ignore[arg-type]
    start = [p.detach().clone() for p in parameters(prepared())]
    ours, theirs = steps(prepared(), ids, config), plain_steps(prepared(), ids, config)
    assert not any(torch.equal(a, b) for a, b in zip(ours, start, strict=True))
    tolerance = 2e-2 if name == "Muon" else 1e-6  # Muon orthogonalises in bfloat16
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 1e-2)


def test_the_learning_rate_of_b_is_a_multiple_of_as(ids: Tensor) -> None:
    config = TrainConfig(lr=1e-2, optimizer="SGD", lr_ratio=8.0)
    start = [p.detach().clone() for p in parameters(prepared())]
    plain, plus = (steps(prepared(), ids, c, count=1) for c in (dataclasses.replace(config, lr_ratio=1.0), config))
    for place, (before, one, eight) in enumerate(zip(start, plain, plus, strict=True)):
        ratio = 8.0 if place % 2 else 1.0  # A and B of each layer in turn
        torch.testing.assert_close(eight - before, ratio * (one - before), rtol=1e-3, atol=1e-7)


def test_by_default_nothing_decays(ids: Tensor) -> None:
    config = TrainConfig(lr=1e-2)
    assert config.optimizer == "AdamW" and config.weight_decay == 0.0
    model = prepared()
    start = [p.detach().clone() for p in parameters(model)]
    with one_by_one(model) as flat:
        optim.make(flat, config).step()  # without any gradient
    assert all(torch.equal(p, before) for p, before in zip(parameters(model), start, strict=True))
