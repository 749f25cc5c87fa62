"""loralib's checkpoints: what they compute is what the converted adapter computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw.converted import convert
from deltaw.errors import FileError
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


def test_plain_layers_beside_merged_ones(tmp_path: Path) -> None:
    state = {
        "h.0.c_attn.lora_A": torch.randn(2 * R, 6), "h.0.c_attn.lora_B": torch.randn(2 * 5, R),
        "h.0.c_proj.lora_A": torch.randn(R, 7), "h.0.c_proj.lora_B": torch.randn(6, R),
    }  # fmt: skip
    torch.save(state, tmp_path / "lora.bin")
    convert(tmp_path / "lora.bin", tmp_path / "adapter", alpha=ALPHA, parts=["v", "q"])
    from deltaw.files.peft import read

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
        {"q.lora_A": A, "v.lora_B": B, "q.bias": B},
        "(?s)q.bias is no A or B.*q has no lora_B.*v has no lora_A",
    )
    broken(
        tmp_path,
        {"q.lora_A": torch.randn(2 * R, 6), "q.lora_B": torch.randn(10, R)},
        "updates of 2 of q, k, v.*none is named",
    )
    broken(tmp_path, {"q.lora_A": torch.randn(R + 1, 6), "q.lora_B": B}, "fit no layer")
    broken(tmp_path, {"q.lora_A": A, "q.lora_B": B}, "'x' is none of q, k, v", parts=["x"])
    broken(tmp_path, {}, "there is no lora_A")
    broken(tmp_path, [A], "holds a list")
    (tmp_path / "lora.pt").write_bytes(b"no pickle")
    with pytest.raises(FileError, match="cannot be read"):
        convert(tmp_path / "lora.pt", tmp_path / "adapter", alpha=ALPHA)
    with pytest.raises(FileError, match="no file"):
        convert(tmp_path / "other.pt", tmp_path / "adapter", alpha=ALPHA)


class Evil:
    def __reduce__(self) -> Any:
        return (open, ("evil", "w"))


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    broken(tmp_path, {"q.lora_A": Evil()}, "cannot be read")
    assert not (tmp_path / "evil").exists()
