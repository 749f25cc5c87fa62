"""torch.optim's optimizers over flat buffers take the steps that they would take over A's and B's one by one; and the learning rate
over a run, by steps, and by the clock where that is further on."""

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
from deltaw.training.optim import lr_factor
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


def factors(config: TrainConfig, steps: int, total: int, seconds_a_step: float = 0.0) -> list[float]:
    return [lr_factor(config, step, total, step * seconds_a_step) for step in range(steps)]


@pytest.mark.parametrize("warmup", [4, 0.2])
def test_warm_up_in_steps_or_as_a_share_then_linear_to_zero(warmup: float) -> None:
    rates = factors(TrainConfig(warmup=warmup, schedule="linear"), 20, 20)
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, *(1 - i / 16 for i in range(16))])


def test_constant_and_cosine_after_warm_up() -> None:
    assert factors(TrainConfig(warmup=0, schedule="constant"), 5, 5) == [1.0] * 5
    rates = factors(TrainConfig(warmup=0, schedule="cosine"), 4, 4)
    assert rates == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_clock_that_ends_long_before_the_steps_still_warms_up_and_goes_to_zero(schedule: Any) -> None:
    config = TrainConfig(warmup=0.1, schedule=schedule, minutes=1)
    rates = factors(config, 61, 100_000, seconds_a_step=1.0)
    assert rates.index(max(rates)) == 6 and max(rates) == 1.0  # a tenth of the minute
    assert rates[:7] == sorted(rates[:7]) and rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[-2] < 0.05 and rates[-1] == 0.0


def test_a_clock_with_time_to_spare_changes_nothing() -> None:
    steps = factors(TrainConfig(warmup=0.1), 50, 50)
    assert factors(TrainConfig(warmup=0.1, minutes=60), 50, 50, seconds_a_step=0.5) == steps


def test_steps_of_warm_up_know_no_clock() -> None:
    rates = factors(TrainConfig(warmup=10, minutes=1, schedule="linear"), 12, 1000, seconds_a_step=3.0)
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[11] == pytest.approx(1 - 33 / 60)
