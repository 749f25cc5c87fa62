"""Write support tickets with their department as CSV: a small classification data set, the same in each run.

    python examples/tickets/write.py tickets        # tickets/train.csv (300 rows) and tickets/test.csv (100 rows)

A row is a text and a label, with a ticket number beside them. The test rows have wordings that no training row has, so a model
that only knows sentences by heart fails on them.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from random import Random

GREETINGS = ["", "", "Hello, ", "Hi there, ", "Good morning, ", "Dear team, "]
CLOSINGS = ["", "", " Thanks!", " Please help.", " Kind regards", " It is urgent."]
THINGS = ["headphones", "desk lamp", "backpack", "kettle", "keyboard", "rain jacket", "phone case", "coffee grinder"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]

# label → wordings to train on, wordings to test on
WORDINGS = {
    "billing": (
        [
            "I was charged twice for the {thing}.",
            "my card shows two payments of {n} dollars since {day}.",
            "the invoice for order {n} has the wrong amount on it.",
            "why is there a fee of {n} dollars on my bill?",
            "can you send me a receipt for the {thing}?",
        ],
        [
            "you took the money for my {thing} two times.",
            "my bank statement from {day} lists {n} dollars too much.",
            "I need an invoice with our company's tax number for order {n}.",
        ],
    ),
    "login": (
        [
            "I cannot sign in to my account since {day}.",
            "the password reset mail never arrives.",
            "it says my account is locked after {n} tries.",
            "the code that you text me to sign in is always wrong.",
            "how do I change the e-mail address of my account?",
        ],
        [
            "I forgot my password and cannot get into my profile.",
            "your page has not let me log in since {day}.",
            "please unlock my user name, I typed the wrong password.",
        ],
    ),
    "returns": (
        [
            "I want to send the {thing} back, it does not fit.",
            "the {thing} came broken and I want another one.",
            "how many days do I have to return the {thing}?",
            "where do I print the return label for order {n}?",
            "the {thing} is not what I ordered, please take it back.",
        ],
        [
            "the {thing} stopped working after {n} days, can I swap it?",
            "I do not like the {thing} and would like to give it back.",
            "do I have to pay for the parcel if I return the {thing}?",
        ],
    ),
    "shipping": (
        [
            "where is my {thing}? It was to arrive on {day}.",
            "the tracking page of order {n} has not changed since {day}.",
            "can you deliver the {thing} to another address?",
            "the courier says that he left the parcel, but it is not here.",
            "how long does delivery of the {thing} take?",
        ],
        [
            "my package with the {thing} is {n} days late.",
            "the driver did not find our house on {day}, when will he come again?",
            "I moved, please send order {n} to my new street.",
        ],
    ),
}


def rows(part: int, count: int, seed: int) -> list[dict[str, object]]:
    """Return `count` tickets of the training wordings (part 0) or the test wordings (part 1), all classes in turn."""
    rng = Random(seed)
    tickets: list[dict[str, object]] = []
    for number in range(count):
        label = list(WORDINGS)[number % len(WORDINGS)]
        sentence = rng.choice(WORDINGS[label][part]).format(
            thing=rng.choice(THINGS), day=rng.choice(DAYS), n=rng.randint(3, 900)
        )
        greeting, closing = rng.choice(GREETINGS), rng.choice(CLOSINGS)
        text = greeting + (sentence if greeting else sentence[0].upper() + sentence[1:]) + closing
        tickets.append({"ticket_id": 1000 * (part + 1) + number, "text": text, "label": label})
    rng.shuffle(tickets)
    return tickets


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "tickets")
    out.mkdir(parents=True, exist_ok=True)
    for part, (name, count) in enumerate({"train": 300, "test": 100}.items()):
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["ticket_id", "text", "label"])
            writer.writeheader()
            writer.writerows(rows(part, count, seed=part))
        print(f"{out / name}.csv: {count} tickets")


if __name__ == "__main__":
    main()
