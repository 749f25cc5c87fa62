"""Which records are one item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltaw.config import DataConfig
from deltaw.data import read, references
from deltaw.data.prompts import described, item_numbers, overlap


def numbers(*records: dict[str, Any], **settings: Any) -> list[int]:
    return item_numbers(read(list(records), DataConfig(**settings)).items)


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """Turns of a user and an assistant in turn; those that begin with ">" are an assistant's."""
    roles = [("assistant", t[1:]) if t.startswith(">") else ("user", t) for t in turns]
    first = [("system", system)] if system else []
    return {"messages": [{"role": role, "content": text} for role, text in [*first, *roles]]}


def test_equal_prompts_are_one_item_whatever_their_answers() -> None:
    assert numbers(*({"prompt": p, "completion": c} for p, c in ("ax", "by", "az", "bx", " x"))) == [0, 1, 0, 1, 2]


def test_an_instruction_has_its_input() -> None:
    rows = [("do", "a"), ("do", "b"), ("do", ""), ("do", "a")]
    assert numbers(*({"instruction": i, "input": x, "output": str(n)} for n, (i, x) in enumerate(rows))) == [0, 1, 2, 0]


def test_of_pairs_both_texts_count() -> None:
    rows = [("a", "b"), ("a", "c"), ("b", "a"), ("a", "b")]
    assert numbers(*({"text": a, "text_pair": b, "label": i % 2} for i, (a, b) in enumerate(rows))) == [0, 1, 2, 0]
    assert numbers(*({"text": t, "label": i % 2} for i, t in enumerate("aba"))) == [0, 1, 0]


def test_texts_and_empty_prompts_are_items_of_their_own_but_for_copies() -> None:
    assert numbers(*({"text": t} for t in ("one", "two", "one"))) == [0, 1, 0]
    assert numbers(*({"prompt": "", "completion": t} for t in ("one", "two", "one"))) == [0, 1, 0]


def test_conversations_that_begin_alike_are_one_item() -> None:
    """All answers are taught: the first one of an unrolled conversation is in each of its records."""
    found = numbers(
        chat("hi", ">yes", "more", ">a"), chat("hi", ">no", "other", ">b"), chat("hi", ">yes"), chat("ho", ">yes"),
        chat("hi", ">yes", system="S"),
    )  # fmt: skip
    assert found == [0, 0, 0, 1, 2]


def test_a_greeting_before_any_question_is_context() -> None:
    assert numbers(chat(">Hello!", "a", ">x"), chat(">Hello!", "b", ">y"), chat(">Hello!", "a", ">z")) == [0, 1, 0]


def test_references_are_of_the_whole_conversation() -> None:
    records = read(
        [chat("q", ">yes", "a", ">x"), chat("q", ">yes", "b", ">y"), chat("q", ">yes", "a", ">z")], DataConfig()
    )
    assert [refs for _, refs in references(records)] == [["x", "z"], ["y"]]
    assert item_numbers(records.items) == [0, 0, 0]


def test_the_same_question_in_another_form_is_the_same_item() -> None:
    rows = [{"prompt": "q", "completion": "a"}], [chat("q", ">b")], [{"instruction": "q", "output": "c"}]
    first, *others = (read(part, DataConfig()).items for part in rows)
    assert all(overlap(other, first) for other in others)


def test_pictures_are_compared_by_what_is_in_them(tmp_path: Path) -> None:
    dark, light = np.zeros((4, 3), np.uint8), np.full((4, 3), 9, np.uint8)
    for name, picture in (("a", dark), ("b", dark), ("c", light)):
        np.save(tmp_path / f"{name}.npy", picture)
    paths = [{"image": str(tmp_path / f"{name}.npy"), "label": i % 2} for i, name in enumerate("abc")]
    assert numbers(*paths) == [0, 0, 1]
    assert numbers(*({"image": each, "label": i % 2} for i, each in enumerate((dark, light, dark.copy())))) == [0, 1, 0]
    assert numbers(*({"image": each, "label": i % 2} for i, each in enumerate((dark, dark.T)))) == [0, 1]


def test_what_is_on_both_sides_is_counted_by_prompt() -> None:
    def records(prompts: str) -> Any:
        return read([{"prompt": p, "completion": str(i)} for i, p in enumerate(prompts)], DataConfig()).items

    assert overlap(records("aabbc"), records("ddabb")) == (
        "2 of 3 held-out prompts are also trained on: scores on them are too good."
    )
    assert overlap(records("a"), records("ab"), "test") == (
        "1 of 1 test prompt is also trained on: scores on them are too good."
    )
    assert overlap(records("ab"), records("cd")) is None
    assert described(records("aabbc")) == "5 records of 3 prompts" and described(records("a")) == "1 record of 1 prompt"


@pytest.mark.parametrize("split", ["test", "valid"])
def test_items_of_e2e_are_its_prompts(shared_data: Path, split: str) -> None:
    records = read(shared_data / "e2e", DataConfig(), split=split)
    assert len(set(item_numbers(records.items))) == len(references(records)) == {"test": 630, "valid": 547}[split]
