"""Adapters from mlx-lm and for it. Real mlx-lm 0.32.2 gave the logits of what is written here, to 3e-6 (docs/deploy.md)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.errors import ConfigError, FileError
from deltaw.files.formats import peft
from tests.conftest import fill, tiny_gpt2, tiny_llama
from tests.files.formats.others.conftest import MLP, D, deltas

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def write(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    """Write mlx-lm's two files."""
    folder.mkdir()
    lora = {"rank": 2, "scale": 20.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": lora, "model": "org/tiny", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapters.safetensors")
    return folder


def test_its_scale_multiplies_the_product_as_it_is(tmp_path: Path, base: Path, draw: Callable[..., Tensor]) -> None:
    a, b, a1, b1 = draw(D, 2), draw(2, D), draw(MLP, 2), draw(2, D)
    tensors = {f"{Q}.lora_a": a, f"{Q}.lora_b": b, f"{DOWN}.lora_a": a1, f"{DOWN}.lora_b": b1}
    folder = deltaw.convert(write(tmp_path / "mlx", tensors), tmp_path / "out", base=base)
    values = deltas(folder)
    torch.testing.assert_close(values[Q], 20 * (a.double() @ b.double()).T)
    torch.testing.assert_close(values[DOWN], 20 * (a1.double() @ b1.double()).T)
    config = peft.read(folder).config
    assert (config.lora_dropout, config.lora_alpha, config.r) == (0.1, 40, 2)


def test_everything_wrong_is_one_message_and_nothing_is_written(tmp_path: Path, draw: Callable[..., Tensor]) -> None:
    tensors = {
        f"{Q}.lora_a": draw(D, 2), "model.norm.weight": draw(D), f"{DOWN}.lora_a": draw(MLP, 2), f"{DOWN}.lora_b": draw(3, D),
        "model.layers.0.mlp.switch_mlp.up_proj.lora_a": draw(4, 2, D), "model.layers.0.mlp.switch_mlp.up_proj.lora_b": draw(4, D, 2),
    }  # fmt: skip
    folder = write(tmp_path / "mlx", tensors, lora_parameters={"rank": 2, "scale": "x"})
    with pytest.raises(FileError) as caught:
        deltaw.convert(folder, tmp_path / "out")
    for part in ("scale is 'x'", f"{Q} has no lora_b", "model.norm.weight", f"{DOWN}: A is", "stack of experts"):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["full", "other"])
def test_whole_weights_are_no_adapter(kind: str, tmp_path: Path, draw: Callable[..., Tensor]) -> None:
    with pytest.raises(FileError, match="deltaw extract"):
        deltaw.convert(write(tmp_path / "mlx", {f"{Q}.weight": draw(D, D)}, fine_tune_type=kind), tmp_path / "out")


def test_layers_that_the_base_lacks_or_has_in_other_shapes_are_named(
    tmp_path: Path, base: Path, draw: Callable[..., Tensor]
) -> None:
    tensors = {f"{Q}.lora_a": draw(D + 1, 2), f"{Q}.lora_b": draw(2, D)}
    tensors |= {
        "model.layers.9.self_attn.q_proj.lora_a": draw(D, 2),
        "model.layers.9.self_attn.q_proj.lora_b": draw(2, D),
    }
    with pytest.raises(FileError) as caught:
        deltaw.convert(write(tmp_path / "mlx", tensors), tmp_path / "out", base=base)
    assert f"{Q} is [32, 32] in the base" in str(caught.value) and "layers.9.self_attn.q_proj is none" in str(
        caught.value
    )


def test_layers_that_mlx_lm_passes_over_are_said(
    tmp_path: Path, draw: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """With num_layers it makes layers for the last blocks alone."""
    tensors = {f"{n}.lora_a": draw(k, 2) for n, k in ((Q, D), (DOWN, MLP))} | {
        f"{n}.lora_b": draw(2, D) for n in (Q, DOWN)
    }
    with caplog.at_level(logging.WARNING, logger="deltaw"):
        deltaw.convert(write(tmp_path / "mlx", tensors, num_layers=1), tmp_path / "out")
    assert "passes over 1 layers" in caplog.text


METHODS = {
    "plain": deltaw.LoRA(rank=4, alpha=10),
    "bfloat16": deltaw.LoRA(rank=4, alpha=6),
    "ranks": deltaw.LoRA(rank=4, alpha=None, targets={"attention": 4, "mlp": 2, "lm_head": 3, "embed_tokens": 5}),
    "dora": deltaw.DoRA(rank=4, alpha=6, targets="q,v,down", dropout=0.1),
}


@pytest.mark.parametrize("kind", METHODS)
def test_there_and_back_gives_the_same_bits(kind: str, tmp_path: Path, base: Path) -> None:
    """Scales that differ are worked into lora_b, by factors that are powers of two here."""
    model = AutoModelForCausalLM.from_pretrained(base)
    fill(deltaw.attach(model, METHODS[kind]))
    if kind == "bfloat16":
        model.to(torch.bfloat16)
    deltaw.save(model, tmp_path / "a", ends=[2, 7])
    deltaw.convert(tmp_path / "a", tmp_path / "mlx", to="mlx-lm")
    deltaw.convert(tmp_path / "mlx", tmp_path / "back")
    before, after = peft.read(tmp_path / "a"), peft.read(tmp_path / "back")
    assert before.factors.keys() == after.factors.keys() and before.embeddings == after.embeddings
    for layer, (A, B) in before.factors.items():
        assert torch.equal(A, after.factors[layer][0])
        if before.scales[layer] == after.scales[layer]:
            assert torch.equal(B, after.factors[layer][1])
        torch.testing.assert_close(deltas(tmp_path / "back")[layer], deltas(tmp_path / "a")[layer])
    assert all(torch.equal(m, after.magnitudes[n]) for n, m in before.magnitudes.items())
    if kind != "ranks":
        assert before.scales == after.scales
    assert before.config.lora_dropout == after.config.lora_dropout
    assert peft.ends_of(after.metadata, tmp_path) == (2, 7)


def test_what_mlx_lm_is_given(tmp_path: Path, base: Path) -> None:
    """One rank for all layers, which it demands; keys within blocks, and of modules outside of them whole."""
    model = AutoModelForCausalLM.from_pretrained(base)
    method = deltaw.LoRA(rank=4, alpha=10, targets={"attention": 4, "mlp": 2, "lm_head": 3})
    deltaw.save(fill(deltaw.attach(model, method)), tmp_path / "a")
    folder = deltaw.convert(tmp_path / "a", tmp_path / "mlx", to="mlx-lm")
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapters.safetensors"),
    )
    assert config["num_layers"] == -1 and config["fine_tune_type"] == "lora" and config["lora_parameters"]["rank"] == 4
    assert set(config["lora_parameters"]) == {"rank", "scale", "dropout", "keys"}
    assert {"self_attn.q_proj", "mlp.down_proj", "lm_head"} < set(config["lora_parameters"]["keys"])
    assert all(4 in (t.shape[1] if key.endswith("a") else t.shape[0],) for key, t in tensors.items())
    scale = config["lora_parameters"]["scale"]
    a, b = tensors[f"{DOWN}.lora_a"].double(), tensors[f"{DOWN}.lora_b"].double()
    torch.testing.assert_close(scale * (a @ b).T, deltaw.delta(model, DOWN).double())


def test_what_has_no_form_there_is_named(tmp_path: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    deltaw.save(fill(deltaw.attach(model, deltaw.LoRA(rank=4, whole="lm_head", tokens=[1]))), tmp_path / "a")
    with pytest.raises(FileError) as caught:
        deltaw.convert(tmp_path / "a", tmp_path / "mlx", to="mlx-lm")
    assert "lm_head.weight: a parameter" in str(caught.value) and "rows of some tokens" in str(caught.value)
    deltaw.save(fill(deltaw.attach(tiny_gpt2(), deltaw.LoRA(rank=4))), tmp_path / "gpt2")
    with pytest.raises(FileError, match="Conv1D"):
        deltaw.convert(tmp_path / "gpt2", tmp_path / "mlx", to="mlx-lm")


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path, base: Path) -> None:
    deltaw.save(fill(deltaw.attach(AutoModelForCausalLM.from_pretrained(base), deltaw.LoRA(rank=4))), tmp_path / "a")
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        deltaw.convert(tmp_path / "a", tmp_path / "mlx", to="mlx-lm")
    assert (tmp_path / "mlx" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("layer", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("base_is", ["tied", "untied", "elsewhere"])
@pytest.mark.parametrize("back", [False, True], ids=["to mlx-lm", "from mlx-lm"])
def test_layers_that_a_tied_base_computes_otherwise_are_refused(
    layer: str, base_is: str, back: bool, tmp_path: Path, draw: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """mlx-lm's tied head is its embedding, update and all (LoRAEmbedding.as_linear); in PEFT it is a layer of its own."""
    model = tiny_llama(tied=base_is == "tied")
    model.save_pretrained(tmp_path / "base")
    given = None if base_is == "elsewhere" else tmp_path / "base"
    embeds = layer == "model.embed_tokens"
    if back:
        A, B = (draw(96, 2), draw(2, D)) if embeds else (draw(D, 2), draw(2, 96))
        folder, to = write(tmp_path / "src", {f"{layer}.lora_a": A, f"{layer}.lora_b": B}), None
    else:
        fill(deltaw.attach(model, deltaw.LoRA(rank=2, targets=layer.rpartition(".")[2])))
        folder, to = deltaw.save(model, tmp_path / "src"), "mlx-lm"
    if base_is == "tied":
        with pytest.raises(FileError, match=rf"{layer}: the base ties"):
            deltaw.convert(folder, tmp_path / "out", to=to, base=given)
        assert not (tmp_path / "out").exists()
        return
    deltaw.convert(folder, tmp_path / "out", to=to, base=given)
    assert ("give the base to have that checked" in caplog.text) == (base_is == "elsewhere")
