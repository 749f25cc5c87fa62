"""Many adapters trained together = each trained alone, to the rounding of the batch's shape (invariant 9)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from deltaw import DoRA, LoRA, TrainConfig, attach, detach
from deltaw.data.encode import Example
from deltaw.data.items import Item
from deltaw.model.summary import updates
from deltaw.training.abreast import run_loops
from deltaw.training.events import Evaluated, Event
from deltaw.training.loop import LoopPlan, run_loop
from deltaw.training.losses import ClassLoss, CompletionLoss, DecoderLoss
from tests.conftest import assert_same, covering, snapshot, tiny_gpt2, tiny_llama
from tests.methods.updates.test_weights import model_of

CONFIG = TrainConfig(steps=6, batch=3, lr=1e-2, dtype="float32", log_every=1, eval_every=3)
CANDIDATES = [
    (LoRA(rank=1, alpha=4, targets="qv"), CONFIG),
    (LoRA(rank=4, alpha=4), dataclasses.replace(CONFIG, lr=3e-3)),
    (LoRA(rank=4, alpha=4, targets="mlp"), dataclasses.replace(CONFIG, optimizer="SGD", lr=1.0)),
    (LoRA(rank=2, alpha=4), dataclasses.replace(CONFIG, clip=0.01, lr_ratio=4.0)),
]


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, num_labels=3,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


def t5() -> Any:
    return T5ForConditionalGeneration(T5Config(
        d_model=32, d_kv=8, d_ff=56, num_layers=2, num_heads=4, vocab_size=96, dropout_rate=0.0, decoder_start_token_id=0,
    ))  # fmt: skip


def texts() -> list[Any]:
    """Of lengths that differ, some tokens of them supervised."""
    draw = torch.Generator().manual_seed(5)
    found = []
    for i in range(14):
        ids = torch.randint(3, 96, (5 + i,), generator=draw).tolist()
        found.append(Example(ids, [j > i // 2 for j in range(len(ids))], ""))
    return found


def alike() -> list[Any]:
    """Texts that begin alike for 30 tokens, some of them for 48."""
    return [
        Example(
            [*range(30), *range(20 * (i % 2), 18 + 20 * (i % 2)), *e.input_ids],
            [j > 40 for j in range(48 + e.length)],
            "",
        )
        for i, e in enumerate(texts())
    ]


def items(target: Any) -> list[Any]:
    return [Item({"input_ids": e.input_ids}, target(e.input_ids), "") for e in texts()]


TASKS: dict[str, tuple[Any, Any, Any]] = {
    "llama": (tiny_llama, CompletionLoss, texts),
    "gpt2": (tiny_gpt2, CompletionLoss, texts),
    "trees": (tiny_llama, CompletionLoss, alike),
    "classes": (bert, ClassLoss, lambda: items(lambda ids: ids[0] % 3)),
    "experts": (lambda: model_of("Mixtral"), CompletionLoss, texts),
    "decoder": (t5, DecoderLoss, lambda: items(lambda ids: ids[:3])),
}


def made(task: str) -> Any:
    torch.manual_seed(1)
    return TASKS[task][0]().eval()


def plan_of(task: str, model: Any, number: int, method: Any, config: TrainConfig, heard: list[Event]) -> LoopPlan:
    _, loss, records = TASKS[task]
    torch.manual_seed(config.seed)
    attach(model, method, name=str(number))
    examples = records()
    return LoopPlan(loss(model), examples[:10], examples[10:], config, on_event=heard.append, adapter=str(number))


def learned(model: Any, name: str) -> dict[str, torch.Tensor]:
    found = updates(model, name).items()
    return {f"{layer}.{n}": p.detach().clone() for layer, u in found for n, p in u.named_parameters()}


def alone(task: str, candidates: Any) -> list[tuple[dict[str, torch.Tensor], list[Event]]]:
    found = []
    for number, (method, config) in enumerate(candidates):
        model, heard = made(task), []
        run_loop(plan_of(task, model, number, method, config, heard))
        found.append((learned(model, str(number)), heard))
    return found


def check(task: str, candidates: Any, width: int) -> None:
    model = made(task)
    before = None if candidates[0][1].gradient_checkpointing else snapshot(model)  # that stays on
    heard: list[list[Event]] = [[] for _ in candidates]
    plans = [plan_of(task, model, i, *each, heard[i]) for i, each in enumerate(candidates)]
    ended = run_loops(plans, width)
    assert not ended.failed and all(bool(state.shared) == (task == "trees") for state in ended.states)
    for number, (parameters, events) in enumerate(alone(task, candidates)):
        ours = learned(model, str(number))
        for name, expected in parameters.items():
            torch.testing.assert_close(ours[name], expected, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert [(e.kind, e.step) for e in heard[number]] == [(e.kind, e.step) for e in events]
        for key in ("loss", "grad_norm", "supervised", "valid_loss"):
            for mine, theirs in zip(heard[number], events, strict=True):
                if hasattr(theirs, key):
                    assert getattr(mine, key) == pytest.approx(getattr(theirs, key), rel=1e-3)
    detach(model)
    if before is not None:
        assert_same(model, before)


@pytest.mark.parametrize(("task", "width"), covering(list(TASKS), [1, 2, 4]))
def test_each_comes_out_as_it_does_alone(task: str, width: int) -> None:
    check(task, CANDIDATES, width)


def test_micro_batches_and_batches_by_tokens() -> None:
    check("llama", [(m, dataclasses.replace(c, micro_batch=2)) for m, c in CANDIDATES], 4)
    check("llama", [(m, dataclasses.replace(c, batch_tokens=40)) for m, c in CANDIDATES], 4)


def test_seeds_that_draw_other_records() -> None:
    check("llama", [(m, dataclasses.replace(c, seed=i)) for i, (m, c) in enumerate(CANDIDATES)], 4)


def test_updates_that_cannot_be_stacked_and_heads() -> None:
    check("llama", [(DoRA(rank=2), CONFIG), (LoRA(rank=2), CONFIG), (DoRA(rank=4), CONFIG)], 3)
    check("classes", [(LoRA(rank=r, whole="classifier"), CONFIG) for r in (1, 2)], 2)


def test_runs_that_end_at_other_steps() -> None:
    check("llama", [(m, dataclasses.replace(c, steps=3 + 2 * i)) for i, (m, c) in enumerate(CANDIDATES)], 4)


def test_checkpointing_computes_again_what_each_row_goes_through() -> None:
    check("llama", [(m, dataclasses.replace(c, gradient_checkpointing=True)) for m, c in CANDIDATES], 4)


def test_a_loss_that_is_not_finite_ends_its_own_run_alone() -> None:
    model = made("llama")
    wild = dataclasses.replace(CONFIG, optimizer="SGD", lr=1e30, clip=0.0)
    heard: list[Event] = []
    candidates = [CANDIDATES[1], (LoRA(rank=4), wild), CANDIDATES[3]]
    ended = run_loops([plan_of("llama", model, i, *each, heard) for i, each in enumerate(candidates)], 3)
    assert list(ended.failed) == ["1"] and "lr" in str(ended.failed["1"])
    assert [state.stopped for state in ended.states] == ["", "failed", ""]
    for number in (0, 2):
        (expected, _), *_ = alone("llama", [candidates[number]])
        for name, value in learned(model, str(number)).items():
            torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=2e-5)


def test_the_worse_half_ends_at_each_rung() -> None:
    model = made("llama")
    rates = (1e-6, 1e-2, 1e-5, 3e-3)
    config = dataclasses.replace(CONFIG, steps=8, eval_every=8)
    candidates = [(LoRA(rank=2), dataclasses.replace(config, lr=lr)) for lr in rates]
    heard: list[list[Event]] = [[] for _ in candidates]
    plans = [plan_of("llama", model, i, *each, heard[i]) for i, each in enumerate(candidates)]
    states = run_loops(plans, 2, rungs=(0.5, 0.25)).states
    at = [{e.step: e.valid_loss for e in own if isinstance(e, Evaluated)} for own in heard]
    order = sorted(range(4), key=lambda i: at[i][2])
    assert [states[i].step for i in order[2:]] == [2, 2]
    better, worse = sorted(order[:2], key=lambda i: at[i][4])
    assert (states[better].step, states[worse].step) == (8, 4)
    assert [state.stopped for state in states].count("behind") == 3 and not states[better].stopped


def test_a_held_out_loss_that_is_not_finite_is_in_the_worse_half() -> None:
    """With patience there is a better adapter to go back to, so that it is no error."""
    model = made("llama")
    config = dataclasses.replace(CONFIG, steps=2, eval_every=2, patience=9)
    wild = dataclasses.replace(config, optimizer="SGD", lr=1e30, clip=0.0)
    plans = [plan_of("llama", model, i, LoRA(rank=2), own, []) for i, own in enumerate((wild, config))]
    states = run_loops(plans, 2, rungs=(0.5,)).states
    assert [state.stopped for state in states] == ["behind", ""] and [state.step for state in states] == [1, 2]


def test_dropout_in_one_pass_follows_from_the_loops_seeds_alone() -> None:
    """One record ten times and one A for all, so that a seed decides nothing but the masks."""

    def trained(seeds: tuple[int, int], dropout: float, drawn: int) -> list[dict[str, torch.Tensor]]:
        model = made("llama")
        plans = []
        for number, seed in enumerate(seeds):
            config = dataclasses.replace(CONFIG, batch=10, steps=3)
            plan = plan_of("llama", model, number, LoRA(rank=3, alpha=4, dropout=dropout), config, [])
            alike = [plan.examples[0]] * 10
            plans.append(dataclasses.replace(plan, examples=alike, config=dataclasses.replace(config, seed=seed)))
        torch.manual_seed(drawn)
        state = torch.get_rng_state()
        run_loops(plans, 2)
        assert torch.equal(torch.get_rng_state(), state)
        return [learned(model, str(number)) for number in range(2)]

    def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return max(float((one[name] - other[name]).abs().max()) for name in one)

    first, again, other = trained((1, 2), 0.5, 1), trained((1, 2), 0.5, 7), trained((1, 3), 0.5, 1)
    assert apart(first[0], again[0]) == apart(first[1], again[1]) == 0.0
    assert apart(first[1], other[1]) > 1e-3 and apart(first[0], first[1]) > 1e-3
    assert apart(trained((1, 2), 0.0, 1)[1], trained((1, 3), 0.0, 1)[1]) == 0.0


@pytest.mark.parametrize(("count", "left"), [(3, 2), (5, 3)])
def test_of_an_odd_number_the_middle_one_goes_on(count: int, left: int) -> None:
    model = made("llama")
    config = dataclasses.replace(CONFIG, steps=2, eval_every=2)
    rates = (1e-6, 1e-2, 3e-3, 1e-5, 1e-3)[:count]
    heard: list[list[Event]] = [[] for _ in rates]
    plans = [
        plan_of("llama", model, i, LoRA(rank=2), dataclasses.replace(config, lr=lr), heard[i])
        for i, lr in enumerate(rates)
    ]
    states = run_loops(plans, 2, rungs=(0.5,)).states
    at = [next(e.valid_loss for e in own if isinstance(e, Evaluated) and e.step == 1) for own in heard]
    worst = sorted(range(count), key=lambda i: at[i])[left:]
    assert {i for i, state in enumerate(states) if state.stopped == "behind"} == set(worst)
    assert [state.step for i, state in enumerate(states) if i not in worst] == [2] * left
