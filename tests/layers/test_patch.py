"""Layers whose parameters the module around them uses without calling them. No scale is 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import deltaw
from deltaw import IA3, BitFit, DoRA, LoRA
from deltaw.errors import AdapterError
from deltaw.layers.source import only_read, read_outside
from tests.conftest import bits, fill


class Around(nn.Module):
    """Uses its children in each way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(6, 5)
        self.start = self.called.weight.detach().sum()
        self.asked = nn.Linear(5, 7)
        self.read = nn.Linear(7, 4, bias=False)
        self.biased = nn.Linear(4, 4)
        self.both = nn.Linear(4, 6)
        self.helped = nn.Linear(6, 6, bias=False)
        self.within = nn.Linear(6, 5, bias=False)
        self.conv = nn.Conv1d(1, 3, 3, padding=1)
        self.table = nn.Embedding(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.called(F.pad(self.table(ids), (0, 1)))
        if isinstance(self.asked.weight, Tensor) and self.asked.weight.dtype == x.dtype and self.asked.bias is not None:
            x = self.asked(x)
        x = torch.tanh(x @ self.read.weight.t())
        x = F.linear(x, torch.eye(4), self.biased.bias)
        x = self.both(x) + F.linear(x, self.both.weight, self.both.bias)
        x = self.help(torch.tanh(x))
        x = (lambda y: y @ self.within.weight.t())(x)
        mixed = F.conv1d(x.flatten(0, 1)[:, None], self.conv.weight, self.conv.bias, padding=1).mean(1)
        mixed = mixed + self.conv(x.flatten(0, 1)[:, None]).mean(1)
        return mixed.view(x.shape) @ self.table.weight.t()

    def help(self, x: Tensor) -> Tensor:
        return x @ self.helped.weight


READ = {"read", "biased", "both", "helped", "within", "conv", "table"}
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def around() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(Around()).eval()


def test_what_the_code_says() -> None:
    module = Around()
    assert {name for name, _ in module.named_children() if read_outside(module, name)} == READ
    assert not read_outside(nn.Sequential(nn.Linear(2, 2)), "0")


def test_what_is_called_nowhere() -> None:
    module = Around()
    only = {name for name, _ in module.named_children() if only_read(module, name)}
    assert only == {"read", "biased", "helped", "within"}
    assert only_read(nn.MultiheadAttention(4, 2), "out_proj")
    assert not only_read(nn.TransformerEncoderLayer(4, 2), "linear1")


def wavlm() -> Any:
    config = hf.WavLMConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(1)
    return hf.WavLMForCTC(config).eval()


def test_pefts_adapter_of_layers_that_nothing_calls_has_no_effect_here_either(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its wrapper adds in a forward that WavLM does not call; the biases of these layers are live."""
    import peft

    x, settings = torch.randn(2, 200), {"target_modules": ["v_proj", "output_dense"], "bias": "lora_only"}
    theirs = peft.get_peft_model(wavlm(), peft.LoraConfig(r=2, init_lora_weights=False, **settings)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.add_(0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    model = wavlm()
    deltaw.load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(x).logits, theirs(x).logits)
    assert "updates of wavlm.encoder.layers.0.attention.v_proj, wavlm.encoder.layers.1" in caplog.text


def test_a_module_without_source_reads_nothing() -> None:
    scope: dict[str, Any] = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.inside.weight", scope)
    assert not read_outside(scope["Made"](), "inside")


METHODS: dict[str, Any] = {
    "lora": LoRA(rank=2, alpha=3, targets="read,both,helped,within,conv,table,called"),
    "dora": DoRA(rank=2, alpha=3, targets="read,both,helped,within,called"),
    "ia3": IA3(targets="both,helped,called", inputs="read"),
    "bitfit": BitFit(),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_update_acts_where_the_parameter_is_read(name: str, tmp_path: Path) -> None:
    model, twin = around(), around()
    before, base = bits(model), model(IDS)
    adapter = deltaw.attach(model, METHODS[name])
    assert torch.allclose(model(IDS), base, atol=1e-6)
    fill(adapter)
    branch = model(IDS)
    branch.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in deltaw.parameters(model))
    deltaw.save(model, tmp_path / "adapter")
    deltaw.load(twin, tmp_path / "adapter")
    assert torch.equal(twin(IDS), branch)
    deltaw.merge(model)
    assert torch.allclose(model(IDS), branch, atol=1e-5) and not torch.allclose(branch, base, atol=1e-2)
    deltaw.unmerge(model)
    after = bits(model)
    assert all(torch.equal(after[n], v) for n, v in before.items())
    deltaw.detach(model)
    assert torch.equal(model(IDS), base) and type(model[0].read) is nn.Linear


@torch.no_grad()
def test_rows_have_adapters_of_their_own_only_where_nothing_is_read() -> None:
    model = around()
    fill(deltaw.attach(model, LoRA(rank=2, alpha=3, targets="called,biased"), name="one"))
    fill(deltaw.attach(model, DoRA(rank=2, alpha=3, targets="called"), name="two"), seed=4)
    alone = []
    for i, name in enumerate(("one", "two")):
        with deltaw.using(model, name):
            alone.append(model(IDS[i : i + 1])[0])
    with deltaw.route(model, ["one", "two"]):
        # biased: its weight is not read, its bias is the base's
        assert torch.allclose(model(IDS), torch.stack(alone), atol=1e-6)
    deltaw.attach(model, LoRA(rank=2, alpha=3, targets="read"), name="three")
    refused = pytest.raises(AdapterError, match="The weight of a Linear is read by the module around it")
    with deltaw.route(model, ["one", "three"]), refused:
        model(IDS)


# Real ones, whose attention or recurrence reads the weights of dense layers
MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "Mamba": (
        hf.MambaForCausalLM,
        {"vocab_size": 99, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
        {"input_ids": torch.arange(4, 15)[None]},
        "dt_proj",
    ),
    "WavLM": (
        hf.WavLMModel,
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "conv_dim": (16, 16),
            "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(2))},
        "q_proj,k_proj,v_proj,out_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_that_read_their_layers_weights(name: str) -> None:
    cls, settings, inputs, targets = MODELS[name]
    torch.manual_seed(3)
    model = cls(cls.config_class(**settings)).eval()
    before, base = bits(model), model(**inputs)[0]
    adapter = deltaw.attach(model, LoRA(rank=2, alpha=3, targets=targets))
    assert torch.allclose(model(**inputs)[0], base, atol=1e-5)
    fill(adapter, size=0.5)
    branch = model(**inputs)[0]
    branch.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in deltaw.parameters(model))
    with torch.no_grad():
        deltaw.merge(model)
        merged = model(**inputs)[0]
    assert torch.allclose(merged, branch, atol=1e-3 * float((branch - base).abs().max()))
    deltaw.unmerge(model)
    after = bits(model)
    assert all(torch.equal(after[n], v) for n, v in before.items())
