"""Adapters for llama.cpp and from it: names, order of rows, scales."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

import deltaw
from deltaw.errors import ConfigError, FileError
from deltaw.files.convert import convert, halves
from deltaw.files.convert.gguf import names_of as _names
from deltaw.files.formats import peft as peft_folder
from deltaw.files.formats.gguf import GGUFLoRA, read, write
from deltaw.files.formats.peft import LoRAFile, config_for
from tests.conftest import fill, tiny_gpt2, tiny_llama

gguf = pytest.importorskip("gguf")


def tiny_qwen3() -> Any:
    config = Qwen3Config(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=96,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def tiny_mistral() -> Any:
    config = MistralConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96,
    )  # fmt: skip
    return MistralForCausalLM(config)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3], ids=["llama", "qwen3"])
@pytest.mark.parametrize(
    "method", [deltaw.LoRA(rank=4, alpha=10), deltaw.LoRA(rank=4, alpha=7, targets={"attention": 4, "mlp": 2})], ids=["one", "two"]
)  # fmt: skip
def test_there_and_back(make: Any, method: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    deltaw.save(fill(deltaw.attach(model, method)), tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "a.gguf", base=tmp_path / "base")
    convert(tmp_path / "a.gguf", tmp_path / "back", base=tmp_path / "base")
    deltaw.load(model, tmp_path / "back", name="back")
    for layer in deltaw.model.summary.updates(model, "default"):
        torch.testing.assert_close(
            deltaw.delta(model, layer, "back"), deltaw.delta(model, layer, "default"), atol=1e-6, rtol=1e-5
        )


def test_what_llama_cpp_is_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    deltaw.save(fill(deltaw.attach(model, deltaw.LoRA(rank=4, alpha=10))), tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "a.gguf", base=tmp_path / "base")
    file = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {
        name: file.get_field(name).contents() for name in ("general.architecture", "general.type", "adapter.type")
    }
    assert fields == {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    assert file.get_field("adapter.lora.alpha").contents() == 10
    tensors = {t.name: t for t in file.tensors}
    assert len(tensors) == 2 * 14 and list(tensors["blk.1.ffn_down.weight.lora_a"].shape) == [
        56,
        4,
    ]  # GGUF counts from the inside
    update = deltaw.model.summary.updates(model)["model.layers.1.mlp.down_proj"]
    assert torch.equal(torch.from_numpy(tensors["blk.1.ffn_down.weight.lora_b"].data.copy()), update.B.detach())


@pytest.mark.parametrize(
    ("make", "reordered"),
    [(tiny_llama, "qk"), (tiny_mistral, "qk"), (tiny_qwen3, "")],
    ids=["llama", "mistral", "qwen3"],
)
def test_rows_of_q_and_k_alone_are_reordered_and_of_qwen_none(make: Any, reordered: str, tmp_path: Path) -> None:
    """Four heads of queries and two of keys and values, each of eight rows."""
    make().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    deltaw.save(fill(deltaw.attach(model, deltaw.LoRA(rank=2, alpha=2))), tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "a.gguf", base=tmp_path / "base")
    written = read(tmp_path / "a.gguf").factors
    head = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    for role in "qkvo":
        B = deltaw.model.summary.updates(model)[f"model.layers.1.self_attn.{role}_proj"].B.detach()
        order = torch.cat([head + first for first in range(0, len(B), 8)])
        theirs = written[f"blk.1.attn_{role if role != 'o' else 'output'}.weight"][1]
        assert torch.equal(theirs, B[order] if role in reordered else B)


@pytest.mark.parametrize(
    ("heads", "theirs"),
    [
        (1, [0, 3, 1, 4, 2, 5]),  # three pairs in a head: none of these orders is its own inverse
        (2, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]),
        (3, [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]),
    ],
)
def test_each_pair_of_a_head_is_together_in_llama_cpp(heads: int, theirs: list[int]) -> None:
    B = torch.arange(len(theirs) * 2).view(len(theirs), 2)
    assert torch.equal(halves(B, heads, False), B[theirs])
    assert torch.equal(halves(B[theirs], heads, True), B)


@pytest.mark.slow
def test_rows_of_q_and_k_are_in_llama_cpps_order(smollm2_gguf: Path, smollm2: Path) -> None:
    """The real GGUF file was made by llama.cpp: its weights are transformers' own, in that order."""
    from gguf.quants import dequantize

    _, names, _, reorder = _names(smollm2)
    tensors = {t.name: t for t in gguf.GGUFReader(smollm2_gguf).tensors}
    assert set(names.values()) <= set(tensors) | {"output.weight"}
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for layer in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.3.self_attn.{layer}"
        theirs = torch.from_numpy(dequantize(tensors[names[name]].data, tensors[names[name]].tensor_type))
        own = model.get_submodule(name).weight.detach()
        torch.testing.assert_close(reorder(names[name], own, False), theirs.view(own.shape), atol=1e-3, rtol=1e-2)
        assert torch.equal(reorder(names[name], reorder(names[name], own, False), True), own)


def test_the_order_of_rows_by_hand() -> None:
    rows = torch.arange(8)[:, None]
    assert halves(rows, 2, False).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(halves(halves(rows, 2, False), 2, True), rows)


def test_what_cannot_be_converted_is_said(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    tiny_llama().save_pretrained(tmp_path / "llama")
    tiny_qwen3().save_pretrained(tmp_path / "qwen3")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    deltaw.save(fill(deltaw.attach(model, deltaw.LoRA(rank=2, alpha=3))), tmp_path / "adapter")
    with pytest.raises(ConfigError, match="Give the base"):
        model.config._name_or_path = ""
        deltaw.save(model, tmp_path / "nameless")
        convert(tmp_path / "nameless", tmp_path / "x.gguf")
    with pytest.raises(FileError, match="'gpt2'; GGUF adapters are converted for llama"):
        convert(tmp_path / "adapter", tmp_path / "x.gguf", base=tmp_path / "gpt2")
    convert(tmp_path / "adapter", tmp_path / "a.gguf", base=tmp_path / "llama")
    with pytest.raises(FileError, match="architecture 'llama', the base is of 'qwen3'"):
        convert(tmp_path / "a.gguf", tmp_path / "x", base=tmp_path / "qwen3")
    (tmp_path / "no.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(FileError, match="cannot be read as a GGUF file"):
        convert(tmp_path / "no.gguf", tmp_path / "x", base=tmp_path / "llama")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.gguf").exists()
    with pytest.raises(FileError, match="no LoRA adapter"):
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        read(tmp_path / "model.gguf")


def adapter_file(path: Path, alpha: Any, arch: str = "llama") -> Path:
    """An adapter of one layer, with this α or with none (`...`)."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    if isinstance(alpha, str):
        writer.add_string(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    elif alpha is not ...:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_tensor("blk.1.ffn_down.weight.lora_a", torch.ones(4, 56).numpy())
    writer.add_tensor("blk.1.ffn_down.weight.lora_b", torch.ones(32, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("alpha", "scale"), [(..., 1.0), (0.0, 1.0), (10.0, 2.5)], ids=["none", "zero", "ten"])
def test_without_an_alpha_the_scale_is_one_as_in_llama_cpp(alpha: Any, scale: float, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    path = adapter_file(tmp_path / "a.gguf", alpha)
    assert set(read(path).scales.values()) == {scale}
    convert(path, tmp_path / "adapter", base=tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    deltaw.load(model, tmp_path / "adapter")
    dW = deltaw.delta(model, "model.layers.1.mlp.down_proj")
    assert torch.equal(dW, torch.full((32, 56), 4 * scale))


@pytest.mark.parametrize("alpha", ["ten", float("nan"), float("inf")], ids=str)
def test_an_alpha_that_is_no_number_is_refused_by_its_name(alpha: Any, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"adapter\.lora\.alpha is"):
        read(adapter_file(tmp_path / "a.gguf", alpha))


@pytest.mark.parametrize("rows", [30, 64])
@pytest.mark.parametrize("back", [True, False])
def test_layers_of_other_sizes_than_the_bases_are_refused(rows: int, back: bool, tmp_path: Path) -> None:
    """Rows that make no pairs of a head were a traceback, others were written."""
    tiny_llama().save_pretrained(tmp_path / "base")
    A, B, layer = torch.ones(2, rows), torch.ones(rows, 2), "model.layers.0.self_attn.q_proj"
    if back:
        write(tmp_path / "a.gguf", GGUFLoRA("llama", {"blk.0.attn_q.weight": (A, B)}, {"blk.0.attn_q.weight": 1.0}))
    else:
        file = LoRAFile({layer: (A, B)}, {layer: 1.0}, config_for({layer: 2}, {layer: 1.0}, target_modules=[layer]))
        peft_folder.write(tmp_path / "a", file)
    src, dst = (tmp_path / "a.gguf", tmp_path / "out") if back else (tmp_path / "a", tmp_path / "out.gguf")
    with pytest.raises(
        FileError, match=rf"q_proj is \[32, 32\] in the base, the adapter is of one that is \[{rows}, {rows}\]"
    ):
        convert(src, dst, base=tmp_path / "base")
    assert not dst.exists()


def test_a_negative_alpha_subtracts(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    convert(adapter_file(tmp_path / "a.gguf", -10.0), tmp_path / "adapter", base=tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    deltaw.load(model, tmp_path / "adapter")
    assert torch.equal(deltaw.delta(model, "model.layers.1.mlp.down_proj"), torch.full((32, 56), -10.0))
