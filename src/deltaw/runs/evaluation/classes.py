"""Counts of right and wrong classes: the confusion matrix, and precision, recall and F1 of each class. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ClassScore:
    """The scores of one class. A share of nothing is 0, as scikit-learn has it."""

    name: str
    records: int
    """Records of this class."""
    predicted: int
    """Records that the model takes for this class."""
    right: int
    """Records that are both."""

    @property
    def precision(self) -> float:
        """The share of the predicted ones that are right."""
        return self.right / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """The share of the class's records that are predicted."""
        return self.right / self.records if self.records else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        return 2 * self.right / (self.predicted + self.records) if self.predicted + self.records else 0.0

    def to_json(self) -> dict[str, object]:
        """Return the scores as files hold them."""
        shares = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        return {"class": self.name, "records": self.records, "predicted": self.predicted, **shares}


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix.

    >>> counted = Confusion.of([0, 1, 1], [0, 0, 1], ["no", "yes"])
    >>> counted.counts, counted.classes[0].recall
    ([[1, 1], [0, 1]], 0.5)
    """

    labels: list[str]
    counts: list[list[int]]
    """[labels, labels]: records of the row's class that the model takes for the column's."""

    @classmethod
    def of(cls, predicted: Sequence[int], wanted: Sequence[int], labels: Sequence[str]) -> Confusion:
        """Count the records of each class by the class that the model takes them for."""
        counts = [[0] * len(labels) for _ in labels]
        for row, column in zip(wanted, predicted, strict=True):
            counts[row][column] += 1
        return cls(list(labels), counts)

    @property
    def classes(self) -> list[ClassScore]:
        """The scores of each class, in the order of the labels."""
        predicted = [sum(column) for column in zip(*self.counts, strict=True)]
        return [
            ClassScore(name, sum(row), predicted[i], row[i])
            for i, (name, row) in enumerate(zip(self.labels, self.counts, strict=True))
        ]

    @property
    def mistakes(self) -> list[tuple[str, str, int]]:
        """Class, the class it was taken for, and how often, the most frequent first."""
        wrong = [
            (wanted, said, self.counts[i][j])
            for i, wanted in enumerate(self.labels)
            for j, said in enumerate(self.labels)
            if i != j and self.counts[i][j]
        ]
        return sorted(wrong, key=lambda mistake: -mistake[2])

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Confusion:
        return cls(values["labels"], values["counts"])

    def to_json(self) -> dict[str, object]:
        """Return the matrix and the classes as files hold them."""
        return {"labels": self.labels, "counts": self.counts, "classes": [one.to_json() for one in self.classes]}
