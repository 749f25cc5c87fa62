"""Files of other programs, written here by hand in the layouts that the real packages write (keys and shapes taken from theirs)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltaw.files.formats import peft
from tests.conftest import tiny_llama

D, KV, MLP = 32, 16, 56
"""Widths of the tiny Llama: hidden, keys and values, MLP. It has 4 heads of queries and 2 of keys, of 8 rows each."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama(tied=False).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Return numbers of a shape, others at each call."""
    generator = torch.Generator().manual_seed(4)
    return lambda *shape: torch.randn(*shape, generator=generator)


def deltas(folder: Path) -> dict[str, Tensor]:
    """Return layer → ΔW of a folder, in double."""
    file = peft.read(folder)
    return {n: file.scales[n] * B.double() @ A.double() for n, (A, B) in file.factors.items()}
