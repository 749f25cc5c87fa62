"""Spikes of the loss are told with their records, in the log and in the report; ordinary noise is none."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import deltaw
from deltaw import LoRA, TrainConfig
from deltaw.errors import Interrupted
from deltaw.training.events import Event, Spiked, event_from
from deltaw.training.loop.spikes import Usual
from tests.data.conftest import write_chat_model


def passed(losses: list[float]) -> list[int]:
    usual, steps = Usual(), []
    for step, loss in enumerate(losses):
        if usual.is_passed(loss):
            steps.append(step)
        usual.add(loss)
    return steps


@pytest.mark.parametrize("seed", range(5))
def test_noise_around_a_falling_loss_is_none(seed: int) -> None:
    rng = np.random.default_rng(seed)
    falling = 2 * np.exp(-np.arange(3000) / 400) + 0.5
    assert passed(list(falling + 0.2 * rng.standard_normal(3000))) == []
    assert passed([0.25] * 100) == []


def test_rounding_errors_of_a_loss_of_zero_are_none() -> None:
    rng = np.random.default_rng(0)
    assert passed([0.0] * 12 + [1e-7] + [0.0] * 8) == []
    assert passed(list(rng.choice([0.0, 0.0, 1.19e-7, 2.4e-7], 300))) == []
    assert passed([0.0] * 12 + [0.5] + [0.0] * 8) == [12]


def test_chance_of_a_run_that_knows_its_records_is_none() -> None:
    usual = Usual([1e-4] * 32)
    assert not usual.is_passed(3e-4, first=1.37) and usual.is_passed(0.1, first=1.37) and usual.is_passed(3e-4)


def test_a_jump_is_one_and_a_new_level_is_soon_usual() -> None:
    rng = np.random.default_rng(0)
    losses = list(1 + 0.1 * rng.standard_normal(400))
    losses[200] = 4.0
    assert passed(losses) == [200]
    losses[300:] = [loss + 3 for loss in losses[300:]]
    marked = passed(losses)
    assert marked == [200, *range(300, marked[-1] + 1)] and marked[-1] < 320


def test_the_first_steps_are_none() -> None:
    assert passed([9.0, 1.0, 20.0] + [1.0] * 10 + [20.0]) == [13]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and records that are alike but for the one in line 7."""
    folder = tmp_path_factory.mktemp("spikes")
    write_chat_model(folder / "model")
    records = [{"prompt": "red and blue?", "completion": " blue red"} for _ in range(40)]
    records[6] = {"prompt": "red and blue?", "completion": " white black brown green"}
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def config(out: Path) -> TrainConfig:
    return TrainConfig(
        out=str(out), steps=120, batch=1, lr=0.05, samples=0, save_every=1, log_every=10, valid_share=0.0
    )


def test_a_run_tells_the_record_and_goes_on_with_what_is_usual(place: Path, tmp_path: Path) -> None:
    data, method = place / "data.jsonl", LoRA(rank=8, targets="all-linear,lm_head")
    whole = deltaw.train(str(place / "model"), data, config(tmp_path / "a"), method=method)
    spikes = [event for event in whole.events if isinstance(event, Spiked)]
    assert spikes and all(spike.loss > 1.5 * spike.usual for spike in spikes)
    assert max(spikes, key=lambda spike: spike.loss).records == ["data.jsonl:7"]
    assert "Spikes of the loss" in whole.report.read_text()
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [event_from(line) for line in lines if line["event"] == "spike"] == spikes

    def stop(event: Event) -> None:
        if isinstance(event, Spiked) and event.step == spikes[-1].step and not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    asked: list[bool] = []
    with pytest.raises(Interrupted):
        deltaw.train(str(place / "model"), data, config(tmp_path / "b"), method=method, on_event=stop)
    again = deltaw.train(resume=tmp_path / "b")
    assert [event for event in again.events if isinstance(event, Spiked)] == spikes
