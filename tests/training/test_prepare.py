"""What a run trains on and what it holds out: whole prompts, and what is said of them, in every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import deltaw
from deltaw.cli import main
from deltaw.config import DataConfig, RankConfig, SweepConfig, TrainConfig
from deltaw.data.prompts import item_of
from deltaw.errors import DataError
from deltaw.files.store import training_of
from deltaw.methods.ia3 import IA3
from deltaw.methods.lora import LoRA
from deltaw.runs.sweep import sweep
from deltaw.training.prepare import held_out, prepare, trained_on
from tests.conftest import byte_llama
from tests.data.conftest import CHATML, tiny_tokenizer


def rows(prompts: int, records: int, first: int = 0) -> list[dict[str, Any]]:
    """Several answers to each prompt, the same prompt never twice in a row."""
    return [{"prompt": f"p{first + i % prompts}?", "completion": f" a{i}"} for i in range(records)]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer(CHATML)
    byte_llama(tokenizer, tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def quick(folder: Path, **more: Any) -> TrainConfig:
    return TrainConfig(**{"out": str(folder / "run"), "steps": 2, "batch": 4, "samples": 0, "device": "cpu"} | more)


@pytest.mark.parametrize("seed", [0, 3])
def test_no_prompt_is_on_both_sides_and_the_seed_says_which(model: str, tmp_path: Path, seed: int) -> None:
    data = write(tmp_path / "data.jsonl", rows(29, 200))
    made = [prepare(model, data, quick(tmp_path, seed=seed, valid_share=0.1), LoRA()) for _ in range(2)]
    valid = [r.place for r in made[0].valid_records.items]
    assert valid == [r.place for r in made[1].valid_records.items] and len(valid) == 20
    held = {item_of(r) for r in made[0].valid_records.items}
    trained = trained_on({"data": data, "seed": seed, "valid_share": 0.1})
    assert trained is not None and len(trained) == 180 == made[0].encoded.counts.records
    assert not held & {item_of(r) for r in trained.items}
    assert made[0].sets.train == f"180 records of {29 - len(held)} prompts" and made[0].sets.overlap is None
    assert made[0].sets.valid == f"20 records of {len(held)} prompts"
    again = held_out(model, data, quick(tmp_path, seed=seed, valid_share=0.1), 256)  # as `rank` has it
    assert [r.place for r in again.records.items] == valid


def test_other_seeds_hold_out_others(model: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", rows(29, 200))
    sets = {
        frozenset(item_of(r) for r in held_out(model, data, quick(tmp_path, seed=seed), 256).records.items)
        for seed in range(4)
    }
    assert len(sets) > 1


def test_a_single_prompt_is_refused_before_any_training(model: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", rows(1, 40))
    with pytest.raises(
        DataError, match=r"its 40 records are of 1 prompt, .* --valid, or hold out none with --valid-share 0"
    ):
        deltaw.train(model, data, quick(tmp_path))
    assert not (tmp_path / "run").exists()
    assert deltaw.train(model, data, quick(tmp_path, valid_share=0.0)).sets["valid"] is None


def test_records_that_were_given_are_cut_to_whole_prompts(model: str, tmp_path: Path) -> None:
    data, valid = write(tmp_path / "data.jsonl", rows(9, 40)), write(tmp_path / "valid.jsonl", rows(5, 50, first=50))
    made = prepare(model, data, quick(tmp_path, valid=valid, valid_most=34), LoRA())
    assert made.sets.valid == "30 records of 3 prompts" and made.sets.overlap is None


SHARED = "2 of 5 held-out prompts are also trained on: scores on them are too good."


def test_what_is_trained_on_and_held_out_too_is_said(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In train, in eval of what it made, and in rank."""
    data, valid = write(tmp_path / "data.jsonl", rows(9, 40)), write(tmp_path / "valid.jsonl", rows(5, 20, first=7))
    words = ["--out", str(tmp_path / "run"), "--steps", "2", "--batch", "4", "--samples", "0", "--rank", "2"]
    assert main(["train", model, data, "--valid", valid, *words]) == 0
    said = capsys.readouterr()
    assert f"warning: {SHARED}" in said.err
    assert "Trained on 40 records of 9 prompts; held out: 20 records of 5 prompts." in said.out
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["warnings"] == [SHARED] and result["sets"]["valid"] == "20 records of 5 prompts"
    assert "Held out: 20 records of 5 prompts." in (tmp_path / "run/report.html").read_text()

    adapter = str(tmp_path / "run/adapter")
    assert (
        main(["eval", model, valid, "--adapter", adapter, "--metrics", "loss", "--out", str(tmp_path / "e.json")]) == 0
    )
    said = capsys.readouterr()
    assert "warning: 2 of 5 evaluated prompts are also trained on" in said.err
    assert "20 records of 5 items" in said.out and "adapter less base" in said.out
    assert main(["eval", model, data, "--adapter", adapter, "--metrics", "loss", "--most", "10"]) == 0
    assert "2 of 2 evaluated prompts are" in capsys.readouterr().err
    told = json.loads((tmp_path / "e.json").read_text())["adapter"]
    assert (told["records"], told["items"]) == (20, 5) and set(told["scores"]["loss"]) == {"value", "low", "high"}

    found = deltaw.choose_rank(tmp_path / "run", RankConfig(records=valid, ranks="1"))
    assert found.results["records"] == {
        "count": 20, "items": 5, "what": "20 records of 5 prompts", "overlap": SHARED, "source": valid, "stopped_by": False,
    }  # fmt: skip
    page = found.report.read_text()
    assert SHARED in page and "on 20 records of 5 prompts, held out" in page
    assert "another seed would change is not in them" in page
    assert len(found.results["ranks"][0]["parts"]) == 5


def test_eval_of_data_that_is_not_here_says_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", rows(9, 40))
    result = deltaw.train(model, data, quick(tmp_path))
    assert trained_on(training_of(result.adapter)) is not None
    Path(data).rename(tmp_path / "moved.jsonl")
    assert trained_on(training_of(result.adapter)) is None
    words = ["eval", model, str(tmp_path / "moved.jsonl"), "--adapter", str(result.adapter), "--metrics", "loss"]
    assert main(words) == 0 and "warning" not in capsys.readouterr().err
    assert trained_on({"data": "<40 records in memory>"}) is None and trained_on({}) is None


def test_one_item_alone_has_no_interval(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data.jsonl", rows(1, 4))
    out = tmp_path / "e.json"
    assert main(["eval", model, data, "--metrics", "loss", "--out", str(out)]) == 0
    loss = json.loads(out.read_text())["base"]["scores"]["loss"]
    assert loss["low"] is None and loss["high"] is None and loss["value"] > 0
    run = deltaw.train(model, write(tmp_path / "more.jsonl", rows(9, 40)), quick(tmp_path)).folder
    with pytest.raises(DataError, match=r"has 4 records of 1 prompt, and an interval needs two"):
        deltaw.choose_rank(run, RankConfig(records=data))


def test_a_sweep_says_what_its_sets_have_in_common(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, test = write(tmp_path / "data.jsonl", rows(40, 200)), write(tmp_path / "test.jsonl", rows(6, 24, first=20))
    words = ["sweep", model, data, "--test", test, "--out", str(tmp_path / "s"), "--steps", "2", "--batch", "4"]
    assert main([*words, "--ranks", "1"]) == 0
    said = capsys.readouterr()
    results = json.loads((tmp_path / "s/results.json").read_text())
    (warning,) = results["warnings"]
    assert " of 6 test prompts " in warning and f"warning: {warning}" in said.err
    assert results["sets"]["test"] == "24 records of 6 prompts" and warning in (tmp_path / "s/report.html").read_text()
    score = json.loads(next((tmp_path / "s/runs").glob("*/score.json")).read_text())
    assert score["losses"]["items"] == [i % 6 for i in range(24)]
    # A score of an older version, which does not say its items, is made again
    for path in (tmp_path / "s/runs").glob("*/score.json"):
        old = json.loads(path.read_text())
        del old["losses"]["items"]
        path.write_text(json.dumps(old))
    assert main([*words, "--ranks", "1"]) == 0 and "done before" not in capsys.readouterr().out


def test_a_held_out_loss_is_the_best_one_where_that_is_kept(model: str, tmp_path: Path) -> None:
    """With --patience the best adapter counts, without it the last one: a rate that goes too far shows the difference."""
    data = write(tmp_path / "data.jsonl", rows(10, 40))
    for patience in (1, None):
        config = quick(
            tmp_path, steps=6, eval_every=1, lr=40.0, patience=patience, out=str(tmp_path / str(patience)), warmup=0,
            schedule="constant",
        )  # fmt: skip
        (row,) = sweep(model, data, config, SweepConfig(ranks="2", targets="qv")).results["rows"]
        losses = [loss for _, loss in row["valid"]]
        assert min(losses) < losses[-1]
        assert row["valid_loss"] == row["tried"][0]["valid_loss"] == (min(losses) if patience else losses[-1])


@pytest.mark.parametrize(("records", "held"), [(19, 0), (60, 6), (300, 30), (1000, 32), (4000, 80)])
def test_a_tenth_of_few_records_is_held_out_and_32_at_least_of_more(
    model: str, tmp_path: Path, records: int, held: int
) -> None:
    data = write(tmp_path / "data.jsonl", rows(records, records))
    prepared = prepare(model, data, quick(tmp_path), LoRA())
    assert (len(prepared.valid_records) if prepared.valid_records else 0) == held
    again = trained_on({"data": data, "valid_share": prepared.config.valid_share})
    assert again is not None and len(again) == records - held  # config.yaml holds out as many


def test_what_is_left_open_is_settled_by_method_model_and_records(model: str, tmp_path: Path) -> None:
    few, many = (write(tmp_path / f"{n}.jsonl", rows(n, n)) for n in (40, 1500))
    settled = prepare(model, few, quick(tmp_path), LoRA()).config
    assert (settled.lr, settled.epochs) == (3e-3, 8)  # a run of few steps takes twice the usual rate
    assert prepare(model, many, quick(tmp_path, batch=4), LoRA()).config.epochs == 1
    for settings in ({"steps": None, "batch": 4}, {"steps": None, "minutes": 1.0}, {"steps": 200}):
        assert prepare(model, many, quick(tmp_path, **settings), LoRA()).config.lr == 1.5e-3
    assert prepare(model, many, quick(tmp_path, steps=199), LoRA()).config.lr == 3e-3
    assert prepare(model, few, quick(tmp_path), IA3()).config.lr == 2e-2
    assert prepare(model, few, quick(tmp_path), LoRA(targets="q,v")).config.lr == 6e-3
    plus = prepare(model, few, quick(tmp_path, lr_ratio=16.0), LoRA()).config
    assert plus.lr == pytest.approx(3e-3 / 4, rel=0.05)  # the mean of A's and B's rates is the usual one
    asked = prepare(model, few, quick(tmp_path, lr=0.25, epochs=0.5), LoRA()).config
    assert (asked.lr, asked.epochs) == (0.25, 0.5)


SPACED = [{"prompt": f"{i} plus 3? ", "completion": f"It is {i + 3}."} for i in range(30)]
BARE = [{"prompt": f"{i} plus 3?", "completion": f"It is {i + 3}."} for i in range(30)]


@pytest.mark.parametrize(
    ("data", "records", "template", "separator", "begins"),
    [
        ({}, BARE, "chat", None, "<|im_start|>user\n0 plus 3?<|im_end|>\n<|im_start|>assistant\n"),
        ({"template": "plain"}, BARE, "plain", "\n", "0 plus 3?\n"),
        ({"template": "plain"}, SPACED, "plain", "", "0 plus 3? "),
        ({"separator": ""}, BARE, "plain", "", "0 plus 3?"),
        ({"separator": " # "}, BARE, "plain", " # ", "0 plus 3? # "),
    ],
)
def test_a_prompt_is_put_as_the_model_was_made_for_and_the_first_record_shows_it(
    model: str, tmp_path: Path, data: dict[str, Any], records: Any, template: str, separator: str | None, begins: str
) -> None:
    file = write(tmp_path / "data.jsonl", records)
    prepared = prepare(model, file, quick(tmp_path, data=DataConfig(**data), valid_share=0.0), LoRA())
    assert (prepared.config.data.template, prepared.config.data.separator) == (template, separator)
    example = prepared.encoded.examples[0]
    assert prepared.loaded.tokenizer.decode(example.input_ids[: example.supervised.index(True)]) == begins
    (note,) = [note for note in prepared.sets.notes if "The first record" in note]
    assert f"{begins.replace(chr(10), '⏎')[-80:]} → taught: It is 3.<|im_end|>" in note
    assert ("chat template (--template plain" in note) == (template == "chat")


def test_classes_without_held_out_records_or_without_others_are_a_warning(model: str, tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(30)])
    valid = write(tmp_path / "v.jsonl", [{"text": f"v{i}", "label": "a"} for i in range(4)])
    said = prepare(model, train, quick(tmp_path, valid=valid), LoRA()).sets.overlap
    assert said == "No held-out record is of class b: the scores say nothing of it."
    other = write(tmp_path / "w.jsonl", [{"text": f"v{i}", "label": "abc"[i % 3]} for i in range(4)])
    asked = quick(tmp_path, valid=other, data=DataConfig(labels=["a", "b", "c"]))
    said = prepare(model, train, asked, LoRA()).sets.overlap
    assert said == "No record to train on is of class c, which held-out records are of."
