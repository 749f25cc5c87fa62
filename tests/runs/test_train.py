"""A whole run on a tiny model: what it writes, what it refuses, how it stops; a user's own loop; transformers' Trainer."""

import copy
import dataclasses
import functools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

import deltaw
from deltaw import DataConfig, LoRA, TrainConfig
from deltaw.errors import AdapterError, BaseMismatch, ConfigError, DataError, Interrupted, TargetError, TrainError
from deltaw.methods.dora import DoRA
from deltaw.training.events import Answered
from deltaw.training.loop import relative_norm
from tests.conftest import byte_llama, covering, fill
from tests.data.conftest import CHATML, tiny_tokenizer

WORDS = ["red", "blue", "green", "white", "black", "pink"]
RECORDS = [{"prompt": f"{a} and {b}?", "completion": f" {b} {a}"} for a in WORDS for b in WORDS if a != b]
METHOD = LoRA(rank=4, alpha=6)


def quick(tmp_path: Path, **changes: Any) -> TrainConfig:
    settings = {
        "out": str(tmp_path / "run"),
        "lr": 0.02,
        "epochs": 3,
        "batch": 5,
        "log_every": 2,
        "samples": 0,
        "seed": 4,
    }
    return TrainConfig(**(settings | changes))


@pytest.fixture
def small() -> Any:
    """(model, tokenizer): a tiny Llama over a byte-level vocabulary."""
    tokenizer = tiny_tokenizer(CHATML)
    return byte_llama(tokenizer, tie_word_embeddings=True), tokenizer


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".deltaw." not in n}


def test_a_run_learns_and_writes_its_folder(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    before = weights(model)
    result = deltaw.train(model, RECORDS, quick(tmp_path, samples=2), method=METHOD, tokenizer=tokenizer)
    names = {"adapter", "config.yaml", "log.jsonl", "result.json", "report.html", "state.safetensors"}
    assert {p.name for p in result.folder.iterdir()} == names and len(result.samples) == 2  # of three held-out records
    lines = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    evals = [line["valid_loss"] for line in lines if line["event"] == "eval"]
    assert evals[-1] < evals[0] - 0.1 and result.state.step == 18 and result.state.records == 81
    assert all(torch.equal(weights(model)[n], v) for n, v in before.items())
    figures = json.loads((result.folder / "result.json").read_text())
    assert figures["loop"]["last_loss"] == result.state.last_loss and figures["relative_norm"] > 0
    page = (result.folder / "report.html").read_text()
    assert "A merge into float32" in page and "model.layers.*.mlp.up_proj" in page
    assert "Held-out loss" in page and f"{evals[0]:.3f}" in page and f"{evals[-1]:.3f}" in page
    settings = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert settings["rank"] == 4 and settings["lr"] == 0.02 and settings["epochs"] == 3


def test_a_run_that_breaks_down_leaves_what_it_learned_beside_the_run_before(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    result = deltaw.train(model, RECORDS, quick(tmp_path), method=METHOD, tokenizer=tokenizer)
    deltaw.detach(model)
    (result.folder / "notes.txt").write_text("mine")

    def crash(event: Any) -> None:
        if event.kind == "step":
            raise RuntimeError("as from a broken driver")

    with pytest.raises(RuntimeError, match="broken driver"):
        config = quick(tmp_path, overwrite=True, lr=0.001, log_every=1)
        deltaw.train(model, RECORDS, config, method=METHOD, tokenizer=tokenizer, on_event=crash)
    new = result.folder / "next"
    assert {p.name for p in new.iterdir()} == {"adapter", "config.yaml", "log.jsonl"}
    assert (result.folder / "notes.txt").read_text() == "mine" and (result.folder / "result.json").exists()
    lines = [json.loads(line) for line in (new / "log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "start" and lines[0]["layers"] == 14 and lines[-1]["step"] == 1
    deltaw.detach(model)
    deltaw.load(model, new / "adapter")  # what one step had learned
    assert relative_norm(model) < result.merge.relative / 5


def test_the_saved_adapter_is_the_trained_one(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    result = deltaw.train(model, RECORDS, quick(tmp_path), method=METHOD, tokenizer=tokenizer)
    trained = [p.detach().clone() for p in deltaw.parameters(model)]
    deltaw.load(model, result.adapter, name="again")
    assert all(torch.equal(a, b) for a, b in zip(trained, deltaw.parameters(model, "again"), strict=True))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    adapters = []
    for i, seed in enumerate((4, 4, 5)):
        deltaw.train(
            model, RECORDS, quick(tmp_path, out=str(tmp_path / str(i)), seed=seed), method=METHOD, tokenizer=tokenizer
        )
        adapters.append([p.detach().clone() for p in deltaw.parameters(model)])
        deltaw.detach(model)
    assert all(torch.equal(a, b) for a, b in zip(adapters[0], adapters[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(adapters[0], adapters[2], strict=True))


def test_accumulation_is_the_whole_batch(small: Any, tmp_path: Path) -> None:
    """Normalised over all supervised tokens of the step, so records of unequal length weigh the same either way."""
    model, tokenizer = small
    uneven = [{"prompt": "p", "completion": "x" * (1 + 3 * i)} for i in range(8)]
    found = []
    for i, micro in enumerate((None, 3, 1)):
        config = quick(
            tmp_path,
            out=str(tmp_path / str(i)),
            batch=8,
            micro_batch=micro,
            steps=1,
            samples=0,
            valid_share=0.0,
            warmup=0.0,
        )
        result = deltaw.train(model, uneven, config, method=METHOD, tokenizer=tokenizer)
        found.append((result.state.last_loss, [p.detach().clone() for p in deltaw.parameters(model)]))
        assert "Infinity" not in (result.folder / "result.json").read_text()  # no held-out loss, and no best one
        deltaw.detach(model)
    for loss, parameters in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for ours, whole in zip(parameters, found[0][1], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-4)


def test_a_line_of_the_log_is_the_mean_over_its_steps(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    lines = {}
    for every in (1, 4):
        config = quick(tmp_path, out=tmp_path / str(every), log_every=every, steps=9)
        result = deltaw.train(model, RECORDS, config, method=METHOD, tokenizer=tokenizer)
        lines[every] = [line for line in result.log if line["event"] == "step"]
        deltaw.detach(model)
    assert [line["step"] for line in lines[4]] == [1, 4, 8, 9]
    sums, last = [], 0
    for line in lines[1]:
        sums.append(line["loss"] * (line["supervised"] - last))
        last = line["supervised"]
    for (first, end), line in zip([(0, 1), (1, 4), (4, 8), (8, 9)], lines[4], strict=True):
        tokens = lines[1][end - 1]["supervised"] - (lines[1][first - 1]["supervised"] if first else 0)
        assert line["loss"] == pytest.approx(sum(sums[first:end]) / tokens, rel=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules(small: Any, tmp_path: Path, schedule: Any) -> None:
    model, tokenizer = small
    config = quick(tmp_path, schedule=schedule, steps=10, warmup=2, log_every=1)
    log = deltaw.train(model, RECORDS, config, method=METHOD, tokenizer=tokenizer).log
    rates = [line["lr"] / 0.02 for line in log if line["event"] == "step"]
    assert rates[0] == pytest.approx(1 / 3) and rates[2] == pytest.approx(1.0)
    middle = {"linear": 0.5, "cosine": 0.5, "constant": 1.0}[schedule]
    assert rates[6] == pytest.approx(middle)
    assert rates[-1] == pytest.approx({"linear": 0.125, "cosine": 0.0381, "constant": 1.0}[schedule], rel=0.01)


def test_early_stop_keeps_the_best(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    config = quick(tmp_path, lr=0.5, epochs=40, eval_every=4, patience=2, schedule="constant", clip=0)
    result = deltaw.train(model, RECORDS, config, method=METHOD, tokenizer=tokenizer)
    evals = [line for line in result.log if line["event"] == "eval"]
    assert result.state.stopped == "early" and result.state.step < 200
    assert result.state.best_loss == min(e["valid_loss"] for e in evals) < evals[-1]["valid_loss"]


def test_minutes_end_a_run(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    result = deltaw.train(
        model, RECORDS, quick(tmp_path, epochs=1000, minutes=0.005), method=METHOD, tokenizer=tokenizer
    )
    assert result.state.stopped == "minutes" and 0 < result.state.step < 6000


@pytest.mark.slow
def test_minutes_are_for_training(small: Any, tmp_path: Path) -> None:
    """Held-out records that take long are not scored ten times in a short run."""
    model, tokenizer = small
    counts = {}
    for name, valid in (("few", RECORDS[:2]), ("many", [{"prompt": "p" * 60, "completion": "c" * 60}] * 1500)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in valid))
        config = quick(
            tmp_path, out=str(tmp_path / name), valid=str(tmp_path / f"{name}.jsonl"), valid_most=1500, epochs=100_000,
            minutes=0.03,
        )  # fmt: skip
        result = deltaw.train(model, RECORDS, config, method=METHOD, tokenizer=tokenizer)
        counts[name] = [line["step"] for line in result.log if line["event"] == "eval"]
        assert counts[name][0] == 0 and counts[name][-1] == result.state.step
        deltaw.detach(model)
    assert len(counts["many"]) < 5 < len(counts["few"])


def test_ctrl_c_saves_and_says_how_to_go_on(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small

    def interrupt(event: Any) -> None:
        if event.kind == "step" and event.step >= 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match=r"Stopped after step 4(.|\n)*deltaw train --resume(.|\n)*adapter so far"):
        deltaw.train(model, RECORDS, quick(tmp_path), method=METHOD, tokenizer=tokenizer, on_event=interrupt)
    trained = [p.detach().clone() for p in deltaw.parameters(model)]
    deltaw.load(model, tmp_path / "run" / "adapter", name="saved")
    assert all(torch.equal(a, b) for a, b in zip(trained, deltaw.parameters(model, "saved"), strict=True))


def no_number(module: Any, inputs: Any, output: Any) -> Any:
    return output * float("nan")


def no_memory(module: Any, inputs: Any, output: Any) -> Any:
    return output + torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (no_number, r"The loss is nan (.|\n)*at step 4(.|\n)*smaller --lr"),
        (no_memory, r"after 3 steps(.|\n)*--micro-batch"),
    ],
)
def test_trouble_in_a_step_stops_and_keeps_what_was_learned(
    small: Any, tmp_path: Path, trouble: Any, message: str
) -> None:
    model, tokenizer = small

    def meet(event: Any) -> None:
        if event.kind == "step" and event.step == 3:
            model.model.norm.register_forward_hook(trouble)

    with pytest.raises(TrainError, match=message):
        config = quick(tmp_path, log_every=1, eval_every=100)
        deltaw.train(model, RECORDS, config, method=METHOD, tokenizer=tokenizer, on_event=meet)
    trained = [p.detach().clone() for p in deltaw.parameters(model)]
    deltaw.load(model, tmp_path / "run" / "adapter", name="kept")
    assert all(torch.equal(a, b) for a, b in zip(trained, deltaw.parameters(model, "kept"), strict=True))


@pytest.mark.parametrize("patience", [None, 9])
def test_a_held_out_loss_that_is_not_finite_is_an_error_unless_there_is_a_better_adapter(
    small: Any, tmp_path: Path, patience: int | None
) -> None:
    """The weights of a last step that went too far: no training loss is computed with them."""
    model, tokenizer = small
    config = quick(tmp_path, lr=1e30, steps=1, epochs=1, schedule="constant", warmup=0, patience=patience)
    if patience is None:
        with pytest.raises(TrainError, match=r"held-out records is nan after step 1(.|\n)*smaller --lr"):
            deltaw.train(model, RECORDS, config, method=METHOD, tokenizer=tokenizer)
    else:
        result = deltaw.train(model, RECORDS, config, method=METHOD, tokenizer=tokenizer)
        assert result.state.best_step == 0
        assert max(float(p.detach().abs().max()) for p in deltaw.parameters(model)) < 10


def test_a_learning_rate_too_small_is_a_warning(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    result = deltaw.train(model, RECORDS, quick(tmp_path, lr=1e-9, epochs=5), method=METHOD, tokenizer=tokenizer)
    assert any("ten times too small" in w for w in result.warnings)


class Seldom(torch.nn.Module):
    """A block whose last layer only some data goes through."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block, self.spare, self.wanted = block, torch.nn.Linear(8, 6), False

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.spare(inputs[0]) if self.wanted else self.block(*inputs, **named)


def test_a_layer_that_never_runs_is_a_warning(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    model.model.layers[0].mlp = Seldom(model.model.layers[0].mlp)
    result = deltaw.train(
        model,
        RECORDS,
        quick(tmp_path, epochs=1),
        method=LoRA(rank=2, targets="spare,q"),
        tokenizer=tokenizer,
    )
    assert any("took no part" in w and "spare" in w for w in result.warnings)


def test_data_that_trains_no_layer_is_refused(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    model.model.layers[0].mlp = Seldom(model.model.layers[0].mlp)
    with pytest.raises(TrainError, match=r"No adapted layer took part in the first step \(model.layers.0.mlp.spare\)"):
        deltaw.train(model, RECORDS, quick(tmp_path), method=LoRA(rank=2, targets="spare"), tokenizer=tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        pytest.param({"dtype": "float16"}, marks=pytest.mark.slow),
        pytest.param({"batch_tokens": 90}, marks=pytest.mark.slow),
        {"lr_ratio": 4.0, "lr": 0.01},
        {"optimizer": "Muon"},
        pytest.param({"optimizer": "NAdam"}, marks=pytest.mark.slow),
    ],
)
def test_other_ways_to_train(small: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    model, tokenizer = small
    if "dtype" in changes:
        model.to(getattr(torch, changes["dtype"]))
    result = deltaw.train(
        model, RECORDS, quick(tmp_path, **changes), method=LoRA(rank=4, alpha=6, dropout=0.05), tokenizer=tokenizer
    )
    assert result.state.last_loss is not None and result.state.first_loss is not None
    assert result.state.last_loss < result.state.first_loss - 0.2
    assert all(p.dtype == torch.float32 for p in deltaw.parameters(model))


MORE = {
    "dora": DoRA(rank=4, alpha=6, targets="all-linear"),
    "embedding": LoRA(rank=4, alpha=6, targets="qv,embed_tokens"),
    "whole": LoRA(rank=4, alpha=6, targets="qv", whole="lm_head,*norm"),
    "tokens": LoRA(rank=4, alpha=6, targets="qv", tokens="5,70,80"),
}


@pytest.mark.parametrize(("more", "dtype"), covering(list(MORE), ["float32", "bfloat16"]))
def test_what_is_more_than_A_and_B_trains_and_comes_back(small: Any, tmp_path: Path, more: str, dtype: str) -> None:
    model, tokenizer = small
    model.to(getattr(torch, dtype))
    plain = copy.deepcopy(model)
    result = deltaw.train(model, RECORDS, quick(tmp_path), method=MORE[more], tokenizer=tokenizer)
    assert result.state.last_loss is not None and result.state.first_loss is not None
    assert result.state.last_loss < result.state.first_loss - 0.1
    assert not result.warnings
    deltaw.load(plain, result.adapter)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)


def test_an_optimizer_of_matrices_refuses_vectors(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    with pytest.raises(TrainError, match="Muon trains matrices only, and 5 of this adapter's tensors are none"):
        deltaw.train(
            model,
            RECORDS,
            quick(tmp_path, optimizer="Muon"),
            method=LoRA(targets="qv", whole="*norm"),
            tokenizer=tokenizer,
        )


def test_gradients_too_large_for_float16_are_skipped_until_the_scale_fits(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = small
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))
    result = deltaw.train(
        model.to(torch.float16), RECORDS, quick(tmp_path, log_every=1, epochs=8), method=METHOD, tokenizer=tokenizer
    )
    norms = [line["grad_norm"] for line in result.log if line["event"] == "step"]
    assert norms[0] is None and norms[-1] is not None
    assert result.state.last_loss is not None and result.state.first_loss is not None
    assert result.state.last_loss < result.state.first_loss - 0.2
    assert "Infinity" not in (result.folder / "log.jsonl").read_text()


def test_what_is_refused_before_anything_is_trained_or_written(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    before = weights(model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    cases: list[tuple[Any, dict[str, Any], Any, type[Exception], str]] = [
        (RECORDS, {"out": str(tmp_path / "full")}, METHOD, ConfigError, "is not empty"),
        ([*RECORDS, {"prompt": "a", "completion": ""}], {}, METHOD, DataError, "completion"),
        ([], {}, METHOD, DataError, "no records"),
        (str(tmp_path / "nothing.jsonl"), {}, METHOD, DataError, "nothing.jsonl"),
        (RECORDS, {}, LoRA(targets="q_prj"), TargetError, "did you mean 'q_proj'"),
        (RECORDS, {"valid": str(tmp_path / "no.jsonl")}, METHOD, DataError, "no.jsonl"),
    ]
    for data, changes, method, error, message in cases:
        with pytest.raises(error, match=message):
            deltaw.train(model, data, quick(tmp_path, **changes), method=method, tokenizer=tokenizer)
        assert not (tmp_path / "run").exists()
        assert deltaw.adapters(model) == ()
    assert all(torch.equal(weights(model)[n], v) for n, v in before.items())
    with pytest.raises(ConfigError, match="tokenizer"):
        deltaw.train(model, RECORDS, quick(tmp_path))
    fill(deltaw.attach(model, METHOD))
    with pytest.raises(AdapterError, match="detach"):
        deltaw.train(model, RECORDS, quick(tmp_path), tokenizer=tokenizer)


def test_chat_records_train_too(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in RECORDS
    ]
    config = quick(tmp_path, data=DataConfig(system="Be brief."), samples=2)
    result = deltaw.train(model, chats, config, method=METHOD, tokenizer=tokenizer)
    assert result.samples and result.data["supervised"] > 0
    assert deltaw.load(model, result.adapter, name="again") == "again"


def test_a_users_own_loop_in_ten_lines(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    batch = tokenizer(["red and blue", "pink and red"], return_tensors="pt", padding=False)
    ids = batch.input_ids
    deltaw.attach(model, LoRA(rank=4, alpha=6))
    optimizer = torch.optim.AdamW(deltaw.parameters(model), lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    deltaw.save(model, tmp_path / "mine")
    assert losses[-1] < losses[0] - 0.2


def test_inside_transformers_trainer(small: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, tokenizer = small
    deltaw.attach(model, LoRA(rank=4, alpha=6))
    before = weights(model)
    ids = tokenizer("red and blue and pink").input_ids
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}] * 16
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "hf"), max_steps=6, per_device_train_batch_size=4, learning_rate=0.02, report_to=[],
        save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(weights(model)[n], v) for n, v in before.items())
    deltaw.save(model, tmp_path / "a")
    other = type(model)(model.config)
    with pytest.raises(BaseMismatch):
        deltaw.load(other, tmp_path / "a")


# --- random numbers ---------------------------------------------------------------------------------------------

DROPPING = LoRA(rank=4, alpha=6, dropout=0.4)


def learnt(model: Any, tokenizer: Any, config: TrainConfig, method: Any = DROPPING, **more: Any) -> list[torch.Tensor]:
    deltaw.train(model, RECORDS, config, method=method, tokenizer=tokenizer, **more)
    values = [p.detach().clone() for p in deltaw.parameters(model)]
    deltaw.detach(model)
    return values


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("changes", [{"samples": 3}, {"eval_every": 2}, {"log_every": 1}, {"valid_most": 9}], ids=str)
def test_what_is_looked_at_changes_nothing_of_what_is_learnt(
    small: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Drawing samples used to reset the random numbers that dropout goes by."""
    common = {"steps": 5, "overwrite": True, "valid": str(tmp_path / "valid.jsonl")}
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS[:12]))
    plain = learnt(*small, quick(tmp_path, **common))
    assert same(learnt(*small, quick(tmp_path, **common | changes)), plain)


def test_a_seed_reaches_dropout_and_nothing_else_does(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    start = [p.clone() for p in deltaw.parameters(deltaw.attach(model, LoRA(rank=4, alpha=6)))]
    deltaw.detach(model)

    class Same(LoRA):
        """Starts from the same A whatever the seed, so that of a seed only the masks and the order are left."""

        def plan(self, model: Any) -> Any:
            plan = super().plan(model)
            for value, p in zip(start, [p for u in plan.updates.values() for p in u.parameters()], strict=True):
                p.data.copy_(value)
            return plan

    one_batch = {"steps": 3, "batch": len(RECORDS), "valid_share": 0.0, "overwrite": True}

    def of(seed: int, dropout: float, **more: Any) -> list[torch.Tensor]:
        method = Same(rank=4, alpha=6, dropout=dropout)
        return learnt(model, tokenizer, quick(tmp_path, seed=seed, **one_batch), method, **more)

    torch.manual_seed(1)
    first = of(7, 0.4)
    torch.manual_seed(2)
    assert same(of(7, 0.4, on_event=lambda event: torch.rand(3)), first)
    assert not same(of(8, 0.4), first)
    without = of(7, 0.0), of(8, 0.0)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*without, strict=True)), (
        "in one batch a seed does no more"
    )


def test_masks_differ_from_step_to_step(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.layers.ops import linear

    seeds, real = [], linear._seed
    monkeypatch.setattr(linear, "_seed", lambda: seeds.append(real()) or seeds[-1])
    learnt(*small, quick(tmp_path, steps=3, valid_share=0.0))
    assert len(seeds) >= 3 * 14 and len(set(seeds[-42:])) == 42


def test_a_bases_own_dropout_goes_by_the_seed_too(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    torch.manual_seed(0)
    settings = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "vocab_size": len(tokenizer),
        "resid_pdrop": 0.3,
    }
    model = GPT2LMHeadModel(GPT2Config(**settings)).eval()
    config = quick(tmp_path, steps=3, overwrite=True)
    torch.manual_seed(1)
    first = learnt(model, tokenizer, config, METHOD)
    torch.manual_seed(2)
    assert same(learnt(model, tokenizer, config, METHOD), first)


def test_a_run_leaves_the_callers_random_numbers_as_they_were(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    torch.manual_seed(5)
    before = torch.get_rng_state()
    result = deltaw.train(model, RECORDS, quick(tmp_path, steps=2, samples=2), method=DROPPING, tokenizer=tokenizer)
    deltaw.merge(model)
    deltaw.unmerge(model)
    deltaw.load(model, result.adapter, name="again")
    deltaw.combine(model, {"default": 1.0, "again": 0.5}, name="both", how="dare", rank=2)
    deltaw.summary(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_new_head_is_drawn_by_the_seed_alone(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"text": w, "label": i % 2} for i, w in enumerate(WORDS * 5)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    heads = []
    for seed in (1, 1, 2):
        config = quick(tmp_path, steps=1, lr=1e-9, seed=seed, overwrite=True)
        result = deltaw.train(str(tmp_path / "base"), rows, config, method=METHOD)
        heads.append(deltaw.model.summary.updates(result.model)["score"].weight.detach().clone())
        torch.testing.assert_close(torch.get_rng_state(), before)
    assert torch.allclose(heads[0], heads[1]) and not torch.allclose(heads[0], heads[2], atol=1e-3)


def test_runs_without_a_name_are_dated_and_the_latest_is_a_link(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = small
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(quick(tmp_path), out=TrainConfig().out)
    first = deltaw.train(model, RECORDS, config, method=METHOD, tokenizer=tokenizer)
    assert Path("runs/latest").resolve() == first.folder.resolve()
    deltaw.detach(model)
    second = deltaw.train(model, RECORDS, config, method=METHOD, tokenizer=tokenizer)
    assert second.folder.name == first.folder.name[:-1] + "2" and (first.folder / "adapter").is_dir()
    assert Path("runs/latest").resolve() == second.folder.resolve()
    assert second.settings["out"] == str(second.folder)
    deltaw.detach(model)
    longer = dataclasses.replace(config, out="runs/latest", steps=second.state.step + 2)
    again = deltaw.train(model, RECORDS, longer, method=METHOD, tokenizer=tokenizer, resume="runs/latest")
    assert again.folder.resolve() == second.folder.resolve() and again.settings["out"] == str(second.folder)
    assert again.state.step == second.state.step + 2
    assert sorted(path.name for path in Path("runs").iterdir()) == [first.folder.name, second.folder.name, "latest"]


def test_a_latest_run_of_before_is_left_alone(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = small
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "latest").mkdir(parents=True)
    (tmp_path / "runs" / "latest" / "config.yaml").write_text("rank: 3\n")
    config = dataclasses.replace(quick(tmp_path), out=TrainConfig().out)
    events: list[Any] = []
    deltaw.train(model, RECORDS, config, method=METHOD, tokenizer=tokenizer, on_event=events.append)
    assert any("stays as it is" in event.text for event in events if event.kind == "warning")
    assert (tmp_path / "runs" / "latest" / "config.yaml").read_text() == "rank: 3\n"


def test_answers_during_training_are_logged_and_change_no_bit(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    settings = {"samples": 2, "eval_every": 3, "steps": 6, "valid_share": 0.2}
    results = []
    for count in (0, 2):
        config = quick(tmp_path / str(count), samples_during=count, **settings)
        results.append(deltaw.train(model, RECORDS, config, method=METHOD, tokenizer=tokenizer))
        deltaw.detach(model)
    plain, answered = results
    events = [event for event in answered.events if isinstance(event, Answered)]
    assert [event.step for event in events] == [0, 3, 6] and all(len(event.answers) == 2 for event in events)
    assert not any(isinstance(event, Answered) for event in plain.events)
    assert "3 answers during training" in answered.report.read_text(encoding="utf-8")
    assert plain.state.valid_loss == answered.state.valid_loss and plain.state.last_loss == answered.state.last_loss


def test_the_held_out_loss_of_a_result_is_that_of_the_last_evaluation(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    result = deltaw.train(model, RECORDS, quick(tmp_path, valid_share=0.2), method=METHOD, tokenizer=tokenizer)
    scored = json.loads((result.folder / "result.json").read_text())["held_out"]
    loss = scored["scores"]["loss"]
    assert abs(loss["value"] - result.state.valid_loss) < 1e-4 and loss["low"] < loss["value"] < loss["high"]
    assert f"[{loss['low']:.3f}, {loss['high']:.3f}]" in result.report.read_text(encoding="utf-8")


def test_the_card_has_the_scores_with_intervals_and_steps_instead_of_passes(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    result = deltaw.train(
        model, RECORDS, quick(tmp_path, steps=2, valid_share=0.2), tokenizer=tokenizer, progress=False
    )
    text = (result.adapter / "README.md").read_text()
    assert result.outcome.held_out is not None
    loss, count = result.outcome.held_out.scores["loss"], result.outcome.held_out.records
    assert f"| held-out loss | {loss.value:.4g} [{loss.low:.4g}, {loss.high:.4g}] nats per supervised token |" in text
    assert f"| held-out records | {count}; intervals are 95% |" in text
    assert "| steps taken | 2 |" in text and "| epochs |" not in text
    assert " PROMPT --adapter ADAPTER" in text


def test_records_longer_than_the_tokens_of_a_step_are_a_warning(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    result = deltaw.train(model, RECORDS, quick(tmp_path, steps=1, batch_tokens=8), tokenizer=tokenizer, progress=False)
    assert any("batch_tokens is 8, and" in text and "each is a step of its own" in text for text in result.warnings)
