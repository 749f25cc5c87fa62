"""All methods by one measure: attach, train some steps, save and load, merge or say why not, detach."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import deltaw
from deltaw import DoRA, LoRA
from deltaw.errors import FileError, MergeError, TargetError
from deltaw.files.formats.peft import tensors_of
from deltaw.methods.bitfit import BitFit
from deltaw.methods.bottleneck import Bottleneck
from deltaw.methods.full import Full
from deltaw.methods.ia3 import IA3
from deltaw.methods.plan import PRESETS
from deltaw.methods.prefix import Prefix
from deltaw.methods.registry import METHODS
from deltaw.model.summary import updates
from tests.architectures import DECODER, ENCODER, SEQ2SEQ
from tests.conftest import assert_same, bits, covering, snapshot, tiny_gpt2, tiny_llama

ROWS = 3


def built(model: str, config: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(hf, model)(getattr(hf, config)(**settings))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "neox": built("GPTNeoXForCausalLM", "GPTNeoXConfig", **DECODER),
    "bert": built("BertForSequenceClassification", "BertConfig", **ENCODER),
    "albert": built("AlbertForSequenceClassification", "AlbertConfig", **ENCODER),
    "roberta": built("RobertaForSequenceClassification", "RobertaConfig", **ENCODER),
    "bart": built("BartForConditionalGeneration", "BartConfig", **SEQ2SEQ),
    "t5": built(
        "T5ForConditionalGeneration", "T5Config", vocab_size=96, d_model=32, d_kv=8, d_ff=56, num_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0,
    ),
}  # fmt: skip
FORMS: dict[str, Any] = {
    "lora": LoRA(rank=2, alpha=3),
    "lora-norms": LoRA(rank=2, alpha=3, targets="qv", norms=True),
    "pissa": LoRA(rank=2, alpha=3, init="pissa"),
    "dora": DoRA(rank=2, alpha=3),
    "bitfit": BitFit(),
    "bitfit-add": BitFit(add=True),
    "houlsby": Bottleneck(size=4, norms=True),
    "pfeiffer": Bottleneck(size=4, kind="pfeiffer", activation="gelu"),
    "lin": Bottleneck(size=4, kind="lin", activation="silu"),
    "adapterdrop": Bottleneck(size=4, drop=1),
    "prefix": Prefix(length=4),
    "prompt": Prefix(length=3, where="embedding"),
    "ia3": IA3(),
    "ia3-norms": IA3(norms=True),
    "full": Full(),
    "full-difference": Full(kept="difference"),
}
tried = {type(method) for method in FORMS.values()}
FORMS |= {
    name: METHODS[kind](**preset.settings) for name, (kind, preset) in PRESETS.items() if METHODS[kind] not in tried
}  # a method that is new here is tried by its presets
CHANGES_FROM_THE_START = ("prefix", "prompt")


def refused(form: str, model: str) -> bool:
    return (form == "bitfit" and model in ("llama", "t5")) or (form in ("adapterdrop", "prefix") and model == "albert")


CASES = covering(list(FORMS), list(MODELS), cases=[(f, m) for f in FORMS for m in MODELS if not refused(f, m)])
DECODERS = ["llama", "gpt2", "neox"]


def build(name: str, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def inputs(model: Any) -> dict[str, Any]:
    ids = torch.randint(4, 96, (ROWS, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    plain = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    labels = torch.arange(ROWS) if "Classification" in type(plain).__name__ else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def read(folder: Path) -> tuple[Any, ...]:
    """All that is in an adapter's folder, comparable."""
    tensors, metadata = tensors_of(folder)
    plain = {key: (t.dtype, t.tolist()) for key, t in tensors.items()}
    return json.loads((folder / "adapter_config.json").read_text()), plain, metadata


@torch.no_grad()
def logits(model: Any, **others: Any) -> torch.Tensor:
    out: torch.Tensor = model(**inputs(model), **others).logits
    return out


def trained(model: Any, method: Any, steps: int = 3) -> Any:
    """The method attached and trained a little."""
    torch.manual_seed(5)
    deltaw.attach(model, method)
    optimizer = torch.optim.AdamW(deltaw.parameters(model), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(**inputs(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert losses[-1] < losses[0]
    return model


@pytest.mark.parametrize(("form", "name"), CASES)
def test_attached_it_changes_nothing_and_detached_neither(form: str, name: str) -> None:
    model = build(name)
    before, base = snapshot(model), logits(model)
    deltaw.attach(model, FORMS[form])
    if form == "pissa":  # A and B start at W0's own part, which is taken off again: zero to the rounding
        torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=1e-4)
    else:
        assert torch.equal(logits(model), base) != (form in CHANGES_FROM_THE_START)
    assert all(p.is_leaf and p.requires_grad for p in deltaw.parameters(model))
    with deltaw.using(model, None):
        assert torch.equal(logits(model), base)
    deltaw.detach(model)
    assert_same(model, before)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(("form", "name"), CASES)
def test_it_learns_comes_back_out_of_its_file_and_merges(form: str, name: str, tmp_path: Path) -> None:
    model, twin = build(name), build(name)
    before, base = bits(model), logits(model)
    trained(model, FORMS[form])
    branch = logits(model)
    assert not torch.equal(branch, base)
    assert all(torch.equal(v, before[n]) for n, v in bits(model).items())
    deltaw.save(model, tmp_path / "a")
    state = torch.get_rng_state()
    deltaw.load(twin, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(logits(twin), branch, atol=1e-6, rtol=1e-5)
    deltaw.save(twin, tmp_path / "b")
    if form != "pissa":  # which becomes LoRA of twice the rank
        one, other = (read(tmp_path / folder) for folder in "ab")
        assert one == other

    every = updates(model)
    no_place = form == "bitfit-add" and any(not u.replaced() for u in every.values())
    if no_place or not all(u.mergeable for u in every.values()):
        with pytest.raises(MergeError, match=r"no weight can hold|the base has no"):
            deltaw.merge(model)
    else:
        deltaw.merge(model, allow_unchanged=True)
        assert float((logits(model) - branch).abs().max()) < 1e-3 * float((branch - base).abs().max()) + 1e-5
        deltaw.unmerge(model)
    assert all(torch.equal(v, before[n]) for n, v in bits(model).items())
    assert torch.equal(logits(model), branch)


@pytest.mark.parametrize(
    ("form", "name"),
    covering(list(FORMS), DECODERS, cases=[(f, m) for f in FORMS for m in DECODERS if not refused(f, m)]),
)
def test_with_a_cache_it_is_what_it_is_without(form: str, name: str) -> None:
    model = trained(build(name), FORMS[form])
    ids = inputs(model)["input_ids"][:2, :6]
    left = torch.ones_like(ids)
    left[0, :2] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=left, **options)
    assert torch.equal(model.generate(ids, attention_mask=left, use_cache=False, **options), cached)
    beams = model.generate(ids, attention_mask=left, num_beams=3, **options)
    assert beams.shape == cached.shape


@pytest.mark.parametrize("form", FORMS)
def test_checkpointed_gradients_are_the_same(form: str) -> None:
    if refused(form, "llama"):
        pytest.skip("it has no biases")
    gradients = []
    for checkpointed in (False, True):
        model = build("llama").train()
        torch.manual_seed(5)
        deltaw.attach(model, FORMS[form])
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs(model)).loss.backward()
        gradients.append([p.grad for p in deltaw.parameters(model)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "bitfit"])
def test_on_a_bfloat16_base_it_trains_in_float32_and_comes_back(form: str, tmp_path: Path) -> None:
    model, twin = build("llama").bfloat16(), build("llama").bfloat16()
    trained(model, FORMS[form])
    assert all(p.dtype == torch.float32 for p in deltaw.parameters(model))
    deltaw.save(model, tmp_path / "a")
    deltaw.load(twin, tmp_path / "a")
    torch.testing.assert_close(logits(twin), logits(model), atol=0.05, rtol=0.05)


# --- each method by itself --------------------------------------------------------------------------------------


def test_models_that_a_method_does_not_fit_are_refused_with_the_reason() -> None:
    vit = hf.ViTForImageClassification(
        hf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=56)
    )
    with pytest.raises(TargetError, match="does not read tokens"):
        deltaw.attach(vit, Prefix())
    with pytest.raises(TargetError, match="no stack of blocks"):
        deltaw.attach(nn.Sequential(nn.Linear(4, 4)), Bottleneck(size=2))
    with pytest.raises(TargetError, match="none is left"):
        deltaw.attach(build("llama"), Bottleneck(size=2, drop=2))
    with pytest.raises(TargetError, match="both targets and inputs"):
        deltaw.attach(build("llama"), IA3(targets="down", inputs="down"))
    with pytest.raises(TargetError, match="no normalisation layer"):
        deltaw.attach(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=2, targets="0", norms=True))


@pytest.mark.parametrize("form", ["pfeiffer", "prefix", "full", "bitfit"])
def test_files_that_do_not_fit_are_refused_with_everything_wrong(form: str, tmp_path: Path) -> None:
    deltaw.save(trained(build("gpt2"), FORMS[form]), tmp_path / "a")
    small = tiny_gpt2(layers=1)
    before = snapshot(small)
    with pytest.raises(FileError, match=r"does not fit this model|other base weights"):
        deltaw.load(small, tmp_path / "a", check_base=False)
    assert_same(small, before)
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"settings": {"sise": 4}}))
    with pytest.raises(FileError, match="unknown key 'sise'"):
        deltaw.load(build("gpt2"), tmp_path / "a")
    path.write_text(json.dumps(config | {"deltaw_method": "bottlneck"}))
    with pytest.raises(FileError, match=r"no method 'bottlneck' \(did you mean 'bottleneck'"):
        deltaw.load(build("gpt2"), tmp_path / "a")


def test_a_file_of_another_base_is_refused(tmp_path: Path) -> None:
    deltaw.save(trained(build("gpt2"), Bottleneck(size=4)), tmp_path / "a")
    with pytest.raises(FileError, match="other base weights"):
        deltaw.load(build("gpt2", seed=9), tmp_path / "a")
