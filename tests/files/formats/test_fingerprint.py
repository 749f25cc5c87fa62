"""Which differences between two bases a fingerprint sees."""

from collections.abc import Callable, Iterable

import pytest
import torch

from deltaw.files.formats.fingerprint import FORMS, Fingerprint, Outdated, combined, digest

BASE = {
    "wide": torch.randn(70, 50, generator=torch.Generator().manual_seed(0)),
    "also wide": torch.randn(70, 50, generator=torch.Generator().manual_seed(1)),
    "bias": torch.zeros(5),
    "empty": torch.zeros(0, 4),
}
OTHERS = (torch.bfloat16, torch.float16, torch.float64)


def fingerprint(tensors: Iterable[torch.Tensor]) -> Fingerprint:
    kept = list(tensors)
    return Fingerprint(*(combined(digest(tensor, form) for tensor in kept) for form in FORMS))


def compared(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> str:
    """The verdict, which is the same from both sides."""
    a, b = fingerprint(one), fingerprint(other)
    verdict = a.compare(b)
    assert b.compare(a) == verdict
    return verdict


def test_order_of_other_shapes_layout_and_names_do_not_matter() -> None:
    same = [torch.zeros(0, 4), torch.zeros(5), BASE["wide"].t().contiguous().t(), BASE["also wide"]]
    assert compared(same, BASE.values()) == "same"


def flipped(W: torch.Tensor, bit: int) -> None:
    W.view(torch.int32)[33, 20] ^= 1 << bit


def exchanged(W: torch.Tensor) -> None:
    W[33, 20], W[41, 7] = W[41, 7].clone(), W[33, 20].clone()


def negated(W: torch.Tensor) -> None:
    W.neg_()


def all_but_a_sample_negated(W: torch.Tensor) -> None:
    kept = W.flatten()[::3].clone()
    W.neg_().view(-1)[::3] = kept


def reordered(W: torch.Tensor) -> None:
    W.copy_(W.flatten()[torch.randperm(W.numel(), generator=torch.Generator().manual_seed(2))].view_as(W))


def rolled(W: torch.Tensor) -> None:
    W.copy_(W.roll(1, 0))


def two_signs(W: torch.Tensor) -> None:
    W[3, 4], W[8, 1] = -W[3, 4], -W[8, 1]


def moved_by_little(W: torch.Tensor) -> None:
    W += 0.01


def in_the_last_place(W: torch.Tensor) -> None:
    W.view(torch.int32)[:] ^= 1


CHANGES: dict[str, Callable[[torch.Tensor], None]] = {
    **{f"bit {b}": lambda W, b=b: flipped(W, b) for b in (0, 12, 22, 30, 31)},
    **{
        c.__name__: c
        for c in (
            exchanged, negated, all_but_a_sample_negated, reordered, rolled, two_signs, moved_by_little, in_the_last_place,
        )
    },
}  # fmt: skip
SMALLEST = {"bit 0", "bit 12", "in_the_last_place"}  # which rounding may take away


@pytest.mark.parametrize("change", CHANGES)
def test_another_base_of_the_same_dtypes_is_never_one_in_another_precision(change: str) -> None:
    other = BASE | {"wide": BASE["wide"].clone()}
    CHANGES[change](other["wide"])
    assert compared(BASE.values(), other.values()) == "different"


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize("change", [c for c in CHANGES if c not in SMALLEST])
def test_another_base_in_another_precision_is_different(change: str, dtype: torch.dtype) -> None:
    other = BASE | {"wide": BASE["wide"].clone()}
    CHANGES[change](other["wide"])
    assert compared(BASE.values(), [t.to(dtype) for t in other.values()]) == "different"


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_the_same_base_in_another_precision_is_cast(dtype: torch.dtype) -> None:
    cast = [tensor.to(dtype) for tensor in BASE.values()]
    assert compared(BASE.values(), cast) == "cast"
    assert compared(cast, [t.float() for t in cast]) == "cast"  # widened again


def test_float16_of_bfloat16_and_the_other_way_round() -> None:
    brain = [t.to(torch.bfloat16) for t in BASE.values()]
    assert compared(brain, [t.to(torch.float16) for t in brain]) == "cast"
    half = [t.to(torch.float16) for t in BASE.values()]
    assert compared(half, [t.to(torch.bfloat16) for t in half]) == "cast"


def test_a_base_of_which_some_tensors_keep_their_precision() -> None:
    mixed = [t.to(torch.bfloat16) if t.ndim > 1 else t for t in BASE.values()]
    assert compared(BASE.values(), mixed) == "cast"
    assert compared(mixed, [t.to(torch.bfloat16) for t in BASE.values()]) == "cast"
    assert compared(mixed, list(reversed(mixed))) == "different"  # the two of one shape have changed places


def test_float32_that_agrees_with_float16_to_8_bits_alone_is_another_base() -> None:
    near = [(t * (1 + 2**-10)).to(torch.float16) for t in (torch.full((4, 6), 1.0), torch.full((3, 6), 0.5))]
    own = [torch.full((4, 6), 1.0), torch.full((3, 6), 0.5)]
    assert compared(own, near) == "different"


def test_values_beyond_float16_do_not_hide_others() -> None:
    huge, other = torch.tensor([[1e5, 1.0, 2e6]]), torch.tensor([[3e5, 1.0, 2e6]])
    assert compared([huge], [huge.to(torch.float16)]) == "cast"
    assert compared([huge], [other.to(torch.bfloat16)]) == "different"
    assert compared([huge], [other]) == "different"


def test_signs_of_zero_and_bits_of_nan_count() -> None:
    zero, nan = torch.zeros(3, 4), torch.full((3, 4), float("nan"))
    minus, payload = zero.clone(), nan.clone()
    minus[1, 2] = -0.0
    payload.view(torch.int32)[1, 2] += 1
    assert compared([zero], [minus]) == compared([nan], [payload]) == "different"
    assert compared([nan], [nan.clone()]) == "same"


def test_exchanged_tensors_of_one_shape_are_another_base() -> None:
    other = BASE | {"wide": BASE["also wide"], "also wide": BASE["wide"]}
    assert compared(BASE.values(), other.values()) == "different"


def test_other_shapes_are_different() -> None:
    assert compared(BASE.values(), (BASE | {"wide": BASE["wide"].reshape(50, 70)}).values()) == "different"
    assert compared(BASE.values(), (BASE | {"more": torch.zeros(6)}).values()) == "different"
    assert compared(BASE.values(), (BASE | {"empty": torch.zeros(4, 0)}).values()) == "different"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_every_dtype_has_a_fingerprint(dtype: torch.dtype) -> None:
    one = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(dtype)
    other = torch.tensor([[0, 1, 1], [0, 1, 0]]).to(dtype)
    assert compared([one], [one.clone()]) == "same" and compared([one], [other]) == "different"


def test_no_more_is_read_than_the_answer_needs() -> None:
    own, asked = fingerprint(BASE.values()), []

    def of(tensors: Iterable[torch.Tensor]) -> Callable[[str], str]:
        other = fingerprint(tensors)
        return lambda form: (asked.append(form), getattr(other, form))[1]  # type: ignore[func-returns-value]

    own.compare_by(of(BASE.values()))
    assert asked == ["dtypes", "exact"]
    asked.clear()
    own.compare_by(of(t.to(torch.float16) for t in BASE.values()))
    assert asked == ["dtypes", "float16"]
    dtypes = own.dtypes
    assert own.compare_by(lambda form: dtypes if form == "dtypes" else None) == "unknown"


def test_it_is_text_and_back() -> None:
    mine = fingerprint(BASE.values())
    assert Fingerprint.parse(str(mine)) == mine
    for damaged in ("damaged", "", str(mine)[:-20], f"{mine}:more"):
        with pytest.raises(ValueError):
            Fingerprint.parse(damaged)
    with pytest.raises(Outdated):
        Fingerprint.parse(":".join("a" * 32 for _ in range(3)))
