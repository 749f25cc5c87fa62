"""Which records a study trains on, holds out and scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.config import DataConfig
from deltaw.errors import DataError
from deltaw.runs import splits


def fill(folder: Path, **sizes: int) -> Path:
    """A file for each split, with records that say which they are of."""
    folder.mkdir(exist_ok=True)
    for name, count in sizes.items():
        lines = [json.dumps({"prompt": f"{name} {i}", "completion": "x", "kept": [i]}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def written(folder: Path, source: splits.Source, valid: int = 1000, test: int = 1000) -> dict[str, list[str]]:
    splits.write(folder, splits.read(source, DataConfig(), valid, test))
    read = {name: splits.file_of(folder, name).read_text().splitlines() for name in splits.NAMES}
    return {name: [json.loads(line)["prompt"] for line in lines] for name, lines in read.items()}


def origins(prompts: list[str]) -> tuple[set[str], int]:
    return {prompt.split()[0] for prompt in prompts}, len(prompts)


@pytest.mark.parametrize(
    ("there", "valid", "test", "expected"),
    [
        ({"train": 50, "valid": 7, "test": 9}, None, None, ("train", 50, "valid", 7, "test", 9)),
        ({"train": 50, "validation": 7, "dev": 5, "test": 9}, None, None, ("train", 50, "validation", 7, "test", 9)),
        ({"train": 50, "test": 9}, None, None, ("train", 45, "train", 5, "test", 9)),
        ({"train": 50, "dev": 9}, None, None, ("train", 45, "train", 5, "dev", 9)),
        ({"train": 50}, None, None, ("train", 40, "train", 5, "train", 5)),
        ({"train": 50, "dev": 9, "test": 8, "more": 6}, "more", "dev", ("train", 50, "more", 6, "dev", 9)),
        ({"train": 50, "dev": 9, "test": 8}, None, "dev", ("train", 50, "dev", 9, "dev", 9)),
        ({"train": 13}, None, None, ("train", 10, "train", 1, "train", 2)),
    ],
)
def test_where_each_set_is_from(
    there: dict[str, int], valid: str | None, test: str | None, expected: tuple[str, int, str, int, str, int], tmp_path: Path
) -> None:  # fmt: skip
    sets = written(tmp_path / "sets", splits.Source(fill(tmp_path / "data", **there), None, valid, test))
    found = [origins(sets[name]) for name in ("train", "valid", "test")]
    assert found == [({expected[i]}, expected[i + 1]) for i in (0, 2, 4)]
    if expected[0] == expected[4]:
        assert len({p for own in sets.values() for p in own}) == there["train"]


def test_files_that_are_named_and_the_most_of_each(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", train=30, other=20, further=25)
    files = [str(data / f"{name}.jsonl") for name in ("train", "other", "further")]
    sets = written(tmp_path / "sets", splits.Source(*files[:1], None, *files[1:]), valid=8, test=12)
    assert [origins(sets[n]) for n in ("train", "valid", "test")] == [
        ({"train"}, 30),
        ({"other"}, 8),
        ({"further"}, 12),
    ]
    places = [int(p.split()[1]) for p in sets["test"]]
    assert places == sorted(places) != list(range(12))  # drawn, in their order
    again = written(tmp_path / "again", splits.Source(*files[:1], None, *files[1:]), valid=8, test=12)
    assert again == sets


def test_the_test_set_has_two_prompts_at_least(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"train {i % 10}", "completion": str(i)}) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    sets = written(tmp_path / "sets", splits.Source(tmp_path / "data.jsonl", None, None, None))
    assert [(len(own), len(set(own))) for own in sets.values()] == [(28, 7), (4, 1), (8, 2)]


def test_no_more_than_a_thousand_are_cut(tmp_path: Path) -> None:
    sets = written(tmp_path / "sets", splits.Source(fill(tmp_path / "data", train=12_000), None, None, None))
    assert [len(sets[n]) for n in ("train", "valid", "test")] == [10_000, 1000, 1000]


def test_records_keep_all_their_fields(tmp_path: Path) -> None:
    written(tmp_path / "sets", splits.Source(fill(tmp_path / "data", train=30), None, None, None))
    line = splits.file_of(tmp_path / "sets", "train").read_text().splitlines()[0]
    assert set(json.loads(line)) == {"prompt", "completion", "kept"}


def test_every_record_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", train=30)
    with (data / "train.jsonl").open("a") as file:
        file.write('\n{"prompt": 3, "completion": "x"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"2 of 32 records cannot be used(.|\n)*train.jsonl:31(.|\n)*train.jsonl:32"):
        written(tmp_path / "sets", splits.Source(data, None, None, None))
    assert not (tmp_path / "sets").exists()


def test_three_sets_have_no_prompt_in_common(tmp_path: Path) -> None:
    """E2E's kind of data in one file: several records of a prompt, by their line far from one another."""
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"p{i % 41}", "completion": f"c{i}", "more": i} for i in range(300)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = splits.Source(data, None, None, None)
    splits.write(tmp_path / "sets", splits.read(source, DataConfig(), 20, 99))
    lines = {n: splits.file_of(tmp_path / "sets", n).read_text().splitlines() for n in splits.NAMES}
    sets = {n: [json.loads(line) for line in own] for n, own in lines.items()}
    prompts = {n: {r["prompt"] for r in own} for n, own in sets.items()}
    assert not prompts["train"] & prompts["test"] and not prompts["train"] & prompts["valid"]
    assert not prompts["test"] & prompts["valid"] and all(r in rows for own in sets.values() for r in own)
    assert abs(len(sets["test"]) - 30) <= 1 and len(sets["valid"]) <= 20


@pytest.mark.parametrize(("prompts", "message"), [(1, "its 60 records are of 1 prompt"), (2, "of 1 prompt")])
def test_too_few_prompts_for_three_sets_are_refused(prompts: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{i % prompts}", "completion": f"c{i}"}) + "\n" for i in range(60))
    )
    source = splits.Source(tmp_path / "data.jsonl", None, None, None)
    with pytest.raises(DataError, match=message):
        splits.read(source, DataConfig(), 20, 20)
