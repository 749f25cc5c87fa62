"""Convolutions: an update of one from attach to file and back, over strides, paddings, dilations and groups; with real PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaw
from deltaw import DoRA, LoRA, attach, detach, load, merge, merge_files, parameters, route, save, unmerge, using
from deltaw.errors import FileError, MergeError
from deltaw.methods.targets import select
from deltaw.model.summary import updates
from tests.conftest import assert_same, bits, fill, snapshot

CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "1d": (nn.Conv1d, {"kernel_size": 3}),
    "1d dilated": (nn.Conv1d, {"kernel_size": 3, "dilation": 2, "padding": "same"}),
    "1d circular": (nn.Conv1d, {"kernel_size": 3, "padding": 2, "padding_mode": "circular"}),
    "2d": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}),
    "2d reflected": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "bias": False}),
    "2d groups": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "dilation": (1, 2)}),
    "2d depthwise": (nn.Conv2d, {"kernel_size": 3, "groups": 6}),
    "2d point": (nn.Conv2d, {"kernel_size": 1}),
    "3d": (nn.Conv3d, {"kernel_size": (2, 3, 2), "stride": (1, 2, 1), "groups": 3}),
}
PEFTS = ("1d", "2d", "2d point")


class Net(nn.Module):
    """A convolution between two dense layers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        kind, settings = CASES[name]
        self.into = nn.Linear(5, 9)
        self.conv = kind(6, 12, **settings)
        self.out = nn.Linear(12, 4)
        self.size = (9,) if kind is nn.Conv1d else (7, 9) if kind is nn.Conv2d else (4, 7, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.conv(self.into(x))
        return self.out(h.flatten(2).mean(-1) if h.dim() > 2 else h)


def net(name: str) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(4)
    model = Net(name).eval()
    return model, torch.randn(3, 6, *model.size[:-1], 5)


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("name", CASES)
def test_a_convolutions_life(name: str, method: type[LoRA], tmp_path: Path) -> None:
    model, x = net(name)
    before, was, base = snapshot(model), bits(model), model(x)
    attach(model, method(rank=2, alpha=3, targets="conv,out"))
    torch.testing.assert_close(model(x), base)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in parameters(model)) and updates(model)["conv"].B.grad.any()
    fill(model)
    branch = model(x)
    assert (branch - base).abs().max() > 1e-2
    save(model, tmp_path / "a")
    merge(model)
    torch.testing.assert_close(model(x), branch, rtol=1e-4, atol=1e-5)
    unmerge(model)
    merge(model, keep="correction")
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in was.items())
    detach(model)
    assert_same(model, before)
    load(model, tmp_path / "a")
    assert torch.equal(model(x), branch)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_right(name: str) -> None:
    model, x = net(name)
    model.double()
    x = x.double().requires_grad_()
    fill(attach(model, LoRA(rank=2, alpha=3, targets="conv")))
    update = updates(model)["conv"]

    def branch(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(update, {"A": A, "B": B}, (model.conv, model.into(x)))  # type: ignore[no-any-return]

    update.forward = update.branch
    assert torch.autograd.gradcheck(branch, (x[:1], update.A, update.B))


@pytest.mark.parametrize("name", CASES)
def test_on_disk_as_in_memory(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = net(name)
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    fill(attach(model, LoRA(rank=2, alpha=3, targets="conv,out")))
    save(model, tmp_path / "a")
    merge_files(tmp_path / "base", tmp_path / "a", tmp_path / "merged", reversible=True)
    merge(model)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[n], v) for n, v in bits(model).items())
    deltaw.unmerge_files(tmp_path / "merged", tmp_path / "a", tmp_path / "back")
    own = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("base", "back")]
    assert own[0] == own[1]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", PEFTS)
def test_real_peft_and_we_agree(name: str, dora: bool, tmp_path: Path) -> None:
    import peft

    model, x = net(name)
    fill(attach(model, (DoRA if dora else LoRA)(rank=2, alpha=3, targets="conv,out")))
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(net(name)[0], tmp_path / "ours")
    torch.testing.assert_close(theirs(x), model(x))

    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["conv", "out"], use_dora=dora, init_lora_weights=False)
    theirs = peft.get_peft_model(net(name)[0], config).eval()
    with torch.no_grad():
        for own, parameter in theirs.named_parameters():
            if "magnitude" in own:
                parameter.mul_(1.3)
    theirs.save_pretrained(tmp_path / "theirs")
    load(model, tmp_path / "theirs", name="theirs")
    torch.testing.assert_close(model(x), theirs(x))


@pytest.mark.parametrize(
    ("name", "what"), [("1d dilated", r"dilation \[2\]"), ("2d reflected", "padding mode 'reflect'")]
)
def test_what_peft_computes_without_the_layers_settings(
    name: str, what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT's update of these convolutions is one with no dilation, padded with zeros, so that it is no ΔW."""
    import peft

    config = peft.LoraConfig(r=3, target_modules=["conv"], init_lora_weights=False)
    peft.get_peft_model(net(name)[0], config).save_pretrained(tmp_path / "theirs")
    model, x = net(name)
    with pytest.raises(FileError, match=what):
        load(model, tmp_path / "theirs")
    save(fill(attach(model, LoRA(rank=2, targets="conv"))), tmp_path / "ours")
    assert "PEFT leaves out" in caplog.text
    expected = model(x)
    load(deltaw.detach(model), tmp_path / "ours")
    assert torch.equal(model(x), expected)


def test_rows_with_adapters_of_their_own() -> None:
    model, x = net("2d groups")
    for i, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=2, alpha=3, targets="conv,out"), name=name), name, seed=i)
    with torch.no_grad(), route(model, ["b", None, "a"]):
        mixed = model(x)
    for row, name in enumerate(["b", None, "a"]):
        with torch.no_grad(), using(model, name):
            torch.testing.assert_close(mixed[row], model(x[row : row + 1])[0])


def test_one_without_a_batch_and_one_in_half_precision() -> None:
    model, x = net("2d")
    fill(attach(model, LoRA(rank=2, alpha=3, targets="conv")))
    h = model.into(x)
    torch.testing.assert_close(model.conv(h[0]), model.conv(h)[0])
    model.to(torch.bfloat16)
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_a_convolution_takes_an_update_where_it_is_named() -> None:
    model, _ = net("2d")
    assert set(select(model, "all-linear", 2).ranks) == {"into", "out"}
    assert select(model, "all-linear", 2).left_out == {"conv": "Conv2d: it takes an update where it is named"}
    assert set(select(model, "*", 2).ranks) == {"into", "conv", "out"}


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    model, _ = net("2d")
    fill(attach(model, LoRA(rank=2, alpha=3, targets="conv")))
    save(model, tmp_path / "a")
    model.to(memory_format=torch.channels_last)
    with pytest.raises(MergeError, match="channels last"):
        merge(model)
    other = nn.ModuleDict({"conv": nn.Conv2d(6, 12, (2, 3))})
    with pytest.raises(FileError, match=r"with kernels \[6, 2, 3\], the file's are \[6, 3, 2\]"):
        load(other, tmp_path / "a", check_base=False)
    with pytest.raises(FileError, match="is a Linear, the file's A and B are a convolution's"):
        load(nn.ModuleDict({"conv": nn.Linear(36, 12)}), tmp_path / "a", check_base=False)
