"""Merge and unmerge: the design's invariants 3 and 4 over layer kinds and dtypes. No scale is 1."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import deltaw
from deltaw import Bottleneck, LoRA, attach, detach, load, merge, parameters, save, unmerge, use
from deltaw.errors import MergeError
from deltaw.files.identity import base_fingerprint
from deltaw.layers.ops import merging
from deltaw.layers.ops.undo import Copy, Correction
from deltaw.model.ends import teach
from deltaw.model.merging.kept import base_parameters
from deltaw.model.merging.merge import preview, settle
from deltaw.model.record import record_of
from deltaw.model.summary import updates
from tests.conftest import assert_same, bits, fill, snapshot, tiny_gpt2, tiny_llama
from tests.layers.test_quantised import packed

METHOD = LoRA(rank=4, alpha=10)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_3_branch_is_merged_and_4_unmerge_is_exact(tiny: Any, ids: torch.Tensor, dtype: torch.dtype) -> None:
    tiny.to(dtype)
    before, base = bits(tiny), tiny(ids).logits
    fill(attach(tiny, METHOD))
    branch = tiny(ids).logits
    report = merge(tiny)
    merged = tiny(ids).logits
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(merged, branch, rtol=tolerance, atol=tolerance)
    assert (branch - base).abs().max().item() > 10 * (merged - branch).abs().max().item()
    assert set(report.layers) == set(updates(tiny, "default"))
    assert 0 < report.relative < 100 and 0.9 < report.survived < 1.1 and report.largest_change > 0
    unmerge(tiny)
    assert all(torch.equal(bits(tiny)[n], v) for n, v in before.items())
    assert torch.equal(tiny(ids).logits, branch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_4_unmerge_is_exact_after_many_merges_and_switches(tiny: Any, dtype: torch.dtype) -> None:
    tiny.to(dtype)
    before = bits(tiny)
    fill(attach(tiny, METHOD, name="a"), seed=1)
    fill(attach(tiny, LoRA(rank=2, alpha=7, targets="mlp"), name="b"), seed=2)
    for chosen in ({"name": "a"}, {"name": "b"}, {"weights": {"a": 0.3, "b": -1.7}}, {}, {"weights": {"b": 2.0}}):
        merge(tiny, **chosen)
        unmerge(tiny)
        use(tiny, "a")
        assert all(torch.equal(bits(tiny)[n], v) for n, v in before.items())


def test_weighted_merge_is_the_sum_of_the_deltas(tiny: Any) -> None:
    fill(attach(tiny, METHOD, name="a"), seed=1)
    fill(attach(tiny, LoRA(rank=2, alpha=7), name="b"), seed=2)
    layer = next(iter(updates(tiny, "a")))
    update = updates(tiny, "a")[layer]
    W0 = update.W0(tiny.get_submodule(layer)).clone()
    expected = W0 + 0.3 * deltaw.delta(tiny, layer, "a") - 1.7 * deltaw.delta(tiny, layer, "b")
    merge(tiny, weights={"a": 0.3, "b": -1.7})
    torch.testing.assert_close(update.W0(tiny.get_submodule(layer)), expected)


def test_one_adapter_at_weight_one_is_the_plain_merge(tiny: Any) -> None:
    fill(attach(tiny, METHOD))
    merge(tiny)
    plain = bits(tiny)
    unmerge(tiny)
    merge(tiny, weights={"default": 1.0})
    assert all(torch.equal(bits(tiny)[n], v) for n, v in plain.items())


def test_delta_is_what_a_merge_adds(tiny: Any) -> None:
    fill(attach(tiny, METHOD))
    for layer, update in updates(tiny).items():
        W0 = update.W0(tiny.get_submodule(layer)).detach().clone()
        dW = deltaw.delta(tiny, layer)
        assert dW.shape == W0.shape
        torch.testing.assert_close(dW, (10 / 4) * update.B.detach() @ update.A.detach())
        merge(tiny)
        assert torch.equal(update.W0(tiny.get_submodule(layer)), W0 + dW)
        unmerge(tiny)


def test_merging_what_changes_nothing_is_an_error_and_leaves_the_model(tiny: Any) -> None:
    before = bits(tiny)
    attach(tiny, METHOD)
    with pytest.raises(
        MergeError, match=r"would come out of the merge unchanged(.|\n)*ΔW is zero \(was it trained\?\)"
    ):
        merge(tiny)
    tiny.to(torch.bfloat16)
    fill(tiny, size=1e-5)
    with pytest.raises(MergeError, match="rounds ΔW away"):
        merge(tiny)
    assert deltaw.adapters(tiny).active == "default"
    tiny.float()
    detach(tiny)
    assert bits(tiny).keys() == before.keys()


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


def test_scaled_zeros_are_no_merge_that_failed(ids: torch.Tensor) -> None:
    """A GPT-2 whose biases are zero, as they start: (IA)³ scales its weights and them."""
    torch.manual_seed(1)
    model = fill(deltaw.attach(tiny_gpt2().eval(), deltaw.IA3()))
    before, expected = bits(model), model(ids).logits
    report = deltaw.merge(model)
    assert report.layers["transformer.h.0.attn.c_attn.bias"].changed == 0.0
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)
    deltaw.unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_merge_that_is_not_finite_is_an_error_and_leaves_the_model(tiny: Any, value: float) -> None:
    fill(attach(tiny.to(torch.float16), METHOD))
    B = next(iter(updates(tiny).values())).B
    before, good = snapshot(tiny), B.detach().clone()
    with torch.no_grad():
        B[0, 0] = value
    with pytest.raises(MergeError, match=r"1 of .* not be finite"):
        merge(tiny)
    with torch.no_grad():
        B.copy_(good)
    with pytest.raises(MergeError, match="not be finite"):
        merge(tiny, weights={"default": value})
    assert_same(tiny, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_preview_says_what_the_merge_then_does_and_changes_nothing(tiny: Any, dtype: torch.dtype) -> None:
    fill(attach(tiny.to(dtype), METHOD))
    before = snapshot(tiny)
    foreseen = preview(tiny)
    assert_same(tiny, before)
    assert merge(tiny).layers == foreseen.layers
    with pytest.raises(MergeError, match="merged already"):
        preview(tiny)


def test_a_reports_rows_are_families_of_layers_then_all(tiny: Any) -> None:
    report = merge(fill(attach(tiny, METHOD)))
    *families, last = report.rows()
    assert sum(row["count"] for row in families) == last["count"] == len(report.layers)
    assert all("*" in row["layers"] and row["count"] == 2 for row in families) and last["layers"] == "all"
    assert last["relative"] == report.relative and last["largest_change"] == max(r["largest_change"] for r in families)


def test_settle_makes_a_merge_final(tiny: Any, ids: torch.Tensor) -> None:
    plain = [(n, type(m)) for n, m in tiny.named_modules()]
    fill(attach(tiny, METHOD))
    fill(attach(tiny, METHOD, name="other"), seed=9)
    merge(tiny, "default")
    merged = bits(tiny)
    settle(tiny)
    assert all(torch.equal(bits(tiny)[n], v) for n, v in merged.items())
    assert [(n, type(m)) for n, m in tiny.named_modules()] == plain
    assert deltaw.adapters(tiny) == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_4_a_correction_gives_the_same_bits_back_in_less_memory(
    tiny: Any, ids: torch.Tensor, dtype: torch.dtype
) -> None:
    tiny.to(dtype)
    before = bits(tiny)
    fill(attach(tiny, METHOD), size=0.02)
    copied = merge(tiny)
    merged = bits(tiny)
    unmerge(tiny)
    kept = merge(tiny, keep="correction")
    assert all(torch.equal(bits(tiny)[n], v) for n, v in merged.items())
    factors = sum(p.numel() * p.element_size() for p in deltaw.parameters(tiny, "default"))
    assert kept.extra_memory - factors < copied.extra_memory / 2
    assert dict(base_parameters(tiny)).keys() == before.keys()
    assert all(torch.equal(v, before[n]) for n, v in base_parameters(tiny))  # as saving asks for them
    with torch.no_grad():
        for parameter in deltaw.parameters(tiny, "default"):
            parameter.mul_(3.0)  # what is merged is what was merged
    unmerge(tiny)
    assert all(torch.equal(bits(tiny)[n], v) for n, v in before.items())


@pytest.mark.parametrize("keep", ["copy", "correction"])
def test_4_a_merged_model_gives_each_adapter_back(tiny: Any, keep: Any) -> None:
    before = bits(tiny)
    for i, name in enumerate("abc"):
        fill(attach(tiny, METHOD, name=name), name, seed=i)
    merge(tiny, weights={"a": 0.5, "c": -2.0})
    expected = bits(tiny)
    unmerge(tiny)
    merge(tiny, weights={"a": 0.5, "b": 1.5, "c": -2.0}, keep=keep)
    with pytest.raises(MergeError, match="'d' is not merged; Adapters 'a', 'b', 'c' are"):
        unmerge(tiny, "d")
    unmerge(tiny, "b")
    assert all(torch.equal(bits(tiny)[n], v) for n, v in expected.items())
    unmerge(tiny, "a")
    unmerge(tiny, "c")
    assert all(torch.equal(bits(tiny)[n], v) for n, v in before.items())
    assert deltaw.adapters(tiny).active == "c"


@pytest.mark.parametrize("keep", ["copy", "correction"])
def test_a_merge_that_is_interrupted_leaves_the_model(tiny: Any, keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bits(tiny)
    fill(attach(tiny, METHOD))
    genuine, count = merging._dot, 0

    def interrupted(a: torch.Tensor, b: torch.Tensor) -> float:
        nonlocal count
        count += 1
        if count > 14:
            raise KeyboardInterrupt
        return genuine(a, b)

    monkeypatch.setattr(merging, "_dot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(tiny, keep=keep)
    assert all(torch.equal(bits(tiny)[n], v) for n, v in before.items())
    assert deltaw.adapters(tiny).active == "default"


def merged_model(keep: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, torch.Tensor]]:
    """An untied model with two adapters merged into it, and its bits before."""
    torch.manual_seed(4)
    model = tiny_llama(tied=False).to(dtype).eval()
    before = bits(model)
    fill(attach(model, METHOD, name="a"), "a", seed=1)
    fill(attach(model, LoRA(rank=2, alpha=7, targets="mlp"), name="b"), "b", seed=2)
    merge(model, weights={"a": 1.5, "b": -0.5}, keep=keep)
    return model, before


def negate_one(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4].neg_()


def exchange_two(model: Any) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight.data
    weight[0, 0], weight[5, 7] = weight[5, 7].clone(), weight[0, 0].clone()


def step(model: Any) -> None:
    weight = model.model.layers[0].mlp.gate_proj.weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def load_other_weights(model: Any, assign: bool = False) -> None:
    state = {n: v + 1 for n, v in model.state_dict().items() if ".deltaw." not in n}
    model.load_state_dict(state, strict=False, assign=assign)


def tie(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.weight = model.model.layers[1].self_attn.q_proj.weight


CHANGES: dict[str, tuple[Any, str]] = {
    "float16": (lambda m: m.half(), "it is float16 now, it was float32"),
    "bfloat16 and back": (lambda m: m.bfloat16().float(), "its values have changed"),
    "float64": (lambda m: m.double(), r"Call model.to\(torch.float32\) first"),
    "one entry": (negate_one, r"layers.1.mlp.up_proj.weight: its values have changed"),
    "two exchanged": (exchange_two, "layers.0.self_attn.q_proj.weight: its values"),
    "a step": (step, "layers.0.mlp.gate_proj.weight: its values"),
    "load_state_dict": (load_other_weights, "its values have changed"),
    "assigned": (lambda m: load_other_weights(m, assign=True), "its values have changed"),
    "tied": (tie, "layers.0.self_attn.q_proj.weight: its values"),
    "gone": (lambda m: delattr(m.model.layers[0].mlp, "up_proj"), "the model no longer has it"),
}


@pytest.mark.parametrize("keep", ["copy", "correction"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_changed_while_merged_are_refused_and_nothing_is_touched(change: str, keep: Any) -> None:
    model, _ = merged_model(keep)
    act, message = CHANGES[change]
    act(model)
    now = {n: p.clone() for n, p in model.named_parameters()}
    for undo in (unmerge, lambda m: unmerge(m, "a"), detach):
        if change == "gone" and undo is detach:
            continue
        with pytest.raises(MergeError, match=rf"(?s)are not what the merge made of them.*{message}.*changed='keep'"):
            undo(model)
        assert all(torch.equal(p, now[n]) for n, p in model.named_parameters())
    with pytest.raises(MergeError, match="merged already"):
        merge(model, "a")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_4_a_correction_of_one_16_bit_form_is_not_applied_to_another(dtype: torch.dtype, tmp_path: Any) -> None:
    model, before = merged_model("correction", dtype)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    model.to(torch.float32)
    with pytest.raises(MergeError, match=rf"(?s)it is float32 now.*model.to\({dtype}\) first"):
        unmerge(model)
    with pytest.raises(MergeError, match="float32 now"):
        deltaw.save(model, tmp_path / "a", name="a")
    model.to(dtype)
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())
    merge(model, "a", keep="correction")
    model.to(other)
    with pytest.raises(MergeError, match="are not what"):
        unmerge(model)
    unmerge(model, changed="keep")
    assert deltaw.adapters(model).active == "b"
    merge(model, "a")
    unmerge(model)


def test_copies_go_back_on_request_whatever_was_done_since(ids: torch.Tensor) -> None:
    model, before = merged_model("copy")
    load_other_weights(model)
    norm = model.model.norm.weight.detach().clone()
    unmerge(model, changed="restore")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(model.model.norm.weight, norm)  # no merge has anything of it
    model, before = merged_model("copy")
    model.half()
    unmerge(model, changed="restore")
    assert all(torch.equal(bits(model)[n], v.half()) for n, v in before.items())
    model, before = merged_model("correction")
    negate_one(model)
    with pytest.raises(MergeError, match="up_proj"):
        unmerge(model, changed="restore")
    with pytest.raises(MergeError, match="it can be 'refuse'"):
        unmerge(model, changed="never")  # type: ignore[arg-type]
    kept = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    unmerge(model, changed="keep")
    before["model.layers.1.mlp.up_proj.weight"] = kept
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


@pytest.mark.parametrize("keep", ["copy", "correction"])
def test_4_what_leaves_the_bits_leaves_the_way_back(keep: Any) -> None:
    def assigned(model: Any) -> Any:
        state = {n: v.clone() for n, v in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data.clone()
        return model

    same = [
        lambda m: m.requires_grad_(True),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        assigned,
        lambda m: m.double().float(),
        lambda m: m.train(),
    ]
    for change in same:
        model, before = merged_model(keep)
        model = change(model)
        unmerge(model)
        assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


def test_4_a_weight_that_was_tied_when_merged_is_given_back_twice_when_it_is_untied(ids: torch.Tensor) -> None:
    torch.manual_seed(1)
    model = tiny_llama(tied=True).eval()
    before = model.lm_head.weight.detach().clone()
    attach(model, LoRA(rank=2, alpha=5, targets="q", whole="embed_tokens"))
    fill(model)
    merge(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    unmerge(model)
    assert torch.equal(model.lm_head.weight, before) and torch.equal(model.model.embed_tokens.weight, before)
    merge(model)
    model.model.layers[0].mlp.other = torch.nn.Module()
    model.model.layers[0].mlp.other.weight = model.model.embed_tokens.weight
    with pytest.raises(MergeError, match=r"embed_tokens.weight: it is tied to model.layers.0.mlp.other.weight now"):
        unmerge(model)


@pytest.mark.parametrize("change", ["not finite", "interrupted"])
@pytest.mark.parametrize("keep", ["copy", "correction"])
def test_one_of_several_is_taken_out_whole_or_not_at_all(change: str, keep: Any, monkeypatch: Any) -> None:
    model, before = merged_model(keep)
    now = bits(model)
    B = updates(model, "b")["model.layers.1.mlp.up_proj"].B
    good = B.detach().clone()
    if change == "not finite":
        with torch.no_grad():
            B[0, 0] = float("nan")
    else:
        monkeypatch.setattr("deltaw.model.merging.merge.check_merged", lambda *_: 1 / 0)
    with pytest.raises((MergeError, ZeroDivisionError)):
        unmerge(model, "a")
    assert all(torch.equal(bits(model)[n], v) for n, v in now.items())
    assert deltaw.adapters(model).active is None
    with torch.no_grad():
        B.copy_(good)
    monkeypatch.undo()
    unmerge(model, "a")
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


def test_a_float64_base_is_merged_in_float64(tiny: Any, ids: torch.Tensor) -> None:
    tiny.double()
    before = bits(tiny)
    for seed, name in enumerate("ab"):
        fill(attach(tiny, METHOD, name=name), name, seed=seed)
    layer, update = next(iter(updates(tiny, "a").items()))
    W0 = update.W0(tiny.get_submodule(layer)).detach().clone()
    for chosen, factors in (({"name": "a"}, {"a": 1.0}), ({"weights": {"a": 0.3, "b": -1.7}}, {"a": 0.3, "b": -1.7})):
        for keep in ("copy", "correction"):
            merge(tiny, keep=keep, **chosen)
            expected = W0.clone()
            for name, weight in factors.items():
                own = updates(tiny, name)[layer]
                expected += weight * (10 / 4) * own.B.detach().double() @ own.A.detach().double()
            torch.testing.assert_close(update.W0(tiny.get_submodule(layer)).detach(), expected, rtol=1e-13, atol=1e-13)
            unmerge(tiny)
            assert all(torch.equal(bits(tiny)[n], v) for n, v in before.items())
    assert deltaw.delta(tiny, layer, "a").dtype == torch.float64


@pytest.mark.parametrize("keep", ["copy", "correction"])
def test_a_model_that_was_made_under_inference_mode_is_merged_outside_of_it(keep: Any) -> None:
    with torch.inference_mode():
        torch.manual_seed(1)
        model = tiny_llama().eval()
        before = bits(model)
        fill(attach(model, LoRA(rank=2, alpha=5)))
    merge(model, keep=keep)
    assert any(not torch.equal(bits(model)[n], v) for n, v in before.items())
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())


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


@pytest.mark.parametrize("what", ["head", "embedding", "both", "whole"])
@pytest.mark.parametrize("kind", list(EMBEDDINGS))
@pytest.mark.filterwarnings("ignore")
def test_4_what_is_tied_is_untied_saved_and_tied_again(kind: str, what: str, ids: torch.Tensor, tmp_path: Path) -> None:
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


def test_4_several_adapters_of_tied_layers(ids: torch.Tensor) -> None:
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


def test_4_a_merge_that_fails_after_untying_ties_again() -> None:
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


def test_4_one_update_of_tied_layers_is_merged_once(ids: torch.Tensor) -> None:
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


@pytest.mark.parametrize(("weight", "stops"), [(1.0, [2, 7]), (0.25, [2, 7]), (0.0, 2), (-0.5, 2), (-1.0, 2)])
def test_a_merged_model_stops_where_what_was_added_to_it_was_taught_to(weight: float, stops: Any) -> None:
    model = fill(attach(tiny_llama().eval(), METHOD))
    teach(model, "default", [7])
    merge(model, weights={"default": weight}, allow_unchanged=weight == 0.0)
    assert model.generation_config.eos_token_id == stops
    unmerge(model)
    assert model.generation_config.eos_token_id == 2


def test_the_report_counts_the_bytes_that_are_kept(ids: torch.Tensor) -> None:
    model = fill(attach(tiny_llama().eval(), LoRA(rank=2, alpha=5, targets="qv")))
    targeted = sum(4 * model.get_submodule(name).weight.numel() for name in updates(model))
    assert merge(model).extra_memory == targeted
    unmerge(model)
    detach(model)
    fill(attach(model, LoRA(rank=2, alpha=5, targets=["lm_head"])))
    vocabulary = 4 * model.lm_head.weight.numel()
    assert merge(model, untie=True).extra_memory == 2 * vocabulary  # the copy, and the weight that the head has alone


def test_what_becomes_of_changed_weights_is_said_by_its_name() -> None:
    model = fill(attach(tiny_llama().eval(), METHOD))
    merge(model)
    with pytest.raises(TypeError):
        unmerge(model, None, "keep")  # type: ignore[misc]


# --- what cannot be merged -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "said"), [(2, "0, 1"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more"), (6, "0, 1, 2 and 3 more")]
)
def test_layers_in_few_bits_are_named_up_to_three(count: int, said: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the dev extra has it)")
    model = torch.nn.Sequential(*(packed(torch.nn.Linear(64, 64), "nf4") for _ in range(count))).eval()
    fill(attach(model, LoRA(rank=2, alpha=5, targets="*")))
    with pytest.raises(MergeError, match=rf"the weights of {said} are quantised \(\w"):
        merge(model)
    assert preview(model).layers == {}


@pytest.mark.parametrize("what", ["linear", "1d", "2d"])
def test_weights_that_are_stored_in_another_order(what: str) -> None:
    """Those of dense layers are merged, those of convolutions are not."""
    made: dict[str, Any] = {
        "linear": torch.nn.Linear(8, 6),
        "1d": torch.nn.Conv1d(8, 6, 3),
        "2d": torch.nn.Conv2d(8, 6, 3),
    }
    layer = made[what]
    layer.weight.data = layer.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    model = torch.nn.Sequential(layer)
    fill(attach(model, LoRA(rank=2, alpha=5, targets="*")))
    W0, dW = layer.weight.detach().clone(), deltaw.delta(model, "0")
    if what == "linear":
        merge(model)
        torch.testing.assert_close(layer.weight.detach(), W0 + dW)
        unmerge(model)
    else:
        with pytest.raises(MergeError, match=r"0\.weight is stored in another order"):
            merge(model)
    assert torch.equal(layer.weight, W0)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_vocabulary_of_another_size_is_not_merged(weight: float, ids: torch.Tensor, tmp_path: Path) -> None:
    base = tiny_llama().eval()
    resized = copy.deepcopy(base)
    resized.resize_token_embeddings(99)
    save(fill(attach(resized, LoRA(rank=4, alpha=10, targets="qv", whole="embed_tokens"))), tmp_path / "a")
    load(base, tmp_path / "a", name="a")
    before = bits(base)
    said = r"embed_tokens\.weight is \[96, 32\], the adapter's vocabulary has 99 tokens: call model.*\(99\) before"
    with pytest.raises(MergeError, match=said):
        merge(base, weights={"a": weight})
    assert all(torch.equal(bits(base)[n], v) for n, v in before.items())
    assert len(preview(base).layers) == 4  # queries and values


def test_adapters_that_no_weight_can_hold_are_named() -> None:
    model = attach(attach(tiny_llama(), Bottleneck(4), name="inserted"), LoRA(rank=2), name="lora")
    with pytest.raises(
        MergeError, match=r"(?s)^Not merged:.*'inserted': a bottleneck.*\nUse such an adapter beside"
    ) as error:
        merge(model, weights={"lora": 1.0, "inserted": 1.0})
    assert "'lora'" not in str(error.value)


def test_what_is_to_be_merged_is_said_in_one_way() -> None:
    model = fill(attach(tiny_llama(), METHOD, name="a"))
    for wrong, said in (
        ({"name": "a", "weights": {"a": 1.0}}, "either a name or weights"),
        ({"weights": {}}, "weights is empty"),
    ):
        with pytest.raises(MergeError, match=said):
            merge(model, **wrong)
    with deltaw.using(model, "a"), pytest.raises(MergeError, match=r"'a' is in use .*: merge when the block is over"):
        merge(model)
    with pytest.raises(MergeError, match="Nothing is merged"):
        unmerge(model)


# --- tied weights ----------------------------------------------------------------------------------------------


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
def test_4_one_value_of_tied_layers_is_merged_once(weights: dict[str, float]) -> None:
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
def test_4_layers_of_any_kinds_that_share_a_weight(kinds: tuple[str, str], d: int) -> None:
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


def test_a_bias_that_the_base_lacks_cannot_be_merged() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
    fill(attach(model, LoRA(rank=2, alpha=5, targets="*")))
    updates(model)["0"].bias = torch.nn.Parameter(torch.ones(4))  # as files of PEFT's lora_bias have it
    W0 = model[0].weight.detach().clone()
    with pytest.raises(MergeError, match=r"the base has no 0\.bias that the adapter's could be merged into"):
        merge(model)
    assert torch.equal(model[0].weight, W0) and list(preview(model).layers) == ["0"]


# --- one of several --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "kind"), [("copy", Copy), ("correction", Correction)])
def test_4_what_is_kept_of_the_others_is_of_the_same_kind(keep: Any, kind: type) -> None:
    model = tiny_llama(tied=False).eval()
    for name, targets in (("a", "attention"), ("b", "mlp")):
        fill(attach(model, LoRA(rank=2, alpha=5, targets=targets), name=name), name)
    merge(model, weights={"a": 1.0, "b": 1.0}, keep=keep)
    unmerge(model, "a")
    originals = record_of(model).originals
    assert originals and all(isinstance(kept.original, kind) and "mlp" in name for name, kept in originals.items())
    merged_by_one = bits(model)
    unmerge(model)
    merge(model, "b")
    assert all(torch.equal(bits(model)[n], v) for n, v in merged_by_one.items())


def test_4_the_others_may_change_nothing() -> None:
    model = fill(attach(tiny_llama().eval(), METHOD, name="a"), "a")
    before = bits(model)
    attach(model, METHOD, name="untrained")
    merge(model, weights={"a": 1.0, "untrained": 1.0})
    unmerge(model, "a")
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())
    assert list(record_of(model).merged) == ["untrained"]


def test_4_what_was_untied_stays_so_where_one_cannot_be_taken_out(ids: torch.Tensor) -> None:
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
