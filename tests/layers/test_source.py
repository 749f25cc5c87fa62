"""What the source of models says: layers that no training reaches are left out, and refused where they are named."""

from __future__ import annotations

import importlib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    MarianConfig,
    MarianMTModel,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import deltaw
from deltaw import LoRA
from deltaw.errors import TargetError
from deltaw.layers.source import never_called, read_outside, without_gradient
from deltaw.methods.targets import select
from deltaw.model.summary import updates
from tests import architectures
from tests.conftest import tiny_gpt2, tiny_llama


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            vocab_size=96,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    )


def bart() -> Any:
    sizes = architectures.SEQ2SEQ | {"max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(**sizes))


def marian() -> Any:
    sizes = architectures.SEQ2SEQ | {"max_position_embeddings": 64}
    return MarianMTModel(MarianConfig(**sizes))


def prophetnet() -> Any:
    return ProphetNetForConditionalGeneration(
        ProphetNetConfig(
            vocab_size=96, hidden_size=16, encoder_ffn_dim=24, decoder_ffn_dim=24, num_encoder_layers=1, num_decoder_layers=1,
            num_encoder_attention_heads=2, num_decoder_attention_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def sparse() -> Any:
    """Sparse attention, whose indexer chooses tokens."""
    torch.manual_seed(0)
    config = DeepseekV32Config(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=12, kv_lora_rank=12,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, index_head_dim=16, index_n_heads=2, index_topk=4, vocab_size=96,
        first_k_dense_replace=1, mlp_layer_types=["dense", "sparse"], max_position_embeddings=64,
    )  # fmt: skip
    return DeepseekV32ForCausalLM(config).eval()


def test_an_indexer_is_left_out_and_refused_where_it_is_named() -> None:
    model = sparse()
    selection = select(model, "all-linear", 2)
    inside = [n for n in selection.left_out if "indexer" in n]
    assert len(inside) == 6 and not any("indexer" in n for n in selection.ranks)
    assert all("only chooses tokens" in selection.left_out[n] for n in inside)
    assert not any("indexer" in n for n in select(model, "*self_attn*", 2).ranks)
    with pytest.raises(
        TargetError, match=r"wq_b cannot learn: no gradient reaches it: DeepseekV32Indexer only chooses"
    ):
        select(model, "q_a_proj,wq_b", 2)
    with pytest.raises(TargetError, match="cannot learn"):
        select(model, "*indexer*", 2)


def test_every_other_layer_of_it_learns() -> None:
    model = deltaw.attach(sparse(), LoRA(rank=2, alpha=3))
    ids = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(2))
    model(input_ids=ids, labels=ids).loss.backward()
    for name, update in updates(model).items():
        grads = [p.grad for n, p in update.named_parameters() if n.endswith("B")]
        assert grads and all(g is not None and bool(g.any()) for g in grads), name


@pytest.mark.parametrize(
    ("make", "kept", "used"),
    [(t5, "shared", "embed_tokens"), (bart, "shared", "embed_tokens"), (marian, "shared", "embed_tokens"),
     (prophetnet, "prophetnet.word_embeddings", "word_embeddings")],
)  # fmt: skip
def test_a_module_kept_for_its_weight_is_refused_with_those_that_use_it(make: Any, kept: str, used: str) -> None:
    """Of Marian's code only `set_input_embeddings` names it, of ProphetNet's the encoder names its own of that name."""
    query = {t5: "q", prophetnet: "query_proj"}.get(make, "q_proj")
    with pytest.raises(TargetError) as error:
        select(make(), [query, kept], 2)
    said = str(error.value)
    assert f"'{kept}': {kept.rpartition('.')[2]} cannot learn: no forward calls it" in said
    assert f"encoder.{used}" in said and f"decoder.{used}" in said and "name these" in said


def test_the_modules_that_use_the_weight_learn() -> None:
    model = deltaw.attach(t5(), LoRA(rank=2, targets="q,encoder.embed_tokens,decoder.embed_tokens"))
    ids = torch.randint(3, 96, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    for name in ("encoder.embed_tokens", "decoder.embed_tokens"):
        grad = updates(model)[name].B.grad
        assert grad is not None and grad.any()


class Fixed(nn.Embedding):
    """Positions as transformers' older Pegasus and Marian computed them."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.arange(x.shape[1]))


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.out = nn.Embedding(9, 4), Fixed(6, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.words(ids) + self.places(ids))


def test_positions_that_are_computed_without_gradients() -> None:
    stopped = without_gradient(dict(Positioned().named_modules()))
    assert stopped == {"places": "no gradient reaches it: Fixed computes under torch.no_grad"}


def test_what_is_called_is_not_suspected() -> None:
    for model in (tiny_llama(), tiny_gpt2()):
        modules = dict(model.named_modules())
        assert never_called(modules) == set()
        assert not any(n in select(model, "all-linear", 2).ranks for n in without_gradient(modules))


class Spare(nn.Module):
    """One layer is called by its name, one by a helper, one by a computed name, one is handed on, and one by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.helped, self.spare = nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return through(self, self.plain(x))


def through(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.helped(x)
    return out


class ByAnyName(Spare):
    """Its code may call anything."""

    def forward(self, x: Tensor) -> Tensor:
        for name in ("plain", "helped"):
            x = getattr(self, name)(x)
        return x


class HandedOn(Spare):
    """Another module is given the layer, which then has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [self.spare]


class Partly(nn.Module):
    """One layer is used without gradients alone, one also with."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.both, self.out = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = self.bias(x) + self.both(x)
        out: Tensor = self.out(self.both(x) + shift)
        return out


def test_layers_used_in_blocks_without_gradients() -> None:
    selection = select(Partly(), "all-linear", 2)
    assert list(selection.ranks) == ["both", "out"]
    assert selection.left_out == {"bias": "no gradient reaches it: Partly uses it under torch.no_grad alone"}
    assert "bias" in without_gradient(dict(deltaw.attach(Partly(), LoRA(rank=2)).named_modules()))


class NoForward(nn.Module):
    """Other code computes with its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)


class Namesake(nn.Module):
    """It calls its own layer `spare`, which tells nothing of another module's."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.inner = nn.Linear(6, 6), Spare()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(*[self.spare(each) for each in (x,)])
        return out


class Delegating(nn.Module):
    """What it lacks is asked of the module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Spare()

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.spare(x)
        return out


class LocalOfThatName(nn.Module):
    """A variable has the name of another module's layer, and a constructor sets that layer's bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(6, 6), Spare()
        self.inner.spare.bias = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        spare = self.first(x)
        out: Tensor = self.inner(spare)
        return out


def test_a_variable_of_a_layers_name_calls_nothing() -> None:
    assert never_called(dict(LocalOfThatName().named_modules())) == {"inner.spare"}


def test_code_without_source_is_taken_to_call_everything() -> None:
    scope: dict[str, Any] = {"nn": nn, "torch": torch}
    body = """class Made(nn.Module):
    def __init__(self):
        super().__init__()
        self.spare, self.used = nn.Linear(2, 2), nn.Linear(2, 2)
    def forward(self, x):
        with torch.no_grad():
            return self.used(x)"""
    exec(body, scope)
    modules = dict(nn.Sequential(scope["Made"]()).named_modules())
    assert never_called(modules) == set() and without_gradient(modules) == {}


def test_a_file_that_changed_since_its_import_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.inside.weight"
    (tmp_path / "changing_module.py").write_text(f"from torch import nn\n{text}")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("changing_module")
    (tmp_path / "changing_module.py").write_text(f"from torch import nn\n# another line\n{text}")
    assert not read_outside(module.Made(), "inside")


def test_a_layer_of_the_same_name_in_another_module_tells_nothing() -> None:
    assert never_called(dict(Namesake().named_modules())) == {"inner.spare"}
    assert never_called(dict(Delegating().named_modules())) == set()


def test_which_layers_of_ones_own_model_are_called() -> None:
    assert never_called(dict(Spare().named_modules())) == {"spare"}
    assert never_called(dict(ByAnyName().named_modules())) == set()
    assert never_called(dict(HandedOn().named_modules())) == set()
    assert never_called(dict(nn.ModuleDict({"a": NoForward()}).named_modules())) == set()
    replaced: Any = Spare()
    replaced.forward = types.MethodType(lambda self, x: self.spare(x), replaced)
    assert never_called(dict(replaced.named_modules())) == set()


def test_a_layer_that_nothing_calls_is_left_out_and_said() -> None:
    model = nn.Sequential(Spare())
    selection = select(model, "all-linear", 2)
    assert list(selection.ranks) == ["0.plain", "0.helped"]
    assert selection.left_out == {"0.spare": "no forward calls it"}
    with pytest.raises(TargetError, match="spare cannot learn: no forward calls it"):
        select(model, "spare", 2)


def test_it_is_the_same_after_attach_and_after_detach() -> None:
    model = nn.Sequential(Spare())
    deltaw.attach(model, LoRA(rank=2))
    assert never_called(dict(model.named_modules())) == {"0.spare"}
    assert deltaw.summary(model).adapters["default"].left_out == {"0.spare": "no forward calls it"}
    deltaw.attach(model, LoRA(rank=1), name="other")
    assert deltaw.summary(model).adapters["other"].layers == 2
