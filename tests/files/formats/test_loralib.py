"""loralib's checkpoints: what they compute is what the converted adapter computes."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

import deltaw
from deltaw.cli import main
from deltaw.errors import FileError
from deltaw.files.convert import convert
from deltaw.files.formats.peft import LoRAFile, config_for, read, write
from tests.conftest import tiny_gpt2

R, ALPHA = 4, 10.0


def merged_delta(A: Tensor, B: Tensor, enabled: list[bool], scale: float) -> Tensor:
    """As loralib's MergedLinear defines it: a convolution in groups, its rows spread over the enabled parts."""
    groups = sum(enabled)
    rows = nn.functional.conv1d(A[None], B[:, :, None], groups=groups)[0]
    d = B.shape[0] // groups * len(enabled)
    whole = torch.zeros(d, A.shape[1])
    mask = torch.tensor(enabled).repeat_interleave(d // len(enabled))
    whole[mask] = rows * scale
    return whole


@pytest.mark.parametrize("parts", ["qv", "q", "k", "qkv", "kv"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_merged_layers_of_gpt2(parts: str, wrapped: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_gpt2().eval()
    enabled = [p in parts for p in "qkv"]
    state = {}
    for i in range(2):
        name = ("module." if wrapped else "") + f"transformer.h.{i}.attn.c_attn"
        state[f"{name}.lora_A"] = torch.randn(R * len(parts), 32)
        state[f"{name}.lora_B"] = torch.randn(32 * len(parts), R)
    torch.save({"model_state_dict": state} if wrapped else state, tmp_path / "lora.pt")
    convert(tmp_path / "lora.pt", tmp_path / "adapter", alpha=ALPHA, parts=list(parts))
    deltaw.load(model, tmp_path / "adapter")
    prefix = "module." if wrapped else ""
    for i in range(2):
        layer = f"transformer.h.{i}.attn.c_attn"
        A, B = state[f"{prefix}{layer}.lora_A"], state[f"{prefix}{layer}.lora_B"]
        torch.testing.assert_close(deltaw.delta(model, layer), merged_delta(A, B, enabled, ALPHA / R))
    deltaw.save(model, tmp_path / "again")
    for folder in ("adapter", "again"):
        convert(tmp_path / folder, tmp_path / "back.bin", alpha=ALPHA)
        back = torch.load(tmp_path / "back.bin", weights_only=True)
        assert all(torch.equal(back[key.removeprefix("module.")], value) for key, value in state.items())


def test_plain_layers_beside_merged_ones(tmp_path: Path) -> None:
    state = {
        "h.0.c_attn.lora_A": torch.randn(2 * R, 6), "h.0.c_attn.lora_B": torch.randn(2 * 5, R),
        "h.0.c_proj.lora_A": torch.randn(R, 7), "h.0.c_proj.lora_B": torch.randn(6, R),
    }  # fmt: skip
    torch.save(state, tmp_path / "lora.bin")
    convert(tmp_path / "lora.bin", tmp_path / "adapter", alpha=ALPHA, parts=["v", "q"])
    file = read(tmp_path / "adapter")
    assert file.scales == {"h.0.c_attn": 2.5, "h.0.c_proj": 2.5}
    A, B = file.factors["h.0.c_attn"]
    assert A.shape == (8, 6) and B.shape == (15, 8)
    torch.testing.assert_close(
        2.5 * B @ A, merged_delta(state["h.0.c_attn.lora_A"], state["h.0.c_attn.lora_B"], [True, False, True], 2.5)
    )
    assert torch.equal(file.factors["h.0.c_proj"][0], state["h.0.c_proj.lora_A"])


def broken(folder: Path, state: Any, what: str, **more: Any) -> None:
    torch.save(state, folder / "lora.pt")
    with pytest.raises(FileError, match=what):
        convert(folder / "lora.pt", folder / "adapter", **({"alpha": ALPHA} | more))
    assert not (folder / "adapter").exists()


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    A, B = torch.randn(R, 6), torch.randn(5, R)
    broken(tmp_path, {"q.lora_A": A, "q.lora_B": B}, "carries no α", alpha=None)
    broken(
        tmp_path,
        {"q.lora_A": A, "v.lora_B": B, "ids": B.long(), "x.ids": B.long(), "token": B},
        "(?s)q has no lora_B.*v has no lora_A.*ids is torch.int64.*x.ids is torch.int64.*token is no parameter of a module",
    )
    broken(
        tmp_path,
        {"q.lora_A": torch.randn(2 * R, 6), "q.lora_B": torch.randn(10, R)},
        "updates of 2 of its parts, of which none is named",
    )
    broken(tmp_path, {"q.lora_A": torch.randn(R + 1, 6), "q.lora_B": B}, "fit no layer")
    broken(tmp_path, {"q.lora_A": A, "q.lora_B": B}, "'x' is none of q, k, v", parts=["x"])
    broken(tmp_path, {"q.lora_A": A, "q.lora_B": B, "q.weight": torch.randn(5, 6)}, "checkpoint of the whole model")
    broken(tmp_path, {"q.lora_A": A.long(), "q.lora_B": B}, "must be floating point")
    broken(tmp_path, {}, "there is no lora_A")
    broken(tmp_path, [A], "holds no tensors by their names")
    (tmp_path / "lora.pt").write_bytes(b"no pickle")
    with pytest.raises(FileError, match="cannot be read"):
        convert(tmp_path / "lora.pt", tmp_path / "adapter", alpha=ALPHA)
    with pytest.raises(FileError, match="no file"):
        convert(tmp_path / "other.pt", tmp_path / "adapter", alpha=ALPHA)


def tiny_roberta() -> Any:
    config = RobertaConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, num_labels=3,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    return RobertaForSequenceClassification(config).eval()


def of_the_authors(model: Any, biases: str) -> dict[str, Tensor]:
    """What their example of GLUE saves of a RoBERTa: A and B of query and value, the head, and `biases` where they are trained."""
    state = {}
    for name, module in model.named_modules():
        if name.endswith((".query", ".value")):
            d, k = module.weight.shape
            state |= {f"{name}.lora_A": torch.randn(R, k), f"{name}.lora_B": torch.randn(d, R)}
    state |= {n: p + 0.3 * torch.randn(p.shape) for n, p in model.named_parameters() if n.startswith("classifier.")}
    wanted = {"none": (), "lora_only": ("query.bias", "value.bias"), "all": ("bias",)}[biases]
    return state | {n: p + 0.3 for n, p in model.named_parameters() if n.endswith(wanted) and n not in state and wanted}


@torch.no_grad()
def as_loralib_computes(model: Any, state: dict[str, Tensor]) -> Any:
    """The model with what a checkpoint holds in its weights, by loralib's definition."""
    own = copy.deepcopy(model)
    for key, value in state.items():
        if key.endswith(".lora_A"):
            layer = own.get_submodule(key.removesuffix(".lora_A"))
            layer.weight += ALPHA / R * (state[key.replace("lora_A", "lora_B")] @ value)
        elif not key.endswith(".lora_B"):
            own.get_parameter(key).copy_(value)
    return own


@pytest.mark.parametrize("biases", ["none", "lora_only", "all"])
@pytest.mark.filterwarnings("ignore")
def test_the_authors_own_checkpoint(biases: str, ids: Tensor, tmp_path: Path) -> None:
    """microsoft/LoRA's examples/NLU: heads and biases beside A and B. Real PEFT reads what it becomes."""
    torch.manual_seed(0)
    model = tiny_roberta()
    state = of_the_authors(model, biases)
    with torch.no_grad():
        before, expected = model(ids).logits, as_loralib_computes(model, state)(ids).logits
    assert (expected - before).abs().max() > 1e-2
    torch.save(state, tmp_path / "roberta_base_lora_mnli.bin")
    assert (
        main(
            ["convert", str(tmp_path / "roberta_base_lora_mnli.bin"), "-o", str(tmp_path / "a"), "--alpha", str(ALPHA)]
        )
        == 0
    )
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"], config["task_type"]) == (biases, ["classifier"], "SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    deltaw.load(model, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert main(["convert", str(tmp_path / "a"), "-o", str(tmp_path / "back.bin"), "--alpha", "5"]) == 0
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert back.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(back[key], value * (2.0 if key.endswith("lora_B") else 1.0))


def test_heads_of_other_names_and_norms_are_modules_of_their_own(tmp_path: Path) -> None:
    names = "deberta.encoder.layer.0.attention.self.query_proj", "pooler.dense", "encoder.LayerNorm"
    state = {
        f"module.{names[0]}.lora_A": torch.randn(R, 6), f"module.{names[0]}.lora_B": torch.randn(5, R),
        f"module._orig_mod.{names[1]}.weight": torch.randn(5, 5), f"module.{names[1]}.bias": torch.randn(5),
        f"module.{names[2]}.weight": torch.randn(5), f"module.{names[2]}.bias": torch.randn(5),
        "module.classifier.out_proj.weight": torch.randn(3, 5),
    }  # fmt: skip
    torch.save(state, tmp_path / "lora.bin")
    convert(tmp_path / "lora.bin", tmp_path / "a", alpha=ALPHA)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier.out_proj", "encoder.LayerNorm", "pooler.dense"]
    assert config["bias"] == "none" and config["task_type"] is None


def test_masks_that_are_called_bias_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`lora_state_dict(model, bias="all")` of GPT-2 takes every name with "bias" in it."""
    state = {
        "h.0.attn.c_attn.lora_A": torch.randn(3 * R, 6), "h.0.attn.c_attn.lora_B": torch.randn(15, R),
        "h.0.attn.bias": torch.ones(1, 1, 8, 8).bool(), "h.0.attn.masked_bias": torch.tensor(-1e4), "h.0.mlp.c_fc.bias": torch.ones(7),
    }  # fmt: skip
    torch.save(state, tmp_path / "lora.bin")
    convert(tmp_path / "lora.bin", tmp_path / "a", alpha=ALPHA)
    assert "masks and no parameters: h.0.attn.bias, h.0.attn.masked_bias" in caplog.text
    assert read(tmp_path / "a").whole.keys() == {"h.0.mlp.c_fc.bias"}


class FromLoralib(nn.Module):
    """Each kind of layer that loralib has."""

    def __init__(self, loralib: Any = None) -> None:
        super().__init__()
        more: dict[str, Any] = {} if loralib is None else {"r": R, "lora_alpha": ALPHA}
        kinds = nn if loralib is None else loralib
        self.wte = kinds.Embedding(12, 6, **more)
        self.fused = (
            nn.Linear(6, 24)
            if loralib is None
            else loralib.MergedLinear(6, 24, enable_lora=[True, False, True, False], **more)
        )
        self.both = (
            nn.Linear(24, 10) if loralib is None else loralib.MergedLinear(24, 10, enable_lora=[True, True], **more)
        )
        self.conv = kinds.Conv2d(2, 5, 3, **more)
        self.out = kinds.Linear(15, 4, **more)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.both(self.fused(self.wte(ids))).view(-1, 2, 5, 5)
        return self.out(self.conv(hidden).flatten(1)[:, :15])


def test_each_kind_of_layer_of_the_real_loralib(tmp_path: Path) -> None:
    loralib = pytest.importorskip("loralib", reason="loralib is not installed")
    torch.manual_seed(0)
    theirs, ours = FromLoralib(loralib), FromLoralib().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    own = theirs.state_dict()
    ours.load_state_dict({k: own[k.replace("conv.", "conv.conv.")] for k in ours.state_dict()})
    with torch.no_grad():
        for bias in (ours.fused.bias, ours.out.bias):
            bias.zero_()
    ids = torch.arange(10).view(2, 5)
    expected = theirs.train()(ids).detach()
    torch.save(loralib.lora_state_dict(theirs, bias="lora_only"), tmp_path / "lora.pt")
    convert(tmp_path / "lora.pt", tmp_path / "a", alpha=ALPHA, parts=["1010"], base=ours)
    deltaw.load(ours, tmp_path / "a")
    torch.testing.assert_close(ours(ids).detach(), expected, rtol=1e-4, atol=1e-5)


class Evil:
    def __reduce__(self) -> Any:
        return (open, ("evil", "w"))


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    broken(tmp_path, {"q.lora_A": Evil()}, "cannot be read")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("known", [False, True], ids=["by its name", "by the base"])
@pytest.mark.filterwarnings("ignore")
def test_biases_of_merged_layers_and_embeddings_of_gpt2(known: bool, ids: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_gpt2().eval()
    model.save_pretrained(tmp_path / "base")
    state = {"transformer.wte.lora_A": 0.3 * torch.randn(R, 96), "transformer.wte.lora_B": 0.3 * torch.randn(32, R)}
    computed = copy.deepcopy(model)
    computed.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        computed.transformer.wte.weight += (
            ALPHA / R * (state["transformer.wte.lora_B"] @ state["transformer.wte.lora_A"]).t()
        )
        for i in range(2):
            name = f"transformer.h.{i}.attn.c_attn"
            A, B, bias = 0.3 * torch.randn(2 * R, 32), 0.3 * torch.randn(64, R), torch.randn(96)
            state |= {f"{name}.lora_A": A, f"{name}.lora_B": B, f"{name}.bias": bias}
            computed.get_submodule(name).weight += merged_delta(A, B, [True, False, True], ALPHA / R).t()
            computed.get_submodule(name).bias.copy_(bias)
        expected = computed(ids).logits
    torch.save({"model_state_dict": state}, tmp_path / "lora.pt")
    base = tmp_path / "base" if known else None
    convert(tmp_path / "lora.pt", tmp_path / "a", alpha=ALPHA, parts=["q", "v"], base=base)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    deltaw.load(model, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-5)
    convert(tmp_path / "a", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[k], t) for k, t in state.items())


def test_what_loralib_has_no_form_for_is_named(tmp_path: Path) -> None:
    for i, method in enumerate(
        [deltaw.DoRA(rank=2, alpha=5, targets="qv"), deltaw.LoRA(rank=2, alpha=5, targets="qv", tokens=[3])]
    ):
        model = deltaw.attach(tiny_roberta() if i == 0 else tiny_gpt2(), method)
        deltaw.save(model, tmp_path / str(i))
        with pytest.raises(FileError, match=r"(?s)no form for what is in.*(DoRA's magnitude|rows of some tokens)"):
            convert(tmp_path / str(i), tmp_path / "x.bin")
        assert not (tmp_path / "x.bin").exists()


def test_a_factor_in_b_costs_no_precision(tmp_path: Path) -> None:
    """Files in 16 bits with an α of one layer's own: B times its factor was rounded to 16 bits."""
    names = [f"l{i}" for i in range(3)]
    factors = {n: (torch.randn(3, 8).half(), torch.randn(8, 3).half()) for n in names}
    scales = {"l0": 7 / 3, "l1": 7 / 3, "l2": 5 / 3}
    file = LoRAFile(factors, scales, config_for(dict.fromkeys(names, 3), scales, target_modules=names))
    write(tmp_path / "a", file)
    back = read(convert(convert(tmp_path / "a", tmp_path / "a.bin"), tmp_path / "back", alpha=7))
    for name, (A, B) in factors.items():
        A1, B1 = back.factors[name]
        theirs = back.scales[name] * B1.double() @ A1.double()
        torch.testing.assert_close(theirs, scales[name] * B.double() @ A.double(), atol=1e-6, rtol=1e-6)
