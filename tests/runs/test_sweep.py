"""Sweeps: which candidates there are, that each comes out as training it alone, and how a sweep goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw.cli import main
from deltaw.config import SweepConfig, TrainConfig
from deltaw.errors import ConfigError, TargetError
from deltaw.files.formats.peft import tensors_of
from deltaw.runs.candidates import candidates, choices, learning_rates, numbers
from deltaw.runs.sweep import sweep
from tests.conftest import byte_llama, tiny_llama
from tests.data.conftest import CHATML, tiny_tokenizer
from tests.runs.test_compare import RECORDS
from tests.training.test_tasks import TEXTS, about, folder_of, write

BUDGET = {"steps": 5, "batch": 4, "valid_most": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    tokenizer = tiny_tokenizer(CHATML)
    byte_llama(tokenizer, tie_word_embeddings=True).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return folder


def command(place: Path, out: Path, *, steps: int) -> list[str]:
    words = ["sweep", str(place / "model"), str(place / "data.jsonl"), "--out", str(out)]
    return [*words, "--steps", str(steps), "--batch", "4", "--valid-most", "4", "--test-most", "4"]


def test_the_ranks_share_the_first_ones_alpha() -> None:
    found = candidates(SweepConfig(ranks="8, 1,16", targets="qv; mlp"), tiny_llama()).candidates
    assert [(c.targets, c.rank) for c in found] == [(t, r) for t in ("qv", "mlp") for r in (8, 1, 16)]
    assert {c.method.alpha for c in found} == {8.0}
    assert [c.method.scale(c.rank) for c in found[:3]] == [1.0, 8.0, 0.5]
    (dora,) = candidates(SweepConfig(ranks="4", alpha=2.0, method="dora"), tiny_llama()).candidates
    assert dora.method == deltaw.DoRA(rank=4, alpha=2.0)


def test_a_budget_sets_the_ranks() -> None:
    model = tiny_llama()
    options = SweepConfig(budget="1k")
    found = candidates(options, model).candidates
    assert [c.targets for c in found] == choices(options) == ["q", "v", "q,v", "q,k,v,o", "mlp", "all-linear"]
    for each in found:
        own, less, more = (_size(each, max(1, each.rank + i)) for i in (0, -1, 1))
        assert abs(own - 1000) <= min(abs(less - 1000), abs(more - 1000)) or each.rank == 1


def test_targets_that_cannot_hold_the_budget_are_left_out() -> None:
    """v has 16 rows here: at most 1,536 parameters. Of all layers, only some are larger than the rank that the others can have."""
    tried = candidates(SweepConfig(budget="2.5k"), tiny_llama())
    assert list(tried.left_out) == ["v"] and "more than its layers have rows" in tried.left_out["v"]
    assert [c.targets for c in tried.candidates] == ["q", "q,v", "q,k,v,o", "mlp", "all-linear"]
    every = candidates(SweepConfig(budget="20k", targets="all-linear"), tiny_llama()).candidates[0]
    assert "model.layers.0.self_attn.v_proj" in every.method.plan(tiny_llama()).left_out
    assert abs(_size(every, every.rank) - 20_000) < 700
    with pytest.raises(TargetError, match=r"No choice of targets can hold this budget:(.|\n)*all-linear: 1,000,000"):
        candidates(SweepConfig(budget="1M"), tiny_llama())


def _size(candidate: Any, rank: int) -> int:
    model = tiny_llama()
    deltaw.attach(model, deltaw.LoRA(rank=rank, targets=candidate.targets))
    return sum(p.numel() for p in deltaw.parameters(model))


def test_all_that_is_wrong_is_said() -> None:
    with pytest.raises(ConfigError) as error:
        candidates(SweepConfig(ranks="8,x,0,8", lrs="1e-3,-1", budget="much"), tiny_llama())
    for part in ("ranks: 'x' is not a whole number", "'0' is not", "8 is there twice", "lrs: '-1'", "budget: 'much'"):
        assert part in str(error.value)
    with pytest.raises(TargetError):
        candidates(SweepConfig(targets="qv;nothing"), tiny_llama())
    with pytest.raises(TargetError, match="is larger than min"):
        candidates(SweepConfig(ranks="8,17", targets="v"), tiny_llama())
    assert learning_rates(SweepConfig(), 3e-4) == [3e-4]


@pytest.mark.parametrize(
    ("text", "count"),
    [("1k", 1000), ("0.5k", 500), ("1500", 1500), (" 2.25k ", 2250), ("0.001M", 1000), ("0.000001B", 1000)],
)
def test_a_budget_is_read_in_its_unit(text: str, count: int) -> None:
    (found,) = candidates(SweepConfig(budget=text, targets="q"), tiny_llama()).candidates
    (plain,) = candidates(SweepConfig(budget=str(count), targets="q"), tiny_llama()).candidates
    assert found == plain


def test_numbers_are_those_above_0_each_once() -> None:
    problems: list[str] = []
    assert numbers("3, 1,,2", int, "ranks", problems) == [3, 1, 2] and not problems
    assert numbers("1e-3,inf,nan,-1,0,2", float, "lrs", problems) == [1e-3, 2.0]
    assert [line.split("'")[1] for line in problems] == ["inf", "nan", "-1", "0"]
    assert numbers("1,1.0", float, "lrs", problems := []) == [1.0] and problems == ["lrs: 1.0 is there twice"]
    assert not numbers(" , ", int, "ranks", problems := []) and problems == ["ranks: there is none"]


def test_each_choice_of_targets_is_tried_once_and_alpha_may_be_given() -> None:
    assert choices(SweepConfig(targets="qv; mlp;qv;")) == ["qv", "mlp"] and choices(SweepConfig()) == ["all-linear"]
    found = candidates(
        SweepConfig(ranks="2,4", alpha=3.0, scaling="alpha/sqrt(r)", dropout=0.1), tiny_llama()
    ).candidates
    assert {c.method.alpha for c in found} == {3.0} and {c.method.dropout for c in found} == {0.1}
    assert found[1].method.scale(4) == 1.5 and found[1].name == "r = 4, all-linear"
    of_budget = candidates(SweepConfig(budget="1k", targets="q", ranks="5"), tiny_llama()).candidates
    assert of_budget[0].method.alpha == 5.0  # the first rank's there too
    assert learning_rates(SweepConfig(lrs="1e-3,2e-3"), 1.0) == [1e-3, 2e-3]


def test_a_sweep_from_end_to_end(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "out"
    words = command(place, out, steps=5)
    words += ["--lrs", "1e-3,5e-3", "--seeds", "2", "--ranks"]
    assert main([*words, "4,2"]) == 0
    assert "against" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [(r["rank"], r["alpha"], len(r["tried"]), len(r["scores"]["loss"]["seeds"])) for r in results["rows"]] == [
        (4, 4.0, 2, 2), (2, 4.0, 2, 2)
    ]  # fmt: skip
    assert results["choices"]["all-linear"]["rank"] in (2, 4)
    assert all(r["lr"] == min(r["tried"], key=lambda t: t["valid_loss"])["lr"] for r in results["rows"])
    page = (out / "report.html").read_text()
    assert "Which rank is enough: all-linear" in page and 'class="span' in page

    # Gone on with: a rank more, of which alone there is something to do
    assert main([*words, "4,2,1"]) == 0
    assert capsys.readouterr().out.count("(done before)") == 6
    assert main([*words, "4", "--clip", "2", "--json"]) == 2
    assert "a sweep with other settings (clip)" in capsys.readouterr().err


def test_which_weights_at_equal_parameters(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(place, tmp_path / "s", steps=3)
    assert main([*words, "--budget", "1k", "--targets", "q;v;mlp"]) == 0
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


@pytest.mark.parametrize("abreast", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_candidate_is_what_training_it_alone_makes(place: Path, tmp_path: Path, abreast: int) -> None:
    """In turn to the bit; in one pass the same sums are taken in another order."""
    model = str(place / "model")
    options = SweepConfig(ranks="4,2", seeds=2, abreast=abreast)
    done = sweep(model, place / "data.jsonl", TrainConfig(out=str(tmp_path / "s"), **BUDGET), options)
    assert set(done.choices) == {"all-linear"}
    for rank, seed in ((4, 0), (2, 0), (2, 1)):
        config = TrainConfig(
            out=str(tmp_path / f"{rank}-{seed}"), seed=seed, valid=str(tmp_path / "s/data/valid.jsonl"), samples=0, **BUDGET
        )  # fmt: skip
        alone = deltaw.train(model, tmp_path / "s/data/train.jsonl", config, method=deltaw.LoRA(rank=rank, alpha=4.0))
        one, _ = tensors_of(alone.adapter)
        other, _ = tensors_of(tmp_path / f"s/runs/all-linear-r{rank}-0.0005-{seed}/adapter")
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            close = {"rtol": 0.0, "atol": 0.0} if abreast == 1 else {"rtol": 2e-4, "atol": 2e-5}
            torch.testing.assert_close(tensor, other[name], **close)


def test_rates_that_differ_by_little_are_not_one_run(place: Path, tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path / "s"), **BUDGET | {"steps": 1}, warmup=0)
    done = sweep(str(place / "model"), place / "data.jsonl", config, SweepConfig(ranks="2", lrs="0.0101,0.0102"))
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
        tensors, _ = tensors_of(tmp_path / f"s/runs/all-linear-r2-0.0005-{seed}/adapter")
        heads.append(next(t for n, t in tensors.items() if "classifier" in n and n.endswith("weight")))
    assert not torch.equal(*heads)


def test_a_candidate_whose_loss_is_not_finite_is_reported(place: Path, tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path / "s"), **BUDGET)
    done = sweep(str(place / "model"), place / "data.jsonl", config, SweepConfig(ranks="2,1", lrs="1e30,1e-3"))
    tried = done.results["rows"][0]["tried"]
    assert "not finite" in tried[0]["error"] or "cannot go on" in tried[0]["error"]
    assert done.results["rows"][0]["lr"] == 1e-3


def test_candidates_that_fail_in_their_last_step_are_reported(place: Path, tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path / "s"), **BUDGET | {"steps": 1}, lr=1e30, warmup=0)
    done = sweep(str(place / "model"), place / "data.jsonl", config, SweepConfig(ranks="2,1", abreast=2))
    assert all("held-out records is nan" in row["error"] for row in done.results["rows"])
    assert not done.choices
    assert "NaN" not in (tmp_path / "s" / "results.json").read_text()
