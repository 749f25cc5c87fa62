"""Losses of held-out records under several candidates, trained from one seed or several, and what they come to when records and
seeds are drawn again: the ground of every interval between candidates. Knows numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from deltaw.study.metrics import Array, Score, drawn

_RESAMPLES = 2000
Key = TypeVar("Key")


@dataclass(frozen=True)
class Losses:
    """Of n records under one candidate, trained from one seed or several."""

    sums: Array
    """[seeds, n]: of each record the sum of its predictions' losses."""
    counts: Array
    """[n]: the number of its predictions."""

    @property
    def value(self) -> float:
        """Per prediction, over all seeds."""
        return float(self.sums.sum() / (self.counts.sum() * len(self.sums)))


def draws(losses: Mapping[Key, Losses], seed: int) -> dict[Key, Array]:
    """Candidate → its loss in each resample. A resample draws records, and of the seeds as many as there are, with replacement:
    the same ones for every candidate, so that differences are paired. One that lacks the run of a seed draws its own seeds."""
    counts = next(iter(losses.values())).counts
    of_seeds = np.random.default_rng([seed, 1])
    numbers = sorted({len(own.sums) for own in losses.values()})
    made: dict[Key, list[Array]] = {key: [] for key in losses}
    for picks in drawn(len(counts), seed, _RESAMPLES):
        weights = _weights(picks)
        whole = weights @ counts
        picked = {k: of_seeds.integers(0, k, (len(picks), k)) for k in numbers}
        for key, own in losses.items():
            seeds = weights @ own.sums.T / whole[:, None]
            made[key].append(_mean_of(seeds, picked[len(own.sums)]))
    return {key: np.concatenate(values) for key, values in made.items()}


def _weights(picks: Array) -> Array:
    """[resamples, n]: how often each of n records was drawn. picks: [resamples, n], their numbers."""
    count, n = picks.shape
    places = picks + n * np.arange(count)[:, None]
    return np.bincount(places.ravel(), minlength=count * n).reshape(count, n).astype(float)


def _mean_of(seeds: Array, picked: Array) -> Array:
    """[resamples]: of the picked ones of seeds [resamples, k], as far from the mean of all as makes the draws' variance the one
    that k seeds show: resampling alone gives (k - 1)/k of it, which for three seeds is a third too little."""
    k, middle = seeds.shape[1], seeds.mean(1)
    if k == 1:
        return np.asarray(middle)
    return np.asarray(middle + math.sqrt(k / (k - 1)) * (np.take_along_axis(seeds, picked, 1).mean(1) - middle))


def score_of(value: float, resampled: Array) -> Score:
    """A value with the 95% interval of its resamples."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Score(value, float(low), float(high))
