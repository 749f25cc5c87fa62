"""Which differences between two bases a fingerprint sees."""

from collections.abc import Iterable

import pytest
import torch

from deltaw.files.fingerprint import Fingerprint, combined, digest

BASE = {
    "wide": torch.randn(70, 50, generator=torch.Generator().manual_seed(0)),
    "bias": torch.zeros(5),
    "empty": torch.zeros(0, 4),
}


def fingerprint(tensors: Iterable[torch.Tensor]) -> Fingerprint:
    return combined(map(digest, tensors))


def changed(name: str, value: torch.Tensor) -> Fingerprint:
    return fingerprint((BASE | {name: value}).values())


def flipped(bit: int) -> torch.Tensor:
    """BASE's matrix with one bit of one entry flipped, one that no sample falls on."""
    weights = BASE["wide"].clone()
    weights.view(torch.int32)[33, 20] ^= 1 << bit
    return weights


def test_order_and_layout_do_not_matter() -> None:
    same = {"empty": torch.zeros(0, 4), "bias": torch.zeros(5), "wide": BASE["wide"].t().contiguous().t()}
    assert fingerprint(same.values()).compare(fingerprint(BASE.values())) == "same"


@pytest.mark.parametrize("bit", [0, 12, 22, 30])
def test_one_flipped_bit_is_seen(bit: int) -> None:
    assert changed("wide", flipped(bit)).exact != fingerprint(BASE.values()).exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_is_told_from_other_values(dtype: torch.dtype) -> None:
    cast = fingerprint(tensor.to(dtype) for tensor in BASE.values())
    back = fingerprint(tensor.to(dtype).float() for tensor in BASE.values())
    assert cast.compare(fingerprint(BASE.values())) == cast.compare(back) == back.compare(cast) == "cast"


def test_other_values_and_shapes_are_different() -> None:
    mine = fingerprint(BASE.values())
    assert changed("wide", BASE["wide"] + 0.01).compare(mine) == "different"
    assert changed("wide", BASE["wide"].roll(1, 0)).compare(mine) == "different"
    assert changed("wide", BASE["wide"].reshape(50, 70)).compare(mine) == "different"
    assert changed("other", torch.zeros(6)).compare(mine) == "different"
    assert changed("wide", torch.zeros(70, 50)).compare(mine) == "different"


def test_another_name_is_no_difference() -> None:
    """Another version of transformers may give it."""
    assert fingerprint({f"model.{n}": t for n, t in reversed(BASE.items())}.values()) == fingerprint(BASE.values())


def test_it_is_text_and_back() -> None:
    mine = fingerprint(BASE.values())
    assert Fingerprint.parse(str(mine)) == mine
    with pytest.raises(ValueError):
        Fingerprint.parse("damaged")
