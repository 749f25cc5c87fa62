"""Comparisons: what is compared, on which records, and how they go on where they stopped. On tiny models, in real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ViTConfig, ViTForImageClassification

from deltaw.cli import main
from deltaw.config import CompareConfig, DataConfig, TrainConfig
from deltaw.errors import ConfigError, DataError
from deltaw.runs import splits
from deltaw.runs.compare import compare
from deltaw.runs.memory.machine import describe
from deltaw.runs.reports.compare import comparison_report, headline, ranked
from deltaw.runs.reports.page import render
from deltaw.runs.scoring import scoring_of
from tests.conftest import byte_llama
from tests.data.conftest import CHATML, tiny_tokenizer
from tests.training.test_tasks import SIZE, TEXTS, about, folder_of, image_processor

WORDS = ["red", "blue", "green", "white", "black", "brown"]
RECORDS = [{"prompt": f"{a} and {b}?", "completion": f" {b} {a}"} for a in WORDS for b in WORDS if a != b]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    tokenizer = tiny_tokenizer(CHATML)
    byte_llama(tokenizer, tie_word_embeddings=True).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return folder


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
    assert "has none" in bitfit["notes"][0] and bitfit["parameters"] > 0 and len(bitfit["tried"]) == 2
    assert {row["what"] for row in timed} == {"forward", "decode, 8 tokens"} and all(r["base"] > 0 for r in timed)

    # Other settings are another comparison
    assert main([*words, "--methods", "lora", "--seed", "3"]) == 2
    assert "other settings (seed)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_candidate_that_fails_is_reported(place: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    done = compare(
        str(place / "model"), place / "data.jsonl", TrainConfig(out=str(tmp_path / "out"), steps=3, batch=4),
        CompareConfig(methods="lora(targets=nothing),ia3", latency=False),
        on_event=lambda event: heard.append(event.kind),
    )  # fmt: skip
    rows = {row["name"]: row for row in done.results["rows"]}
    assert "matches no layer" in rows["lora(targets=nothing)"]["error"] and "scores" in rows["ia3"]
    assert heard == ["started", "finished"] * 2
    assert "failed" in done.report.read_text()


def test_the_report_says_what_is_best_and_what_is_near() -> None:
    results = made([("full", 1_000_000, 1.00), ("lora", 10_000, 1.02), ("prefix", 2_000, 1.04), ("ia3", 500, 2.0)])
    assert [row["name"] for row in ranked(results)] == ["full", "lora", "prefix", "ia3"]
    said = headline(results)
    assert (
        said.startswith("full is best by loss")
        and "Not shown to be worse, in pairs on the same items: lora, prefix; the smallest of them, prefix, has 2k."
        in said
    )
    assert "interval" not in headline(
        results | {"compared": []}
    )  # of an older version: not by intervals of single methods
    worse = [row | {"worse": True} for row in results["compared"]]
    assert headline(results | {"compared": worse}).endswith("All others are shown to be worse.")
    assert headline(results | {"compared": worse[:2]}).endswith("The other is shown to be worse.")
    same = made([("full", 1_000_000, 0.5), ("lora", 10_000, 0.5)])
    assert headline(same).startswith("The methods do not differ by loss") and ranked(same)[0]["name"] == "lora"
    page = render(comparison_report(results))
    for part in (
        "for all 6 pairs together",
        "0.0200 [0.0000, 0.0400]",
        "not shown",
        "another seed would change is not in",
    ):
        assert part in page
    for part in ("Quality against parameters", "Inference over the base", "+20.7%", "ia3"):
        assert part in page
    assert "held-out accuracy" not in page
    assert "held-out accuracy" in render(comparison_report(results | {"chosen_by": "accuracy"}))
    results["rows"][0] = {"name": "full", "method": "full", "settings": {}, "tried": [], "error": "boom"}
    assert ranked(results)[-1]["name"] == "full" and "boom" in render(comparison_report(results))


def made(rows: list[tuple[str, int, float]]) -> dict[str, Any]:
    """Results of a comparison with these losses."""

    def row(name: str, parameters: int, loss: float) -> dict[str, Any]:
        return {
            "name": name, "method": "lora", "settings": {}, "lr": 1e-3,
            "tried": [{"lr": 1e-3, "valid_loss": loss, "valid_score": None, "error": None}], "parameters": parameters, "share": 0.01, "bytes": 1, "bytes_with_optimizer": 2, "memory": None, "step_seconds": 0.1,
            "valid_loss": loss, "valid": [[0, 3.0], [4, loss]], "notes": [],
            "scores": {"loss": {"seeds": [loss], "value": loss, "low": loss - 0.05, "high": loss + 0.05}},
        }  # fmt: skip

    run = {"minutes": None, "steps": 4, "epochs": 1.0, "batch": 8}
    return {
        "environment": describe(),
        "chosen_by": "loss",
        "settings": {"model": "m", "data": "d", "test_most": 9, "run": run},
        "rows": [row(*each) for each in rows],
        "warnings": [], "sets": dict.fromkeys(("train", "valid", "test"), "9 records of 9 prompts"),
        "compared": [
            {"name": name, "score": {}, "difference": {"value": more, "low": more - 0.02, "high": more + 0.02}, "worse": more > 0.5}
            for name, _, loss in rows for more in (loss - rows[0][2],)
        ],
        "latency": [{"what": "forward", "batch": 1, "length": 128, "base": 0.1, "ratios": {name: 1.1 for name, *_ in rows}}],
    }  # fmt: skip


def test_three_sets_have_no_prompt_in_common(place: Path, tmp_path: Path) -> None:
    """E2E's kind of data in one file: several records of a prompt, by their line far from one another."""
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"p{i % 41}", "completion": f"c{i}", "more": i} for i in range(300)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = splits.Source(data, None, None, None)
    splits.write(tmp_path / "sets", source, DataConfig(), valid_most=20, test_most=99)
    lines = {n: splits.file_of(tmp_path / "sets", n).read_text().splitlines() for n in splits.NAMES}
    sets = {n: [json.loads(line) for line in own] for n, own in lines.items()}
    prompts = {n: {r["prompt"] for r in own} for n, own in sets.items()}
    assert not prompts["train"] & prompts["test"] and not prompts["train"] & prompts["valid"]
    assert not prompts["test"] & prompts["valid"] and all(r in rows for own in sets.values() for r in own)
    assert abs(len(sets["test"]) - 30) <= 1 and len(sets["valid"]) <= 20
    kept = scoring_of(tmp_path / "sets", DataConfig(), str(place / "model"), "")
    assert kept.sets["test"] == f"{len(sets['test'])} records of {len(prompts['test'])} prompts" and not kept.warnings


@pytest.mark.parametrize(("prompts", "said"), [(1, "its 60 records are of 1 prompt"), (2, "of 1 prompt")])
def test_too_few_prompts_for_three_sets_are_refused(prompts: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{i % prompts}", "completion": f"c{i}"}) + "\n" for i in range(60))
    )
    source = splits.Source(tmp_path / "data.jsonl", None, None, None)
    with pytest.raises(DataError, match=said):
        splits.write(tmp_path / "sets", source, DataConfig(), valid_most=20, test_most=20)
    assert not (tmp_path / "sets").exists()


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
