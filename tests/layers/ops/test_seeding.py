"""Random numbers for the length of a block."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deltaw
from deltaw.config import SweepConfig
from deltaw.layers.ops.seeding import devices_of, mixed, seeded
from deltaw.model.pretrained import load_pretrained
from deltaw.runs.candidates import candidates
from tests.conftest import byte_llama, fill, tiny_llama
from tests.data.conftest import tiny_tokenizer


def test_a_block_draws_from_its_seed_and_leaves_the_callers_numbers() -> None:
    torch.manual_seed(7)
    expected = torch.rand(2), torch.rand(3)
    torch.manual_seed(9)
    inside = torch.rand(4)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(2), expected[0])
    with pytest.raises(ValueError, match="out"), seeded(9):
        assert torch.equal(torch.rand(4), inside)
        with seeded(10):
            torch.rand(50)
        raise ValueError("out")
    assert torch.equal(torch.rand(3), expected[1])


def test_seeds_out_of_several_numbers_do_not_meet() -> None:
    numbers = [mixed(a, b) for a in range(-3, 40) for b in range(40)] + [mixed("step", 1), mixed("step", "1 2")]
    assert len(set(numbers)) == len(numbers) and mixed(1, 2) == mixed(1, 2)
    torch.Generator().manual_seed(max(numbers))


def test_the_devices_of_a_model() -> None:
    model = tiny_llama()
    assert devices_of(model) == set() == devices_of(model.to("meta"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    model = byte_llama(tokenizer)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    deltaw.save(fill(deltaw.attach(model, deltaw.LoRA(rank=4, alpha=6))), tmp_path / "adapter")
    return tmp_path


CALLS: dict[str, Any] = {
    "plan": lambda f: deltaw.plan(
        str(f / "base"), deltaw.PlanConfig(methods="lora,dora,prefix", length=16, device="cpu")
    ),
    "compress": lambda f: deltaw.compress(f / "adapter", f / "cut", rank=1),
    "spectrum": lambda f: deltaw.spectrum(f / "adapter"),
    "merge_files": lambda f: deltaw.merge_files(f / "base", f / "adapter", f / "merged"),
    "a new head": lambda f: load_pretrained(
        str(f / "base"), task="classification", labels=["a", "b", "c"], device="cpu"
    ),
    "ranks": lambda f: candidates(SweepConfig(ranks="2,1"), load_pretrained(str(f / "base"), device="cpu").model),
    "a budget": lambda f: candidates(SweepConfig(budget="2k"), load_pretrained(str(f / "base"), device="cpu").model),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_call_moves_the_callers_random_numbers(files: Path, name: str) -> None:
    torch.manual_seed(5)
    before, others = torch.get_rng_state(), (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    CALLS[name](files)
    assert torch.equal(torch.get_rng_state(), before)
    assert others == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
