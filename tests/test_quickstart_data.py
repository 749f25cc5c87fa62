"""The quickstart's generated data: deterministic, strict JSON of the right types, a held-out part that is unseen."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "examples" / "quickstart" / "toolcalls.py"
SCHEMA = {
    "set_timer": {"duration": int, "unit": str, "label": str},
    "add_item": {"item": str, "count": int, "unit": str},
    "send_message": {"to": str, "text": str, "urgent": bool},
    "book_table": {"place": str, "people": int, "date": str, "time": str},
    "convert": {"amount": float, "from": str, "to": str},
    "remind": {"task": str, "date": str, "time": str},
    "find_train": {"from": str, "to": str, "date": str},
}
CLOSED = {
    ("set_timer", "unit"),
    ("add_item", "unit"),
    ("convert", "from"),
    ("convert", "to"),
    ("send_message", "urgent"),
}


def load():
    spec = importlib.util.spec_from_file_location("toolcalls", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toolcalls"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


toolcalls = load()
TRAIN = toolcalls.generate(6000, seed=0, held_out=False)
TEST = toolcalls.generate(600, seed=0, held_out=True)
CALLS = {
    call_part: [json.loads(r["completion"]) for r in part] for call_part, part in (("train", TRAIN), ("test", TEST))
}


def free_values(part):
    """Every value of a slot that is not fixed by the schema: (text or number, kind)."""
    return {
        (value, type(value))
        for call in CALLS[part]
        for name, value in call["args"].items()
        if (call["tool"], name) not in CLOSED
    }


def mentions(text, value):
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE)


def wordings(call, part):
    return toolcalls.split(getattr(call, part), "|")


def test_same_seed_same_records_and_another_seed_others():
    assert toolcalls.generate(6000, seed=0, held_out=False) == TRAIN
    other = toolcalls.generate(600, seed=1, held_out=True)
    assert len({r["prompt"] for r in other} & {r["prompt"] for r in TEST}) < 60


def test_same_records_in_another_process(tmp_path):
    for name in ("a", "b"):
        command = [sys.executable, str(FILE), "--out", str(tmp_path / name), "--train", "50", "--held-out", "20"]
        subprocess.run(command, check=True, capture_output=True)
    for file, count in (("train.jsonl", 50), ("test.jsonl", 20)):
        text = (tmp_path / "a" / file).read_text("utf-8")
        assert text == (tmp_path / "b" / file).read_text("utf-8")
        part = toolcalls.generate(count, seed=0, held_out=file == "test.jsonl")
        assert [json.loads(line) for line in text.splitlines()] == part


@pytest.mark.parametrize("count", [0, 1, 8, 1200])
def test_count_and_no_duplicates(count):
    for held_out in (False, True):
        records = toolcalls.generate(count, seed=3, held_out=held_out)
        assert len(records) == count == len({r["prompt"].casefold() for r in records})


def test_no_request_is_in_both_parts():
    assert not {r["prompt"].casefold() for r in TRAIN} & {r["prompt"].casefold() for r in TEST}


@pytest.mark.parametrize("part", ["train", "test"])
def test_completions_are_strict_json_of_the_schema(part):
    for record, call in zip(TRAIN if part == "train" else TEST, CALLS[part], strict=True):
        assert set(record) == {"prompt", "completion"}
        assert (
            "\n" not in record["completion"]
            and json.dumps(call, ensure_ascii=False, separators=(",", ":")) == record["completion"]
        )
        assert list(call) == ["tool", "args"] and call["tool"] in SCHEMA
        types = {name: type(value) for name, value in call["args"].items()}
        assert list(types.items()) == list(SCHEMA[call["tool"]].items())
        for name, shape in (
            ("date", rf"{toolcalls.YEAR}-(0[1-9]|1[0-2])-[0-2]\d"),
            ("time", r"(0[6-9]|1\d|2[0-3]):[0-5]\d"),
        ):
            assert re.fullmatch(shape, call["args"].get(name, "")) or name not in call["args"]
        if call["tool"] in ("convert", "find_train"):
            assert call["args"]["from"] != call["args"]["to"]


@pytest.mark.parametrize("part", ["train", "test"])
def test_every_free_text_and_number_can_be_read_off_the_request(part):
    for record, call in zip(TRAIN if part == "train" else TEST, CALLS[part], strict=True):
        for name, value in call["args"].items():
            if (call["tool"], name) in CLOSED or name in ("date", "time"):
                continue
            said = value if isinstance(value, str) else f"{value:g}"
            spelled = toolcalls.NUMBERS[value] if name == "people" else said
            assert mentions(record["prompt"], said) or mentions(record["prompt"], spelled), record


@pytest.mark.parametrize("part", ["train", "test"])
def test_every_tool_and_wording_and_argument_value_type_occurs(part):
    tools = [call["tool"] for call in CALLS[part]]
    assert min(map(tools.count, SCHEMA)) >= len(tools) // len(SCHEMA)
    assert {call["args"]["urgent"] for call in CALLS[part] if call["tool"] == "send_message"} == {True, False}
    records = " \n ".join(r["prompt"] for r in (TRAIN if part == "train" else TEST))
    for call in toolcalls.CALLS:
        for wording in wordings(call, "held_out" if part == "test" else "train"):
            pattern = re.sub(r"\\{.*?\\}", ".+", re.escape(wording))
            assert re.search(pattern, records, re.IGNORECASE), wording


def test_no_held_out_value_is_a_training_value():
    held_out, seen = free_values("test"), free_values("train")
    assert len(held_out) > 500 and not held_out & seen


def test_no_held_out_text_occurs_anywhere_in_a_training_request():
    requests = "\n".join(r["prompt"] for r in TRAIN)
    texts = {value for value, kind in free_values("test") if kind is str and not re.fullmatch(r"[\d:-]+", value)}
    assert len(texts) > 250 and not [text for text in texts if mentions(requests, text)]
    for pool, words in toolcalls.HELD_OUT.items():  # nor does a part of one: both halves of a name are new
        for part, train_part in zip(words.split("/"), toolcalls.TRAIN[pool].split("/"), strict=True):
            assert not {w.casefold() for w in toolcalls.split(part)} & {
                w.casefold() for w in toolcalls.split(train_part)
            }


def test_numbers_dates_and_times_of_the_parts_are_disjoint_over_all_tools():
    def kinds(part):
        args = [(name, value) for call in CALLS[part] for name, value in call["args"].items()]
        return (
            {float(v) for _, v in args if type(v) in (int, float)},
            {v for n, v in args if n == "date"},
            {v for n, v in args if n == "time"},
        )

    for seen, held_out in zip(kinds("train"), kinds("test"), strict=True):
        assert len(held_out) > 40 and not seen & held_out


def test_unit_pairs_of_the_parts_are_disjoint():
    def pairs(part):
        return {(c["args"]["from"], c["args"]["to"]) for c in CALLS[part] if c["tool"] == "convert"}

    assert len(pairs("test")) > 10 and not pairs("train") & pairs("test")


def test_no_held_out_wording_fits_a_training_request():
    requests = [re.sub(r"\s+", " ", r["prompt"]) for r in TRAIN]
    for call in toolcalls.CALLS:
        seen = {re.sub(r"\{.*?\}", "{}", wording).casefold() for wording in wordings(call, "train")}
        for wording in wordings(call, "held_out"):
            assert re.sub(r"\{.*?\}", "{}", wording).casefold() not in seen
            pattern = re.compile(re.sub(r"\\{.*?\\}", ".+", re.escape(wording)), re.IGNORECASE)
            assert not [request for request in requests if pattern.search(request)], wording


def test_wordings_use_exactly_the_slots_of_their_call():
    for call in toolcalls.CALLS:
        slots = {name for slot in call.slots.split() for name in slot.partition(":")[0].split("-")}
        for part in ("train", "held_out"):
            for wording in wordings(call, part):
                assert sorted(re.findall(r"\{(\w+)\}", wording)) == sorted(slots), wording
