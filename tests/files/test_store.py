"""Save and load: what is written and read back, and refusals that leave everything as it was."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import deltaw
from deltaw import LoRA, attach, detach, load, save
from deltaw.errors import AdapterError, ConfigError, FileError
from deltaw.files.formats import peft as peft_files
from deltaw.files.formats.peft.config import SETTINGS as SETTINGS_READ
from deltaw.files.store import training_of
from deltaw.model.summary import updates
from tests.conftest import MAKERS, assert_same, fill, snapshot, tiny_gpt2, tiny_llama

METHODS = {
    "plain": LoRA(rank=4, alpha=10),
    "default alpha": LoRA(rank=3, alpha=None, scaling="alpha/sqrt(r)"),
    "ranks": LoRA(rank=4, alpha=6, targets={"attention": 4, "mlp": 2}),
    "one layer deep": LoRA(rank=4, alpha=0.5, targets="*.1.*", init="kaiming", dropout=0.1),
    "stabilised": LoRA(rank=4, alpha=10, scaling="alpha/sqrt(r)", targets="mlp"),
}


def twin(model: Any) -> Any:
    return copy.deepcopy(model)


@pytest.mark.parametrize("method", list(METHODS))
def test_real_peft_reads_what_we_write(tiny: Any, ids: torch.Tensor, tmp_path: Path, method: str) -> None:
    plain = twin(tiny)
    fill(attach(tiny, METHODS[method]))
    expected = tiny(ids).logits
    save(tiny, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert sum("lora_A" in n for n, _ in theirs.named_parameters()) == deltaw.summary(tiny).adapters["default"].layers


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"},
    "rslora": {"r": 4, "lora_alpha": 10, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4, "lora_alpha": 10, "target_modules": "all-linear",
        "rank_pattern": {"c_fc": 2, "up_proj": 2}, "alpha_pattern": {"c_fc": 7, "q_proj": 3},
    },
    "layers": {"r": 2, "lora_alpha": 5, "target_modules": ["c_attn", "c_fc", "q_proj", "up_proj"], "layers_to_transform": [1]},
    "gaussian": {"r": 2, "lora_alpha": 5, "target_modules": ["c_attn", "q_proj", "v_proj"], "init_lora_weights": "gaussian"},
}  # fmt: skip


@pytest.mark.parametrize("config", list(PEFT_CONFIGS))
def test_we_read_what_real_peft_writes(tiny: Any, ids: torch.Tensor, tmp_path: Path, config: str) -> None:
    plain = twin(tiny)
    theirs = peft.get_peft_model(tiny, peft.LoraConfig(task_type="CAUSAL_LM", **PEFT_CONFIGS[config])).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    assert load(plain, tmp_path / "theirs") == "default"
    torch.testing.assert_close(plain(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_exact(tiny: Any, ids: torch.Tensor, tmp_path: Path, dtype: torch.dtype) -> None:
    tiny.to(dtype)
    plain = twin(tiny)
    fill(attach(tiny, METHODS["plain"], name="mine"))
    save(tiny, tmp_path / "a", name="mine", training={"template": "chat"})
    assert load(plain, tmp_path / "a", name="again") == "again"
    assert torch.equal(plain(ids).logits, tiny(ids).logits)
    save(plain, tmp_path / "b", name="again")
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert training_of(tmp_path / "b") == {"template": "chat"}


def test_size_is_the_updates(tmp_path: Path) -> None:
    model = fill(attach(tiny_llama(), METHODS["plain"]))
    save(model, tmp_path / "a")
    parameters = deltaw.summary(model).adapters["default"].bytes
    assert parameters < (tmp_path / "a" / "adapter_model.safetensors").stat().st_size < parameters + 8000


def test_save_while_merged_writes_A_and_B(tiny: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    plain = twin(tiny)
    fill(attach(tiny, METHODS["plain"]))
    branch = tiny(ids).logits
    deltaw.merge(tiny)
    save(tiny, tmp_path / "a")
    load(plain, tmp_path / "a")
    assert torch.equal(plain(ids).logits, branch)


def test_names_of_loaded_adapters(tiny: Any, tmp_path: Path) -> None:
    fill(attach(tiny, METHODS["plain"]))
    save(tiny, tmp_path / "summaries.v2")
    assert load(tiny, tmp_path / "summaries.v2", activate=False) == "summaries_v2"
    assert deltaw.adapters(tiny) == ("default", "summaries_v2") and deltaw.adapters(tiny).active == "default"
    with pytest.raises(AdapterError, match="attached already"):
        load(tiny, tmp_path / "summaries.v2", name="default")


def damaged(folder: Path, change: str) -> None:
    """Break a good adapter folder in one of many ways."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, values = load_file(weights), json.loads(config.read_text())
    first = next(iter(tensors))
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "garbage":
        weights.write_bytes(b"not a safetensors file at all")
    elif change == "empty config":
        config.write_text("")
    elif change == "no weights":
        weights.unlink()
    elif change == "foreign keys":
        save_file({f"x.{k}": v for k, v in tensors.items()}, weights)
    elif change == "no keys":
        save_file({"something": torch.zeros(2)}, weights)
    elif change == "missing B":
        save_file({k: v for k, v in tensors.items() if k != first.replace("lora_A", "lora_B")}, weights)
    elif change == "shape":
        save_file(tensors | {first: torch.zeros(4, 3)}, weights)
    elif change == "not finite":
        save_file(tensors | {first: tensors[first] * float("nan")}, weights)
    elif change == "integers":
        save_file(tensors | {first: tensors[first].to(torch.int32)}, weights)
    elif change == "rank zero":
        B = first.replace("lora_A", "lora_B")
        save_file(tensors | {first: tensors[first][:0], B: tensors[B][:, :0].contiguous()}, weights)
    elif change == "training":
        save_file(tensors, weights, metadata={"deltaw_training": "{"})
    elif change == "rank":
        config.write_text(json.dumps(values | {"r": 16}))
    elif change == "no alpha":
        config.write_text(json.dumps({k: v for k, v in values.items() if k != "lora_alpha"}))
    elif change in SETTINGS:
        config.write_text(json.dumps(values | SETTINGS[change]))


SETTINGS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True}, "other method": {"peft_type": "LOHA"}, "changed base": {"init_lora_weights": "pissa_niter_4"},
    "alpha as text": {"lora_alpha": "16"}, "no rank": {"r": None}, "patterns as a list": {"alpha_pattern": ["q_proj"]},
    "pattern's value": {"alpha_pattern": {"q_proj": "8"}}, "broken pattern": {"rank_pattern": {"(q_proj": 4}},
    "not a number": {"lora_alpha": float("nan")}, "alpha zero": {"lora_alpha": 0}, "dropout as text": {"lora_dropout": "none"},
    "rslora as text": {"use_rslora": "yes"}, "alpha beyond floats": {"lora_alpha": 10**400}, "half a rank": {"r": 4.5},
}  # fmt: skip
CHANGES = {
    "truncated": "no sound safetensors file", "garbage": "no sound safetensors file", "empty config": "cannot be read as JSON",
    "no weights": "adapter_model.safetensors missing", "foreign keys": "the model has no layer",
    "no keys": "unexpected key 'something'",
    "missing B": "B is missing", "shape": "the update is", "not finite": "not finite", "integers": "floating point",
    "rank": "rank 4 in adapter_model.safetensors, 16 in", "no alpha": "lora_alpha is missing", "dora": "no magnitude in adapter_model.safetensors",
    "other method": "peft_type is 'LOHA'", "changed base": "init_lora_weights is 'pissa_niter_4'",
    "alpha as text": "lora_alpha is '16'; it must be a number", "no rank": "r is None",
    "patterns as a list": "alpha_pattern is \\['q_proj'\\]; it must map", "pattern's value": "alpha_pattern\\['q_proj'\\] is '8'",
    "broken pattern": "'\\(q_proj', which is no regular expression", "not a number": "lora_alpha is nan",
    "alpha beyond floats": "lora_alpha is 10+; it must be a number above 0", "half a rank": "r is 4.5; it must be a whole number above 0",
    "alpha zero": "lora_alpha is 0; it must be a number above 0", "dropout as text": "lora_dropout is 'none'",
    "rslora as text": "use_rslora is 'yes'", "rank zero": "they must be \\[r, k\\]", "training": "training settings",
}  # fmt: skip


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_refused_file_leaves_the_model_as_it_was(tiny: Any, ids: torch.Tensor, tmp_path: Path, change: str) -> None:
    plain = twin(tiny)
    fill(attach(tiny, METHODS["plain"]))
    save(tiny, tmp_path / "a")
    damaged(tmp_path / "a", change)
    before = snapshot(plain)
    with pytest.raises(FileError, match=CHANGES[change]):
        load(plain, tmp_path / "a", check_base=False)
    assert_same(plain, before)
    with pytest.raises(FileError, match=CHANGES[change]):
        load(tiny, tmp_path / "a", name="second", check_base=False)
    assert deltaw.adapters(tiny) == ("default",)


def test_every_problem_of_a_file_is_listed(tmp_path: Path) -> None:
    fill(attach(model := tiny_llama(), METHODS["plain"]))
    save(model, tmp_path / "a")
    with pytest.raises(FileError) as caught:
        load(tiny_gpt2(), tmp_path / "a", check_base=False)
    assert str(caught.value).count("\n  - ") == 14


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from([*SETTINGS_READ, "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
       "target_modules", "base_model_name_or_path"]), value=json_values)  # fmt: skip
def test_any_setting_loads_or_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    folder, model = tmp_path / "a", tiny_llama(layers=1)
    if not folder.is_dir():
        save(fill(attach(twin(model), METHODS["plain"])), folder)
        (tmp_path / "good").write_text((folder / "adapter_config.json").read_text())
    good = json.loads((tmp_path / "good").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(good | {key: value}))
    before = snapshot(model)
    try:
        load(model, folder, check_base=False)
    except FileError:
        assert_same(model, before)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_inside_a_wrapper_names_are_the_bases_own(wrap: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    model = tiny_llama().eval()
    plain, wrapped = twin(model), wrap(model)
    before = snapshot(model)
    assert fill(attach(wrapped, METHODS["plain"])) is wrapped
    save(wrapped, tmp_path / "a")
    load(plain, tmp_path / "a")
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert load(wrapped, tmp_path / "a", name="again") == "again"
    assert deltaw.summary(wrapped).adapters == deltaw.summary(model).adapters
    detach(wrapped)
    assert_same(model, before)


@pytest.mark.parametrize(("kind", "method"), [
    ("gpt2", LoRA(rank=12, alpha=7, scaling="alpha/sqrt(r)", targets="qv")),
    ("llama", LoRA(rank=6, alpha=7, scaling="alpha/sqrt(r)", init="pissa")),
    ("llama", LoRA(rank=7, alpha=16.000000001, targets="qv")),
], ids=["slices", "pissa", "not quite whole"])  # fmt: skip
def test_a_scale_that_no_alpha_gives_is_saved_and_read_as_it_is(
    kind: str, method: LoRA, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = MAKERS[kind]().eval()
    plain, real = twin(model), twin(model)
    fill(attach(model, method))
    save(model, tmp_path / "a")
    load(plain, tmp_path / "a")
    scales = {name: update.scale for name, update in updates(model).items()}
    assert {name: update.scale for name, update in updates(plain).items()} == scales
    real = peft.PeftModel.from_pretrained(real, tmp_path / "a").eval()
    torch.testing.assert_close(real(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [5e-324, 1e31, 10**400], ids=["none", "too much", "far too much"])
def test_an_alpha_that_no_update_could_be_scaled_by_is_refused_before_training(alpha: float) -> None:
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="alpha is"):
        attach(model, LoRA(rank=8, alpha=alpha))
    assert_same(model, before)


def test_what_must_not_be_saved_is_not_and_the_old_file_stays(tiny: Any, tmp_path: Path) -> None:
    fill(attach(tiny, METHODS["plain"]))
    save(tiny, tmp_path / "a")
    old = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    A = next(iter(deltaw.parameters(tiny)))
    for value, message in ((float("nan"), "not finite"), (0.0, "all zero")):
        with torch.no_grad():
            A.fill_(value)
        with pytest.raises(FileError, match=message):
            save(tiny, tmp_path / "a")
        assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_resized_vocabulary_round_trip(tmp_path: Path, ids: torch.Tensor) -> None:
    model = tiny_llama()
    model.resize_token_embeddings(101)
    plain = twin(model)
    fill(attach(model, METHODS["plain"]))
    save(model, tmp_path / "a")
    load(plain, tmp_path / "a")
    assert torch.equal(plain(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_on_the_real_smollm2_both_ways(smollm2: Path, tmp_path: Path) -> None:
    from deltaw.model.pretrained import load_pretrained

    loaded = load_pretrained(str(smollm2))
    model = loaded.model
    ids = loaded.tokenizer("The update is a product of two thin matrices.", return_tensors="pt").input_ids
    base = model(ids).logits.detach()
    fill(attach(model, LoRA(rank=8, alpha=20)), size=0.02)
    ours = model(ids).logits.detach()
    save(model, tmp_path / "ours")
    detach(model)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    assert float((theirs(ids).logits - ours).abs().max()) <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    model = theirs.unload()
    assert torch.equal(model(ids).logits, base)
    load(model, tmp_path / "theirs")
    assert float((model(ids).logits - ours).detach().abs().max()) <= 1e-5
    assert float((ours - base).abs().max()) > 0.1


def test_less_precision_says_what_it_costs(tiny: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    deltaw.save(fill(deltaw.attach(tiny, METHODS["plain"])), tmp_path / "a")
    deltaw.load(tiny, tmp_path / "a", name="half", activate=False, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in deltaw.parameters(tiny, "half"))
    error = total = 0.0
    for layer in updates(tiny, "half"):
        whole, stored = deltaw.delta(tiny, layer, "default").double(), deltaw.delta(tiny, layer, "half").double()
        error, total = error + float((whole - stored).square().sum()), total + float(whole.square().sum())
    sizes = deltaw.summary(tiny).adapters
    assert (
        sizes["half"].rounding == pytest.approx((error / total) ** 0.5, rel=1e-2)
        and 1e-4 < sizes["half"].rounding < 1e-2
    )
    assert sizes["default"].rounding == 0.0 and 2 * sizes["half"].bytes == sizes["default"].bytes
    with torch.no_grad(), deltaw.using(tiny, "default"):
        expected = tiny(ids).logits
    tolerance = 0.05 * float(expected.abs().max())
    with torch.no_grad():
        for names in (["half"] * 3, ["half", "default", "half"]):
            with deltaw.route(tiny, names):
                torch.testing.assert_close(tiny(ids).logits, expected, atol=tolerance, rtol=0)


def test_what_is_refused_by_its_files_is_that_by_the_model_too(tiny: Any, tmp_path: Path) -> None:
    """The fingerprint of the layers' own weights, which a merge on disk goes by."""
    deltaw.save(fill(deltaw.attach(tiny, METHODS["plain"])), tmp_path / "a")
    first = peft_files.read(tmp_path / "a").metadata
    with torch.no_grad():
        next(p for n, p in tiny.named_parameters() if "norm" in n or "ln" in n).add_(1.0)  # no layer of the adapter's
    deltaw.save(tiny, tmp_path / "b")
    second = peft_files.read(tmp_path / "b").metadata
    assert first[peft_files.W0] == second[peft_files.W0] and first[peft_files.BASE] != second[peft_files.BASE]
    with torch.no_grad():
        layer = next(iter(updates(tiny)))
        tiny.get_submodule(layer).weight[0, 0] += 1.0
    deltaw.save(tiny, tmp_path / "c")
    assert peft_files.read(tmp_path / "c").metadata[peft_files.W0] != first[peft_files.W0]


class TwoNames(nn.Module):
    """One module under two names, both of which its code calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.last = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return out


class OneCalled(nn.Module):
    """One module under two names, of which its code calls the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.alias = self.first
        self.last = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(torch.tanh(self.first(x)))
        return out


def by_peft(model: nn.Module, folder: Path) -> nn.Module:
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["first", "last"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(folder)
    return theirs


def test_a_foreign_file_that_means_one_of_two_names_is_refused(tmp_path: Path) -> None:
    model, x = TwoNames(), torch.randn(3, 6)
    theirs = by_peft(model, tmp_path / "a")
    before = snapshot(model)
    with pytest.raises(FileError, match=r"'first' is one module under the names first, second.*Make 'second' a module"):
        load(model, tmp_path / "a")
    assert_same(model, before)
    model.second = copy.deepcopy(model.first)  # what the message says to do
    model.second.weight = model.first.weight
    load(model, tmp_path / "a")
    torch.testing.assert_close(model(x), theirs(x))


def test_a_file_of_ours_means_all_calls_and_peft_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, x = TwoNames(), torch.randn(3, 6)
    other = copy.deepcopy(model)
    fill(attach(model, LoRA(rank=2, alpha=5)))
    save(model, tmp_path / "a")
    assert any("first is one module (first, second)" in r.getMessage() for r in caplog.records)
    load(other, tmp_path / "a")
    assert torch.equal(other(x), model(x))


def test_a_second_name_that_no_code_calls_does_not_matter(tmp_path: Path) -> None:
    model, x = OneCalled(), torch.randn(3, 6)
    theirs = by_peft(model, tmp_path / "a")
    load(model, tmp_path / "a")
    torch.testing.assert_close(model(x), theirs(x))


def test_an_adapter_that_changes_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = attach(tiny_llama(), LoRA(rank=2))
    assert deltaw.summary(model).adapters["default"].zero == 14
    save(model, tmp_path / "fresh")
    save(fill(model), tmp_path / "filled")
    other = tiny_llama()
    load(other, tmp_path / "fresh", name="fresh", check_base=False)
    assert any("changes nothing: B is zero in all of its 14 layers" in r.getMessage() for r in caplog.records)
    assert deltaw.summary(other).adapters["fresh"].zero == 14
    caplog.clear()
    load(other, tmp_path / "filled", name="filled", check_base=False)
    assert not any("changes nothing" in r.getMessage() for r in caplog.records)
    assert deltaw.summary(other).adapters["filled"].zero == 0
    assert deltaw.summary(other).adapters["filled"].layers == 14


def test_updates_of_modules_that_no_forward_calls_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 96}
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q", "shared"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    load(model, tmp_path / "a")
    assert any("no forward calls their modules: shared" in r.getMessage() for r in caplog.records)
    ids = torch.randint(3, 96, (2, 7))
    torch.testing.assert_close(
        model(input_ids=ids, decoder_input_ids=ids).logits, theirs(input_ids=ids, decoder_input_ids=ids).logits
    )
