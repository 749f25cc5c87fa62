"""Slices of fused layers: each layout against the model that has it, updates of slices from attach to file and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import deltaw
from deltaw import DoRA, LoRA, attach, detach, load, merge, parameters, route, save, summary, unmerge, using
from deltaw.errors import AdapterError, FileError, TargetError
from deltaw.files.formats import peft
from deltaw.files.formats.peft.metadata import SLICES
from deltaw.layers.kinds import shape
from deltaw.layers.slices import parts_of, runs_of
from deltaw.methods.targets import select
from deltaw.methods.updates.lowrank import LowRank, Sliced
from deltaw.model.summary import updates
from tests.conftest import assert_same, bits, fill, snapshot, tiny_gpt2, tiny_llama
from tests.data.conftest import CHATML, tiny_tokenizer
from tests.runs.test_train import RECORDS, quick

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def made(model: str, config: str, **settings: Any) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()

    return build


FUSED = {
    "GPT-2": (tiny_gpt2, "transformer.h.0.attn.c_attn"),
    "OpenAI GPT": (made("OpenAIGPTModel", "OpenAIGPTConfig", **GPT, **NO_DROPOUT), "h.0.attn.c_attn"),
    "GPT-NeoX": (made("GPTNeoXModel", "GPTNeoXConfig", **SIZES, intermediate_size=48), "layers.0.attention.query_key_value"),
    "BLOOM": (made("BloomModel", "BloomConfig", **GPT), "h.0.self_attention.query_key_value"),
    "Persimmon": (made("PersimmonModel", "PersimmonConfig", **SIZES, intermediate_size=48), "layers.0.self_attn.query_key_value"),
    "Phi-3": (
        made("Phi3Model", "Phi3Config", **SIZES, num_key_value_heads=2, intermediate_size=48, pad_token_id=0),
        "layers.0.self_attn.qkv_proj",
    ),
    "MPT": (made("MptModel", "MptConfig", d_model=32, n_layers=2, n_heads=4, vocab_size=96), "blocks.0.attn.Wqkv"),
    "BigCode": (made("GPTBigCodeModel", "GPTBigCodeConfig", **GPT, multi_query=True), "h.0.attn.c_attn"),
    "Falcon, one key": (made("FalconModel", "FalconConfig", **SIZES), "h.0.self_attention.query_key_value"),
    "Falcon by head": (
        made("FalconModel", "FalconConfig", **SIZES, multi_query=False), "h.0.self_attention.query_key_value",
    ),
    "Falcon by group": (
        made("FalconModel", "FalconConfig", **SIZES, new_decoder_architecture=True, num_kv_heads=2),
        "h.0.self_attention.query_key_value",
    ),
    "BigCode by head": (made("GPTBigCodeModel", "GPTBigCodeConfig", **GPT, multi_query=False), "h.0.attn.c_attn"),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_q_k_and_v_are_where_the_layout_says(name: str) -> None:
    """In the attention of a causal model: what changes q at one position changes the output there alone; k and v change it from
    there on; and k changes nothing where q is zero, v does."""
    build, layer_name = FUSED[name]
    model = build()
    layer = model.get_submodule(layer_name)
    parts = parts_of(model, layer_name, shape(layer)[0])
    assert list(parts) == ["q", "k", "v"]
    rows = {role: [i for a, b in runs for i in range(a, b)] for role, runs in parts.items()}
    assert sorted(row for own in rows.values() for row in own) == list(range(shape(layer)[0]))

    def changed(role: str, *, without_q: bool) -> list[int]:
        """The positions at which the attention's output moves when `role` does, at position 3."""
        outputs = []
        for step in (0.0, 1.0):

            def edit(_: Any, __: Any, out: torch.Tensor, step: float = step) -> torch.Tensor:
                out = out.clone()
                if without_q:
                    out[..., rows["q"]] = 0.0
                out[:, 3, rows[role]] += step * torch.linspace(-9.0, 9.0, len(rows[role]))
                return out

            seen: list[torch.Tensor] = []
            attention = model.get_submodule(layer_name.rsplit(".", 1)[0])
            hooks = [
                layer.register_forward_hook(edit),
                attention.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[0])),
            ]
            with torch.no_grad():
                model(torch.arange(4, 11)[None])
            for hook in hooks:
                hook.remove()
            outputs.append(seen[0])
        moved = (outputs[0] - outputs[1]).abs().amax(-1)[0] > 1e-6
        return torch.nonzero(moved).flatten().tolist()

    assert changed("q", without_q=False) == [3]
    assert changed("k", without_q=False)[-1] > 3 and changed("v", without_q=False) == [3, 4, 5, 6]
    assert changed("k", without_q=True) == [] and changed("v", without_q=True) == [3, 4, 5, 6]


def test_gate_and_up_are_where_the_layout_says() -> None:
    build, _ = FUSED["Phi-3"]
    model = build()
    mlp = model.layers[0].mlp
    (gate,), (up,) = parts_of(model, "layers.0.mlp.gate_up_proj", 96).values()
    x = torch.randn(5, 32)
    h = mlp.gate_up_proj(x)
    expected = mlp.down_proj(h[:, slice(*up)] * mlp.activation_fn(h[:, slice(*gate)]))
    torch.testing.assert_close(mlp(x), expected)


def test_slices_of_experts_are_refused() -> None:
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(TargetError, match="a matrix for each expert"):
        select(made("MixtralForCausalLM", "MixtralConfig", **SIZES, intermediate_size=48)(), f"{experts}[0:8]", 2)


def test_rows_are_read_as_they_are_written() -> None:
    assert runs_of("0:4", 8) == ((0, 4),) and runs_of("0:2+4:8", 8) == ((0, 2), (4, 8))
    for wrong in ("4:4", "5:4", "0:9", "2:4+0:2", "0:3+2:4", "a:b", "0-4"):
        assert runs_of(wrong, 8) is None


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("qv", {"q", "v"}),
        ("q", {"q"}),
        ("c_attn[q,v]", {"q", "v"}),
        ("*.c_attn[k]", {"k"}),
        ("c_attn,c_attn[q]", {"q"}),
        ("c_attn[q],c_attn", set()),
        ("c_attn[0:8,40:48+60:70]", {"0:8", "40:48+60:70"}),
        ("attention", set()),
    ],
)
def test_targets_name_slices(targets: str, expected: set[str]) -> None:
    found = select(tiny_gpt2(), targets, 3)
    assert set(found.slices.get("transformer.h.1.attn.c_attn", {})) == expected
    assert found.ranks["transformer.h.1.attn.c_attn"] == 3


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("c_attn[o]", "its slices are q, k, v"),
        ("mlp.c_fc[q]", "how it is laid out is not known"),
        ("c_attn[0:97]", "is no slice"),
        ("c_attn[0:8,4:12]", "overlap"),
        ({"c_attn[q]": 2, "c_attn[v]": 3}, "slices of one layer have one rank"),
        ({"c_attn[0:2]": 3}, "of its smallest slice"),
        ("nothing[q]", "matches no layer"),
    ],
)
def test_what_is_no_slice_is_said(targets: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        select(tiny_gpt2(), targets, 2)


def test_a_users_own_class_of_a_known_name_is_not_taken_for_it() -> None:
    class GPT2Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(8, 24)

    assert parts_of(nn.ModuleDict({"attn": GPT2Attention()}), "attn.c_attn", 24) == {}
    with pytest.raises(TargetError, match="holds several roles at once"):
        select(nn.ModuleDict({"attn": GPT2Attention()}), "q", 2)


def test_gpt2_medium_has_the_papers_number_of_parameters() -> None:
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    attach(model, LoRA(rank=4, alpha=32, targets="qv"))
    assert summary(model).adapters["default"].parameters == 393_216


@pytest.mark.parametrize("name", ["GPT-2", "GPT-NeoX", "Phi-3"])
def test_a_sliced_adapters_life(name: str, tmp_path: Path) -> None:
    build, layer_name = FUSED[name]
    model, ids = build(), torch.arange(4, 15)[None]
    before, was = snapshot(model), bits(model)
    base = model(ids)[0]
    attach(model, LoRA(rank=2, alpha=3, targets="qv"))
    assert torch.equal(model(ids)[0], base)
    update = updates(model)[layer_name]
    assert isinstance(update, Sliced) and list(update.slices) == ["q", "v"]

    out = model(ids)[0]
    out.square().sum().backward()
    assert all(p.grad is not None for p in parameters(model)) and update.B_rows.grad.any()
    fill(model)
    branch = model(ids)[0]
    assert (branch - base).abs().max() > 1e-3
    dW = deltaw.delta(model, layer_name)
    rows = [i for runs in update.slices.values() for a, b in runs for i in range(a, b)]
    others = [i for i in range(update.d) if i not in rows]
    assert torch.equal(dW[others], torch.zeros_like(dW[others])) and dW[rows].abs().min() > 0

    save(model, tmp_path / "a")
    merge(model)
    torch.testing.assert_close(model(ids)[0], branch, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert all(torch.equal(bits(model)[n], v) for n, v in was.items())
    detach(model)
    assert_same(model, before)

    load(model, tmp_path / "a")
    assert isinstance(updates(model)[layer_name], Sliced) and torch.equal(model(ids)[0], branch)
    load(model, tmp_path / "a", name="narrow", dtype=torch.bfloat16)
    assert {p.dtype for p in parameters(model, "narrow")} == {torch.bfloat16}


def test_q_and_v_learn_as_layers_of_their_own_would() -> None:
    """A step of a slice is the step of that layer alone: its gradients are those of the whole layer's update, in its rows."""
    model = tiny_gpt2().eval()
    ids = torch.arange(4, 15)[None]
    torch.manual_seed(1)
    fill(attach(model, LoRA(rank=2, alpha=3, targets="c_attn[q,v]"), name="sliced"), "sliced")
    sliced = updates(model, "sliced")["transformer.h.0.attn.c_attn"]
    attach(model, LoRA(rank=4, alpha=6, targets="c_attn"), name="whole")
    for name, own in updates(model, "whole").items():
        other = updates(model, "sliced")[name]
        own.A.data.copy_(other.A)
        own.B.data.copy_(other.B)
    logits = {}
    for name in ("sliced", "whole"):
        with using(model, name):
            logits[name] = model(ids, labels=ids)
            logits[name].loss.backward()
    whole = updates(model, "whole")["transformer.h.0.attn.c_attn"]
    assert torch.equal(logits["sliced"].logits, logits["whole"].logits)
    assert torch.equal(sliced.A.grad, whole.A.grad)
    assert torch.equal(sliced.B_rows.grad, whole.B.grad.view(96, 2, 2)[sliced.rows, sliced.number])


def test_a_run_trains_slices(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        vocab_size=len(tokenizer),
        bos_token_id=1,
        eos_token_id=2,
        **NO_DROPOUT,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    before = bits(model)
    method = LoRA(rank=4, alpha=6, targets="c_attn[q,v],mlp")
    result = deltaw.train(model, RECORDS, quick(tmp_path), method=method, tokenizer=tokenizer)
    losses = [line["valid_loss"] for line in result.log if line["event"] == "eval"]
    assert losses[-1] < losses[0] - 0.05 and not result.warnings
    assert all(torch.equal(bits(model)[n], v) for n, v in before.items())
    update = updates(model)["transformer.h.1.attn.c_attn"]
    assert isinstance(update, Sliced) and update.B_rows.any()
    load(model, result.folder / "adapter", name="again")
    for own, other in zip(parameters(model, "again"), parameters(model, "default"), strict=True):
        assert torch.equal(own, other)


def test_real_peft_reads_a_sliced_adapter(tmp_path: Path) -> None:
    import peft as real

    model, ids = tiny_gpt2().eval(), torch.arange(4, 15)[None]
    plain = tiny_gpt2().eval()
    plain.load_state_dict(model.state_dict())
    fill(attach(model, LoRA(rank=2, alpha=3, targets="qv")))
    save(model, tmp_path / "a")
    theirs = real.PeftModel.from_pretrained(plain, tmp_path / "a")
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits)


def test_b_that_is_not_zero_elsewhere_is_a_whole_layers(tmp_path: Path) -> None:
    """PEFT may have trained on: its B is full, and nothing of it may be lost."""
    model = tiny_gpt2().eval()
    fill(attach(model, LoRA(rank=2, alpha=3, targets="qv")))
    save(model, tmp_path / "a")
    file = peft.read(tmp_path / "a")
    for _, B in file.factors.values():
        B.add_(0.1)
    peft.write(tmp_path / "b", file)
    detach(model)
    load(model, tmp_path / "b")
    update = updates(model)["transformer.h.0.attn.c_attn"]
    assert type(update) is LowRank and torch.equal(update.B, file.factors["transformer.h.0.attn.c_attn"][1])
    file.metadata[SLICES] = '{"transformer.h.0.attn.c_attn": {"q": []}}'
    peft.write(tmp_path / "c", file)
    with pytest.raises(FileError, match="are damaged"):
        load(model, tmp_path / "c", name="c")


def test_rows_with_adapters_of_their_own(tmp_path: Path) -> None:
    model, ids = tiny_gpt2().eval(), torch.arange(4, 37).view(3, 11)
    fill(attach(model, LoRA(rank=2, alpha=3, targets="qv"), name="sliced"), "sliced", seed=1)
    fill(attach(model, LoRA(rank=3, alpha=4), name="whole"), "whole", seed=2)
    with torch.no_grad(), route(model, ["sliced", None, "whole"]):
        mixed = model(ids).logits
    for row, name in enumerate(["sliced", None, "whole"]):
        with torch.no_grad(), using(model, name):
            torch.testing.assert_close(mixed[row], model(ids[row : row + 1]).logits[0], rtol=1e-4, atol=1e-5)


def test_what_slices_cannot_do_is_refused() -> None:
    with pytest.raises(TargetError, match="DoRA rescales whole layers"):
        attach(tiny_gpt2(), DoRA(rank=2, targets="qv"))
    with pytest.raises(AdapterError, match="extract takes whole layers"):
        deltaw.extract(tiny_gpt2(), tiny_gpt2(), rank=2, targets="qv")
    assert not select(tiny_llama(), "qv", 2).slices
