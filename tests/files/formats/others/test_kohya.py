"""Adapters of kohya and LyCORIS. Files of the real LyCORIS 4.1.3 gave its logits, to 2e-6 (docs/deploy.md)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import deltaw
from deltaw.errors import ConfigError, FileError
from tests.files.formats.others.conftest import KV, MLP, D, deltas

Q = "model.layers.0.self_attn.q_proj"
FLAT = "lycoris_model_layers_0_self_attn_q_proj"


class Net(nn.Module):
    """Layers as a U-Net has them: a dense one, convolutions, a name with underscores."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(12, 8)
        self.down_blocks = nn.ModuleList([nn.Conv2d(4, 6, 3)])


def test_alpha_over_rank_is_the_scale_and_without_alpha_it_is_1(
    tmp_path: Path, base: Path, draw: Callable[..., Tensor]
) -> None:
    A, B, A1, B1 = draw(2, D), draw(D, 2), draw(3, MLP), draw(D, 3)
    down = "lycoris_model_layers_1_mlp_down_proj"
    tensors = {
        f"{FLAT}.lora_down.weight": A, f"{FLAT}.lora_up.weight": B, f"{FLAT}.alpha": torch.tensor(7.0),
        f"{down}.lora_down.weight": A1, f"{down}.lora_up.weight": B1,
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    values = deltas(deltaw.convert(tmp_path / "a.safetensors", tmp_path / "out", base=base))
    torch.testing.assert_close(values[Q], 3.5 * B.double() @ A.double())
    torch.testing.assert_close(values["model.layers.1.mlp.down_proj"], B1.double() @ A1.double())


def test_loha_is_the_entrywise_product_of_two_products(
    tmp_path: Path, base: Path, draw: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    parts = {"hada_w1_a": draw(D, 2), "hada_w1_b": draw(2, D), "hada_w2_a": draw(D, 2), "hada_w2_b": draw(2, D)}
    save_file(
        {f"{FLAT}.{n}": t for n, t in parts.items()} | {f"{FLAT}.alpha": torch.tensor(3.0)}, tmp_path / "a.safetensors"
    )
    with caplog.at_level(logging.WARNING, logger="deltaw"):
        folder = deltaw.convert(tmp_path / "a.safetensors", tmp_path / "out", base=base)
    one, two, three, four = (t.double() for t in parts.values())
    torch.testing.assert_close(deltas(folder)[Q], 1.5 * (one @ two) * (three @ four), atol=1e-5, rtol=1e-5)
    assert "LoHa of 1 layers is written as LoRA of rank 4" in caplog.text


@pytest.mark.parametrize("form", ["both whole", "w2 a product", "both products"])
def test_lokr_is_a_kronecker_product(form: str, tmp_path: Path, base: Path, draw: Callable[..., Tensor]) -> None:
    """With both factors whole, its α does not count. k_proj is [16, 32]: [4, 4] ⊗ [4, 8]."""
    flat, layer, tensors = "lycoris_model_layers_1_self_attn_k_proj", "model.layers.1.self_attn.k_proj", {}
    if form == "both products":
        tensors |= {"lokr_w1_a": draw(4, 3), "lokr_w1_b": draw(3, 4)}
        w1 = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    else:
        w1 = tensors["lokr_w1"] = draw(4, 4)
    if form == "both whole":
        w2 = tensors["lokr_w2"] = draw(4, 8)
    else:
        tensors |= {"lokr_w2_a": draw(4, 3), "lokr_w2_b": draw(3, 8)}
        w2 = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    tensors["alpha"] = torch.tensor(6.0)
    save_file({f"{flat}.{n}": t for n, t in tensors.items()}, tmp_path / "a.safetensors")
    values = deltas(deltaw.convert(tmp_path / "a.safetensors", tmp_path / "out", base=base))
    scale = 1.0 if form == "both whole" else 2.0
    torch.testing.assert_close(values[layer], scale * torch.kron(w1.double(), w2.double()), atol=1e-4, rtol=1e-4)
    assert values[layer].shape == (KV, D)


def test_convolutions_plain_and_in_tuckers_form(tmp_path: Path, draw: Callable[..., Tensor]) -> None:
    flat, up = "lora_unet_down_blocks_0", draw(6, 2, 1, 1)
    for mid in (False, True):
        parts = {"lora_up.weight": up, "lora_down.weight": draw(2, 4, 1, 1) if mid else draw(2, 4, 3, 3)}
        if mid:
            parts["lora_mid.weight"] = draw(2, 2, 3, 3)
        save_file(
            {f"{flat}.{n}": t for n, t in parts.items()} | {f"{flat}.alpha": torch.tensor(4.0)},
            tmp_path / "a.safetensors",
        )
        folder = deltaw.convert(tmp_path / "a.safetensors", tmp_path / f"out{mid}", base=Net())
        A = torch.einsum("ijhw,jc->ichw", parts["lora_mid.weight"], parts["lora_down.weight"][..., 0, 0]) if mid else parts["lora_down.weight"]  # fmt: skip
        dW = 2 * torch.einsum("di,ichw->dchw", up[..., 0, 0], A)
        net = Net()
        deltaw.load(net, folder)
        torch.testing.assert_close(deltaw.delta(net, "down_blocks.0").view(6, 4, 3, 3), dW, atol=1e-5, rtol=1e-5)


def test_updates_of_several_models_are_one_each_and_the_others_are_said(
    tmp_path: Path, draw: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    A, B = draw(2, 12), draw(8, 2)
    tensors = {"lora_unet_to_q.lora_down.weight": A, "lora_unet_to_q.lora_up.weight": B}
    tensors |= {"lora_te1_encoder_q.lora_down.weight": draw(2, 3), "lora_te1_encoder_q.lora_up.weight": draw(3, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        FileError, match=r"lora_unet \(1 layers\), lora_te1 \(1 layers\)|lora_te1 \(1 layers\), lora_unet \(1 layers\)"
    ):
        deltaw.convert(tmp_path / "a.safetensors", tmp_path / "out", base=Net())
    with caplog.at_level(logging.WARNING, logger="deltaw"):
        folder = deltaw.convert(tmp_path / "a.safetensors", tmp_path / "out", base=Net(), parts=["lora_unet"])
    assert "Left out" in caplog.text and "lora_te1 (1 layers)" in caplog.text
    torch.testing.assert_close(deltas(folder)["to_q"], B.double() @ A.double())
    with pytest.raises(FileError, match="no updates of 'lora_te2'"):
        deltaw.convert(tmp_path / "a.safetensors", tmp_path / "out2", base=Net(), parts=["lora_te2"])


REFUSED = {
    "dora_scale": "weight-decomposed", "diff": "whole difference", "diff_b": "trained bias", "oft_blocks": "OFT", "on_input": "IA",
    "a1.weight": "GLoRA", "hada_t1": "Tucker", "w_norm": "trained norm",
}  # fmt: skip


def test_everything_wrong_is_one_message(tmp_path: Path, draw: Callable[..., Tensor]) -> None:
    """Methods with no product of two matrices by their names; layers that are not there, odd shapes, other keys."""
    pair = {"lora_down.weight": draw(2, 12), "lora_up.weight": draw(8, 2)}
    tensors = {f"lora_unet_nothing_{i}.{part}": draw(2) for i, part in enumerate(REFUSED)}
    tensors |= {f"lora_unet_missing.{n}": t for n, t in pair.items()} | {"text_model.embeddings.weight": draw(3, 2)}
    tensors |= {"lora_unet_to_q.lora_down.weight": draw(2, 11), "lora_unet_to_q.lora_up.weight": draw(8, 2)}
    tensors |= {"lora_unet_down_blocks_0.lora_down.weight": draw(2, 36)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(FileError) as caught:
        deltaw.convert(tmp_path / "a.safetensors", tmp_path / "out", base=Net())
    text = "\n".join(caught.value.problems) if hasattr(caught.value, "problems") else str(caught.value)
    for part in (
        *REFUSED.values(),
        "missing is none",
        "text_model.embeddings.weight",
        "to_q: ΔW is [8, 11]",
        "down_blocks_0, in the base",
    ):
        assert part in text, part
    assert not (tmp_path / "out").exists()


def test_without_a_base_there_are_no_names(tmp_path: Path, draw: Callable[..., Tensor]) -> None:
    save_file(
        {f"{FLAT}.lora_down.weight": draw(2, D), f"{FLAT}.lora_up.weight": draw(D, 2)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ConfigError, match="--base"):
        deltaw.convert(tmp_path / "a.safetensors", tmp_path / "out")


def test_a_safetensors_file_of_something_else_says_what_is_in_it(tmp_path: Path, draw: Callable[..., Tensor]) -> None:
    save_file({"model.norm.weight": draw(4)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=r"model\.norm\.weight"):
        deltaw.convert(tmp_path / "a.safetensors", tmp_path / "out")
    save_file({"base_model.model.q.lora_A.weight": draw(2, 4)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileError, match=r"adapter_config\.json"):
        deltaw.convert(tmp_path / "adapter_model.safetensors", tmp_path / "out")


@pytest.mark.parametrize(("alpha", "factor"), [(4.0, 2.0), (-4.0, -2.0), (0.0, 1.0), ([4.0], 2.0), (4, 2.0)], ids=str)
def test_an_alpha_of_any_sign_and_form(
    alpha: Any, factor: float, tmp_path: Path, base: Path, draw: Callable[..., Tensor]
) -> None:
    """An adapter that is to be subtracted has its sign in B here."""
    A, B = draw(2, D), draw(D, 2)
    tensors = {f"{FLAT}.lora_down.weight": A, f"{FLAT}.lora_up.weight": B, f"{FLAT}.alpha": torch.tensor(alpha)}
    save_file(tensors, tmp_path / "a.safetensors")
    folder = deltaw.convert(tmp_path / "a.safetensors", tmp_path / "out", base=base)
    torch.testing.assert_close(deltas(folder)[Q], factor * B.double() @ A.double())


OTHER = "lycoris_layers_0_self_attn_q_proj"
"""Another spelling of FLAT, without the outer model."""


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"alpha": torch.tensor(float("nan"))}, "its alpha is nan"), ({"alpha": torch.tensor([1.0, 2.0])}, r"its alpha is \[1.0, 2.0\]"),
     ({"lora_up.weight": torch.full((D, 2), float("inf"))}, "B has values that are not finite"),
     ({"lora_up.weight": torch.ones(D, 2, dtype=torch.int8)}, "must be floating point"),
     ({"OTHER": torch.ones(())}, f"other keys in the file are of {Q} too")],
    ids=["nan", "two", "inf", "int8", "twice"],
)  # fmt: skip
def test_nothing_is_dropped_or_taken_that_is_no_number(
    changes: dict[str, Tensor], said: str, tmp_path: Path, base: Path, draw: Callable[..., Tensor]
) -> None:
    parts = {"lora_down.weight": draw(2, D), "lora_up.weight": draw(D, 2)} | {
        n: t for n, t in changes.items() if n != "OTHER"
    }
    tensors = {f"{FLAT}.{name}": tensor for name, tensor in parts.items()}
    if "OTHER" in changes:
        tensors |= {f"{OTHER}.{name}": tensor.clone() for name, tensor in parts.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=said) as caught:
        deltaw.convert(tmp_path / "a.safetensors", tmp_path / "out", base=base)
    assert str(tmp_path / "a.safetensors") in str(caught.value) and not (tmp_path / "out").exists()
