"""All methods by one measure: attach, train a step, save and load, merge or say why not, detach. And PEFT's files of those that
PEFT has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import deltaw
from deltaw import DoRA, LoRA
from deltaw.errors import FileError, MergeError, TargetError
from deltaw.files.formats import method_file
from deltaw.files.formats.method_file import as_difference, from_difference, problems_with
from deltaw.files.formats.peft import tensors_of
from deltaw.methods.bitfit import BitFit
from deltaw.methods.bottleneck import Bottleneck
from deltaw.methods.full import Full
from deltaw.methods.ia3 import IA3
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
CHANGES_FROM_THE_START = ("prefix", "prompt")
UNMERGEABLE = ("houlsby", "pfeiffer", "lin", "adapterdrop", "prefix", "prompt")


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

    no_place = form == "bitfit-add" and any(u.__class__.__name__ == "AddedBias" for u in updates(model).values())
    if form in UNMERGEABLE or no_place:
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
def test_in_bfloat16(form: str, tmp_path: Path) -> None:
    model, twin = build("llama").bfloat16(), build("llama").bfloat16()
    trained(model, FORMS[form])
    assert all(p.dtype == torch.float32 for p in deltaw.parameters(model))
    deltaw.save(model, tmp_path / "a")
    deltaw.load(twin, tmp_path / "a")
    torch.testing.assert_close(logits(twin), logits(model), atol=0.05, rtol=0.05)


# --- each method by itself --------------------------------------------------------------------------------------


def test_a_model_without_biases_says_so() -> None:
    with pytest.raises(TargetError, match=r"this LlamaForCausalLM has none .* BitFit\(add=True\)"):
        deltaw.attach(build("llama"), BitFit())


def test_bitfit_trains_every_bias_and_nothing_else() -> None:
    model = build("bert")
    deltaw.attach(model, BitFit())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias") and ".deltaw." not in n}
    assert {n.replace(".deltaw.default", "") for n in trainable} == biases


def test_where_bottleneck_adapters_are() -> None:
    found = {}
    for form in ("houlsby", "pfeiffer", "lin", "adapterdrop"):
        model = build("llama")
        method = FORMS[form]
        deltaw.attach(model, Bottleneck(**{**vars(method), "norms": False}))
        found[form] = sorted(updates(model))
    layer = "model.layers.{}.{}".format
    assert found["houlsby"] == [layer(i, n) for i in (0, 1) for n in ("mlp.down_proj", "self_attn.o_proj")]
    assert found["pfeiffer"] == [layer(i, "mlp.down_proj") for i in (0, 1)]
    assert found["lin"] == ["model.layers.0", "model.layers.1"]
    assert found["adapterdrop"] == [layer(1, n) for n in ("mlp.down_proj", "self_attn.o_proj")]


def test_the_papers_counts_of_parameters() -> None:
    """§5.1: adapters L̂·(2·d·r + r + d) and 2·d for each trained LayerNorm; prefix-embedding d·l, prefix-layer L·d·l."""
    d, m, L = 32, 4, 2
    counts = {}
    for form in ("pfeiffer", "lin", "prefix", "prompt"):
        model = build("llama")
        deltaw.attach(model, FORMS[form])
        counts[form] = deltaw.summary(model).adapters["default"].parameters
    assert counts["pfeiffer"] == L * (2 * d * m + m + d)
    assert counts["lin"] == L * (2 * d * m + m + d) + L * 2 * d
    assert counts["prompt"] == 3 * d and counts["prefix"] == L * d * 4


def test_a_prefix_is_what_its_embeddings_are_as_input() -> None:
    model = build("llama")
    torch.manual_seed(5)
    deltaw.attach(model, Prefix(length=3, where="embedding"))
    rows = updates(model)["model"].rows
    batch = inputs(model)
    own = logits(model)
    with deltaw.using(model, None), torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
        mask = torch.nn.functional.pad(batch["attention_mask"], (3, 0), value=1)
        whole = model(inputs_embeds=torch.cat([rows.expand(ROWS, -1, -1), embeds], 1), attention_mask=mask).logits
    torch.testing.assert_close(own, whole[:, 3:])


def test_models_that_a_method_does_not_fit_say_so() -> None:
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
def test_files_that_do_not_fit_say_everything(form: str, tmp_path: Path) -> None:
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


def test_another_base_is_refused(tmp_path: Path) -> None:
    deltaw.save(trained(build("gpt2"), Bottleneck(size=4)), tmp_path / "a")
    with pytest.raises(FileError, match="other base weights"):
        deltaw.load(build("gpt2", seed=9), tmp_path / "a")


def test_full_fine_tuning_kept_as_a_difference(tmp_path: Path) -> None:
    model = trained(build("bert"), Full(kept="difference", whole="classifier"))
    layer = "bert.encoder.layer.1.output.dense"
    W0, W = model.get_submodule(layer).weight.detach(), updates(model)[layer]._parameters["weight"]
    with torch.no_grad():
        W[0, 0] = 1e-12  # which no difference of this precision leads to
    expected = {n: p.clone() for n, p in own_parameters(model)}
    deltaw.save(model, tmp_path / "a")
    tensors, metadata = tensors_of(tmp_path / "a")
    assert torch.equal(tensors[f"base_model.model.{layer}.weight"], W.detach() - W0)
    assert 0 in tensors[f"base_model.model.{layer}.weight:where"]
    assert json.loads(metadata["deltaw_replaced"]) == ["classifier.bias", "classifier.weight"]
    twin = build("bert")
    with torch.no_grad():
        twin.classifier.weight.add_(1)  # another head: that one is the file's own
    deltaw.load(twin, tmp_path / "a")
    assert all(torch.equal(p, expected[n]) for n, p in own_parameters(twin))
    with pytest.raises(FileError, match="other base weights"):
        deltaw.load(build("bert", seed=9), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors[f"base_model.model.{layer}.weight:where"][0] = 10**6
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(FileError, match=f"{layer}.weight: the entries kept beside its difference"):
        deltaw.load(build("bert"), tmp_path / "a")


def own_parameters(model: Any) -> Any:
    return ((f"{n}.{own}", p) for n, u in updates(model).items() for own, p in u._parameters.items())


@given(st.lists(st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 2), min_size=1, max_size=6))
def test_a_difference_leads_back_to_the_same_bits(pairs: list[tuple[float, float]]) -> None:
    W, W0 = torch.tensor(pairs).T.contiguous()
    made = as_difference("W", W, W0)
    assert all(bool(torch.isfinite(t).all()) for t in made.values()) and not problems_with(made)
    assert torch.equal(from_difference("W", made, W0).view(torch.int32), W.view(torch.int32))


def test_every_method_has_a_name_and_a_form_here() -> None:
    assert {type(method) for method in FORMS.values()} == set(METHODS.values())


# --- PEFT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "bert", "bart"])
def test_real_peft_reads_our_ia3(name: str, tmp_path: Path) -> None:
    method = IA3(whole="classifier") if name == "bert" else IA3()
    model = trained(build(name), method)
    deltaw.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build(name), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_we_read_real_pefts_ia3(name: str, tmp_path: Path) -> None:
    targets = {
        "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]), "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
        "bert": (["key", "value", "output.dense"], ["output.dense"]),
    }[name]  # fmt: skip
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    config = peft.IA3Config(task_type=task, target_modules=targets[0], feedforward_modules=targets[1])
    theirs = peft.get_peft_model(build(name), config).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))) * 0.1)
    theirs.save_pretrained(tmp_path / "a")
    ours = build(name)
    deltaw.load(ours, tmp_path / "a")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-6, rtol=1e-5)
    deltaw.merge(ours, allow_unchanged=True)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_prompts_are_pefts_both_ways(name: str, tmp_path: Path) -> None:
    model = trained(build(name), FORMS["prompt"])
    deltaw.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build(name), str(tmp_path / "a")).eval()
    batch = inputs(theirs)
    del batch["labels"]
    with torch.no_grad():
        found = theirs(**batch).logits
    torch.testing.assert_close(found[:, 3:], logits(model), atol=1e-6, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "b")
    ours = build(name)
    deltaw.load(ours, tmp_path / "b")
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-6, rtol=1e-5)
    assert method_file.read(tmp_path / "b").metadata.keys() <= {"format"}
