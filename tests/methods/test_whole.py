"""What an adapter has whole, saved and loaded again: heads, embeddings, tokens, resized vocabularies, tied and untied. No scale is
1."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from deltaw import LoRA, attach, detach, load, merge, parameters, save, unmerge
from deltaw.errors import BaseMismatch, FileError, MergeError
from deltaw.methods.dora import DoRA
from deltaw.model.summary import updates
from tests.conftest import assert_same, bits, fill, snapshot, tiny_gpt2, tiny_llama
from tests.files.conftest import tiny_bert

WHOLE = {
    "head": LoRA(rank=4, alpha=10, targets="qv", whole="lm_head"),
    "embedding": LoRA(rank=4, alpha=10, targets="qv", whole="embed_tokens"),
    "both": LoRA(rank=4, alpha=10, targets="qv", whole="lm_head,embed_tokens"),
    "adapted embedding": LoRA(rank=4, alpha=10, targets="qv,embed_tokens"),
    "adapted head": LoRA(rank=4, alpha=10, targets="qv,lm_head"),
    "both adapted": LoRA(rank=4, alpha=10, targets="qv,embed_tokens,lm_head"),
    "embedding adapted, head whole": LoRA(rank=4, alpha=10, targets="qv,embed_tokens", whole="lm_head"),
    "head adapted, embedding whole": LoRA(rank=4, alpha=10, targets="qv,lm_head", whole="embed_tokens"),
    "tokens": LoRA(rank=4, alpha=10, targets="qv", tokens="5,7,90"),
    "norms": LoRA(rank=4, alpha=10, targets="qv", whole="*norm"),
    "dora": DoRA(rank=4, alpha=10, targets="all-linear,embed_tokens", whole="*norm"),
}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.filterwarnings("ignore")
def test_a_file_reloads_and_real_peft_computes_the_same(
    method: str, tied: bool, ids: torch.Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = tiny_llama(tied=tied).eval()
    plain = copy.deepcopy(model)
    fill(attach(model, WHOLE[method]))
    ids[0, :3] = torch.tensor([5, 7, 90])
    expected = model(ids).logits
    save(model, tmp_path / "a")
    load(plain, tmp_path / "a")
    assert torch.equal(plain(ids).logits, expected)
    save(plain, tmp_path / "b")
    first, second = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    if tied and "adapted" in method and "whole" in method:
        return  # PEFT itself cannot keep the two apart
    theirs = peft.PeftModel.from_pretrained(detach(plain), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = fill(attach(tiny_llama(), WHOLE["both"]))
    save(model, tmp_path / "a")
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert sum(p.numel() for p in parameters(model)) * 4 < size < sum(p.numel() for p in parameters(model)) * 4 + 4000


def test_only_rows_are_stored_where_only_rows_are_trained(tmp_path: Path) -> None:
    save(fill(attach(tiny_llama(), WHOLE["tokens"])), tmp_path / "a")
    rows = [t for k, t in weights_of(tmp_path / "a").items() if "token_adapter" in k]
    assert [list(r.shape) for r in rows] == [[3, 32]]


def test_it_says_when_whole_modules_are_most_of_a_large_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    model.resize_token_embeddings(100_000)
    save(fill(attach(model, LoRA(rank=2, alpha=5, targets="qv"))), tmp_path / "small")
    assert "whole" not in caplog.text
    save(fill(attach(model, WHOLE["head"], name="b")), tmp_path / "large", name="b")
    assert "trained whole, most of all model.embed_tokens.weight" in caplog.text


# --- heads that the base does not have --------------------------------------------------------------------------


def test_a_trained_head_comes_back_on_a_model_whose_own_is_fresh(ids: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = tiny_bert().eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.classifier.weight.normal_()
        other.classifier.bias.normal_()
    fill(attach(model, LoRA(rank=4, alpha=10, targets="attention", whole="classifier")))
    save(model, tmp_path / "a")
    load(other, tmp_path / "a")  # the base's fingerprint leaves the head out
    assert torch.equal(other(ids).logits, model(ids).logits)
    with torch.no_grad():
        other.bert.pooler.dense.weight[0] += 1
    with pytest.raises(BaseMismatch):
        load(other, tmp_path / "a", name="b")


def test_a_head_that_the_file_should_have_is_missed(tmp_path: Path) -> None:
    import json

    model = tiny_llama()
    save(fill(attach(model, LoRA(rank=2, alpha=5, targets="qv"))), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["score"]}))
    with pytest.raises(FileError, match=r"modules_to_save is \['score'\], but .* has none"):
        load(model, tmp_path / "a", name="b")


# --- vocabularies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "tied"), [("whole", True), ("whole", False), ("tokens", True)])
def test_a_resized_vocabulary_loads_on_the_base_as_it_is_and_resized(
    how: str, tied: bool, ids: torch.Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    base = tiny_llama(tied=tied).eval()
    model = copy.deepcopy(base)
    model.resize_token_embeddings(99)
    resized = copy.deepcopy(base)
    resized.resize_token_embeddings(99)
    settings: Any = {"whole": "embed_tokens,lm_head"} if how == "whole" else {"tokens": "96,97,98"}
    fill(attach(model, LoRA(rank=4, alpha=10, targets="qv", **settings)))
    ids[0, :3] = torch.tensor([96, 97, 98])
    expected = model(ids).logits
    save(model, tmp_path / "a")
    if how == "tokens":
        assert max(t.shape[0] for t in weights_of(tmp_path / "a").values()) < 96  # not the vocabulary

    load(resized, tmp_path / "a")
    torch.testing.assert_close(resized(ids).logits, expected, rtol=1e-5, atol=1e-5)
    before = snapshot(base)
    load(base, tmp_path / "a")
    torch.testing.assert_close(base(ids).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(MergeError, match=r"call model.resize_token_embeddings\(99\) before the adapter is loaded"):
        merge(base)
    detach(base)
    assert_same(base, before)
    merge(resized)
    torch.testing.assert_close(resized(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_new_rows_of_an_untied_head_that_no_adapter_has_are_missed(tmp_path: Path) -> None:
    base = tiny_llama(tied=False)
    model = copy.deepcopy(base)
    model.resize_token_embeddings(99)
    save(fill(attach(model, LoRA(rank=4, alpha=10, targets="qv", tokens="96,97,98"))), tmp_path / "a")
    with pytest.raises(BaseMismatch):
        load(base, tmp_path / "a")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["q_proj", "lm_head"], ["q_proj"]])
def test_vocabularies_that_real_peft_saw_resized_load(targets: list[str], ids: torch.Tensor, tmp_path: Path) -> None:
    """It writes the whole embedding beside, of which it says that it does so."""
    torch.manual_seed(1)
    base = tiny_llama().eval()
    model = copy.deepcopy(base)
    model.resize_token_embeddings(99)
    theirs = fill_peft(peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets)))
    ids[0, :3] = torch.tensor([96, 97, 98])
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    load(base, tmp_path / "a")
    torch.testing.assert_close(base(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def fill_peft(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def test_a_copy_of_another_base_is_used_and_named(
    ids: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_llama().eval()
    theirs = fill_peft(
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    )
    theirs.save_pretrained(tmp_path / "a")
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.embed_tokens.weight[5] += 1
    load(base, tmp_path / "a", name="same")
    assert "than this model" not in caplog.text
    load(other, tmp_path / "a", name="other")
    assert "another model.embed_tokens.weight than this model" in caplog.text
    torch.testing.assert_close(other(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_biased_head_whose_copy_is_in_the_file(ids: torch.Tensor, tmp_path: Path) -> None:
    base = tiny_llama(tied=False).eval()
    base.lm_head = torch.nn.Linear(32, 96)
    theirs = fill_peft(
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(lora_alpha=10, target_modules=["lm_head"]))
    )
    theirs.save_pretrained(tmp_path / "a")
    assert "base_model.model.lm_head.base_layer.bias" in weights_of(tmp_path / "a")
    with torch.no_grad():
        base.lm_head.bias.add_(1.0)
    load(base, tmp_path / "a")
    torch.testing.assert_close(base(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    source = fill(attach(tiny_llama(), LoRA(rank=4, alpha=10, targets="qv", whole="*norm", tokens="5,90")))
    save(source, tmp_path / "a")
    model = tiny_gpt2()
    before = snapshot(model)
    with pytest.raises(FileError) as caught:
        load(model, tmp_path / "a", check_base=False)
    assert "no parameter 'model.norm.weight'" in str(caught.value) and "no layer 'model.embed_tokens'" in str(
        caught.value
    )
    assert_same(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wholes_come_back_in_other_precisions(dtype: torch.dtype, ids: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = tiny_llama(tied=False).eval()
    base = copy.deepcopy(model).to(dtype)
    before = bits(base)
    fill(attach(model, WHOLE["dora"]))
    save(model, tmp_path / "a")
    load(base, tmp_path / "a")
    branch = base(ids).logits
    torch.testing.assert_close(branch.float(), model(ids).logits, rtol=0.2, atol=0.2)
    assert {u.weight.dtype for n, u in updates(base).items() if n.endswith("norm")} == {dtype}
    merge(base)
    torch.testing.assert_close(base(ids).logits, branch, rtol=0.1, atol=0.1)
    unmerge(base)
    assert all(torch.equal(bits(base)[n], v) for n, v in before.items())


def test_the_file_names_no_setting_that_it_does_not_use(tmp_path: Path) -> None:
    save(fill(attach(tiny_llama(), LoRA(rank=4, alpha=10, targets="qv"))), tmp_path / "a")
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    assert "trainable_token_indices" not in text and "lora_bias" not in text
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in file.keys())  # noqa: SIM118
