"""Dense weights without a layer of their own: `nn.MultiheadAttention` and experts, from attach to file and back; with real PEFT."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import deltaw
from deltaw import DoRA, LoRA, attach, detach, load, merge, parameters, route, save, summary, unmerge, use, using
from deltaw.errors import AdapterError, FileError, TargetError
from deltaw.layers.kinds import Weight
from deltaw.methods.targets import select
from deltaw.methods.updates.lowrank import Sliced
from deltaw.methods.updates.weights import OnWeights, Stack
from deltaw.model.summary import updates
from tests.conftest import assert_same, bits, fill, snapshot

SIZES = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 96, "num_experts_per_tok": 2,
}  # fmt: skip


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def qwen() -> Any:
    config = transformers.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=20, head_dim=8)
    return transformers.Qwen3MoeForCausalLM(config)


def oss() -> Any:
    """Experts stored [k, d], with biases."""
    config = transformers.GptOssConfig(
        **SIZES, num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 2, pad_token_id=0, eos_token_id=1,
        rope_scaling=None,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config)


class Encoder(nn.Module):
    """PyTorch's own encoder, which reads all weights of its layers without calling them, in evaluation."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.encoder(self.embed(ids))
        return out


class Attention(nn.Module):
    """Keys and values of other sizes than the query's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        self.attn = nn.MultiheadAttention(16, 2, kdim=12, vdim=20, batch_first=True, dropout=0.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        out: torch.Tensor = self.attn(x, x[..., :12], x.repeat(1, 1, 2)[..., :20])[0]
        return out


MODELS = {"Mixtral": mixtral, "Qwen3-MoE": qwen, "GPT-OSS": oss, "encoder": Encoder, "attention": Attention}
IDS = torch.arange(4, 37).view(3, 11)


def model_of(name: str) -> Any:
    torch.manual_seed(11)
    model: Any = MODELS[name]()
    for parameter in model.parameters():  # GPT-OSS's experts start from uninitialised memory
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def run(model: Any) -> torch.Tensor:
    out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("keep", ["copy", "correction"])
@pytest.mark.parametrize("name", MODELS)
def test_from_attach_to_file_and_back_on_weights(name: str, keep: Any, tmp_path: Path) -> None:
    model = model_of(name)
    before, was = snapshot(model), bits(model)
    with torch.no_grad():  # of frozen parameters PyTorch computes attention in another way
        base = run(copy.deepcopy(model).requires_grad_(False))
    attach(model, LoRA(rank=2, alpha=3))
    assert any(isinstance(u, OnWeights) for u in updates(model).values())
    with torch.no_grad():
        assert torch.equal(run(model), base)
    run(model).square().sum().backward()
    assert all(p.grad is not None for p in parameters(model))
    fill(model)
    with torch.no_grad():
        branch = run(model)
    torch.testing.assert_close(run(model.train()), branch, rtol=1e-4, atol=1e-4)  # by the layers' own forward
    model.eval()
    assert (branch - base).abs().max() > 1e-2
    save(model, tmp_path / "a")
    report = merge(model, keep=keep)
    assert report.survived > 0.99
    with torch.no_grad():
        torch.testing.assert_close(run(model), branch, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in was.items())
    twin = copy.deepcopy(model)
    detach(model)
    assert_same(model, before)
    load(model, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(run(model), branch) and torch.equal(run(twin), branch)
        use(model, None)
        assert torch.equal(run(model), base)


def test_coverage_names_them() -> None:
    model = model_of("Mixtral")
    attach(model, LoRA(rank=2, targets="attention"))
    left = summary(model).adapters["default"].left_out
    assert left["model.layers.0.mlp.experts.gate_up_proj"] == "not among the targets"
    assert set(select(model, "down", 2).ranks) == {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)}
    detach(model)
    attach(model, LoRA(rank=3, alpha=4, targets="experts.down_proj"))
    assert sum(p.numel() for p in parameters(model)) == 2 * 4 * 3 * (24 + 32)


def test_delta_of_a_stack_is_in_its_shape() -> None:
    model = model_of("GPT-OSS")
    fill(attach(model, LoRA(rank=2, alpha=3)))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    update = updates(model)["model.layers.0.mlp.experts"]
    assert isinstance(update, OnWeights)
    part = update.parts["gate_up_proj"]
    assert isinstance(part, Stack) and part.transposed
    expected = (part.B @ part.A).mT * part.scale
    torch.testing.assert_close(deltaw.delta(model, name), expected)
    assert expected.shape == Weight(model.get_submodule(name.rpartition(".")[0]), "gate_up_proj").value.shape


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "GPT-OSS"])
@pytest.mark.parametrize("one", [False, True])
def test_real_peft_and_we_agree_on_experts(name: str, one: bool, tmp_path: Path) -> None:
    import peft

    model = model_of(name)
    targets = "q,experts.down_proj" if one else "q,gate_up,down"
    fill(attach(model, LoRA(rank=2, alpha=3, targets=targets)))
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(model_of(name), tmp_path / "ours")
    torch.testing.assert_close(run(theirs), run(model), rtol=1e-4, atol=1e-4)

    wanted = ["mlp.experts.down_proj"] if one else ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(
        r=3, lora_alpha=4, target_modules=["q_proj"], target_parameters=wanted, init_lora_weights=False
    )
    theirs = peft.get_peft_model(model_of(name), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    load(model, tmp_path / "theirs", name="theirs")
    torch.testing.assert_close(run(model), run(theirs), rtol=1e-4, atol=1e-4)


def test_real_peft_and_we_agree_on_attention(tmp_path: Path) -> None:
    import peft

    model = model_of("encoder")
    fill(attach(model, LoRA(rank=2, alpha=3, targets="in_proj_weight,out_proj,linear1")))
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(model_of("encoder"), tmp_path / "ours")
    torch.testing.assert_close(run(theirs.train()), run(model), rtol=1e-4, atol=1e-4)

    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["self_attn", "linear2"], init_lora_weights=False)
    theirs = peft.get_peft_model(model_of("encoder"), config)
    theirs.save_pretrained(tmp_path / "theirs")
    load(model, tmp_path / "theirs", name="theirs")
    torch.testing.assert_close(run(model), run(theirs.train()), rtol=1e-4, atol=1e-4)


class Mixed(nn.Module):
    """Two attentions with biases, a dense layer, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        self.one, self.two = (nn.MultiheadAttention(16, heads, batch_first=True) for heads in (2, 4))
        self.dense, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
        for attention in (self.one, self.two):
            nn.init.normal_(attention.in_proj_bias)
            nn.init.normal_(attention.out_proj.bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.embed(ids)
        h = h + self.one(h, h, h)[0]
        h = self.dense(h + self.two(h, h, h, need_weights=False)[0])
        return self.norm(h.transpose(1, 2))  # type: ignore[no-any-return]


def mixed() -> Any:
    torch.manual_seed(1)
    return Mixed().eval()


OF_PEFT: dict[str, dict[str, Any]] = {
    "biases": {"target_modules": ["one", "dense"], "bias": "all"},
    "biases of two": {"target_modules": ["one", "two"], "bias": "lora_only"},
    "biases of a wrapper inside": {"target_modules": ["one", "out_proj"], "bias": "all"},
    "an output projection alone": {"target_modules": ["one", "two.out_proj"]},
    "its bias": {"target_modules": ["dense", "out_proj"], "bias": "lora_only"},
    "its parameter": {"target_modules": ["dense"], "target_parameters": ["two.out_proj.weight"]},
    "an attention whole": {"target_modules": ["one"], "modules_to_save": ["two"]},
    "its projection whole": {"target_modules": ["one"], "modules_to_save": ["two.out_proj"]},
    "buffers": {"target_modules": ["dense"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("settings", OF_PEFT.values(), ids=OF_PEFT)
def test_real_peft_and_we_agree_beside_attention(settings: dict[str, Any], tmp_path: Path) -> None:
    """An update of an output projection that PEFT has not wrapped with its attention is one that it does not compute with."""
    import peft

    theirs = peft.get_peft_model(
        mixed(), peft.LoraConfig(r=3, lora_alpha=4, init_lora_weights=False, **settings)
    ).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    model, expected = mixed(), run(theirs)
    before = snapshot(model)
    assert (run(model) - expected).abs().max() > 0.02
    load(model, tmp_path / "theirs")
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    save(model, tmp_path / "ours")
    merge(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert_same(detach(model), before)
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    torch.testing.assert_close(run(again), expected, rtol=1e-4, atol=1e-5)


def test_what_peft_does_not_compute_with_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import peft

    theirs = peft.get_peft_model(mixed(), peft.LoraConfig(target_modules=["out_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(FileError, match=r"'one\.out_proj': PEFT does not compute with its update"):
        load(mixed(), tmp_path / "theirs")
    model = fill(attach(mixed(), LoRA(rank=2, targets="one.out_proj")))
    caplog.clear()
    save(model, tmp_path / "ours")
    assert "PEFT does not compute with the updates of one.out_proj" in caplog.text
    expected = run(model)
    load(detach(model), tmp_path / "ours")
    torch.testing.assert_close(run(model), expected)


def test_buffers_that_moved_in_a_copied_module_are_refused(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(target_modules=["dense"], modules_to_save=["norm"])
    theirs = peft.get_peft_model(mixed(), config).train()
    theirs(IDS)
    theirs.save_pretrained(tmp_path / "theirs")
    model = mixed()
    before = snapshot(model)
    with pytest.raises(FileError, match=r"norm\.running_mean is a buffer"):
        load(model, tmp_path / "theirs")
    assert_same(model, before)


def test_slices_of_an_attention(tmp_path: Path) -> None:
    model = model_of("encoder")
    attach(model, LoRA(rank=2, alpha=3, targets="qv"))
    update = updates(model)["encoder.layers.1.self_attn"]
    assert isinstance(update, OnWeights)
    part = update.parts["in_proj_weight"]
    assert isinstance(part, Sliced) and list(part.slices) == ["q", "v"]
    fill(model)
    with torch.no_grad():
        expected = run(model)
        save(model, tmp_path / "a")
        load(model, tmp_path / "a", name="again")
        assert torch.equal(run(model), expected)
    again = updates(model, "again")["encoder.layers.1.self_attn"]
    assert isinstance(again, OnWeights) and isinstance(again.parts["in_proj_weight"], Sliced)
    dW = deltaw.delta(model, "encoder.layers.1.self_attn.in_proj_weight", "again")
    assert dW[:16].all() and not dW[16:32].any() and dW[32:].all()


def test_a_layer_that_is_trained_whole_is_read_with_its_values() -> None:
    """PyTorch's encoder layer reads the weights of norms and dense layers without calling them."""
    model = model_of("encoder")
    attach(model, LoRA(rank=2, targets="linear1", whole="norm1,out_proj"))
    fill(model)
    with torch.no_grad():
        fast = run(model)
    torch.testing.assert_close(run(model.train()), fast, rtol=1e-4, atol=1e-4)


def test_rows_cannot_be_told_apart_there() -> None:
    model = model_of("encoder")
    for name, targets in {"weights": "in_proj_weight", "layers": "linear1", "outside": "embed"}.items():
        fill(attach(model, LoRA(rank=2, alpha=3, targets=targets), name=name), name)
    for names in (["weights", None, "outside"], ["layers", None, None]):
        with pytest.raises(AdapterError, match="one adapter"), torch.no_grad(), route(model, names):
            run(model)
    with torch.no_grad(), route(model, ["outside", None, "outside"]):
        mixed = run(model)
    with torch.no_grad(), using(model, "outside"):
        torch.testing.assert_close(mixed[::2], run(model)[::2], rtol=1e-4, atol=1e-4)


def test_what_weights_without_a_layer_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="DoRA has no form for in_proj_weight"):
        attach(model_of("encoder"), DoRA(rank=2))
    with pytest.raises(TargetError, match="dropout"):
        attach(model_of("Mixtral"), LoRA(rank=2, dropout=0.1))
    model = model_of("Mixtral")
    fill(attach(model, LoRA(rank=2, alpha=3)))
    save(model, tmp_path / "a")
    other = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=8))
    with pytest.raises(FileError, match=r"gate_up_proj: the update is|gate_up_proj is \[8, 48, 32\]"):
        load(other, tmp_path / "a", check_base=False)


def test_half_precision_and_pickle() -> None:
    import io

    model = model_of("Mixtral").to(torch.bfloat16)
    fill(attach(model, LoRA(rank=2, alpha=3)))
    with torch.no_grad():
        out = run(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(run(torch.load(buffer, weights_only=False)), out) and out.dtype == torch.bfloat16
