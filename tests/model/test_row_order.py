"""Where the rows of a batch lie in what layers are given: time first, packed, paired, drawn at random, taken out on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaw import LoRA, attach, route, using
from deltaw.errors import AdapterError
from deltaw.layers.ops.row_forms import placeholders_of, uneven
from deltaw.layers.patch import slot_of
from tests.conftest import fill

NAMES: list[str | None] = ["a", None, "b", "a"]


def adapted(model: nn.Module, **settings: Any) -> Any:
    for seed, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=2, alpha=3, **settings), name=name), name, seed=seed)
    return model.eval()


@torch.no_grad()
def assert_rows(model: Any, names: list[str | None], **inputs: Tensor) -> None:
    """Each row is what it is in a pass whose rows all have its adapter."""
    with route(model, names):
        torch.manual_seed(2)
        found = model(**inputs)
    base = found * 0
    for row, name in enumerate(names):
        with using(model, name):
            torch.manual_seed(2)
            own = model(**inputs)
        torch.testing.assert_close(found[row], own[row], atol=1e-5, rtol=1e-5)
        with using(model, None):
            torch.manual_seed(2)
            base[row] = model(**inputs)[row]
    assert (found - base).abs().max() > 1e-3


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(torch.tanh(self.inner(x.transpose(0, 1)).transpose(0, 1)))
        return out


class Masked(nn.Module):
    """Draws which places of each row it looks at, as masked autoencoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape[:2]).argsort(1)[:, :3]
        out: Tensor = self.dense(x.gather(1, kept[..., None].expand(-1, -1, 6)))
        return out


class Pairs(nn.Module):
    """Two images in each row, which its layers see one after the other, and the first ones alone at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.first, self.named = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        n = len(pixel_values)
        h = torch.tanh(self.both(pixel_values.flatten(0, 1))).unflatten(0, (n, 2))
        out: Tensor = self.named(input=self.first(h[:, 0]) + h[:, 1])
        return out


class OneSequence(nn.Module):
    """All rows one after the other, in one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense(x.flatten(0, 1)[None])[0]
        return out.unflatten(0, x.shape[:2])


class Stopping(nn.Module):
    """Takes the rows out whose sum is over a bound, as matching models do with pairs that are done."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x.flatten(0, 1)).unflatten(0, x.shape[:2]) * 0 + x
        going = x.sum((1, 2)) < 100
        late = self.late(x[going].flatten(0, 1))
        return x.index_put((going,), late.unflatten(0, (-1, x.shape[1])))


class Sorted(nn.Module):
    """Its layer sees the rows in the order of their sums."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        order = x.sum((1, 2)).argsort()
        out: Tensor = self.dense(x[order])[order.argsort()]
        return out


class Twice(nn.Module):
    """Its layer sees the rows in order, and then turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense(self.dense(x).flip(0)).flip(0)
        return out


X = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("model", [TimeFirst, Masked, OneSequence], ids=lambda m: m.__name__)
@pytest.mark.parametrize("names", [NAMES, ["b", "a", "b", None]], ids=str)
def test_rows_are_followed_wherever_they_lie(model: Any, names: list[str | None]) -> None:
    torch.manual_seed(0)
    assert_rows(adapted(model()), names, x=X)


def test_pairs_of_a_row_are_followed() -> None:
    torch.manual_seed(0)
    assert_rows(adapted(Pairs()), NAMES, pixel_values=X[:, :2])


@pytest.mark.parametrize("model", [Sorted, Twice], ids=lambda m: m.__name__)
def test_a_layer_that_sees_rows_in_another_order_in_any_of_its_calls_is_named(model: Any) -> None:
    torch.manual_seed(0)
    made = adapted(model())
    with torch.no_grad(), pytest.raises(AdapterError, match=r"told apart.*\n.*dense"), route(made, NAMES):
        made(X)


@torch.no_grad()
def test_rows_that_are_taken_out_on_the_way_are_named_where_that_leaves_a_fitting_number() -> None:
    torch.manual_seed(0)
    made = adapted(Stopping())
    assert_rows(made, NAMES, x=X)
    done = X.clone()
    done[:2] += 100  # two rows of four: 14 parts, as of two rows of seven
    with (
        pytest.raises(AdapterError, match=r"late: its input is \[14, 6\] in a batch of 4 rows"),
        route(made, ["a", "b"] * 2),
    ):
        made(x=done)


@torch.no_grad()
def test_the_random_state_is_the_callers_after_a_model_was_asked() -> None:
    torch.manual_seed(0)
    made = adapted(Masked())
    torch.manual_seed(9)
    with route(made, NAMES):
        made(X)
    after = torch.rand(1)
    torch.manual_seed(9)
    with using(made, "a"):
        made(X)
    assert torch.equal(after, torch.rand(1))


class Seeing(nn.Module):
    """A text model with images, whose patches are packed: all rows' one after the other."""

    class config:
        image_token_id = 3

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.text = nn.Linear(6, 8), nn.Linear(8, 5)
        self.embed = nn.Embedding(12, 8)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        h = self.embed(input_ids)
        h = h.masked_scatter((input_ids == 3)[..., None], self.patch(pixel_values))
        out: Tensor = self.text(h)
        return out


def seen(*images: int) -> dict[str, Tensor]:
    """A batch in which the rows have so many patches each."""
    ids = torch.stack([torch.tensor([5 + r] * (7 - n) + [3] * n) for r, n in enumerate(images)])
    pixels = torch.randn(sum(images), 6, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 1, n] for n in images])}


def test_rows_with_as_many_patches_each_are_followed_and_others_refused_by_the_layers_name() -> None:
    torch.manual_seed(0)
    model = adapted(Seeing(), targets=["patch", "text"])
    assert_rows(model, ["a", "b"], **seen(2, 2))
    unequal = r"patch: its input is \[4, 6\] in a batch of 2 rows.*input_ids has places for \[1, 3\]"
    with torch.no_grad(), pytest.raises(AdapterError, match=unequal), route(model, ["a", "b"]):
        model(**seen(1, 3))
    assert_rows(model, ["a", "b"], **seen(3, 3))


def test_patches_of_other_sizes_do_not_matter_where_no_adapter_sees_them() -> None:
    torch.manual_seed(0)
    assert_rows(adapted(Seeing(), targets=["text"]), ["a", "b"], **seen(1, 3))


class Chunked(nn.Module):
    """Cuts a sound into pieces of three, each of which is a row to its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense(x.reshape(-1, 3, 6)).reshape(len(x), -1, 5)
        return out


def test_sounds_of_several_lengths_are_followed_where_a_model_cuts_them_into_pieces() -> None:
    torch.manual_seed(0)
    model = adapted(Chunked())
    for length in (6, 12, 3):
        assert_rows(model, NAMES, x=torch.randn(4, length, 6))


def test_batches_whose_rows_have_several_forms_are_told_apart() -> None:
    ids, mask = torch.tensor([[7, 3, 9], [3, 7, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert uneven({"input_ids": ids, "attention_mask": mask}, 2, frozenset([3])) == ""
    assert "places for [1, 0]" in uneven({"input_ids": torch.tensor([[3, 5], [5, 5]])}, 2, frozenset([3]))
    assert "image_sizes differs" in uneven({"image_sizes": torch.tensor([[8, 8], [8, 4]])}, 2)
    assert "3 entries for 2" in uneven({"pixel_values": torch.zeros(3, 4)}, 2)

    class Config:
        image_token_id, audio_token_index, eos_token_id = 3, 5, 2

        def __init__(self) -> None:
            self.video_token_id, self.vision_start_token_id, self.text_config = 4, 9, None

    assert placeholders_of(Config()) == {4}


@pytest.mark.parametrize("first", [True, False], ids=["batch first", "time first"])
@pytest.mark.parametrize("targets", [["*attn.in_proj_weight"], "all-linear"], ids=str)
def test_attention_takes_each_adapters_rows_by_themselves(first: bool, targets: Any) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=first)
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            own = x if first else x.transpose(0, 1)
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            h, weights = self.attn(own, own, value=own, key_padding_mask=mask, attn_mask=causal)
            h = self.out(h if first else h.transpose(0, 1))
            found: Tensor = h + weights.mean((1, 2))[:, None, None]
            return found

    torch.manual_seed(0)
    model = adapted(Block(), targets=targets)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2:] = True
    assert slot_of(model.attn) is not None
    assert_rows(model, NAMES, x=torch.randn(4, 4, 8), mask=mask)


class WithPositions(nn.Module):
    """A layer is given what all rows share; the model does not say what inputs it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.places = nn.Linear(6, 5), nn.Linear(6, 5)
        self.at = nn.Buffer(torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner(x if shift is None else x + shift) + self.places(self.at)


def test_a_model_that_mixes_the_rows_is_refused() -> None:
    model = WithPositions().eval()
    for name in "ab":
        attach(model, LoRA(rank=2), name=name)
    with pytest.raises(AdapterError, match=r"(?s)told apart.*places: its input is \(1, 12, 6\)"):  # noqa: SIM117
        with route(model, ["a", "b"]):
            model(torch.randn(2, 12, 6))
    with route(model, ["a", "a"]):  # nothing to tell apart
        model(torch.randn(2, 12, 6))


@torch.no_grad()
def test_a_model_whose_inputs_are_not_known_is_asked_with_its_first_batch() -> None:
    model = WithPositions()
    for seed, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=2), name=name), name, seed=seed)
    x, shift = torch.randn(3, 12, 6), torch.randn(3, 12, 6)
    with (
        pytest.raises(
            AdapterError, match=r"(?s)cannot be told apart.*places: its input is \(1, 12, 6\) for a batch of 3"
        ),
        route(model, ["a", None, "b"]),
    ):
        model(x, shift=shift)
    with pytest.raises(AdapterError, match="cannot be told apart"), route(model, ["a", "b"]):
        pass
    assert len(model._forward_pre_hooks) == 1  # the one that begins passes
    with using(model, "a"):
        model(x, shift=shift)


@torch.no_grad()
def test_the_first_batch_of_a_model_that_keeps_its_rows_apart_goes_through() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    for seed, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=2), name=name), name, seed=seed)
    x = torch.randn(3, 7, 6)
    names = ["a", None, "b"]
    with route(model, names):
        together, again = model(x), model(x)
    assert torch.equal(together, again) and len(model._forward_pre_hooks) == 1
    for row, name in enumerate(names):
        with using(model, name):
            torch.testing.assert_close(together[row], model(x)[row], rtol=1e-5, atol=1e-5)
