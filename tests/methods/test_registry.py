"""A method is known everywhere by what it declares; comparisons read their contestants by it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

import deltaw
from deltaw.cli.main import parse
from deltaw.config import CompareConfig, TrainConfig, from_mapping, keys, to_mapping
from deltaw.errors import AdapterError, ConfigError, MergeError
from deltaw.layers.ops.merging import Change, Value
from deltaw.layers.unwrap import own_forward
from deltaw.methods.bottleneck import Bottleneck
from deltaw.methods.lora import LoRA
from deltaw.methods.plan import METHODS, PRESETS, Method, Plan, Preset, register
from deltaw.methods.registry import (
    DEFAULT,
    QUICK,
    at_width,
    contestants,
    described,
    method_class,
    name_of,
    rates,
    usual_lr,
)
from deltaw.methods.shared import Beside
from deltaw.methods.updates.base import Update
from tests.conftest import bits, byte_llama, tiny_llama
from tests.data.conftest import CHATML, tiny_tokenizer

# --- a method that this file alone knows ------------------------------------------------------------------------


class DenseDifference(Update):
    """ΔW = strength·D, with a trained D [d, k]."""

    def __init__(self, D: Tensor, strength: float) -> None:
        super().__init__()
        self.D, self.strength = nn.Parameter(D), strength

    def branch(self, layer: nn.Module, *inputs: Tensor, **named: Tensor) -> Tensor:
        out: Tensor = own_forward(layer)(layer, *inputs, **named)
        return out + F.linear(inputs[0], self.strength * self.D)

    def changes(self, layer: Any) -> dict[str, Change]:
        return {"weight": Value(layer.weight + self.strength * self.D.detach())}

    def misfit(self, layer: Any) -> str | None:
        return None if layer.weight.shape == self.D.shape else "D is of another shape"

    def moved(self, layer: Any) -> tuple[float, float]:
        return float((self.strength * self.D).square().sum()), float(layer.weight.square().sum())


class Unmergeable(DenseDifference):
    unmergeable = "it is said to have no place in a weight"


@dataclass(frozen=True)
class Toy(Beside):
    """A dense difference on every down projection."""

    strength: float = 2.0
    """Factor of D."""
    refuses: bool = False
    """Say that no merge can hold it."""

    def plan(self, model: nn.Module) -> Plan:
        from deltaw.methods.targets import select

        cls = Unmergeable if self.refuses else DenseDifference
        layers: dict[str, Any] = dict(select(model, "down", 1).layers)
        return self.planned(model, {n: cls(torch.zeros_like(m.weight), self.strength) for n, m in layers.items()})


@pytest.fixture
def toy() -> Iterator[type[Toy]]:
    yield register("toy", lr=3e-2, presets={"toy-strong": Preset(lr=1e-2, settings={"strength": 5.0})})(Toy)
    del METHODS["toy"], PRESETS["toy"], PRESETS["toy-strong"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = tiny_tokenizer(CHATML)
    byte_llama(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    records = [{"prompt": f"{n} and one?", "completion": f" {n + 1}"} for n in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.mark.parametrize("refuses", [False, True])
def test_a_new_method_attaches_trains_saves_loads_and_merges_or_refuses(
    refuses: bool, toy: type[Toy], place: Path, tmp_path: Path
) -> None:
    config = TrainConfig(out=str(tmp_path / "run"), steps=4, lr=3e-2, samples=0, valid_share=0.0, dtype="float32")
    result = deltaw.train(str(place / "model"), place / "data.jsonl", config, method=Toy(refuses=refuses))
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["method"] == "toy" and settings["refuses"] is refuses
    assert result.state.last_loss < result.state.first_loss

    model = byte_llama(tiny_tokenizer(CHATML))
    before, ids = bits(model), torch.arange(3, 15)[None]
    base = model(ids).logits
    deltaw.load(model, result.adapter)
    branch = model(ids).logits
    assert not torch.equal(branch, base)
    deltaw.save(model, tmp_path / "again")
    first, again = (load_file(path / "adapter_model.safetensors") for path in (result.adapter, tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in first.items())
    if refuses:
        with pytest.raises(MergeError, match="no place in a weight"):
            deltaw.merge(model)
        with pytest.raises(AdapterError, match="no place in a weight"):
            deltaw.combine(model, {"default": 0.5}, name="half")
    else:
        deltaw.merge(model)
        torch.testing.assert_close(model(ids).logits, branch, atol=1e-5, rtol=1e-4)
        deltaw.unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())


def test_a_new_method_is_known_to_the_command_line_yaml_and_comparisons(toy: type[Toy], tmp_path: Path) -> None:
    command = parse(["train", "MODEL", "DATA", "--method", "toy", "--strength", "4", "--norms"])
    assert command.method == "toy" and command.settings == Toy(strength=4.0, norms=True)
    (tmp_path / "config.yaml").write_text("model: m\ndata: d\nmethod: toy\nstrength: 4\nlr: 0.5\n")
    command = parse(["train", "--config", str(tmp_path / "config.yaml"), "--refuses"])
    assert command.settings == Toy(strength=4.0, refuses=True) and command.run.lr == 0.5
    with pytest.raises(ConfigError, match=r"unknown flag --strength \(a setting of --method toy\)"):
        parse(["train", "MODEL", "DATA", "--strength", "4"])
    plain, strong, own = contestants("toy,toy-strong(lr=0.5),toy(refuses=true)")
    assert (plain.kind, plain.method, plain.lr) == ("toy", Toy(), 3e-2)
    assert (strong.kind, strong.method, strong.lr) == ("toy", Toy(strength=5.0), 0.5)
    assert own.method == Toy(refuses=True) and described(own.method) == {"refuses": True}
    assert method_class("toy") is Toy and name_of(Toy()) == "toy"


def test_methods_and_their_settings_are_known_without_torch() -> None:
    code = (
        "import sys, deltaw\n"
        "from deltaw.methods.registry import DEFAULT, contestants\n"
        "contestants(DEFAULT), deltaw.LoRA(rank=4), deltaw.Full()\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_taken_is_refused() -> None:
    before = dict(METHODS), dict(PRESETS)
    for presets in ({}, {"houlsby": Preset(1e-3)}):
        with pytest.raises(ValueError, match="another method's"):
            register("other" if presets else "lora", lr=1e-3, presets=presets)(Toy)
    assert before == (METHODS, PRESETS)


def test_a_method_without_a_name_works_but_has_no_file(tmp_path: Path) -> None:
    model = deltaw.attach(tiny_llama(), Toy())
    assert name_of(Toy()) is None
    with pytest.raises(AdapterError, match="Toy has no file format: it is none of deltaw's methods"):
        deltaw.save(model, tmp_path / "a")


# --- what every method declares ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_settings_come_back_and_its_flags_are_no_other_setting_of_a_run(name: str) -> None:
    cls = method_class(name)
    method: Any = cls()
    assert isinstance(method, Method) and name_of(method) == name and described(method) == {}
    assert from_mapping(cls, to_mapping(method)) == method
    assert not {*keys(cls)} & {*keys(TrainConfig)}
    assert all(f.default is not None or f.name == "alpha" for f in fields(method))


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_settings_are_its_methods(name: str) -> None:
    (contestant,) = contestants(name)
    kind, preset = PRESETS[name]
    assert contestant.kind == kind and contestant.lr == preset.lr and 0 < preset.lr < 1
    assert preset.settings.keys() <= {f.name for f in fields(METHODS[kind])}


def test_the_usual_comparisons_are_of_names_that_there_are() -> None:
    assert {c.name for c in contestants(DEFAULT)} <= PRESETS.keys() and len(contestants(DEFAULT)) == 9
    assert {c.name for c in contestants(QUICK)} <= {c.name for c in contestants(DEFAULT)}
    assert CompareConfig().methods == ""


# --- contestants as text ----------------------------------------------------------------------------------------


def test_contestants_are_read_as_they_are_written() -> None:
    plain, ranked, lin = contestants("lora, lora(rank=64), bottleneck(size=16;kind=lin,lr=2e-3)")
    assert [c.name for c in (plain, ranked, lin)] == ["lora", "lora(rank=64)", "bottleneck(size=16;kind=lin,lr=2e-3)"]
    assert ranked.method == LoRA(rank=64) and lin.method == Bottleneck(size=16, kind="lin")
    assert lin.lr == 2e-3 and lin.kind == "bottleneck"


def test_everything_wrong_with_contestants_is_in_one_error() -> None:
    with pytest.raises(ConfigError) as error:
        contestants("lorra,lora(rnk=3),lora(rank=0),bitfit,bitfit,lora(rank),ia3(lr=abc),ia3(lr=0),7,lora(rank=4,dora")
    problems = error.value.problems
    assert len(problems) == 9
    for part in (
        "no method 'lorra' (did you mean 'lora", "unknown setting 'rnk' (did you mean 'rank'", "rank is 0", "'bitfit' is there twice",
        "'rank' is no setting", "lr is 'abc'; it must be a number above 0", "lr is 0; it must", "'7' is no method",
        "'lora(rank=4,dora' is no method",
    ):  # fmt: skip
        assert any(part in problem for problem in problems), part


@pytest.mark.parametrize("text", ["", " , ", ","])
def test_no_contestant_at_all_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="there is none"):
        contestants(text)


def test_rates_are_a_factor_of_three_apart_around_the_usual_one() -> None:
    assert rates(1e-3, 1) == [1e-3]
    assert rates(1e-3, 3) == pytest.approx([1e-3 / 3, 1e-3, 3e-3])
    assert rates(1e-3, 4) == pytest.approx([1e-3 / 3, 1e-3, 3e-3, 9e-3])


def test_the_usual_rate_follows_the_settings_and_the_width() -> None:
    assert usual_lr(LoRA(), None) == usual_lr(LoRA(), 384) == usual_lr(LoRA(rank=64), 576) == 1.5e-3
    assert usual_lr(LoRA(targets="q,v"), 576) == usual_lr(LoRA(targets="qv"), 576) == 3e-3
    assert usual_lr(LoRA(), 4096) == 3.2e-4  # what 7B models are usually trained with
    assert usual_lr(Bottleneck(kind="lin", size=64), 768) == at_width(2e-3, 768) < 2e-3
    (lora,) = contestants("lora", 4096)
    (asked,) = contestants("lora(lr=0.01)", 4096)
    assert (lora.lr, asked.lr) == (3.2e-4, 0.01)
