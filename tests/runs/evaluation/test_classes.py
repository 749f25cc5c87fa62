"""Counts of classes are those that one gets by hand, and their shares are scikit-learn's."""

from __future__ import annotations

import random

from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from deltaw.runs.evaluation.classes import Confusion

NAMES = ["no", "yes", "maybe", "never"]


def test_a_small_matrix_is_the_one_counted_by_hand() -> None:
    wanted, said = [0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 0, 2]
    confusion = Confusion.of(said, wanted, NAMES[:3])
    assert confusion.counts == [[1, 2, 0], [1, 1, 0], [0, 0, 1]]
    no, yes, maybe = confusion.classes
    assert (no.records, no.predicted, no.right) == (3, 2, 1)
    assert (no.precision, no.recall, no.f1) == (0.5, 1 / 3, 0.4)
    assert (yes.precision, yes.recall) == (1 / 3, 0.5) and maybe.f1 == 1.0
    assert confusion.mistakes == [("no", "yes", 2), ("yes", "no", 1)]


def test_every_share_is_that_of_scikit_learn() -> None:
    chance = random.Random(0)
    wanted = [chance.randrange(3) for _ in range(200)]  # the fourth class has no records
    said = [w if chance.random() < 0.6 else chance.randrange(3) for w in wanted]
    confusion = Confusion.of(said, wanted, NAMES)
    assert confusion.counts == confusion_matrix(wanted, said, labels=range(4)).tolist()
    shares = precision_recall_fscore_support(wanted, said, labels=range(4), zero_division=0.0)
    for i, one in enumerate(confusion.classes):
        theirs = [float(column[i]) for column in shares]
        assert (
            max(abs(a - b) for a, b in zip((one.precision, one.recall, one.f1, one.records), theirs, strict=True))
            < 1e-12
        )


def test_a_matrix_in_a_file_is_the_same() -> None:
    confusion = Confusion.of([0, 1], [1, 1], NAMES[:2])
    assert Confusion.from_json(confusion.to_json()) == confusion
