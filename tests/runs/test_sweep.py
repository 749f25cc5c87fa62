"""Sweeps: which candidates there are, that each comes out as training it alone, and how a sweep goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import deltaw
from deltaw.cli import main
from deltaw.config import DataConfig, SweepConfig, TrainConfig
from deltaw.errors import Interrupted
from deltaw.files.formats.peft import tensors_of
from deltaw.runs.events import CandidateFinished, CandidateStarted, CandidateStepped, SweepEvent, WidthChosen
from deltaw.runs.results.study import Failed
from deltaw.runs.results.sweep import BestRun, RunScore
from deltaw.runs.study import with_defaults
from deltaw.runs.sweep import sweep
from tests.runs.conftest import BEFORE
from tests.training.test_tasks import TEXTS, about, folder_of, write

BUDGET = {"steps": 5, "batch": 4, "valid_most": 4, "dtype": "float32"}


def command(place: Path, out: Path, *, steps: int) -> list[str]:
    words = ["sweep", str(place / "model"), str(place / "data.jsonl"), "--out", str(out)]
    return [*words, "--steps", str(steps), "--batch", "4", "--valid-most", "4", "--test-most", "4"]


@pytest.mark.slow
def test_a_sweep_from_end_to_end(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = command(place, out, steps=5)
    words += ["--lrs", "1e-3,5e-3", "--seeds", "2", "--ranks"]
    assert main([*words, "4,2"]) == 0
    printed = capsys.readouterr().out
    assert "against" in printed or "a larger one was not tried" in printed
    results = json.loads((out / "results.json").read_text())
    assert [(r["rank"], r["alpha"], len(r["tried"]), len(r["scores"]["loss"]["seeds"])) for r in results["rows"]] == [
        (4, 4.0, 2, 2), (2, 4.0, 2, 2)
    ]  # fmt: skip
    assert results["choices"]["all-linear"]["rank"] in (2, 4)
    assert all(r["lr"] == min(r["tried"], key=lambda t: t["valid_loss"])["lr"] for r in results["rows"])
    page = (out / "report.html").read_text()
    assert "Which rank is enough: all-linear" in page and 'class="span' in page

    # Resumed: a rank more, of which alone there is something to do
    assert main([*words, "4,2,1"]) == 0
    assert capsys.readouterr().out.count("(done before)") == 6


def test_a_rank_more_is_trained_alone(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*command(place, tmp_path / "s", steps=1), "--targets", "q", "--ranks"]
    assert main([*words, "2"]) == 0 and main([*words, "2,1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("(done before)") == 1 and printed.count("r = 1, q, lr 0.003, seed 0") == 1
    assert "Which rank is enough: q" in (tmp_path / "s" / "report.html").read_text()
    assert main([*words, "2", "--clip", "2"]) == 2
    assert "a sweep with other settings (clip)" in capsys.readouterr().err


def test_a_sweep_of_before_is_resumed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its candidates count as finished, and the results come out as they were."""
    shutil.copytree(BEFORE / "sweep", tmp_path / "sweep2")
    (tmp_path / "model").symlink_to(place / "model")
    (tmp_path / "data.jsonl").symlink_to(place / "data.jsonl")
    monkeypatch.chdir(tmp_path)
    then = {"data": DataConfig(separator=""), "epochs": 1.0, "valid_share": 0.02}  # the defaults of then
    config = TrainConfig(out="sweep2", steps=4, lr=1e-2, batch=4, valid_most=4, dtype="float32", device="cpu", **then)  # type: ignore[arg-type]
    events: list[SweepEvent] = []
    options = SweepConfig(budget="1k", targets="q;v,q;o", test_most=4)
    result = sweep("model", "data.jsonl", config, options, on_event=events.append)
    assert len(events) == 3 and all(isinstance(event, CandidateFinished) and not event.fresh for event in events)
    before = json.loads((BEFORE / "sweep" / "results.json").read_text())
    # Settings that there were not then have their defaults
    before["settings"]["run"] = with_defaults(before["settings"]["run"], result.results["settings"]["run"])
    assert result.results | {"environment": {}} == before | {"environment": {}}


def test_events_name_their_candidate(place: Path, tmp_path: Path) -> None:
    events: list[SweepEvent] = []
    config = TrainConfig(out=str(tmp_path / "s"), **BUDGET | {"steps": 1})
    sweep(
        str(place / "model"), place / "data.jsonl", config, SweepConfig(ranks="1", targets="q"), on_event=events.append
    )
    width, started, stepped, finished = events
    assert isinstance(width, WidthChosen) and width.width == 1 and isinstance(started, CandidateStarted)
    assert isinstance(stepped, CandidateStepped) and stepped.progress.step == stepped.progress.total_steps == 1
    assert isinstance(finished, CandidateFinished) and finished.fresh and isinstance(finished.outcome, RunScore)
    assert {(event.name, event.lr, event.seed) for event in (started, stepped, finished)} == {("r = 1, q", 3e-3, 0)}


def test_which_weights_at_equal_parameters(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(place, tmp_path / "s", steps=1)
    assert main([*words, "--budget", "1k", "--targets", "q;v;o"]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "s/results.json").read_text())
    best, *others = results["compared"]
    assert not results["choices"] and {e["name"] for e in results["compared"]} == {r["name"] for r in results["rows"]}
    assert best["score"]["value"] == min(r["scores"]["loss"]["value"] for r in results["rows"])
    assert f"{best['name']} has the least loss of 3" in " ".join(printed.split())
    assert all((e["difference"]["low"] > 0) is e["worse"] for e in others)
    page = (tmp_path / "s/report.html").read_text()
    assert "for all 3 pairs together" in page and "what another seed would change is not in them" in page
    assert "Test set: 3 records of 3 prompts." in " ".join(printed.split())


def test_one_candidate_has_nothing_beside_it(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(place, tmp_path / "s", steps=2), "--ranks", "2"]) == 0
    assert "no other to compare it with" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("abreast", "seeds"),
    [pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow), (2, 1)],
)
def test_a_candidate_is_what_training_it_alone_makes(place: Path, tmp_path: Path, abreast: int, seeds: int) -> None:
    """In turn to the bit; in one pass the same sums are taken in another order."""
    model = str(place / "model")
    options = SweepConfig(ranks="4,2", seeds=seeds, abreast=abreast)
    result = sweep(model, place / "data.jsonl", TrainConfig(out=str(tmp_path / "s"), **BUDGET), options)
    assert set(result.choices) == {"all-linear"}
    for rank, seed in ((4, 0), (2, 0), (2, 1)) if seeds == 2 else ((4, 0),):
        config = TrainConfig(
            out=str(tmp_path / f"{rank}-{seed}"), seed=seed, valid=str(tmp_path / "s/data/valid.jsonl"), samples=0, **BUDGET
        )  # fmt: skip
        alone = deltaw.train(model, tmp_path / "s/data/train.jsonl", config, method=deltaw.LoRA(rank=rank, alpha=4.0))
        one, _ = tensors_of(alone.adapter)
        other, _ = tensors_of(tmp_path / f"s/runs/all-linear-r{rank}-0.003-{seed}/adapter")
        assert one.keys() == other.keys()
        close = {"rtol": 0.0, "atol": 0.0} if abreast == 1 else {"rtol": 2e-4, "atol": 2e-5}
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], **close)


def test_rates_that_differ_by_little_are_not_one_run(place: Path, tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path / "s"), **BUDGET | {"steps": 1}, warmup=0)
    done = sweep(
        str(place / "model"), place / "data.jsonl", config, SweepConfig(ranks="2", targets="v", lrs="0.0101,0.0102")
    )
    (row,) = done.results["rows"]
    first, second = row["tried"]
    assert first["valid_loss"] != second["valid_loss"]
    runs = sorted((tmp_path / "s/runs").glob("*/score.json"))
    assert [json.loads(p.read_text())["task"]["lr"] for p in runs] == [0.0101, 0.0102]


@pytest.mark.parametrize("patience", [None, 9])
def test_a_runs_loss_is_that_of_the_adapter_it_keeps(place: Path, tmp_path: Path, patience: int | None) -> None:
    """With patience the best one, else the last."""
    wild = {"lr": 0.3, "schedule": "constant", "warmup": 0, "clip": 0.0, "eval_every": 1, "patience": patience}
    config = TrainConfig(out=str(tmp_path / "sweep"), **wild, **BUDGET)
    (row,) = sweep(str(place / "model"), place / "data.jsonl", config, SweepConfig(ranks="2", test_most=4)).results[
        "rows"
    ]
    losses = [loss for _, loss in row["valid"]]
    assert min(losses) < losses[-1]
    assert row["valid_loss"] == (losses[-1] if patience is None else min(losses))


@pytest.mark.slow
def test_the_worse_half_is_ended_and_said_to_be(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    words = command(place, out, steps=8)
    words += ["--ranks", "2", "--lrs", "1e-7,1e-3,1e-2,1e-6", "--halving"]
    assert main(words) == 0
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    ended = {t["lr"]: t["behind"] for t in row["tried"]}
    assert sorted(ended.values(), key=str) == [2, 2, 4, None] and row["lr"] == next(
        r for r, at in ended.items() if at is None
    )
    assert capsys.readouterr().out.count("in the worse half: ended") == 3
    # What was ended stays so when the sweep is gone on with
    assert main(words) == 0
    assert json.loads((out / "results.json").read_text())["rows"][0]["tried"] == row["tried"]


@pytest.mark.slow
def test_a_classifiers_head_is_each_seeds_own(tmp_path: Path) -> None:
    records = [
        {**record, "text": f"{record['text']} {i}"} for i, record in enumerate(about(40))
    ]  # each an item of its own
    model, data = folder_of(TEXTS["bert"], tmp_path), write(tmp_path / "data.jsonl", records)
    done = sweep(model, data, TrainConfig(out=str(tmp_path / "s"), **BUDGET), SweepConfig(ranks="2,1", seeds=2))
    assert {"loss", "accuracy"} <= set(done.results["rows"][0]["scores"])
    heads = []
    for seed in (0, 1):
        tensors, _ = tensors_of(tmp_path / f"s/runs/all-linear-r2-0.0015-{seed}/adapter")
        heads.append(next(t for n, t in tensors.items() if "classifier" in n and n.endswith("weight")))
    assert not torch.equal(*heads)


def test_a_candidate_whose_loss_is_not_finite_is_reported(place: Path, tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path / "s"), **BUDGET)
    done = sweep(
        str(place / "model"), place / "data.jsonl", config, SweepConfig(ranks="2", targets="q", lrs="1e30,1e-3")
    )
    tried = done.results["rows"][0]["tried"]
    assert "not finite" in tried[0]["error"] or "cannot go on" in tried[0]["error"]
    assert done.results["rows"][0]["lr"] == 1e-3


def test_candidates_that_fail_in_their_last_step_are_reported(place: Path, tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path / "s"), **BUDGET | {"steps": 1}, lr=1e30, warmup=0)
    done = sweep(str(place / "model"), place / "data.jsonl", config, SweepConfig(ranks="2,1", abreast=2))
    assert all("held-out records is nan" in row["error"] for row in done.results["rows"])
    assert not done.choices
    assert "NaN" not in (tmp_path / "s" / "results.json").read_text()


@pytest.mark.parametrize(("width", "halving"), [(1, False), (2, False), (1, True)])
def test_a_sweep_that_was_stopped_goes_on_inside_its_candidates(
    width: int, halving: bool, place: Path, tmp_path: Path
) -> None:
    config = TrainConfig(out=str(tmp_path / "a"), steps=8, batch=4, eval_every=3, log_every=2, save_every=1)
    options = SweepConfig(ranks="2,1", targets="q", test_most=4, abreast=width, halving=halving)
    model, data = str(place / "model"), place / "data.jsonl"
    whole = sweep(model, data, config, options)
    asked: list[int] = []

    def stop(event: SweepEvent) -> None:
        if isinstance(event, CandidateStepped) and event.progress.step >= 4 and not asked:
            asked.append(event.progress.step)
            os.kill(os.getpid(), signal.SIGINT)

    config = dataclasses.replace(config, out=str(tmp_path / "b"))
    with pytest.raises(Interrupted, match="goes on from here"):
        sweep(model, data, config, options, on_event=stop)
    steps: list[int] = []

    def note(event: SweepEvent) -> None:
        if isinstance(event, CandidateStepped):
            steps.append(event.progress.step)

    again = sweep(model, data, config, options, on_event=note)
    assert min(steps) > 4 or (width == 1 and not halving)  # a candidate that had not begun begins
    for one, other in zip(whole.outcome.rows, again.outcome.rows, strict=True):
        if isinstance(one.best, Failed):  # among the worse half
            assert one.best == other.best
        else:
            assert isinstance(other.best, BestRun)
            assert one.best.valid == other.best.valid and one.best.scores == other.best.scores
    assert not list((tmp_path / "b").rglob("state*.safetensors")) and not (tmp_path / "b" / ".lock").exists()
