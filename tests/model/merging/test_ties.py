"""Merges into weights that several layers share: refused, untied, or merged once where all layers get the same value."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import deltaw
from deltaw import LoRA, attach, detach, load, merge, parameters, save, unmerge
from deltaw.errors import MergeError
from deltaw.files.identity import base_fingerprint
from deltaw.model.merging.merge import preview, settle
from deltaw.model.summary import updates
from tests.conftest import assert_same, bits, fill, snapshot, tiny_gpt2, tiny_llama

METHOD = LoRA(rank=4, alpha=10)


def untied_models() -> dict[str, Any]:
    """Tied in each way that transformers has: by one pair, by four names, by a text model's config, by code that goes by it."""
    small = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 56,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 96,
        "dropout_rate": 0.0,
    }
    bart = {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "vocab_size": 96, "max_position_embeddings": 64, "dropout": 0.0,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.3,
    }  # fmt: skip
    text = {
        "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96,
        "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
              "patch_size": 8}  # fmt: skip
    llava = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision), text_config=hf.LlamaConfig(**text), image_token_index=95,
        tie_word_embeddings=True,
    )  # fmt: skip
    switch = {
        **small,
        "num_decoder_layers": 2,
        "num_experts": 2,
        "num_sparse_encoder_layers": 0,
        "num_sparse_decoder_layers": 0,
    }
    return {
        "llama": lambda: tiny_llama(),
        "gpt2": lambda: tiny_gpt2(),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**small, decoder_start_token_id=0)),
        "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**bart)),
        "llava": lambda: hf.LlavaForConditionalGeneration(llava),
        "switch": lambda: hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(**switch)),
    }


STAYS_TIED = ("t5", "switch")  # by the config's class, or by code that goes by the setting
EMBEDDINGS = {
    "llama": "model.embed_tokens", "gpt2": "transformer.wte", "t5": "encoder.embed_tokens", "bart": "model.decoder.embed_tokens",
    "llava": "model.language_model.embed_tokens", "switch": "decoder.embed_tokens",
}  # fmt: skip


def test_a_tied_head_can_be_adapted_but_not_merged_in_place(ids: torch.Tensor) -> None:
    model = tiny_llama(tied=True).eval()
    embedding = model.get_input_embeddings().weight.detach().clone()
    fill(attach(model, LoRA(rank=2, alpha=5, targets="lm_head,q")))
    with pytest.raises(MergeError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        merge(model)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    untied = tiny_llama(tied=False).eval()
    fill(attach(untied, LoRA(rank=2, alpha=5, targets="lm_head,q")))
    branch = untied(ids).logits
    merge(untied)
    torch.testing.assert_close(untied(ids).logits, branch, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["head", "embedding", "both", "whole"])
@pytest.mark.parametrize("kind", list(EMBEDDINGS))
@pytest.mark.filterwarnings("ignore")
def test_what_is_tied_is_untied_saved_and_tied_again(kind: str, what: str, ids: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = untied_models()[kind]().eval()
    before, config = snapshot(model), model.config.to_json_string()
    targets = {
        "head": ["lm_head"],
        "embedding": [EMBEDDINGS[kind]],
        "both": [EMBEDDINGS[kind], "lm_head"],
        "whole": ["lm_head"],
    }
    fill(
        attach(
            model,
            LoRA(rank=3, alpha=7, targets=targets[what], whole="shared" if what == "whole" and kind == "t5" else ""),
        )
    )
    given = ids.clamp(max=94)
    inputs = {"input_ids": given} | ({"decoder_input_ids": given} if model.config.is_encoder_decoder else {})
    expected = model(**inputs).logits.detach()
    with pytest.raises(MergeError, match=r"--untie"):
        merge(model)
    fingerprint = base_fingerprint(model)
    merge(model, untie=True)
    torch.testing.assert_close(model(**inputs).logits.detach(), expected, rtol=1e-4, atol=1e-4)
    assert base_fingerprint(model) == fingerprint
    save(model, tmp_path / "adapter")
    final = copy.deepcopy(model)
    settle(final)
    final.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(**inputs).logits.detach(), expected, rtol=1e-4, atol=1e-4)
    assert again.config.tie_word_embeddings is (kind in STAYS_TIED)
    unmerge(model)
    assert torch.equal(model(**inputs).logits.detach(), expected) and model.config.to_json_string() == config
    detach(model)
    assert_same(model, before)
    load(model, tmp_path / "adapter")
    assert torch.equal(model(**inputs).logits.detach(), expected)


def test_several_adapters_of_tied_layers_are_merged_and_taken_out(ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = tiny_llama().eval()
    for name, layer in (("a", "lm_head"), ("b", "model.embed_tokens"), ("c", "lm_head")):
        fill(attach(model, LoRA(rank=3, alpha=7, targets=[layer]), name=name), name)
    plain = bits(model)
    merge(model, weights={"a": 1.0, "b": 0.5, "c": -2.0}, untie=True)
    unmerge(model, "c")
    both = model(ids).logits.detach()
    unmerge(model)
    merge(model, weights={"a": 1.0, "b": 0.5}, untie=True)
    assert torch.equal(model(ids).logits, both)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert all(torch.equal(p, plain[n]) for n, p in bits(model).items())


def test_a_merge_that_fails_after_untying_ties_again() -> None:
    model = tiny_llama().eval()
    attach(model, LoRA(rank=3, alpha=7, targets=["lm_head"]))  # ΔW is zero
    before = snapshot(model)
    with pytest.raises(MergeError, match="unchanged"):
        merge(model, untie=True)
    assert_same(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_untie_leaves_ties_that_hold(ids: torch.Tensor) -> None:
    model = fill(attach(tiny_llama().eval(), LoRA(rank=3, alpha=7, targets="qv", whole="embed_tokens")))
    expected = model(ids).logits.detach()
    merge(model, untie=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    torch.testing.assert_close(model(ids).logits.detach(), expected, rtol=1e-4, atol=1e-4)


def tied_pair() -> tuple[Any, Any, Any]:
    """A tied model with one and the same ΔW on its embedding and its head, as PEFT's ensure_weight_tying makes them."""
    torch.manual_seed(2)
    model = tiny_llama().eval()
    fill(attach(model, LoRA(rank=2, alpha=5, targets=["model.embed_tokens", "lm_head"])))
    embedding, head = (updates(model)[name] for name in ("model.embed_tokens", "lm_head"))
    with torch.no_grad():
        head.A.copy_(embedding.B.t())
        head.B.copy_(embedding.A.t())
    return model, embedding, head


def test_one_update_of_tied_layers_is_merged_once(ids: torch.Tensor) -> None:
    model, _, _ = tied_pair()
    expected, before = model(ids).logits.detach(), bits(model)
    merge(model)
    torch.testing.assert_close(model(ids).logits.detach(), expected, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert all(torch.equal(bits(model)[name], value) for name, value in before.items())


@pytest.mark.parametrize("change", ["A", "B", "more", "less"])
def test_two_updates_of_tied_layers_that_differ_are_refused(change: str) -> None:
    model, _, head = tied_pair()
    if change in "AB":
        with torch.no_grad():
            getattr(head, change)[0, 0] += 1
    else:
        vars(head)["scale"] = head.scale * (2.0 if change == "more" else 0.5)
    with pytest.raises(MergeError, match="is tied to"):
        merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_layer_and_what_it_is_tied_to_are_named_in_their_order() -> None:
    model, _, head = tied_pair()
    assert list(preview(model).layers) == ["model.embed_tokens"]  # they are one
    with torch.no_grad():
        head.A[0, 0] += 1
    with pytest.raises(MergeError, match=r"model\.embed_tokens\.weight is tied to lm_head\.weight, which"):
        merge(model)


def whole_pair(**adapters: str) -> Any:
    """A tied model, and adapters of one value for all that they train whole."""
    model = tiny_llama().eval()
    for seed, (name, whole) in enumerate(adapters.items()):
        attach(model, LoRA(rank=2, targets="q", whole=whole), name=name)
        with torch.no_grad():
            value = torch.randn(96, 32, generator=torch.Generator().manual_seed(seed))
            for parameter in parameters(model, name):
                parameter.copy_(
                    value if parameter.shape == value.shape else value[: len(parameter), : parameter.shape[1]]
                )
    return model


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.5}, {"a": 0.5, "b": 2.0}], ids=str)
def test_one_value_of_tied_layers_is_merged_once(weights: dict[str, float]) -> None:
    model = whole_pair(a="embed_tokens,lm_head", b="embed_tokens,lm_head")
    before, W0 = bits(model), model.lm_head.weight.detach().clone()
    expected = W0 + sum(w * (parameters(model, n)[-1].detach() - W0) for n, w in weights.items())
    merge(model, weights=weights)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head.weight.detach(), expected)
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


@pytest.mark.parametrize("kind", ["values", "one of two", "number", "value and product"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_values_of_tied_layers_that_differ_are_refused(kind: str, weight: float) -> None:
    model, weights = whole_pair(a="lm_head", b="lm_head"), {"a": weight}
    if kind in ("values", "one of two"):
        head = updates(model, "a" if kind == "values" else "b")["lm_head"]
        head.weight = torch.nn.Parameter(head.weight.detach() + 0.1)
        weights |= {} if kind == "values" else {"b": weight}
    elif kind == "number":
        fill(attach(model, LoRA(rank=2, targets=["lm_head"]), name="c"), "c")
        weights["c"] = weight
    else:
        fill(attach(model, LoRA(rank=2, targets=["lm_head"], whole="embed_tokens"), name="c"), "c")
        weights = {"c": weight}
    before = bits(model)
    with pytest.raises(MergeError, match=r"embed_tokens\.weight is tied to lm_head\.weight"):
        merge(model, weights=weights)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


class Tied(torch.nn.Module):
    """Two layers that share a weight, each stored and read in its own way."""

    def __init__(self, one: str, other: str, d: int) -> None:
        super().__init__()
        made = {"linear": torch.nn.Linear(4, d, bias=False), "embedding": torch.nn.Embedding(d, 4)}
        self.one, self.other = copy.deepcopy(made[one]), copy.deepcopy(made[other])
        self.other.weight = self.one.weight


@pytest.mark.parametrize("d", [4, 6])
@pytest.mark.parametrize("kinds", [("linear", "linear"), ("linear", "embedding"), ("embedding", "linear")], ids=str)
def test_layers_of_any_kinds_that_share_a_weight_are_merged_once(kinds: tuple[str, str], d: int) -> None:
    torch.manual_seed(0)
    model = Tied(*kinds, d)
    fill(attach(model, LoRA(rank=2, alpha=5, targets=["one", "other"])))
    one, other = (updates(model)[name] for name in ("one", "other"))
    with torch.no_grad():
        turned = kinds[0] != kinds[1]
        other.A.copy_(one.B.t() if turned else one.A)
        other.B.copy_(one.A.t() if turned else one.B)
    W0, dW = model.one.weight.detach().clone(), deltaw.delta(model, "one")
    merge(model)
    torch.testing.assert_close(model.one.weight.detach(), W0 + (dW.t() if kinds[0] == "embedding" else dW))
    unmerge(model)
    assert torch.equal(model.one.weight, W0)
    with torch.no_grad():
        other.B[0, 0] += 1
    with pytest.raises(MergeError, match=r"one\.weight is tied to other\.weight"):
        merge(model)


@pytest.mark.parametrize(("of_one", "of_other"), [(2.0, 2.0), (2.0, 3.0), (3.0, 2.0), (2.0, None), (None, 2.0)])
def test_sums_of_tied_layers_are_one_where_all_their_terms_are(of_one: Any, of_other: Any) -> None:
    model = whole_pair(a="lm_head")
    model.lm_head.requires_grad_(False)
    for name, layer in (("b", "model.embed_tokens"), ("c", "lm_head")):
        fill(attach(model, LoRA(rank=2, alpha=5, targets=[layer]), name=name), name)
    embedding, head = updates(model, "b")["model.embed_tokens"], updates(model, "c")["lm_head"]
    with torch.no_grad():
        head.A.copy_(embedding.B.t())
        head.B.copy_(embedding.A.t())
    weights = {"a": 0.5} | {name: w for name, w in (("b", of_one), ("c", of_other)) if w is not None}
    before = bits(model)
    if of_one == of_other:
        merge(model, weights=weights)
        unmerge(model)
    else:
        with pytest.raises(MergeError, match=r"embed_tokens\.weight is tied to lm_head\.weight"):
            merge(model, weights=weights)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


def test_what_was_untied_stays_so_where_one_cannot_be_taken_out(ids: torch.Tensor) -> None:
    model = tiny_llama().eval()
    for seed, name in enumerate("ab"):
        fill(attach(model, LoRA(rank=3, alpha=7, targets=["lm_head"]), name=name), name, seed=seed)
    before = snapshot(model)
    merge(model, weights={"a": 1.0, "b": 0.5}, untie=True)
    merged = model(ids).logits.detach()
    B = updates(model, "b")["lm_head"].B
    good = B.detach().clone()
    with torch.no_grad():
        B[0, 0] = float("nan")
    with pytest.raises(MergeError, match="finite"):
        unmerge(model, "a")
    assert torch.equal(model(ids).logits, merged)
    with torch.no_grad():
        B.copy_(good)
    unmerge(model)
    assert_same(model, before)
