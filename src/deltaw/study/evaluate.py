"""How good is this model on these records? Loss of the references and scores of what it generates. Prints nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltaw.config import DataConfig, GenerateConfig
from deltaw.data import Record, collate, encode, encode_prompt, references
from deltaw.generation import generate, pad_id
from deltaw.modes import evaluating
from deltaw.positions import most_positions, within
from deltaw.study.metrics import METRICS, TEXT_METRICS, Score, check_metrics, perplexity, ratio
from deltaw.training.loss import CompletionLoss


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model, as it stood (base, adapter or merged), on one set of records."""

    items: int
    """Distinct prompts."""
    scores: dict[str, Score]
    predictions: list[str]
    """One for each item; empty when only the loss was asked for."""
    seconds: float


@dataclass(frozen=True)
class Items:
    """Records grouped by prompt."""

    records: list[Record]
    """One of each prompt."""
    references: list[list[str]]

    @classmethod
    def of(cls, records: Any) -> Items:
        """Records with equal prompts become one item with several references."""
        pairs = references(records)
        return cls([record for record, _ in pairs], [list(refs) for _, refs in pairs])


def evaluate(
    model: Any,
    tokenizer: Any,
    records: Any,
    data: DataConfig,
    generation: GenerateConfig,
    *,
    metrics: Sequence[str] = METRICS,
    on_done: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Score the model with whatever adapter is active. Loss is per supervised token over all records; exact match, BLEU and
    ROUGE-L are of one generated completion for each distinct prompt. Raises ConfigError for an unknown metric."""
    check_metrics(metrics)
    data = within(data, model)
    began = time.monotonic()
    items = Items.of(records)
    scores: dict[str, Score] = {}
    if "loss" in metrics or "perplexity" in metrics:
        loss = _loss(model, tokenizer, records, data, generation.batch)
        scores["loss"], scores["perplexity"] = loss, perplexity(loss)
    texts = [m for m in metrics if m in TEXT_METRICS]
    predictions: list[str] = []
    if texts:
        prompts = [encode_prompt(record, tokenizer, data) for record in items.records]
        predictions = generate(model, tokenizer, prompts, generation, on_done=on_done)
        scores |= {name: TEXT_METRICS[name](predictions, items.references) for name in texts}
    return Evaluation(len(items.records), {m: scores[m] for m in metrics}, predictions, time.monotonic() - began)


@torch.no_grad()
def _loss(model: Any, tokenizer: Any, records: Any, data: DataConfig, batch: int) -> Score:
    """−log p per supervised token, resampled by record."""
    examples = sorted(encode(records, tokenizer, data).examples, key=lambda e: len(e.input_ids))
    loss = CompletionLoss(model)
    sums: list[float] = []
    counts: list[float] = []
    with evaluating(model):
        for start in range(0, len(examples), batch):
            rows = examples[start : start + batch]
            losses, of_row = loss.per_token(collate(rows, pad_id(tokenizer), most_positions(model)))
            sums += torch.zeros(len(rows), dtype=torch.float64).index_add_(0, of_row, losses.double().cpu()).tolist()
            counts += torch.bincount(of_row, minlength=len(rows)).tolist()
    return ratio(sums, counts)
