"""Runs that are stopped at any step and go on: the same bits, the same log, and nothing lost of the run before."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deltaw
from deltaw import LoRA, TrainConfig
from deltaw.errors import ConfigError, FileError, FolderInUse, Interrupted, NotFinite
from deltaw.files.formats.lock import locked
from deltaw.runs.resume.place import RunFolder, clear, finish_replacing, put_in_place
from deltaw.training.events import Evaluated, Event, Resumed, Stepped
from deltaw.training.keeper import BEFORE, NEWEST, read_states
from tests.runs.conftest import RECORDS

# Values of the log that a clock gives
CLOCK = ("seconds", "tokens_per_second", "seconds_left", "memory", "expected_memory")


def settings(out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "out": str(out),
            "steps": 12,
            "batch": 4,
            "lr": 0.01,
            "eval_every": 5,
            "log_every": 3,
            "samples": 0,
            "save_every": 1,
            **changes,
        }
    )


class Stop:
    """Asks a run to stop, as Ctrl-C or a scheduler does, at its first line of the log at or after a step."""

    def __init__(self, step: int, signum: int = signal.SIGTERM) -> None:
        self.step, self.signum, self.asked = step, signum, False

    def __call__(self, event: Event) -> None:
        if not self.asked and isinstance(event, Stepped | Evaluated) and event.step >= self.step:
            self.asked = True
            os.kill(os.getpid(), self.signum)


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing of it is written any more."""


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def log_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def same(out: Path, other: Path) -> None:
    """The adapters and logs of two runs are equal bit for bit."""
    ours, theirs = tensors(out), tensors(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert log_of(out) == log_of(other)


METHODS: dict[str, Any] = {
    "lora": LoRA(rank=2, dropout=0.2), "dora": deltaw.DoRA(rank=2), "norms": LoRA(rank=2, targets="qv", norms=True),
    "bottleneck": deltaw.Bottleneck(size=2), "embeddings": LoRA(rank=2, tokens="1"),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "accumulation": {"micro_batch": 2}, "token budget": {"batch_tokens": 90}, "SGD": {"optimizer": "SGD", "lr": 0.1},
    "Adafactor": {"optimizer": "Adafactor"}, "Muon": {"optimizer": "Muon"}, "RAdam": {"optimizer": "RAdam"}, "early stop": {"patience": 2, "eval_every": 1, "steps": 30, "lr": 0.3},
    "epochs": {"steps": None, "epochs": 1.5}, "cosine": {"schedule": "cosine", "lr_ratio": 4.0},
    "checkpointing": {"gradient_checkpointing": True}, "int8": {"frozen_dtype": "int8"}, "groups": {"share": "group"},
}  # fmt: skip


@pytest.mark.parametrize("step", [0, 1, 5, 6])
def test_a_run_that_was_stopped_ends_with_the_same_bits(step: int, place: Path, tmp_path: Path) -> None:
    model, data, method = str(place / "model"), place / "data.jsonl", METHODS["lora"]
    whole = deltaw.train(model, data, settings(tmp_path / "a"), method=method)
    with pytest.raises(Interrupted, match=r"Stopped after step \d+ of 12(.|\n)*--resume") as stopped:
        deltaw.train(model, data, settings(tmp_path / "b"), method=method, on_event=Stop(step))
    assert stopped.value.exit_code == 143
    events: list[Event] = []
    again = deltaw.train(resume=tmp_path / "b", on_event=events.append)
    same(tmp_path / "a", tmp_path / "b")
    assert [event.step for event in events if isinstance(event, Resumed)] == again.outcome.resumed != []
    assert again.state.loss_sum == whole.state.loss_sum and again.state.records == whole.state.records


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", OPTIONS)
def test_whatever_is_trained_and_how(options: str, method: str, place: Path, tmp_path: Path) -> None:
    if method != "lora" and options != "plain":
        pytest.skip("each method once, each way once")
    model, data, changes = str(place / "model"), place / "data.jsonl", OPTIONS[options]
    deltaw.train(model, data, settings(tmp_path / "a", **changes), method=METHODS[method])
    with pytest.raises(Interrupted):
        deltaw.train(model, data, settings(tmp_path / "b", **changes), method=METHODS[method], on_event=Stop(3))
    deltaw.train(resume=tmp_path / "b")
    same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_16_bits_and_its_scaler(dtype: Any, place: Path, tmp_path: Path) -> None:
    model, data = str(place / "model"), place / "data.jsonl"
    deltaw.train(model, data, settings(tmp_path / "a", dtype=dtype))
    with pytest.raises(Interrupted):
        deltaw.train(model, data, settings(tmp_path / "b", dtype=dtype), on_event=Stop(4))
    deltaw.train(resume=tmp_path / "b")
    same(tmp_path / "a", tmp_path / "b")


def test_a_run_that_was_killed_goes_on_from_its_last_state(place: Path, tmp_path: Path) -> None:
    """Lines of the log after that state are written anew, none twice."""
    model, data = str(place / "model"), place / "data.jsonl"

    def kill(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 9:
            raise Killed

    deltaw.train(model, data, settings(tmp_path / "a", save_every=4))
    with pytest.raises(Killed):
        deltaw.train(model, data, settings(tmp_path / "b", save_every=4), on_event=kill)
    assert [kept.saved.step for kept in read_states(tmp_path / "b")] == [8, 4]
    deltaw.train(resume=tmp_path / "b")
    same(tmp_path / "a", tmp_path / "b")


def test_a_damaged_state_is_found_and_the_one_before_is_used(place: Path, tmp_path: Path) -> None:
    model, data = str(place / "model"), place / "data.jsonl"
    deltaw.train(model, data, settings(tmp_path / "a"))
    with pytest.raises(Interrupted):
        deltaw.train(model, data, settings(tmp_path / "b"), on_event=Stop(5))
    state = tmp_path / "b" / NEWEST
    content = bytearray(state.read_bytes())
    content[-3] ^= 4
    state.write_bytes(content)
    events: list[Event] = []
    deltaw.train(resume=tmp_path / "b", on_event=events.append)
    (resumed,) = [event for event in events if isinstance(event, Resumed)]
    assert "is damaged" in resumed.notes[0] and f"of step {resumed.step}, is used" in resumed.notes[0]
    same(tmp_path / "a", tmp_path / "b")


def test_without_any_whole_state_nothing_goes_on(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        deltaw.train(str(place / "model"), place / "data.jsonl", settings(tmp_path / "b"), on_event=Stop(5))
    for name in (NEWEST, BEFORE):
        (tmp_path / "b" / name).write_bytes(b"\0" * 40)
    with pytest.raises(FileError, match=rf"(?s)No state in .* is whole:.*{NEWEST}.*{BEFORE}"):
        deltaw.train(resume=tmp_path / "b")


@pytest.fixture
def stopped(place: Path, tmp_path: Path) -> Path:
    """The folder of a run that was stopped after step 6."""
    with pytest.raises(Interrupted):
        deltaw.train(
            str(place / "model"),
            place / "data.jsonl",
            settings(tmp_path / "b"),
            method=METHODS["lora"],
            on_event=Stop(6),
        )
    return tmp_path / "b"


def test_what_differs_is_refused_with_all_of_it(stopped: Path, place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:20]))
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    changed = settings(stopped, lr=0.5, steps=20)
    with pytest.raises(ConfigError) as refused:
        deltaw.train(data=other, config=changed, method=LoRA(rank=4), resume=stopped)
    text = str(refused.value)
    for part in (
        "lr was 0.01, it is 0.5 now",
        "rank was 2, it is 4 now",
        "steps was 12",
        "--resume-with steps",
        "training records",
    ):
        assert part in text
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_another_base_is_refused(stopped: Path, place: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    with pytest.raises(ConfigError, match="the base's weights are others"):
        deltaw.train(model, tokenizer=AutoTokenizer.from_pretrained(place / "model"), resume=stopped)


def test_settings_that_may_change_do_where_that_is_said(stopped: Path, tmp_path: Path) -> None:
    longer = settings(tmp_path / "c", steps=20)
    with pytest.raises(ConfigError, match="lr may not change"):
        deltaw.train(config=longer, resume=stopped, resume_with=["lr"])
    result = deltaw.train(config=longer, method=METHODS["lora"], resume=stopped, resume_with=["steps", "out"])
    assert result.state.step == 20 and result.folder == tmp_path / "c"
    assert [line["step"] for line in log_of(tmp_path / "c") if line["event"] == "step"][:2] == [1, 3]
    assert not (stopped / "result.json").exists(), "the run that it came from stays as it was"


def test_a_finished_run_is_trained_further(place: Path, tmp_path: Path) -> None:
    deltaw.train(str(place / "model"), place / "data.jsonl", settings(tmp_path / "a", steps=6))
    again = deltaw.train(resume=tmp_path / "a")
    assert again.state.step == 6, "nothing is left to train"
    longer = deltaw.train(config=settings(tmp_path / "a", steps=9), resume=tmp_path / "a")
    assert longer.state.step == 9 and longer.outcome.resumed == [6, 6]


def test_a_run_replaces_another_one_once_it_is_whole(place: Path, tmp_path: Path) -> None:
    model, data, out = str(place / "model"), place / "data.jsonl", tmp_path / "a"
    deltaw.train(model, data, settings(out), method=METHODS["lora"])
    (out / "notes.txt").write_text("mine")
    before = tensors(out)
    with pytest.raises(Interrupted):
        deltaw.train(model, data, settings(out, overwrite=True, lr=0.02), method=METHODS["dora"], on_event=Stop(5))
    assert all(torch.equal(tensors(out)[name], before[name]) for name in before) and (out / "result.json").exists()
    with pytest.raises(ConfigError, match="--resume"):
        deltaw.train(model, data, settings(out))
    result = deltaw.train(resume=out)
    assert result.folder == out and result.settings["method"] == "dora" and result.state.step == 12
    assert {p.name for p in out.iterdir()} == {
        "adapter", "config.yaml", "log.jsonl", "report.html", "result.json", NEWEST, BEFORE, "notes.txt",
    }  # fmt: skip
    assert tensors(out).keys() != before.keys()


@pytest.mark.parametrize("died_before", ["adapter", "log.jsonl", "result.json", "the end"])
def test_a_replacement_that_died_is_finished(died_before: str, tmp_path: Path) -> None:
    home = RunFolder(tmp_path)
    for folder, text in ((home, "old"), (home.next, "new")):
        folder.adapter.mkdir(parents=True)
        for path in (folder.adapter / "weights", folder.log, folder.result, folder.config):
            path.write_text(text)
    home.score.write_text("old")
    count = {"adapter": 0, "log.jsonl": 2, "result.json": 3, "the end": 9}[died_before]
    moves = iter(range(count))
    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        if next(moves, None) is None and self.parent == home.next.path and not self.name.startswith("."):
            raise Killed
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with contextlib.suppress(Killed):
            put_in_place(home)
    finish_replacing(home)
    assert {path.name: path.read_text() for path in home.path.rglob("*") if path.is_file()} == dict.fromkeys(
        ("weights", "log.jsonl", "result.json", "config.yaml"), "new"
    )


def test_two_processes_do_not_train_into_one_folder(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    out.mkdir()
    with (
        locked(out / ".lock", "works in it"),
        pytest.raises(FolderInUse, match=rf"Process {os.getpid()} on .* works in it"),
    ):
        deltaw.train(str(place / "model"), place / "data.jsonl", settings(out))
    assert [path.name for path in out.iterdir()] == []


def test_a_lock_of_a_dead_process_is_taken_over_and_told(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"pid": 4242, "host": "there", "since": "then", "doing": "works in it"}))
    with locked(tmp_path / ".lock", "works in it") as note:
        assert note is not None and "4242" in note and "is dead" in note
    assert not (tmp_path / ".lock").exists()


def test_a_run_that_cannot_begin_leaves_no_folder(place: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError):
        deltaw.train(str(tmp_path / "nothing"), place / "data.jsonl", settings(tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()


def test_records_in_memory_are_asked_for(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        deltaw.train(str(place / "model"), RECORDS, settings(tmp_path / "b"), on_event=Stop(5))
    with pytest.raises(ConfigError, match="data in memory"):
        deltaw.train(resume=tmp_path / "b")
    assert deltaw.train(data=RECORDS, resume=tmp_path / "b").state.step == 12


def test_a_state_that_cannot_be_written_is_a_warning(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"

    def obstruct(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            (out / BEFORE).unlink()
            (out / BEFORE / "in the way").mkdir(parents=True)

    result = deltaw.train(str(place / "model"), place / "data.jsonl", settings(out), on_event=obstruct)
    assert result.state.step == 12 and sum("state could not be written" in text for text in result.warnings) == 1


def test_only_what_a_run_wrote_is_cleared(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.adapter.mkdir(parents=True)
    folder.log.write_text("x")
    (folder.path / "thesis.txt").write_text("mine")
    clear(folder)
    assert [path.name for path in folder.path.iterdir()] == ["thesis.txt"]


class Poisoned:
    """Makes the model's head give NaN at the steps named, counted by its passes in training."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.passes = steps, 0

    def __call__(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        self.passes += 1
        return output * float("nan") if self.passes in self.steps else output


def poisoned(place: Path, steps: set[int]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "model")
    model.model.norm.register_forward_hook(Poisoned(steps))
    return model, AutoTokenizer.from_pretrained(place / "model")


def test_a_step_that_is_not_finite_is_named_and_what_was_good_is_kept(place: Path, tmp_path: Path) -> None:
    model, tokenizer = poisoned(place, {5})
    config = settings(tmp_path / "a", valid_share=0.0, eval_every=None)
    with pytest.raises(NotFinite) as stopped:
        deltaw.train(model, place / "data.jsonl", config, tokenizer=tokenizer)
    text = str(stopped.value)
    assert "at step 5" in text and "layers whose gradients are not finite: model.layers.0" in text
    assert text.count("data.jsonl:") == 4 and "The adapter after step 4, the last good one, is in" in text
    again = deltaw.train(
        str(place / "model"), place / "data.jsonl", settings(tmp_path / "b", valid_share=0.0, eval_every=None)
    )
    with pytest.raises(Interrupted):
        stop = settings(tmp_path / "c", valid_share=0.0, eval_every=None, log_every=1)
        deltaw.train(str(place / "model"), place / "data.jsonl", stop, on_event=Stop(4))
    ours, theirs = tensors(tmp_path / "a"), tensors(tmp_path / "c")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and again.state.step == 12


def test_bad_steps_are_passed_over_as_many_as_are_allowed(place: Path, tmp_path: Path) -> None:
    for bad, allowed in (({3, 5}, 2), ({3, 5, 6}, 2)):
        model, tokenizer = poisoned(place, bad)
        config = settings(tmp_path / f"{len(bad)}", valid_share=0.0, eval_every=None, skip_bad_steps=allowed)
        if len(bad) > allowed:
            with pytest.raises(NotFinite, match="at step 6"):
                deltaw.train(model, place / "data.jsonl", config, tokenizer=tokenizer)
        else:
            result = deltaw.train(model, place / "data.jsonl", config, tokenizer=tokenizer)
            over = [text for text in result.warnings if "passed over" in text]
            assert result.state.step == 12 and [text.split()[1] for text in over] == ["3", "5"]
            assert all(torch.isfinite(tensor).all() for tensor in tensors(tmp_path / "2").values())


def test_steps_without_a_loss_have_no_line_in_the_log(place: Path, tmp_path: Path) -> None:
    """And a run of nothing else learned nothing."""
    model, tokenizer = poisoned(place, {1, 2, 5})
    config = settings(tmp_path / "a", valid_share=0.0, eval_every=None, skip_bad_steps=12, log_every=1)
    result = deltaw.train(model, place / "data.jsonl", config, tokenizer=tokenizer)
    losses = {event.step: event.loss for event in result.events if isinstance(event, Stepped)}
    assert losses.keys() == {3, 4, *range(6, 13)} and min(losses.values()) > 1 and result.state.first_loss == losses[3]
    model, tokenizer = poisoned(place, set(range(1, 100)))
    with pytest.raises(NotFinite, match="at step 12"):
        deltaw.train(
            model, place / "data.jsonl", dataclasses.replace(config, out=str(tmp_path / "b")), tokenizer=tokenizer
        )


def test_a_rate_that_is_absurd_leaves_no_broken_adapter(place: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "a", lr=1e30, schedule="constant", warmup=0, clip=0.0, eval_every=None)
    with pytest.raises(NotFinite, match="No adapter was saved"):
        deltaw.train(str(place / "model"), place / "data.jsonl", config)
    assert not (tmp_path / "a" / "adapter").exists()


def test_a_damaged_base_is_blamed_and_not_the_rate(place: Path, tmp_path: Path) -> None:
    model, tokenizer = poisoned(place, set())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(FileError, match=r"(?s)damaged.*model\.layers\.1\.mlp\.up_proj\.weight"):
        deltaw.train(model, place / "data.jsonl", settings(tmp_path / "a", valid_share=0.0), tokenizer=tokenizer)
    assert not (tmp_path / "a" / "adapter").exists()


def test_the_config_of_a_run_is_what_it_goes_on_with(stopped: Path) -> None:
    result = deltaw.train(resume=str(stopped))
    fields = {field.name for field in dataclasses.fields(TrainConfig)} & result.settings.keys()
    assert result.settings["lr"] == 0.01 and result.settings["rank"] == 2 and "steps" in fields


@pytest.mark.parametrize("method", ["lora", "dora", "norms", "bottleneck", "embeddings"])
def test_a_run_begins_with_another_ones_adapter(method: str, place: Path, tmp_path: Path) -> None:
    """Its first evaluation is the other one's last; the other adapter stays as it is."""
    model, data = str(place / "model"), place / "data.jsonl"
    kind = METHODS[method] if method != "lora" else LoRA(rank=2)
    first = deltaw.train(model, data, settings(tmp_path / "a"), method=kind)
    before = tensors(tmp_path / "a")
    second = deltaw.train(model, data, settings(tmp_path / "b", start=str(first.adapter), steps=4), method=kind)
    losses = [[event.valid_loss for event in run.events if isinstance(event, Evaluated)] for run in (first, second)]
    assert losses[1][0] == pytest.approx(losses[0][-1], abs=1e-6) and losses[1][0] < losses[0][0]
    assert tuple(deltaw.adapters(second.model)) == ("default",)
    assert all(torch.equal(tensors(tmp_path / "a")[name], before[name]) for name in before)


def test_an_adapter_of_other_shapes_is_no_start(place: Path, tmp_path: Path) -> None:
    model, data = str(place / "model"), place / "data.jsonl"
    first = deltaw.train(model, data, settings(tmp_path / "a", steps=2), method=LoRA(rank=2, targets="q"))
    config = settings(tmp_path / "b", start=str(first.adapter))
    with pytest.raises(
        ConfigError, match=r"(?s)cannot begin with.*v_proj A: not in the adapter.*q_proj A: shape and scale"
    ):
        deltaw.train(model, data, config, method=LoRA(rank=4, targets="qv"))
    assert not (tmp_path / "b").exists()
