"""`deltaw data`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import deltaw
from deltaw.runs.survey import Lengths
from tests.cli.conftest import RECORDS, Run


def written(folder: Path, records: list[dict[str, object]], name: str = "d.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_look_without_a_model(tmp_path: Path, run: Run) -> None:
    records: list[dict[str, object]] = [*RECORDS, RECORDS[0], {"prompt": "red and blue?", "completion": " red"}]
    records += [{"prompt": "same", "completion": "same"}, {"prompt": "long", "completion": "x" * 5000}]
    look = deltaw.survey(written(tmp_path, records))
    assert (look.form, look.records, look.copies, look.several) == ("prompt", len(records), 1, 1)
    assert sum(look.lengths.counts) == len(records) and look.lengths.unit == "characters"
    said = "\n".join(look.odd)
    assert "1 of 16 records answer with the prompt itself: d.jsonl:15" in said
    assert "ten times as long as most: d.jsonl:16" in said
    done = run("data", tmp_path / "d.jsonl")
    assert done.returncode == 0 and "length in characters" in done.stdout and "d.jsonl:15" in done.stdout
    assert json.loads(run("data", tmp_path / "d.jsonl", "--json").stdout)["copies"] == 1


def test_what_is_held_out_and_trained_on_too_is_told(tmp_path: Path, run: Run) -> None:
    written(tmp_path, RECORDS, "train.jsonl")
    written(tmp_path, RECORDS[:3], "valid.jsonl")
    assert "3 of 3 held-out prompts are also trained on" in run("data", tmp_path).stdout


def test_tokens_are_those_of_training(place: Path, tmp_path: Path, run: Run) -> None:
    look = deltaw.survey(place / "data.jsonl", place / "model")
    result = deltaw.train(
        str(place / "model"), place / "data.jsonl", deltaw.TrainConfig(out=str(tmp_path / "run"), steps=1, samples=0)
    )
    assert look.tokens is not None
    assert (look.tokens.tokens, look.tokens.supervised) == (result.data["tokens"], result.data["supervised"])
    for one in look.rendered:
        record = RECORDS[int(one.place.rpartition(":")[2]) - 1]
        taught = "".join(text for text, taught in one.parts if taught)
        assert taught.startswith(record["completion"]) and record["prompt"] in "".join(
            t for t, taught in one.parts if not taught
        )
    done = run("data", place / "data.jsonl", "--model", place / "model", "--out", tmp_path / "page.html")
    assert done.returncode == 0 and "⟦ " in done.stdout and "are taught" in done.stdout
    assert "Length in tokens" in (tmp_path / "page.html").read_text()


def test_a_held_out_file_of_the_same_name_takes_no_record_away(place: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    data, valid = written(tmp_path, RECORDS), written(tmp_path / "other", RECORDS[:3])
    look = deltaw.survey(data, place / "model", deltaw.TrainConfig(valid=str(valid)))
    assert look.records == len(RECORDS) and look.tokens is not None and look.tokens.kept == len(RECORDS)


def test_classes_are_counted(tmp_path: Path, run: Run) -> None:
    records: list[dict[str, object]] = [{"text": f"t{i}", "label": "good" if i % 3 else "bad"} for i in range(9)]
    assert deltaw.survey(written(tmp_path, records)).labels == {"good": 6, "bad": 3}
    assert "good 6, bad 3" in run("data", tmp_path / "d.jsonl").stdout


@pytest.mark.parametrize(
    ("labels", "classes", "shows"),
    [
        ([1, "1.0", True, 0], {"1": 3, "0": 1}, "1 3, 0 1"),
        (["pos", " pos ", "Pos"], {"pos": 2, "Pos": 1}, "Classes that differ in capitals alone: pos and Pos."),
        ([0.5, "1", 2], {}, "numbers from 0.5 to 2"),
        ([f"c{i}" for i in range(14)], {f"c{i}": 1 for i in range(14)}, "c11 1 and 2 more"),
    ],
)
def test_labels_are_told_as_they_are_trained(
    tmp_path: Path, run: Run, labels: list[object], classes: dict[str, int], shows: str
) -> None:
    path = written(tmp_path, [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    assert deltaw.survey(path).labels == classes
    assert shows in run("data", path).stdout


def test_a_decimal_comma_is_refused_as_in_training(tmp_path: Path) -> None:
    with pytest.raises(deltaw.DeltaWError, match="has a comma"):
        deltaw.survey(written(tmp_path, [{"text": "a", "label": "3,5"}, {"text": "b", "label": "1,2"}]))


def test_answers_that_stand_for_none_are_told(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"prompt": "a", "completion": "NaN"}, {"prompt": "b", "completion": "none"}]
    (line,) = deltaw.survey(written(tmp_path, records)).odd
    assert line.startswith("1 of 2 records have an answer that programs write for none") and "d.jsonl:1" in line


def test_bad_records_are_refused_as_in_training(tmp_path: Path, run: Run) -> None:
    written(tmp_path, [{"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}])
    done = run("data", tmp_path / "d.jsonl", "--out", tmp_path / "page.html")
    assert done.returncode != 0 and "d.jsonl:1" in done.stderr and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("numbers", [[0], [5] * 9, list(range(1000)), [1, 10**6]])
def test_a_histogram_holds_all_numbers(numbers: list[int]) -> None:
    lengths = Lengths.of(numbers, "tokens")
    assert sum(lengths.counts) == len(numbers) and len(lengths.edges) == len(lengths.counts) + 1 <= 18
    assert lengths.edges[0] <= min(numbers) and lengths.edges[-1] > max(numbers)
