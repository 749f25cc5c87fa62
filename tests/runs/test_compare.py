"""Comparisons: what is compared, on which records, and how they go on where they stopped. On tiny models, in real processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ViTConfig, ViTForImageClassification

from deltaw.cli import main
from deltaw.config import CompareConfig, DataConfig, TrainConfig
from deltaw.errors import ConfigError, DataError
from deltaw.runs.compare import compare
from deltaw.runs.events import CandidateFinished, CandidateStarted, CompareEvent
from deltaw.runs.results.compare import BestRun
from deltaw.runs.results.study import Failed
from deltaw.runs.study import with_defaults
from tests.runs.conftest import BEFORE, RECORDS
from tests.training.test_tasks import SIZE, TEXTS, about, folder_of, image_processor


@pytest.mark.slow
def test_a_comparison_from_end_to_end(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "out"
    words = [
        "compare",
        str(place / "model"),
        str(place / "data.jsonl"),
        "--out",
        str(out),
        "--steps",
        "4",
        "--batch",
        "4",
    ]
    words += ["--lrs", "2", "--no-latency", "--test-most", "3"]
    assert main([*words, "--methods", "lora(rank=2)"]) == 0
    said = capsys.readouterr().out
    assert "is best by loss on the test records" in said and "lora(rank=2)" in said
    results = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["lora(rank=2)"]["settings"] == {"rank": 2} and rows["lora(rank=2)"]["parameters"] > 0
    losses = {t["lr"]: t["valid_loss"] for t in rows["lora(rank=2)"]["tried"]}
    assert rows["lora(rank=2)"]["valid_loss"] == min(losses.values())
    score = rows["lora(rank=2)"]["scores"]["loss"]
    assert score["low"] <= score["value"] <= score["high"]

    # Three sets without a record in common, which make up the data
    sets = {n: (out / "data" / f"{n}.jsonl").read_text().splitlines() for n in ("train", "valid", "test")}
    assert sorted(line for own in sets.values() for line in own) == sorted(json.dumps(r) for r in RECORDS)

    # Gone on with: what is done is not done again; another method and timing come beside it
    kept = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/score.json")}
    assert len(kept) == 2
    assert main([*[w for w in words if w != "--no-latency"], "--methods", "lora(rank=2),bitfit"]) == 0
    said = capsys.readouterr().out
    assert said.count("(done before)") == 2 and "lora(rank=2), merged" in said
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items())
    results = json.loads((out / "results.json").read_text())
    bitfit, timed = results["rows"][1], results["latency"]
    assert "has no biases" in bitfit["notes"][0] and bitfit["parameters"] > 0 and len(bitfit["tried"]) == 2
    assert {row["what"] for row in timed} == {"forward", "decode, 8 tokens"} and all(r["base"] > 0 for r in timed)

    # Other settings are another comparison
    assert main([*words, "--methods", "lora", "--seed", "3"]) == 2
    assert "other settings (seed)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_candidate_that_fails_is_reported(place: Path, tmp_path: Path) -> None:
    events: list[CompareEvent] = []
    result = compare(
        str(place / "model"), place / "data.jsonl", TrainConfig(out=str(tmp_path / "out"), steps=3, batch=4),
        CompareConfig(methods="lora(targets=nothing),ia3", latency=False), on_event=events.append,
    )  # fmt: skip
    failed, ia3 = result.outcome.rows
    assert isinstance(failed.best, Failed) and "matches no layer" in failed.best.error and isinstance(ia3.best, BestRun)
    assert [type(event) for event in events] == [CandidateStarted, CandidateFinished] * 2
    assert "failed" in result.report.read_text()


@pytest.mark.slow
def test_full_fine_tuning_alone_is_not_timed(place: Path, tmp_path: Path) -> None:
    """It is as fast as the base: with no other method there is nothing to time. This used to end in an error."""
    config = TrainConfig(out=str(tmp_path / "out"), steps=1, batch=4)
    result = compare(str(place / "model"), place / "data.jsonl", config, CompareConfig(methods="full", test_most=3))
    assert result.outcome.latency == [] and [row.name for row, _ in result.outcome.trained] == ["full"]


def test_a_comparison_of_before_is_resumed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its candidates count as finished, and the results come out as they were."""
    shutil.copytree(BEFORE / "compare", tmp_path / "compare")
    (tmp_path / "model").symlink_to(place / "model")
    (tmp_path / "data.jsonl").symlink_to(place / "data.jsonl")
    monkeypatch.chdir(tmp_path)
    then = {"data": DataConfig(separator=""), "epochs": 1.0, "valid_share": 0.02}  # the defaults of then
    config = TrainConfig(out="compare", steps=3, batch=4, valid_most=4, dtype="float32", device="cpu", **then)  # type: ignore[arg-type]
    options = CompareConfig(
        methods="lora(rank=2),bitfit,lora(targets=nothing)", lrs=2, seeds=2, test_most=4, latency=False
    )
    events: list[CompareEvent] = []
    result = compare("model", "data.jsonl", config, options, on_event=events.append)
    assert len(events) == 8 and all(isinstance(event, CandidateFinished) and not event.fresh for event in events)
    before = json.loads((BEFORE / "compare" / "results.json").read_text())
    # Settings that there were not then have their defaults
    before["settings"]["run"] = with_defaults(before["settings"]["run"], result.results["settings"]["run"])
    for name in ("settings", "chosen_by", "sets", "warnings", "rows", "compared"):
        assert result.results[name] == before[name], name


def distinct(count: int) -> list[dict[str, Any]]:
    return [r | {"text": f"{r['text']} {i}"} for i, r in enumerate(about(count))]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "tries"), [("classification", 2), ("image", 1)])
def test_methods_are_compared_by_what_classifiers_are_for(task: str, tries: int, tmp_path: Path) -> None:
    if task == "image":
        model = folder_of(lambda _: ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SIZE)), tmp_path, image_processor())  # fmt: skip
        records = [
            {"image": [[[i + 190 * (i % 2)] * 3] * 16] * 16, "label": ["dark", "light"][i % 2]} for i in range(60)
        ]
    else:
        model, records = folder_of(TEXTS["bert"], tmp_path), distinct(60)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    done = compare(
        model, tmp_path / "data.jsonl", TrainConfig(out=str(tmp_path / "out"), steps=6, batch=8),
        CompareConfig(methods="lora(rank=2)", lrs=tries, seeds=tries),
    )  # fmt: skip
    (row,) = done.results["rows"]
    assert list(row["scores"]) == ["loss", "matthews", "f1", "accuracy"]
    assert len(row["scores"]["accuracy"]["seeds"]) == tries
    assert 0 <= row["scores"]["accuracy"]["value"] <= 1
    best = max(row["tried"], key=lambda t: (t["valid_score"], -t["valid_loss"]))
    assert row["lr"] == best["lr"], row["tried"]
    assert [t["what"] for t in done.results["latency"]] == ["forward", "forward"]
    assert "accuracy" in done.report.read_text()
    if task == "image":  # pixels in a record become a file that each candidate reads
        kept = json.loads((tmp_path / "out/data/train.jsonl").read_text().splitlines()[0])["image"]
        assert np.load(kept).shape == (16, 16, 3)


def test_what_cannot_be_compared_is_said_before_any_training(tmp_path: Path) -> None:
    model = folder_of(TEXTS["bert"], tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in distinct(30)))
    (tmp_path / "test.jsonl").write_text(
        '{"text": "red", "label": "lukewarm"}\n{"text": "blue", "label": "lukewarm"}\n'
    )
    with pytest.raises(ConfigError, match=r"lora\(lr=2e-4\)"):
        compare(model, tmp_path / "data.jsonl", TrainConfig(out=str(tmp_path / "a"), lr=1e-3))
    out = TrainConfig(out=str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"there is no class 'lukewarm'"):
        compare(model, tmp_path / "data.jsonl", out, CompareConfig(test=str(tmp_path / "test.jsonl")))
    with pytest.raises(ConfigError, match="Unknown metric 'bleu'"):  # nothing was begun, so nothing is in the way
        compare(model, tmp_path / "data.jsonl", out, CompareConfig(metrics="bleu"))
    assert not list(tmp_path.glob("*/runs"))
