"""The memory of a run that is about to start: known where the model runs without values, and never in a run's way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import deltaw
from deltaw.data import Encoded
from deltaw.data.encode import Counts, Example
from deltaw.model.pretrained import Pretrained
from deltaw.runs.memory.expected import expected
from deltaw.training.prepare import Prepared, Sets
from tests.architectures import TABLE
from tests.conftest import byte_llama, tiny_llama
from tests.data.conftest import CHATML, tiny_tokenizer
from tests.training.test_models import hybrid

CONFIG = deltaw.TrainConfig(batch=2, data=deltaw.DataConfig(task="causal"))


def prepared(model: Any, method: Any = deltaw.LoRA(rank=2), **settings: Any) -> Prepared:  # noqa: B008  (frozen)
    """A run of this model over a short and a long record of ones."""
    examples = [Example([1] * n, [False] + [True] * (n - 1), "") for n in (9, 20)]
    encoded = Encoded(examples, Counts(2, 2, 0, 0, 29, 27, 20), [0, 1])
    config = dataclasses.replace(CONFIG, **settings)
    return Prepared(Pretrained(model, None, "tiny"), [], config, method, encoded, None, None, Sets("2", None, None))


def test_the_parts_add_up_and_nothing_changes() -> None:
    model = tiny_llama(layers=1)
    before, state = model.state_dict(), torch.get_rng_state()
    known = expected(prepared(model))
    assert known is not None
    figures = known.figures()
    total, _ = figures.pop("total"), figures.pop("logits")  # a part of "working"
    assert total == sum(figures.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    count = deltaw.summary(deltaw.attach(model, deltaw.LoRA(rank=2))).adapters["default"].parameters
    assert figures["optimizer"] == pytest.approx(8 * count, rel=0.05)


def test_a_run_that_may_not_fit_is_warned_of() -> None:
    run = prepared(tiny_llama(layers=1))
    for free, missing in ((None, False), (10**12, False), (1000, True)):
        known = expected(run, free=lambda device, free=free: free)
        assert known is not None and bool(known.missing) is missing
    assert "may run out of memory" in known.warning() and "--micro-batch 1" in known.warning()


def test_the_largest_pass_is_the_micro_batch_and_the_longest_records() -> None:
    kept = []
    for settings in ({"batch": 2}, {"batch": 2, "micro_batch": 1}, {"batch_tokens": 24}):
        known = expected(prepared(tiny_llama(layers=1), **settings))
        assert known is not None
        kept.append(known.memory.activations)
    assert kept[1] == kept[2] < kept[0]


def alike(model: Any, **settings: Any) -> Prepared:
    """A run of this model over records that begin alike for 120 tokens, and go on for 8."""
    run = prepared(model, batch=8, **settings)
    rows = [[1] * 120 + [2 + i] * 8 for i in range(16)]
    examples = [Example(row, [False] * 120 + [True] * 8, "") for row in rows]
    return dataclasses.replace(run, encoded=dataclasses.replace(run.encoded, examples=examples, records=[*range(16)]))


def test_what_records_begin_with_alike_is_held_once() -> None:
    kept = {}
    for share in ("off", "auto"):
        known = expected(alike(tiny_llama(layers=1), share=share))
        assert known is not None
        kept[share] = known.memory.activations
    assert kept["auto"] == pytest.approx(kept["off"] * 192 / (8 * 128), rel=0.2)


def test_a_model_that_takes_no_trees_holds_its_rows() -> None:
    auto, off = (expected(alike(hybrid(), share=share)) for share in ("auto", "off"))
    assert auto is not None and off is not None and auto.memory.activations == off.memory.activations


class _Reads(LlamaForCausalLM):
    """A model whose body asks for values as `read` does."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.register_forward_pre_hook(lambda body, args, named: self.read(named["input_ids"]), with_kwargs=True)

    def read(self, ids: Any) -> None:
        raise NotImplementedError


class _Counts(_Reads):
    """RuntimeError: torch has no kernel of `unique` for meta tensors."""

    def read(self, ids: Any) -> None:
        ids.unique()


class _Converts(_Reads):
    """TypeError: a meta tensor has nothing for numpy."""

    def read(self, ids: Any) -> None:
        ids.numpy()


class _Checks(_Reads):
    """ValueError: the model refuses what it reads."""

    def read(self, ids: Any) -> None:
        if not (ids >= 0).all():
            raise ValueError("input_ids must not be negative")


class _Sized(LlamaForCausalLM):
    """TypeError: the class is not made from its config alone."""

    def __init__(self, config: Any, size: int) -> None:
        super().__init__(config)


class _Bare(nn.Module):
    """AttributeError: a module without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def mixture() -> Any:
    """RuntimeError: torch's product of grouped experts takes bfloat16 alone on the meta device."""
    return next(a for a in TABLE if a.name == "Mixtral").build()


def changed() -> Any:
    """TargetError: the config does not describe a layer that was added to the object."""
    model = tiny_llama(layers=1)
    model.added = nn.Linear(8, 12)
    return model


UNKNOWN = {
    "no kernel": lambda: _Counts(tiny_llama(layers=1).config),
    "numpy": lambda: _Converts(tiny_llama(layers=1).config),
    "own check": lambda: _Checks(tiny_llama(layers=1).config),
    "own constructor": lambda: _Sized(tiny_llama(layers=1).config, 3),
    "no config": _Bare,
    "experts": mixture,
    "changed": changed,
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_memory_that_cannot_be_known_is_none(case: str) -> None:
    method = deltaw.LoRA(rank=2, targets="added") if case == "changed" else deltaw.LoRA(rank=2)
    assert expected(prepared(UNKNOWN[case](), method)) is None


def test_an_error_that_values_do_not_explain_is_not_swallowed() -> None:
    class Broken(_Reads):
        def read(self, ids: Any) -> None:
            raise KeyError("a mistake")

    with pytest.raises(KeyError):
        expected(prepared(Broken(tiny_llama(layers=1).config)))


def test_a_training_run_says_its_memory_as_it_starts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    records = [{"prompt": f"{n} and one?", "completion": f" {n + 1}"} for n in range(4)]
    config = deltaw.TrainConfig(out=str(tmp_path / "run"), steps=1, batch=2, samples=0, device="cpu", dtype="float32")
    deltaw.train(byte_llama(tokenizer), records, config, tokenizer=tokenizer)
    start = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert start["event"] == "start" and start["expected_memory"]["total"] > 4 * start["parameters"]
