"""Fields that carry meaning and are not used by a reading: each is refused with the reason.

A system message and earlier turns, which stand before a question, are used.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from deltaw.data.chats.fields import parsed
from deltaw.data.chats.reading import SYSTEM
from deltaw.data.fields.names import ANSWERS, HISTORY, QUESTIONS, TALKS, Asked, Named, Reading
from deltaw.data.sources import show
from deltaw.data.sources.places import HELD_OUT

MEDIA = ("image", "images", "video", "videos", "audio", "audios", "documents")
"""Names of what is no text."""
TOOLS = ("tools", "functions")
"""Names of tools on offer."""
_STEPS = "labels"
_VERDICTS = ("kto_tag", "is_correct", "is_chosen", "is_preferred", "desirable")
"""Names of a verdict on an answer, beside label."""
_WORSE = ("rejected", "rejected_response", "rejected_answer", "rejected_messages", "rejected_output")
_IGNORE = "--columns ignore="
WEIGHTS = ("weight", "weights", "score", "reward")
"""Numbers that tell records apart: refused where they are not all the same."""
_YES_OR_NO = {"true", "false", "0", "1", "-1", "0.0", "1.0", "-1.0", "yes", "no", "good", "bad"}

_KTO = (
    "says whether the answer is good (KTO), which is not trained on yet: bad answers would be taught as good ones. Keep the "
    "records with good answers, and leave the field out of them"
)
_BETTER_WORSE = (
    ("chosen", "rejected"), ("preferred_output", "non_preferred_output"), ("preferred", "dispreferred"),
    ("response_j", "response_k"),
)  # fmt: skip
"""Names of the better and the worse answer, also with something before or behind them (chosen_response)."""
_PAIRS = "are a preference pair, which is not trained on yet"
_LOST = "is no part of {form} records, and what it says would be lost"
_WEIGHED = (
    "says that records count differently, and records are not weighed yet. Keep the records that count, and leave the field "
    "out of them"
)
_LEARNT = "; or, where it is what is to be learned, take it with --columns label={name}"
_OF_RECORDS = ("weight", "weights")
"""Names of numbers that a record counts by, once where it has none."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_THOUGHT = (
    "holds the thoughts before an answer, which messages have a place for: give the question and the answer as messages, and "
    "the thoughts as reasoning_content beside the answer's content"
)
_SPLITS = {"train", "training", *HELD_OUT}
_OF_SPLITS = (
    "says which records are held out, and all would be trained on. Write each split as a file of its own (train.jsonl, "
    "valid.jsonl, test.jsonl) into a folder"
)
Why = tuple[str, str]
"""A field, and what is wrong with it."""


def is_empty(value: object) -> bool:
    """Return whether a field says nothing: null, no text, an empty list or object."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (list, tuple, dict)) and not value)


def of_pairs(row: Named) -> str | None:
    """Return what to do with a record that is a preference pair; None for others."""
    pair = _pair_of({name.strip().lower(): name for name in row})
    if pair is None or any(is_empty(row[name]) or isinstance(row[name], numbers.Real) for name in pair):
        return None
    chosen, rejected = pair
    name, answer = row.names.get(chosen, chosen), row[chosen]
    asks = (
        isinstance(answer, list) and answer and isinstance(answer[0], Mapping) and answer[0].get("role") != "assistant"
    )
    question = next((f for f in QUESTIONS if not is_empty(row.get(f))), None)
    columns = f"messages={name}" if asks else f"text={name}"
    if question is not None and not asks:
        within = ".messages" if isinstance(row[question], Mapping) else ""  # OpenAI's
        columns = f"prompt={row.names[question]}{within},completion={name}"
    both = f"{name} and {row.names.get(rejected, rejected)}"
    if isinstance(answer, Mapping):
        return f"{both} {_PAIRS}. To train on the chosen answers alone, put each at the end of its conversation"
    return f"{both} {_PAIRS}. To train on the chosen answers alone, set --columns {columns}"


def _pair_of(words: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the fields with the better and the worse answer, of a record's fields by their names in small letters."""
    for better, worse in _BETTER_WORSE:
        for word, name in words.items():
            other = words.get(word.replace(better, worse))
            if other is not None and re.fullmatch(f"(.*_)?{better}(_.*)?", word):
                return name, other
    return None


def refused(rest: Iterable[str], row: Named, reading: Reading, used: set[str], asked: Asked) -> Iterator[Why]:
    """Yield each field of a record that carries meaning and is not used.

    Args:
        rest: its fields that are not used and not empty.
        row: the record.
        reading: the form that it is read as.
        used: the fields that are used.
        asked: what the caller wants of the records.
    """
    for name in rest:
        why = _reason(name, row, reading, used, asked)
        if why is not None:
            yield row.names.get(name, name), why


def _reason(name: str, row: Named, reading: Reading, used: set[str], asked: Asked) -> str | None:
    """Return why a field that is not used is refused; None where it is not."""
    form, word = reading.form, name.lower()
    if word in MEDIA and form not in ("image", "labelled"):
        return "is not taught from, and would be lost: texts alone are"
    if form not in ("prompt", "instruction", "chat", "text"):
        return None
    if word in TOOLS and form in ("prompt", "instruction"):
        return "are tools on offer, which stand beside messages: give the question and the answer as messages"
    chosen = asked.form != "auto" or asked.columns
    if word == _STEPS and form == "text" and asked.labels and not chosen and not isinstance(row[name], (list, tuple)):
        return f"stands beside a text, and label is the name of what is to be learned: set --columns label={row.names[name]}"
    if word in _THOUGHTS and form in ("prompt", "instruction") and asked.completions and not chosen:
        return _THOUGHT
    if asked.completions and form != "text":
        if word in _WORSE and not chosen:
            return (
                f"is the worse answer of a preference pair, not trained on yet. To train on the other: {_IGNORE}{name}"
            )
        if word in _VERDICTS and _is_verdict(row[name]):
            return _KTO
        if word == "label" and _is_verdict(row[name]) and form == "chat":
            return _KTO
        if word == "label" and _is_verdict(row[name]):
            pair = ",".join(
                f"{t}={row.names.get(f, f)}" for t, (_, f) in zip(("text", "text_pair"), reading.takes, strict=False)
            )
            return f"{_KTO}; or, where it is a class to learn, set --columns {pair}"
        if word == _STEPS and isinstance(row[name], (list, tuple)):
            return "judges the steps of an answer, which is not trained on yet"
    if chosen or _is_repeated(row[name], [row.get(field) for field in used]):
        return None
    known = {*QUESTIONS, *SYSTEM, *HISTORY, "text"} | ({*ANSWERS, *TALKS} if asked.completions else set())
    if name not in known or (name in (*SYSTEM, *HISTORY) and form == "text"):
        return None
    return _LOST.format(form=form) + _instead(name, row, reading)


def _instead(name: str, row: Named, reading: Reading) -> str:
    """Return what to do with a field that a form has no place for."""
    if reading.form == "prompt" and name in ("context", "input") and len(reading.takes) == 2:
        (_, question), (_, answer) = ((t, row.names.get(f, f)) for t, f in reading.takes)
        return f". Take it as an input: --columns instruction={question},input={row.names[name]},output={answer}"
    return ". Write it into a field that is used"


def _is_verdict(value: object) -> bool:
    """Return whether a label is yes or no."""
    return isinstance(value, (bool, numbers.Real, str)) and str(value).strip().lower() in _YES_OR_NO


def _is_repeated(value: object, used: Sequence[object]) -> bool:
    """Return whether a text stands in what is used already, so that nothing is lost without it."""
    return isinstance(value, str) and any(value.strip() in text for part in used for text in _texts(part))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)


def weighed(rows: Sequence[Named], places: Sequence[str], form: str) -> dict[Why, list[str]]:
    """Return the fields by which records count differently, or for nothing, each with the records that have it."""
    names = WEIGHTS if form not in ("labelled", "image") else ("weight", "weights")
    refusals: dict[Why, list[str]] = {}
    for name in dict.fromkeys(field for row in rows for field in row if field.lower() in names):
        there = [(place, row[name]) for place, row in zip(places, rows, strict=True) if not is_empty(row.get(name))]
        if not all(_is_weight(value) for _, value in there):
            continue
        numbers = {_numbers_in(value) for _, value in there}
        if name.lower() in _OF_RECORDS:
            # A record without a weight counts once
            numbers |= {(1.0,)} if len(there) < len(rows) else set()
            numbers |= {(1.0,)} if numbers == {(0.0,)} else set()
        if len(numbers) > 1:
            instead = _LEARNT.format(name=name) if form in ("text", "labelled", "image") else ""
            refusals[(name, _WEIGHED + instead)] = [place for place, _ in there]
    return refusals | _split_apart(rows, places)


def _split_apart(rows: Sequence[Named], places: Sequence[str]) -> dict[Why, list[str]]:
    """Return a column that says which records are held out, where it says so of some: all would be trained on."""
    refusals: dict[Why, list[str]] = {}
    for name in dict.fromkeys(field for row in rows for field in row if field.lower() == "split"):
        there = [(place, row[name]) for place, row in zip(places, rows, strict=True) if not is_empty(row.get(name))]
        values = {str(value).strip().lower() for _, value in there}
        if len(values) > 1 and values <= _SPLITS:
            refusals[(name, _OF_SPLITS)] = [place for place, _ in there]
    return refusals


def _numbers_in(value: Any) -> tuple[float, ...]:
    """Return a weight, or the weights of several answers, as numbers."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(float(part) for part in values)


def _is_weight(value: object) -> bool:
    """Return whether a value is a number, also as the text of a table's cell, or a list of them for each answer."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_weight, value))
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def turns_before(row: Named, lines: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the roles and texts of what stands before a record's question, and the fields that say it.

    It is a system message and earlier questions with their answers. What is wrong with them is added to `lines`.
    """
    systems = [name for name in SYSTEM if not is_empty(row.get(name))]
    if len(systems) > 1:
        lines.append(
            f"it has several system messages, in {' and '.join(repr(row.names[n]) for n in systems)}; leave one"
        )
    turns = [("system", _text(row[name], row.names[name], lines)) for name in systems[:1]]
    used = systems
    for name in (name for name in HISTORY if not is_empty(row.get(name))):
        used.append(name)
        turns += _history(row[name], row.names[name], lines)
    return turns, used


def _history(value: object, name: str, lines: list[str]) -> list[tuple[str, str]]:
    """Return earlier turns: [[question, answer], …], or messages."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # as a table has it
        count = len(lines)
        value = parsed(value, name, lines)
        if len(lines) > count:
            return []
    if not isinstance(value, (list, tuple)):
        lines.append(f"field {name!r} must be a list of [question, answer] pairs, found {show(value)}")
        return []
    turns: list[tuple[str, str]] = []
    for i, turn in enumerate(value):
        where = f"{name}[{i}]"
        if isinstance(turn, (list, tuple)) and len(turn) == 2:
            turns += [
                ("user", _text(turn[0], f"{where}[0]", lines)),
                ("assistant", _text(turn[1], f"{where}[1]", lines)),
            ]
        elif (
            isinstance(turn, Mapping)
            and turn.get("role") in ("system", "user", "assistant")
            and set(turn) == {"role", "content"}
        ):
            turns.append((str(turn["role"]), _text(turn["content"], f"{where}.content", lines)))
        else:
            lines.append(f"{where} must be a pair [question, answer], found {show(turn)}")
    return turns


def _text(value: object, name: str, lines: list[str]) -> str:
    if isinstance(value, str) and value.strip():
        return value
    lines.append(f"field {name!r} must be text that is not empty, found {show(value)}")
    return ""
