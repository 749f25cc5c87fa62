"""The loop by itself: what one step does to the parameters, what is counted and logged, when it evaluates, and when it stops."""

import math
import resource
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw import LoRA, TrainConfig, attach, delta, parameters
from deltaw.attached import owner_of, updates
from deltaw.data import Example
from deltaw.errors import TrainError
from deltaw.training import loop as loop_module
from deltaw.training.loop import Event, Loop, held_out_loss, peak_memory, relative_norm
from deltaw.training.loss import CompletionLoss
from tests.conftest import fill, tiny_llama
from tests.training.test_models import examples

RECORDS = examples()
SGD: dict[str, Any] = {"optimizer": "SGD", "lr": 0.1, "schedule": "constant", "warmup": 0, "clip": 0.0, "batch": 4}


def model_of(**settings: Any) -> Any:
    torch.manual_seed(0)
    return fill(attach(tiny_llama(), LoRA(**({"rank": 2, "alpha": 3, "targets": "qv"} | settings))))


def values_of(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters(model)])


def trained(model: Any, *, valid: Any = (), **changes: Any) -> tuple[Loop, list[Event]]:
    events: list[Event] = []
    loop = Loop(CompletionLoss(model), RECORDS, valid, TrainConfig(**(SGD | {"steps": 1} | changes)), events.append)
    loop.run()
    return loop, events


def moved(**changes: Any) -> Tensor:
    model = model_of()
    before = values_of(model)
    trained(model, **changes)
    return values_of(model) - before


def of_kind(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event.kind == kind]


def test_a_gradient_longer_than_clip_is_shortened_to_it_and_a_shorter_one_is_left() -> None:
    free = moved()
    norm = float(free.norm()) / 0.1
    short = moved(clip=norm / 5)
    torch.testing.assert_close(short, free / 5, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moved(clip=norm * 5), free)


def test_the_log_tells_the_norm_before_clipping() -> None:
    model = model_of()
    _, events = trained(model, clip=1e-3)
    norm = of_kind(events, "step")[0].values["grad_norm"]
    assert norm == pytest.approx(float(moved().norm()) / 0.1, rel=1e-4) and norm > 1e-3


def test_a_step_is_as_long_as_the_schedule_says() -> None:
    torch.testing.assert_close(moved(lr=0.2), moved(lr=0.1) * 2, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moved(warmup=4, steps=1), moved() / 5, rtol=1e-4, atol=1e-7)
    model = model_of()
    _, events = trained(model, schedule="linear", steps=4, log_every=1, lr=0.4)
    rates = [event.values["lr"] for event in of_kind(events, "step")]
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


def test_parts_are_the_rows_in_order() -> None:
    loop = Loop(CompletionLoss(model_of()), RECORDS, (), TrainConfig(micro_batch=3, batch=7, steps=1))
    rows = RECORDS[:7]
    assert [len(part) for part in loop.parts(rows)] == [3, 3, 1]
    assert [row for part in loop.parts(rows) for row in part] == rows


def test_steps_are_in_training_mode_evaluations_are_not_and_at_the_end_it_is_off() -> None:
    model = model_of(dropout=0.4).eval()
    modes: list[bool] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    _, events = trained(model, valid=RECORDS[:2], steps=2, eval_every=1)
    assert len(of_kind(events, "eval")) == 3 and not model.training
    # A look at one record with the layers' inputs, then evaluation, and a step and an evaluation twice
    assert [mode for mode, before in zip(modes, [None, *modes], strict=False) if mode is not before] == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert held_out_loss(CompletionLoss(model), RECORDS, batch=4) == held_out_loss(
        CompletionLoss(model), RECORDS, batch=4
    )


def test_counts_are_over_the_whole_run() -> None:
    loop, events = trained(model_of(), steps=5, log_every=2)
    rows = [loop.examples[i] for step in range(5) for i in loop.order.at(step)]
    state, steps = loop.state, of_kind(events, "step")
    assert (state.step, state.records) == (5, len(rows))
    assert state.tokens == sum(row.length for row in rows)
    assert state.supervised == sum(sum(row.supervised[1:]) for row in rows)
    assert [event.step for event in steps] == [1, 2, 4, 5]
    assert [event.values["total_steps"] for event in steps] == [5] * 4
    last = steps[-1].values
    assert (last["tokens"], last["supervised"]) == (state.tokens, state.supervised)
    assert state.first_loss == steps[0].values["loss"] and state.last_loss == last["loss"]
    assert 0 < state.step_seconds <= state.seconds and state.eval_seconds == 0


def test_speed_and_the_time_left_are_those_of_the_steps() -> None:
    loop, events = trained(model_of(), steps=4, log_every=2)
    one, two, four = of_kind(events, "step")
    assert four.values["seconds_left"] == 0.0
    assert 0 < two.values["seconds_left"] < loop.state.seconds * 4
    tokens = four.values["tokens"] - two.values["tokens"]
    assert four.values["tokens_per_second"] > tokens / loop.state.step_seconds
    assert one.values["seconds_left"] > 0
    loop.state.step, loop.state.step_seconds, loop.total_steps = 2, 3.0, 8
    assert loop._seconds_left() == 9.0


def test_what_is_left_by_the_clock() -> None:
    loop = Loop(CompletionLoss(model_of()), RECORDS, (), TrainConfig(minutes=1.0, epochs=100))
    loop.state.step, loop.state.step_seconds, loop.state.seconds = 2, 30.0, 50.0
    assert loop._seconds_left() == 10.0
    loop.state.seconds = 70.0
    assert loop._seconds_left() == 0.0


def test_memory_is_the_most_that_this_process_held() -> None:
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
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
    assert [event.step for event in of_kind(events, "eval")] == expected
    losses = [event.values["valid_loss"] for event in of_kind(events, "eval")]
    bests = [event.values["best_loss"] for event in of_kind(events, "eval")]
    assert bests == [min(losses[: i + 1]) for i in range(len(losses))]


def test_evaluations_take_no_more_than_their_share_of_a_timed_run() -> None:
    loop = Loop(CompletionLoss(model_of()), RECORDS, RECORDS[:2], TrainConfig(minutes=10.0, epochs=1000))
    state = loop.state
    state.step, state.seconds, state.eval_seconds, loop.last_evaluation = 50, 121.0, 14.0, 10.0
    assert loop._is_time_to_evaluate() and not loop._is_time_to_evaluate()  # the second tenth, once
    state.seconds, loop.last_evaluation = 181.0, 30.0
    assert not loop._is_time_to_evaluate()  # 44 s of 181 s are more than a fifth
    state.stopped = "minutes"
    assert loop._is_time_to_evaluate()


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_counts_evaluations_without_gain(patience: int) -> None:
    loop, events = trained(model_of(), valid=RECORDS[:3], lr=1e-30, patience=patience, eval_every=2, steps=50)
    assert loop.state.stopped == "early" and loop.state.step == 2 * patience
    assert [event.step for event in of_kind(events, "eval")] == [2 * i for i in range(patience + 1)]


def test_the_best_adapter_is_kept_where_it_was_not_the_last() -> None:
    model = model_of()
    loop, _ = trained(model, valid=RECORDS[:3], lr=60.0, patience=2, eval_every=1, steps=9)
    assert loop.state.best_step < loop.state.step and loop.state.stopped == "early"
    kept = held_out_loss(CompletionLoss(model), RECORDS[:3], batch=8)
    assert kept == pytest.approx(loop.state.best_loss, rel=1e-5)
    without = model_of()
    loop, _ = trained(without, valid=RECORDS[:3], lr=60.0, eval_every=1, steps=loop.state.step)
    assert held_out_loss(CompletionLoss(without), RECORDS[:3], batch=8) == pytest.approx(loop.state.valid_loss)
    assert loop.state.valid_loss is not None and loop.state.valid_loss > loop.state.best_loss


def test_being_asked_to_stop_ends_it_after_the_step_without_an_evaluation() -> None:
    events: list[Event] = []
    model = model_of()
    loop = Loop(
        CompletionLoss(model), RECORDS, RECORDS[:2], TrainConfig(**SGD, steps=9, eval_every=1), events.append,
        lambda: len(of_kind(events, "eval")) == 3,
    )  # fmt: skip
    assert loop.run().stopped == "interrupted"
    assert loop.state.step == 3 and [event.step for event in of_kind(events, "eval")] == [0, 1, 2]
    assert of_kind(events, "step")[-1].step == 3


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


def test_the_relative_norm_is_that_of_all_layers_together() -> None:
    model = model_of()
    layers = updates(model)
    W0 = torch.cat([owner_of(model).get_submodule(name).weight.detach().flatten() for name in layers])
    dW = torch.cat([delta(model, name).flatten() for name in layers])
    assert relative_norm(model) == pytest.approx(float(dW.norm() / W0.norm()), rel=1e-4)


def test_nothing_learned_is_said_after_twenty_steps_and_not_before() -> None:
    for steps, warned in ((19, False), (20, True)):
        torch.manual_seed(0)
        model = attach(tiny_llama(layers=1), LoRA(rank=2, alpha=3, targets="v"))
        _, events = trained(model, valid=RECORDS[:1], lr=1e-30, steps=steps, eval_every=steps)
        assert any("nothing is learned" in event.values["text"] for event in of_kind(events, "warning")) == warned
    _, events = trained(model_of(), valid=RECORDS[:1], lr=1e-30, steps=20, eval_every=20)
    assert not of_kind(events, "warning")


def watched(loss: float, norm: float, scale: float | None) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    loop_module._Watched(4, torch.tensor(loss), torch.tensor(norm), 0.25).check(scaler)


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "allowed"),
    [
        (1.0, 2.0, None, True),
        (math.nan, 2.0, None, False),
        (math.inf, 2.0, 64.0, False),
        (1.0, math.inf, None, False),
        (1.0, math.nan, 64.0, True),
        (1.0, math.inf, 64.0, True),
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


def test_layers_that_took_no_part_are_counted_and_five_are_named() -> None:
    torch.manual_seed(0)
    model: Any = tiny_llama()
    model.spare = torch.nn.ModuleList(torch.nn.Linear(8, 6) for _ in range(6))
    attach(model, LoRA(rank=2, alpha=3, targets="spare.*,q"))
    _, events = trained(model, steps=2)
    (warning,) = of_kind(events, "warning")
    text = warning.values["text"]
    assert text.startswith("6 adapted layers took no part") and text.count("spare.") == 5 and text.endswith("…")


def test_examples_are_what_the_order_draws() -> None:
    loop = Loop(CompletionLoss(model_of()), RECORDS, (), TrainConfig(batch=5, steps=3, seed=7))
    loop.state.step = 1
    drawn: list[Example] = loop.drawn()
    assert drawn == [RECORDS[i] for i in loop.order.at(1)] and drawn
