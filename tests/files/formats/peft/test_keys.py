"""Stacks of experts in adapters' files: their ranks and scales as PEFT has them, cut, looked at, and tried by rank."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import deltaw
from deltaw.cli.main import main
from deltaw.config import RankConfig, SweepConfig, TrainConfig
from deltaw.errors import AdapterError, FileError
from deltaw.files.formats import peft
from deltaw.files.formats.peft.keys import in_file, sort, unstacked
from deltaw.layers.ops.merging import delta_norm
from tests.conftest import fill
from tests.data.conftest import CHATML, tiny_tokenizer
from tests.methods.updates.test_weights import SIZES, model_of, run
from tests.runs.conftest import RECORDS

BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def saved(folder: Path, name: str, **settings: Any) -> tuple[Path, Any]:
    model = fill(deltaw.attach(model_of(name), deltaw.LoRA(**{"rank": 4, "alpha": 3} | settings)))
    return Path(deltaw.save(model, folder)), model


def in_real_peft(name: str, folder: Path) -> torch.Tensor:
    package = pytest.importorskip("peft")
    return run(package.PeftModel.from_pretrained(model_of(name), folder).eval()).detach()


def in_ours(name: str, folder: Path) -> torch.Tensor:
    model = model_of(name)
    deltaw.load(model, folder)
    return run(model).detach()


def dense(model: Any, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """Parameter of a stack → ΔW of its matrices."""
    names = [f"model.layers.{i}.{own}" for i in (0, 1) for own in BOTH]
    return {name: deltaw.delta(model, name, adapter).double() for name in names}


def test_the_files_shape_and_back() -> None:
    A, B = torch.randn(3, 2, 5), torch.randn(3, 4, 2)
    flat = in_file(A, B)
    assert [list(t.shape) for t in flat] == [[6, 5], [4, 6]]
    assert all(torch.equal(one, other) for one, other in zip(unstacked(*flat, 2), (A, B), strict=True))
    assert delta_norm(A, B, 1.5) == pytest.approx(float((1.5 * B.double() @ A.double()).norm()))


@pytest.mark.parametrize("targets", [{"q": 2, "gate_up": 3, "down": 4}, "down", "gate_up,down"], ids=str)
@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS"])
def test_real_peft_reads_ranks_that_differ_and_experts_alone(name: str, targets: Any, tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "a", name, targets=targets)
    for read in (in_real_peft, in_ours):
        torch.testing.assert_close(read(name, folder), run(model).detach(), rtol=1e-4, atol=1e-4)


def test_peft_files_whose_patterns_name_parameters(tmp_path: Path) -> None:
    """Ranks and alphas by a parameter's name, which the file itself does not have: PEFT keeps A and B by the module's."""
    package = pytest.importorskip("peft")
    shared = {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    patterns = {"rank_pattern": {"experts.down_proj": 5}, "alpha_pattern": {r"layers\.1.*experts\.\w+": 7}}
    config = package.LoraConfig(**shared, target_parameters=[BOTH[1]], **patterns)
    theirs = package.get_peft_model(model_of("Mixtral"), config).eval()
    theirs.save_pretrained(tmp_path / "one")
    assert peft.read(tmp_path / "one").scales["model.layers.1.mlp.experts"] == 7 / 5
    torch.testing.assert_close(in_ours("Mixtral", tmp_path / "one"), run(theirs).detach(), rtol=1e-4, atol=1e-4)

    for key, values in (("rank_pattern", {"gate_up_proj": 2}), ("alpha_pattern", {"experts.gate_up_proj": 7})):
        config = package.LoraConfig(**shared, target_parameters=[*BOTH], **{key: values})
        theirs = package.get_peft_model(model_of("Mixtral"), config).eval()
        theirs.save_pretrained(tmp_path / key)
        torch.testing.assert_close(in_ours("Mixtral", tmp_path / key), run(theirs).detach(), rtol=1e-4, atol=1e-4)
        path = tmp_path / key / "adapter_config.json"  # of parameters in an order that nobody knows
        path.write_text(path.read_text().replace("gate_up_proj", "wi").replace("down_proj", "wo"))
        with pytest.raises(FileError, match=rf"{key} gives .*wi and .*wo different values"):
            peft.read(tmp_path / key)


@pytest.mark.parametrize("how", [{"rank": 2}, {"rank": 3}, {"energy": 0.8}, {"size": "14kB"}], ids=str)
@pytest.mark.parametrize("targets", [{"q": 2, "gate_up": 3, "down": 4}, {"q": 4, "gate_up": 4, "down": 4}], ids=str)
def test_a_cut_is_the_nearest_of_each_matrix_and_peft_reads_it(tmp_path: Path, how: Any, targets: Any) -> None:
    folder, model = saved(tmp_path / "a", "Qwen3-MoE", targets=targets)
    before = dense(model)
    done = deltaw.compress(folder, tmp_path / "cut", **how)
    assert done.bytes <= min(done.bytes_before, 14_000 if "size" in how else done.bytes_before)
    deltaw.load(model, done.path, name="cut")
    deltaw.use(model, "cut")
    after = dense(model)
    for name, dW in before.items():
        squares = torch.linalg.svdvals(dW).square()
        least = float((squares[:, done.ranks[name] :].sum() / squares.sum()).sqrt())
        off = float((after[name] - dW).norm() / dW.norm())
        assert off == pytest.approx(least, rel=1e-4, abs=1e-6) == done.errors[name]
    torch.testing.assert_close(in_real_peft("Qwen3-MoE", done.path), run(model).detach(), rtol=1e-4, atol=1e-4)


def test_a_foreign_files_stacks_are_cut_to_ranks_of_their_own(tmp_path: Path) -> None:
    """Which stack is whose, the order tells that all of transformers' experts have."""
    package = pytest.importorskip("peft")
    config = package.LoraConfig(r=4, target_modules=[], target_parameters=[*BOTH], init_lora_weights=False)
    theirs = package.get_peft_model(model_of("Mixtral"), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    done = deltaw.compress(tmp_path / "a", tmp_path / "cut", energy=0.7)
    cut = peft.read(done.path)
    ranks = {cut.shown(layer): A.shape[0] // 4 for layer, (A, _) in cut.factors.items()}
    assert ranks == done.ranks and set(ranks.values()) != {4}
    assert {name.rsplit(".", 1)[-1] for name in ranks} == {"gate_up_proj", "down_proj"}
    torch.testing.assert_close(in_real_peft("Mixtral", done.path), in_ours("Mixtral", done.path), rtol=1e-4, atol=1e-4)


def test_stored_in_fewer_bytes(tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "a", "Mixtral", targets="gate_up,down")
    deltaw.load(model, folder, name="half", dtype=torch.bfloat16)
    assert {p.dtype for p in deltaw.parameters(model, "half")} == {torch.bfloat16}
    own, half = dense(model, "default"), dense(model, "half")
    off = sum(float((half[n] - dW).square().sum()) for n, dW in own.items())
    expected = (off / sum(float(dW.square().sum()) for dW in own.values())) ** 0.5
    assert deltaw.summary(model).adapters["half"].rounding == pytest.approx(expected, rel=1e-3)


def test_inspect_shows_a_stack_by_its_parameters_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = saved(tmp_path / "a", "Mixtral", targets={"gate_up": 3, "down": 2})
    assert main(["inspect", str(folder), "--json"]) == 0
    rows = {row["layer"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    for name, dW in dense(model).items():
        assert rows[name]["dW"] == pytest.approx(float(dW.norm()), rel=1e-5)
        assert rows[name]["rank"] == (3 if "gate_up" in name else 2)
        assert rows[name]["shape"] == " × ".join(["4", "×".join(str(n) for n in dW.shape[1:])])


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["all-linear", "gate_up,down"])
def test_ranks_of_a_mixture_are_tried_and_one_run_is_cut(tmp_path: Path, targets: str) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    config = transformers.MixtralConfig(**SIZES | {"vocab_size": len(tokenizer)}, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    training = TrainConfig(out=str(tmp_path / "s"), steps=5, batch=4, valid_most=4, lr=1e-2)
    options = SweepConfig(ranks="4,2", targets=targets, test_most=4)
    done = deltaw.sweep(str(tmp_path / "model"), tmp_path / "data.jsonl", training, options)
    assert [row["rank"] for row in done.results["rows"]] == [4, 2]
    assert bool(done.results["alike"]) == (targets == "all-linear")
    beside = deltaw.sweep(
        str(tmp_path / "model"), tmp_path / "data.jsonl", dataclasses.replace(training, out=str(tmp_path / "t")),
        dataclasses.replace(options, abreast=2),
    )  # fmt: skip
    for one, other in zip(done.results["rows"], beside.results["rows"], strict=True):
        assert one["valid_loss"] == pytest.approx(other["valid_loss"], rel=1e-3)
    run = next((tmp_path / "s" / "runs").glob("*-r4-*"))
    results = deltaw.choose_rank(run, RankConfig(most=4)).results
    assert [row["rank"] for row in results["ranks"]] == [1, 2, 4]
    assert "model.layers.0.mlp.experts.gate_up_proj" in {layer["layer"] for layer in results["layers"]}


def test_a_mixture_that_sorts_its_tokens_is_not_trained_abreast(tmp_path: Path) -> None:
    """JetMoE's experts see the tokens in the experts' order: rows of candidates could not be told apart."""
    tokenizer = tiny_tokenizer(CHATML)
    config = transformers.JetMoeConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8,
        vocab_size=len(tokenizer), num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.JetMoeForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    training = TrainConfig(out=str(tmp_path / "s"), steps=2, batch=4, valid_most=4, lr=1e-2)
    options = SweepConfig(ranks="4,2", test_most=4, abreast=2)
    with pytest.raises(AdapterError, match="2 candidates cannot share a pass over this model"):
        deltaw.sweep(str(tmp_path / "model"), tmp_path / "data.jsonl", training, options)
    assert not (tmp_path / "s" / "runs").exists()


@pytest.mark.parametrize("version", ["0.18.1", None], ids=str)
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "GPT-OSS"])
def test_files_of_peft_before_0_19(name: str, version: str | None, tmp_path: Path) -> None:
    """It took the matrices of every stack for [k, d], as GPT-OSS has them. (A file of ours, turned to that form.)"""
    folder, model = saved(tmp_path / "a", name, targets={"q": 2, "gate_up": 2, "down": 2})
    file = peft.read(folder)
    factors = {}
    for layer, (A, B) in file.factors.items():
        stack = layer.endswith(("experts", "base_layer")) and name != "GPT-OSS"
        matrices = unstacked(A, B, file.rank(layer))
        factors[layer] = in_file(matrices[1].mT.contiguous(), matrices[0].mT.contiguous()) if stack else (A, B)
    config = file.config.changed(peft_version=version, target_parameters=[*BOTH])
    peft.write(tmp_path / "old", dataclasses.replace(file, factors=factors, config=config, metadata={}))
    torch.testing.assert_close(in_ours(name, tmp_path / "old"), run(model).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_parameter_of_a_module_has_its_update_in_a_file(count: int) -> None:
    """PEFT wraps a module once for each of its parameters, so that three of them are not an attention's dead update."""
    layers = ["model.experts" + ".base_layer" * depth for depth in range(count)]
    tensors = {
        f"base_model.model.{layer}.lora_{letter}.weight": torch.ones(2, 3) for layer in layers for letter in "AB"
    }
    found = sort(tensors, biases=False)
    assert list(found.parts) == layers and not found.unused and not found.unknown
