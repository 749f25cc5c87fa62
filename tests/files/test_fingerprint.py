"""Which differences between two bases a fingerprint sees."""

import pytest
import torch

from deltaw.files.fingerprint import Fingerprint, fingerprint

BASE = {
    "wide": torch.randn(70, 50, generator=torch.Generator().manual_seed(0)),
    "bias": torch.zeros(5),
    "empty": torch.zeros(0, 4),
}


def changed(name: str, value: torch.Tensor) -> Fingerprint:
    return fingerprint((BASE | {name: value}).items())


def flipped(bit: int) -> torch.Tensor:
    """BASE's matrix with one bit of one entry flipped, one that no sample falls on."""
    weights = BASE["wide"].clone()
    weights.view(torch.int32)[33, 20] ^= 1 << bit
    return weights


def test_order_and_layout_do_not_matter() -> None:
    same = {"empty": torch.zeros(0, 4), "bias": torch.zeros(5), "wide": BASE["wide"].t().contiguous().t()}
    assert fingerprint(same.items()).compare(fingerprint(BASE.items())) == "same"


@pytest.mark.parametrize("bit", [0, 12, 22, 30])
def test_one_flipped_bit_is_seen(bit: int) -> None:
    assert changed("wide", flipped(bit)).exact != fingerprint(BASE.items()).exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_is_told_from_other_values(dtype: torch.dtype) -> None:
    cast = fingerprint((name, tensor.to(dtype)) for name, tensor in BASE.items())
    back = fingerprint((name, tensor.to(dtype).float()) for name, tensor in BASE.items())
    assert cast.compare(fingerprint(BASE.items())) == cast.compare(back) == back.compare(cast) == "cast"


def test_other_values_names_and_shapes_are_different() -> None:
    mine = fingerprint(BASE.items())
    assert changed("wide", BASE["wide"] + 0.01).compare(mine) == "different"
    assert changed("wide", BASE["wide"].roll(1, 0)).compare(mine) == "different"
    assert changed("wide", BASE["wide"].reshape(50, 70)).compare(mine) == "different"
    assert changed("other", torch.zeros(5)).compare(mine) == "different"


def test_it_is_text_and_back() -> None:
    mine = fingerprint(BASE.items())
    assert Fingerprint.parse(str(mine)) == mine
    with pytest.raises(ValueError):
        Fingerprint.parse("damaged")
