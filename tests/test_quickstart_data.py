"""The quickstart's generated data: deterministic, strict JSON of the right types, two held-out parts that are unseen."""

import functools
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

sys.path.insert(0, str(FILE.parent))
import toolcalls  # noqa: E402
import words  # noqa: E402

PARTS = ("train", "valid", "test")
HELD_OUT = ("valid", "test")
PAIRS = [("valid", "train"), ("test", "train"), ("test", "valid")]
COUNTS = {"train": 6000, "valid": 600, "test": 600}


@functools.cache
def records_of(part):
    return toolcalls.generate(COUNTS[part], seed=0, part=part)


@functools.cache
def calls_of(part):
    return [json.loads(record["completion"]) for record in records_of(part)]


def free_values(part):
    """Every value of a slot that is not fixed by the schema: (text or number, kind)."""
    return {
        (value, type(value))
        for call in calls_of(part)
        for name, value in call["args"].items()
        if (call["tool"], name) not in CLOSED
    }


def mentions(text, value):
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE)


def wordings(call, part):
    return words.split(getattr(call, part), "|")


def test_same_seed_same_records_and_another_seed_others():
    assert toolcalls.generate(COUNTS["test"], seed=0, part="test") == records_of("test")
    other = toolcalls.generate(600, seed=1, part="test")
    assert len({r["prompt"] for r in other} & {r["prompt"] for r in records_of("test")}) < 60


def test_same_records_in_another_process(tmp_path):
    counts = {"train": 50, "valid": 30, "test": 20}
    for name in ("a", "b"):
        sizes = [word for part, count in counts.items() for word in (f"--{part}", str(count))]
        subprocess.run(
            [sys.executable, str(FILE), "--out", str(tmp_path / name), *sizes], check=True, capture_output=True
        )
    for part, count in counts.items():
        text = (tmp_path / "a" / f"{part}.jsonl").read_text("utf-8")
        assert text == (tmp_path / "b" / f"{part}.jsonl").read_text("utf-8")
        assert [json.loads(line) for line in text.splitlines()] == toolcalls.generate(count, seed=0, part=part)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("count", [0, 1, 8, 1200])
def test_count_and_no_duplicates(count, part):
    records = toolcalls.generate(count, seed=3, part=part)
    assert len(records) == count == len({r["prompt"].casefold() for r in records})


@pytest.mark.parametrize("held_out, other", PAIRS)
def test_no_request_is_in_two_parts(held_out, other):
    prompts = [{r["prompt"].casefold() for r in records_of(part)} for part in (held_out, other)]
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize("part", PARTS)
def test_completions_are_strict_json_of_the_schema(part):
    for record, call in zip(records_of(part), calls_of(part), strict=True):
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


@pytest.mark.parametrize("part", PARTS)
def test_every_free_text_and_number_can_be_read_off_the_request(part):
    for record, call in zip(records_of(part), calls_of(part), strict=True):
        for name, value in call["args"].items():
            if (call["tool"], name) in CLOSED or name in ("date", "time"):
                continue
            said = value if isinstance(value, str) else f"{value:g}"
            spelled = words.NUMBERS[value] if name == "people" else said
            assert mentions(record["prompt"], said) or mentions(record["prompt"], spelled), record


@pytest.mark.parametrize("part", PARTS)
def test_every_tool_and_wording_and_argument_value_type_occurs(part):
    tools = [call["tool"] for call in calls_of(part)]
    assert min(map(tools.count, SCHEMA)) >= len(tools) // len(SCHEMA)
    assert {call["args"]["urgent"] for call in calls_of(part) if call["tool"] == "send_message"} == {True, False}
    records = " \n ".join(r["prompt"] for r in records_of(part))
    for call in toolcalls.CALLS:
        for wording in wordings(call, part):
            pattern = re.sub(r"\\{.*?\\}", ".+", re.escape(wording))
            assert re.search(pattern, records, re.IGNORECASE), wording


def test_no_held_out_value_is_a_training_value():
    for part in HELD_OUT:
        held_out = free_values(part)
        assert len(held_out) > 500 and not held_out & free_values("train")


@pytest.mark.parametrize("held_out, other", PAIRS)
def test_no_held_out_text_occurs_anywhere_in_a_request_of_another_part(held_out, other):
    requests = "\n".join(r["prompt"] for r in records_of(other))
    texts = {value for value, kind in free_values(held_out) if kind is str and not re.fullmatch(r"[\d:-]+", value)}
    folded = requests.casefold()  # most are in it nowhere, which is known sooner than that they are no words there
    assert len(texts) > 250
    assert not [text for text in texts if text.casefold() in folded and mentions(requests, text)]
    for pool, entries in words.PARTS[held_out].items():  # nor does a part of one: both halves of a name are new
        for ours, theirs in zip(entries.split("/"), words.PARTS[other][pool].split("/"), strict=True):
            assert not {w.casefold() for w in words.split(ours)} & {w.casefold() for w in words.split(theirs)}


@pytest.mark.parametrize("part", HELD_OUT)
def test_numbers_dates_and_times_held_out_are_unseen_over_all_tools(part):
    def kinds(part):
        args = [(name, value) for call in calls_of(part) for name, value in call["args"].items()]
        return (
            {float(v) for _, v in args if type(v) in (int, float)},
            {v for n, v in args if n == "date"},
            {v for n, v in args if n == "time"},
        )

    for seen, held_out in zip(kinds("train"), kinds(part), strict=True):
        assert len(held_out) > 40 and not seen & held_out


@pytest.mark.parametrize("held_out, other", PAIRS)
def test_unit_pairs_of_the_parts_are_disjoint(held_out, other):
    def pairs(part):
        return {(c["args"]["from"], c["args"]["to"]) for c in calls_of(part) if c["tool"] == "convert"}

    assert len(pairs(held_out)) > 10 and not pairs(held_out) & pairs(other)


@pytest.mark.parametrize("held_out, other", PAIRS)
def test_no_held_out_wording_fits_a_request_of_another_part(held_out, other):
    requests = [re.sub(r"\s+", " ", r["prompt"]) for r in records_of(other)]
    for call in toolcalls.CALLS:
        seen = {re.sub(r"\{.*?\}", "{}", wording).casefold() for wording in wordings(call, other)}
        for wording in wordings(call, held_out):
            assert re.sub(r"\{.*?\}", "{}", wording).casefold() not in seen
            pattern = re.compile(re.sub(r"\\{.*?\\}", ".+", re.escape(wording)), re.IGNORECASE)
            assert not [request for request in requests if pattern.search(request)], wording


def test_wordings_use_exactly_the_slots_of_their_call():
    for call in toolcalls.CALLS:
        slots = {name for slot in call.slots.split() for name in slot.partition(":")[0].split("-")}
        for part in PARTS:
            for wording in wordings(call, part):
                assert sorted(re.findall(r"\{(\w+)\}", wording)) == sorted(slots), wording
