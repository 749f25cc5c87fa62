"""Adapters of single experts, from transformers 4, on the stacks of transformers 5: as real PEFT reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.errors import FileError
from tests.conftest import assert_same, snapshot
from tests.files.test_pack import model_of, peft, run

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def written(
    folder: Path,
    kind: str,
    *,
    router: bool = False,
    without: Callable[[str], bool] = lambda n: False,
    rank: Callable[[str], int] = lambda n: 4,
    prefix: str = "base_model.model.",
    **settings: Any,
) -> Path:
    """An adapter as PEFT wrote it with transformers 4: an A and a B for each layer of each expert."""
    block, own = NAMES[kind]
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}

    def put(name: str, k: int, d: int) -> None:
        for part, shape in (("A", (rank(name), k)), ("B", (d, rank(name)))):
            if not without(name):
                key = f"{prefix}model.layers.{name}.lora_{part}.weight"
                tensors[key] = torch.randn(shape, generator=generator) * 0.2

    for number, layer in enumerate(model_of(kind).model.layers):
        experts = layer.mlp.experts
        put(f"{number}.self_attn.q_proj", 32, layer.self_attn.q_proj.out_features)
        if router:
            put(f"{number}.{block}.gate", 32, len(experts.down_proj))
        for e in range(len(experts.down_proj)):
            _, rows, k = experts.gate_up_proj.shape
            put(f"{number}.{block}.experts.{e}.{own[0]}", k, rows // 2)
            put(f"{number}.{block}.experts.{e}.{own[1]}", k, rows // 2)
            put(f"{number}.{block}.experts.{e}.{own[2]}", experts.down_proj.shape[2], experts.down_proj.shape[1])
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = ["q_proj", *own, *(["gate"] if router else [])]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("kind", NAMES)
def test_it_is_read_as_real_peft_reads_it(kind: str, router: bool, tmp_path: Path) -> None:
    folder = written(tmp_path / "a", kind, router=router)
    model = model_of(kind)
    plain, before = run(model), snapshot(model)
    expected = run(peft.PeftModel.from_pretrained(model_of(kind), folder).eval())
    deltaw.load(model, folder)
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=2e-6)
    deltaw.save(model, tmp_path / "ours")
    deltaw.detach(model)
    assert_same(model, before)
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    torch.testing.assert_close(run(again), expected, rtol=1e-5, atol=2e-6)


def test_scales_of_experts_that_differ(tmp_path: Path) -> None:
    """An α of one expert's own, which PEFT itself loses with the names: by ΔW."""
    model = model_of("qwen3_moe")
    deltaw.load(model, written(tmp_path / "a", "qwen3_moe"), name="one")
    pattern = {r"layers\.1\.mlp\.experts\.2\.up_proj": 12}
    deltaw.load(model, written(tmp_path / "b", "qwen3_moe", alpha_pattern=pattern), name="other")
    one, other = (deltaw.delta(model, "model.layers.1.mlp.experts.gate_up_proj", name) for name in ("one", "other"))
    one[2, one.shape[1] // 2 :] *= 2
    torch.testing.assert_close(other, one)


RANKS: dict[str, tuple[Callable[[str], int], dict[str, int]]] = {
    "down": (lambda n: 2 if n.endswith(("w2", "down_proj")) else 4, {"w2": 2, "down_proj": 2}),
    "a layer": (lambda n: 3 if n.startswith("1.") else 4, {r"layers\.1\..*": 3}),
}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", NAMES)
def test_ranks_that_differ_between_stacks(kind: str, ranks: str, tmp_path: Path) -> None:
    """As the file with the same A's and B's, of which some are filled with zeros up to one rank; PEFT reads the first case."""
    rank, pattern = RANKS[ranks]
    folder, model = written(tmp_path / "a", kind, rank=rank, rank_pattern=pattern), model_of(kind)
    deltaw.load(model, folder)
    ours = run(model)
    tensors, filled = load_file(folder / "adapter_model.safetensors"), {}
    for key, value in tensors.items():
        own = rank(key.removeprefix("base_model.model.model.layers.").partition(".lora_")[0])
        more = (0, 0, 0, 4 - own) if ".lora_A." in key else (0, 4 - own)
        filled[key] = torch.nn.functional.pad(value, more) * (1.0 if ".lora_A." in key else 4 / own)
    save_file(filled, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    expected = run(peft.PeftModel.from_pretrained(model_of(kind), folder).eval())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)
    deltaw.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model_of(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(run(again), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_wrappers_before_those_of_experts(kind: str, tmp_path: Path) -> None:
    model, other = model_of(kind), model_of(kind)
    deltaw.load(model, written(tmp_path / "a", kind))
    deltaw.load(other, written(tmp_path / "b", kind, prefix="base_model.model.module."))
    assert torch.equal(run(model), run(other))


def test_rslora_has_the_scale_that_it_was_trained_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT takes twice α and twice r, which under a root is another scale."""
    model = model_of("qwen3_moe")
    deltaw.load(model, written(tmp_path / "a", "qwen3_moe"), name="plain")
    deltaw.load(model, written(tmp_path / "b", "qwen3_moe", use_rslora=True), name="stabilised")
    for own in ("gate_up_proj", "down_proj"):
        plain, other = (deltaw.delta(model, f"model.layers.1.mlp.experts.{own}", n) for n in ("plain", "stabilised"))
        torch.testing.assert_close(other, plain * 2)
    assert "PEFT (0.21) would give their gate_up_proj" in caplog.text


@pytest.mark.parametrize(("without", "message"), [
    (lambda n: n.endswith("experts.2.down_proj"), "there is none of expert 2"),
    (lambda n: n.endswith("up_proj"), "there is none of expert 0, part 1"),
], ids=["an expert", "up"])  # fmt: skip
def test_experts_that_do_not_make_up_a_stack_are_refused(without: Any, message: str, tmp_path: Path) -> None:
    model = model_of("qwen3_moe")
    before = snapshot(model)
    with pytest.raises(FileError, match=message):
        deltaw.load(model, written(tmp_path / "a", "qwen3_moe", without=without))
    assert_same(model, before)
