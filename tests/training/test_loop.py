"""The loop by itself: what one step does to the parameters, what is counted and logged, when it evaluates, and when it stops."""

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from deltaw import IA3, BitFit, LoRA, TrainConfig, attach, delta, parameters
from deltaw.data import Example
from deltaw.errors import TrainError
from deltaw.layers.tree import owner_of
from deltaw.model.summary import updates
from deltaw.training.events import Evaluated, Event, Stepped, Warned
from deltaw.training.loop import (
    LoopPlan,
    LoopState,
    checks,
    evaluate,
    held_out_loss,
    opened,
    peak_memory,
    relative_norm,
    run_loop,
    seconds_left,
    should_evaluate,
)
from deltaw.training.loop.checks import Watched
from deltaw.training.losses import CompletionLoss
from tests.conftest import fill, tiny_gpt2, tiny_llama
from tests.training.test_models import examples

T = TypeVar("T")
RECORDS = examples()
SGD: dict[str, Any] = {"optimizer": "SGD", "lr": 0.1, "schedule": "constant", "warmup": 0, "clip": 0.0, "batch": 4}


def model_of(**settings: Any) -> Any:
    torch.manual_seed(0)
    return fill(attach(tiny_llama(), LoRA(**({"rank": 2, "alpha": 3, "targets": "qv"} | settings))))


def values_of(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters(model)])


def planned(model: Any, valid: Any = (), **settings: Any) -> LoopPlan:
    return LoopPlan(CompletionLoss(model), RECORDS, valid, TrainConfig(**settings))


def trained(
    model: Any, *, valid: Any = (), clock: Callable[[], float] = time.monotonic, **changes: Any
) -> tuple[LoopState, list[Event]]:
    events: list[Event] = []
    plan = planned(model, valid, **(SGD | {"steps": 1} | changes))
    return run_loop(replace(plan, on_event=events.append, clock=clock)), events


def moved(**changes: Any) -> Tensor:
    model = model_of()
    before = values_of(model)
    trained(model, **changes)
    return values_of(model) - before


def of_kind(events: list[Event], kind: type[T]) -> list[T]:
    return [event for event in events if isinstance(event, kind)]


def test_a_gradient_longer_than_clip_is_shortened_to_it_and_a_shorter_one_is_left() -> None:
    free = moved()
    norm = float(free.norm()) / 0.1
    short = moved(clip=norm / 5)
    torch.testing.assert_close(short, free / 5, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moved(clip=norm * 5), free)


def test_the_log_tells_the_norm_before_clipping() -> None:
    model = model_of()
    _, events = trained(model, clip=1e-3)
    norm = of_kind(events, Stepped)[0].grad_norm
    assert norm == pytest.approx(float(moved().norm()) / 0.1, rel=1e-4) and norm > 1e-3


def test_a_step_is_as_long_as_the_schedule_says() -> None:
    torch.testing.assert_close(moved(lr=0.2), moved(lr=0.1) * 2, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moved(warmup=4, steps=1), moved() / 5, rtol=1e-4, atol=1e-7)
    model = model_of()
    _, events = trained(model, schedule="linear", steps=4, log_every=1, lr=0.4)
    rates = [event.lr for event in of_kind(events, Stepped)]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_b_learns_faster_by_its_ratio() -> None:
    model = model_of()
    before = {name: (u.A.detach().clone(), u.B.detach().clone()) for name, u in updates(model).items()}
    twin = model_of()
    trained(model)
    trained(twin, lr_ratio=5.0)
    for name, (A, B) in before.items():
        plain, faster = updates(model)[name], updates(twin)[name]
        torch.testing.assert_close(faster.A - A, plain.A - A)
        torch.testing.assert_close(faster.B - B, (plain.B - B) * 5, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_a_step_in_parts_is_the_step(micro_batch: int) -> None:
    torch.testing.assert_close(moved(micro_batch=micro_batch), moved(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("gradient_checkpointing", "passes"), [(False, 1), (True, 2)])
def test_checkpointed_activations_are_computed_twice_and_give_the_same_step(
    gradient_checkpointing: bool, passes: int
) -> None:
    model = model_of()
    before, modes = values_of(model), []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda layer, x: modes.append(layer.training))
    trained(model, gradient_checkpointing=gradient_checkpointing)
    torch.testing.assert_close(values_of(model) - before, moved(), rtol=1e-4, atol=1e-7)
    assert modes.count(True) == passes


def test_parts_are_the_rows_in_order() -> None:
    plan, rows = planned(model_of(), micro_batch=3, batch=7, steps=1), RECORDS[:7]
    assert [len(part) for part in plan.parts(rows)] == [3, 3, 1]
    assert [row for part in plan.parts(rows) for row in part] == rows


def test_steps_are_in_training_mode_evaluations_are_not_and_at_the_end_it_is_off() -> None:
    model = model_of(dropout=0.4).eval()
    modes: list[bool] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    _, events = trained(model, valid=RECORDS[:2], steps=2, eval_every=1)
    assert len(of_kind(events, Evaluated)) == 3 and not model.training
    # A look at one record with the layers' inputs, then evaluation, and a step and an evaluation twice
    assert [mode for mode, before in zip(modes, [None, *modes], strict=False) if mode is not before] == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert held_out_loss(CompletionLoss(model), RECORDS, batch=4) == held_out_loss(
        CompletionLoss(model), RECORDS, batch=4
    )


def test_counts_are_over_the_whole_run() -> None:
    model = model_of()
    state, events = trained(model, steps=5, log_every=2)
    plan, steps = planned(model, **SGD), of_kind(events, Stepped)
    rows = [row for number in range(5) for row in plan.drawn(number)]
    assert (state.step, state.records) == (5, len(rows))
    assert state.tokens == sum(row.length for row in rows)
    assert state.supervised == sum(sum(row.supervised[1:]) for row in rows)
    assert [event.step for event in steps] == [1, 2, 4, 5]
    assert [event.total_steps for event in steps] == [5] * 4
    last = steps[-1]
    assert (last.tokens, last.supervised) == (state.tokens, state.supervised)
    assert state.first_loss == steps[0].loss and state.last_loss == last.loss
    assert 0 < state.step_seconds <= state.seconds and state.eval_seconds == 0
    assert (state.valid_loss, state.best_loss, state.best_step, state.without_gain) == (None, math.inf, 0, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        steps[0].step = 2  # type: ignore[misc]


class Clock:
    """A clock that moves with passes through a model: so many seconds in training, and four in evaluation."""

    def __init__(self, model: Any, step: float) -> None:
        self.now, self.step = 1000.0, step
        model.model.layers[0].register_forward_pre_hook(self.passed)

    def passed(self, module: Any, inputs: Any) -> None:
        self.now += self.step if module.training else 4.0

    def __call__(self) -> float:
        return self.now


def test_seconds_are_those_of_steps_and_evaluations() -> None:
    model = model_of()
    clock = Clock(model, 0.25)
    state, events = trained(model, valid=RECORDS[:2], clock=clock, steps=4, eval_every=3, log_every=2)
    steps = of_kind(events, Stepped)  # of steps 1, 2 and 4
    assert (state.step_seconds, state.eval_seconds, state.seconds) == (1.0, 12.0, 13.0)
    assert [event.seconds for event in steps] == [4.25, 4.5, 9.0]
    assert [event.seconds_left for event in steps] == [0.75, 0.5, 0.0]
    one, two, four = (event.tokens for event in steps)
    assert [event.tokens_per_second for event in steps] == [one / 0.25, (two - one) / 0.25, (four - two) / 0.5]


def test_the_clock_ends_a_run_at_its_minutes() -> None:
    model = model_of()
    state, events = trained(model, clock=Clock(model, 20.0), minutes=1.0, steps=None, epochs=100)
    assert (state.stopped, state.step, state.seconds) == ("minutes", 3, 60.0)
    assert [event.step for event in of_kind(events, Stepped)] == [1, 3]


def test_a_clock_that_stands_still_is_no_error() -> None:
    model = model_of()
    _, events = trained(model, clock=Clock(model, 0.0), steps=2, log_every=1)
    assert all(0 < event.tokens_per_second < math.inf for event in of_kind(events, Stepped))


def test_speed_and_the_time_left_are_those_of_the_steps() -> None:
    model = model_of()
    state, events = trained(model, steps=4, log_every=2)
    one, two, four = of_kind(events, Stepped)
    assert four.seconds_left == 0.0
    assert 0 < two.seconds_left < state.seconds * 4
    tokens = four.tokens - two.tokens
    assert four.tokens_per_second > tokens / state.step_seconds
    assert one.seconds_left > 0
    assert seconds_left(planned(model, steps=8), LoopState(step=2, step_seconds=3.0)) == 9.0


@pytest.mark.parametrize(("seconds", "left"), [(50.0, 10.0), (70.0, 0.0)])
def test_a_timed_run_has_the_seconds_left_that_its_clock_says(seconds: float, left: float) -> None:
    plan = planned(model_of(), minutes=1.0, epochs=100)
    assert seconds_left(plan, LoopState(step=2, step_seconds=30.0, seconds=seconds)) == left


def test_memory_is_the_most_that_this_process_held() -> None:
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert highest <= peak_memory() < 2 * highest


def test_macos_counts_memory_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert highest <= peak_memory() < 2 * highest


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eval_every": 3}, [0, 3, 6, 7]),
        ({"steps": 20}, list(range(0, 21, 2))),
        ({"steps": 5}, [0, 1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_when_it_evaluates(settings: dict[str, Any], expected: list[int]) -> None:
    _, events = trained(model_of(), valid=RECORDS[:2], **({"steps": 7} | settings))
    assert [event.step for event in of_kind(events, Evaluated)] == expected
    losses = [event.valid_loss for event in of_kind(events, Evaluated)]
    bests = [event.best_loss for event in of_kind(events, Evaluated)]
    assert bests == [min(losses[: i + 1]) for i in range(len(losses))]


def test_evaluations_take_no_more_than_their_share_of_a_timed_run() -> None:
    plan = planned(model_of(), RECORDS[:2], minutes=10.0, epochs=1000)

    def due(seconds: float, last: float, tenths: int, **changes: Any) -> bool:
        state = LoopState(step=50, seconds=seconds, eval_seconds=14.0, tenths=tenths, **changes)
        return should_evaluate(plan, state, last)

    assert due(120.0, 10.0, tenths=1) and not due(120.0, 10.0, tenths=2)  # the second tenth, once
    assert not due(181.0, 30.0, tenths=2)  # 44 s of 181 s are more than a fifth
    assert due(241.0, 30.0, tenths=3)  # of 241 s less
    assert due(241.0, 30.0, tenths=4, stopped="minutes")


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_counts_evaluations_without_gain(patience: int) -> None:
    state, events = trained(model_of(), valid=RECORDS[:3], lr=1e-30, patience=patience, eval_every=2, steps=50)
    assert state.stopped == "early" and state.step == 2 * patience
    assert [event.step for event in of_kind(events, Evaluated)] == [2 * i for i in range(patience + 1)]


def test_the_best_adapter_is_kept_where_it_was_not_the_last() -> None:
    model = model_of()
    state, _ = trained(model, valid=RECORDS[:3], lr=60.0, patience=2, eval_every=1, steps=9)
    assert state.best_step < state.step and state.stopped == "early"
    kept = held_out_loss(CompletionLoss(model), RECORDS[:3], batch=8)
    assert kept == pytest.approx(state.best_loss, rel=1e-5)
    without = model_of()
    state, _ = trained(without, valid=RECORDS[:3], lr=60.0, eval_every=1, steps=state.step)
    assert held_out_loss(CompletionLoss(without), RECORDS[:3], batch=8) == pytest.approx(state.valid_loss)
    assert state.valid_loss is not None and state.valid_loss > state.best_loss


def test_being_asked_to_stop_ends_it_after_the_step_and_its_evaluation() -> None:
    events: list[Event] = []
    plan = planned(model_of(), RECORDS[:2], **SGD, steps=9, eval_every=1)
    asked = replace(plan, on_event=events.append, should_stop=lambda: len(of_kind(events, Evaluated)) == 3)
    state = run_loop(asked)
    assert state.stopped == "interrupted"
    assert state.step == 2 and [event.step for event in of_kind(events, Evaluated)] == [0, 1, 2]
    assert of_kind(events, Stepped)[-1].step == 2


def test_a_held_out_loss_is_the_mean_over_tokens_whatever_the_batch() -> None:
    model = model_of().eval()
    loss = CompletionLoss(model)
    with torch.no_grad():
        pairs = [loss(loss.collate([record])) for record in RECORDS]
    mean = float(sum(total for total, _ in pairs)) / sum(count for _, count in pairs)
    for batch in (1, 5, 12):
        assert held_out_loss(loss, RECORDS, batch=batch) == pytest.approx(mean, rel=1e-5)
    model.train()
    held_out_loss(loss, RECORDS, batch=5)
    assert model.training


@pytest.mark.parametrize(("batch", "sizes"), [(4, [8, 4]), (10, [10, 2])])
def test_held_out_records_come_in_batches_of_eight_at_least(batch: int, sizes: list[int]) -> None:
    model = model_of()
    with opened(planned(model, RECORDS, **SGD | {"batch": batch, "steps": 1}), LoopState()) as loop:
        rows: list[int] = []
        model.model.layers[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
        evaluate(loop)
    assert rows == sizes and len(RECORDS) == 12


def test_the_relative_norm_is_that_of_all_layers_together() -> None:
    model = model_of()
    layers = updates(model)
    W0 = torch.cat([owner_of(model).get_submodule(name).weight.detach().flatten() for name in layers])
    dW = torch.cat([delta(model, name).flatten() for name in layers])
    assert relative_norm(model) == pytest.approx(float(dW.norm() / W0.norm()), rel=1e-4)


def test_what_was_zero_and_is_not_any_more_has_learned() -> None:
    """Biases of a fresh GPT-2 are zero: a share of nothing was taken for nothing learned."""
    torch.manual_seed(0)
    model = attach(tiny_gpt2(layers=1), BitFit())
    assert relative_norm(model) == 0.0
    _, events = trained(model, valid=RECORDS[:1], steps=20, eval_every=20)
    assert relative_norm(model) == math.inf and not of_kind(events, Warned)


def test_nothing_learned_is_said_after_twenty_steps_and_not_before() -> None:
    for steps, warned in ((19, False), (20, True)):
        torch.manual_seed(0)
        model = attach(tiny_llama(layers=1), LoRA(rank=2, alpha=3, targets="v"))
        _, events = trained(model, valid=RECORDS[:1], lr=1e-30, steps=steps, eval_every=steps)
        assert any("nothing is learned" in event.text for event in of_kind(events, Warned)) == warned
    _, events = trained(model_of(), valid=RECORDS[:1], lr=1e-30, steps=20, eval_every=20)
    assert not of_kind(events, Warned)


def watched(loss: float, norm: float, scale: float | None) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    Watched(4, torch.tensor(loss), torch.tensor(norm), 0.25).check(scaler)


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "allowed"),
    [
        (1.0, 2.0, None, True),
        (math.nan, 2.0, None, False),
        (math.inf, 2.0, 64.0, False),
        (1.0, math.inf, None, False),
        (1.0, math.nan, 64.0, True),
        (1.0, math.inf, 64.0, True),
        (1.0, math.inf, 2.0, True),
        (1.0, math.inf, 1.0, False),
    ],
)
def test_what_is_not_finite_is_an_error_unless_the_scaler_made_it_so(
    loss: float, norm: float, scale: float | None, allowed: bool
) -> None:
    if allowed:
        watched(loss, norm, scale)
    else:
        with pytest.raises(TrainError, match="at step 5") as error:
            watched(loss, norm, scale)
        assert "--lr (it was 0.25)" in str(error.value)


def with_spares(count: int, targets: str) -> Any:
    """A model with layers that no pass goes through."""
    torch.manual_seed(0)
    model: Any = tiny_llama()
    model.spare = torch.nn.ModuleList(torch.nn.Linear(8, 6) for _ in range(count))
    return attach(model, LoRA(rank=2, alpha=3, targets=targets))


@pytest.mark.parametrize(("count", "named"), [(1, 1), (5, 5), (6, 5)])
def test_layers_that_took_no_part_are_counted_and_five_are_named(count: int, named: int) -> None:
    _, events = trained(with_spares(count, "spare.*,q"), steps=2)
    (warning,) = of_kind(events, Warned)
    text = warning.text
    assert (
        warning.step == 0 and text.startswith(f"{count} adapted layers took no part") and text.count("spare.") == named
    )
    assert text.endswith(" and 1 more.") == (count > named)


def test_where_none_took_part_five_are_named() -> None:
    with pytest.raises(TrainError, match="No adapted layer took part in the first step") as error:
        trained(with_spares(7, "spare.*"))
    assert str(error.value).count("spare.") == 5


@pytest.mark.parametrize(("late", "steps"), [(False, 3), (True, 4)])
def test_a_step_that_is_not_finite_moves_nothing(late: bool, steps: int) -> None:
    """On a GPU it is noticed while the next one is computed."""
    model, state = model_of(), LoopState()
    before: list[Tensor] = []

    def meet(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            before.append(values_of(model))
            model.model.norm.register_forward_hook(lambda module, inputs, output: output * math.nan)

    plan = replace(planned(model, **SGD, steps=9, log_every=1), on_event=meet, check_late=late)
    with pytest.raises(TrainError, match="The loss is nan and the gradient norm nan at step 4"):
        run_loop(plan, state)
    assert torch.equal(values_of(model), before[0]) and state.step == steps


def test_checking_late_changes_no_bit() -> None:
    learned = []
    for late in (False, True):
        model = model_of()
        run_loop(replace(planned(model, **SGD, steps=4), check_late=late))
        learned.append(values_of(model))
    assert torch.equal(*learned)


@pytest.mark.parametrize(
    ("method", "settings", "valid", "lines"),
    [
        (LoRA(rank=2), {"lr_ratio": 4.0}, 0, []),
        (IA3(), {"lr_ratio": 1.0}, 0, []),
        (IA3(), {"lr_ratio": 4.0}, 0, ["lr_ratio is 4, and the adapter has no B"]),
        (LoRA(rank=2), {"patience": 2, "eval_every": 3}, 1, []),
        (
            LoRA(rank=2),
            {"patience": 2, "eval_every": 3},
            0,
            ["patience is 2, and there are no held-out records", "eval_every is 3, and there are no held-out records"],
        ),
        (LoRA(rank=2), {"warmup": 2, "steps": 2}, 0, ["lr is never reached, the warm-up takes 2 of 2 steps"]),
        (LoRA(rank=2), {"warmup": 5, "steps": 2}, 0, ["lr is never reached, the warm-up takes 5 of 2 steps"]),
        (LoRA(rank=2), {"share": "group", "batch": 1}, 0, ["share is group, and a step has one record"]),
        (LoRA(rank=2), {"share": "group", "batch": 1, "batch_tokens": 90}, 0, []),
        (LoRA(rank=2), {"warmup": 2, "steps": 3}, 0, []),
        (LoRA(rank=2), {"warmup": 2, "steps": 1}, 0, []),
        (LoRA(rank=2), {"warmup": 2, "steps": 2, "minutes": 9.0}, 0, []),
    ],
    ids=str,
)
def test_settings_without_an_effect_are_said(
    method: Any, settings: dict[str, Any], valid: int, lines: list[str]
) -> None:
    torch.manual_seed(0)
    _, events = trained(attach(tiny_llama(layers=1), method), valid=RECORDS[:valid], **settings)
    texts = [event.text for event in of_kind(events, Warned)]
    assert texts == [f"A setting has no effect: {line}." for line in lines]


@pytest.mark.parametrize("faster", [True, False])
def test_int8_where_it_is_slow_or_reaches_nothing_is_said(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "is_faster", lambda device: faster)
    slow = "Products in int8 are slower than full ones on this machine: leave --frozen-dtype out, or take auto."
    idle = "frozen_dtype is int8, and no layer that takes an update by A and B multiplies by a weight as it is"
    for method, lines in ((LoRA(rank=2), []), (IA3(), [f"A setting has no effect: {idle}."])):
        _, events = trained(attach(tiny_llama(layers=1), method), frozen_dtype="int8", steps=2)
        assert [event.text for event in of_kind(events, Warned)] == lines + ([] if faster else [slow])


def test_a_run_in_int8_learns_what_a_full_one_does() -> None:
    curves = []
    for frozen_dtype in ("full", "int8"):
        torch.manual_seed(0)
        _, events = trained(
            attach(tiny_llama(layers=2), LoRA(rank=2)), frozen_dtype=frozen_dtype, steps=12, log_every=1
        )
        curves.append([event.loss for event in of_kind(events, Stepped)])
    assert curves[0] != curves[1] and curves[1] == pytest.approx(curves[0], rel=0.01)


def test_examples_are_what_the_order_draws() -> None:
    plan = planned(model_of(), batch=5, steps=3, seed=7)
    drawn: list[Example] = plan.drawn(1)
    assert drawn == [RECORDS[i] for i in plan.order.at(1)] and drawn


class Bare(torch.nn.Module):
    """A model without any way to compute activations again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama(layers=1)

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def test_a_model_that_cannot_checkpoint_is_refused_by_name() -> None:
    model = attach(Bare(), LoRA(rank=2, alpha=3, targets="q"))
    with pytest.raises(TrainError, match="A Bare has no way to compute activations again"):
        trained(model, gradient_checkpointing=True)
