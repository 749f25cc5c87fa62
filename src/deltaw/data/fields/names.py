"""Fields under the names that forms know, and the form that they make. Capitals, spaces and hyphens in names do not count.

A reading is a form with the fields that it takes. A record that has the fields of two readings is refused with both, except
where one of them takes all that the other does, and more.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from deltaw.data.chats.reading import SYSTEM, TURNS
from deltaw.data.chats.turns import ROLE_KEYS
from deltaw.data.sources import show
from deltaw.errors import DataError, nearest

FIELDS: dict[str, str] = {
    "prompt": "prompt, completion",
    "chat": "messages (or conversations), and if need be tools",
    "instruction": "instruction, output, and if need be input",
    "text": "text",
    "labelled": "text, label, and of pairs text_pair",
    "image": "image, label",
}
ANSWERS = ("completion", "completions", "response", "answer", "output")
"""Names of answers."""
QUESTIONS = ("prompt", "question", "query", "instruction", "input", "context")
"""Names of what is asked."""
TALKS = TURNS
"""Names of conversations."""
HISTORY = ("history",)
"""Names of the turns before the question."""
_PAIRS = (
    *(("prompt", answer) for answer in ANSWERS), ("question", "answer"), ("question", "response"), ("query", "response"),
    ("query", "answer"), ("input", "output"), ("source", "target"),
)  # fmt: skip
_MAY_BE = TURNS[2:]
"""Names that mean a conversation only where they hold one."""
_INPUTS = ("input", "context")
_TEXTS = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"),
    ("question", "sentence"), ("sentence", None), ("text", None),
)  # fmt: skip
"""Names of a labelled record's texts; the first pair that is there counts."""
_OTHERS = ("text", "text_pair", "label", "image", "source", "target", "tools")
VOCABULARY = frozenset(
    [*ANSWERS, *QUESTIONS, *TALKS, *SYSTEM, *HISTORY, *_OTHERS, *(name for pair in _TEXTS for name in pair if name)]
)
"""The names that some form knows."""
_EXAMPLES = {
    "prompt": "also question, answer; query, response; input, output; source, target",
    "instruction": "also context for input, and response for output",
}


class Named(dict[str, object]):
    """A record's values by the names that forms know, each with what the record calls it.

    Args:
        values: name → value.
        names: name → the record's field, or the path into it.
        there: all fields of the record.
    """

    def __init__(self, values: Mapping[str, object], names: Mapping[str, str], there: Sequence[str]) -> None:
        super().__init__(values)
        self.names, self.there = names, there


def called(fields: Mapping[str, object], name: str) -> str:
    """Return what the record calls a field."""
    return fields.names.get(name, name) if isinstance(fields, Named) else name


def fields_of(fields: Mapping[str, object]) -> list[str]:
    """Return all fields of the record, as it calls them."""
    return list(fields.there) if isinstance(fields, Named) else [str(field) for field in fields]


@functools.lru_cache(maxsize=10_000)
def plain(field: str) -> str:
    """Return a field's name in small letters and with underscores, if a form knows it so; else as it is."""
    name = re.sub(r"[\s-]+", "_", field.strip().lower())
    return name if name in VOCABULARY else field


def are_turns(value: object) -> bool:
    """Return whether a value is a list of messages."""
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], Mapping):
        return False
    return any(key in value[0] for key in ROLE_KEYS)


@dataclass(frozen=True)
class Reading:
    """A form, and the fields that it takes."""

    form: str
    takes: tuple[tuple[str, str], ...]
    """The form's name of a field, and the record's."""

    @property
    def used(self) -> frozenset[str]:
        """The record's fields."""
        return frozenset(name for _, name in self.takes)

    def __str__(self) -> str:
        return f"{self.form} ({', '.join(name for _, name in self.takes)})"


@dataclass(frozen=True)
class Asked:
    """Wishes of the caller."""

    form: str = "auto"
    completions: bool = True
    """False where prompts alone are read."""
    labels: bool = True
    """False where a label is a field like any other."""
    columns: frozenset[str] = frozenset()
    """Names that the user gave columns for: only readings that take all of them count."""


def readings(row: Mapping[str, object], asked: Asked) -> list[Reading]:
    """Return the readings that a record's fields make."""
    there = frozenset(
        name
        for name, value in row.items()
        if value is not None and name in VOCABULARY and (name not in _MAY_BE or are_turns(value))
    )
    labelled = "label" in row and (asked.completions or row["label"] is not None)  # a null one is named when it is read
    return list(_readings(there, labelled and (asked.labels or asked.form in ("labelled", "image")), asked))


@functools.lru_cache(maxsize=10_000)
def _readings(there: frozenset[str], labelled: bool, asked: Asked) -> tuple[Reading, ...]:
    every = [*_whole(there, labelled)]
    if not asked.completions:
        every += _without_answers(there)
        every = [r for r in every if r.used != {"source"}] or every  # which is often where a prompt comes from
    taken = _placed(asked)
    every = [r for r in every if taken <= r.used] or every
    if asked.form != "auto":
        every = [r for r in every if r.form == asked.form]
    every = [r for r in every if not any(r.used < other.used for other in every)]
    return tuple(dict.fromkeys(every))


def _placed(asked: Asked) -> frozenset[str]:
    """Return the names with columns that a reading must have a place for."""
    taken = asked.columns & (VOCABULARY - {"tools", *SYSTEM, *HISTORY})
    return taken if asked.completions else taken - {*ANSWERS, "label"}


def _whole(there: frozenset[str], labelled: bool) -> list[Reading]:
    """Return the readings that have all that their form needs."""
    every = [Reading("prompt", (("prompt", q), ("completion", a))) for q, a in _PAIRS if {q, a} <= there]
    for answer in (name for name in ANSWERS if name in there and "instruction" in there):
        base = (("instruction", "instruction"), ("output", answer))
        every.append(Reading("instruction", base))
        every += [Reading("instruction", (*base, ("input", name))) for name in _INPUTS if name in there]
    every += [Reading("chat", ((name, name),)) for name in TALKS if name in there]
    every += [Reading("text", (("text", "text"),))] * ("text" in there)
    if labelled:
        texts = next((pair for pair in _TEXTS if all(name in there for name in pair if name)), None)
        if texts is not None:
            both = [(name, field) for name, field in zip(("text", "text_pair"), texts, strict=True) if field]
            every.append(Reading("labelled", (*both, ("label", "label"))))
        every += [Reading("image", (("image", "image"), ("label", "label")))] * ("image" in there)
    return every


def _without_answers(there: frozenset[str]) -> list[Reading]:
    """Return the readings that have a question at least."""
    every = [
        Reading("prompt", (("prompt", q),)) for q in ("prompt", "question", "query", "input", "source") if q in there
    ]
    if "instruction" in there:
        every.append(Reading("instruction", (("instruction", "instruction"),)))
        every += [
            Reading("instruction", (("instruction", "instruction"), ("input", name)))
            for name in _INPUTS
            if name in there
        ]
    return every


def recognise(rows: Sequence[Named], places: Sequence[str], source: str, asked: Asked) -> Reading:
    """Return the reading that most of the first records have.

    Raises DataError, with the fields, if they have none, or several of them, or if it has no place for a column that is named.
    """
    reading = _recognised(rows, places, source, asked)
    if left := sorted(_placed(asked) - reading.used):
        raise DataError(
            f"{source}: columns names {' and '.join(left)}, which {reading.form} records ({', '.join(sorted(reading.used))}) "
            "have no place for: it would be lost. Leave it out, or name the columns of another form:\n"
            f"{_forms()}"
        )
    return reading


def _recognised(rows: Sequence[Named], places: Sequence[str], source: str, asked: Asked) -> Reading:
    first = rows[:20]
    counts = Counter(reading for row in first for reading in readings(row, asked))
    most = max(counts.values(), default=0)
    best = [reading for reading in counts if counts[reading] == most]
    unlabelled = [r.form for r in best] == ["text"] and asked.form == "auto" and asked.labels and asked.completions
    if unlabelled and any(row.get("label") is not None for row in rows):
        return Reading("labelled", (("text", "text"), ("label", "label")))  # so that each one without a label is named
    apart = all(len(readings(row, asked)) < 2 for row in first)
    if len(best) == 1 or (apart and len({reading.form for reading in best}) == 1):
        return best[0]
    if asked.form != "auto" and not best:
        return _CANONICAL[asked.form]
    there = list(dict.fromkeys(field for row in first for field in row.there))
    if best and apart:
        raise DataError(
            f"{source}: its records have several forms, {' and '.join(map(str, best))}. Give each as a file of its own."
        )
    if not best:
        raise DataError(f"{source}: {_none(there, rows, asked)}")
    place = next(place for place, row in zip(places, rows, strict=True) if len(readings(row, asked)) > 1)
    raise DataError(f"{source}: {_several(there, place, best)}")


def differing(alike: Sequence[Reading]) -> str:
    """Return what is wrong with a record that has several readings, and what to do."""
    forms = {reading.form for reading in alike}
    example = ",".join(f"{name}={field}" for name, field in alike[0].takes)
    ways = ["Set form to the one you mean"] * (len(forms) > 1) + [f"name the columns, for example --columns {example}"]
    return f"{' and '.join(map(str, alike))}. {', or '.join(ways)}".replace(". name", ". Name")


def _several(there: Sequence[str], place: str, best: Sequence[Reading]) -> str:
    fit = f"the fields {', '.join(there)} (for example of {place}) fit more than one form"
    return f"{fit}: {differing(best)}. Forms and their fields:\n{_forms()}"


def _none(there: Sequence[str], rows: Sequence[Named], asked: Asked) -> str:
    """Return what is wrong with records whose fields make no form: what their values say, else the forms that there are."""
    names = ", ".join(there) or "(none)"
    if "prompt" in asked.columns and not asked.columns & {*ANSWERS}:
        more = f"Name that too: --columns prompt=…,completion=FIELD (fields: {names})"
        return f"its prompts are there, and nothing that answers them. {more}"
    head = f"no known form has the fields {names}."
    hints = list(dict.fromkeys(hint for row in rows[:20] for hint in _hints(row, asked, alone=len(rows) == 1)))
    if hints:
        return "\n  - ".join([head, *hints])
    known = sorted(VOCABULARY)
    near = "".join(f"\n  - {f!r}{nearest(f, known)}" for f in there if plain(f) not in VOCABULARY and nearest(f, known))
    tail = f"\nNear misses:{near}" if near else ""
    return (
        f"{head} Rename them to those of one form, or name them with columns (--columns prompt=FIELD,completion=FIELD; for "
        f"classes text=FIELD,label=FIELD):\n{_forms()}{tail}"
    )


def _hints(row: Named, asked: Asked, *, alone: bool) -> Iterator[str]:
    """Yield what to do with a record of no form, by its values. `alone`: it is the only one of its file."""
    if set(row) <= {"role", "content", "from", "value", "name"} and not {"role", "from"}.isdisjoint(row):
        yield 'its records are single messages. A record holds a whole conversation: {"messages": [{"role": …, "content": …}, …]}'
    for name, value in row.items():
        field = row.names.get(name, name)
        if are_turns(value):
            yield f"the field {field!r} holds messages: --columns messages={field}"
        elif isinstance(value, Mapping):
            yield from _inside(field, value, asked)
        elif name in TALKS and name != "items":
            yield f"the field {field!r} must be a list of messages, each with role and content, found {show(value)}"
        elif alone and isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            yield (
                f"the field {field!r} holds a list of objects. If these are the records, write that list as the file: "
                f"jq '.{field}' FILE > records.json"
            )


def _inside(field: str, value: Mapping[str, object], asked: Asked) -> Iterator[str]:
    """Yield the columns that take the fields of an object in a record."""
    inside = {plain(str(name)): (str(name), part) for name, part in value.items()}
    fit = readings({name: part for name, (_, part) in inside.items()}, replace(asked, form="auto", columns=frozenset()))
    if len(fit) == 1 and fit[0].form != "text":
        columns = ",".join(
            f"{'messages' if fit[0].form == 'chat' else name}={field}.{inside[taken][0]}"
            for name, taken in fit[0].takes
        )
        yield f"the object {field!r} has the fields of a record: --columns {columns}"


def _forms() -> str:
    return "\n".join(
        f"  - {form}: {fields}{f' ({_EXAMPLES[form]})' if form in _EXAMPLES else ''}" for form, fields in FIELDS.items()
    )


_CANONICAL = {
    "prompt": Reading("prompt", (("prompt", "prompt"), ("completion", "completion"))),
    "chat": Reading("chat", (("messages", "messages"),)),
    "instruction": Reading("instruction", (("instruction", "instruction"), ("output", "output"), ("input", "input"))),
    "text": Reading("text", (("text", "text"),)),
    "labelled": Reading("labelled", (("text", "text"), ("label", "label"))),
    "image": Reading("image", (("image", "image"), ("label", "label"))),
}
"""The reading of records that lack the fields of the form that was asked for, for messages."""
