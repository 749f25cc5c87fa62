"""Settings in pairs: each has its effect on every kind of update, or is refused, or is said to have none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw import IA3, BitFit, Bottleneck, DoRA, Full, LoRA, TrainConfig, attach
from deltaw.errors import AdapterError, ConfigError, TargetError
from deltaw.methods.updates.lowrank import LowRank
from deltaw.model.summary import parameters, updates
from deltaw.runs.train import train
from deltaw.training import optim
from deltaw.training.flat import Flat
from tests.conftest import byte_llama, tiny_gpt2, tiny_llama
from tests.data.conftest import tiny_tokenizer
from tests.methods.updates.test_weights import Encoder, mixtral

IDS = torch.arange(4, 37).view(3, 11)
SETTINGS: dict[str, Any] = {"rank": 3, "alpha": 7, "dropout": 0.0}
KINDS: dict[str, tuple[Any, Any]] = {
    "plain": (tiny_llama, LoRA(**SETTINGS)),
    "Conv1D": (tiny_gpt2, LoRA(**SETTINGS, targets="mlp")),
    "slices": (tiny_gpt2, LoRA(**SETTINGS, targets="qv")),
    "embedding": (tiny_llama, LoRA(**SETTINGS, targets="q,embed_tokens")),
    "kaiming": (tiny_llama, LoRA(**SETTINGS, init="kaiming")),
    "pissa": (tiny_llama, LoRA(**SETTINGS, init="pissa")),
    "pissa, ranks": (tiny_llama, LoRA(**SETTINGS, init="pissa", targets={"q": 2, "down": 5}, scaling="alpha/sqrt(r)")),
    "pissa, embedding": (tiny_llama, LoRA(**SETTINGS, init="pissa", targets="embed_tokens")),
    "dora": (tiny_llama, DoRA(**SETTINGS)),
    "dora, kaiming": (tiny_gpt2, DoRA(**SETTINGS, init="kaiming", targets="mlp")),
    "experts": (mixtral, LoRA(**SETTINGS, targets="mlp")),
    "attention": (Encoder, LoRA(**SETTINGS, targets="in_proj_weight,linear1")),
    "head": (lambda: tiny_llama(tied=False), LoRA(**SETTINGS, targets="qv", whole="lm_head", norms=True)),
    "tokens": (tiny_llama, LoRA(**SETTINGS, targets="qv", tokens=[5, 9])),
}


def built(kind: str, **changes: Any) -> Any:
    """A model of this kind in training, with the base alone as its output at the start."""
    from dataclasses import replace

    make, method = KINDS[kind]
    torch.manual_seed(4)
    model = make()
    torch.manual_seed(5)
    return attach(model, replace(method, **changes)).train()


def opened(model: Any) -> Flat:
    adapted = updates(model)
    plain = {n: u for n, u in adapted.items() if isinstance(u, LowRank) and u.plain}
    layers = {n: model.get_submodule(n) for n in plain}
    return Flat(layers, plain, [[n] for n in plain], {n: u for n, u in adapted.items() if n not in plain})


def out(model: Any) -> Tensor:
    found = model(IDS)
    return found if isinstance(found, Tensor) else found.logits


def stepped(model: Any, config: TrainConfig, count: int = 2) -> dict[str, Tensor]:
    """The adapter's parameters after some steps, by their names."""
    with opened(model) as flat:
        optimizer = optim.make(flat, config)
        for _ in range(count):
            optim.set_lr(optimizer, config.lr)
            out(model).square().mean().backward()
            flat.add_gradients()
            optimizer.step()
            flat.zero_gradients()
            flat.refresh()
    return named(model)


def named(model: Any) -> dict[str, Tensor]:
    return {
        f"{name}:{own}": p.detach().clone() for name, u in updates(model).items() for own, p in u.named_parameters()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_of_learning_rates_reaches_every_b_and_nothing_else(kind: str) -> None:
    """With a pissa start B is called by another name, and its ratio had no effect."""
    start = named(built(kind))
    one, eight = (
        stepped(built(kind), TrainConfig(lr=1e-3, optimizer="SGD", lr_ratio=ratio), count=1) for ratio in (1.0, 8.0)
    )
    Bs = [n for n in start if n.rpartition(":")[2].rpartition(".")[2] in ("B", "B_rows", "own_B")]
    assert Bs
    moved = 0
    for name, before in start.items():
        ratio = 8.0 if name in Bs else 1.0
        torch.testing.assert_close(eight[name] - before, ratio * (one[name] - before), rtol=2e-3, atol=1e-7)
        moved += name in Bs and not torch.equal(one[name], before)
    assert moved == len(Bs)


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_decay_and_vectors_do_not(kind: str) -> None:
    """Magnitudes, norms and biases were pulled to zero too."""
    model = built(kind)
    start = named(model)
    with opened(model) as flat:
        optim.make(flat, TrainConfig(lr=0.1, weight_decay=0.5)).step()  # without any gradient
    for name, value in named(model).items():
        torch.testing.assert_close(value, start[name] * (1.0 if value.ndim < 2 else 1 - 0.1 * 0.5), msg=name)


@pytest.mark.parametrize("method", [IA3(), BitFit(add=True), Full()], ids=lambda m: type(m).__name__)
def test_other_methods_vectors_do_not_decay_either(method: Any) -> None:
    torch.manual_seed(4)
    model = attach(tiny_llama(), method).train()
    start = named(model)
    with opened(model) as flat:
        optim.make(flat, TrainConfig(lr=0.1, weight_decay=0.5)).step()
    assert all(torch.equal(v, start[n]) == (v.ndim < 2 or not v.any()) for n, v in named(model).items())


WITHOUT_DROPOUT = ("experts", "attention")  # which refuse it
EFFECTS: list[dict[str, Any]] = [{"dropout": 0.4}, {"alpha": 14.0}, {"scaling": "other"}, {"seed": 1}]


@pytest.mark.parametrize(
    ("kind", "setting"),
    [(k, s) for k in KINDS for s in EFFECTS if not ("dropout" in s and k in WITHOUT_DROPOUT)],
    ids=str,
)
def test_each_setting_has_its_effect(kind: str, setting: dict[str, Any]) -> None:
    """Each changes what two steps come to."""
    if "scaling" in setting:
        same = KINDS[kind][1].scaling == "alpha/r"
        setting = {"scaling": "alpha/sqrt(r)" if same else "alpha/r"}
    config = TrainConfig(lr=1e-2, optimizer="SGD")
    torch.manual_seed(0)
    plain = stepped(built(kind), config)
    changes = {k: v for k, v in setting.items() if k != "seed"}
    model = built(kind, **changes)
    torch.manual_seed(setting.get("seed", 0))
    other = stepped(model, config)
    differ = [n for n in plain if not torch.equal(plain[n], other[n])]
    assert bool(differ) == ("seed" not in setting)  # the steps of an adapter without dropout draw nothing


@pytest.mark.parametrize("kind", ["plain", "Conv1D", "slices", "embedding", "pissa", "pissa, embedding", "dora"])
def test_dropout_zeroes_what_it_says(kind: str) -> None:
    """In expectation over masks, the branch is what it is without; and of an embedding a token's branch is all there or gone."""
    model = built(kind, dropout=0.25)
    with torch.no_grad():
        for p in parameters(model):
            p.add_(torch.randn_like(p), alpha=0.05)
    (name, update), *_ = ((n, u) for n, u in updates(model).items() if kind != "pissa, embedding" or "embed" in n)
    if kind == "embedding":
        name, update = next((n, u) for n, u in updates(model).items() if "embed" in n)
    layer = model.get_submodule(name)
    k = update.A.shape[1]
    x = IDS.clone() if isinstance(layer, nn.Embedding) else torch.randn(4, k)
    with torch.no_grad():
        model.eval()
        kept = layer(x)
        base = type(layer).__mro__[1].forward(layer, x)
        model.train()
        many = torch.stack([layer(x) for _ in range(3000)])
    scale = float((kept - base).abs().max())
    assert float((many.mean(0) - kept).abs().max()) < 0.15 * scale
    if isinstance(layer, nn.Embedding):
        branch = many - base
        gone = (branch == 0).all(-1)
        assert 0.22 < float(gone.float().mean()) < 0.28
        expected = ((kept - base) / 0.75).expand_as(branch)
        torch.testing.assert_close(branch[~gone], expected[~gone], rtol=1e-3, atol=1e-5)


def test_what_cannot_be_honoured_is_refused() -> None:
    with pytest.raises(ConfigError, match="DoRA has no pissa start"):
        DoRA(init="pissa")
    with pytest.raises(TargetError, match=r"dropout could act on(.|\n)*encoder\.layers\.0\.self_attn\.out_proj"):
        attach(Encoder(), LoRA(rank=2, targets="out_proj", dropout=0.1))
    attach(Encoder(), LoRA(rank=2, targets="linear1", dropout=0.1))


class Reads(nn.Module):
    """Uses its layer's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 20)
        self.outer = nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.outer(torch.relu(x @ self.inner.weight.t()))
        return h


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_dropout_on_a_weight_that_is_read_without_a_call_is_refused_in_training(method: Any) -> None:
    """It had no effect, silently."""
    x = torch.randn(3, 12)
    model = attach(Reads(), method(rank=2, alpha=3, targets="inner,outer", dropout=0.2)).eval()
    model(x)
    with pytest.raises(AdapterError, match=r"20 outputs, 12 inputs.*a dropout of 0\.2 has no input to act on"):
        model.train()(x)
    deltaw.detach(model)
    attach(model, method(rank=2, targets="outer", dropout=0.2)).train()(x)


RECORDS = [{"prompt": f"a{i}", "completion": "b"} for i in range(12)]


def run(tmp_path: Path, method: Any, **settings: Any) -> list[str]:
    """The warnings of a short run."""
    tokenizer = tiny_tokenizer()
    config = TrainConfig(out=str(tmp_path / "run"), steps=2, batch=4, samples=0, dtype="float32", **settings)
    return train(byte_llama(tokenizer), copy.deepcopy(RECORDS), config, method=method, tokenizer=tokenizer).warnings


@pytest.mark.parametrize("method", [IA3(), Bottleneck(size=4), BitFit(add=True)], ids=lambda m: type(m).__name__)
def test_a_ratio_without_any_b_is_said(tmp_path: Path, method: Any) -> None:
    assert any("lr_ratio is 4, and the adapter has no B" in w for w in run(tmp_path, method, lr_ratio=4.0))


def test_settings_of_evaluations_without_held_out_records_are_said(tmp_path: Path) -> None:
    said = run(tmp_path, LoRA(rank=2), lr_ratio=4.0, patience=3, eval_every=1)
    assert [w for w in said if "no effect" in w] == [
        "A setting has no effect: patience is 3, and there are no held-out records.",
        "A setting has no effect: eval_every is 1, and there are no held-out records.",
    ]


def test_a_warm_up_as_long_as_the_run_is_said(tmp_path: Path) -> None:
    assert any("the warm-up takes 2 of 2 steps" in w for w in run(tmp_path, LoRA(rank=2), warmup=2))
