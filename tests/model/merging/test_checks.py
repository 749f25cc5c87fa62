"""Weights and adapters that cannot be merged are named, and the model stays as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw import Bottleneck, LoRA, attach, load, merge, save, unmerge
from deltaw.errors import MergeError
from deltaw.model.merging.merge import preview
from deltaw.model.summary import updates
from tests.conftest import bits, fill, tiny_llama
from tests.layers.test_quantised import packed

METHOD = LoRA(rank=4, alpha=10)


@pytest.mark.slow  # bitsandbytes takes seconds to import
@pytest.mark.parametrize(
    ("count", "said"), [(2, "0, 1"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more"), (6, "0, 1, 2 and 3 more")]
)
def test_quantised_layers_are_refused_and_named_up_to_three(count: int, said: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the dev extra has it)")
    model = torch.nn.Sequential(*(packed(torch.nn.Linear(64, 64), "nf4") for _ in range(count))).eval()
    fill(attach(model, LoRA(rank=2, alpha=5, targets="*")))
    with pytest.raises(MergeError, match=rf"the weights of {said} are quantised \(\w"):
        merge(model)
    assert preview(model).layers == {}


@pytest.mark.parametrize("what", ["linear", "1d", "2d"])
def test_weights_stored_in_another_order_are_merged_if_dense_and_refused_if_convolutions(what: str) -> None:
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


def test_a_merge_takes_a_name_or_weights_and_no_open_block() -> None:
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


def test_a_bias_that_the_base_lacks_cannot_be_merged() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
    fill(attach(model, LoRA(rank=2, alpha=5, targets="*")))
    updates(model)["0"].bias = torch.nn.Parameter(torch.ones(4))  # as files of PEFT's lora_bias have it
    W0 = model[0].weight.detach().clone()
    with pytest.raises(MergeError, match=r"the base has no 0\.bias that the adapter's could be merged into"):
        merge(model)
    assert torch.equal(model[0].weight, W0) and list(preview(model).layers) == ["0"]
