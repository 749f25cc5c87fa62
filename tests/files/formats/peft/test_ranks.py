"""Ranks and scales by adapter_config.json: each scale comes back to the last bit, and a changed alpha counts."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltaw.errors import FileError
from deltaw.files.formats import peft
from deltaw.files.formats.peft.metadata import sealed
from deltaw.files.formats.peft.ranks import alpha_for, config_for, scale_of

ALPHAS = (1, 2, 3, 7, 10, 16, 24, 100, 0.1, 1.7, 12.5, 16.000000001, 1e-3, 3e4)


def file_of(scales: dict[str, float], ranks: dict[str, int], *, rank_stabilised: bool) -> peft.LoRAFile:
    factors = {n: (torch.ones(r, 3), torch.ones(5, r)) for n, r in ranks.items()}
    config = config_for(
        ranks, scales, target_modules=sorted(ranks), dropout=0.0, rank_stabilised=rank_stabilised, transposed=False,
        base=None, task=None,
    )  # fmt: skip
    return peft.LoRAFile(factors, scales, config)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_every_scale_is_read_back_to_the_last_bit(rank_stabilised: bool, tmp_path: Path) -> None:
    """Also where the file's rank is not the one that α was divided by: 2r for PiSSA, n·r for n slices."""
    cases = list(itertools.product(ALPHAS, (1, 3, 7, 8, 12, 23), (1, 2, 3)))
    scales = {f"l{i}": a / (r**0.5 if rank_stabilised else r) for i, (a, r, _) in enumerate(cases)}
    ranks = {f"l{i}": r * factor for i, (_, r, factor) in enumerate(cases)}
    file = file_of(scales, ranks, rank_stabilised=rank_stabilised)
    back = peft.read(peft.write(tmp_path / "a", file))
    assert back.scales == scales
    assert (tmp_path / "a" / peft.WEIGHTS).stat().st_size + (
        tmp_path / "a" / "adapter_config.json"
    ).stat().st_size == peft.size(file)
    for layer, scale in scales.items():  # what others read
        assert math.isclose(scale_of(layer, ranks[layer], back.config), scale, rel_tol=2**-52)
    assert peft.read(peft.write(tmp_path / "b", back)).scales == scales


@given(scale=st.floats(1e-30, 1e30), rank=st.integers(1, 4096), rank_stabilised=st.booleans())
def test_an_alpha_is_never_further_than_the_next_number(scale: float, rank: int, rank_stabilised: bool) -> None:
    alpha = alpha_for(scale, rank, rank_stabilised=rank_stabilised)
    back = alpha / (rank**0.5 if rank_stabilised else rank)
    assert back in (scale, math.nextafter(scale, 0), math.nextafter(scale, math.inf))


@pytest.mark.parametrize(("alpha", "rank"), [(16, 6), (7, 3), (1, 49)])
def test_a_whole_alpha_stays_one(alpha: int, rank: int) -> None:
    config = file_of({"a": alpha / rank}, {"a": rank}, rank_stabilised=False).config
    assert config.lora_alpha == alpha and isinstance(config.settings["lora_alpha"], int)


def edited(folder: Path, *, metadata: dict[str, str] | None = None, **settings: Any) -> Path:
    """The folder with other settings, or with more metadata."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    tensors = load_file(folder / peft.WEIGHTS)
    save_file(tensors, folder / peft.WEIGHTS, metadata=sealed(tensors, peft.read(folder).metadata | (metadata or {})))
    return folder


def test_an_alpha_that_somebody_changed_is_the_one_that_counts(tmp_path: Path) -> None:
    scale = 1 / 12**0.5
    folder = peft.write(tmp_path / "a", file_of({"a": scale}, {"a": 24}, rank_stabilised=True))
    edited(folder, metadata={peft.SCALES: json.dumps({"a": scale, "gone": 2.0})}, lora_alpha=48.0)
    assert peft.read(folder).scales == {"a": 48 / 24**0.5}
    edited(folder, metadata={peft.SCALES: "[1"})
    with pytest.raises(FileError, match=r"scales of layers .* damaged"):
        peft.read(folder)
