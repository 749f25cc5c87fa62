"""Adapters of litgpt. A file of the real litgpt 0.5.13 gave its logits, to 2e-6 (docs/deploy.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import deltaw
from deltaw.errors import FileError
from deltaw.files.formats import peft
from tests.files.formats.others.conftest import KV, MLP, D, deltas

HYPER = {"checkpoint_dir": "checkpoints/x", "lora_r": 2, "lora_alpha": 7, "lora_dropout": 0.05, "lora_query": True, "lora_key": False, "lora_value": True}  # fmt: skip
MODEL = {"n_head": 4, "n_query_groups": 2, "n_embd": D, "head_size": 8, "mlp_class_name": "LLaMAMLP"}


def write(folder: Path, tensors: dict[str, Any], hyper: Any = HYPER, model: Any = MODEL) -> Path:
    folder.mkdir()
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    for name, settings in (("hyperparameters.yaml", hyper), ("model_config.yaml", model)):
        if settings is not None:
            (folder / name).write_text(yaml.safe_dump(settings))
    return folder


@pytest.mark.parametrize("name", ["qkv", "attn"])
@pytest.mark.parametrize("settings", [True, False], ids=["settings beside", "settings given"])
def test_query_and_value_of_one_layer(
    name: str, settings: bool, tmp_path: Path, base: Path, draw: Callable[..., Tensor]
) -> None:
    """Two A's and two B's lie one under the other; older versions call the layer attn."""
    A, B, A1, B1 = draw(4, D), draw(D + KV, 2), draw(2, MLP), draw(D, 2)
    layer = f"transformer.h.1.attn.{name}"
    tensors = {
        f"{layer}.lora_A": A,
        f"{layer}.lora_B": B,
        "transformer.h.0.mlp.proj.lora_A": A1,
        "transformer.h.0.mlp.proj.lora_B": B1,
    }
    folder = write(tmp_path / "lit", tensors, HYPER if settings else None, MODEL if settings else None)
    options: dict[str, Any] = {} if settings else {"alpha": 7, "parts": ["q", "v"], "base": base}
    out = deltaw.convert(folder, tmp_path / "out", **options)
    values, s = deltas(out), 3.5
    assert sorted(values) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    torch.testing.assert_close(values["model.layers.1.self_attn.q_proj"], s * B[:D].double() @ A[:2].double())
    torch.testing.assert_close(values["model.layers.1.self_attn.v_proj"], s * B[D:].double() @ A[2:].double())
    torch.testing.assert_close(values["model.layers.0.mlp.down_proj"], s * B1.double() @ A1.double())
    assert peft.read(out).config.lora_dropout == (0.05 if settings else 0)


def test_everything_wrong_is_one_message(tmp_path: Path, draw: Callable[..., Tensor]) -> None:
    tensors = {
        "transformer.h.0.attn.qkv.lora_A": draw(4, D), "transformer.h.0.attn.qkv.lora_B": draw(D, 2),
        "transformer.h.1.mlp.fc_1.lora_A": draw(2, D), "transformer.wte.weight": draw(96, D),
        "transformer.h.1.mlp.fc.lora_A": draw(2, D), "lm_head.lora_A": draw(2, D), "lm_head.lora_B": draw(96, 3),
    }  # fmt: skip
    folder = write(
        tmp_path / "lit",
        tensors,
        {k: v for k, v in HYPER.items() if k != "lora_alpha"},
        MODEL | {"mlp_class_name": "GptNeoxMLP"},
    )
    with pytest.raises(FileError) as caught:
        deltaw.convert(folder, tmp_path / "out")
    for part in (
        "--alpha",
        "layers.0.self_attn: A is",
        "gate_proj has no lora_B",
        "wte.weight",
        "mlp.fc.lora_A",
        "lm_head: A is",
        "GptNeoxMLP",
    ):
        assert part in str(caught.value), part
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = write(tmp_path / "lit", {"transformer.h.0.attn.qkv.lora_A": Evil()})
    with pytest.raises(FileError, match="weights alone"):
        deltaw.convert(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("keys", "rank", "said"),
    [(["transformer.h.0.attn.attn"], 2, "another key in the file is the same part"), ([], 4, "the rank is 4, that of the tensors 2")],
    ids=["twice", "rank"],
)  # fmt: skip
def test_files_that_are_not_of_one_adapter(
    keys: list[str], rank: int, said: str, tmp_path: Path, draw: Callable[..., Tensor]
) -> None:
    tensors = {}
    for layer in ("transformer.h.0.attn.qkv", *keys):
        tensors |= {f"{layer}.lora_A": draw(4, D), f"{layer}.lora_B": draw(D + KV, 2)}
    folder = write(tmp_path / "lit", tensors, HYPER | {"lora_r": rank})
    with pytest.raises(FileError, match=said):
        deltaw.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
