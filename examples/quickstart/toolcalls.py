"""Generate free-form requests and the strict JSON call that each one means: a small, deterministic data set.

    python examples/quickstart/toolcalls.py --out data        # data/train.jsonl, data/valid.jsonl, data/test.jsonl

A record is {"prompt": "book a table for two at ...", "completion": '{"tool": "book_table", "args": {...}}'}.
The two held-out parts, valid (to choose settings by) and test (to score once), are disjoint from the training part by
construction: each has its own wordings, its own openings and closings, and its own value of every free slot (names,
items, cities, texts, pairs of units; numbers, dates and times are held out for both). What the parts share is what a
schema fixes: tools, argument names, units, and the ways to write a date or a time.
Requests name no year, so dates are in the schema's YEAR; times are on the 24-hour clock.
"""

import argparse
import calendar
import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from wordings import CALLS, Call
from words import NUMBERS, PARTS, UNITS, split

YEAR = 2026
# A wording that begins so ends in a question mark, where it gets a mark
QUESTIONS = split("What, What's, How, Is, Are, Which, When, Could, Would, Can, May, Do, Does, Has, Any")

# How often a word of a training value is coined, so that copying is learned, not the pool
COINED = 0.4
WHOLE = ["name", "item", "city", "label"]  # pools whose entries are whole values
COPIED = [*WHOLE, "place", "task"]
SYLLABLES = """
    b, br, c, ch, d, dr, f, fl, g, gl, h, j, k, kl, l, m, n, p, pl, qu, r, s, sh, st, t, th, tr, v, w, z / a, e, i, o, u,
    ai, ea, ee, oo, ou / l, ll, m, n, nd, r, rk, rt, s, ss, t, v, x, ck, nt, bb
"""
# A coined word may make a held-out value by chance; a training request that holds one is drawn again
HELD_OUT_VALUES = [w for part in ("valid", "test") for kind in WHOLE for w in split(PARTS[part][kind])]
HELD_OUT_VALUE = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, HELD_OUT_VALUES))})(?!\w)", re.IGNORECASE)


def is_held_out(*numbers: float) -> bool:
    """Return the part that a number, a date or a time belongs to, by the sum of its digits: one in four is held out."""
    return sum(int(digit) for number in numbers for digit in f"{number:g}" if digit != ".") % 4 == 3


class Draw:
    """Draw what a slot may say in one part, as (text, argument): one method for each kind of slot, of its name."""

    def __init__(self, rng: Random, part: str) -> None:
        self.rng, self.part, self.pools, self.held_out = rng, part, PARTS[part], part != "train"

    def slot(self, slot: str) -> dict[str, tuple[str, Any]]:
        argument, _, kind = slot.partition(":")
        kind = kind or argument
        if kind in self.pools and kind != "units":
            said = self.coined(kind) if not self.held_out and self.rng.random() < COINED else self.pick(kind)
            return {argument: (said, said)}
        drawn = getattr(self, kind)()
        return dict(zip(argument.split("-"), drawn, strict=True)) if "-" in argument else {argument: drawn}

    def coined(self, kind: str) -> str:
        """Return a value of which one word belongs to no pool or to another one."""
        words = self.pick(kind).split()
        place = self.rng.randrange(len(words))
        if self.rng.random() < 0.5:
            word = "".join(self.rng.choice(split(part)) for part in SYLLABLES.split("/") * self.rng.choice([1, 2]))
        else:
            word = self.rng.choice(re.findall(r"\w{4,}", self.pools[self.rng.choice(COPIED)]))
        words[place] = word.capitalize() if words[place][0].isupper() else word.lower()
        return " ".join(words)

    def pick(self, pool: str) -> str:
        return " ".join(self.rng.choice(split(words)) for words in self.pools[pool].split("/"))

    def ours(self, choose: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        while is_held_out(*(numbers := choose())) != self.held_out:
            pass
        return numbers

    def whole(self, top: int) -> tuple[str, int]:
        (number,) = self.ours(lambda: (self.rng.randint(2, top),))
        return str(number), number

    def people(self) -> tuple[str, int]:
        said, number = self.whole(12)
        return (NUMBERS[number] if self.rng.random() < 0.4 else said), number

    def amount(self) -> tuple[str, float]:
        (number,) = self.ours(lambda: (self.rng.randint(2, 999) / self.rng.choice([1, 10, 10, 100]),))
        return f"{number:g}", number

    def unit(self, key: str) -> tuple[str, str]:
        return self.rng.choice(UNITS[key]), key

    def units(self) -> tuple[tuple[str, str], ...]:
        return tuple(self.unit(key) for key in self.pick("units").split())

    def period(self) -> tuple[tuple[str, int], tuple[str, str]]:
        key, top = self.rng.choice([("s", 99), ("min", 20), ("min", 99), ("h", 24)])
        return self.whole(top), self.unit(key)

    def measure(self) -> tuple[tuple[str, int], tuple[str, str]]:
        key, top = self.rng.choice([("kg", 30), ("g", 950), ("pack", 30), ("bag", 12), ("box", 30), ("jar", 12)])
        return self.whole(top), self.unit(key)

    def date(self) -> tuple[str, str]:
        month, day = self.ours(lambda: (self.rng.randint(1, 12), self.rng.randint(1, 28)))
        name = calendar.month_name[month]
        th = {1: "st", 2: "nd", 3: "rd"}.get(day if day < 20 else day % 10, "th")
        forms = [f"{name} {day}", f"{day} {name}", f"{name} {day}{th}", f"the {day}{th} of {name}", f"{name[:3]} {day}"]
        return self.rng.choice(forms), f"{YEAR}-{month:02}-{day:02}"

    def time(self) -> tuple[str, str]:
        minutes = [0, 0, 0, 15, 30, 30, 45, *range(5, 60, 5)]
        hour, minute = self.ours(lambda: (self.rng.randint(6, 23), self.rng.choice(minutes)))
        said = [f"{hour}:{minute:02}", f"{hour:02}:{minute:02}", f"{hour}.{minute:02}", f"{hour}h{minute:02}"]
        return self.rng.choice(said), f"{hour:02}:{minute:02}"

    def record(self, call: Call) -> dict[str, str]:
        slots = {name: drawn for slot in call.slots.split() for name, drawn in self.slot(slot).items()}
        while call.tool == "find_train" and slots["from"] == slots["to"]:
            slots |= self.slot("to:city")
        wording = self.rng.choice(split(getattr(call, self.part), "|"))
        prompt = wording.format_map({name: said for name, (said, _) in slots.items()})
        if wording[0].islower() and self.rng.random() < 0.5:
            prompt = f"{self.pick('openings')} {prompt}"
        elif wording[0].isupper() and wording[:2] not in ("I ", "I'") and self.rng.random() < 0.5:
            prompt = prompt[0].lower() + prompt[1:]
        if not wording.endswith(("text}", "task}")):  # where free text ends the request, a closing would join it
            prompt += f", {self.pick('closings')}" if self.rng.random() < 0.25 else ""
        if self.rng.random() < 0.5:
            mark = "?" if wording.split()[0] in QUESTIONS else "."
            prompt = prompt[0].upper() + prompt[1:] + ("" if prompt.endswith(("?", '"')) else mark)
        args = {name: value for name, (_, value) in slots.items()} | call.settled
        return {
            "prompt": prompt,
            "completion": json.dumps({"tool": call.tool, "args": args}, ensure_ascii=False, separators=(",", ":")),
        }


def generate(count: int, *, seed: int, part: str) -> list[dict[str, str]]:
    """Return `count` different records of one part, every tool equally often, in random order; a seed fixes them."""
    rng = Random(f"{seed} {part}")
    draw = Draw(rng, part)
    tools = list(dict.fromkeys(call.tool for call in CALLS))
    records: dict[str, dict[str, str]] = {}
    for _ in range(20 * count):
        if len(records) < count:
            tool = tools[len(records) % len(tools)]
            calls = [call for call in CALLS if call.tool == tool]
            record = draw.record(rng.choices(calls, [len(split(call.train, "|")) for call in calls])[0])
            if draw.held_out or not HELD_OUT_VALUE.search(record["prompt"]):
                records.setdefault(record["prompt"].casefold(), record)
    if len(records) < count:
        raise ValueError(f"{count} different records were asked for, only {len(records)} were found")
    return rng.sample(list(records.values()), count)


def write(folder: Path, *, train: int, valid: int, test: int, seed: int) -> None:
    """Write train.jsonl, valid.jsonl and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("valid", valid), ("test", test)):
        lines = [json.dumps(record, ensure_ascii=False) for record in generate(count, seed=seed, part=part)]
        (folder / f"{part}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Writes train.jsonl, valid.jsonl and test.jsonl: requests and strict JSON calls."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    for part, count in (("train", 1200), ("valid", 120), ("test", 240)):
        parser.add_argument(f"--{part}", type=int, default=count, help="records of this part (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.out, train=options.train, valid=options.valid, test=options.test, seed=options.seed)
    print(
        f"{options.out}: {options.train} records to train on, {options.valid} to choose settings by, {options.test} to score"
    )


if __name__ == "__main__":
    main()
